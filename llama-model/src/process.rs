//! What a program does once, before anything else, to compute on the CPU at its best. A library should leave the choice
//! to the program.

/// Sets up this process and the calling thread for computing on the CPU: a few percent in training, much more in
/// decoding. Call it first in `main`, from the thread that will compute.
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
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
