//! Fine-tuning a checkpoint, by low-rank adapters or all its weights, with the same loop as pretraining.
//!
//! A checkpoint of adapters is a folder in PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`), with
//! `optimizer.safetensors` and `state.json` beside it; the frozen model is not copied. One of all weights is as pretraining's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_data::loader::Sequences;
use llama_data::tokenizer::Codec;
use llama_model::formats::Checkpoint;
use llama_model::lora::{self, Adapters, LoraConfig};
use llama_model::{Compute, Llama, LlamaConfig, TrainBackend, WeightFormat};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, RunState};
use crate::config::{CONFIG_VERSION, Fixed, validate_run};
use crate::pretrain::{check_same_everywhere, check_same_run, check_shares, launch, peak_flops, report};
use crate::strategy::{Place, Plan, Save};
use crate::{
    AdamW, BatchConfig, Group, LossScale, OptimizerConfig, Pretrainer, RunConfig, RunOptions, RunReport,
    ScheduleConfig, TrainError, load_model,
};

/// A fine-tuning run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Always 1, for now.
    pub version: u32,
    /// Seed of the adapters and of the order of examples.
    pub seed: u64,
    /// The checkpoint that is fine-tuned.
    pub base: PathBuf,
    /// How its matrices are kept in memory while they are frozen, by the name of a [`WeightFormat`].
    pub weights: String,
    /// Its sizes.
    pub model: LlamaConfig,
    /// The adapters; without them all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Precision of products, and what is kept for the backward; adapters keep all that theirs needs.
    #[serde(default)]
    pub compute: Compute,
    /// Files with the examples.
    pub data: Vec<PathBuf>,
    /// How many tokens a step has.
    pub batch: BatchConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Learning rate over time.
    pub schedule: ScheduleConfig,
    /// What is written when.
    pub run: RunConfig,
}

impl FinetuneConfig {
    /// Values that suit most models and a few thousand examples: adapters of rank 8 on all linear layers, a peak rate of 2e-4
    /// after 10 steps, no weight decay.
    pub fn new(base: &Path, model: &LlamaConfig, data: Vec<PathBuf>, run: &Path) -> Self {
        Self {
            version: CONFIG_VERSION,
            seed: 0,
            base: base.into(),
            weights: "f32".into(),
            model: model.clone(),
            lora: Some(LoraConfig::default()),
            compute: Compute::default(),
            data,
            batch: BatchConfig { seq_len: 512.min(model.max_seq_len), sequences: 4, accumulation: 1 },
            optimizer: OptimizerConfig { beta_2: 0.999, weight_decay: 0.0, ..Default::default() },
            schedule: ScheduleConfig { peak_lr: 2e-4, final_fraction: 0.1, warmup_steps: 10, steps: 100 },
            run: RunConfig {
                folder: run.into(),
                eval_every: 20,
                eval_batches: 8,
                checkpoint_every: 50,
                keep_checkpoints: 2,
                peak_flops: None,
            },
        }
    }

    /// As [`new`](Self::new), for all weights: a tenth of the rate.
    pub fn of_all_weights(base: &Path, model: &LlamaConfig, data: Vec<PathBuf>, run: &Path) -> Self {
        let config = Self::new(base, model, data, run);
        let schedule = ScheduleConfig { peak_lr: 2e-5, ..config.schedule };
        Self { lora: None, schedule, ..config }
    }

    /// Checks that the run can be made.
    ///
    /// # Errors
    /// [`TrainError::Config`] names the first field that does not fit.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.model.validate()?;
        match &self.lora {
            Some(lora) => lora.validate()?,
            None if self.weights != "f32" => {
                let reason = format!("is {}, but weights that are trained are kept in f32", self.weights);
                return Err(TrainError::config("weights", reason));
            }
            None => {}
        }
        if self.version != CONFIG_VERSION {
            let reason = format!("is {}; this program reads {CONFIG_VERSION}", self.version);
            return Err(TrainError::config("version", reason));
        }
        let Self { batch, optimizer, schedule, run, .. } = self;
        validate_run(batch, optimizer, schedule, run, self.model.max_seq_len)
    }

    /// What a run must keep, as text, by field.
    fn fixed(&self) -> Fixed {
        vec![
            ("seed", self.seed.to_string()),
            ("model", format!("{:?}", self.model)),
            ("weights", self.weights.clone()),
            ("lora", format!("{:?}", self.lora)),
            ("compute.precision", self.compute.precision.to_string()),
            ("batch", format!("{:?}", self.batch)),
            ("optimizer", format!("{:?}", self.optimizer)),
            ("schedule", format!("{:?}", self.schedule)),
        ]
    }

    /// The configuration that a checkpoint was written with.
    ///
    /// # Errors
    /// As [`checkpoint::load_state`].
    pub fn of_checkpoint(folder: &Path) -> Result<Self, TrainError> {
        let config = checkpoint::load_state_of::<Self>(folder)?.config;
        config.validate()?;
        Ok(config)
    }
}

/// What a model is fine-tuned on.
#[derive(Clone)]
pub struct FinetuneData<'a> {
    /// Examples to train on.
    pub train: Arc<dyn Sequences>,
    /// Examples held out; without them nothing is evaluated.
    pub valid: Option<Arc<dyn Sequences>>,
    /// Their tokenizer, which is written beside a model.
    pub codec: &'a Codec,
}

/// Trains the model of [`FinetuneConfig::base`], or adapters of it, or goes on from a checkpoint of the same run. Every member of a group
/// calls it alike. Returns the model, with its adapters, without autodiff; of one that is divided, the member's part.
///
/// # Errors
/// Everything that can be wrong with configuration, data and files. What was written before stays.
pub fn finetune<B: TrainBackend>(
    config: &FinetuneConfig,
    data: &FinetuneData,
    device: &B::Device,
    group: Group,
    options: RunOptions,
) -> Result<(Llama<B::InnerBackend>, RunReport), TrainError> {
    config.validate()?;
    let group = Arc::new(group);
    check_shares(&config.batch, &group)?;
    if group.shard().count > 1 && config.lora.is_some() {
        let reason = "is for the training of all weights: adapters need the whole model on each device";
        return Err(TrainError::config("tensor_parallel", reason));
    }
    config.compute.precision.check::<B>("precision", device)?;
    let folder = &config.run.folder;
    std::fs::create_dir_all(folder).map_err(|error| TrainError::io(folder, error))?;
    // What goes on with all weights does not need those it began with.
    let own = options.resume_from.filter(|_| config.lora.is_none());
    let checkpoint = Checkpoint::open(own.unwrap_or(&config.base))?.continued_as(&config.model)?;
    let base =
        load_model::<B>(&checkpoint, &group.team(), config.weights.parse::<WeightFormat>()?, device, options.progress)?;
    let (llama, optimizer, place) = match options.resume_from {
        Some(checkpoint) => {
            let state: RunState<FinetuneConfig> = checkpoint::load_state_of(checkpoint)?;
            check_same_run(config.fixed(), state.config.fixed())?;
            let llama = match &config.lora {
                Some(_) => Adapters::open(checkpoint)?.apply(base)?,
                None => base,
            };
            let (optimizer, updates) = (config.optimizer.clone(), state.updates);
            let optimizer = checkpoint::load_optimizer(checkpoint, optimizer, updates, &llama, &group, device)?;
            (llama, optimizer, state.place())
        }
        None => {
            let micro_batch = (config.batch.sequences * config.batch.seq_len) as u64;
            let loss_scale = LossScale::new(config.compute.precision, micro_batch);
            let llama = match &config.lora {
                Some(lora) => base.with_adapters(lora, config.seed)?,
                None => base,
            };
            (llama, AdamW::new(config.optimizer.clone()), Place { loss_scale, ..Default::default() })
        }
    };
    let FinetuneData { train, valid, codec } = data.clone();
    let mut run = config.run.clone();
    if valid.is_none() {
        run.eval_every = 0;
    }
    let examples = format!("{} examples", train.sequences());
    check_same_everywhere(&group, config.fixed(), examples, place.step, &run)?;
    let flops = config.model.flops_per_token(config.batch.seq_len);
    let plan = Plan {
        batch: config.batch.clone(),
        schedule: config.schedule.clone(),
        run,
        flops_per_token: match config.lora {
            // The backward has no gradients of the frozen weights.
            Some(_) => 2.0 * flops.forward(),
            None => flops.training(),
        },
        peak_flops: peak_flops::<B>(&config.run, config.compute.precision, device, &group),
    };
    let (saved, codec) = (config.clone(), codec.clone());
    let save: Save<B> = Arc::new(move |snapshot, place| {
        let state = RunState::new::<B>(place, snapshot.updates(), saved.clone());
        match &saved.lora {
            Some(config) => checkpoint::save_with(&saved.run, snapshot, &state, |folder| {
                Ok(lora::save(&snapshot.model.llama, config, &saved.base.to_string_lossy(), folder)?)
            })?,
            None => checkpoint::save_model(&saved.run, &saved.model, snapshot, &state, &codec)?,
        };
        Ok(())
    });
    let model = Pretrainer::new(llama, config.compute, config.optimizer.z_loss);
    let valid = valid.unwrap_or_else(|| train.clone());
    let (sequences, leads) = (train.sequences(), group.leads());
    let (model, outcome) = launch(model, optimizer, place, plan, save, train, valid, group, options)?;
    let seen = outcome.step * (config.batch.sequences * config.batch.accumulation) as u64;
    let epochs = vec![("examples".to_string(), seen as f64 / sequences as f64)];
    Ok((model, report(outcome, folder, leads, epochs)?))
}
