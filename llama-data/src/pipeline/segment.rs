//! Reading and cleaning one shard.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use rayon::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use xxhash_rust::xxh3::xxh3_64;

use super::report::ShardReport;
use super::step::Dedup;
use crate::clean::{Clean, Tally, ccnet};
use crate::dedup::ItemSet;
use crate::dedup::keys::KeyWriter;
use crate::dedup::minhash::{HASHES, Signature, SignatureWriter};
use crate::input::{self, Limits, Line, Lines};
use crate::read::Format;
use crate::source::Document;
use crate::{AtomicFile, DataError};

/// Text that is cleaned in parallel at a time.
const BATCH_BYTES: usize = 4 << 20;
/// Lines that are compressed together, about.
const FRAME_BYTES: usize = 512 << 10;

/// Files of a shard: `00012.jsonl.zst` and what belongs to it.
#[derive(Clone, Debug)]
pub(super) struct ShardPath {
    folder: PathBuf,
    index: usize,
}

impl ShardPath {
    pub(super) fn new(folder: &Path, index: usize) -> Self {
        Self { folder: folder.into(), index }
    }

    fn with(&self, ending: &str) -> PathBuf {
        self.folder.join(format!("{:05}.{ending}", self.index))
    }

    pub(super) fn documents(&self) -> PathBuf {
        self.with("jsonl.zst")
    }

    pub(super) fn keys(&self) -> PathBuf {
        self.with("keys")
    }

    pub(super) fn signatures(&self) -> PathBuf {
        self.with("signatures")
    }

    /// Stands for the whole shard: written last.
    pub(super) fn report(&self) -> PathBuf {
        self.with("report.json")
    }
}

/// Where a shard's documents come from.
pub(super) enum Input<'a> {
    /// Files of a dump.
    Files { files: &'a [PathBuf], format: Format, limits: Limits },
    /// A shard of the segment before, without these lines or documents.
    Shard { documents: PathBuf, dedup: Dedup, duplicates: ItemSet },
}

/// Reads, cleans and writes a shard, with its keys if it is compared with others after it.
pub(super) fn process(
    input: &Input,
    rules: &[Box<dyn Clean>],
    dedup: Option<(Dedup, usize)>,
    out: &ShardPath,
) -> Result<(), DataError> {
    let mut writer = Writer::create(out, dedup)?;
    let mut report = ShardReport::default();
    // One thread reads ahead while batches are cleaned in parallel and written.
    let (sender, batches) = sync_channel::<Vec<Document>>(1);
    let read = std::thread::scope(|scope| {
        let reader = scope.spawn(move || input.batches(&sender));
        let written = batches.into_iter().try_for_each(|batch| writer.clean_and_write(batch, rules, &mut report));
        // The reader ends when nobody takes its batches.
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(read)
    })?;
    writer.finish(out)?;
    report.add(&read);
    report.write(&out.report())
}

impl Input<'_> {
    /// Sends all documents in batches, duplicates taken out, until nobody receives them.
    fn batches(&self, to: &SyncSender<Vec<Document>>) -> Result<ShardReport, DataError> {
        let mut report = ShardReport::default();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let mut push = |document: Document| {
            bytes += document.text.len();
            batch.push(document);
            if bytes < BATCH_BYTES {
                return true;
            }
            bytes = 0;
            to.send(std::mem::take(&mut batch)).is_ok()
        };
        match self {
            Self::Files { files, format, limits } => {
                for file in *files {
                    report.file_bytes += std::fs::metadata(file).map_or(0, |meta| meta.len());
                    for record in format.read(file, *limits)? {
                        match record {
                            Ok(document) => {
                                report.read.add(document.text.len());
                                if !push(document) {
                                    return Ok(report);
                                }
                            }
                            Err(broken) => report.add_broken(broken),
                        }
                    }
                }
            }
            Self::Shard { documents, dedup, duplicates } => {
                let mut next = 0;
                for document in read_shard(documents)? {
                    let document = document?;
                    report.read.add(document.text.len());
                    let kept = without_duplicates(document, *dedup, duplicates, &mut next, &mut report.tally);
                    if kept.is_some_and(|document| !push(document)) {
                        return Ok(report);
                    }
                }
            }
        }
        // If it is not received, what was sent before was not either.
        let _ = to.send(batch);
        Ok(report)
    }
}

/// The document without its duplicate lines, or none if it is one itself. `next` counts the shard's items.
fn without_duplicates(
    mut document: Document,
    dedup: Dedup,
    duplicates: &ItemSet,
    next: &mut u64,
    tally: &mut Tally,
) -> Option<Document> {
    let bytes = document.text.len();
    let mut take = || {
        *next += 1;
        duplicates.contains(*next - 1)
    };
    let reason = match dedup {
        Dedup::Documents => "duplicates: document",
        Dedup::Near(_) => "duplicates: near",
        Dedup::Lines => {
            let mut kept = String::with_capacity(bytes);
            for line in document.text.lines() {
                if take() {
                    tally.trim("duplicates: line", line.len());
                } else {
                    if !kept.is_empty() {
                        kept.push('\n');
                    }
                    kept.push_str(line);
                }
            }
            if kept.trim().is_empty() {
                return tally.drop("duplicates: all lines", bytes);
            }
            document.text = kept;
            return Some(document);
        }
    };
    if take() { tally.drop(reason, bytes) } else { Some(document) }
}

/// The documents of a shard that was written here.
pub(super) fn read_shard(path: &Path) -> Result<impl Iterator<Item = Result<Document, DataError>>, DataError> {
    let limits = Limits { record: usize::MAX, ratio: u64::MAX };
    let mut lines: Lines<Box<dyn BufRead>> = Lines::new(input::open(path, limits)?, limits.record);
    let path = path.to_path_buf();
    let mut buffer = Vec::new();
    Ok(std::iter::from_fn(move || {
        Some(match lines.next(&mut buffer)? {
            Line::Read(offset) => serde_json::from_slice(&buffer)
                .map_err(|error| DataError::format(&path, format!("byte {offset}: {error}"))),
            Line::Failed(_, error) => Err(DataError::io(&path, error)),
            Line::TooLong(offset) => Err(DataError::format(&path, format!("byte {offset}: a line is too long"))),
        })
    }))
}

/// A document's part in the comparison that follows.
enum Keys {
    None,
    Lines(Vec<Option<u64>>),
    Document(u64),
    Near(Option<Box<Signature>>),
}

impl Keys {
    fn of(text: &str, dedup: Option<Dedup>) -> Self {
        match dedup {
            None => Self::None,
            Some(Dedup::Lines) => Self::Lines(text.lines().map(ccnet::line_key).collect()),
            Some(Dedup::Documents) => Self::Document(xxh3_64(text.as_bytes())),
            Some(Dedup::Near(rules)) => Self::Near(rules.signature(text).map(Box::new)),
        }
    }
}

/// A shard while it is written.
struct Writer {
    file: AtomicFile,
    dedup: Option<Dedup>,
    keys: KeyWriter,
    signatures: Option<SignatureWriter>,
    items: u64,
}

impl Writer {
    fn create(out: &ShardPath, dedup: Option<(Dedup, usize)>) -> Result<Self, DataError> {
        let file = AtomicFile::create(&out.documents())?;
        let signatures = match dedup {
            Some((Dedup::Near(_), _)) => Some(SignatureWriter::create(&out.signatures())?),
            _ => None,
        };
        let keys = KeyWriter::new(dedup.map_or(0, |(_, partitions)| partitions));
        Ok(Self { file, dedup: dedup.map(|(dedup, _)| dedup), keys, signatures, items: 0 })
    }

    /// Cleans documents in parallel and writes those that are kept, in their order.
    fn clean_and_write(
        &mut self,
        batch: Vec<Document>,
        rules: &[Box<dyn Clean>],
        report: &mut ShardReport,
    ) -> Result<(), DataError> {
        let dedup = self.dedup;
        let cleaned: Vec<_> = batch
            .into_par_iter()
            .map(|document| {
                let mut tally = Tally::default();
                let kept = rules.iter().try_fold(document, |document, rule| rule.clean(document, &mut tally));
                let kept = kept.map(|document| {
                    let keys = Keys::of(&document.text, dedup);
                    let line = serde_json::to_vec(&document);
                    (document.text.len(), line, keys)
                });
                (kept, tally)
            })
            .collect();
        let mut frames = vec![Vec::new()];
        for (kept, tally) in cleaned {
            report.tally.merge(&tally);
            if let Some((bytes, line, keys)) = kept {
                report.kept.add(bytes);
                if frames.last().is_some_and(|frame| frame.len() > FRAME_BYTES) {
                    frames.push(Vec::new());
                }
                if let Some(frame) = frames.last_mut() {
                    frame.extend(line.map_err(|error| DataError::format(self.file.path(), error))?);
                    frame.push(b'\n');
                }
                self.add_keys(keys)?;
            }
        }
        // A zstd file may have many frames, so they are compressed in parallel.
        let compress = |frame: Vec<u8>| compress_to_vec(frame.as_slice(), CompressionLevel::Fastest);
        let frames: Vec<Vec<u8>> = frames.into_par_iter().filter(|frame| !frame.is_empty()).map(compress).collect();
        frames.iter().try_for_each(|frame| self.file.push(frame))
    }

    fn add_keys(&mut self, keys: Keys) -> Result<(), DataError> {
        match keys {
            Keys::None => {}
            Keys::Lines(lines) => {
                for (key, line) in lines.iter().zip(self.items..) {
                    key.map_or(Ok(()), |key| self.keys.push_key(key, line))?;
                }
                self.items += lines.len() as u64;
                return Ok(());
            }
            Keys::Document(key) => self.keys.push_key(key, self.items)?,
            Keys::Near(signature) => {
                if let (Some(signature), Some(Dedup::Near(rules))) = (&signature, self.dedup) {
                    for (band, key) in rules.band_keys(signature).enumerate() {
                        self.keys.push(band, key, self.items)?;
                    }
                }
                if let Some(writer) = &mut self.signatures {
                    writer.push(&signature.map_or([0; HASHES], |signature| *signature))?;
                }
            }
        }
        self.items += 1;
        Ok(())
    }

    fn finish(self, out: &ShardPath) -> Result<(), DataError> {
        self.file.finish()?;
        if self.dedup.is_some() {
            self.keys.write(&out.keys())?;
        }
        self.signatures.map_or(Ok(()), SignatureWriter::finish)
    }
}
