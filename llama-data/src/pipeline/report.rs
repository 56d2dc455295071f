//! What was read, kept and dropped, by source and rule.

use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::clean::{Count, Tally};
use crate::read::Broken;

/// Broken records a report lists; all are counted.
const LISTED: usize = 100;
/// Of these, in the text table.
const SHOWN: usize = 5;

/// What a task did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShardReport {
    /// Bytes of the input files on disk.
    pub file_bytes: u64,
    /// Documents read, and the bytes of their text.
    pub read: Count,
    /// Documents written.
    pub kept: Count,
    /// Records that could not be read.
    pub broken: u64,
    /// The first of them.
    pub broken_records: Vec<Broken>,
    /// What rules did.
    pub tally: Tally,
    /// Training tokens written.
    pub train_tokens: u64,
    /// Validation tokens written.
    pub valid_tokens: u64,
}

impl ShardReport {
    pub(super) fn add_broken(&mut self, record: Broken) {
        self.broken += 1;
        if self.broken_records.len() < LISTED {
            self.broken_records.push(record);
        }
    }

    /// Adds another's sums.
    pub(super) fn add(&mut self, other: &Self) {
        self.file_bytes += other.file_bytes;
        self.read += other.read;
        self.kept += other.kept;
        self.broken += other.broken;
        let room = LISTED.saturating_sub(self.broken_records.len());
        self.broken_records.extend(other.broken_records.iter().take(room).cloned());
        self.tally.merge(&other.tally);
        self.train_tokens += other.train_tokens;
        self.valid_tokens += other.valid_tokens;
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), DataError> {
        crate::write_atomically(path, |file| serde_json::to_writer_pretty(file, self).map_err(Into::into))
    }

    pub(super) fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
        serde_json::from_slice(&bytes).map_err(|error| DataError::format(path, error))
    }
}

/// What became of a source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// Its share of the mixture.
    pub share: f64,
    /// The sum over its shards: what was read by the first segment, kept by the last, and done by the rules of all.
    pub total: ShardReport,
}

impl SourceReport {
    /// Adds a task's report; `first` and `last` say whether its segment is the source's first and last.
    pub(super) fn add(&mut self, shard: &ShardReport, first: bool, last: bool) {
        let mut shard = shard.clone();
        if !first {
            (shard.file_bytes, shard.read) = Default::default();
        }
        if !last {
            shard.kept = Count::default();
        }
        self.total.add(&shard);
    }

    /// Bytes of text of a token.
    pub fn bytes_per_token(&self) -> f64 {
        self.total.kept.bytes as f64 / (self.total.train_tokens + self.total.valid_tokens).max(1) as f64
    }
}

/// What became of all sources.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PipelineReport {
    /// Source by source, as configured.
    pub sources: Vec<SourceReport>,
}

impl PipelineReport {
    /// The report as text tables.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<16} {:>10} {:>10} {:>10} {:>10} {:>7} {:>8} {:>12} {:>11} {:>7}\n",
            "source", "documents", "MB", "kept", "MB", "kept %", "broken", "tokens", "bytes/token", "share"
        );
        for source in &self.sources {
            let ShardReport { read, kept, broken, train_tokens, valid_tokens, .. } = source.total;
            let _ = writeln!(
                out,
                "{:<16} {:>10} {:>10.1} {:>10} {:>10.1} {:>7.1} {:>8} {:>12} {:>11.2} {:>6.1}%",
                source.name,
                read.number,
                read.bytes as f64 / 1e6,
                kept.number,
                kept.bytes as f64 / 1e6,
                100.0 * kept.bytes as f64 / read.bytes.max(1) as f64,
                broken,
                train_tokens + valid_tokens,
                source.bytes_per_token(),
                100.0 * source.share,
            );
        }
        for source in &self.sources {
            let Tally { dropped, trimmed } = &source.total.tally;
            if dropped.is_empty() && trimmed.is_empty() {
                continue;
            }
            let _ = writeln!(out, "\n{}", source.name);
            for (what, counts) in [("documents dropped", dropped), ("parts removed", trimmed)] {
                for (reason, count) in counts {
                    let _ = writeln!(
                        out,
                        "  {what:<18} {reason:<40} {:>10} {:>10.2} MB",
                        count.number,
                        count.bytes as f64 / 1e6
                    );
                }
            }
        }
        for source in self.sources.iter().filter(|source| source.total.broken > 0) {
            let _ = writeln!(out, "\n{}: {} broken records, for example", source.name, source.total.broken);
            for record in source.total.broken_records.iter().take(SHOWN) {
                let _ = writeln!(out, "  {record}");
            }
        }
        out
    }
}
