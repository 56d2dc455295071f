//! Token shards: tokens on disk as training reads them.
//!
//! A shard is a little-endian file:
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `LLAMATOK` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | bytes per token: 2 (vocabularies up to 65,536) or 4 |
//! | 16 | 8 | vocabulary size |
//! | 24 | 8 | fingerprint of the tokenizer |
//! | 32 | 8 | number of tokens |
//! | 40 | 8 | number of documents |
//! | 48 | 8 | XXH3-64 of all bytes after the header |
//! | 56 | 8 | XXH3-64 of the 56 bytes before |
//! | 64 | | the tokens, then zeros up to a multiple of 8 |
//! | | 8 each | index of each document's first token |

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{AtomicFile, DataError};

const MAGIC: &[u8; 8] = b"LLAMATOK";
const VERSION: u32 = 1;
const HEADER: usize = 64;

/// The fields of a shard's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    token_bytes: u32,
    vocab_size: u64,
    tokenizer: u64,
    tokens: u64,
    documents: u64,
    checksum: u64,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.token_bytes.to_le_bytes());
        let fields = [self.vocab_size, self.tokenizer, self.tokens, self.documents, self.checksum];
        for (slot, field) in bytes[16..56].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        let own = xxh3_64(&bytes[..56]);
        bytes[56..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let header: &[u8; HEADER] = bytes
            .first_chunk()
            .ok_or_else(|| format!("a shard has at least {HEADER} bytes, this file has {}", bytes.len()))?;
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &header[..8] != MAGIC {
            return Err("not a token shard: the file does not begin with `LLAMATOK`".into());
        }
        if u32_at(8) != VERSION {
            return Err(format!("shard version {}, this program reads version {VERSION}", u32_at(8)));
        }
        if u64_at(56) != xxh3_64(&header[..56]) {
            return Err("the header is damaged (its checksum does not match)".into());
        }
        let token_bytes = u32_at(12);
        if token_bytes != 2 && token_bytes != 4 {
            return Err(format!("{token_bytes} bytes per token; 2 and 4 are read"));
        }
        Ok(Self {
            token_bytes,
            vocab_size: u64_at(16),
            tokenizer: u64_at(24),
            tokens: u64_at(32),
            documents: u64_at(40),
            checksum: u64_at(48),
        })
    }

    /// Where the document index begins.
    fn index_start(&self) -> Option<u64> {
        let tokens = self.tokens.checked_mul(u64::from(self.token_bytes))?.checked_next_multiple_of(8)?;
        tokens.checked_add(HEADER as u64)
    }

    fn file_len(&self) -> Option<u64> {
        self.index_start()?.checked_add(self.documents.checked_mul(8)?)
    }
}

/// Writes one shard: documents are appended, then [`finish`](Self::finish) puts the file into its place. A writer that
/// is dropped before leaves nothing.
pub struct ShardWriter {
    file: AtomicFile,
    hash: Xxh3,
    header: Header,
    documents: Vec<u64>,
}

impl ShardWriter {
    /// Begins a shard that will be at `path`.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn create(path: &Path, vocab_size: usize, tokenizer: u64) -> Result<Self, DataError> {
        let mut file = AtomicFile::create(path)?;
        file.push(&[0; HEADER])?;
        let header = Header {
            token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
            vocab_size: vocab_size as u64,
            tokenizer,
            tokens: 0,
            documents: 0,
            checksum: 0,
        };
        Ok(Self { file, hash: Xxh3::new(), header, documents: Vec::new() })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Appends a document.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a token outside the vocabulary.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        if let Some(token) = tokens.iter().find(|&&token| u64::from(token) >= self.header.vocab_size) {
            let reason = format!("token {token} is outside the vocabulary of {}", self.header.vocab_size);
            return Err(DataError::format(self.file.path(), reason));
        }
        self.documents.push(self.header.tokens);
        self.header.tokens += tokens.len() as u64;
        if self.header.token_bytes == 2 {
            let narrow: Vec<u16> = tokens.iter().map(|&token| (token as u16).to_le()).collect();
            self.write(bytemuck::cast_slice(&narrow))
        } else {
            let wide: Vec<u32> = tokens.iter().map(|token| token.to_le()).collect();
            self.write(bytemuck::cast_slice(&wide))
        }
    }

    /// Writes index and header, flushes to the disk and renames into place.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn finish(mut self) -> Result<(), DataError> {
        let used = self.header.tokens * u64::from(self.header.token_bytes);
        self.write(&vec![0; (used.next_multiple_of(8) - used) as usize])?;
        let index: Vec<u64> = std::mem::take(&mut self.documents).into_iter().map(u64::to_le).collect();
        self.write(bytemuck::cast_slice(&index))?;
        self.header.documents = index.len() as u64;
        self.header.checksum = self.hash.digest();
        self.file.set_start(&self.header.to_bytes())?;
        self.file.finish()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hash.update(bytes);
        self.file.push(bytes)
    }
}

/// A shard, mapped into memory.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Header,
    index_start: usize,
}

impl Shard {
    /// Opens a shard and checks header and length; [`verify`](Self::verify) reads it all.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is not a whole shard.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let io = |error| DataError::io(path, error);
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read only. As with every memory-mapped reader, another process that truncates the file
        // while it is read can end this one; our own writer replaces files instead of changing them.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let header = Header::parse(&map).map_err(|reason| DataError::format(path, reason))?;
        if header.file_len() != Some(map.len() as u64) {
            let reason = format!(
                "the header promises {} tokens in {} documents, which does not fit a file of {} bytes; it was cut off or damaged",
                header.tokens,
                header.documents,
                map.len()
            );
            return Err(DataError::format(path, reason));
        }
        let index_start = header.index_start().unwrap_or(u64::MAX) as usize;
        let shard = Self { path: path.into(), map, header, index_start };
        let documents = shard.documents();
        let sorted = documents.windows(2).all(|pair| pair[0] <= pair[1]);
        let inside = documents.last().is_none_or(|&last| last <= header.tokens);
        if !sorted || !inside {
            return Err(DataError::format(path, "the document index is not ascending or points outside the tokens"));
        }
        Ok(shard)
    }

    /// Reads the whole shard and compares its checksum.
    ///
    /// # Errors
    /// [`DataError::Format`] if a byte has changed or a token is outside the vocabulary.
    pub fn verify(&self) -> Result<(), DataError> {
        if xxh3_64(&self.map[HEADER..]) != self.header.checksum {
            return Err(DataError::format(&self.path, "the content is damaged (its checksum does not match)"));
        }
        let mut token = 0;
        self.read(0, self.tokens(), |t| token = token.max(t));
        if self.header.tokens > 0 && u64::from(token) >= self.header.vocab_size {
            let reason = format!("token {token} is outside the vocabulary of {}", self.header.vocab_size);
            return Err(DataError::format(&self.path, reason));
        }
        Ok(())
    }

    /// Where the shard is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Size of the vocabulary the tokens are from.
    pub fn vocab_size(&self) -> u64 {
        self.header.vocab_size
    }

    /// Fingerprint of the tokenizer that made the tokens.
    pub fn tokenizer(&self) -> u64 {
        self.header.tokenizer
    }

    /// Index of each document's first token.
    pub fn documents(&self) -> Vec<u64> {
        self.map[self.index_start..].as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
    }

    /// Calls `each` for the `len` tokens from `start` on with the place, counted from `start`, of the first token of their document:
    /// 0 where that lies before.
    pub fn document_starts(&self, start: u64, len: u64, mut each: impl FnMut(u64)) {
        let documents = self.map[self.index_start..].as_chunks().0;
        let first = |index: usize| documents.get(index).map(|bytes| u64::from_le_bytes(*bytes));
        let mut next = documents.partition_point(|bytes| u64::from_le_bytes(*bytes) <= start);
        let mut own = 0;
        for at in 0..len {
            // Documents may be empty: several begin at one token.
            while first(next) == Some(start + at) {
                own = at;
                next += 1;
            }
            each(own);
        }
    }

    /// Calls `each` for the `len` tokens from `start` on.
    ///
    /// # Panics
    /// If they are not all inside the shard.
    pub fn read(&self, start: u64, len: u64, mut each: impl FnMut(u32)) {
        assert!(start + len <= self.header.tokens, "tokens {start}..{} of {}", start + len, self.header.tokens);
        let width = self.header.token_bytes as usize;
        let bytes = &self.map[HEADER + start as usize * width..][..len as usize * width];
        if width == 2 {
            bytes.as_chunks().0.iter().for_each(|bytes| each(u32::from(u16::from_le_bytes(*bytes))));
        } else {
            bytes.as_chunks().0.iter().for_each(|bytes| each(u32::from_le_bytes(*bytes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(path: &Path, vocab_size: usize, documents: &[Vec<u32>]) {
        let mut writer = ShardWriter::create(path, vocab_size, 7).unwrap();
        documents.iter().for_each(|document| writer.push(document).unwrap());
        writer.finish().unwrap();
    }

    fn all(shard: &Shard) -> Vec<u32> {
        let mut tokens = Vec::new();
        shard.read(0, shard.tokens(), |token| tokens.push(token));
        tokens
    }

    proptest! {
        #[test]
        fn shards_round_trip(wide: bool, documents in prop::collection::vec(prop::collection::vec(0u32..65_536, 0..50), 0..10)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.bin");
            write(&path, if wide { 100_000 } else { 65_536 }, &documents);
            let shard = Shard::open(&path).unwrap();
            shard.verify().unwrap();
            prop_assert_eq!(all(&shard), documents.concat());
            let starts = documents.iter().scan(0, |at, d| { let start = *at; *at += d.len() as u64; Some(start) });
            prop_assert_eq!(shard.documents(), starts.collect::<Vec<_>>());
            prop_assert_eq!(shard.tokenizer(), 7);
        }

        /// Whatever single byte is changed and wherever the file is cut, it is never taken for a whole shard.
        #[test]
        fn damage_is_found(at in 0usize..200, bit in 0u8..8, cut in 0usize..200) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.bin");
            write(&path, 500, &[(0..31).collect(), (31..60).collect()]);
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            bad[at % good.len()] ^= 1 << bit;
            std::fs::write(&path, &bad).unwrap();
            prop_assert!(Shard::open(&path).and_then(|shard| shard.verify()).is_err());
            std::fs::write(&path, &good[..cut % good.len()]).unwrap();
            prop_assert!(Shard::open(&path).is_err());
        }
    }

    #[test]
    fn errors_name_the_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        std::fs::write(&path, [b'x'; 100]).unwrap();
        assert!(Shard::open(&path).unwrap_err().to_string().contains("LLAMATOK"));
        write(&path, 500, &[vec![1, 2, 3]]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 8]).unwrap();
        assert!(Shard::open(&path).unwrap_err().to_string().contains("cut off"));
        assert!(Shard::open(&folder.path().join("none.bin")).unwrap_err().to_string().contains("none.bin"));
        let mut writer = ShardWriter::create(&path, 500, 7).unwrap();
        assert!(writer.push(&[500]).unwrap_err().to_string().contains("500"));
    }

    #[test]
    fn an_unfinished_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(&folder.path().join("a.bin"), 500, 7).unwrap();
        writer.push(&[1, 2]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
