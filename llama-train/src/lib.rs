//! Pretraining LLaMA as the paper does (section 2.3), on burn-train.
//!
//! [`pretrain`] runs a [`PretrainConfig`]. Below it, a burn-train `Learner` is driven by [`StepStrategy`], which
//! counts **optimizer steps** and owns what burn-train does per epoch or per tensor: accumulation normalised by tokens,
//! one global clip, the schedule, checkpoints from which training goes on bit for bit, and evaluation. Metrics, events,
//! renderers and the interrupter are burn-train's.
//!
//! | the paper | here |
//! | --- | --- |
//! | AdamW, betas 0.9 and 0.95, weight decay 0.1 | [`AdamW`] |
//! | gradient clipping 1.0 | [`StepStrategy`] |
//! | cosine schedule to 10%, 2,000 warmup steps | [`WarmupCosine`] |
//! | table 2, learning rates and batch size | [`PretrainConfig::preset`] |
//! | section 2.4, many devices | [`parallel`] |
#![recursion_limit = "256"]
#![warn(missing_docs)]

pub mod checkpoint;
pub mod curve;
pub mod log;
pub mod metrics;
pub mod parallel;

mod base;
mod config;
mod error;
mod finetune;
mod gradients;
mod loader;
mod loss_scale;
mod optimizer;
mod peak;
mod pretrain;
mod renderer;
mod schedule;
mod strategy;
mod trainer;

pub use base::load_model;
pub use config::{BatchConfig, DataConfig, OptimizerConfig, PretrainConfig, RunConfig, ScheduleConfig};
pub use error::TrainError;
pub use finetune::{FinetuneConfig, FinetuneData, finetune};
pub use gradients::GradientList;
pub use loader::TokenLoader;
pub use loss_scale::LossScale;
pub use optimizer::{AdamW, Moment};
pub use parallel::Group;
pub use peak::measure_peak_flops;
pub use pretrain::{Display, RunOptions, RunReport, pretrain};
pub use renderer::LineRenderer;
pub use schedule::WarmupCosine;
pub use strategy::{Place, Plan, Save, StepStrategy, Stop};
pub use trainer::{Pretrainer, StepOutput};

pub use burn::train::Interrupter;
