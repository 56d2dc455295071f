//! One block: `h = x + Attention(RMSNorm(x))`, then `h + FeedForward(RMSNorm(h))`.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Attention, FeedForward, LayerCache, Linear, RmsNorm};
use crate::LlamaConfig;
use crate::backend::ops::primitive;
use crate::backend::{BlockSpec, BlockWeights, LlamaBackend, ops};
use crate::init::Init;

/// A pre-normalised transformer block.
#[derive(Module, Debug)]
pub struct Block<B: LlamaBackend> {
    /// Normalises the attention's input.
    pub attention_norm: RmsNorm<B>,
    /// Mixes positions.
    pub attention: Attention<B>,
    /// Normalises the feed-forward network's input.
    pub ffn_norm: RmsNorm<B>,
    /// Mixes features.
    pub feed_forward: FeedForward<B>,
}

impl<B: LlamaBackend> Block<B> {
    pub(crate) fn new(config: &LlamaConfig, init: &Init<B>) -> Self {
        Self {
            attention_norm: RmsNorm::new(config.d_model, config.norm_eps, &init.at("attention_norm")),
            attention: Attention::new(config, &init.at("attention")),
            ffn_norm: RmsNorm::new(config.d_model, config.norm_eps, &init.at("ffn_norm")),
            feed_forward: FeedForward::new(config, &init.at("feed_forward")),
        }
    }

    /// The block as one operation with a backward of its own, unless weights are in blocks or have adapters.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, or `[1, rows, d_model]` with the rows that a member of a team has; result as `x`.
    ///
    /// # Panics
    /// If `x` does not fit `spec`, or a block with adapters is divided.
    pub fn forward(&self, x: Tensor<B, 3>, spec: BlockSpec<B>) -> Tensor<B, 3> {
        let Self { attention_norm, attention, ffn_norm, feed_forward } = self;
        if !self.linears().iter().all(|(_, linear)| linear.is_plain()) {
            return self.forward_parts(x, spec, None);
        }
        let weights = BlockWeights {
            attention_norm: primitive(attention_norm.weight.val()),
            wq: primitive(attention.wq.dense()),
            wk: primitive(attention.wk.dense()),
            wv: primitive(attention.wv.dense()),
            wo: primitive(attention.wo.dense()),
            ffn_norm: primitive(ffn_norm.weight.val()),
            w1: primitive(feed_forward.w1.dense()),
            w2: primitive(feed_forward.w2.dense()),
            w3: primitive(feed_forward.w3.dense()),
        };
        ops::block(x, weights, spec)
    }

    /// The same for inference: `x` continues the sequences in a cache.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, also in a team, result as `x`.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_cached(&self, x: Tensor<B, 3>, spec: BlockSpec<B>, cache: &mut LayerCache<B>) -> Tensor<B, 3> {
        let Self { attention_norm, attention, ffn_norm, feed_forward } = self;
        if self.linears().iter().any(|(_, linear)| linear.adapter.is_some()) {
            return self.forward_parts(x, spec, Some(cache));
        }
        let weights = BlockWeights {
            attention_norm: primitive(attention_norm.weight.val()),
            wq: attention.wq.matrix(),
            wk: attention.wk.matrix(),
            wv: attention.wv.matrix(),
            wo: attention.wo.matrix(),
            ffn_norm: primitive(ffn_norm.weight.val()),
            w1: feed_forward.w1.matrix(),
            w2: feed_forward.w2.matrix(),
            w3: feed_forward.w3.matrix(),
        };
        cache.update(|cache| ops::cached_block(x, weights, cache, spec))
    }

    /// The same, composed of its parts. With a cache, `x` continues the sequences in it.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, result as `x`.
    ///
    /// # Panics
    /// In a team.
    pub fn forward_parts(
        &self,
        x: Tensor<B, 3>,
        spec: BlockSpec<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 3> {
        let BlockSpec { cos, sin, starts, compute, team, .. } = spec;
        assert!(team.is_alone(), "a model with adapters is not divided");
        let (tables, precision) = ([cos, sin].map(ops::tensor), compute.precision);
        let n = self.attention_norm.forward(x.clone());
        let h = x + self.attention.forward(n, tables, starts.map(Tensor::from_primitive), cache, precision);
        h.clone() + self.feed_forward.forward(self.ffn_norm.forward(h), precision)
    }

    /// The linear layers and their names in the block.
    pub(crate) fn linears(&self) -> [(&'static str, &Linear<B>); 7] {
        let (attention, feed_forward) = (&self.attention, &self.feed_forward);
        [
            ("attention.wq", &attention.wq),
            ("attention.wk", &attention.wk),
            ("attention.wv", &attention.wv),
            ("attention.wo", &attention.wo),
            ("feed_forward.w1", &feed_forward.w1),
            ("feed_forward.w2", &feed_forward.w2),
            ("feed_forward.w3", &feed_forward.w3),
        ]
    }

    /// The same, to be changed.
    pub(crate) fn linears_mut(&mut self) -> [(&'static str, &mut Linear<B>); 7] {
        let (attention, feed_forward) = (&mut self.attention, &mut self.feed_forward);
        [
            ("attention.wq", &mut attention.wq),
            ("attention.wk", &mut attention.wk),
            ("attention.wv", &mut attention.wv),
            ("attention.wo", &mut attention.wo),
            ("feed_forward.w1", &mut feed_forward.w1),
            ("feed_forward.w2", &mut feed_forward.w2),
            ("feed_forward.w3", &mut feed_forward.w3),
        ]
    }
}
