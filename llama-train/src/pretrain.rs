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
use llama_data::tokenizer::Codec;
use llama_data::{NoProgress, Progress};
use llama_model::formats::Checkpoint;
use llama_model::{Llama, Precision, TrainBackend, WeightFormat};

use crate::checkpoint::{self, Restored, RunState};
use crate::config::Fixed;
use crate::metrics::StepMetric;
use crate::strategy::{Components, Outcome, Place, Plan, Save};
use crate::{
    AdamW, BatchConfig, Group, LineRenderer, LossScale, PretrainConfig, Pretrainer, RunConfig, StepStrategy, Stop,
    TokenLoader, TrainError, WarmupCosine, curve, load_model, log, measure_peak_flops,
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

/// How a run goes on, shows itself and is stopped.
pub struct RunOptions<'a> {
    /// A checkpoint of the same run to go on from.
    pub resume_from: Option<&'a Path>,
    /// How it shows itself.
    pub display: Display,
    /// Shows how the model that it begins with is read.
    pub progress: &'a dyn Progress,
    /// Stops it after a step, with a checkpoint.
    pub interrupter: Interrupter,
}

impl RunOptions<'_> {
    /// A run from its beginning to its end that says nothing.
    pub fn silent() -> Self {
        let display = Display::Lines { out: Box::new(std::io::sink()), every: 1 };
        Self { resume_from: None, display, progress: &NoProgress, interrupter: Interrupter::new() }
    }
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
    /// The newest checkpoint: of a model, or of adapters in PEFT's layout. The first member of a group wrote it.
    pub checkpoint: PathBuf,
    /// The loss curve, alike.
    pub curve: PathBuf,
    /// Each source of the data with the passes over it that the run's steps make.
    pub epochs: Vec<(String, f64)>,
}

/// Runs a configuration, or goes on with it from a checkpoint: then training ends as if it had never stopped, on a CPU
/// bit for bit. Every member of a group calls it, with the same configuration and checkpoint. Returns the trained model, without
/// autodiff; of one that is divided, the member's part.
///
/// # Errors
/// Everything that can be wrong with configuration, data, files and other members. What was written before stays.
pub fn pretrain<B: TrainBackend>(
    config: &PretrainConfig,
    device: &B::Device,
    group: Group,
    options: RunOptions,
) -> Result<(Llama<B::InnerBackend>, RunReport), TrainError> {
    config.validate()?;
    let group = Arc::new(group);
    check_shares(&config.batch, &group)?;
    config.compute.precision.check::<B>("precision", device)?;
    let tokenizer = Codec::load(&config.data.folder)?;
    let (has, wants) = (tokenizer.vocab_size(), config.model.vocab_size);
    // Released models may have rows to spare.
    if has > wants || (has < wants && config.base.is_none()) {
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
    let (model, optimizer, place) = match options.resume_from {
        Some(checkpoint) => {
            let Restored { model, optimizer, state } = checkpoint::load_for::<B>(checkpoint, &group, device)?;
            check_same_run(config.fixed(), state.config.fixed())?;
            // What is kept for the backward may change with a resume.
            (Pretrainer::new(model.llama, compute, z_loss), optimizer, state.place())
        }
        None => {
            let llama = match &config.base {
                Some(base) => {
                    let checkpoint = Checkpoint::open(base)?.continued_as(&config.model)?;
                    load_model::<B>(&checkpoint, &group.team(), WeightFormat::F32, device, options.progress)?
                }
                None => config.model.init_in::<B>(&group.team(), config.seed, device)?,
            };
            let micro_batch = (config.batch.sequences * config.batch.seq_len) as u64;
            let place = Place { loss_scale: LossScale::new(compute.precision, micro_batch), ..Default::default() };
            (Pretrainer::new(llama, compute, z_loss), AdamW::new(config.optimizer.clone()), place)
        }
    };
    let data = format!("{} {:x}", train.sequences(), tokenizer.fingerprint());
    check_same_everywhere(&group, config.fixed(), data, place.step, &config.run)?;
    let plan = Plan {
        batch: config.batch.clone(),
        schedule: config.schedule.clone(),
        run: config.run.clone(),
        flops_per_token: config.model.flops_per_token(config.batch.seq_len).training(),
        peak_flops: peak_flops::<B>(&config.run, compute.precision, device, &group),
    };
    let saved = config.clone();
    let save: Save<B> = Arc::new(move |snapshot, place| {
        let state = RunState::new::<B>(place, snapshot.updates(), saved.clone());
        checkpoint::save(snapshot, &state, &tokenizer)?;
        Ok(())
    });
    let (data, leads) = (train.clone(), group.leads());
    let (model, outcome) = launch(model, optimizer, place, plan, save, train, valid, group, options)?;
    let position = outcome.step * config.sequences_per_step();
    let epochs = data.epochs(position).into_iter().map(|(name, epochs)| (name.to_string(), epochs)).collect();
    Ok((model, report(outcome, folder, leads, epochs)?))
}

/// The report of a run that has ended, whose files the first member wrote in `folder`.
pub(crate) fn report(
    outcome: Outcome,
    folder: &Path,
    leads: bool,
    epochs: Vec<(String, f64)>,
) -> Result<RunReport, TrainError> {
    let Outcome { stop, step, skipped } = outcome;
    let (checkpoint, curve) = match leads {
        true => (checkpoint::latest(folder)?, draw_curve(folder)?),
        false => (checkpoint::place(folder, step), folder.join(CURVE_FILE)),
    };
    Ok(RunReport { stop, step, skipped, checkpoint, curve, epochs })
}

/// A step's micro-batches must be the same number for every member.
pub(crate) fn check_shares(batch: &BatchConfig, group: &Group) -> Result<(), TrainError> {
    let (accumulation, count, parts) = (batch.accumulation, group.replica().count, group.shard().count);
    if !(accumulation as u64).is_multiple_of(count) {
        let who = if parts > 1 { format!("{count} groups of {parts} devices") } else { format!("{count} devices") };
        let reason = format!("is {accumulation}, which {who} cannot share alike: choose a multiple of {count}");
        return Err(TrainError::config("batch.accumulation", reason));
    }
    if batch.sequences * batch.seq_len < parts {
        let reason = format!("times batch.seq_len is less than a token for each of {parts} devices");
        return Err(TrainError::config("batch.sequences", reason));
    }
    Ok(())
}

/// What the utilisation is measured by: measured itself, if nobody has said it, by the member that shows it.
pub(crate) fn peak_flops<B: TrainBackend>(
    run: &RunConfig,
    precision: Precision,
    device: &B::Device,
    group: &Group,
) -> f64 {
    match run.peak_flops {
        Some(peak) => peak,
        None if group.leads() => measure_peak_flops::<B::InnerBackend>(device, precision),
        None => f64::INFINITY,
    }
}

/// All members of a group must run the same, on the same `data`, from the same step, and evaluate and save together.
pub(crate) fn check_same_everywhere(
    group: &Group,
    fixed: Fixed,
    data: String,
    step: u64,
    run: &RunConfig,
) -> Result<(), TrainError> {
    let mut parts = fixed;
    parts.push(("data", data));
    parts.push(("tensor_parallel", group.shard().count.to_string()));
    parts.push(("the step to go on from", step.to_string()));
    parts.push(("run.eval_every", run.eval_every.to_string()));
    parts.push(("run.checkpoint_every", run.checkpoint_every.to_string()));
    group.agree(&parts)
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
    group: Arc<Group>,
    options: RunOptions,
) -> Result<(Llama<B::InnerBackend>, Outcome), TrainError> {
    let Plan { batch, schedule, run, .. } = plan.clone();
    let per_step = (batch.sequences * batch.accumulation) as u64;
    let rank = group.replica();
    let train = TokenLoader::new(train, rank, batch.sequences, place.step * per_step, schedule.steps * per_step);
    let valid_batch = batch.sequences.min(valid.sequences() as usize);
    let end = valid.sequences().min(run.eval_batches * valid_batch as u64);
    let valid = TokenLoader::new(valid, rank, valid_batch, 0, end);
    let config = optimizer.config().clone();
    let strategy = StepStrategy::new(plan, save, optimizer, place, group);
    let outcome = strategy.outcome();
    let train: Arc<dyn DataLoader<B, _>> = Arc::new(train);
    let valid: Arc<dyn DataLoader<B::InnerBackend, _>> = Arc::new(valid);
    let mut training = SupervisedTraining::<Components<B>>::new(&run.folder, train, valid)
        .metrics(quality_metrics())
        .with_interrupter(options.interrupter)
        .with_application_logger(None)
        .with_metric_logger(NoLogger)
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)));
    for metric in StepMetric::training() {
        training = training.metric_train_numeric(metric);
    }
    if let Display::Lines { out, every } = options.display {
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
pub(crate) fn check_same_run(config: Fixed, saved: Fixed) -> Result<(), TrainError> {
    match config.iter().zip(&saved).find(|(now, then)| now != then) {
        Some(((field, _), _)) => {
            Err(TrainError::config(field, "differs from the checkpoint's; a resumed run must keep it"))
        }
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
