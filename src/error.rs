//! Any error of the three crates, and of what joins them.

use llama_data::DataError;
use llama_model::ModelError;
use llama_train::TrainError;

use crate::text::TextError;

/// What can go wrong in [`Engine`](crate::Engine), [`pretrain`](crate::pretrain()), [`finetune`](crate::finetune()) and
/// [`eval`](crate::eval).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the model, its checkpoint or its device.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// From data or a tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// From a run.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// From a checkpoint's tokenizer or template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A tokenizer that is not the model's.
    #[error("the tokenizer has {tokenizer} tokens, the model {model}")]
    Vocabulary {
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Tokens of the model.
        model: usize,
    },
    /// An evaluation that cannot be done.
    #[error("evaluation: {0}")]
    Evaluation(String),
}
