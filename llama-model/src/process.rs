//! What a program does once, before anything else, to compute on the CPU at its best. A library should leave the choice
//! to the program.

use std::alloc::{GlobalAlloc, Layout, System};

/// Sets up this process and the calling thread for computing on the CPU: a few percent in training, much more in
/// decoding. Call it first in `main`, from the thread that will compute, and make [`HugePages`] the allocator.
///
/// * The calling thread becomes one of rayon's: otherwise every operation waits for two threads to wake up. If rayon's
///   threads were started before, they stay as they are.
/// * glibc's allocator (most of Linux) keeps freed memory for later. By default it gives large buffers back at once, and
///   every step of a training pays anew for the pages of all of its activations.
pub fn tune_process() {
    #[cfg(feature = "flex")]
    // An error says that the pool exists already.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the calls set parameters of the allocator and nothing else.
    unsafe {
        // Only buffers of 32 MB and more, the most that can be said, get mappings of their own: in the heap they would
        // leave holes that nothing else fills. The heap does not shrink, and grows by 64 MB at a time.
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED as libc::c_int);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// The system's allocator, with memory in huge pages where Linux gives them to programs that ask (`madvise`, the default of
/// most distributions): weights and activations are large, and with pages of 4 KB much of the time that reading them takes goes
/// into finding the pages, in a virtual machine most of all. Elsewhere it is the system's allocator and nothing more.
///
/// ```
/// #[global_allocator]
/// static MEMORY: llama_model::HugePages = llama_model::HugePages;
///
/// fn main() {
///     llama_model::tune_process();
/// }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

/// Bytes from which a block may have a mapping of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED: usize = 32 << 20;
/// Bytes from which a block is worth a look at where it is.
const LARGE: usize = 64 << 10;

// SAFETY: all blocks are the system's; advice about their pages does not change what is in them.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: for this and the others, the caller's promises are the system's conditions.
        advised(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        advised(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        advised(unsafe { System.realloc(block, layout, size) }, size)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe { System.dealloc(block, layout) }
    }
}

/// The block, after asking for huge pages where it is large.
#[inline]
fn advised(block: *mut u8, size: usize) -> *mut u8 {
    if size >= LARGE && !block.is_null() {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        advise(block as usize, size);
    }
    block
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn advise(block: usize, size: usize) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    /// Where the part of the heap ends that was asked for.
    static ASKED: AtomicUsize = AtomicUsize::new(0);

    let ask = |start: usize, end: usize| {
        const PAGE: usize = 4096;
        let start = start.next_multiple_of(PAGE);
        if start < end {
            // SAFETY: the pages are this process's. A refusal changes nothing, so the answer does not matter.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    };
    // SAFETY: asks for the end of the heap.
    let end = unsafe { libc::sbrk(0) } as usize;
    if size >= MAPPED && block > end {
        return ask(block, block + size);
    }
    let asked = ASKED.fetch_max(end, Ordering::Relaxed);
    if asked < end {
        // The first time, the heap has grown by what is asked for at a time.
        ask(if asked == 0 { block.min(end) } else { asked }, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks around both sizes can be written, grown and freed.
    #[test]
    fn blocks_are_the_systems() {
        for size in [1, LARGE, 3 << 20, 33 << 20] {
            let layout = Layout::from_size_align(size, 64).unwrap();
            let grown = Layout::from_size_align(2 * size, 64).unwrap();
            // SAFETY: each block is used within its size and freed with its layout.
            unsafe {
                let block = HugePages.alloc_zeroed(layout);
                assert!((0..size).step_by(509).all(|i| *block.add(i) == 0));
                (0..size).for_each(|i| *block.add(i) = i as u8);
                let block = HugePages.realloc(block, layout, grown.size());
                assert!((0..size).all(|i| *block.add(i) == i as u8));
                HugePages.dealloc(block, grown);
            }
        }
    }
}
