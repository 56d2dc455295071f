//! Checkpoints of other programs, in and out.
//!
//! | format | is | read | written |
//! | --- | --- | --- | --- |
//! | [`HuggingFace`](Format::HuggingFace) | a folder with `config.json` and safetensors, in one file or several with an index | F64, F32, F16, BF16 | F32, F16, BF16 |
//! | [`Meta`](Format::Meta) | a folder with `params.json` and `consolidated.NN.pth`, as released | one or more model-parallel files | one file |
//! | [`Gguf`](Format::Gguf) | a llama.cpp file, versions 1 to 3 | floats, `Q4_0` to `Q8_0`, `Q2_K` to `Q6_K` | F32, F16, BF16, `Q8_0`, `Q4_0` |
//! | [`Llama2c`](Format::Llama2c) | a `.bin` of llama2.c, versions 0 to 2 | f32, 8 bits | version 0 (f32) |
//!
//! [`Checkpoint::open`] finds out which one a path is. Files are mapped into memory and tensors read one by one, so that
//! loading and converting need one tensor beside the result.
//!
//! All formats but Hugging Face's keep the rows of `wq` and `wk` for pairs of neighbours, `(x[2i], x[2i + 1])`; ours are
//! for halves, `(x[i], x[i + head_dim / 2])`. They are reordered on the way, which changes no value.

mod dtype;
mod gguf;
mod huggingface;
mod llama2c;
mod load;
mod meta;
mod pickle;
mod quants;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;
use burn::tensor::backend::Backend;

pub use dtype::FileType;
pub use gguf::{GgufFile, Value};

use crate::backend::Bits;
use crate::backend::rounding::BlockData;
use crate::copy::concat;
use crate::file_map::FileMap;
use crate::weights;
use crate::{LlamaConfig, ModelError, WeightFormat};

/// A checkpoint format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `config.json` and `model.safetensors`.
    HuggingFace,
    /// `params.json` and `consolidated.NN.pth`.
    Meta,
    /// A `.gguf` file.
    Gguf,
    /// A `.bin` file of llama2.c.
    Llama2c,
}

crate::compute::names!(Format, "format", HuggingFace = "hf", Meta = "meta", Gguf = "gguf", Llama2c = "llama2c");

impl Format {
    /// The format of a file or folder, by what is in it.
    ///
    /// # Errors
    /// [`ModelError::Io`] if it cannot be read, [`ModelError::Format`] if it is none of them.
    pub fn detect(path: &Path) -> Result<Self, ModelError> {
        if path.join(crate::hf::CONFIG_FILE).is_file() {
            return Ok(Self::HuggingFace);
        }
        if path.join(meta::PARAMS_FILE).is_file() {
            return Ok(Self::Meta);
        }
        if path.is_dir() {
            let reason = "a folder with neither config.json (Hugging Face) nor params.json (Meta)";
            return Err(ModelError::format(path, reason));
        }
        let map = FileMap::open(path)?;
        if map.starts_with(gguf::MAGIC) {
            return Ok(Self::Gguf);
        }
        if llama2c::is_one(&map) {
            return Ok(Self::Llama2c);
        }
        Err(ModelError::format(path, "not a GGUF or llama2.c file; folders of Hugging Face and Meta are read too"))
    }
}

/// A tensor as it stands in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Rows first.
    pub dims: Vec<usize>,
    /// The type of its elements, as the format calls it.
    pub dtype: String,
    /// Its size in the file.
    pub bytes: u64,
}

/// Weights that are read one by one, by the names of the released checkpoints ([`LlamaConfig::parameters`]).
pub trait Weights {
    /// The weight at `path` with exactly this shape, in f32 or a shorter float.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`], or [`ModelError::Format`].
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError>;
}

/// What a format's reader gives.
trait Reader: Weights {
    fn config(&self) -> &LlamaConfig;
    fn tensors(&self) -> Vec<TensorInfo>;
    /// The format that is nearest to how the weight at `path` is stored, and no shorter; f32 if there is none.
    fn stored(&self, path: &str) -> WeightFormat;
    /// A matrix in blocks of so many bits along its rows, as [`Weights::weight`]: its values rounded, or the blocks that it is stored in.
    fn blocks(&self, path: &str, dims: [usize; 2], bits: Bits) -> Result<BlockData, ModelError> {
        Ok(BlockData::round(&self.weight(path, &dims)?, bits))
    }
    /// A tensor that the model has no place for.
    fn unexpected(&self) -> Option<String>;
}

/// An opened checkpoint: its configuration is known, its weights are read when asked for.
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    reader: Box<dyn Reader>,
    config: LlamaConfig,
}

impl Checkpoint {
    /// Opens a file or folder in any [`Format`].
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Format`] for what is broken or not LLaMA, [`ModelError::Config`] for a
    /// configuration that describes no model.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_as(Format::detect(path)?, path)
    }

    /// Opens a file or folder in this format.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_as(format: Format, path: &Path) -> Result<Self, ModelError> {
        let reader: Box<dyn Reader> = match format {
            Format::HuggingFace => Box::new(huggingface::Folder::open(path)?),
            Format::Meta => Box::new(meta::Folder::open(path)?),
            Format::Gguf => Box::new(gguf::Reader::open(path)?),
            Format::Llama2c => Box::new(llama2c::File::open(path)?),
        };
        reader.config().validate()?;
        if let Some(name) = reader.unexpected() {
            return Err(ModelError::UnexpectedTensor { path: path.into(), name });
        }
        let config = reader.config().clone();
        Ok(Self { path: path.into(), format, reader, config })
    }

    /// The same weights for training that goes on with `config`: how long sequences are and how positions are encoded
    /// (`max_seq_len`, `rope_theta`, `rope_scaling`) may differ from what the checkpoint says.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first other field that does.
    pub fn continued_as(self, config: &LlamaConfig) -> Result<Self, ModelError> {
        config.validate()?;
        let fields = |config: &LlamaConfig| {
            [
                ("d_model", config.d_model.to_string()),
                ("n_layers", config.n_layers.to_string()),
                ("n_heads", config.n_heads.to_string()),
                ("n_kv_heads", config.n_kv_heads.to_string()),
                ("head_dim", config.head_dim.to_string()),
                ("d_ff", config.d_ff.to_string()),
                ("vocab_size", config.vocab_size.to_string()),
                ("norm_eps", config.norm_eps.to_string()),
                ("tied_head", config.tied_head.to_string()),
            ]
        };
        for ((field, wanted), (_, has)) in fields(config).into_iter().zip(fields(&self.config)) {
            if wanted != has {
                let reason = format!("is {wanted}, but {has} in {}", self.path.display());
                return Err(ModelError::Config { field, reason });
            }
        }
        Ok(Self { config: config.clone(), ..self })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The model's sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The tensors in its files, by name.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let mut tensors = self.reader.tensors();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }
}

impl Weights for Checkpoint {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        self.reader.weight(path, dims)
    }
}

/// The parameters of a model in memory.
pub struct ModelWeights(BTreeMap<String, TensorData>);

impl ModelWeights {
    /// Takes them to the host.
    pub fn new<B: Backend, M: Module<B>>(module: &M) -> Self {
        let mut weights = BTreeMap::new();
        weights::visit_params(module, |path, value| {
            weights.insert(path.to_string(), value.to_data());
        });
        Self(weights)
    }
}

impl Weights for ModelWeights {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let missing = || ModelError::MissingTensor { path: "the model in memory".into(), name: path.into() };
        check_shape(Path::new("the model in memory"), path, self.0.get(path).ok_or_else(missing)?.clone(), dims)
    }
}

/// What goes into a checkpoint beside the weights.
pub struct Extras<'a> {
    /// More metadata for a GGUF file: its tokenizer.
    pub gguf: Vec<(String, Value)>,
    /// Files to copy into a folder: its tokenizer.
    pub files: Vec<&'a Path>,
}

/// Writes a checkpoint, each file atomically. Weights are read and written one by one, matrices in `dtype`; norm gains are
/// f32, except that Hugging Face's and Meta's files have one type for all.
///
/// # Errors
/// [`ModelError::Io`], those of the weights, and [`ModelError::Format`] for a type that the format does not have.
pub fn save(
    weights: &dyn Weights,
    config: &LlamaConfig,
    path: &Path,
    format: Format,
    dtype: FileType,
    extras: &Extras,
) -> Result<(), ModelError> {
    match format {
        Format::HuggingFace => huggingface::save(weights, config, path, dtype)?,
        Format::Meta => meta::save(weights, config, path, dtype)?,
        Format::Gguf => return gguf::save(weights, config, path, dtype, &extras.gguf),
        Format::Llama2c => return llama2c::save(weights, config, path, dtype),
    }
    for file in &extras.files {
        if let Some(name) = file.file_name() {
            let bytes = std::fs::read(file).map_err(|error| ModelError::io(*file, error))?;
            weights::write_atomic(&path.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// The first name in a file that is neither a parameter's (`file_name` has those of the paths) nor `known` to be of no use.
fn stray<'a>(
    config: &LlamaConfig,
    mut names: impl Iterator<Item = &'a String>,
    file_name: impl Fn(&str) -> Option<String>,
    known: impl Fn(&str) -> bool,
) -> Option<String> {
    let expected: BTreeSet<_> = config.parameters().iter().filter_map(|(path, _)| file_name(path)).collect();
    names.find(|name| !expected.contains(*name) && !known(name)).cloned()
}

/// The data, if it has this shape.
fn check_shape(path: &Path, name: &str, data: TensorData, dims: &[usize]) -> Result<TensorData, ModelError> {
    if *data.shape == *dims { Ok(data) } else { Err(wrong_shape(path, name, dims, &data.shape)) }
}

fn wrong_shape(path: &Path, name: &str, expected: &[usize], found: &[usize]) -> ModelError {
    ModelError::TensorShape { path: path.into(), name: name.into(), expected: expected.into(), found: found.into() }
}

/// Which way the rows of a head go.
#[derive(Clone, Copy, PartialEq)]
enum Rotary {
    /// From pairs of neighbours to halves.
    ToHalves,
    /// From halves to pairs of neighbours.
    ToPairs,
}

/// Whether a weight has rows for rotary embedding: `wq` and `wk`.
fn is_rotary(path: &str) -> bool {
    path.ends_with("attention.wq.weight") || path.ends_with("attention.wk.weight")
}

/// The row that comes to `row` in the other form.
///
/// Row `2 i + p` of a head in pairs is row `i + p · head_dim / 2` in halves.
fn source_row(row: usize, head_dim: usize, to: Rotary) -> usize {
    let (head, at, half) = (row / head_dim * head_dim, row % head_dim, head_dim / 2);
    head + match to {
        Rotary::ToHalves => 2 * (at % half) + at / half,
        Rotary::ToPairs => at / 2 + at % 2 * half,
    }
}

/// Reorders the rows of `wq` and `wk` for the other form of rotary embedding; others stay as they are.
fn reorder(path: &str, config: &LlamaConfig, data: TensorData, to: Rotary) -> TensorData {
    if !is_rotary(path) {
        return data;
    }
    let (rows, bytes) = (data.shape[0], data.as_bytes());
    let row_bytes = bytes.len() / rows.max(1);
    let row = |row| &bytes[source_row(row, config.head_dim, to) * row_bytes..][..row_bytes];
    concat(data.dtype, (0..rows).map(row), &data.shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_rows_go_both_ways() {
        let config = LlamaConfig { n_heads: 2, n_kv_heads: 2, head_dim: 4, ..LlamaConfig::tiny(8) };
        let data = TensorData::new((0..8).map(|x| x as f32).collect(), [8, 1]);
        let name = "layers.0.attention.wq.weight";
        let halves = reorder(name, &config, data.clone(), Rotary::ToHalves);
        assert_eq!(halves.to_vec::<f32>().unwrap(), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(reorder(name, &config, halves, Rotary::ToPairs), data);
        assert_eq!(reorder("layers.0.attention.wv.weight", &config, data.clone(), Rotary::ToPairs), data);
    }
}
