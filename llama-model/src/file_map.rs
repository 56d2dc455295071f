//! Files as memory.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

use crate::ModelError;

/// A file as bytes that are read from disk when they are used.
pub(crate) struct FileMap(Mmap);

impl FileMap {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |error| ModelError::io(path, error);
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read only. As with every memory-mapped reader, another process that truncates the file while it
        // is read can end this one; our own writers replace files instead of changing them.
        unsafe { Mmap::map(&file) }.map(Self).map_err(io)
    }

    /// What `read` makes of some of its bytes. They do not count as this process's memory afterwards: a model is read once, and would
    /// else be there twice, in the file's form and in ours.
    pub(crate) fn read<R>(&self, range: Range<usize>, read: impl FnOnce(&[u8]) -> R) -> R {
        let result = read(&self[range.clone()]);
        self.release(range);
        result
    }

    /// Gives pages back to the system's cache of files, from which they come again when they are used.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        // SAFETY: the pages are those of a file, mapped read only; there is nothing in them that the file has not. A refusal changes
        // nothing.
        let _ = unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
