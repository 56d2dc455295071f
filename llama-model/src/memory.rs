//! How the process keeps its memory.

/// Asks the system's allocator to keep freed memory for later, where that is glibc's (most of Linux).
///
/// By default glibc gives large buffers back at once, and every step of a training then pays anew for the pages of all
/// of its activations. Programs that train or generate on the CPU gain a few percent by calling this once, before
/// anything else; a library should leave the choice to them.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the calls set parameters of the allocator and nothing else.
    unsafe {
        // Only buffers of 32 MB and more, the most that can be said, get mappings of their own: in the heap they would
        // leave holes that nothing else fills. The heap does not shrink, and grows by 64 MB at a time.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
