//! One block: `h = x + Attention(RMSNorm(x))`, then `h + FeedForward(RMSNorm(h))`.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Attention, FeedForward, LayerCache, RmsNorm, RotaryEmbedding};
use crate::LlamaConfig;
use crate::backend::LlamaBackend;
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

    /// # Shapes
    /// `x [batch, seq_len, d_model]`, result as `x`.
    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        rope: &RotaryEmbedding<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 3> {
        let h = x.clone() + self.attention.forward(self.attention_norm.forward(x), rope, cache);
        h.clone() + self.feed_forward.forward(self.ffn_norm.forward(h))
    }
}
