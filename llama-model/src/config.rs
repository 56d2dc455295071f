//! What a LLaMA is: its sizes (paper, table 2), how many parameters that makes and what a token costs.

use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Architecture of a LLaMA model. The fields beyond the paper's (grouped-query heads, RoPE base and scaling, tied
/// head) are what LLaMA 2 and 3 changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LlamaConfig {
    /// Width of the residual stream (`dim` in the released code).
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; equal to `n_heads` in the paper, fewer with grouped-query attention.
    pub n_kv_heads: usize,
    /// Width of one head; `d_model / n_heads` in the paper.
    pub head_dim: usize,
    /// Inner width of the feed-forward network.
    pub d_ff: usize,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Longest sequence: the length of the rotary tables.
    pub max_seq_len: usize,
    /// Epsilon of RMSNorm. The paper's checkpoints use 1e-6, LLaMA 2 and 3 use 1e-5.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for contexts longer than those trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output head is the embedding matrix.
    #[serde(default)]
    pub tied_head: bool,
}

/// How rotary frequencies are stretched (names and formulas of the released configurations).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above `original_max_seq_len / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_seq_len / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original training.
        original_max_seq_len: usize,
    },
}

/// Floating-point operations for one token at a given context length; a multiply-add counts as two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlopCount {
    /// Products with weight matrices: `2 · N_matmul`.
    pub linear: f64,
    /// Causal attention, each unmasked score once: `2 · n_layers · seq_len · n_heads · head_dim`.
    pub attention: f64,
}

impl FlopCount {
    /// Forward pass.
    pub fn forward(&self) -> f64 {
        self.linear + self.attention
    }

    /// Forward and backward pass: the backward of a product is two products, so three times the forward. What is
    /// recomputed in the backward is not counted.
    pub fn training(&self) -> f64 {
        3.0 * self.forward()
    }
}

impl LlamaConfig {
    /// LLaMA-7B: 6,738,415,616 parameters.
    pub fn llama_7b() -> Self {
        Self::paper(4096, 32, 32)
    }

    /// LLaMA-13B: 13,015,864,320 parameters.
    pub fn llama_13b() -> Self {
        Self::paper(5120, 40, 40)
    }

    /// LLaMA-33B: 32,528,943,616 parameters.
    pub fn llama_33b() -> Self {
        Self::paper(6656, 60, 52)
    }

    /// LLaMA-65B: 65,285,660,672 parameters.
    pub fn llama_65b() -> Self {
        Self::paper(8192, 80, 64)
    }

    /// A model that trains in minutes on two CPU cores: 4 layers of width 192, context 256, tied head; 2.2M parameters
    /// at a vocabulary of 2,048.
    pub fn tiny(vocab_size: usize) -> Self {
        Self { max_seq_len: 256, tied_head: true, vocab_size, ..Self::paper(192, 4, 3) }
    }

    /// 15M parameters at a vocabulary of 32,000 (the shape of the `stories15M` checkpoint).
    pub fn small_15m() -> Self {
        Self { max_seq_len: 256, tied_head: true, ..Self::paper(288, 6, 6) }
    }

    /// 58M parameters.
    pub fn small_60m() -> Self {
        Self { max_seq_len: 512, ..Self::paper(512, 8, 8) }.with_d_ff(1376)
    }

    /// 110M parameters at a vocabulary of 32,000 (the shape of the `stories110M` checkpoint).
    pub fn small_110m() -> Self {
        Self { max_seq_len: 1024, tied_head: true, ..Self::paper(768, 12, 12) }
    }

    /// The presets by name.
    pub fn presets() -> Vec<(&'static str, LlamaConfig)> {
        vec![
            ("tiny", Self::tiny(2048)),
            ("15m", Self::small_15m()),
            ("60m", Self::small_60m()),
            ("110m", Self::small_110m()),
            ("7b", Self::llama_7b()),
            ("13b", Self::llama_13b()),
            ("33b", Self::llama_33b()),
            ("65b", Self::llama_65b()),
        ]
    }

    /// The preset called `name`.
    ///
    /// # Errors
    /// [`ModelError::Config`] lists the names if there is none.
    pub fn preset(name: &str) -> Result<Self, ModelError> {
        let presets = Self::presets();
        presets.iter().find(|(n, _)| *n == name).map(|(_, config)| config.clone()).ok_or_else(|| ModelError::Config {
            field: "preset",
            reason: format!(
                "`{name}` is unknown; choose one of {}",
                presets.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ")
            ),
        })
    }

    /// Table 2 of the paper: everything follows from width, depth and heads.
    fn paper(d_model: usize, n_layers: usize, n_heads: usize) -> Self {
        Self {
            d_model,
            n_layers,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            d_ff: Self::paper_d_ff(d_model, 256),
            vocab_size: 32_000,
            max_seq_len: 2048,
            norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tied_head: false,
        }
    }

    /// Inner width of SwiGLU: two thirds of `4 · d_model`, truncated, then rounded up to `multiple_of`.
    pub fn paper_d_ff(d_model: usize, multiple_of: usize) -> usize {
        (8 * d_model / 3).next_multiple_of(multiple_of)
    }

    fn with_d_ff(self, d_ff: usize) -> Self {
        Self { d_ff, ..self }
    }

    /// Checks that the model can be divided among `count` devices; see [`shard`](crate::shard).
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that is no multiple of `count`.
    pub fn check_shards(&self, count: usize) -> Result<(), ModelError> {
        for (field, value) in [("n_kv_heads", self.n_kv_heads), ("n_heads", self.n_heads), ("d_ff", self.d_ff)] {
            if !value.is_multiple_of(count) {
                let reason = format!("is {value}, which {count} devices cannot divide alike");
                return Err(ModelError::Config { field, reason });
            }
        }
        Ok(())
    }

    /// Checks that the fields describe a model.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that does not fit.
    pub fn validate(&self) -> Result<(), ModelError> {
        let fail = |field, reason: String| Err(ModelError::Config { field, reason });
        /// More than any model has, and few enough that no product of sizes overflows.
        const MOST: usize = 1 << 24;
        for (field, value, most) in [
            ("d_model", self.d_model, MOST),
            ("n_layers", self.n_layers, 1 << 12),
            ("n_heads", self.n_heads, MOST),
            ("n_kv_heads", self.n_kv_heads, MOST),
            ("head_dim", self.head_dim, MOST),
            ("d_ff", self.d_ff, MOST),
            ("vocab_size", self.vocab_size, MOST),
            ("max_seq_len", self.max_seq_len, MOST),
            ("n_heads · head_dim", self.n_heads.saturating_mul(self.head_dim), MOST),
        ] {
            if value == 0 {
                return fail(field, "must be at least 1".into());
            }
            if value > most {
                return fail(field, format!("must be at most {most}, but is {value}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let (heads, kv) = (self.n_heads, self.n_kv_heads);
            return fail("n_kv_heads", format!("must divide n_heads, but {heads} is not a multiple of {kv}"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(
                "head_dim",
                format!("must be even, since rotary embeddings turn pairs, but is {}", self.head_dim),
            );
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            return fail("norm_eps", format!("must be positive, but is {}", self.norm_eps));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return fail("rope_theta", format!("must be above 1, but is {}", self.rope_theta));
        }
        match self.rope_scaling {
            Some(RopeScaling::Linear { factor }) if factor.is_nan() || factor < 1.0 => {
                fail("rope_scaling", format!("factor must be at least 1, but is {factor}"))
            }
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. })
                if !(factor >= 1.0 && low_freq_factor > 0.0 && high_freq_factor > low_freq_factor) =>
            {
                fail("rope_scaling", "needs factor >= 1 and 0 < low_freq_factor < high_freq_factor".into())
            }
            _ => Ok(()),
        }
    }

    /// Total width of the query heads.
    pub fn d_q(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Total width of the key (or value) heads.
    pub fn d_kv(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Number of parameters, a tied head counted once.
    pub fn num_params(&self) -> u64 {
        let norms = (2 * self.n_layers + 1) * self.d_model;
        let embeddings = self.vocab_size * self.d_model * if self.tied_head { 1 } else { 2 };
        (self.n_layers * self.block_matmul_params() + norms + embeddings) as u64
    }

    /// Name and shape of every parameter, by the names of the released checkpoints, in the model's order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d_model, d_ff) = (self.d_model, self.d_ff);
        let mut parameters = vec![("tok_embeddings.weight".to_string(), vec![self.vocab_size, d_model])];
        for layer in 0..self.n_layers {
            for (name, dims) in [
                ("attention_norm", vec![d_model]),
                ("attention.wq", vec![self.d_q(), d_model]),
                ("attention.wk", vec![self.d_kv(), d_model]),
                ("attention.wv", vec![self.d_kv(), d_model]),
                ("attention.wo", vec![d_model, self.d_q()]),
                ("ffn_norm", vec![d_model]),
                ("feed_forward.w1", vec![d_ff, d_model]),
                ("feed_forward.w2", vec![d_model, d_ff]),
                ("feed_forward.w3", vec![d_ff, d_model]),
            ] {
                parameters.push((format!("layers.{layer}.{name}.weight"), dims));
            }
        }
        parameters.push(("norm.weight".into(), vec![d_model]));
        if !self.tied_head {
            parameters.push(("output.weight".into(), vec![self.vocab_size, d_model]));
        }
        parameters
    }

    /// Parameters that take part in a matrix product for every token: `N_matmul`, all matrices without the embedding
    /// lookup.
    pub fn num_matmul_params(&self) -> u64 {
        (self.n_layers * self.block_matmul_params() + self.vocab_size * self.d_model) as u64
    }

    /// Floating-point operations a token costs in a sequence of `seq_len`, averaged over its positions.
    pub fn flops_per_token(&self, seq_len: usize) -> FlopCount {
        FlopCount {
            linear: 2.0 * self.num_matmul_params() as f64,
            attention: 2.0 * (self.n_layers * seq_len * self.d_q()) as f64,
        }
    }

    fn block_matmul_params(&self) -> usize {
        self.d_model * (2 * self.d_q() + 2 * self.d_kv() + 3 * self.d_ff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_papers_parameter_counts() {
        assert_eq!(LlamaConfig::llama_7b().num_params(), 6_738_415_616);
        assert_eq!(LlamaConfig::llama_13b().num_params(), 13_015_864_320);
        assert_eq!(LlamaConfig::llama_33b().num_params(), 32_528_943_616);
        assert_eq!(LlamaConfig::llama_65b().num_params(), 65_285_660_672);
    }

    #[test]
    fn presets_have_the_papers_feed_forward_widths() {
        for (config, d_ff) in [
            (LlamaConfig::llama_7b(), 11_008),
            (LlamaConfig::llama_13b(), 13_824),
            (LlamaConfig::llama_33b(), 17_920),
            (LlamaConfig::llama_65b(), 22_016),
        ] {
            assert_eq!(config.d_ff, d_ff);
            assert_eq!(config.head_dim, 128);
        }
    }

    #[test]
    fn every_preset_is_valid_and_found_by_name() {
        for (name, config) in LlamaConfig::presets() {
            config.validate().unwrap();
            assert_eq!(LlamaConfig::preset(name).unwrap(), config);
        }
        let error = LlamaConfig::preset("8b").unwrap_err().to_string();
        assert!(error.contains("8b") && error.contains("65b"), "{error}");
    }

    #[test]
    fn flops_follow_the_documented_formula() {
        let config = LlamaConfig::llama_7b();
        let flops = config.flops_per_token(2048);
        // 6 N plus 6 L d T: the causal half of PaLM's 12 L d T.
        let n = (config.num_params() - (32_000 * 4096) - 65 * 4096) as f64;
        assert_eq!(flops.training(), 6.0 * n + 6.0 * 32.0 * 4096.0 * 2048.0);
    }

    #[test]
    fn bad_configurations_name_the_field() {
        let tiny = LlamaConfig::tiny(64);
        for (config, field) in [
            (LlamaConfig { n_kv_heads: 2, ..tiny.clone() }, "n_kv_heads"),
            (LlamaConfig { head_dim: 7, ..tiny.clone() }, "head_dim"),
            (LlamaConfig { vocab_size: 0, ..tiny.clone() }, "vocab_size"),
            (LlamaConfig { norm_eps: 0.0, ..tiny.clone() }, "norm_eps"),
            (LlamaConfig { rope_theta: f64::NAN, ..tiny }, "rope_theta"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        let mut json = serde_json::to_value(LlamaConfig::tiny(64)).unwrap();
        json["d_modle"] = 3.into();
        let error = serde_json::from_value::<LlamaConfig>(json).unwrap_err().to_string();
        assert!(error.contains("d_modle"), "{error}");
    }
}
