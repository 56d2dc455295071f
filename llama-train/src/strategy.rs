//! The training loop: a burn-train strategy that counts optimizer steps.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::data::dataloader::{DataLoader, Progress};
use burn::module::AutodiffModule;
use burn::train::{
    EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearningComponentsMarker, SupervisedLearningStrategy,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, ValidLoader,
};
use llama_data::DataError;
use llama_data::loader::TokenBatch;
use llama_model::{ParamHook, TrainBackend};

use crate::log::{Line, MetricsFile};
use crate::parallel::{Flow, Parallel, Snapshot};
use crate::{
    AdamW, BatchConfig, GradientList, Group, LossScale, Pretrainer, RunConfig, ScheduleConfig, StepOutput, TrainError,
    WarmupCosine,
};

/// Steps in a row without a finite loss and gradient after which a run gives up.
const MAX_SKIPPED: u64 = 20;

/// The parts of our training, in burn-train's terms.
pub type Components<B> = LearningComponentsMarker<B, WarmupCosine, Pretrainer<B>, AdamW<B>>;

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All steps are done.
    Finished,
    /// The interrupter asked for it. A checkpoint was written.
    Interrupted,
}

/// What the loop needs of a run's configuration.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Tokens of a step.
    pub batch: BatchConfig,
    /// Learning rate over time.
    pub schedule: ScheduleConfig,
    /// What is written when.
    pub run: RunConfig,
    /// Floating-point operations of a step for each token.
    pub flops_per_token: f64,
    /// Floating-point operations per second of the device.
    pub peak_flops: f64,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Factor of the loss, in half precision.
    pub loss_scale: Option<LossScale>,
}

/// Writes a checkpoint of model and optimizer; the member of a group that leads is asked to.
pub type Save<B> = Arc<dyn Fn(&Snapshot<B>, Place) -> Result<(), TrainError> + Send + Sync>;

/// Owns model, optimizer and step of a run, so that updates are in place: a `Learner` clones its model for every update.
pub struct StepStrategy<B: TrainBackend> {
    plan: Plan,
    save: Save<B>,
    start: Mutex<Option<Start<B>>>,
    outcome: Arc<Mutex<Option<Result<Outcome, TrainError>>>>,
}

/// What a run begins with, beside the model.
struct Start<B: TrainBackend> {
    optimizer: AdamW<B>,
    place: Place,
    group: Arc<Group>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub stop: Stop,
    pub step: u64,
    pub skipped: u64,
}

impl<B: TrainBackend> StepStrategy<B> {
    /// A strategy that goes on from a place with an optimizer. The learner's model must be the one of that place, or the part of it
    /// that the member has, and the loaders must begin at its data position with the batches of the group's
    /// [`replica`](Group::replica).
    pub fn new(plan: Plan, save: Save<B>, optimizer: AdamW<B>, place: Place, group: Arc<Group>) -> Self {
        let start = Start { optimizer, place, group };
        Self { plan, save, start: Mutex::new(Some(start)), outcome: Arc::default() }
    }

    /// Where the result will be when burn-train's `launch`, which returns none, has ended.
    pub(crate) fn outcome(&self) -> Arc<Mutex<Option<Result<Outcome, TrainError>>>> {
        self.outcome.clone()
    }
}

impl<B: TrainBackend> SupervisedLearningStrategy<Components<B>> for StepStrategy<B> {
    fn fit(
        &self,
        components: TrainingComponents<Components<B>>,
        learner: Learner<Components<B>>,
        train: TrainLoader<Components<B>>,
        valid: ValidLoader<Components<B>>,
        _: usize,
    ) -> (Pretrainer<B>, SupervisedTrainingEventProcessor<Components<B>>) {
        // Dropping the learner leaves this model as the only owner of its buffers.
        let model = learner.model();
        drop(learner);
        let start = self.start.lock().expect("no other thread holds this").take();
        let Start { optimizer, place, group } = start.expect("a strategy runs once");
        let mut run = Run {
            schedule: WarmupCosine::new(self.plan.schedule.clone()),
            strategy: self,
            parallel: Arc::new(Parallel::new(group, &model.llama)),
            flow: None,
            model: Some(model),
            optimizer,
            place,
            skipped: 0,
            skipped_in_a_row: 0,
            processor: components.event_processor,
        };
        let result = run.run(&train, &valid, || components.interrupter.should_stop());
        *self.outcome.lock().expect("no other thread holds this") = Some(result);
        (run.model.take().expect("the model is only away during an update"), run.processor)
    }
}

/// A running training.
struct Run<'a, B: TrainBackend> {
    strategy: &'a StepStrategy<B>,
    schedule: WarmupCosine,
    parallel: Arc<Parallel>,
    /// What others have and get of the model; a device that trains alone has none.
    flow: Option<Arc<Flow<B>>>,
    /// Away only while it is updated.
    model: Option<Pretrainer<B>>,
    optimizer: AdamW<B>,
    place: Place,
    skipped: u64,
    skipped_in_a_row: u64,
    processor: SupervisedTrainingEventProcessor<Components<B>>,
}

impl<B: TrainBackend> Run<'_, B> {
    fn run(
        &mut self,
        train: &Arc<dyn DataLoader<B, TokenBatch>>,
        valid: &Arc<dyn DataLoader<B::InnerBackend, TokenBatch>>,
        should_stop: impl Fn() -> bool,
    ) -> Result<Outcome, TrainError> {
        let model = self.model.as_ref().expect("the model is only away during an update");
        self.flow = Flow::new(&self.parallel, &model.llama)?.map(Arc::new);
        let Plan { schedule, run, .. } = &self.strategy.plan;
        let leads = self.parallel.group.leads();
        let mut log = leads.then(|| MetricsFile::open(&run.folder, self.place.step)).transpose()?;
        let mut write = |line: &Line| log.as_mut().map_or(Ok(()), |log| log.write(line));
        let mut batches = train.iter();
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut saved = None;
        let mut stop = Stop::Finished;
        while self.place.step < schedule.steps {
            if self.parallel.group.any(should_stop())? {
                stop = Stop::Interrupted;
                break;
            }
            let output = self.train_step(&mut || batches.next(), &mut write)?;
            if let Some(output) = output {
                write(&Line::train(self.place.step, self.place.tokens, &output))?;
                let lr = Some(output.lr);
                self.processor.process_train(LearnerEvent::ProcessedItem(self.item(output, lr)));
            }
            let last = self.place.step == schedule.steps;
            if due(run.eval_every, self.place.step) || (last && run.eval_every > 0) {
                let output = self.evaluate(valid)?;
                write(&Line::valid(self.place.step, &output))?;
                self.processor.process_valid(LearnerEvent::ProcessedItem(self.item(output, None)));
                self.processor.process_valid(LearnerEvent::EndEpoch(self.place.step as usize));
                self.processor.process_train(LearnerEvent::EndEpoch(self.place.step as usize));
            }
            if due(run.checkpoint_every, self.place.step) {
                self.save()?;
                saved = Some(self.place.step);
            }
        }
        if saved != Some(self.place.step) {
            self.save()?;
        }
        Ok(Outcome { stop, step: self.place.step, skipped: self.skipped })
    }

    /// One optimizer step: micro-batches, one clip, one update. `None` if it was skipped because its loss or gradient
    /// is not finite; the weights are then untouched.
    fn train_step(
        &mut self,
        next_batch: &mut dyn FnMut() -> Option<TokenBatch>,
        log: &mut dyn FnMut(&Line) -> Result<(), TrainError>,
    ) -> Result<Option<StepOutput>, TrainError> {
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        let mut grads = GradientList::default();
        let mut output = StepOutput { lr: self.schedule.lr(self.place.step), ..Default::default() };
        let loss_scale = self.place.loss_scale.map_or(1.0, |scale| scale.factor);
        if let Some(model) = &mut self.model {
            model.loss_scale = loss_scale;
        }
        let micro_batches = self.strategy.plan.batch.accumulation as u64 / self.parallel.group.replica().count;
        let hook = self.flow.clone().map(|flow| flow as Arc<dyn ParamHook<B>>);
        for left in (0..micro_batches).rev() {
            let before = Instant::now();
            let batch = next_batch().ok_or_else(|| DataError::Loader("it has no more batches".into()))?;
            waited += before.elapsed();
            if let Some(flow) = self.flow.as_ref().filter(|_| left == 0) {
                flow.send_gradients();
            }
            let model = self.model.as_ref().expect("the model is only away during an update");
            let micro = model.hooked_step(batch, hook.as_ref());
            grads.accumulate::<B, _>(&model.llama, micro.grads);
            output.loss_sum += micro.item.loss_sum;
            output.tokens += micro.item.tokens;
            output.positions += micro.item.positions;
            self.settle();
        }
        let (grads, norm) = self.reduce(grads, &mut output)?;
        // The sum over all tokens is divided by their number once, whatever the micro-batches.
        let per_token = 1.0 / (output.tokens.max(1) as f64 * loss_scale);
        output.grad_norm = norm * per_token;
        self.place.step += 1;
        if !output.loss_sum.is_finite() || !output.grad_norm.is_finite() {
            let (loss, grad_norm) = (output.loss().to_string(), output.grad_norm.to_string());
            log(&Line::Skipped { step: self.place.step, loss, grad_norm })?;
            self.skipped += 1;
            // In half precision the gradient's overflow is expected, and the factor falls.
            if !output.loss_sum.is_finite() || !self.place.loss_scale.as_mut().is_some_and(LossScale::shrink) {
                self.skipped_in_a_row += 1;
            }
            if self.skipped_in_a_row == MAX_SKIPPED {
                return Err(TrainError::NotFinite { step: self.place.step, count: MAX_SKIPPED });
            }
            return Ok(None);
        }
        self.skipped_in_a_row = 0;
        self.place.loss_scale.iter_mut().for_each(LossScale::grow);
        let scale = self.optimizer.clip_factor(output.grad_norm) * per_token;
        let model = self.model.take().expect("the model is only away during an update");
        let llama = self.optimizer.update(output.lr, model.llama, grads, scale);
        let llama = match &self.flow {
            Some(flow) => flow.share(llama),
            None => llama,
        };
        self.model = Some(Pretrainer { llama, ..model });

        self.place.tokens += output.tokens;
        let seconds = start.elapsed().as_secs_f64();
        output.tokens_per_second = output.positions as f64 / seconds;
        let Plan { flops_per_token, peak_flops, .. } = self.strategy.plan;
        output.mfu =
            output.tokens_per_second * flops_per_token / (peak_flops * self.parallel.group.rank().count as f64);
        output.data_wait = waited.as_secs_f64() / seconds;
        output.memory = memory_stats::memory_stats().map_or(0.0, |stats| stats.physical_mem as f64);
        Ok(Some(output))
    }

    /// The gradients that this device updates by, of all members, and the norm of all gradients. A hook took this device's own from a group's.
    fn reduce(
        &self,
        own: GradientList<B::InnerBackend>,
        output: &mut StepOutput,
    ) -> Result<(GradientList<B::InnerBackend>, f64), TrainError> {
        let Some(flow) = &self.flow else {
            let norm = own.norm();
            return Ok((own, norm));
        };
        self.parallel.group.check()?;
        let grads = flow.gradients()?;
        let norm = self.parallel.sum(&grads, output)?;
        Ok((grads, norm))
    }

    /// Waits for what others still send of the model.
    fn settle(&mut self) {
        if let Some(flow) = &self.flow {
            let model = self.model.take().expect("the model is only away during an update");
            self.model = Some(Pretrainer { llama: flow.settle(model.llama), ..model });
        }
    }

    /// Mean loss on the validation windows, in their order.
    fn evaluate(&mut self, valid: &Arc<dyn DataLoader<B::InnerBackend, TokenBatch>>) -> Result<StepOutput, TrainError> {
        self.settle();
        let model = self.model.as_ref().expect("the model is only away during an update").valid();
        let (mut losses, mut tokens) = (Vec::new(), Vec::new());
        for batch in valid.iter() {
            let part = InferenceStep::step(&model, batch);
            losses.push(part.loss_sum);
            tokens.push(part.tokens as f64);
        }
        let sum = |own: &[f64]| Ok::<_, TrainError>(self.parallel.interleave(own)?.iter().sum::<f64>());
        Ok(StepOutput { loss_sum: sum(&losses)?, tokens: sum(&tokens)? as u64, ..Default::default() })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.settle();
        self.parallel.group.check()?;
        let model = self.model.as_ref().expect("the model is only away during an update");
        let snapshot = Snapshot { model, optimizer: &self.optimizer, parallel: &self.parallel };
        if self.parallel.group.leads() { (self.strategy.save)(&snapshot, self.place) } else { snapshot.send() }
    }

    fn item(&self, output: StepOutput, lr: Option<f64>) -> TrainingItem<StepOutput> {
        let progress = Progress::new(self.place.step as usize, self.strategy.plan.schedule.steps as usize);
        TrainingItem::new(output, progress.clone(), progress, Some(self.place.step as usize), lr)
    }
}
