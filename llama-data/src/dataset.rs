//! The shards of a split as numbered training windows.

use std::path::Path;

use crate::DataError;
use crate::shard::Shard;

/// All shards of one split, cut into windows of `seq_len` inputs and their targets. Windows follow one another without
/// overlap inside a shard; what is left at its end, less than a window, is not trained on.
#[derive(Debug)]
pub struct TokenDataset {
    shards: Vec<Shard>,
    /// First window of each shard, and the number of all windows.
    starts: Vec<u64>,
    seq_len: usize,
}

impl TokenDataset {
    /// Opens and verifies the shards `<split>-*.bin` in a folder.
    ///
    /// # Errors
    /// [`DataError::Empty`] without shards, [`DataError::TokenizerMismatch`], [`DataError::TooShort`] if no shard holds
    /// a window, and those of [`Shard::open`] and [`Shard::verify`].
    pub fn open(folder: &Path, split: &str, tokenizer: u64, seq_len: usize) -> Result<Self, DataError> {
        let entries = std::fs::read_dir(folder).map_err(|error| DataError::io(folder, error))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| DataError::io(folder, error))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!("{split}-")) && name.ends_with(".bin") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            let hint = format!("the folder has no shards named {split}-*.bin; tokenize text into it first");
            return Err(DataError::Empty { path: folder.into(), hint });
        }
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>, _>>()?;
        for shard in &shards {
            if shard.tokenizer() != tokenizer {
                return Err(DataError::TokenizerMismatch {
                    path: shard.path().into(),
                    shard: shard.tokenizer(),
                    given: tokenizer,
                });
            }
            shard.verify()?;
        }
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts[starts.len() - 1] + shard.tokens().saturating_sub(1) / seq_len as u64);
        }
        if starts[shards.len()] == 0 {
            return Err(DataError::TooShort {
                path: folder.into(),
                found: shards.iter().map(Shard::tokens).max().unwrap_or(0),
                needed: seq_len as u64 + 1,
            });
        }
        Ok(Self { shards, starts, seq_len })
    }

    /// Number of windows.
    pub fn windows(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    /// Number of tokens, those outside windows included.
    pub fn tokens(&self) -> u64 {
        self.shards.iter().map(Shard::tokens).sum()
    }

    /// Inputs of one window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Appends for each of a window's inputs the position in the window of the first token of its document.
    ///
    /// # Panics
    /// If there is no such window.
    pub fn read_starts(&self, window: u64, starts: &mut Vec<i32>) {
        let (shard, start) = self.locate(window);
        shard.document_starts(start, self.seq_len as u64, |first| starts.push(first as i32));
    }

    /// A window's shard and its first token there.
    fn locate(&self, window: u64) -> (&Shard, u64) {
        assert!(window < self.windows(), "window {window} of {}", self.windows());
        let shard = self.starts.partition_point(|&start| start <= window) - 1;
        (&self.shards[shard], (window - self.starts[shard]) * self.seq_len as u64)
    }

    /// Appends a window's `seq_len` inputs and, one token on, its targets.
    ///
    /// # Panics
    /// If there is no such window.
    pub fn read(&self, window: u64, inputs: &mut Vec<i32>, targets: &mut Vec<i32>) {
        let (shard, start) = self.locate(window);
        let mut index = 0;
        shard.read(start, self.seq_len as u64 + 1, |token| {
            if index < self.seq_len {
                inputs.push(token as i32);
            }
            if index > 0 {
                targets.push(token as i32);
            }
            index += 1;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardWriter;

    fn shard(folder: &Path, name: &str, tokens: std::ops::Range<u32>) {
        let mut writer = ShardWriter::create(&folder.join(name), 500, 7).unwrap();
        writer.push(&tokens.collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn windows_cover_the_shards_in_order() {
        let folder = tempfile::tempdir().unwrap();
        shard(folder.path(), "train-1.bin", 100..109);
        shard(folder.path(), "train-0.bin", 0..10);
        shard(folder.path(), "valid-0.bin", 200..300);
        let data = TokenDataset::open(folder.path(), "train", 7, 4).unwrap();
        let windows: Vec<_> = (0..data.windows())
            .map(|window| {
                let (mut inputs, mut targets) = (Vec::new(), Vec::new());
                data.read(window, &mut inputs, &mut targets);
                (inputs, targets)
            })
            .collect();
        let window = |start: i32| ((start..start + 4).collect::<Vec<_>>(), (start + 1..start + 5).collect::<Vec<_>>());
        assert_eq!(windows, [window(0), window(4), window(100), window(104)]);
    }

    #[test]
    fn tokens_know_where_their_document_begins() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(&folder.path().join("train-0.bin"), 500, 7).unwrap();
        for document in [&[1, 2, 3][..], &[4, 5], &[6, 7, 8, 9, 10, 11]] {
            writer.push(document).unwrap();
        }
        writer.finish().unwrap();
        let data = TokenDataset::open(folder.path(), "train", 7, 4).unwrap();
        let starts = |window| {
            let mut starts = Vec::new();
            data.read_starts(window, &mut starts);
            starts
        };
        assert_eq!([starts(0), starts(1)], [[0, 0, 0, 3], [0, 1, 1, 1]]);
    }

    #[test]
    fn a_wrong_tokenizer_and_short_text_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        shard(folder.path(), "train-0.bin", 0..10);
        let open = |split, tokenizer, seq_len| TokenDataset::open(folder.path(), split, tokenizer, seq_len);
        assert!(matches!(open("train", 8, 4), Err(DataError::TokenizerMismatch { .. })));
        assert!(matches!(open("train", 7, 10), Err(DataError::TooShort { found: 10, needed: 11, .. })));
        assert!(matches!(open("valid", 7, 4), Err(DataError::Empty { .. })));
        assert_eq!(open("train", 7, 9).unwrap().windows(), 1);
    }
}
