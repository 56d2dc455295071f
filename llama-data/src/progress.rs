//! How long work reports itself; drawing the bar is up to the program.

/// Receives the progress of long work. All methods may be called from any thread.
pub trait Progress: Sync {
    /// Work called `task` begins; `total` units of it, if known.
    fn start(&self, task: &str, total: Option<u64>);
    /// `units` more are done.
    fn advance(&self, units: u64);
    /// The work is done.
    fn finish(&self);
}

/// Ignores all progress.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn finish(&self) {}
}
