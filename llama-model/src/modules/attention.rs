//! Multi-head causal self-attention with rotary positions (paper, section 2.2), grouped-query where `n_kv_heads` is
//! below `n_heads` (LLaMA 2 and 3).

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::{LayerCache, Linear};
use crate::backend::{LlamaBackend, ops};
use crate::init::Init;
use crate::{LlamaConfig, Precision};

/// Attention of one block.
#[derive(Module, Debug)]
pub struct Attention<B: LlamaBackend> {
    /// `d_model` to `n_heads · head_dim`.
    pub wq: Linear<B>,
    /// `d_model` to `n_kv_heads · head_dim`.
    pub wk: Linear<B>,
    /// `d_model` to `n_kv_heads · head_dim`.
    pub wv: Linear<B>,
    /// `n_heads · head_dim` to `d_model`.
    pub wo: Linear<B>,
    /// Width of one head.
    pub head_dim: usize,
}

impl<B: LlamaBackend> Attention<B> {
    pub(crate) fn new(config: &LlamaConfig, init: &Init<B>) -> Self {
        let std = init.std();
        Self {
            wq: Linear::new(config.d_model, config.d_q(), std, &init.at("wq")),
            wk: Linear::new(config.d_model, config.d_kv(), std, &init.at("wk")),
            wv: Linear::new(config.d_model, config.d_kv(), std, &init.at("wv")),
            wo: Linear::new(config.d_q(), config.d_model, init.residual_std(), &init.at("wo")),
            head_dim: config.head_dim,
        }
    }

    /// With a cache, `x` continues the sequences in it; without one and with `starts`, tokens attend inside their document only. `cos` and `sin` are the rotary embedding's for its positions.
    ///
    /// # Shapes
    /// `x [batch, seq_len, d_model]`, `cos` and `sin` `[seq_len, head_dim / 2]`, `starts [batch, seq_len]`, result as `x`.
    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        [cos, sin]: [Tensor<B, 2>; 2],
        starts: Option<Tensor<B, 2, Int>>,
        cache: Option<&mut LayerCache<B>>,
        precision: Precision,
    ) -> Tensor<B, 3> {
        let [batch, seq_len, _] = x.dims();
        let heads = |x: Tensor<B, 3>| {
            let width = x.dims()[2];
            x.reshape([batch, seq_len, width / self.head_dim, self.head_dim])
        };

        let [q, k, v] = Linear::forward_all([&self.wq, &self.wk, &self.wv], x, precision).map(heads);
        let (q, k) = (ops::rotary(q, cos.clone(), sin.clone()), ops::rotary(k, cos, sin));
        let out = match cache {
            Some(cache) => cache.attend([q, k, v], precision),
            None => ops::causal_attention(q, k, v, starts, precision),
        };
        self.wo.forward(out.flatten::<3>(2, 3), precision)
    }
}
