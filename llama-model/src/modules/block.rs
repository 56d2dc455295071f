//! One block: `h = x + Attention(RMSNorm(x))`, then `h + FeedForward(RMSNorm(h))`.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::{Attention, FeedForward, LayerCache, RmsNorm};
use crate::backend::ops::primitive;
use crate::backend::{BlockWeights, LlamaBackend, ops};
use crate::init::Init;
use crate::{Compute, LlamaConfig};

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

    /// The block as one operation with a backward of its own. With `starts`, tokens attend inside their document only.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, `tables` `[seq_len, head_dim / 2]` each, `starts [batch, seq_len]`, result as `x`.
    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        tables: [Tensor<B, 2>; 2],
        starts: Option<Tensor<B, 2, Int>>,
        compute: Compute,
    ) -> Tensor<B, 3> {
        let Self { attention_norm, attention, ffn_norm, feed_forward } = self;
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
        ops::block(x, weights, tables, starts, self.attention_norm.eps, compute)
    }

    /// The same, composed of its parts, for sequences that a cache continues.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, `tables` `[seq_len, head_dim / 2]` each, result as `x`.
    pub fn forward_cached(
        &self,
        x: Tensor<B, 3>,
        tables: [Tensor<B, 2>; 2],
        cache: &mut LayerCache<B>,
        compute: Compute,
    ) -> Tensor<B, 3> {
        let precision = compute.precision;
        let n = self.attention_norm.forward(x.clone());
        let h = x + self.attention.forward(n, tables, Some(cache), precision);
        h.clone() + self.feed_forward.forward(self.ffn_norm.forward(h), precision)
    }
}
