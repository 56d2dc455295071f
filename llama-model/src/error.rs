//! What can go wrong, with what and where.

use std::path::PathBuf;

/// Any error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A model configuration that describes no model.
    #[error("model configuration: {field} {reason}")]
    Config {
        /// The offending field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
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
    /// A checkpoint lacks a tensor of the model.
    #[error("{}: tensor `{name}` is missing; is this a checkpoint of the configured model?", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
    },
    /// A checkpoint's tensor has another shape than the model's.
    #[error("{}: tensor `{name}` has shape {found:?}, the model needs {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
        /// The model's shape.
        expected: Vec<usize>,
        /// The file's shape.
        found: Vec<usize>,
    },
    /// A checkpoint holds a tensor the model has no place for.
    #[error("{}: the model has no place for tensor `{name}`; is this a checkpoint of the configured model?", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
    },
    /// A sequence does not fit the rotary table.
    #[error(
        "a sequence of {len} tokens is longer than the model's max_seq_len of {max}; shorten it or raise max_seq_len"
    )]
    SequenceTooLong {
        /// Tokens asked for, those in the cache included.
        len: usize,
        /// What the model was built for.
        max: usize,
    },
    /// A key/value cache has no room for the new tokens.
    #[error(
        "the key/value cache is full: {len} of {capacity} positions are used and {new} more are needed; make a larger cache or stop generating"
    )]
    CacheFull {
        /// Positions in use.
        len: usize,
        /// Positions wanted.
        new: usize,
        /// Positions there are.
        capacity: usize,
    },
    /// A device that has another part of a divided model is gone, or does something else.
    #[error("{0}")]
    Member(String),
    /// A cache made for another batch size or model.
    #[error("the key/value cache was made for {expected}, the input has {found}")]
    CacheMismatch {
        /// What the cache was made for.
        expected: String,
        /// What came.
        found: String,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// A generation request that cannot be served.
    #[error("generation: {0}")]
    Generation(String),
    /// A device name that is unknown, or whose backend is not compiled in.
    #[error("device `{name}`: {reason}; this build knows: {}", choices.join(", "))]
    Device {
        /// The name given.
        name: String,
        /// Why it was refused.
        reason: String,
        /// What would have been accepted.
        choices: Vec<String>,
    },
}

impl ModelError {
    /// An [`Io`](Self::Io) error at `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A [`Format`](Self::Format) error at `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Format { path: path.into(), reason: reason.to_string() }
    }
}
