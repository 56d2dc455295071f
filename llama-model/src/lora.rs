//! Fine-tuning by low-rank adapters (Hu et al. 2021, "LoRA"), and their files in the layout of Hugging Face's PEFT: a
//! folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! [`Llama::with_adapters`] freezes a model and adds adapters that change nothing yet; training then changes these alone.
//! [`save`] and [`Adapters`] write and read them, and [`Llama::merge_adapters`] or [`Adapters::merged`] make an ordinary
//! model of model and adapters. The frozen weights may be in any [`WeightFormat`](crate::WeightFormat).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::copy::{floats, on_threads};
use crate::formats::Weights;
use crate::init::Init;
use crate::modules::Adapter;
use crate::names::{file_name, model_path};
use crate::shard::Shard;
use crate::weights::{Streamed, TensorFile, save_streamed, write_atomic};
use crate::{Linear, Llama, LlamaBackend, ModelError};

/// Name of the file that describes the adapters.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the file with the adapters.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before a layer's name.
const PREFIX: &str = "base_model.model.";
/// The layers that can have adapters, by their names in Hugging Face's files.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which layers get adapters, and of what size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the product.
    pub rank: usize,
    /// The product is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Names of [`TARGETS`].
    pub targets: Vec<String>,
}

impl Default for LoraConfig {
    /// Rank 8, alpha 16, on all linear layers of the blocks.
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, targets: TARGETS.map(String::from).into() }
    }
}

impl LoraConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// [`ModelError::Config`].
    pub fn validate(&self) -> Result<(), ModelError> {
        let fail = |field, reason| Err(ModelError::Config { field, reason });
        if self.rank == 0 {
            return fail("lora.rank", "must be at least 1".into());
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return fail("lora.alpha", format!("must be above 0, not {}", self.alpha));
        }
        if let Some(name) = self.targets.iter().find(|name| !TARGETS.contains(&name.as_str())) {
            return fail("lora.targets", format!("has `{name}`; a block has {}", TARGETS.join(", ")));
        }
        if self.targets.is_empty() {
            return fail("lora.targets", format!("is empty; a block has {}", TARGETS.join(", ")));
        }
        Ok(())
    }
}

/// A layer's name in Hugging Face's files, without the parameter's.
fn stem(layer: usize, name: &str) -> String {
    let name = file_name(&format!("layers.{layer}.{name}.weight")).expect("linear layers have names in files");
    name.trim_end_matches(".weight").to_string()
}

impl<B: LlamaBackend> Llama<B> {
    /// The model with its parameters frozen and new adapters, which are drawn from `seed`. Their result is zero at first.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`], and [`ModelError::Config`] for a part of a model that is divided.
    pub fn with_adapters(self, config: &LoraConfig, seed: u64) -> Result<Self, ModelError> {
        config.validate()?;
        let device = self.device();
        let init = Init::new(Some(seed), self.layers.len(), Shard::WHOLE, &device);
        let scale = config.alpha / config.rank as f64;
        self.attach(|path, stem, linear| {
            let target = config.targets.iter().any(|target| stem.ends_with(&format!(".{target}")));
            Ok(target.then(|| Adapter::new(linear.dims(), config.rank, scale, &init.at(path))))
        })
    }

    /// The frozen model with the adapters that `make` gives for path, file name and layer.
    fn attach(
        self,
        mut make: impl FnMut(&str, &str, &Linear<B>) -> Result<Option<Adapter<B>>, ModelError>,
    ) -> Result<Self, ModelError> {
        if !self.team.is_alone() {
            let reason = "are for models that are whole on each device, and this one is divided".into();
            return Err(ModelError::Config { field: "adapters", reason });
        }
        let mut model = self.no_grad();
        for (layer, block) in model.layers.iter_mut().enumerate() {
            for (name, linear) in block.linears_mut() {
                linear.adapter = make(&format!("layers.{layer}.{name}"), &stem(layer, name), linear)?;
            }
        }
        Ok(model)
    }

    /// The model with its adapters added to its weights, which become f32 where there is one.
    #[must_use]
    pub fn merge_adapters(mut self) -> Self {
        for (_, linear) in self.layers.iter_mut().flat_map(|block| block.linears_mut()) {
            if let Some(adapter) = linear.adapter.take() {
                let weight = linear.dense().cast(burn::tensor::DType::F32) + adapter.delta();
                linear.quantized = None;
                linear.weight = Param::initialized(linear.weight.id, weight);
            }
        }
        self
    }
}

/// What PEFT's `adapter_config.json` says; it says more than we need.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    target_modules: serde_json::Value,
    #[serde(default = "none")]
    bias: String,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
}

fn none() -> String {
    "none".into()
}

impl PeftConfig {
    /// What is not plain LoRA on plain linear layers, if anything.
    fn unsupported(&self) -> Option<String> {
        let cases = [
            (self.peft_type != "LORA", format!("`peft_type` is {}, not LORA", self.peft_type)),
            (self.use_dora, "`use_dora` is set".into()),
            (self.bias != "none", format!("`bias` is `{}`; LLaMA has none", self.bias)),
            (self.fan_in_fan_out, "`fan_in_fan_out` is set".into()),
            (!self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty(), "ranks differ by layer".into()),
            (self.modules_to_save.as_ref().is_some_and(|names| !names.is_empty()), "`modules_to_save` is set".into()),
            (self.r == 0, "`r` is 0".into()),
            (!self.lora_alpha.is_finite(), format!("`lora_alpha` is {}", self.lora_alpha)),
        ];
        cases.into_iter().find_map(|(wrong, reason)| wrong.then_some(reason))
    }

    fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Writes a model's adapters as PEFT does, into a folder that exists. `base` names the model they belong to.
///
/// # Errors
/// [`ModelError::Io`].
pub fn save<B: LlamaBackend>(
    model: &Llama<B>,
    config: &LoraConfig,
    base: &str,
    folder: &Path,
) -> Result<(), ModelError> {
    let mut tensors = Vec::new();
    for (layer, block) in model.layers.iter().enumerate() {
        for (name, linear) in block.linears() {
            let Some(Adapter { a, b, .. }) = &linear.adapter else { continue };
            for (part, value) in [("lora_A", a.val()), ("lora_B", b.val())] {
                tensors.push(Streamed {
                    name: format!("{PREFIX}{}.{part}.weight", stem(layer, name)),
                    dims: value.dims().into(),
                    dtype: value.dtype(),
                    read: Box::new(move || Ok::<_, ModelError>(value.to_data())),
                });
            }
        }
    }
    save_streamed(&folder.join(WEIGHTS_FILE), tensors)?;
    let peft = PeftConfig {
        peft_type: "LORA".into(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(base.into()),
        r: config.rank,
        lora_alpha: config.alpha,
        lora_dropout: 0.0,
        target_modules: serde_json::json!(config.targets),
        bias: none(),
        fan_in_fan_out: false,
        use_rslora: false,
        use_dora: false,
        inference_mode: true,
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        modules_to_save: None,
    };
    let json = serde_json::to_string_pretty(&peft).expect("every field has a JSON form") + "\n";
    write_atomic(&folder.join(CONFIG_FILE), json.as_bytes())
}

/// Adapters on disk.
pub struct Adapters {
    path: PathBuf,
    rank: usize,
    scale: f64,
    file: TensorFile,
}

impl Adapters {
    /// Opens a folder in PEFT's layout.
    ///
    /// # Errors
    /// [`ModelError::Io`], and [`ModelError::Format`] for what is not LoRA on a LLaMA's linear layers.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|error| ModelError::io(&path, error))?;
        let config: PeftConfig = serde_json::from_str(&text).map_err(|error| ModelError::format(&path, error))?;
        if let Some(reason) = config.unsupported() {
            return Err(ModelError::format(&path, format!("{reason}; only plain LoRA is read")));
        }
        let file = TensorFile::open(&folder.join(WEIGHTS_FILE))?;
        for name in file.names() {
            let stem = name
                .strip_prefix(PREFIX)
                .and_then(|name| name.strip_suffix(".lora_A.weight").or_else(|| name.strip_suffix(".lora_B.weight")));
            if stem.and_then(|stem| model_path(&format!("{stem}.weight"))).is_none() {
                return Err(ModelError::UnexpectedTensor { path: folder.join(WEIGHTS_FILE), name });
            }
        }
        Ok(Self { path: folder.into(), rank: config.r, scale: config.scale(), file })
    }

    /// `A` and `B` of a layer, where it has an adapter.
    fn pair(&self, stem: &str, [d_out, d_in]: [usize; 2]) -> Result<Option<[TensorData; 2]>, ModelError> {
        let names = ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{stem}.{part}.weight"));
        let there = self.file.names();
        if !names.iter().any(|name| there.contains(name)) {
            return Ok(None);
        }
        let [a, b] = &names;
        Ok(Some([self.file.tensor(a, &[self.rank, d_in])?, self.file.tensor(b, &[d_out, self.rank])?]))
    }

    /// The frozen model with these adapters, for generation or more training.
    ///
    /// # Errors
    /// Those of reading them, and [`ModelError::UnexpectedTensor`] for layers that the model does not have.
    pub fn apply<B: LlamaBackend>(&self, model: Llama<B>) -> Result<Llama<B>, ModelError> {
        let device = model.device();
        let init = Init::new(Some(0), model.layers.len(), Shard::WHOLE, &device);
        let mut unused: BTreeSet<String> = self.file.names();
        let model = model.attach(|path, stem, linear| {
            let dims = linear.dims();
            let Some([a, b]) = self.pair(stem, dims)? else { return Ok(None) };
            unused.retain(|name| !name.starts_with(&format!("{PREFIX}{stem}.")));
            let adapter = Adapter::new(dims, self.rank, self.scale, &init.at(path));
            let value = |param: &Param<Tensor<B, 2>>, data: TensorData| {
                let tensor = Tensor::from_data(data.convert::<f32>(), &device).require_grad();
                Param::initialized(param.id, tensor)
            };
            Ok(Some(Adapter { a: value(&adapter.a, a), b: value(&adapter.b, b), scale: self.scale }))
        })?;
        match unused.pop_first() {
            Some(name) => Err(ModelError::UnexpectedTensor { path: self.path.join(WEIGHTS_FILE), name }),
            None => Ok(model),
        }
    }

    /// The weights of a checkpoint with these adapters added, one by one as they are asked for.
    pub fn merged<'a>(&'a self, base: &'a dyn Weights) -> Merged<'a> {
        Merged { adapters: self, base }
    }
}

/// A checkpoint's weights with adapters added.
pub struct Merged<'a> {
    adapters: &'a Adapters,
    base: &'a dyn Weights,
}

impl Weights for Merged<'_> {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let data = self.base.weight(path, dims)?;
        let (Some(name), &[d_out, d_in]) = (file_name(path), dims) else { return Ok(data) };
        let Some([a, b]) = self.adapters.pair(name.trim_end_matches(".weight"), [d_out, d_in])? else {
            return Ok(data);
        };
        let [a, b] = [a, b].map(floats);
        let mut weight = floats(data);
        let (rank, scale) = (self.adapters.rank, self.adapters.scale as f32);
        on_threads(|| {
            weight.par_chunks_exact_mut(d_in).zip(b.par_chunks_exact(rank)).for_each(|(row, b)| {
                for (b, a) in b.iter().zip(a.chunks_exact(d_in)) {
                    row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b * a);
                }
            });
        });
        Ok(TensorData::new(weight, [d_out, d_in]))
    }
}
