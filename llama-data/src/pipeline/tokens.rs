//! Cleaned shards to token shards, and the tokenizer that makes them.

use std::path::Path;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::config::PrepareConfig;
use super::report::ShardReport;
use super::segment::{ShardPath, read_shard};
use crate::prepare::Split;
use crate::tokenizer::{Codec, EncodeCaches, Tokenizer, TrainOptions};
use crate::{DataError, Progress};

/// Text that is tokenized at a time.
const BATCH_BYTES: usize = 16 << 20;

/// Text of which the tokenizer's sample is drawn at a time: parts of long documents, several short lines.
const PIECE_BYTES: usize = 16 << 10;

/// Trains the tokenizer on a sample of all sources, of each as much as its weight says: pieces chosen by their hash, so that
/// the sample is spread over all documents and depends on nothing else. `bytes` is the cleaned text of each source.
pub(super) fn train(
    config: &PrepareConfig,
    shards: &[Vec<ShardPath>],
    bytes: &[u64],
    path: &Path,
    progress: &dyn Progress,
) -> Result<(), DataError> {
    let weights: f64 = config.source.iter().map(|source| source.weight).sum();
    let mut texts = Vec::new();
    for ((source, shards), &bytes) in config.source.iter().zip(shards).zip(bytes) {
        let share = config.tokenizer.train_bytes as f64 * source.weight / weights / bytes.max(1) as f64;
        for shard in shards {
            for document in read_shard(&shard.documents())? {
                texts.extend(pieces(&document?.text).filter(|piece| chance(piece) < share).map(String::from));
            }
        }
    }
    let options = TrainOptions { vocab_size: config.tokenizer.vocab_size, ..Default::default() };
    Tokenizer::train(texts.iter().map(String::as_str), &options, progress)?.save(path)
}

/// A text cut at the ends of lines, about every [`PIECE_BYTES`].
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let from = rest.floor_char_boundary(PIECE_BYTES);
        let end = rest[from..].find('\n').map_or(rest.len(), |end| from + end + 1);
        let (piece, after) = rest.split_at(end);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A number in 0..1 that a text has by its hash, so that what is chosen by it does not depend on order or sharding.
fn chance(text: &str) -> f64 {
    xxh3_64(text.as_bytes()) as f64 / u64::MAX as f64
}

/// Writes a shard's tokens: `train-00012.bin` and `valid-00012.bin`.
pub(super) fn tokenize(
    shard: &ShardPath,
    index: usize,
    folder: &Path,
    tokenizer: &Codec,
    config: &PrepareConfig,
) -> Result<(), DataError> {
    let mut report = ShardReport::default();
    let split = |name| Split::new(folder, name, index, tokenizer, u64::MAX);
    let (mut train, mut valid) = (split("train"), split("valid"));
    let caches = EncodeCaches::default();
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut flush = |batch: &mut Vec<String>| -> Result<(), DataError> {
        let encoded: Vec<(Vec<u32>, bool)> = std::mem::take(batch)
            .into_par_iter()
            .map(|text| {
                let tokens = tokenizer.encode_document(&text, config.tokenizer.eos, &caches);
                (tokens, chance(&text) < config.valid_fraction)
            })
            .collect();
        for (tokens, held_out) in encoded {
            if held_out { valid.push(&tokens)? } else { train.push(&tokens)? }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text() {
        let text: String = (0..5000).map(|line| format!("line {line} é\n")).collect();
        let all: Vec<&str> = pieces(&text).collect();
        assert!(all.len() > 3 && all.iter().all(|piece| piece.ends_with('\n')));
        assert_eq!(all.concat(), text);
        assert_eq!(pieces("").count(), 0);
        let half = all.iter().filter(|piece| chance(piece) < 0.5).count();
        assert!((1..all.len()).contains(&half));
    }
}
