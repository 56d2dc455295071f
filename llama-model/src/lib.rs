//! The LLaMA architecture ([arXiv 2302.13971](https://arxiv.org/abs/2302.13971)) on [Burn](https://burn.dev).
//!
//! Every module is generic over [`LlamaBackend`], a backend trait that adds LLaMA's fused operations, each with a
//! hand-written backward (section 2.4 of the paper), to Burn's own. The same code therefore trains on a CPU, on CUDA
//! and on wgpu.
//!
//! | the paper | here |
//! | --- | --- |
//! | section 2.2, pre-normalisation with RMSNorm | [`RmsNorm`] |
//! | section 2.2, SwiGLU | [`FeedForward`] |
//! | section 2.2, rotary embeddings | [`RotaryEmbedding`] |
//! | section 2.4, causal attention without stored weights | [`LlamaBackend::causal_attention`], [`Attention`] |
//! | section 2.4, backward by hand | [`backend`] |
//! | section 2.4, model and sequence parallelism | [`shard`] |
//! | table 2, model sizes | [`LlamaConfig`] |
//!
//! ```
//! use burn::tensor::{Int, Tensor};
//! use llama_model::{Llama, LlamaConfig};
//! # #[cfg(feature = "flex")] {
//! use burn::backend::Flex;
//!
//! let device = Default::default();
//! let model: Llama<Flex> = LlamaConfig::tiny(256).init(0, &device)?;
//! let tokens = Tensor::<Flex, 2, Int>::from_ints([[1, 2, 3, 4]], &device);
//! let logits = model.forward(tokens, None)?;
//! assert_eq!(logits.dims(), [1, 4, 256]);
//! # }
//! # Ok::<(), llama_model::ModelError>(())
//! ```
#![recursion_limit = "256"]
#![warn(missing_docs)]

pub mod backend;
pub mod device;
pub mod formats;
pub mod generate;
pub mod hf;
pub mod lora;
pub mod modules;
pub mod shard;
pub mod weights;

mod compute;
mod config;
mod copy;
mod error;
mod file_map;
mod hook;
mod init;
mod names;
mod process;
mod tensor_file;
mod weight_format;

pub use backend::{LlamaBackend, TrainBackend};
pub use compute::{Compute, Precision, Recompute};
pub use config::{FlopCount, LlamaConfig, RopeScaling};
pub use device::{BackendTask, Device};
pub use error::ModelError;
pub use hook::{GradientTaker, ParamHook};
pub use modules::{
    Adapter, Attention, Block, Embedding, FeedForward, KvCache, Linear, Llama, Quantized, RmsNorm, RotaryEmbedding,
};
pub use process::{HugePages, tune_process};
pub use weight_format::WeightFormat;
