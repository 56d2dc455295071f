//! Files that are there whole or not at all.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::DataError;

/// A file that is written beside its place and renamed into it.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Begins a file that will be at `path`. If it is dropped unfinished nothing is left.
    pub fn create(path: &Path) -> Result<Self, DataError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        // Readable as any file is; a temporary one would be its owner's alone.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.prefix(".tmp-").tempfile_in(folder).map_err(|error| DataError::io(path, error))?;
        Ok(Self { path: path.into(), file: BufWriter::with_capacity(1 << 18, file) })
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.file.write_all(bytes).map_err(|error| DataError::io(&self.path, error))
    }

    /// Overwrites the first bytes.
    pub fn set_start(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        let write = |file: &mut BufWriter<NamedTempFile>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(bytes)?;
            file.seek(SeekFrom::End(0)).map(drop)
        };
        write(&mut self.file).map_err(|error| DataError::io(&self.path, error))
    }

    /// Flushes it to the disk and renames it into place.
    pub fn finish(self) -> Result<(), DataError> {
        let io = |error| DataError::io(&self.path, error);
        let file = self.file.into_inner().map_err(|error| io(error.into_error()))?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&self.path).map_err(|error| io(error.error))?;
        Ok(())
    }
}

/// Writes a whole file.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<NamedTempFile>) -> std::io::Result<()>,
) -> Result<(), DataError> {
    let mut file = AtomicFile::create(path)?;
    write(&mut file.file).map_err(|error| DataError::io(path, error))?;
    file.finish()
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_whole_or_absent_and_as_readable_as_others() {
        let folder = tempfile::tempdir().unwrap();
        let (path, plain) = (folder.path().join("a"), folder.path().join("plain"));
        let mut file = AtomicFile::create(&path).unwrap();
        file.push(b"..two").unwrap();
        assert!(!path.exists());
        file.set_start(b"on").unwrap();
        file.push(b"!").unwrap();
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"ontwo!");
        std::fs::write(&plain, "").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
        drop(AtomicFile::create(&folder.path().join("b")).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
