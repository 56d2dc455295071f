//! GGUF, llama.cpp's format: metadata by name, then tensors, aligned. Versions 1 to 3 are read, 3 is written.
//!
//! Nothing in a file is believed: every length is checked against what is left of the file before it is used.

mod model;
mod write;

pub(super) use model::Reader;
pub(super) use write::save;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use half::f16;

use super::quants::Quant;
use crate::ModelError;
use crate::backend::Bits;
use crate::backend::rounding::round;
use crate::copy::{concat, widen};
use crate::file_map::FileMap;

pub(super) const MAGIC: &[u8] = b"GGUF";
/// Tensors begin at multiples of this where a file says nothing else.
const ALIGNMENT: usize = 32;
/// Arrays inside arrays are read to this depth.
const MAX_DEPTH: usize = 4;
const MAX_DIMS: usize = 4;
/// Values in all arrays together, at most: far more than any vocabulary has. They take more memory than bytes of a file.
const MAX_VALUES: usize = 1 << 24;

/// Where LLaMA 3.1's scaling is kept: each frequency's divisor.
const ROPE_FACTORS: &str = "rope_freqs.weight";

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

fn file_name(path: &str) -> Option<String> {
    crate::names::rename(path, ("layers.", "blk."), &NAMES, &LAYER_NAMES)
}

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
    /// Values that arrays may still have.
    values_left: usize,
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
                // Checked before memory is spent: each value takes a byte of the file at least.
                if len > self.bytes.len() - self.at {
                    return Err(format!("an array of {len} values in a file that ends inside its header"));
                }
                self.values_left = self.values_left.checked_sub(len).ok_or("arrays of too many values")?;
                let mut values = Vec::with_capacity(len);
                for _ in 0..len {
                    values.push(self.value(kind, depth + 1)?);
                }
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

    /// The shortest of our blocks of so many bits that take it.
    fn bits(self, bits: Bits) -> Bits {
        match self {
            Self::Float(_) => bits,
            Self::Blocks(quant) => quant.bits(bits),
        }
    }

    /// Rows in our blocks.
    fn write_blocks(self, bits: Bits, bytes: &[u8], values: &mut [u8], scales: &mut [f16]) {
        match self {
            Self::Float(dtype) => round(bits, &widen(dtype, bytes), values, scales),
            Self::Blocks(quant) => quant.write_blocks(bits, bytes, values, scales),
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
    map: FileMap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

impl GgufFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`ModelError::Io`], or [`ModelError::Format`] that says what is wrong.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = FileMap::open(path)?;
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

    /// A tensor's values, as floats.
    fn data(&self, entry: &Entry) -> TensorData {
        self.map.read(entry.range.clone(), |bytes| match entry.kind {
            Kind::Float(dtype) => concat(dtype, [bytes], &entry.dims),
            Kind::Blocks(quant) => TensorData::new(quant.decode_all(bytes), entry.dims.clone()),
        })
    }
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, Entry>);

fn header(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes, at: 0, version: 0, values_left: MAX_VALUES };
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
