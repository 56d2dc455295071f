//! A GGUF file as a LLaMA: its metadata as sizes, its tensors by the names of the released code.

use std::path::Path;

use burn::tensor::TensorData;

use super::{Entry, GgufFile, Kind, ROPE_FACTORS, Value, file_name};
use crate::backend::Bits;
use crate::backend::rounding::BlockData;
use crate::copy::floats;
use crate::formats::{self, Rotary, TensorInfo, Weights, is_rotary, reorder, source_row, stray, wrong_shape};
use crate::{LlamaConfig, ModelError, RopeScaling, WeightFormat};

/// A GGUF file as a checkpoint.
pub(in crate::formats) struct Reader {
    file: GgufFile,
    config: LlamaConfig,
}

impl Reader {
    pub(in crate::formats) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = GgufFile::open(path)?;
        let config = config(&file).map_err(|reason| ModelError::format(path, reason))?;
        Ok(Self { file, config })
    }
}

fn config(file: &GgufFile) -> Result<LlamaConfig, String> {
    match file.get("general.architecture").and_then(Value::as_str) {
        Some("llama") => {}
        other => return Err(format!("`general.architecture` is {other:?}, only \"llama\" is read")),
    }
    let get = |key: &str| file.get(&format!("llama.{key}"));
    let missing = |key: &str| format!("`llama.{key}` is missing or not a number");
    let size = |key: &str| get(key).and_then(Value::as_usize).ok_or_else(|| missing(key));
    let size_or = |key: &str, default: usize| get(key).map_or(Ok(default), |_| size(key));
    let number_or = |key: &str, default| get(key).map_or(Ok(default), |v| v.as_f64().ok_or_else(|| missing(key)));
    let (d_model, n_heads) = (size("embedding_length")?, size("attention.head_count")?);
    let embeddings = file.tensors.get("token_embd.weight").ok_or("tensor `token_embd.weight` is missing")?;
    let head_dim = match get("attention.key_length") {
        Some(_) => size("attention.key_length")?,
        None => size_or("rope.dimension_count", d_model / n_heads.max(1))?,
    };
    let mut config = LlamaConfig {
        d_model,
        n_layers: size("block_count")?,
        n_heads,
        n_kv_heads: size_or("attention.head_count_kv", n_heads)?,
        head_dim,
        d_ff: size("feed_forward_length")?,
        vocab_size: embeddings.dims[0],
        max_seq_len: size_or("context_length", 2048)?,
        norm_eps: number_or("attention.layer_norm_rms_epsilon", 1e-5)?,
        rope_theta: number_or("rope.freq_base", 10_000.0)?,
        rope_scaling: None,
        tied_head: !file.tensors.contains_key("output.weight"),
    };
    if size_or("expert_count", 0)? > 0 {
        return Err("a mixture of experts is not LLaMA's architecture".into());
    }
    let factor = number_or("rope.scaling.factor", 1.0)?;
    config.rope_scaling = match get("rope.scaling.type").and_then(Value::as_str) {
        None | Some("none") => match number_or("rope.scale_linear", 1.0)? {
            1.0 => None,
            factor => Some(RopeScaling::Linear { factor }),
        },
        Some("linear") => Some(RopeScaling::Linear { factor }),
        Some(other) => return Err(format!("rope scaling \"{other}\" is unknown; linear and LLaMA 3's are read")),
    };
    if let Some(entry) = file.tensors.get(ROPE_FACTORS) {
        config.rope_scaling = Some(llama3_scaling(&floats(file.data(entry)), &config)?);
    }
    Ok(config)
}

/// The parameters of LLaMA 3's scaling whose divisors these are.
fn llama3_scaling(divisors: &[f32], config: &LlamaConfig) -> Result<RopeScaling, String> {
    // What the released models have: 3.1 and 3.2 differ in the factor only.
    let scaling = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_seq_len: 8192,
    };
    let plain = crate::modules::rotary_frequencies(config);
    let largest = divisors.iter().fold(1.0f32, |max, x| max.max(*x));
    let candidate = scaling(f64::from(largest));
    let scaled =
        crate::modules::rotary_frequencies(&LlamaConfig { rope_scaling: Some(candidate.clone()), ..config.clone() });
    let fits = divisors.len() == plain.len()
        && plain
            .iter()
            .zip(&scaled)
            .zip(divisors)
            .all(|((plain, scaled), divisor)| (plain / scaled / f64::from(*divisor) - 1.0).abs() < 1e-4);
    if fits { Ok(candidate) } else { Err(format!("`{ROPE_FACTORS}` is not the scaling of a released LLaMA 3")) }
}

impl Reader {
    /// Where the weight at `path` is, which has this shape.
    fn entry(&self, path: &str, dims: &[usize]) -> Result<&Entry, ModelError> {
        let name = file_name(path).unwrap_or_else(|| path.into());
        let missing = || ModelError::MissingTensor { path: self.file.path.clone(), name: name.clone() };
        let entry = self.file.tensors.get(&name).ok_or_else(missing)?;
        if entry.dims != dims {
            return Err(wrong_shape(&self.file.path, &name, dims, &entry.dims));
        }
        Ok(entry)
    }
}

impl Weights for Reader {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        Ok(reorder(path, &self.config, self.file.data(self.entry(path, dims)?), Rotary::ToHalves))
    }
}

impl formats::Reader for Reader {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, entry): (&String, &Entry)| TensorInfo {
            name: name.clone(),
            dims: entry.dims.clone(),
            dtype: entry.kind_name.into(),
            bytes: entry.range.len() as u64,
        };
        self.file.tensors.iter().map(info).collect()
    }

    fn stored(&self, path: &str) -> WeightFormat {
        let entry = file_name(path).and_then(|name| self.file.tensors.get(&name));
        entry.map_or(WeightFormat::F32, |entry| match entry.kind {
            Kind::Float(dtype) => WeightFormat::of_float(dtype),
            Kind::Blocks(quant) => quant.stored(),
        })
    }

    fn blocks(&self, path: &str, dims: [usize; 2], bits: Bits) -> Result<BlockData, ModelError> {
        let entry = self.entry(path, &dims)?;
        let (bits, rotary) = (entry.kind.bits(bits), is_rotary(path));
        Ok(self.file.map.read(entry.range.clone(), |bytes| {
            let row_bytes = bytes.len() / dims[0].max(1);
            BlockData::by_rows(bits, dims, |row, values, scales| {
                let from = if rotary { source_row(row, self.config.head_dim, Rotary::ToHalves) } else { row };
                entry.kind.write_blocks(bits, &bytes[from * row_bytes..][..row_bytes], values, scales);
            })
        }))
    }

    fn unexpected(&self) -> Option<String> {
        stray(&self.config, self.file.tensors.keys(), file_name, |name| name == ROPE_FACTORS)
    }
}
