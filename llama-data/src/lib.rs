//! Data for LLaMA pretraining: text to tokens on disk, and tokens to batches in an order that can be resumed.
//!
//! | step | here |
//! | --- | --- |
//! | dumps to cleaned documents and token shards (paper, section 2.1) | [`pipeline`], of [`read`], [`clean`], [`filter`] and [`dedup`] |
//! | which source when (paper, table 1) | [`mixture`] |
//! | text files, folders, JSONL (also compressed), Parquet to documents | [`source`] |
//! | documents to token ids (paper, section 2.1, "Tokenizer") | [`tokenizer`] |
//! | token ids to files with a checked header | [`shard`] |
//! | clean text to shards in one call | [`prepare`] |
//! | files to training windows | [`TokenDataset`] |
//! | examples for fine-tuning, packed into sequences | [`examples`] |
//! | which window when: a pure function of seed and step | [`order`] |
//! | batches made ahead of the training thread | [`loader`] |
//!
//! ```
//! use llama_data::tokenizer::Tokenizer;
//!
//! let tokenizer = Tokenizer::bytes();
//! let ids = tokenizer.encode("Hi");
//! assert_eq!(ids, [u32::from(b'H') + 3, u32::from(b'i') + 3]);
//! assert_eq!(tokenizer.decode(&ids), "Hi");
//! ```
#![warn(missing_docs)]

pub mod clean;
pub mod dedup;
pub mod examples;
pub mod filter;
pub mod input;
pub mod loader;
pub mod mixture;
pub mod order;
pub mod pipeline;
pub mod prepare;
pub mod read;
pub mod shard;
pub mod source;
pub mod tokenizer;

mod atomic;
mod dataset;
mod error;
mod progress;

pub(crate) use atomic::{AtomicFile, write_atomically};
pub use dataset::TokenDataset;
pub use error::DataError;
pub use progress::{NoProgress, Progress};
