//! Hugging Face model folders: `config.json` and `model.safetensors`. What is trained here is saved as one.

use std::path::Path;

use burn::tensor::TensorData;
use serde_json::{Value, json};

use crate::formats::{Checkpoint, Format};
use crate::weights;
use crate::{Llama, LlamaBackend, LlamaConfig, ModelError, RopeScaling, WeightFormat};

/// Name of the configuration in a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights in a model folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Reads the model in a folder: its configuration and its weights.
///
/// # Errors
/// If a file is missing, is not what it should be or does not fit the configuration.
pub fn load<B: LlamaBackend>(folder: &Path, device: &B::Device) -> Result<(Llama<B>, LlamaConfig), ModelError> {
    let checkpoint = Checkpoint::open_as(Format::HuggingFace, folder)?;
    Ok((checkpoint.load(WeightFormat::F32, device, |_| ())?, checkpoint.config().clone()))
}

/// Writes a model folder, each file atomically.
///
/// # Errors
/// [`ModelError::Io`].
pub fn save<B: LlamaBackend>(model: &Llama<B>, config: &LlamaConfig, folder: &Path) -> Result<(), ModelError> {
    save_whole(model, config, folder, |_, part| Ok(part))
}

/// As [`save`], for a model that may be divided; see [`weights::save_whole`].
///
/// # Errors
/// As there.
pub fn save_whole<B: LlamaBackend, E: From<ModelError>>(
    model: &Llama<B>,
    config: &LlamaConfig,
    folder: &Path,
    whole: impl Fn(&str, TensorData) -> Result<TensorData, E>,
) -> Result<(), E> {
    std::fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))?;
    weights::save_whole(model, model.team().shard(), &folder.join(WEIGHTS_FILE), whole)?;
    let json = format!("{:#}\n", to_json(config));
    Ok(weights::write_atomic(&folder.join(CONFIG_FILE), json.as_bytes())?)
}

/// Reads a `config.json`, of transformers 5 (`rope_parameters`) or older (`rope_theta`, `rope_scaling`).
///
/// # Errors
/// [`ModelError::Format`] names the field that is missing, unknown to LLaMA or out of range.
pub fn load_config(path: &Path) -> Result<LlamaConfig, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|error| ModelError::io(path, error))?;
    let json: Value = serde_json::from_str(&text).map_err(|error| ModelError::format(path, error))?;
    let config = from_json(&json).map_err(|reason| ModelError::format(path, reason))?;
    config.validate()?;
    Ok(config)
}

fn from_json(json: &Value) -> Result<LlamaConfig, String> {
    let size = |key: &str| -> Result<usize, String> {
        json[key].as_u64().map(|n| n as usize).ok_or_else(|| format!("`{key}` is missing or not a whole number"))
    };
    let size_or = |key: &str, default: usize| if json[key].is_null() { Ok(default) } else { size(key) };
    match json["model_type"].as_str() {
        Some("llama") => {}
        other => return Err(format!("`model_type` is {other:?}, only \"llama\" is read")),
    }
    for key in ["attention_bias", "mlp_bias"] {
        if json[key].as_bool() == Some(true) {
            return Err(format!("`{key}` is true, LLaMA has no biases"));
        }
    }
    if let Some(act) = json["hidden_act"].as_str().filter(|act| *act != "silu") {
        return Err(format!("`hidden_act` is \"{act}\", LLaMA uses \"silu\""));
    }
    let n_heads = size("num_attention_heads")?;
    let d_model = size("hidden_size")?;
    // transformers 5 keeps base and scaling together, older versions side by side.
    let rope = if json["rope_parameters"].is_object() { &json["rope_parameters"] } else { &json["rope_scaling"] };
    let rope_theta = [&rope["rope_theta"], &json["rope_theta"]].into_iter().find_map(Value::as_f64).unwrap_or(10_000.0);
    Ok(LlamaConfig {
        d_model,
        n_layers: size("num_hidden_layers")?,
        n_heads,
        n_kv_heads: size_or("num_key_value_heads", n_heads)?,
        head_dim: size_or("head_dim", d_model / n_heads.max(1))?,
        d_ff: size("intermediate_size")?,
        vocab_size: size("vocab_size")?,
        max_seq_len: size_or("max_position_embeddings", 2048)?,
        norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
        rope_theta,
        rope_scaling: rope_scaling(rope)?,
        tied_head: json["tie_word_embeddings"].as_bool().unwrap_or(false),
    })
}

fn rope_scaling(rope: &Value) -> Result<Option<RopeScaling>, String> {
    let number = |key: &str| rope[key].as_f64().ok_or_else(|| format!("rope scaling lacks `{key}`"));
    // Old files call the field `type`.
    match rope["rope_type"].as_str().or(rope["type"].as_str()) {
        None | Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_seq_len: number("original_max_position_embeddings")? as usize,
        })),
        Some(other) => Err(format!("rope type \"{other}\" is unknown; default, linear and llama3 are read")),
    }
}

/// The configuration in the form that every version of transformers reads.
pub(crate) fn to_json(config: &LlamaConfig) -> Value {
    let scaling = match &config.rope_scaling {
        None => Value::Null,
        Some(RopeScaling::Linear { factor }) => json!({ "rope_type": "linear", "factor": factor }),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq_len }) => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_seq_len,
        }),
    };
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "torch_dtype": "float32",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_round_trip() {
        let base = LlamaConfig::tiny(300);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_seq_len: 8192,
        };
        for rope_scaling in [None, Some(RopeScaling::Linear { factor: 4.0 }), Some(llama3)] {
            let config = LlamaConfig { rope_scaling, ..base.clone() };
            assert_eq!(from_json(&to_json(&config)).unwrap(), config);
        }
    }

    #[test]
    fn what_is_not_llama_is_refused() {
        let good = to_json(&LlamaConfig::tiny(300));
        for (key, value) in [
            ("model_type", json!("mistral")),
            ("attention_bias", json!(true)),
            ("hidden_act", json!("gelu")),
            ("hidden_size", json!("wide")),
            ("rope_scaling", json!({ "rope_type": "yarn" })),
            ("rope_scaling", json!({ "rope_type": "linear" })),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            assert!(from_json(&bad).is_err(), "{key} was accepted");
        }
    }
}
