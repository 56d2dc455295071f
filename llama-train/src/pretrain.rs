//! A whole run: data, model, learner, strategy, pictures.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::data::dataloader::DataLoader;
use burn::train::logger::MetricLogger;
use burn::train::metric::store::{EpochSummary, MetricsUpdate, Split};
use burn::train::metric::{MetricDefinition, NumericEntry};
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};
use llama_data::loader::Sequences;
use llama_data::mixture::Mixture;
use llama_data::tokenizer::Tokenizer;
use llama_model::{Llama, TrainBackend};

use crate::checkpoint::{self, Restored, RunState, TOKENIZER_FILE};
use crate::metrics::StepMetric;
use crate::strategy::{Components, Outcome, Place, Plan, Save};
use crate::{
    AdamW, LineRenderer, LossScale, PretrainConfig, Pretrainer, StepStrategy, Stop, TokenLoader, TrainError,
    WarmupCosine, curve, log, measure_peak_flops,
};

/// Name of the loss curve in a run's folder.
pub const CURVE_FILE: &str = "loss.svg";

/// How a run shows itself while it goes.
pub enum Display {
    /// burn-train's dashboard where the feature `tui` is on and the output is a terminal.
    Dashboard,
    /// A line every few steps.
    Lines {
        /// Where to.
        out: Box<dyn Write + Send>,
        /// Every how many steps.
        every: usize,
    },
}

/// How a run went.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// Whether it is done.
    pub stop: Stop,
    /// Steps done.
    pub step: u64,
    /// Steps that were skipped in this session because their loss or gradient was not finite.
    pub skipped: u64,
    /// The newest checkpoint: of a model, or of adapters in PEFT's layout.
    pub checkpoint: PathBuf,
    /// The loss curve.
    pub curve: PathBuf,
    /// Each source of the data with the passes over it that the run's steps make.
    pub epochs: Vec<(String, f64)>,
}

/// Runs a configuration, or goes on with it from a checkpoint: then training ends as if it had never stopped, on a CPU
/// bit for bit. Returns the trained model, without autodiff.
///
/// # Errors
/// Everything that can be wrong with configuration, data and files. What was written before stays.
pub fn pretrain<B: TrainBackend>(
    config: &PretrainConfig,
    resume_from: Option<&Path>,
    device: &B::Device,
    display: Display,
    interrupter: Interrupter,
) -> Result<(Llama<B::InnerBackend>, RunReport), TrainError> {
    config.validate()?;
    config.compute.precision.check::<B>(device)?;
    let tokenizer = Tokenizer::load(&config.data.folder.join(TOKENIZER_FILE))?;
    if tokenizer.vocab_size() != config.model.vocab_size {
        let (has, wants) = (tokenizer.vocab_size(), config.model.vocab_size);
        return Err(TrainError::config(
            "model.vocab_size",
            format!("is {wants}, but the data's tokenizer has {has} pieces"),
        ));
    }
    let open = |split, seed| {
        let (folder, fingerprint) = (&config.data.folder, tokenizer.fingerprint());
        let data = Mixture::open(folder, split, fingerprint, config.batch.seq_len, seed)?;
        Ok::<_, TrainError>(Arc::new(data.block_causal(config.data.block_causal)))
    };
    let train = open("train", config.seed)?;
    let valid = if config.run.eval_every > 0 { open("valid", 0)? } else { train.clone() };
    let folder = &config.run.folder;
    std::fs::create_dir_all(folder).map_err(|error| TrainError::io(folder, error))?;

    let compute = config.compute;
    let z_loss = config.optimizer.z_loss;
    let (model, optimizer, place) = match resume_from {
        Some(checkpoint) => {
            let Restored { model, optimizer, state } = checkpoint::load::<B>(checkpoint, device)?;
            check_same_run(config, &state.config)?;
            // What is kept for the backward may change with a resume.
            (Pretrainer::new(model.llama, compute, z_loss), optimizer, state.place())
        }
        None => {
            let llama = config.model.init::<B>(config.seed, device)?;
            let micro_batch = (config.batch.sequences * config.batch.seq_len) as u64;
            let place = Place { loss_scale: LossScale::new(compute.precision, micro_batch), ..Default::default() };
            (Pretrainer::new(llama, compute, z_loss), AdamW::new(config.optimizer.clone()), place)
        }
    };
    let plan = Plan {
        batch: config.batch.clone(),
        schedule: config.schedule.clone(),
        run: config.run.clone(),
        flops_per_token: config.model.flops_per_token(config.batch.seq_len).training(),
        peak_flops: config
            .run
            .peak_flops
            .unwrap_or_else(|| measure_peak_flops::<B::InnerBackend>(device, config.compute.precision)),
    };
    let saved = config.clone();
    let save: Save<B> = Arc::new(move |model, optimizer, place| {
        let state = RunState::new(place, optimizer, saved.clone());
        checkpoint::save(model, optimizer, &state, &tokenizer)?;
        Ok(())
    });
    let data = train.clone();
    let (model, outcome) = launch(model, optimizer, place, plan, save, train, valid, display, interrupter)?;
    let position = outcome.step * config.sequences_per_step();
    let epochs = data.epochs(position).into_iter().map(|(name, epochs)| (name.to_string(), epochs)).collect();
    Ok((model, report(outcome, folder, epochs)?))
}

/// The report of a run that has ended, whose files are in `folder`.
pub(crate) fn report(outcome: Outcome, folder: &Path, epochs: Vec<(String, f64)>) -> Result<RunReport, TrainError> {
    let Outcome { stop, step, skipped } = outcome;
    Ok(RunReport { stop, step, skipped, checkpoint: checkpoint::latest(folder)?, curve: draw_curve(folder)?, epochs })
}

/// Lets burn-train run the loop from a place to the end of its plan, and returns the model without autodiff.
#[allow(clippy::too_many_arguments)]
pub(crate) fn launch<B: TrainBackend>(
    model: Pretrainer<B>,
    optimizer: AdamW<B>,
    place: Place,
    plan: Plan,
    save: Save<B>,
    train: Arc<dyn Sequences>,
    valid: Arc<dyn Sequences>,
    display: Display,
    interrupter: Interrupter,
) -> Result<(Llama<B::InnerBackend>, Outcome), TrainError> {
    let Plan { batch, schedule, run, .. } = plan.clone();
    let per_step = (batch.sequences * batch.accumulation) as u64;
    let train = TokenLoader::new(train, batch.sequences, place.step * per_step, schedule.steps * per_step);
    let valid_batch = batch.sequences.min(valid.sequences() as usize);
    let end = valid.sequences().min(run.eval_batches * valid_batch as u64);
    let valid = TokenLoader::new(valid, valid_batch, 0, end);
    let config = optimizer.config().clone();
    let strategy = StepStrategy::new(plan, save, optimizer, place);
    let outcome = strategy.outcome();
    let train: Arc<dyn DataLoader<B, _>> = Arc::new(train);
    let valid: Arc<dyn DataLoader<B::InnerBackend, _>> = Arc::new(valid);
    let mut training = SupervisedTraining::<Components<B>>::new(&run.folder, train, valid)
        .metrics(quality_metrics())
        .with_interrupter(interrupter)
        .with_application_logger(None)
        .with_metric_logger(NoLogger)
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)));
    for metric in StepMetric::training() {
        training = training.metric_train_numeric(metric);
    }
    if let Display::Lines { out, every } = display {
        training = training.renderer(LineRenderer::new(out, every));
    }
    // The strategy has the optimizer; the learner's has no state and is not used.
    let learner = Learner::new(model, AdamW::new(config), WarmupCosine::new(schedule));
    let model = training.launch(learner).model.llama;
    let outcome = outcome.lock().expect("the strategy has ended").take();
    Ok((model, outcome.expect("a strategy that has ended left its outcome")?))
}

/// Draws the loss curve of a run and returns its path.
fn draw_curve(folder: &Path) -> Result<PathBuf, TrainError> {
    let curve = folder.join(CURVE_FILE);
    let lines = log::read(&folder.join(log::METRICS_FILE))?;
    // An interrupted run may have no step yet.
    if lines.iter().any(|line| matches!(line, log::Line::Train { .. })) {
        curve::write_svg(&curve, &lines)?;
    }
    Ok(curve)
}

fn quality_metrics() -> (StepMetric, StepMetric) {
    let [loss, perplexity] = StepMetric::quality();
    (loss, perplexity)
}

/// A resumed run may write elsewhere and evaluate more often, but what it computes must be what it was.
fn check_same_run(config: &PretrainConfig, saved: &PretrainConfig) -> Result<(), TrainError> {
    all_same(&[
        ("seed", config.seed == saved.seed),
        ("model", config.model == saved.model),
        ("compute.precision", config.compute.precision == saved.compute.precision),
        ("data.block_causal", config.data.block_causal == saved.data.block_causal),
        ("batch", config.batch == saved.batch),
        ("optimizer", config.optimizer == saved.optimizer),
        ("schedule", config.schedule == saved.schedule),
    ])
}

/// Fields of two configurations, and whether they are the same.
pub(crate) fn all_same(parts: &[(&str, bool)]) -> Result<(), TrainError> {
    match parts.iter().find(|(_, same)| !same) {
        Some((field, _)) => Err(TrainError::config(field, "differs from the checkpoint's; a resumed run must keep it")),
        None => Ok(()),
    }
}

/// The run's own `metrics.jsonl` takes the place of burn-train's files.
struct NoLogger;

impl MetricLogger for NoLogger {
    fn log(&mut self, _: MetricsUpdate, _: usize, _: &Split) {}

    fn read_numeric(&mut self, _: &str, _: usize, _: &Split) -> Result<Vec<NumericEntry>, String> {
        Ok(Vec::new())
    }

    fn log_metric_definition(&mut self, _: MetricDefinition) {}

    fn log_epoch_summary(&mut self, _: EpochSummary) {}
}
