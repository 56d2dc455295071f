//! llama2.c's `.bin` files. Version 0 has no magic number: seven integers, then f32. Versions 1 (f32) and 2 (8 bits in
//! groups that share an f32 scale) begin with `ak42` and a header of 256 bytes.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};

use super::dtype::FileType;
use super::{Reader, Rotary, TensorInfo, Weights, reorder, wrong_shape};
use crate::copy::{concat, floats};
use crate::file_map::FileMap;
use crate::{LlamaConfig, ModelError, WeightFormat, weights};

/// `ak42`, little-endian.
const MAGIC: u32 = 0x616b_3432;
const HEADER: usize = 256;
const LEGACY_HEADER: usize = 28;
/// llama2.c's models are trained with it; the files do not say.
const NORM_EPS: f64 = 1e-5;

pub(super) struct File {
    path: PathBuf,
    map: FileMap,
    config: LlamaConfig,
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    dims: Vec<usize>,
    start: usize,
    /// Weights that share a scale; none in f32.
    group: Option<usize>,
}

impl Entry {
    fn len(&self) -> usize {
        self.dims.iter().product()
    }

    fn bytes(&self) -> usize {
        self.group.map_or(4 * self.len(), |group| self.len() + self.len() / group * 4)
    }
}

fn int(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Whether it may be one. A file of version 0 is known by the sizes it begins with alone.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    header(bytes).is_ok()
}

/// Version, configuration, group size, and where the weights begin.
fn header(bytes: &[u8]) -> Result<(u32, LlamaConfig, Option<usize>, usize), String> {
    let at = |at| int(bytes, at).ok_or("the file ends inside its header");
    let legacy = at(0)? as u32 != MAGIC;
    let (version, first) = if legacy { (0, 0) } else { (at(4)? as u32, 8) };
    if version > 2 {
        return Err(format!("version {version}; 0, 1 and 2 are read"));
    }
    let mut sizes = [0i32; 7];
    for (i, size) in sizes.iter_mut().enumerate() {
        *size = at(first + 4 * i)?;
    }
    let shared = if legacy { sizes[5] > 0 } else { bytes.get(36) == Some(&1) };
    sizes[5] = sizes[5].checked_abs().unwrap_or(0);
    // What a model may have at most keeps products of sizes from overflowing.
    if sizes.iter().any(|size| !(1..=1 << 24).contains(size)) {
        return Err(format!("not llama2.c's header: sizes {sizes:?}"));
    }
    let [d_model, d_ff, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len] = sizes.map(|size| size as usize);
    if !d_model.is_multiple_of(n_heads) || !n_heads.is_multiple_of(n_kv_heads) || !(d_model / n_heads).is_multiple_of(2)
    {
        return Err(format!("not llama2.c's header: width {d_model}, {n_heads} heads, {n_kv_heads} key heads"));
    }
    let group = match version {
        2 => Some(int(bytes, 37).filter(|group| *group > 0).ok_or("the group size is not positive")? as usize),
        _ => None,
    };
    let config = LlamaConfig {
        d_model,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim: d_model / n_heads,
        d_ff,
        vocab_size,
        max_seq_len,
        norm_eps: NORM_EPS,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tied_head: shared,
    };
    config.validate().map_err(|error| error.to_string())?;
    Ok((version, config, group, if legacy { LEGACY_HEADER } else { HEADER }))
}

/// Paths in the order that a version has them: one after the other, each for all layers.
fn order(version: u32, config: &LlamaConfig) -> Vec<String> {
    let each = |part: &str| (0..config.n_layers).map(|layer| format!("layers.{layer}.{part}.weight")).collect();
    let one = |name: &str| vec![format!("{name}.weight")];
    let attention = ["wq", "wk", "wv", "wo"].map(|part| each(&format!("attention.{part}")));
    let feed_forward = ["w1", "w2", "w3"].map(|part| each(&format!("feed_forward.{part}")));
    let (attention_norm, ffn_norm): (Vec<String>, Vec<String>) = (each("attention_norm"), each("ffn_norm"));
    let parts: Vec<Vec<String>> = if version == 0 {
        [one("tok_embeddings"), attention_norm]
            .into_iter()
            .chain(attention)
            .chain([ffn_norm])
            .chain(feed_forward)
            .chain([one("norm")])
            .collect()
    } else {
        [attention_norm, ffn_norm, one("norm"), one("tok_embeddings")]
            .into_iter()
            .chain(attention)
            .chain(feed_forward)
            .collect()
    };
    parts.into_iter().flatten().collect()
}

impl File {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let map = FileMap::open(path)?;
        let read = || -> Result<_, String> {
            let (version, config, group, start) = header(&map)?;
            let shapes: BTreeMap<_, _> = config.parameters().into_iter().collect();
            let mut entries = BTreeMap::new();
            let mut at = start;
            let mut add = |name: String, at: &mut usize| -> Result<(), String> {
                let dims = shapes[&name].clone();
                let group = group.filter(|_| dims.len() > 1);
                let entry = Entry { dims, start: *at, group };
                if group.is_some_and(|group| !entry.len().is_multiple_of(group)) {
                    return Err(format!("`{name}` is not whole groups of {group:?}"));
                }
                *at += entry.bytes();
                if *at > map.len() {
                    return Err(format!("the file ends before the end of `{name}`; is the download complete?"));
                }
                entries.insert(name, entry);
                Ok(())
            };
            for name in order(version, &config) {
                add(name, &mut at)?;
            }
            if version == 0 {
                // Tables of cosines and sines, which follow from the sizes.
                at += 4 * config.max_seq_len * config.head_dim;
            }
            if !config.tied_head {
                add("output.weight".into(), &mut at)?;
            }
            if at != map.len() {
                return Err(format!("the file has {} bytes, a model of these sizes {at}", map.len()));
            }
            Ok((config, entries))
        };
        let (config, entries) = read().map_err(|reason| ModelError::format(path, reason))?;
        Ok(Self { path: path.into(), map, config, entries })
    }
}

impl Weights for File {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let missing = || ModelError::MissingTensor { path: self.path.clone(), name: path.into() };
        let entry = self.entries.get(path).ok_or_else(missing)?;
        if entry.dims != dims {
            return Err(wrong_shape(&self.path, path, dims, &entry.dims));
        }
        let data = self.map.read(entry.start..entry.start + entry.bytes(), |bytes| match entry.group {
            None => concat(DType::F32, [bytes], &entry.dims),
            Some(group) => {
                let (values, scales) = bytes.split_at(entry.len());
                let scales = bytemuck::pod_collect_to_vec::<u8, f32>(scales);
                let groups = values.chunks_exact(group).zip(scales);
                let values = groups.flat_map(|(values, scale)| values.iter().map(move |q| f32::from(*q as i8) * scale));
                TensorData::new(values.collect::<Vec<f32>>(), entry.dims.clone())
            }
        });
        Ok(reorder(path, &self.config, data, Rotary::ToHalves))
    }
}

impl Reader for File {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, entry): (&String, &Entry)| TensorInfo {
            name: name.clone(),
            dims: entry.dims.clone(),
            dtype: entry.group.map_or_else(|| "F32".into(), |group| format!("Q8 in groups of {group}")),
            bytes: entry.bytes() as u64,
        };
        self.entries.iter().map(info).collect()
    }

    fn stored(&self, path: &str) -> WeightFormat {
        let group = self.entries.get(path).and_then(|entry| entry.group);
        group.map_or(WeightFormat::F32, |_| WeightFormat::Q8)
    }

    fn unexpected(&self) -> Option<String> {
        None
    }
}

/// Writes version 0, which llama2.c's `run` takes.
pub(super) fn save(source: &dyn Weights, config: &LlamaConfig, path: &Path, dtype: FileType) -> Result<(), ModelError> {
    let refuse = |reason: &str| Err(ModelError::format(path, format!("llama2.c's files {reason}")));
    if dtype != FileType::F32 {
        return refuse("of version 0 are f32");
    }
    if config.head_dim * config.n_heads != config.d_model {
        return refuse("have heads that add up to the model's width");
    }
    if config.rope_theta != 10_000.0 || config.rope_scaling.is_some() {
        return refuse("have rotary embeddings with a base of 10,000 and no scaling");
    }
    let vocab = config.vocab_size as i32 * if config.tied_head { 1 } else { -1 };
    let sizes = [config.d_model, config.d_ff, config.n_layers, config.n_heads, config.n_kv_heads];
    let shapes: BTreeMap<_, _> = config.parameters().into_iter().collect();
    weights::replace(path, |file| {
        let io = |error| ModelError::io(path, error);
        let mut out = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
        let mut put = |values: &[f32]| out.write_all(bytemuck::cast_slice(values)).map_err(io);
        let header: Vec<i32> =
            sizes.map(|size| size as i32).into_iter().chain([vocab, config.max_seq_len as i32]).collect();
        put(bytemuck::cast_slice(&header))?;
        let mut weight = |name: &str| {
            let data = reorder(name, config, source.weight(name, &shapes[name])?, Rotary::ToPairs);
            put(&floats(data))
        };
        order(0, config).iter().try_for_each(|name| weight(name))?;
        let frequencies = crate::modules::rotary_frequencies(config);
        for part in [f64::cos, f64::sin] {
            for position in 0..config.max_seq_len {
                let angles = frequencies.iter().map(|w| part(position as f64 * w) as f32);
                put(&angles.collect::<Vec<_>>())?;
            }
        }
        if !config.tied_head {
            put(&floats(source.weight("output.weight", &shapes["output.weight"])?))?;
        }
        out.flush().map_err(io)
    })
}
