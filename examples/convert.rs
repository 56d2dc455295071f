//! Converts a checkpoint between formats: Hugging Face, Meta, GGUF (llama.cpp) and llama2.c. One tensor is in memory at a
//! time.
//!
//! ```sh
//! cargo run --release --example convert -- runs/tiny tiny.gguf --type q8_0
//! cargo run --release --example convert -- smollm2.gguf smollm2 --to hf --type bf16
//! cargo run --release --example convert -- smollm2.gguf mine.gguf --adapter runs/mine     # with what `finetune` made
//! ```

mod common;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use clap::Parser;
use common::Bar;
use llama::data::Progress;
use llama::model::ModelError;
use llama::model::formats::{self, Checkpoint, Extras, FileType, Format, Weights};
use llama::model::lora::Adapters;
use llama::{engine, text};

/// Converts a checkpoint between formats.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format, or a run folder: its newest checkpoint
    from: PathBuf,
    /// The file or folder to write
    to: PathBuf,
    /// Format to write: hf, meta, gguf or llama2c; by default what the name to write ends in, else hf
    #[arg(long = "to")]
    format: Option<Format>,
    /// Type of matrices: f32, f16 or bf16; in GGUF also q8_0 and q4_0
    #[arg(long = "type", default_value = "f32")]
    dtype: FileType,
    /// Adds adapters to the weights: a folder in PEFT's layout, or a run of `finetune`
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Tokenizer, where the checkpoint has none beside it
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

/// Shows how far it is.
struct Shown<'a> {
    weights: &'a dyn Weights,
    bar: &'a Bar,
}

impl Weights for Shown<'_> {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<burn::tensor::TensorData, ModelError> {
        self.bar.advance(dims.iter().product::<usize>() as u64);
        self.weights.weight(path, dims)
    }
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

fn main() -> Result<()> {
    llama::model::tune_process();
    let args = Args::parse();
    let from = common::checkpoint_path(&args.from)?;
    let checkpoint = Checkpoint::open(&from)?;
    let format = args.format.unwrap_or(match args.to.extension().and_then(|extension| extension.to_str()) {
        Some("gguf") => Format::Gguf,
        Some("bin") => Format::Llama2c,
        _ => Format::HuggingFace,
    });
    if args.to == from {
        bail!("{} would be written over itself", from.display());
    }
    let codec = text::codec(args.tokenizer.as_deref().unwrap_or(&from));
    let files = tokenizer_files(args.tokenizer.as_deref().unwrap_or(&from));
    let mut extras = Extras { gguf: Vec::new(), files: files.iter().map(PathBuf::as_path).collect() };
    if format == Format::Gguf {
        // A GGUF file without a vocabulary is of no use to llama.cpp.
        extras.gguf =
            text::gguf_metadata(codec.as_ref().map_err(|error| anyhow!("{error}"))?).map_err(anyhow::Error::msg)?;
    }
    let adapters = args.adapter.as_deref().map(|path| Adapters::open(&engine::adapter_path(path))).transpose()?;
    let merged = adapters.as_ref().map(|adapters| adapters.merged(&checkpoint));
    let weights: &dyn Weights = merged.as_ref().map_or(&checkpoint, |merged| merged);
    let bar = Bar::default();
    bar.start(&format!("writing {}", args.to.display()), Some(checkpoint.config().num_params()));
    formats::save(&Shown { weights, bar: &bar }, checkpoint.config(), &args.to, format, args.dtype, &extras)?;
    bar.finish();
    // A vocabulary that came inside a file gets files of its own.
    if let (Format::HuggingFace, true, Ok(codec)) = (format, files.is_empty(), &codec) {
        codec.save(&args.to)?;
    }
    println!("{} ({format}, {})", args.to.display(), args.dtype);
    Ok(())
}

/// The files of a tokenizer, or those in a folder.
fn tokenizer_files(path: &Path) -> Vec<PathBuf> {
    let names = [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ];
    let is_tokenizer = |file: &PathBuf| file.file_name().is_some_and(|name| names.iter().any(|n| *n == name));
    if path.is_file() {
        return [path.to_path_buf()].into_iter().filter(is_tokenizer).collect();
    }
    names.iter().map(|name| path.join(name)).filter(|file| file.is_file()).collect()
}
