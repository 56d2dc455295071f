//! Data for LLaMA pretraining: text to tokens on disk, and tokens to batches in an order that can be resumed.
//!
//! | step | here |
//! | --- | --- |
//! | text files, folders, JSONL (also `.gz`, `.zst`) to documents | [`source`] |
//! | documents to token ids (paper, section 2.1, "Tokenizer") | [`tokenizer`] |
//! | token ids to files with a checked header | [`shard`] |
//! | the three above in one call | [`prepare`] |
//! | files to training windows | [`TokenDataset`] |
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

pub mod loader;
pub mod order;
pub mod prepare;
pub mod shard;
pub mod source;
pub mod tokenizer;

mod dataset;
mod error;
mod progress;

pub use dataset::TokenDataset;
pub use error::DataError;
pub use progress::{NoProgress, Progress};
