//! GGUF, llama.cpp's format: metadata by name, then tensors, aligned. Versions 1 to 3 are read, 3 is written.
//!
//! Nothing in a file is believed: every length is checked against what is left of the file before it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use memmap2::Mmap;

use super::dtype::{FileType, decode};
use super::quants::{BLOCK, Quant};
use super::{Rotary, TensorInfo, Weights, map_file, reorder, wrong_shape};
use crate::{LlamaConfig, ModelError, RopeScaling, weights};

pub(super) const MAGIC: &[u8] = b"GGUF";
/// Tensors begin at multiples of this where a file says nothing else.
const ALIGNMENT: usize = 32;
/// Arrays inside arrays are read to this depth.
const MAX_DEPTH: usize = 4;
const MAX_DIMS: usize = 4;

/// Our name and GGUF's of each part; a layer's parts follow `layers.N.` and `blk.N.`.
const NAMES: [(&str, &str); 3] = [("tok_embeddings", "token_embd"), ("norm", "output_norm"), ("output", "output")];
const LAYER_NAMES: [(&str, &str); 9] = [
    ("attention_norm", "attn_norm"),
    ("attention.wq", "attn_q"),
    ("attention.wk", "attn_k"),
    ("attention.wv", "attn_v"),
    ("attention.wo", "attn_output"),
    ("ffn_norm", "ffn_norm"),
    ("feed_forward.w1", "ffn_gate"),
    ("feed_forward.w2", "ffn_down"),
    ("feed_forward.w3", "ffn_up"),
];

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text. Bytes that are not UTF-8 are replaced.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// A number that is not negative.
    pub fn as_usize(&self) -> Option<usize> {
        match self {
            Self::Unsigned(n) => usize::try_from(*n).ok(),
            Self::Signed(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// Text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }
}

/// Reads a header from its start, never past the end of the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    version: u32,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the file ends inside its header, at byte {}", self.at))?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length: 32 bits in version 1, 64 later.
    fn len(&mut self) -> Result<usize, String> {
        let len = if self.version == 1 { u64::from(self.u32()?) } else { self.u64()? };
        usize::try_from(len).map_err(|_| format!("a length of {len}"))
    }

    fn text(&mut self) -> Result<String, String> {
        let len = self.len()?;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let (kind, len) = (self.u32()?, self.len()?);
                // Each element takes a byte at least, so a length that lies fails before memory is spent on it.
                let mut values = Vec::with_capacity(len.min(self.bytes.len() - self.at));
                for _ in 0..len {
                    values.push(self.value(kind, depth + 1)?);
                }
                values.shrink_to_fit();
                Value::Array(values)
            }
            9 => return Err(format!("arrays nested deeper than {MAX_DEPTH}")),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("a value of unknown type {other}")),
        })
    }
}

/// The number that was written as this f32: 1e-5 and not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x.into())
}

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Float(DType),
    Blocks(Quant),
}

impl Kind {
    fn of(number: u32) -> Option<(Self, &'static str)> {
        Some(match number {
            0 => (Self::Float(DType::F32), "F32"),
            1 => (Self::Float(DType::F16), "F16"),
            28 => (Self::Float(DType::F64), "F64"),
            30 => (Self::Float(DType::BF16), "BF16"),
            2 => (Self::Blocks(Quant::Q4_0), "Q4_0"),
            3 => (Self::Blocks(Quant::Q4_1), "Q4_1"),
            6 => (Self::Blocks(Quant::Q5_0), "Q5_0"),
            7 => (Self::Blocks(Quant::Q5_1), "Q5_1"),
            8 => (Self::Blocks(Quant::Q8_0), "Q8_0"),
            10 => (Self::Blocks(Quant::Q2K), "Q2_K"),
            11 => (Self::Blocks(Quant::Q3K), "Q3_K"),
            12 => (Self::Blocks(Quant::Q4K), "Q4_K"),
            13 => (Self::Blocks(Quant::Q5K), "Q5_K"),
            14 => (Self::Blocks(Quant::Q6K), "Q6_K"),
            _ => return None,
        })
    }

    /// Bytes of a tensor whose rows have `row` elements; none if they are not whole blocks or there are too many.
    fn bytes(self, row: usize, elements: usize) -> Option<usize> {
        match self {
            Self::Float(dtype) => elements.checked_mul(dtype.size()),
            Self::Blocks(quant) => {
                let (values, bytes) = quant.block();
                row.is_multiple_of(values).then(|| (elements / values).checked_mul(bytes))?
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    /// Rows first: the file has them the other way round.
    dims: Vec<usize>,
    kind: Kind,
    kind_name: &'static str,
    /// In the file.
    range: std::ops::Range<usize>,
}

/// An opened GGUF file: metadata, and where the tensors are.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

impl GgufFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`ModelError::Io`], or [`ModelError::Format`] that says what is wrong.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map_file(path)?;
        let (metadata, tensors) = header(&map).map_err(|reason| ModelError::format(path, reason))?;
        Ok(Self { path: path.into(), map, metadata, tensors })
    }

    /// A value of the metadata.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.metadata.get(name)
    }

    /// All metadata, by name.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, Entry>);

fn header(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes, at: 0, version: 0 };
    if cursor.take(4)? != MAGIC {
        return Err("not a GGUF file".into());
    }
    cursor.version = cursor.u32()?;
    if !(1..=3).contains(&cursor.version) {
        let version = cursor.version;
        // The other byte order shows itself here.
        return Err(format!("GGUF version {version}; versions 1 to 3 in little-endian order are read"));
    }
    let (tensor_count, value_count) = (cursor.len()?, cursor.len()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..value_count {
        let (name, kind) = (cursor.text()?, cursor.u32()?);
        let value = cursor.value(kind, 0).map_err(|reason| format!("`{name}`: {reason}"))?;
        if metadata.insert(name.clone(), value).is_some() {
            return Err(format!("`{name}` stands twice"));
        }
    }
    let alignment = metadata.get("general.alignment").map_or(Some(ALIGNMENT), Value::as_usize);
    let alignment = alignment.filter(|n| n.is_power_of_two()).ok_or("`general.alignment` is not a power of two")?;

    let mut tensors = BTreeMap::new();
    let mut offsets = Vec::new();
    for _ in 0..tensor_count {
        let name = cursor.text()?;
        let (entry, offset) = tensor(&mut cursor).map_err(|reason| format!("tensor `{name}`: {reason}"))?;
        offsets.push((name.clone(), offset));
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(format!("tensor `{name}` stands twice"));
        }
    }
    let start = cursor.at.checked_next_multiple_of(alignment).ok_or("the header is too long")?;
    let mut ranges = Vec::new();
    for (name, offset) in offsets {
        let entry = tensors.get_mut(&name).expect("it was just inserted");
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor `{name}` begins at {offset}, not at a multiple of {alignment}"));
        }
        let from = start.checked_add(offset);
        let to = from.and_then(|from| from.checked_add(entry.range.len())).filter(|to| *to <= bytes.len());
        let (Some(from), Some(to)) = (from, to) else {
            return Err(format!("tensor `{name}` reaches past the end of the file; is the download complete?"));
        };
        entry.range = from..to;
        ranges.push((from, to, name));
    }
    ranges.sort();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2));
    }
    Ok((metadata, tensors))
}

/// A tensor's entry, its range from 0 on, and its offset.
fn tensor(cursor: &mut Cursor) -> Result<(Entry, usize), String> {
    let n_dims = cursor.u32()? as usize;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(format!("{n_dims} dimensions; 1 to {MAX_DIMS} are possible"));
    }
    let mut dims = (0..n_dims).map(|_| cursor.len()).collect::<Result<Vec<_>, _>>()?;
    let row = dims[0];
    dims.reverse();
    let number = cursor.u32()?;
    let offset = cursor.u64()?;
    let (kind, kind_name) = Kind::of(number).ok_or_else(|| {
        format!("type number {number} is unknown; floats, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are read")
    })?;
    let elements = dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    let bytes = elements.and_then(|elements| kind.bytes(row, elements));
    let bytes = bytes.ok_or_else(|| format!("a {kind_name} tensor cannot have the shape {dims:?}"))?;
    let offset = usize::try_from(offset).map_err(|_| format!("an offset of {offset}"))?;
    Ok((Entry { dims, kind, kind_name, range: 0..bytes }, offset))
}

/// A GGUF file as a checkpoint.
pub(super) struct Reader {
    file: GgufFile,
    config: LlamaConfig,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
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
        config.rope_scaling = Some(llama3_scaling(&values(file, entry), &config)?);
    }
    Ok(config)
}

/// Where LLaMA 3.1's scaling is kept: each frequency's divisor.
const ROPE_FACTORS: &str = "rope_freqs.weight";

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

fn values(file: &GgufFile, entry: &Entry) -> Vec<f32> {
    super::dtype::floats(data(file, entry))
}

fn data(file: &GgufFile, entry: &Entry) -> TensorData {
    let bytes = &file.map[entry.range.clone()];
    match entry.kind {
        Kind::Float(dtype) => decode(dtype, bytes, entry.dims.clone()),
        Kind::Blocks(quant) => TensorData::new(quant.decode(bytes), entry.dims.clone()),
    }
}

fn file_name(path: &str) -> Option<String> {
    weights::rename(path, ("layers.", "blk."), &NAMES, &LAYER_NAMES)
}

impl Weights for Reader {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let name = file_name(path).unwrap_or_else(|| path.into());
        let missing = || ModelError::MissingTensor { path: self.file.path.clone(), name: name.clone() };
        let entry = self.file.tensors.get(&name).ok_or_else(missing)?;
        if entry.dims != dims {
            return Err(wrong_shape(&self.file.path, &name, dims, &entry.dims));
        }
        Ok(reorder(path, &self.config, data(&self.file, entry), Rotary::ToHalves))
    }
}

impl super::Reader for Reader {
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

    fn unexpected(&self) -> Option<String> {
        let known: BTreeSet<_> = self.config.parameters().iter().filter_map(|(path, _)| file_name(path)).collect();
        self.file.tensors.keys().find(|name| !known.contains(*name) && *name != ROPE_FACTORS).cloned()
    }
}

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

pub(super) fn save(
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
            let mut bytes = Writer(of(dims).encode(data));
            bytes.pad();
            out.write_all(&bytes.0).map_err(io)?;
        }
        out.flush().map_err(io)
    })
}
