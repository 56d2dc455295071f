//! What can go wrong, with what and where.

use std::path::{Path, PathBuf};

use llama_data::DataError;
use llama_model::ModelError;

/// Any error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// From the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// From the data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A configuration that cannot be run.
    #[error("configuration: {field} {reason}")]
    Config {
        /// The offending field.
        field: String,
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
    /// Nothing to resume from.
    #[error("{}: there is no checkpoint to resume from", path.display())]
    NoCheckpoint {
        /// The run's folder.
        path: PathBuf,
    },
    /// The processes of a run that shares its steps did not find each other.
    #[error("{address}, where the processes of the run meet: {reason}")]
    Rendezvous {
        /// Where.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// Another device of a run that shares its steps.
    #[error("member {rank} of the group: {reason}")]
    Member {
        /// Which.
        rank: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Too many steps in a row gave a loss or gradient that is not a number.
    #[error(
        "{count} steps in a row gave a loss or gradient that is not finite, the last at step {step}; the weights are still those before them. Lower the learning rate or look at the data"
    )]
    NotFinite {
        /// The last such step.
        step: u64,
        /// How many in a row.
        count: u64,
    },
}

impl TrainError {
    pub(crate) fn config(field: &str, reason: impl ToString) -> Self {
        Self::Config { field: field.into(), reason: reason.to_string() }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(crate) fn format(path: &Path, reason: impl ToString) -> Self {
        Self::Format { path: path.into(), reason: reason.to_string() }
    }
}
