//! What can go wrong, with what and where.

use std::path::{Path, PathBuf};

/// Any error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file was read, but is not what it should be.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing to train on.
    #[error("{}: no text was found; {hint}", path.display())]
    Empty {
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// All shards together hold less than one training window.
    #[error("{}: {found} tokens are fewer than the {needed} of one sequence and its targets; add text or lower seq_len", path.display())]
    TooShort {
        /// The folder.
        path: PathBuf,
        /// Tokens of the largest shard.
        found: u64,
        /// Tokens of one window.
        needed: u64,
    },
    /// Shards made with another tokenizer.
    #[error("{}: made with tokenizer {shard:016x}, but the one given is {given:016x}; tokenize the text again, or use the tokenizer it was made with", path.display())]
    TokenizerMismatch {
        /// The shard.
        path: PathBuf,
        /// Fingerprint in the shard.
        shard: u64,
        /// Fingerprint of the tokenizer in use.
        given: u64,
    },
    /// A cleaning rule whose files cannot be used.
    #[error("source `{source_name}`: {reason}")]
    Rule {
        /// The source that has the rule.
        source_name: String,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer that cannot be trained or loaded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Examples for fine-tuning that cannot be used.
    #[error("examples: {0}")]
    Examples(String),
    /// A loader thread ended before its time.
    #[error("the loader thread stopped: {0}")]
    Loader(String),
}

impl DataError {
    /// A file that could not be read or written.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A file that is not what it should be.
    pub fn format(path: &Path, reason: impl ToString) -> Self {
        Self::Format { path: path.into(), reason: reason.to_string() }
    }
}
