//! Whole runs on a device that is chosen at run time.

use std::path::Path;
use std::sync::Arc;

use llama_data::Progress;
use llama_data::loader::Sequences;
use llama_model::formats::Checkpoint;
use llama_model::{BackendTask, Device, TrainBackend};
use llama_train::{Display, FinetuneConfig, Interrupter, PretrainConfig, RunReport};

use crate::{Error, engine};

/// How a run goes on, shows itself and is stopped.
pub struct RunOptions<'a> {
    /// A checkpoint of the same run to go on from.
    pub resume_from: Option<&'a Path>,
    /// How it shows itself.
    pub display: Display,
    /// Stops it after a step, with a checkpoint.
    pub interrupter: Interrupter,
}

/// [`llama_train::pretrain`] on a device that is chosen at run time. The trained model is the report's checkpoint.
///
/// # Errors
/// As there, and [`ModelError::Device`](llama_model::ModelError::Device) if the device does not answer.
pub fn pretrain(config: &PretrainConfig, device: Device, options: RunOptions) -> Result<RunReport, Error> {
    struct Pretrain<'a>(&'a PretrainConfig, RunOptions<'a>);
    impl BackendTask for Pretrain<'_> {
        type Output = Result<RunReport, Error>;
        fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
            let Self(config, RunOptions { resume_from, display, interrupter }) = self;
            let (_, report) = llama_train::pretrain::<B>(config, resume_from, &device, display, interrupter)?;
            Ok(report)
        }
    }
    device.run(Pretrain(config, options))?
}

/// [`llama_train::finetune`] on a device that is chosen at run time, on [`FinetuneConfig::base`], whose loading `progress` counts
/// in parameters. The adapters are the report's checkpoint.
///
/// # Errors
/// As there, those of the base checkpoint, and [`ModelError::Device`](llama_model::ModelError::Device) if the device does not
/// answer.
pub fn finetune(
    config: &FinetuneConfig,
    train: Arc<dyn Sequences>,
    valid: Option<Arc<dyn Sequences>>,
    device: Device,
    options: RunOptions,
    progress: &dyn Progress,
) -> Result<RunReport, Error> {
    struct Finetune<'a> {
        config: &'a FinetuneConfig,
        train: Arc<dyn Sequences>,
        valid: Option<Arc<dyn Sequences>>,
        options: RunOptions<'a>,
        progress: &'a dyn Progress,
    }
    impl BackendTask for Finetune<'_> {
        type Output = Result<RunReport, Error>;
        fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
            let Self { config, train, valid, options, progress } = self;
            let RunOptions { resume_from, display, interrupter } = options;
            let checkpoint = Checkpoint::open(&config.base)?;
            let base = engine::load::<B>(&checkpoint, config.weights.parse()?, &device, progress)?;
            let (_, report) =
                llama_train::finetune::<B>(config, base, train, valid, resume_from, &device, display, interrupter)?;
            Ok(report)
        }
    }
    device.run(Finetune { config, train, valid, options, progress })?
}
