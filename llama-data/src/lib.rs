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

pub mod clean;
pub mod dedup;
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

mod dataset;
mod error;
mod progress;

pub use dataset::TokenDataset;
pub use error::DataError;
pub use progress::{NoProgress, Progress};

/// Writes a file beside its place and renames it into it, so that it is there whole or not at all.
pub(crate) fn write_atomically(
    path: &std::path::Path,
    write: impl FnOnce(&mut std::io::BufWriter<&mut std::fs::File>) -> std::io::Result<()>,
) -> Result<(), DataError> {
    let io = |error| DataError::io(path, error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(folder).map_err(io)?;
    let mut buffer = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
    write(&mut buffer).map_err(io)?;
    std::io::Write::flush(&mut buffer).map_err(io)?;
    drop(buffer);
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    Ok(())
}
