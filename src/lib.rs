//! LLaMA ([arXiv 2302.13971](https://arxiv.org/abs/2302.13971)) in pure Rust on [Burn](https://burn.dev).
//!
//! This crate re-exports the three it is made of:
//!
//! * [`model`]: the architecture over a backend trait with fused operations, generation, weights in and out;
//! * [`data`]: text, tokenizers, token shards, training order;
//! * [`train`]: configuration, learner, optimizer, schedule, metrics, checkpoints.
//!
//! and adds what joins them: [`Engine`], a checkpoint with its tokenizer on a device chosen at run time; [`pretrain()`] and
//! [`finetune()`], whole runs on such a device; [`eval`], the paper's evaluation; [`text`], the tokenizer that a checkpoint comes with, and conversations; [`instruct`],
//! examples for fine-tuning.
//!
//! ```no_run
//! use llama::Engine;
//! use llama::model::generate::GenerateOptions;
//!
//! let engine = Engine::open("smollm2.gguf".as_ref(), "flex".parse()?)?; // or "cuda", "vulkan", "metal", "wgpu"
//! let texts = engine.complete(&["The capital of France is"], GenerateOptions::default(), &[])?;
//! println!("{}", texts[0]);
//! # Ok::<(), llama::Error>(())
//! ```
//!
//! The three crates below are generic over the backend, for work on models:
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::backend::Flex;
//! use llama::data::tokenizer::{Codec, Tokenizer};
//! use llama::model::LlamaConfig;
//! use llama::model::generate::{GenerateOptions, Generation, Sampling};
//!
//! let tokenizer = Codec::from(Tokenizer::bytes());
//! let config = LlamaConfig::tiny(tokenizer.vocab_size());
//! let device = Default::default();
//! let model = config.init::<Flex>(0, &device)?;
//!
//! let prompt = tokenizer.encode_prompt("Hello");
//! let options = GenerateOptions { max_new_tokens: 4, sampling: Sampling::greedy(), ..Default::default() };
//! let tokens = Generation::new(&model, &[prompt], options)?.finish()?;
//! println!("{}", tokenizer.decode(&tokens[0]));
//! # }
//! # Ok::<(), llama::model::ModelError>(())
//! ```
#![recursion_limit = "256"]
#![warn(missing_docs)]

pub use llama_data as data;
pub use llama_model as model;
pub use llama_train as train;

pub mod engine;
pub mod eval;
pub mod instruct;
pub mod runs;
pub mod text;

mod error;

pub use engine::{Engine, EngineOptions, EngineSession};
pub use error::Error;
pub use llama_train::RunOptions;
pub use runs::{Devices, finetune, pretrain};
