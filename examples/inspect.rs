//! What is in a checkpoint, without loading it: architecture, parameters, memory, tokenizer and every tensor.
//!
//! ```sh
//! cargo run --release --example inspect -- model.gguf
//! cargo run --release --example inspect -- folder --tensors
//! ```

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use llama::model::formats::{Checkpoint, TensorInfo};
use llama::model::{RopeScaling, WeightFormat};
use llama::text;

/// Shows what is in a checkpoint of any format.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint, or a run folder: its newest checkpoint
    model: PathBuf,
    /// Lists every tensor
    #[arg(long)]
    tensors: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = common::checkpoint_path(&args.model)?;
    let checkpoint = Checkpoint::open(&path)?;
    let config = checkpoint.config();
    let mut out = String::new();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<24}{value}").unwrap_or_default();
    line("path", path.display().to_string());
    line("format", checkpoint.format().to_string());
    line("parameters", format!("{} ({:.2}M)", config.num_params(), config.num_params() as f64 / 1e6));
    line("layers x width", format!("{} x {}", config.n_layers, config.d_model));
    let heads = (config.n_heads, config.n_kv_heads, config.head_dim);
    line("heads", format!("{} of {}, {} for keys and values", heads.0, heads.2, heads.1));
    line("feed-forward width", config.d_ff.to_string());
    line("vocabulary", format!("{}{}", config.vocab_size, if config.tied_head { ", tied head" } else { "" }));
    line("context", config.max_seq_len.to_string());
    line("norm epsilon", format!("{:e}", config.norm_eps));
    let scaling = match &config.rope_scaling {
        None => String::new(),
        Some(RopeScaling::Linear { factor }) => format!(", stretched {factor} times"),
        Some(RopeScaling::Llama3 { factor, .. }) => format!(", LLaMA 3's scaling by {factor}"),
    };
    line("rotary base", format!("{}{scaling}", config.rope_theta));
    match text::codec(&path) {
        Ok(codec) => {
            let kind = if codec.sentence_piece().is_some() { "SentencePiece" } else { "byte-level BPE" };
            let chat = if codec.chat_template.is_some() { ", chat template" } else { "" };
            line("tokenizer", format!("{kind}, {} tokens{chat}", codec.vocab_size()));
        }
        Err(error) => line("tokenizer", error.to_string()),
    }
    let tensors = checkpoint.tensors();
    let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for tensor in &tensors {
        let (count, bytes) = types.entry(&tensor.dtype).or_default();
        *count += 1;
        *bytes += tensor.bytes;
    }
    for (dtype, (count, bytes)) in types {
        line("tensors", format!("{count} of {dtype}, {:.1} MB", bytes as f64 / 1e6));
    }
    let gigabytes = |per_weight: f64| format!("{:.2} GB", config.num_params() as f64 * per_weight / 1e9);
    let formats =
        WeightFormat::ALL.iter().map(|format| format!("{} in {format}", gigabytes(format.bytes_per_weight())));
    line("memory for weights", formats.collect::<Vec<_>>().join(", "));
    let cache = (2 * config.n_layers * config.d_kv()) as f64 / 1e3;
    line("memory for the cache", format!("{:.1} KB a token in f32, {:.1} in f16", 4.0 * cache, 2.0 * cache));
    line("memory to train", format!("{} for weights, gradients and moments", gigabytes(16.0)));
    if args.tensors {
        writeln!(out, "\n{:<52} {:<10} {:<18} bytes", "tensor", "type", "shape")?;
        for TensorInfo { name, dims, dtype, bytes } in &tensors {
            writeln!(out, "{name:<52} {dtype:<10} {:<18} {bytes}", format!("{dims:?}"))?;
        }
    }
    match common::show(&out) {
        // Whoever reads the output may have seen enough.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        result => result,
    }
}
