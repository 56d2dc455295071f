//! Keys of items on disk, by partition.
//!
//! Little-endian: the magic `LLAMAKEY`, the number of partitions (8 bytes), the index of each one's first entry and the number of all
//! (8 bytes each), then the entries, a key and an item of 8 bytes each.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::DataError;

const MAGIC: &[u8; 8] = b"LLAMAKEY";

/// Entries that are held in memory; more go to a temporary file.
const HELD: usize = 1 << 20;

/// Collects entries and writes them.
#[derive(Debug)]
pub struct KeyWriter {
    partitions: Vec<Vec<(u64, u64)>>,
    held: usize,
    spilled: Option<File>,
    /// What the temporary file holds: a partition and its number of entries, one after the other.
    extents: Vec<(usize, usize)>,
}

impl KeyWriter {
    /// For `partitions` partitions.
    pub fn new(partitions: usize) -> Self {
        Self { partitions: vec![Vec::new(); partitions], held: 0, spilled: None, extents: Vec::new() }
    }

    /// Adds an entry to the partition its key belongs to.
    ///
    /// # Errors
    /// [`DataError::Io`] of the temporary file.
    pub fn push_key(&mut self, key: u64, item: u64) -> Result<(), DataError> {
        let partition = ((u128::from(key) * self.partitions.len() as u128) >> 64) as usize;
        self.push(partition, key, item)
    }

    /// Adds an entry to a partition.
    ///
    /// # Errors
    /// [`DataError::Io`] of the temporary file.
    pub fn push(&mut self, partition: usize, key: u64, item: u64) -> Result<(), DataError> {
        self.partitions[partition].push((key, item));
        self.held += 1;
        if self.held < HELD {
            return Ok(());
        }
        self.spill().map_err(|error| DataError::io(Path::new("temporary file"), error))
    }

    fn spill(&mut self) -> std::io::Result<()> {
        let file = match &mut self.spilled {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        let mut file = BufWriter::with_capacity(1 << 20, file);
        for (partition, entries) in self.partitions.iter_mut().enumerate().filter(|(_, entries)| !entries.is_empty()) {
            self.extents.push((partition, entries.len()));
            write_entries(&mut file, entries)?;
            entries.clear();
        }
        self.held = 0;
        file.flush()
    }

    /// Writes all entries, atomically.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn write(mut self, path: &Path) -> Result<(), DataError> {
        crate::write_atomically(path, |file| {
            file.write_all(MAGIC)?;
            file.write_all(&(self.partitions.len() as u64).to_le_bytes())?;
            let mut lengths: Vec<usize> = self.partitions.iter().map(Vec::len).collect();
            self.extents.iter().for_each(|&(partition, length)| lengths[partition] += length);
            let mut start = 0;
            for length in lengths.into_iter().chain([0]) {
                file.write_all(&(start as u64).to_le_bytes())?;
                start += length;
            }
            for (partition, entries) in self.partitions.iter().enumerate() {
                let mut offset = 0;
                for &(owner, length) in &self.extents {
                    if let Some(spilled) = self.spilled.as_mut().filter(|_| owner == partition) {
                        spilled.seek(SeekFrom::Start(offset))?;
                        std::io::copy(&mut spilled.take(16 * length as u64), file)?;
                    }
                    offset += 16 * length as u64;
                }
                write_entries(file, entries)?;
            }
            Ok(())
        })
    }
}

fn write_entries(file: &mut impl Write, entries: &[(u64, u64)]) -> std::io::Result<()> {
    for (key, item) in entries {
        file.write_all(&key.to_le_bytes())?;
        file.write_all(&item.to_le_bytes())?;
    }
    Ok(())
}

/// A file of keys.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    starts: Vec<u64>,
}

impl KeyFile {
    /// Opens a file and reads where its partitions are.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is not whole.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let io = |error| DataError::io(path, error);
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut reader = BufReader::new(file);
        let mut word = [0; 8];
        reader.read_exact(&mut word).map_err(io)?;
        if &word != MAGIC {
            return Err(DataError::format(path, "not a file of keys"));
        }
        reader.read_exact(&mut word).map_err(io)?;
        let partitions = u64::from_le_bytes(word);
        if partitions.saturating_mul(8).saturating_add(24) > len {
            return Err(DataError::format(path, format!("{partitions} partitions do not fit into {len} bytes")));
        }
        let mut starts = Vec::with_capacity(partitions as usize + 1);
        for _ in 0..=partitions {
            reader.read_exact(&mut word).map_err(io)?;
            starts.push(u64::from_le_bytes(word));
        }
        let expected = starts[partitions as usize].saturating_mul(16).saturating_add(24 + 8 * partitions);
        if !starts.is_sorted() || expected != len {
            return Err(DataError::format(path, format!("the file has {len} bytes, its index says {expected}")));
        }
        Ok(Self { path: path.into(), starts })
    }

    /// Number of partitions.
    pub fn partitions(&self) -> usize {
        self.starts.len() - 1
    }

    /// The `(key, item)` entries of a partition.
    ///
    /// # Errors
    /// [`DataError::Io`].
    ///
    /// # Panics
    /// If there is no such partition.
    pub fn partition(&self, partition: usize) -> Result<Vec<(u64, u64)>, DataError> {
        let (start, end) = (self.starts[partition], self.starts[partition + 1]);
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(16 + 8 * self.starts.len() as u64 + 16 * start))?;
            let mut bytes = vec![0; 16 * (end - start) as usize];
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|error| DataError::io(&self.path, error))?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)))
            .collect();
        Ok(words.chunks_exact(2).map(|entry| (entry[0], entry[1])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_by_partition_and_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let mut writer = KeyWriter::new(3);
        writer.push(0, 5, 1).unwrap();
        writer.push(2, u64::MAX, 2).unwrap();
        writer.spill().unwrap();
        writer.push_key(1, 3).unwrap();
        writer.write(&path).unwrap();
        let file = KeyFile::open(&path).unwrap();
        assert_eq!(file.partitions(), 3);
        assert_eq!(file.partition(0).unwrap(), [(5, 1), (1, 3)]);
        assert_eq!(file.partition(1).unwrap(), []);
        assert_eq!(file.partition(2).unwrap(), [(u64::MAX, 2)]);
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(KeyFile::open(&path).is_err(), "{cut}");
        }
    }
}
