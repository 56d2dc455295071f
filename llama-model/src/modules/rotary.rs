//! Rotary position embeddings (paper, section 2.2; Su et al. 2021). The pair `(x[i], x[i + head_dim / 2])` of a head at
//! position `p` is turned by the angle `p · θ^(-2i / head_dim)`.
//!
//! The released code pairs neighbours, `(x[2i], x[2i + 1])`. Both are the same map up to a fixed permutation of the
//! rows of `wq` and `wk`; this one, which Hugging Face files use, lets a kernel read both halves in order.

use std::f64::consts::PI;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};

use crate::backend::{LlamaBackend, ops};
use crate::{LlamaConfig, RopeScaling};

/// Tables of cosines and sines for every position up to `max_seq_len`. Constants: not trained, not saved.
#[derive(Module, Debug)]
pub struct RotaryEmbedding<B: LlamaBackend> {
    /// `[max_seq_len, head_dim / 2]`
    pub cos: Tensor<B, 2>,
    /// `[max_seq_len, head_dim / 2]`
    pub sin: Tensor<B, 2>,
}

impl<B: LlamaBackend> RotaryEmbedding<B> {
    /// The tables of `config`, computed in f64 and rounded once.
    pub fn new(config: &LlamaConfig, device: &B::Device) -> Self {
        let frequencies = rotary_frequencies(config);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..config.max_seq_len)
                .flat_map(|position| frequencies.iter().map(move |w| f(position as f64 * w) as f32))
                .collect();
            Tensor::from_data(TensorData::new(values, [config.max_seq_len, frequencies.len()]), device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Turns `x`, whose first position is `start`.
    ///
    /// # Shapes
    /// `x [batch, seq_len, heads, head_dim]`, result as `x`.
    ///
    /// # Panics
    /// If `start + seq_len` is above `max_seq_len`.
    pub fn forward(&self, x: Tensor<B, 4>, start: usize) -> Tensor<B, 4> {
        let [cos, sin] = self.tables(start, x.dims()[1]);
        ops::rotary(x, cos, sin)
    }

    /// Cosines and sines of the positions from `start` on, `[seq_len, head_dim / 2]`: the same for every layer.
    pub fn tables(&self, start: usize, seq_len: usize) -> [Tensor<B, 2>; 2] {
        [&self.cos, &self.sin].map(|table| table.clone().narrow(0, start, seq_len))
    }
}

/// Angle per position of each pair, `[head_dim / 2]`, with the configured scaling applied.
pub(crate) fn rotary_frequencies(config: &LlamaConfig) -> Vec<f64> {
    let half = config.head_dim / 2;
    let plain = (0..half).map(|i| config.rope_theta.powf(-2.0 * i as f64 / config.head_dim as f64));
    match config.rope_scaling {
        None => plain.collect(),
        Some(RopeScaling::Linear { factor }) => plain.map(|w| w / factor).collect(),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq_len }) => plain
            .map(|w| {
                // How many times the wave fits into the original context, from "stretch" (0) to "keep" (1).
                let turns = original_max_seq_len as f64 * w / (2.0 * PI);
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                keep * w + (1.0 - keep) * w / factor
            })
            .collect(),
    }
}
