//! GGUF files, version 3, from any checkpoint.

use std::io::Write;
use std::path::Path;

use burn::tensor::TensorData;

use super::{ALIGNMENT, MAGIC, ROPE_FACTORS, Value, file_name};
use crate::formats::dtype::FileType;
use crate::formats::quants::BLOCK;
use crate::formats::{Rotary, Weights, reorder};
use crate::{LlamaConfig, ModelError, RopeScaling, weights};

/// Writes metadata values.
struct Writer(Vec<u8>);

impl Writer {
    fn text(&mut self, text: &str) {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn kind(value: &Value) -> u32 {
        match value {
            Value::Unsigned(n) if u32::try_from(*n).is_ok() => 4,
            Value::Unsigned(_) => 10,
            Value::Signed(_) => 5,
            Value::Float(_) => 6,
            Value::Bool(_) => 7,
            Value::Text(_) => 8,
            Value::Array(_) => 9,
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Unsigned(n) => match u32::try_from(*n) {
                Ok(n) => self.0.extend(n.to_le_bytes()),
                Err(_) => self.0.extend(n.to_le_bytes()),
            },
            Value::Signed(n) => self.0.extend((*n as i32).to_le_bytes()),
            Value::Float(x) => self.0.extend((*x as f32).to_le_bytes()),
            Value::Bool(b) => self.0.push(u8::from(*b)),
            Value::Text(text) => self.text(text),
            Value::Array(values) => {
                self.0.extend(values.first().map_or(4, Self::kind).to_le_bytes());
                self.0.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| self.value(value));
            }
        }
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

pub(in crate::formats) fn save(
    source: &dyn Weights,
    config: &LlamaConfig,
    path: &Path,
    dtype: FileType,
    extra: &[(String, Value)],
) -> Result<(), ModelError> {
    let text = |text: &str| Value::Text(text.into());
    let size = |n: usize| Value::Unsigned(n as u64);
    let mut metadata = vec![
        ("general.architecture".to_string(), text("llama")),
        ("general.alignment".into(), size(ALIGNMENT)),
        // The type of most tensors, by the numbers of llama.cpp's `llama_ftype`.
        (
            "general.file_type".into(),
            size(match dtype {
                FileType::F32 => 0,
                FileType::F16 => 1,
                FileType::Q4_0 => 2,
                FileType::Q8_0 => 7,
                FileType::Bf16 => 32,
            }),
        ),
    ];
    for (key, value) in [
        ("vocab_size", size(config.vocab_size)),
        ("context_length", size(config.max_seq_len)),
        ("embedding_length", size(config.d_model)),
        ("block_count", size(config.n_layers)),
        ("feed_forward_length", size(config.d_ff)),
        ("rope.dimension_count", size(config.head_dim)),
        ("rope.freq_base", Value::Float(config.rope_theta)),
        ("attention.head_count", size(config.n_heads)),
        ("attention.head_count_kv", size(config.n_kv_heads)),
        ("attention.key_length", size(config.head_dim)),
        ("attention.value_length", size(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::Float(config.norm_eps)),
    ] {
        metadata.push((format!("llama.{key}"), value));
    }
    if let Some(RopeScaling::Linear { factor }) = config.rope_scaling {
        metadata.push(("llama.rope.scaling.type".into(), text("linear")));
        metadata.push(("llama.rope.scaling.factor".into(), Value::Float(factor)));
    }
    metadata.extend(extra.iter().cloned());

    // Vectors stay f32, and rows that are not whole blocks too.
    let of = |dims: &[usize]| {
        let blocks = dims.len() > 1 && (dtype.float().is_some() || dims[1].is_multiple_of(BLOCK));
        if blocks { dtype } else { FileType::F32 }
    };
    let divisors = match config.rope_scaling {
        Some(RopeScaling::Llama3 { .. }) => {
            let plain = crate::modules::rotary_frequencies(&LlamaConfig { rope_scaling: None, ..config.clone() });
            let scaled = crate::modules::rotary_frequencies(config);
            plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect()
        }
        _ => Vec::new(),
    };
    let mut tensors: Vec<(Option<String>, String, Vec<usize>)> = Vec::new();
    if !divisors.is_empty() {
        tensors.push((None, ROPE_FACTORS.into(), vec![divisors.len()]));
    }
    for (path, dims) in config.parameters() {
        let name = file_name(&path).unwrap_or_else(|| path.clone());
        tensors.push((Some(path), name, dims));
    }

    let mut header = Writer(MAGIC.to_vec());
    header.0.extend(3u32.to_le_bytes());
    header.0.extend((tensors.len() as u64).to_le_bytes());
    header.0.extend((metadata.len() as u64).to_le_bytes());
    for (name, value) in &metadata {
        header.text(name);
        header.0.extend(Writer::kind(value).to_le_bytes());
        header.value(value);
    }
    let mut offset = 0usize;
    for (_, name, dims) in &tensors {
        header.text(name);
        header.0.extend((dims.len() as u32).to_le_bytes());
        dims.iter().rev().for_each(|dim| header.0.extend((*dim as u64).to_le_bytes()));
        let number: u32 = match of(dims) {
            FileType::F32 => 0,
            FileType::F16 => 1,
            FileType::Q4_0 => 2,
            FileType::Q8_0 => 8,
            FileType::Bf16 => 30,
        };
        header.0.extend(number.to_le_bytes());
        header.0.extend((offset as u64).to_le_bytes());
        offset = (offset + of(dims).bytes(dims.iter().product())).next_multiple_of(ALIGNMENT);
    }
    header.pad();
    weights::replace(path, |file| {
        let mut out = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
        let io = |error| ModelError::io(path, error);
        out.write_all(&header.0).map_err(io)?;
        for (weight, _, dims) in &tensors {
            let data = match weight {
                Some(weight) => reorder(weight, config, source.weight(weight, dims)?, Rotary::ToPairs),
                None => TensorData::new(divisors.clone(), dims.clone()),
            };
            of(dims).write(data, &mut out).map_err(io)?;
            let len = of(dims).bytes(dims.iter().product());
            out.write_all(&[0; ALIGNMENT][..len.next_multiple_of(ALIGNMENT) - len]).map_err(io)?;
        }
        out.flush().map_err(io)
    })
}
