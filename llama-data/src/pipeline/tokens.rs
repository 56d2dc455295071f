//! Cleaned shards to token shards, and the tokenizer that makes them.

use std::path::Path;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::config::PrepareConfig;
use super::report::ShardReport;
use super::segment::{ShardPath, read_shard};
use crate::shard::ShardWriter;
use crate::tokenizer::{EncodeCaches, Tokenizer, TrainOptions};
use crate::{DataError, Progress};

/// Text that is tokenized at a time.
const BATCH_BYTES: usize = 16 << 20;

/// Trains the tokenizer on text of all sources, of each as much as its weight says, from all its shards alike.
pub(super) fn train(
    config: &PrepareConfig,
    shards: &[Vec<ShardPath>],
    path: &Path,
    progress: &dyn Progress,
) -> Result<(), DataError> {
    let weights: f64 = config.source.iter().map(|source| source.weight).sum();
    let mut texts = Vec::new();
    for (source, shards) in config.source.iter().zip(shards) {
        let bytes = (config.tokenizer.train_bytes as f64 * source.weight / weights) as usize;
        for shard in shards {
            let mut left = bytes / shards.len();
            for document in read_shard(&shard.documents())? {
                let mut text = document?.text;
                text.truncate(text.floor_char_boundary(left));
                left -= text.len();
                texts.push(text);
                if left == 0 {
                    break;
                }
            }
        }
    }
    let options = TrainOptions { vocab_size: config.tokenizer.vocab_size, ..Default::default() };
    Tokenizer::train(texts.iter().map(String::as_str), &options, progress)?.save(path)
}

/// Writes a shard's tokens: `train-00012.bin` and `valid-00012.bin`.
pub(super) fn tokenize(
    shard: &ShardPath,
    index: usize,
    folder: &Path,
    tokenizer: &Tokenizer,
    config: &PrepareConfig,
) -> Result<(), DataError> {
    let mut report = ShardReport::default();
    let mut train = Split::new(folder, "train", index);
    let mut valid = Split::new(folder, "valid", index);
    let caches = EncodeCaches::default();
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut flush = |batch: &mut Vec<String>| -> Result<(), DataError> {
        let encoded: Vec<(Vec<u32>, bool)> = std::mem::take(batch)
            .into_par_iter()
            .map(|text| {
                // By the text, so that the choice does not depend on order or sharding.
                let chance = xxh3_64(text.as_bytes()) as f64 / u64::MAX as f64;
                let tokens = caches.with(|cache| tokenizer.encode_document(&text, config.tokenizer.eos, cache));
                (tokens, chance < config.valid_fraction)
            })
            .collect();
        for (tokens, held_out) in encoded {
            if held_out { valid.push(&tokens, tokenizer)? } else { train.push(&tokens, tokenizer)? }
        }
        Ok(())
    };
    for document in read_shard(&shard.documents())? {
        let text = document?.text;
        bytes += text.len();
        batch.push(text);
        if bytes >= BATCH_BYTES {
            bytes = 0;
            flush(&mut batch)?;
        }
    }
    flush(&mut batch)?;
    report.train_tokens = train.finish()?;
    report.valid_tokens = valid.finish()?;
    report.write(&ShardPath::new(folder, index).report())
}

/// A shard file that is begun with its first document.
struct Split {
    path: std::path::PathBuf,
    writer: Option<ShardWriter>,
}

impl Split {
    fn new(folder: &Path, split: &str, index: usize) -> Self {
        Self { path: folder.join(format!("{split}-{index:05}.bin")), writer: None }
    }

    fn push(&mut self, tokens: &[u32], tokenizer: &Tokenizer) -> Result<(), DataError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let writer = ShardWriter::create(&self.path, tokenizer.vocab_size(), tokenizer.fingerprint())?;
                self.writer.insert(writer)
            }
        };
        writer.push(tokens)
    }

    fn finish(self) -> Result<u64, DataError> {
        let Some(writer) = self.writer else { return Ok(0) };
        let tokens = writer.tokens();
        writer.finish()?;
        Ok(tokens)
    }
}
