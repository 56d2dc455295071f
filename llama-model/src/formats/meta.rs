//! The released code's checkpoints: `params.json`, and `consolidated.NN.pth` for each model-parallel part. A `.pth` is a
//! zip archive of a pickle and of the tensors' bytes, which are read where they are.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::dtype::FileType;
use super::{Reader, Rotary, TensorInfo, Weights, pickle, reorder, stray, wrong_shape};
use crate::copy::{concat, convert};
use crate::file_map::FileMap;
use crate::{LlamaConfig, ModelError, RopeScaling, WeightFormat, weights};

pub(super) const PARAMS_FILE: &str = "params.json";

/// One model-parallel part.
struct Part {
    path: PathBuf,
    map: FileMap,
    tensors: BTreeMap<String, Stored>,
}

struct Stored {
    dtype: DType,
    dims: Vec<usize>,
    range: std::ops::Range<usize>,
}

pub(super) struct Folder {
    path: PathBuf,
    config: LlamaConfig,
    parts: Vec<Part>,
}

/// How the parts of a weight make the whole. The shapes tell: the first two LLaMAs' embeddings are cut by columns, the
/// third's by rows.
enum Split {
    /// Every part has all of it.
    Copied,
    Rows,
    Columns,
}

impl Split {
    fn of(part: &[usize], whole: &[usize], count: usize) -> Option<Self> {
        match (part, whole) {
            _ if part == whole => Some(Self::Copied),
            ([rows, cols], [all_rows, all_cols]) if cols == all_cols && rows.checked_mul(count) == Some(*all_rows) => {
                Some(Self::Rows)
            }
            ([rows, cols], [all_rows, all_cols]) if rows == all_rows && cols.checked_mul(count) == Some(*all_cols) => {
                Some(Self::Columns)
            }
            _ => None,
        }
    }
}

fn dtype(kind: &str) -> Option<(DType, &'static str)> {
    Some(match kind {
        "FloatStorage" => (DType::F32, "F32"),
        "DoubleStorage" => (DType::F64, "F64"),
        "HalfStorage" => (DType::F16, "F16"),
        "BFloat16Storage" => (DType::BF16, "BF16"),
        _ => return None,
    })
}

impl Part {
    fn open(path: &Path) -> Result<Self, ModelError> {
        let map = FileMap::open(path)?;
        let tensors = tensors(&map).map_err(|reason| ModelError::format(path, reason))?;
        Ok(Self { path: path.into(), map, tensors })
    }
}

fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Stored>, String> {
    let not_zip =
        |error| format!("not a PyTorch checkpoint (a zip archive): {error}; files older than PyTorch 1.6 are not read");
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(not_zip)?;
    let mut pickled = None;
    let mut storages = BTreeMap::new();
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index).map_err(not_zip)?;
        let name = file.name().to_string();
        // Everything is in a folder that has the archive's name.
        let Some((_, inner)) = name.split_once('/') else { continue };
        if file.compression() != CompressionMethod::Stored {
            return Err(format!("`{name}` is compressed; PyTorch stores its tensors as they are"));
        }
        let start = file.data_start().and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(usize::try_from(file.size()).ok()?));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= bytes.len())) else {
            return Err(format!("`{name}` reaches past the end of the file"));
        };
        if inner == "data.pkl" {
            pickled = Some(start..end);
        } else if inner == "byteorder" && &bytes[start..end] != b"little" {
            return Err("numbers in big-endian order".into());
        } else if let Some(key) = inner.strip_prefix("data/") {
            storages.insert(key.to_string(), start..end);
        }
    }
    let pickled = pickled.ok_or("the archive has no data.pkl")?;
    let mut found = BTreeMap::new();
    for (name, tensor) in pickle::tensors(&bytes[pickled])? {
        let fail = |reason: String| format!("tensor `{name}`: {reason}");
        let (dtype, _) = dtype(&tensor.kind).ok_or_else(|| fail(format!("{} is no float", tensor.kind)))?;
        let storage = storages.get(&*tensor.key).ok_or_else(|| fail(format!("storage `{}` is missing", tensor.key)))?;
        let rest = |dims: &[usize]| dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let contiguous = (0..tensor.dims.len())
            .all(|i| tensor.dims[i] == 1 || rest(&tensor.dims[i + 1..]) == Some(tensor.strides[i]));
        if !contiguous {
            return Err(fail(format!("strides {:?} for the shape {:?}", tensor.strides, tensor.dims)));
        }
        let bytes_of = |elements: usize| elements.checked_mul(dtype.size());
        let from = bytes_of(tensor.offset).and_then(|offset| storage.start.checked_add(offset));
        let len = rest(&tensor.dims).and_then(bytes_of);
        let range = from.zip(len).and_then(|(from, len)| Some(from..from.checked_add(len)?));
        let range =
            range.filter(|range| range.end <= storage.end).ok_or_else(|| fail("larger than its storage".into()))?;
        found.insert(name, Stored { dtype, dims: tensor.dims, range });
    }
    Ok(found)
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let mut parts = Vec::new();
        loop {
            let file = path.join(format!("consolidated.{:02}.pth", parts.len()));
            if !file.is_file() && !parts.is_empty() {
                break;
            }
            parts.push(Part::open(&file)?);
        }
        let params = path.join(PARAMS_FILE);
        let text = std::fs::read_to_string(&params).map_err(|error| ModelError::io(&params, error))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| ModelError::format(&params, error))?;
        let vocab_size = vocab_size(&parts);
        let config = config(&json, vocab_size).map_err(|reason| ModelError::format(&params, reason))?;
        Ok(Self { path: path.into(), config, parts })
    }
}

/// Rows of the output head: in all parts together.
fn vocab_size(parts: &[Part]) -> Option<usize> {
    parts.iter().map(|part| part.tensors.get("output.weight")?.dims.first().copied()).sum()
}

/// `params.json` says how the inner width is made, not what it is: see [`LlamaConfig::paper_d_ff`].
fn config(json: &Value, vocab_size: Option<usize>) -> Result<LlamaConfig, String> {
    let wrong = |key: &str| format!("`{key}` is missing or not a whole number");
    let size = |key: &str| json[key].as_u64().map(|n| n as usize).ok_or_else(|| wrong(key));
    let size_or = |key: &str, default: usize| if json[key].is_null() { Ok(default) } else { size(key) };
    let number_or = |key: &str, default: f64| if json[key].is_null() { Some(default) } else { json[key].as_f64() };
    let (d_model, n_heads) = (size("dim")?, size("n_heads")?);
    let multiple_of = size_or("multiple_of", 256)?.max(1);
    let scale = number_or("ffn_dim_multiplier", 1.0).ok_or_else(|| wrong("ffn_dim_multiplier"))?;
    let hidden = 8usize.checked_mul(d_model).ok_or_else(|| wrong("dim"))? / 3;
    let d_ff = ((scale * hidden as f64) as usize).next_multiple_of(multiple_of);
    // The first LLaMA's files have -1: the tokenizer knows.
    let vocab_size = match json["vocab_size"].as_i64() {
        Some(n) if n > 0 => n as usize,
        _ => vocab_size.ok_or("`vocab_size` is not stated and there is no tensor `output.weight`")?,
    };
    let scaled = json["use_scaled_rope"].as_bool() == Some(true);
    Ok(LlamaConfig {
        d_model,
        n_layers: size("n_layers")?,
        n_heads,
        n_kv_heads: size_or("n_kv_heads", n_heads)?,
        head_dim: d_model / n_heads.max(1),
        d_ff,
        vocab_size,
        max_seq_len: size_or("max_seq_len", 2048)?,
        norm_eps: number_or("norm_eps", 1e-5).ok_or_else(|| wrong("norm_eps"))?,
        rope_theta: number_or("rope_theta", 10_000.0).ok_or_else(|| wrong("rope_theta"))?,
        rope_scaling: scaled.then_some(RopeScaling::Llama3 {
            factor: number_or("rope_scale_factor", 8.0).ok_or_else(|| wrong("rope_scale_factor"))?,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_seq_len: 8192,
        }),
        tied_head: false,
    })
}

impl Weights for Folder {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let count = self.parts.len();
        let mut parts: Vec<(DType, &[u8])> = Vec::new();
        let mut part_dims: Option<&[usize]> = None;
        for part in &self.parts {
            let missing = || ModelError::MissingTensor { path: part.path.clone(), name: path.into() };
            let stored = part.tensors.get(path).ok_or_else(missing)?;
            let expected = *part_dims.get_or_insert(&stored.dims);
            if stored.dims != expected {
                return Err(wrong_shape(&part.path, path, expected, &stored.dims));
            }
            if parts.first().is_some_and(|(first, _)| *first != stored.dtype) {
                return Err(ModelError::format(&part.path, format!("tensor `{path}` has another type than in part 0")));
            }
            parts.push((stored.dtype, &part.map[stored.range.clone()]));
        }
        let (dtype, part_dims) = (parts[0].0, part_dims.unwrap_or_default());
        let split = Split::of(part_dims, dims, count).ok_or_else(|| wrong_shape(&self.path, path, dims, part_dims))?;
        let data = match split {
            Split::Copied => concat(dtype, [parts[0].1], dims),
            Split::Rows => concat(dtype, parts.iter().map(|(_, bytes)| *bytes), dims),
            Split::Columns => {
                let row = part_dims[1] * dtype.size();
                let of_row = |i: usize| parts.iter().map(move |(_, bytes)| &bytes[i * row..][..row]);
                concat(dtype, (0..part_dims[0]).flat_map(of_row), dims)
            }
        };
        self.parts.iter().for_each(|part| part.map.release(part.tensors[path].range.clone()));
        Ok(reorder(path, &self.config, data, Rotary::ToHalves))
    }
}

impl Reader for Folder {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let several = self.parts.len() > 1;
        let infos = self.parts.iter().enumerate().flat_map(|(index, part)| {
            part.tensors.iter().map(move |(name, stored)| TensorInfo {
                name: if several { format!("{name} (part {index})") } else { name.clone() },
                dims: stored.dims.clone(),
                dtype: format!("{:?}", stored.dtype),
                bytes: stored.range.len() as u64,
            })
        });
        infos.collect()
    }

    fn stored(&self, path: &str) -> WeightFormat {
        self.parts[0].tensors.get(path).map_or_else(Default::default, |stored| WeightFormat::of_float(stored.dtype))
    }

    fn unexpected(&self) -> Option<String> {
        let names = self.parts.iter().flat_map(|part| part.tensors.keys());
        stray(&self.config, names, |path| Some(path.into()), |name| name == "rope.freqs")
    }
}

pub(super) fn save(
    source: &dyn Weights,
    config: &LlamaConfig,
    folder: &Path,
    dtype: FileType,
) -> Result<(), ModelError> {
    let refuse = |reason: String| ModelError::format(folder, format!("Meta's checkpoints {reason}"));
    let float = dtype.float().ok_or_else(|| refuse(format!("are f32, f16 or bf16, not {dtype}")))?;
    let params = params(config).map_err(refuse)?;
    let kind = match dtype {
        FileType::F16 => "HalfStorage",
        FileType::Bf16 => "BFloat16Storage",
        _ => "FloatStorage",
    };
    std::fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))?;
    let mut stored = config.parameters();
    if config.tied_head {
        // Meta's code has a head of its own.
        stored.push(("output.weight".into(), vec![config.vocab_size, config.d_model]));
    }
    let path = folder.join("consolidated.00.pth");
    weights::replace(&path, |file| {
        let io = |error| ModelError::io(&path, error);
        let zip = |error: zip::result::ZipError| io(std::io::Error::other(error));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
        let mut archive = ZipWriter::new(std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut()));
        let mut add = |name: &str, bytes: &[u8]| {
            archive.start_file(format!("consolidated.00/{name}"), options).map_err(zip)?;
            archive.write_all(bytes).map_err(io)
        };
        let entries: Vec<_> = stored.iter().map(|(name, dims)| (name.clone(), kind, dims.clone())).collect();
        add("data.pkl", &pickle::dump(&entries))?;
        add("byteorder", b"little")?;
        for (index, (name, dims)) in stored.iter().enumerate() {
            let from = if config.tied_head && name == "output.weight" { "tok_embeddings.weight" } else { name };
            let data = reorder(name, config, source.weight(from, dims)?, Rotary::ToPairs);
            add(&format!("data/{index}"), convert(data, float).as_bytes())?;
        }
        add("version", b"3\n")?;
        archive.finish().map_err(zip)?.flush().map_err(io)
    })?;
    // Last: a folder with it is whole.
    weights::write_atomic(&folder.join(PARAMS_FILE), format!("{params:#}\n").as_bytes())
}

fn params(config: &LlamaConfig) -> Result<Value, String> {
    if config.head_dim * config.n_heads != config.d_model {
        return Err("have heads that add up to the model's width".into());
    }
    let mut params = json!({
        "dim": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_seq_len,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    });
    // The inner width is written as a multiple of itself, so that it comes out whatever the model's width.
    let hidden = 8 * config.d_model / 3;
    params["multiple_of"] = config.d_ff.into();
    if hidden > config.d_ff {
        params["ffn_dim_multiplier"] = (config.d_ff as f64 / hidden as f64).into();
    }
    match config.rope_scaling {
        None => {}
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_seq_len: 8192,
        }) => {
            params["use_scaled_rope"] = true.into();
            params["rope_scale_factor"] = factor.into();
        }
        Some(_) => return Err("have no scaling of rotary embeddings but LLaMA 3's".into()),
    }
    Ok(params)
}
