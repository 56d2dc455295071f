//! From dumps to token shards: the whole of the paper's section 2.1 as a graph of stages, each a set of independent tasks.
//!
//! A source's rules are cut at those that look at all documents (deduplication) into segments. A task of a segment reads one
//! part of the input, or one shard of the segment before, cleans it and writes a shard; a deduplication's tasks each compare one
//! partition of all shards' keys. Then every shard is tokenized.
//!
//! ```text
//! input files ──▶ read, clean ──▶ shards, keys ──▶ compare keys ──▶ drop, clean ──▶ clean/<source>/*.jsonl.zst ──▶ tokens/<source>/*.bin
//! ```
//!
//! A task's result is a function of its input, and is renamed into place when it is whole; the file that stands for it is written last.
//! So a run that was killed goes on with what is missing, and several processes on one folder, on any number of machines that share it,
//! divide the tasks by claims ([`claims`]).

pub mod claims;
mod config;
mod dedup_stage;
mod html;
mod report;
mod run;
mod segment;
mod step;
mod tokens;

pub use config::{Models, PrepareConfig, Recipe, SourceConfig, TokenizerConfig};
pub use report::{PipelineReport, ShardReport, SourceReport};
pub use run::run;
pub use step::Step;
