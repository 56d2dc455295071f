//! Everything a run depends on, in one typed file that is saved with every checkpoint.

use std::path::{Path, PathBuf};

use llama_model::{Compute, LlamaConfig};
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Version of the configuration's meaning. A field never changes its meaning without a new version.
pub const CONFIG_VERSION: u32 = 1;

/// A pretraining run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Always 1, for now.
    pub version: u32,
    /// Seed of weights and data order.
    pub seed: u64,
    /// The architecture.
    pub model: LlamaConfig,
    /// The checkpoint, in any format, whose weights the run begins with; random ones if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// Precision of products, and what is kept for the backward.
    #[serde(default)]
    pub compute: Compute,
    /// The text.
    pub data: DataConfig,
    /// How many tokens a step has.
    pub batch: BatchConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Learning rate over time.
    pub schedule: ScheduleConfig,
    /// What is written when.
    pub run: RunConfig,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder with the token shards `train-*.bin` and `valid-*.bin`, or with a `mixture.toml` that says where the shards of each
    /// source are and what share it has, and with the `tokenizer.model` that made them.
    pub folder: PathBuf,
    /// Whether a token attends only to its own document. The paper does not say it does; plain concatenation is the default.
    #[serde(default)]
    pub block_causal: bool,
}

/// How many tokens a step has: `accumulation · sequences · seq_len`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Sequences of a micro-batch: what is in memory at a time.
    pub sequences: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
}

/// AdamW (paper, section 2.3).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Decay of the first moment; 0.9 in the paper.
    pub beta_1: f64,
    /// Decay of the second moment; 0.95 in the paper.
    pub beta_2: f64,
    /// Added to the root of the second moment. The paper states none; 1e-8 is customary.
    pub epsilon: f64,
    /// Decoupled weight decay; 0.1 in the paper.
    pub weight_decay: f64,
    /// Whether norm gains decay too. The paper is silent; customarily only matrices do.
    pub decay_norms: bool,
    /// Largest global L2 norm of the gradient; 1.0 in the paper, `inf` is off.
    pub clip: f64,
    /// Factor of the squared log-sum-exp of the logits in the loss; 0, the default, is off. The paper has none.
    #[serde(default)]
    pub z_loss: f64,
}

/// Linear warmup, then cosine (paper, section 2.3).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Learning rate after warmup.
    pub peak_lr: f64,
    /// Learning rate of the last step as a share of the peak; 0.1 in the paper.
    pub final_fraction: f64,
    /// Warmup in optimizer steps; 2,000 in the paper.
    pub warmup_steps: u64,
    /// Optimizer steps in all.
    pub steps: u64,
}

/// What is written when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run's folder.
    pub folder: PathBuf,
    /// Steps between evaluations; 0 is never.
    pub eval_every: u64,
    /// Validation micro-batches of an evaluation, at most.
    pub eval_batches: u64,
    /// Steps between checkpoints; 0 is only the last.
    pub checkpoint_every: u64,
    /// Checkpoints kept, the newest.
    pub keep_checkpoints: usize,
    /// Peak of the device in floating-point operations per second, for the model FLOPs utilisation; measured with a
    /// matrix product if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_flops: Option<f64>,
}

impl PretrainConfig {
    /// The paper's run for its models (table 2: learning rate, 4M tokens a batch, 1.0T or 1.4T tokens), a run of
    /// minutes to hours for the small ones.
    ///
    /// # Errors
    /// If there is no such preset.
    pub fn preset(name: &str) -> Result<Self, TrainError> {
        let model = LlamaConfig::preset(name)?;
        let seq_len = model.max_seq_len;
        // (peak learning rate, sequences, accumulation, warmup, steps)
        let (peak_lr, sequences, accumulation, warmup_steps, steps) = match name {
            // 4 · 512 · 2,048 = 4,194,304 tokens a step.
            "7b" | "13b" => (3.0e-4, 4, 512, 2_000, 238_419),
            "33b" | "65b" => (1.5e-4, 4, 512, 2_000, 333_786),
            "tiny" => (3.0e-3, 8, 1, 100, 2_200),
            "15m" => (1.0e-3, 16, 4, 500, 20_000),
            "60m" => (8.0e-4, 8, 16, 1_000, 20_000),
            _ => (6.0e-4, 4, 64, 2_000, 50_000),
        };
        Ok(Self {
            version: CONFIG_VERSION,
            seed: 0,
            model,
            base: None,
            compute: Compute::default(),
            data: DataConfig { folder: "data".into(), block_causal: false },
            batch: BatchConfig { seq_len, sequences, accumulation },
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig { peak_lr, final_fraction: 0.1, warmup_steps, steps },
            run: RunConfig {
                folder: format!("runs/{name}").into(),
                eval_every: 100,
                eval_batches: 8,
                checkpoint_every: 200,
                keep_checkpoints: 2,
                peak_flops: None,
            },
        })
    }

    /// A run that goes on with the weights of a checkpoint whose model is `model`, on more text: a thousand steps of 16,384
    /// tokens, and a peak rate below that of pretraining, which the weights reached long ago.
    pub fn continuing(base: &Path, model: &LlamaConfig) -> Self {
        let seq_len = model.max_seq_len.min(1024);
        let tiny = Self::preset("tiny").expect("a preset");
        Self {
            model: model.clone(),
            base: Some(base.into()),
            batch: BatchConfig { seq_len, sequences: 2, accumulation: (8192 / seq_len).max(1) },
            schedule: ScheduleConfig { peak_lr: 1e-4, final_fraction: 0.1, warmup_steps: 100, steps: 1000 },
            run: RunConfig { folder: "runs/continued".into(), ..tiny.run },
            ..tiny
        }
    }

    /// Reads a `.toml` or `.json` file.
    ///
    /// # Errors
    /// [`TrainError::Io`], [`TrainError::Format`] for a key that is missing or unknown, and those of
    /// [`validate`](Self::validate).
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(|error| TrainError::io(path, error))?;
        let config: Self = if path.extension().is_some_and(|extension| extension == "json") {
            serde_json::from_str(&text).map_err(|error| TrainError::format(path, error))?
        } else {
            toml::from_str(&text).map_err(|error| TrainError::format(path, error))?
        };
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML, to be read or saved.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every field has a TOML form")
    }

    /// Checks that the run can be made.
    ///
    /// # Errors
    /// [`TrainError::Config`] names the first field that does not fit.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.model.validate()?;
        if self.version != CONFIG_VERSION {
            return Err(TrainError::config(
                "version",
                format!("is {}; this program reads {CONFIG_VERSION}", self.version),
            ));
        }
        let Self { batch, optimizer, schedule, run, .. } = self;
        validate_run(batch, optimizer, schedule, run, self.model.max_seq_len)
    }

    /// What a run must keep, as text, by field: what is computed follows from it and from the data.
    pub(crate) fn fixed(&self) -> Fixed {
        vec![
            ("seed", self.seed.to_string()),
            ("model", format!("{:?}", self.model)),
            ("compute.precision", self.compute.precision.to_string()),
            ("data.block_causal", self.data.block_causal.to_string()),
            ("batch", format!("{:?}", self.batch)),
            ("optimizer", format!("{:?}", self.optimizer)),
            ("schedule", format!("{:?}", self.schedule)),
        ]
    }

    /// Tokens of an optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        self.sequences_per_step() * self.batch.seq_len as u64
    }

    /// Sequences of an optimizer step.
    pub fn sequences_per_step(&self) -> u64 {
        (self.batch.sequences * self.batch.accumulation) as u64
    }
}

/// Fields of a configuration with their values as text.
pub(crate) type Fixed = Vec<(&'static str, String)>;

/// Checks what every kind of run has.
pub(crate) fn validate_run(
    batch: &BatchConfig,
    optimizer: &OptimizerConfig,
    schedule: &ScheduleConfig,
    run: &RunConfig,
    max_seq_len: usize,
) -> Result<(), TrainError> {
    for (field, value) in [
        ("batch.seq_len", batch.seq_len as u64),
        ("batch.sequences", batch.sequences as u64),
        ("batch.accumulation", batch.accumulation as u64),
        ("schedule.steps", schedule.steps),
        ("run.keep_checkpoints", run.keep_checkpoints as u64),
    ] {
        if value == 0 {
            return Err(TrainError::config(field, "must be at least 1"));
        }
    }
    if batch.seq_len > max_seq_len {
        let (seq_len, max) = (batch.seq_len, max_seq_len);
        return Err(TrainError::config(
            "batch.seq_len",
            format!("is {seq_len}, above the model's max_seq_len of {max}"),
        ));
    }
    let unit = 0.0..1.0;
    for (field, fits) in [
        ("optimizer.beta_1", unit.contains(&optimizer.beta_1)),
        ("optimizer.beta_2", unit.contains(&optimizer.beta_2)),
        ("optimizer.epsilon", optimizer.epsilon > 0.0),
        ("optimizer.weight_decay", optimizer.weight_decay >= 0.0),
        ("optimizer.clip", optimizer.clip > 0.0),
        ("optimizer.z_loss", (0.0..1.0).contains(&optimizer.z_loss)),
        ("schedule.peak_lr", schedule.peak_lr > 0.0 && schedule.peak_lr.is_finite()),
        ("schedule.final_fraction", (0.0..=1.0).contains(&schedule.final_fraction)),
        ("schedule.warmup_steps", schedule.warmup_steps <= schedule.steps),
        ("run.peak_flops", run.peak_flops.is_none_or(|peak| peak > 0.0)),
    ] {
        if !fits {
            return Err(TrainError::config(field, "is out of range"));
        }
    }
    Ok(())
}

impl Default for OptimizerConfig {
    /// The paper's.
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1, decay_norms: false, clip: 1.0, z_loss: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_the_papers_runs() {
        for (name, lr, steps, tokens) in [
            ("7b", 3.0e-4, 238_419, 1.0e12),
            ("13b", 3.0e-4, 238_419, 1.0e12),
            ("33b", 1.5e-4, 333_786, 1.4e12),
            ("65b", 1.5e-4, 333_786, 1.4e12),
        ] {
            let config = PretrainConfig::preset(name).unwrap();
            assert_eq!(config.tokens_per_step(), 4_194_304);
            assert_eq!(config.schedule.peak_lr, lr);
            assert_eq!(config.schedule.steps, steps);
            assert_eq!(config.schedule.warmup_steps, 2_000);
            assert!((config.tokens_per_step() as f64 * steps as f64 / tokens - 1.0).abs() < 1e-5);
        }
        for (name, _) in LlamaConfig::presets() {
            PretrainConfig::preset(name).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn files_round_trip_and_unknown_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = PretrainConfig::preset("tiny").unwrap();
        let (toml, json) = (folder.path().join("a.toml"), folder.path().join("a.json"));
        std::fs::write(&toml, config.to_toml()).unwrap();
        std::fs::write(&json, serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(PretrainConfig::load(&toml).unwrap(), config);
        assert_eq!(PretrainConfig::load(&json).unwrap(), config);

        std::fs::write(&toml, config.to_toml().replace("weight_decay", "weigth_decay")).unwrap();
        let error = PretrainConfig::load(&toml).unwrap_err().to_string();
        assert!(error.contains("a.toml") && error.contains("weigth_decay"), "{error}");
    }

    #[test]
    fn values_out_of_range_name_the_field() {
        let config = PretrainConfig::preset("tiny").unwrap();
        let mut bad = config.clone();
        bad.batch.seq_len = 257;
        assert!(bad.validate().unwrap_err().to_string().contains("batch.seq_len"));
        let mut bad = config.clone();
        bad.optimizer.beta_2 = 1.0;
        assert!(bad.validate().unwrap_err().to_string().contains("optimizer.beta_2"));
        let mut bad = config;
        bad.version = 2;
        assert!(bad.validate().unwrap_err().to_string().contains("version"));
    }
}
