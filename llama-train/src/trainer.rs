//! One training and one evaluation step, in burn-train's terms.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{ElementConversion, Int, Tensor, TensorData};
use burn::train::metric::{Adaptor, ItemLazy};
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use llama_data::loader::TokenBatch;
use llama_model::{Compute, Llama, LlamaBackend, ModelError, ParamHook, TrainBackend};

/// A model in training.
#[derive(Module, Debug)]
pub struct Pretrainer<B: LlamaBackend> {
    /// The model.
    pub llama: Llama<B>,
    /// Factor of the z-loss in training; 0 is off. Validation is without.
    pub z_loss: f64,
    /// Factor of the loss whose gradients a training step returns; 1 but in half precision.
    pub loss_scale: f64,
}

/// What a step gives, and what metrics are made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// Sum of the cross entropies, in nats.
    pub loss_sum: f64,
    /// Tokens trained or evaluated on.
    pub tokens: u64,
    /// Tokens that the model read, those included that nothing is trained on.
    pub positions: u64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before the clip.
    pub grad_norm: f64,
    /// Tokens read per second.
    pub tokens_per_second: f64,
    /// Model FLOPs utilisation, as a share.
    pub mfu: f64,
    /// Share of the step spent waiting for data.
    pub data_wait: f64,
    /// Resident memory of the process in bytes.
    pub memory: f64,
}

impl StepOutput {
    /// Mean cross entropy per token, in nats.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens.max(1) as f64
    }
}

impl<B: LlamaBackend> Pretrainer<B> {
    /// A model in training, with precision, recomputation and z-loss.
    pub fn new(llama: Llama<B>, compute: Compute, z_loss: f64) -> Self {
        Self { llama: llama.with_compute(compute), z_loss, loss_scale: 1.0 }
    }

    /// Summed loss of a batch, `[1]`; of a model that is divided, that of the rows which are here.
    ///
    /// # Errors
    /// If the sequences are longer than the model's.
    pub fn loss(&self, batch: &TokenBatch, z_loss: f64) -> Result<Tensor<B, 1>, ModelError> {
        self.hooked_loss(batch, z_loss, None)
    }

    fn hooked_loss(
        &self,
        batch: &TokenBatch,
        z_loss: f64,
        hook: Option<&Arc<dyn ParamHook<B>>>,
    ) -> Result<Tensor<B, 1>, ModelError> {
        let device = self.llama.device();
        let upload = |ids: &Vec<i32>| {
            Tensor::<B, 2, Int>::from_data(TensorData::new(ids.clone(), [batch.batch, batch.seq_len]), &device)
        };
        let starts = batch.starts.as_ref().map(upload);
        self.llama.hooked_loss(upload(&batch.inputs), upload(&batch.targets), starts, z_loss, hook)
    }

    /// Of the rows whose losses this model gives.
    fn counts(&self, batch: &TokenBatch) -> StepOutput {
        let rows = self.llama.rows(batch.positions());
        StepOutput { positions: rows.len() as u64, tokens: batch.tokens_in(rows) as u64, ..Default::default() }
    }
}

impl<B: TrainBackend> Pretrainer<B> {
    /// A training step whose gradients a hook takes, if there is one.
    pub(crate) fn hooked_step(
        &self,
        batch: TokenBatch,
        hook: Option<&Arc<dyn ParamHook<B>>>,
    ) -> TrainOutput<StepOutput> {
        let loss = self.hooked_loss(&batch, self.z_loss, hook).expect("the configuration was checked");
        let grads = match self.loss_scale {
            1.0 => loss.backward(),
            factor => loss.clone().mul_scalar(factor).backward(),
        };
        let loss_sum = loss.into_scalar().elem();
        let output = StepOutput { loss_sum, ..self.counts(&batch) };
        TrainOutput::new(self, grads, output)
    }
}

impl<B: TrainBackend> TrainStep for Pretrainer<B> {
    type Input = TokenBatch;
    type Output = StepOutput;

    /// Forward and backward of the **summed** loss, times `loss_scale`: who drives the step divides the gradients by it and by the
    /// tokens of all its micro-batches.
    ///
    /// # Panics
    /// If the sequences are longer than the model's; a checked configuration rules it out.
    fn step(&self, batch: TokenBatch) -> TrainOutput<StepOutput> {
        self.hooked_step(batch, None)
    }
}

impl<B: LlamaBackend> InferenceStep for Pretrainer<B> {
    type Input = TokenBatch;
    type Output = StepOutput;

    /// # Panics
    /// As the training step.
    fn step(&self, batch: TokenBatch) -> StepOutput {
        let loss = self.loss(&batch, 0.0).expect("the configuration was checked");
        StepOutput { loss_sum: loss.into_scalar().elem(), ..self.counts(&batch) }
    }
}

impl ItemLazy for StepOutput {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl Adaptor<StepOutput> for StepOutput {
    fn adapt(&self) -> StepOutput {
        self.clone()
    }
}
