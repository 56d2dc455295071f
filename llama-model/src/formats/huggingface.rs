//! Hugging Face folders: `config.json`, and safetensors in one file or in several that an index names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use serde_json::{Value, json};

use super::dtype::FileType;
use super::{Reader, TensorInfo, Weights, stray};
use crate::copy::convert;
use crate::hf::{CONFIG_FILE, WEIGHTS_FILE, load_config, to_json};
use crate::weights::{self, Streamed, TensorFile, file_name};
use crate::{LlamaConfig, ModelError, WeightFormat};

const INDEX_FILE: &str = "model.safetensors.index.json";
/// Bytes of weights in a file, at most, as transformers writes them.
const SHARD: usize = 5_000_000_000;

pub(super) struct Folder {
    path: PathBuf,
    config: LlamaConfig,
    files: Vec<TensorFile>,
    /// Which file has a tensor.
    places: BTreeMap<String, usize>,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let config = load_config(&path.join(CONFIG_FILE))?;
        let index = path.join(INDEX_FILE);
        let names = if index.is_file() { shards(&index)? } else { BTreeSet::from([WEIGHTS_FILE.to_string()]) };
        let files = names.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<Vec<_>, _>>()?;
        let mut places = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.names() {
                if places.insert(name.clone(), index).is_some() {
                    return Err(ModelError::format(path, format!("tensor `{name}` stands in two files")));
                }
            }
        }
        Ok(Self { path: path.into(), config, files, places })
    }

    /// Tensors that follow from the configuration, or from others.
    fn is_derived(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq") || (self.config.tied_head && name == "lm_head.weight")
    }
}

/// The files that an index names: inside its folder, whatever it says.
fn shards(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    let text = std::fs::read_to_string(index).map_err(|error| ModelError::io(index, error))?;
    let json: Value = serde_json::from_str(&text).map_err(|error| ModelError::format(index, error))?;
    let map = json["weight_map"].as_object().ok_or_else(|| ModelError::format(index, "`weight_map` is missing"))?;
    let file = |value: &Value| {
        let name = value.as_str().filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
        name.map(str::to_string).ok_or_else(|| ModelError::format(index, format!("{value} is not a file's name")))
    };
    map.values().map(file).collect()
}

impl Weights for Folder {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let name = file_name(path).unwrap_or_else(|| path.into());
        let missing = || ModelError::MissingTensor { path: self.path.clone(), name: name.clone() };
        self.files[*self.places.get(&name).ok_or_else(missing)?].tensor(&name, dims)
    }
}

impl Reader for Folder {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        self.files.iter().flat_map(TensorFile::infos).collect()
    }

    fn stored(&self, path: &str) -> WeightFormat {
        let place = file_name(path).and_then(|name| Some((*self.places.get(&name)?, name)));
        place.map_or_else(Default::default, |(index, name)| self.files[index].stored(&name))
    }

    fn unexpected(&self) -> Option<String> {
        stray(&self.config, self.places.keys(), file_name, |name| self.is_derived(name))
    }
}

pub(super) fn save(
    source: &dyn Weights,
    config: &LlamaConfig,
    folder: &Path,
    dtype: FileType,
) -> Result<(), ModelError> {
    save_in_shards(source, config, folder, dtype, SHARD)
}

fn save_in_shards(
    source: &dyn Weights,
    config: &LlamaConfig,
    folder: &Path,
    dtype: FileType,
    shard: usize,
) -> Result<(), ModelError> {
    let Some(float) = dtype.float() else {
        return Err(ModelError::format(folder, format!("safetensors of LLaMA are f32, f16 or bf16, not {dtype}")));
    };
    std::fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))?;
    let mut files: Vec<Vec<(String, Vec<usize>)>> = vec![Vec::new()];
    let (mut total, mut in_file) = (0, 0);
    for (path, dims) in config.parameters() {
        let bytes = dtype.bytes(dims.iter().product());
        if in_file > 0 && in_file + bytes > shard {
            files.push(Vec::new());
            in_file = 0;
        }
        in_file += bytes;
        total += bytes;
        files.last_mut().expect("there is one").push((path, dims));
    }
    let name = |index: usize| match files.len() {
        1 => WEIGHTS_FILE.to_string(),
        count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    let mut places = serde_json::Map::new();
    for (index, tensors) in files.iter().enumerate() {
        let entries = tensors.iter().map(|(path, dims)| Streamed {
            name: file_name(path).unwrap_or_else(|| path.clone()),
            dims: dims.clone(),
            dtype: float,
            read: Box::new(move || Ok::<_, ModelError>(convert(source.weight(path, dims)?, float))),
        });
        let entries: Vec<_> = entries.collect();
        for entry in &entries {
            places.insert(entry.name.clone(), name(index).into());
        }
        weights::save_streamed(&folder.join(name(index)), entries)?;
    }
    let index = folder.join(INDEX_FILE);
    if files.len() > 1 {
        let json = json!({ "metadata": { "total_size": total }, "weight_map": places });
        weights::write_atomic(&index, format!("{json:#}\n").as_bytes())?;
    } else if index.exists() {
        // An index of an earlier model would be believed.
        std::fs::remove_file(&index).map_err(|error| ModelError::io(&index, error))?;
    }
    let mut json = to_json(config);
    json["torch_dtype"] = match dtype {
        FileType::F16 => "float16",
        FileType::Bf16 => "bfloat16",
        _ => "float32",
    }
    .into();
    weights::write_atomic(&folder.join(CONFIG_FILE), format!("{json:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Checkpoint, Format};

    struct Numbers;

    impl Weights for Numbers {
        fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
            let len = dims.iter().product::<usize>();
            let values = (0..len).map(|i| (i + path.len()) as f32 / 64.0).collect();
            Ok(TensorData::new(values, dims.to_vec()))
        }
    }

    #[test]
    fn large_models_are_written_in_several_files() {
        let folder = tempfile::tempdir().unwrap();
        let config = LlamaConfig {
            n_layers: 2,
            d_model: 32,
            n_heads: 4,
            n_kv_heads: 4,
            head_dim: 8,
            d_ff: 40,
            ..LlamaConfig::tiny(64)
        };
        save_in_shards(&Numbers, &config, folder.path(), FileType::F32, 20_000).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!((checkpoint.format(), checkpoint.config()), (Format::HuggingFace, &config));
        let files = shards(&folder.path().join(INDEX_FILE)).unwrap();
        assert_eq!(files.first().unwrap(), &format!("model-00001-of-{:05}.safetensors", files.len()));
        assert!(files.len() > 3, "{files:?}");
        for (path, dims) in config.parameters() {
            assert_eq!(checkpoint.weight(&path, &dims).unwrap(), Numbers.weight(&path, &dims).unwrap(), "{path}");
        }
        // One file again: the index goes.
        save_in_shards(&Numbers, &config, folder.path(), FileType::F32, usize::MAX).unwrap();
        assert!(!folder.path().join(INDEX_FILE).exists());
        assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().len(), config.parameters().len());
    }

    #[test]
    fn an_index_cannot_leave_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX_FILE);
        for bad in ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", ""] {
            std::fs::write(&index, json!({ "weight_map": { "x": bad } }).to_string()).unwrap();
            assert!(shards(&index).unwrap_err().to_string().contains("not a file's name"), "{bad}");
        }
    }
}
