//! The whole model: embedding, blocks, final norm, output head.

use std::ops::Range;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor};

use super::{Block, Embedding, KvCache, Linear, RmsNorm, RotaryEmbedding};
use crate::backend::ops::primitive;
use crate::backend::{BlockSpec, LlamaBackend, LossSpec, ops};
use crate::hook::{Hook, hooked};
use crate::init::Init;
use crate::shard::Team;
use crate::{Compute, LlamaConfig, ModelError, ParamHook, Precision};

/// A LLaMA language model. Parameters carry the names of the released checkpoints.
#[derive(Module, Debug)]
pub struct Llama<B: LlamaBackend> {
    /// Token embeddings.
    pub tok_embeddings: Embedding<B>,
    /// The blocks.
    pub layers: Vec<Block<B>>,
    /// Final norm.
    pub norm: RmsNorm<B>,
    /// Output head; the embedding matrix serves as head where there is none.
    pub output: Option<Linear<B>>,
    /// Rotary tables, shared by all blocks.
    pub rope: RotaryEmbedding<B>,
    /// How it computes.
    #[module(skip)]
    pub compute: Compute,
    /// What a [`KvCache`] of it keeps keys and values in.
    #[module(skip)]
    pub cache: Precision,
    /// Who has the other parts, if it is divided.
    #[module(skip)]
    pub(crate) team: Team,
}

impl LlamaConfig {
    /// A new model. Matrices are drawn from N(0, 0.02²), those that write into the residual stream (`wo`, `w2`) from
    /// N(0, 0.02² / 2L) with L layers (GPT-2's rule; the paper states none); norm gains are 1. Each parameter has a
    /// random stream of its own, made on the host from `seed` and its name, so a seed gives the same weights on every
    /// backend.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the fields describe no model.
    pub fn init<B: LlamaBackend>(&self, seed: u64, device: &B::Device) -> Result<Llama<B>, ModelError> {
        self.init_in(&Team::default(), seed, device)
    }

    /// The part of [`init`](Self::init)'s model that a member of a team has.
    ///
    /// # Errors
    /// As there, or if the model cannot be divided among as many.
    pub fn init_in<B: LlamaBackend>(&self, team: &Team, seed: u64, device: &B::Device) -> Result<Llama<B>, ModelError> {
        self.init_with(team, Init::new(Some(seed), self.n_layers, team.shard(), device))
    }

    /// A model of zeros, or the part of it that a member of a team has, to be filled from a checkpoint.
    pub(crate) fn init_empty<B: LlamaBackend>(&self, team: &Team, device: &B::Device) -> Result<Llama<B>, ModelError> {
        self.init_with(team, Init::new(None, self.n_layers, team.shard(), device))
    }

    fn init_with<B: LlamaBackend>(&self, team: &Team, init: Init<B>) -> Result<Llama<B>, ModelError> {
        self.validate()?;
        self.check_shards(team.shard().count)?;
        Ok(Llama {
            tok_embeddings: Embedding::new(self.vocab_size, self.d_model, init.std(), &init.at("tok_embeddings")),
            layers: (0..self.n_layers).map(|layer| Block::new(self, &init.at(&format!("layers.{layer}")))).collect(),
            norm: RmsNorm::new(self.d_model, self.norm_eps, &init.at("norm")),
            output: (!self.tied_head)
                .then(|| Linear::new(self.d_model, self.vocab_size, init.std(), &init.at("output"))),
            rope: RotaryEmbedding::new(self, init.device()),
            compute: Compute::default(),
            cache: Precision::default(),
            team: team.clone(),
        })
    }
}

impl<B: LlamaBackend> Llama<B> {
    /// Logits of the token after each position. With a cache, `tokens` continue the sequences in it.
    ///
    /// # Shapes
    /// `tokens [batch, seq_len]`, result `[batch, seq_len, vocab_size]`.
    ///
    /// # Errors
    /// If the sequence is longer than `max_seq_len` or the cache is full or made for another shape; [`ModelError::Member`] if a member that has
    /// another part of the model is gone.
    pub fn forward(
        &self,
        tokens: Tensor<B, 2, Int>,
        cache: Option<&mut KvCache<B>>,
    ) -> Result<Tensor<B, 3>, ModelError> {
        Ok(self.head(self.hidden(tokens, cache)?))
    }

    /// Hidden states after the final norm: what the head reads. Those of a divided model have no gradients; its
    /// [loss](Self::document_loss) has.
    ///
    /// # Shapes
    /// `tokens [batch, seq_len]`, result `[batch, seq_len, d_model]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden(
        &self,
        tokens: Tensor<B, 2, Int>,
        cache: Option<&mut KvCache<B>>,
    ) -> Result<Tensor<B, 3>, ModelError> {
        let [batch, seq_len] = tokens.dims();
        let mut own_cache;
        let cache = match cache {
            Some(cache) => cache,
            None if self.team.is_alone() => {
                let hidden = self.own_hidden(&self.tok_embeddings, tokens, None, None)?;
                let [_, d_model] = hidden.dims();
                return Ok(hidden.reshape([batch, seq_len, d_model]));
            }
            // Each member has all rows then, however few there are.
            None => {
                own_cache = KvCache::new(self, batch, seq_len)?;
                &mut own_cache
            }
        };
        cache.check(batch, seq_len, self.layers.len())?;
        let spec = self.block_spec(cache.len(), [batch, seq_len], None)?;
        let _turn = self.team.turn();
        cache.tell(&tokens);
        let mut x = self.tok_embeddings.forward(tokens);
        for (layer, block) in self.layers.iter().enumerate() {
            x = block.forward_cached(x, spec.clone(), cache.layer(layer));
        }
        self.team.check()?;
        Ok(self.norm.forward(x))
    }

    /// Hidden states of the rows that this member has: all, if the model is not divided.
    ///
    /// # Shapes
    /// `tokens` and `starts` `[batch, seq_len]`, result `[rows, d_model]`.
    fn own_hidden(
        &self,
        embeddings: &Embedding<B>,
        tokens: Tensor<B, 2, Int>,
        starts: Option<Tensor<B, 2, Int>>,
        hook: Hook<'_, B>,
    ) -> Result<Tensor<B, 2>, ModelError> {
        let spec = self.block_spec(0, tokens.dims(), starts)?;
        let (rows, members) = (spec.batch * spec.seq_len, self.team.shard().count);
        let tokens = match self.team.is_alone() {
            true => tokens,
            false if rows < members => {
                let reason = format!("are {rows}, less than one for each of {members} devices that divide the model");
                return Err(ModelError::Config { field: "tokens", reason });
            }
            false => self.own_rows(tokens).unsqueeze(),
        };
        let mut x = embeddings.forward(tokens);
        for (layer, block) in self.layers.iter().enumerate() {
            x = hooked(hook, &format!("layers.{layer}"), block, Some(&x)).forward(x, spec.clone());
        }
        Ok(hooked(hook, "norm", &self.norm, Some(&x)).forward(x).flatten(0, 1))
    }

    /// What all blocks are told of `[batch, seq_len]` tokens after `past` others in each sequence.
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`].
    pub fn block_spec(
        &self,
        past: usize,
        [batch, seq_len]: [usize; 2],
        starts: Option<Tensor<B, 2, Int>>,
    ) -> Result<BlockSpec<B>, ModelError> {
        if past + seq_len > self.max_seq_len() {
            return Err(ModelError::SequenceTooLong { len: past + seq_len, max: self.max_seq_len() });
        }
        let [cos, sin] = self.rope.tables(past, seq_len).map(primitive);
        let starts = starts.map(Tensor::into_primitive);
        let (head_dim, eps) = (2 * self.rope.cos.dims()[1], self.norm.eps);
        Ok(BlockSpec {
            cos,
            sin,
            starts,
            batch,
            seq_len,
            head_dim,
            eps,
            compute: self.compute,
            team: self.team.clone(),
        })
    }

    /// Of numbers for each token those of the rows that this member has.
    fn own_rows(&self, numbers: Tensor<B, 2, Int>) -> Tensor<B, 1, Int> {
        let numbers: Tensor<B, 1, Int> = numbers.flatten(0, 1);
        let rows = self.rows(numbers.dims()[0]);
        if self.team.is_alone() { numbers } else { numbers.slice([rows]) }
    }

    /// Who has the other parts, if the model is divided.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// The rows of `tokens` that this member of a team has, whose losses it gives: all, if the model is not divided.
    pub fn rows(&self, tokens: usize) -> Range<usize> {
        self.team.shard().range(tokens)
    }

    /// Logits of hidden states.
    ///
    /// # Shapes
    /// `hidden [.., d_model]`, result `[.., vocab_size]`.
    pub fn head<const D: usize>(&self, hidden: Tensor<B, D>) -> Tensor<B, D> {
        match &self.output {
            Some(output) => output.forward(hidden, self.compute.precision),
            None => self.tok_embeddings.logits(hidden, self.compute.precision),
        }
    }

    /// The model with other settings; see [`Compute`].
    #[must_use]
    pub fn with_compute(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }

    /// The model with caches that keep keys and values in another precision; [`WeightFormat::cache`](crate::WeightFormat::cache) suits its weights.
    #[must_use]
    pub fn with_cache(self, cache: Precision) -> Self {
        Self { cache, ..self }
    }

    /// Summed cross entropy of `targets` after `tokens`; a target of -100 is left out. The logits never exist whole. A member of a
    /// team gives the sum over its [`rows`](Self::rows).
    /// `z_loss` is the factor of the squared log-sum-exp, 0 for none: see [`LossSpec::z_loss`].
    ///
    /// # Shapes
    /// `tokens` and `targets` `[batch, seq_len]`, result `[1]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn loss(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
        z_loss: f64,
    ) -> Result<Tensor<B, 1>, ModelError> {
        self.document_loss(tokens, targets, None, z_loss)
    }

    /// [`loss`](Self::loss) with attention inside documents: `starts` names the position of the first token of each token's
    /// document, 0 where that lies before the sequence. Rotary embeddings are relative, so positions go on as they are.
    ///
    /// # Shapes
    /// All integers `[batch, seq_len]`, result `[1]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn document_loss(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
        starts: Option<Tensor<B, 2, Int>>,
        z_loss: f64,
    ) -> Result<Tensor<B, 1>, ModelError> {
        self.hooked_loss(tokens, targets, starts, z_loss, None)
    }

    /// [`document_loss`](Self::document_loss) with a hook on the trained parameters.
    ///
    /// # Shapes
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub fn hooked_loss(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
        starts: Option<Tensor<B, 2, Int>>,
        z_loss: f64,
        hook: Option<&Arc<dyn ParamHook<B>>>,
    ) -> Result<Tensor<B, 1>, ModelError> {
        let spec = LossSpec { precision: self.compute.precision, z_loss, ..Default::default() };
        let targets = self.own_rows(targets);
        let embeddings = hooked::<B, _, 2>(hook, "tok_embeddings", &self.tok_embeddings, None);
        let hidden = self.own_hidden(&embeddings, tokens, starts, hook)?;
        let head = self.output.as_ref().map(|output| hooked(hook, "output", output, Some(&hidden)));
        let head = as_head(head.map_or_else(|| embeddings.dense(), |output| output.dense()));
        Ok(ops::linear_cross_entropy(hidden, head, targets, spec))
    }

    /// Cross entropy of each target after `tokens`, 0 where the target is -100. The negative of a token's
    /// log-likelihood; not differentiable.
    ///
    /// # Shapes
    /// `tokens` and `targets` `[batch, seq_len]`, result `[batch, seq_len]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// # Panics
    /// On a model that tracks gradients: call `model.valid()` first.
    pub fn token_losses(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
    ) -> Result<Tensor<B, 2>, ModelError> {
        let dims = tokens.dims();
        let spec = LossSpec { precision: self.compute.precision, ..Default::default() };
        Ok(ops::token_losses(self.hidden(tokens, None)?, self.head_weight(), targets, spec).reshape(dims))
    }

    /// Longest sequence the rotary tables cover.
    pub fn max_seq_len(&self) -> usize {
        self.rope.cos.dims()[0]
    }

    /// Where it is.
    pub fn device(&self) -> B::Device {
        self.norm.weight.device()
    }

    /// Number of tokens the model knows.
    pub fn vocab_size(&self) -> usize {
        self.tok_embeddings.vocab_size()
    }

    /// The head's weight, in the dtype of the hidden states it is multiplied with.
    pub(crate) fn head_weight(&self) -> Tensor<B, 2> {
        as_head(self.output.as_ref().map_or_else(|| self.tok_embeddings.dense(), Linear::dense))
    }
}

/// A weight as the loss of hidden states in f32 reads it.
fn as_head<B: LlamaBackend>(weight: Tensor<B, 2>) -> Tensor<B, 2> {
    match weight.dtype() {
        DType::BF16 | DType::F16 => ops::tensor(B::loss_head(primitive(weight), DType::F32)),
        _ => weight,
    }
}
