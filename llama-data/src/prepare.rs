//! Text to token shards, in parallel.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::shard::ShardWriter;
use crate::source::{Document, Sources};
use crate::tokenizer::{Codec, EncodeCaches, Tokenizer, TrainOptions};
use crate::{DataError, Progress};

/// Text that is tokenized at a time.
const CHUNK_BYTES: usize = 16 << 20;
/// A document longer than this gives its end to validation; of shorter ones, one in so many goes there whole.
const LONG_DOCUMENT: usize = 64 << 10;

/// How shards are made.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Share of the text held out for validation. Nothing is held out of a text of few short documents.
    pub valid_fraction: f64,
    /// Whether a document ends with EOS. It begins with BOS, if that is how the vocabulary's texts begin.
    pub eos: bool,
    /// A shard is closed at the first document that brings it to this many tokens.
    pub shard_tokens: u64,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self { valid_fraction: 0.005, eos: true, shard_tokens: 1 << 28 }
    }
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrepareReport {
    /// Documents read.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Training tokens.
    pub train_tokens: u64,
    /// Validation tokens.
    pub valid_tokens: u64,
    /// Bytes of text held out for validation; with it a loss per token becomes bits per byte.
    pub valid_bytes: u64,
    /// Files in folders that were passed over because they are not UTF-8 text.
    pub skipped: Vec<PathBuf>,
}

/// Trains a tokenizer on up to `max_bytes` of the sources' text, taken evenly from all files.
///
/// # Errors
/// Those of reading, and of [`Tokenizer::train`].
pub fn train_tokenizer(
    sources: &Sources,
    options: &TrainOptions,
    max_bytes: u64,
    progress: &dyn Progress,
) -> Result<Tokenizer, DataError> {
    let files = sources.files()?;
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    // Every n-th file, where the text is more than is asked for.
    let every = total.div_ceil(max_bytes.max(1)).max(1) as usize;
    let mut texts = Vec::new();
    let mut left = max_bytes as usize;
    'files: for file in files.iter().step_by(every) {
        for document in file.documents()? {
            let mut text = match document {
                Ok(document) => document.text,
                Err(DataError::Format { .. }) if file.found => continue 'files,
                Err(error) => return Err(error),
            };
            text.truncate(text.floor_char_boundary(left));
            left -= text.len();
            texts.push(text);
            if left == 0 {
                break 'files;
            }
        }
    }
    Tokenizer::train(texts.iter().map(String::as_str), options, progress)
}

/// Reads all documents of the sources and writes `train-*.bin` and `valid-*.bin` into a folder.
///
/// Which text is held out depends on the text and its order alone. Broken lines of JSONL are errors; files found in folders that are
/// not UTF-8 are passed over and reported.
///
/// # Errors
/// Those of reading and writing, [`DataError::Empty`] if the sources hold no text, and those of [`Codec::check_separates`].
pub fn prepare(
    sources: &Sources,
    tokenizer: &Codec,
    folder: &Path,
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<PrepareReport, DataError> {
    tokenizer.check_separates(options.eos)?;
    let files = sources.files()?;
    std::fs::create_dir_all(folder).map_err(|error| DataError::io(folder, error))?;
    let mut train = Split::new(folder, "train", 0, tokenizer, options.shard_tokens);
    let mut valid = Split::new(folder, "valid", 0, tokenizer, options.shard_tokens);
    let mut report = PrepareReport::default();
    let mut hold_out = HoldOut { fraction: options.valid_fraction, documents: 0, bytes: 0, due: 0.0 };
    let caches = EncodeCaches::default();
    let mut chunk: Vec<(Document, usize)> = Vec::new();
    let mut chunk_bytes = 0;

    progress.start("tokenizing", Some(files.iter().map(|file| file.bytes).sum()));
    for file in &files {
        for document in file.documents()? {
            match document {
                Ok(document) if document.text.is_empty() => {}
                Ok(document) => {
                    report.documents += 1;
                    report.bytes += document.text.len() as u64;
                    chunk_bytes += document.text.len();
                    let at = hold_out.split_point(&document.text);
                    chunk.push((document, at));
                }
                Err(DataError::Format { path, .. }) if file.found && !is_json_lines(&path) => report.skipped.push(path),
                Err(error) => return Err(error),
            }
            if chunk_bytes >= CHUNK_BYTES {
                report.valid_bytes += write_chunk(&mut chunk, tokenizer, &caches, options.eos, &mut train, &mut valid)?;
                chunk_bytes = 0;
            }
        }
        progress.advance(file.bytes);
    }
    report.valid_bytes += write_chunk(&mut chunk, tokenizer, &caches, options.eos, &mut train, &mut valid)?;
    report.train_tokens = train.finish()?;
    report.valid_tokens = valid.finish()?;
    progress.finish();
    if report.bytes == 0 {
        let path = sources.paths.first().cloned().unwrap_or_default();
        return Err(DataError::Empty { path, hint: "all files are empty".into() });
    }
    Ok(report)
}

fn is_json_lines(path: &Path) -> bool {
    path.to_string_lossy().contains(".jsonl")
}

/// Tokenizes and writes documents in their order, each split where it says; returns the bytes held out.
fn write_chunk(
    chunk: &mut Vec<(Document, usize)>,
    tokenizer: &Codec,
    caches: &EncodeCaches,
    eos: bool,
    train: &mut Split,
    valid: &mut Split,
) -> Result<u64, DataError> {
    let encoded: Vec<_> = chunk
        .par_iter()
        .map(|(document, at)| {
            let (kept, held_out) = document.text.split_at(*at);
            let encode = |text: &str| match text {
                "" => Vec::new(),
                text => tokenizer.encode_document(text, eos, caches),
            };
            (encode(kept), encode(held_out), held_out.len() as u64)
        })
        .collect();
    chunk.clear();
    let mut bytes = 0;
    for (kept, held_out, len) in encoded {
        train.push(&kept)?;
        valid.push(&held_out)?;
        bytes += len;
    }
    Ok(bytes)
}

/// Which text is held out, decided document by document.
struct HoldOut {
    fraction: f64,
    /// Short documents so far, and their bytes.
    documents: u64,
    bytes: u64,
    /// Bytes that should have been held out of short documents and were not yet.
    due: f64,
}

impl HoldOut {
    /// Where a text's held-out end begins: near the end of a long text at the start of a line. A short text is held out
    /// whole whenever one of average length is due.
    fn split_point(&mut self, text: &str) -> usize {
        if text.len() > LONG_DOCUMENT {
            let at = text.floor_char_boundary(((1.0 - self.fraction) * text.len() as f64) as usize);
            return text[at..].find('\n').map_or(text.len(), |line| at + line + 1);
        }
        self.documents += 1;
        self.bytes += text.len() as u64;
        self.due += self.fraction * text.len() as f64;
        if self.fraction > 0.0 && self.due >= self.bytes as f64 / self.documents as f64 {
            self.due -= text.len() as f64;
            return 0;
        }
        text.len()
    }
}

/// The shards of one split. A shard is begun with its first document, so there is none without.
pub(crate) struct Split<'a> {
    folder: &'a Path,
    name: &'static str,
    vocab_size: usize,
    tokenizer: u64,
    shard_tokens: u64,
    writer: Option<ShardWriter>,
    /// Number of the shard that is written, or of the next.
    shard: usize,
    tokens: u64,
}

impl<'a> Split<'a> {
    /// Shards from number `first` on; each is closed at the document that brings it to `shard_tokens`.
    pub fn new(folder: &'a Path, name: &'static str, first: usize, tokenizer: &Codec, shard_tokens: u64) -> Self {
        Self {
            folder,
            name,
            vocab_size: tokenizer.vocab_size(),
            tokenizer: tokenizer.fingerprint(),
            shard_tokens,
            writer: None,
            shard: first,
            tokens: 0,
        }
    }

    pub fn push(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        if tokens.is_empty() {
            return Ok(());
        }
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let path = self.folder.join(format!("{}-{:05}.bin", self.name, self.shard));
                self.writer.insert(ShardWriter::create(&path, self.vocab_size, self.tokenizer)?)
            }
        };
        writer.push(tokens)?;
        self.tokens += tokens.len() as u64;
        if writer.tokens() >= self.shard_tokens {
            self.close()?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), DataError> {
        self.shard += 1;
        self.writer.take().map_or(Ok(()), ShardWriter::finish)
    }

    /// Number of tokens written.
    pub fn finish(mut self) -> Result<u64, DataError> {
        self.close()?;
        Ok(self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Shard;
    use crate::tokenizer::{ByteLevel, Words};
    use crate::{NoProgress, TokenDataset};

    #[test]
    fn text_becomes_shards_that_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let (text, out) = (folder.path().join("text"), folder.path().join("out"));
        std::fs::create_dir(&text).unwrap();
        for file in 0..200 {
            std::fs::write(text.join(format!("{file:03}.txt")), format!("document {file}\n")).unwrap();
        }
        std::fs::write(text.join("latin1.txt"), b"caf\xe9").unwrap();
        let tokenizer = Codec::from(Tokenizer::bytes());
        let options = PrepareOptions { valid_fraction: 0.1, shard_tokens: 1000, ..Default::default() };
        let report = prepare(&Sources::new([&text]), &tokenizer, &out, &options, &NoProgress).unwrap();
        assert_eq!(report.documents, 200);
        assert_eq!(report.skipped, [text.join("latin1.txt")]);
        // BOS and EOS for each document.
        assert_eq!(report.train_tokens + report.valid_tokens, report.bytes + 400);
        let held_out = report.valid_tokens as f64 / report.train_tokens as f64;
        assert!((0.08..0.13).contains(&held_out), "{report:?}");
        let data = TokenDataset::open(&out, "train", tokenizer.fingerprint(), 16).unwrap();
        assert_eq!(data.tokens(), report.train_tokens);
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        data.read(0, &mut inputs, &mut targets);
        assert_eq!(inputs[0], 1);
        assert_eq!(inputs[1..], targets[..15]);
    }

    /// A vocabulary of another kind, too: BOS and EOS where it has them, and what is read back is what was written.
    #[test]
    fn byte_level_vocabularies_make_shards() {
        let folder = tempfile::tempdir().unwrap();
        let (text, out) = (folder.path().join("a.txt"), folder.path().join("out"));
        std::fs::write(&text, "one two\n").unwrap();
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        tokens.extend([b"on".to_vec(), b"one".to_vec(), Vec::new()]);
        let vocabulary = ByteLevel::from_ranks(tokens, Words::gpt2()).unwrap();
        let mut codec = Codec::byte_level(vocabulary, vec![("<end>".into(), 258)]);
        let options = PrepareOptions { valid_fraction: 0.0, ..Default::default() };
        let prepare = |codec: &Codec| prepare(&Sources::new([&text]), codec, &out, &options, &NoProgress);
        assert!(prepare(&codec).unwrap_err().to_string().contains("would run together"));
        codec.eos = codec.special("<end>");
        let installed = codec.install(&out).unwrap();
        assert_eq!(installed.encode("one two\n"), codec.encode("one two\n"));
        prepare(&installed).unwrap();
        let shard = Shard::open(&out.join("train-00000.bin")).unwrap();
        let mut ids = Vec::new();
        shard.read(0, shard.tokens(), |id| ids.push(id));
        let bytes = b" two\n".map(u32::from);
        assert_eq!(ids, [&[257], &bytes[..], &[258]].concat());
        assert_eq!(shard.tokenizer(), Codec::load(&out).unwrap().fingerprint());
        assert_ne!(shard.tokenizer(), Codec::from(Tokenizer::bytes()).fingerprint());
    }

    #[test]
    fn a_long_document_gives_its_end_to_validation() {
        let text = "a line of text\n".repeat(20_000);
        let at = HoldOut { fraction: 0.1, documents: 0, bytes: 0, due: 0.0 }.split_point(&text);
        assert!(text[..at].ends_with('\n'));
        assert!((0.89..0.91).contains(&(at as f64 / text.len() as f64)));
    }

    #[test]
    fn empty_text_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "").unwrap();
        let out = folder.path().join("out");
        let error =
            prepare(&Sources::new([path]), &Tokenizer::bytes().into(), &out, &PrepareOptions::default(), &NoProgress);
        assert!(matches!(error, Err(DataError::Empty { .. })));
    }
}
