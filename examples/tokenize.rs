//! Trains tokenizers, shows what they do, and writes token shards.
//!
//! ```sh
//! cargo run --release --example tokenize -- train --text my.txt --vocab-size 8000 --out tokenizer.model
//! cargo run --release --example tokenize -- encode --tokenizer tokenizer.model "Hello, world 42"
//! cargo run --release --example tokenize -- shards --text my.txt --tokenizer tokenizer.model --out data
//! cargo run --release --example tokenize -- inspect data/train-00000.bin --tokenizer tokenizer.model
//! ```

mod common;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use llama::data::prepare::{PrepareOptions, prepare, train_tokenizer};
use llama::data::shard::Shard;
use llama::data::tokenizer::{Codec, PIECES_FILE, Tokenizer, TrainOptions};
use llama::text;

/// Trains tokenizers, shows what they do, and writes token shards.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Text {
    /// Files or folders with text (.txt, .md, .jsonl, also .gz and .zst, .parquet) [default: the Rust sources of this project's
    /// dependencies]
    #[arg(long, num_args = 1..)]
    text: Vec<PathBuf>,
    /// File endings to take from folders
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    extensions: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a tokenizer
    Train {
        #[command(flatten)]
        text: Text,
        /// Pieces in all
        #[arg(long, default_value_t = 32_000)]
        vocab_size: usize,
        /// Share of the text's characters that get a piece; the rarest are left to bytes
        #[arg(long, default_value_t = TrainOptions::default().character_coverage)]
        character_coverage: f64,
        /// Text to train on, in MB, taken evenly
        #[arg(long, default_value_t = 64)]
        max_mb: u64,
        /// File to write; SentencePiece reads it too
        #[arg(long, default_value = PIECES_FILE)]
        out: PathBuf,
    },
    /// Shows the tokens of a text
    Encode {
        /// tokenizer.model, tokenizer.json, a model folder or a GGUF file [default: bytes]
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// A file of lines, whose ids are written as lines, instead of a text
        #[arg(long)]
        lines: Option<PathBuf>,
        /// The text
        #[arg(required_unless_present = "lines")]
        text: Option<String>,
    },
    /// Writes a tokenizer as Hugging Face's files: tokenizer.json, and tokenizer.model where it is SentencePiece's
    Export {
        /// tokenizer.model, tokenizer.json, a model folder or a GGUF file
        #[arg(long)]
        tokenizer: PathBuf,
        /// Folder to write to
        #[arg(long)]
        out: PathBuf,
    },
    /// Writes token shards for pretraining
    Shards {
        #[command(flatten)]
        text: Text,
        /// tokenizer.model, tokenizer.json, a model folder or a GGUF file [default: bytes]
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Share of the text held out for validation
        #[arg(long, default_value_t = 0.005)]
        valid_fraction: f64,
        /// Folder to write to; the tokenizer is put beside the shards
        #[arg(long, default_value = "data")]
        out: PathBuf,
    },
    /// Verifies a shard and shows its beginning
    Inspect {
        /// The shard
        shard: PathBuf,
        /// The folder of the shard, or as above [default: bytes]
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Tokens to show
        #[arg(long, default_value_t = 64)]
        tokens: u64,
    },
}

fn main() -> Result<()> {
    let bar = common::Bar::default();
    match Cli::parse().command {
        Command::Train { text, vocab_size, character_coverage, max_mb, out } => {
            let sources = common::sources(&text.text, &text.extensions)?;
            let options = TrainOptions { vocab_size, character_coverage, ..Default::default() };
            let tokenizer = train_tokenizer(&sources, &options, max_mb << 20, &bar)?;
            tokenizer.save(&out)?;
            println!("{}: {} pieces", out.display(), tokenizer.vocab_size());
        }
        Command::Export { tokenizer, out } => {
            std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
            text::codec(&tokenizer)?.save(&out)?;
        }
        Command::Encode { tokenizer, lines, text } => {
            let codec = codec(tokenizer)?;
            if let Some(file) = lines {
                let lines = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
                let ids = lines.lines().map(|line| codec.encode(line));
                let line = |ids: Vec<u32>| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ") + "\n";
                common::show(&ids.map(line).collect::<String>())?;
            }
            if let Some(text) = text {
                let ids = codec.encode(&text);
                for &id in &ids {
                    println!("{id:>6}  {:?}", codec.decode_piece(id));
                }
                println!("{} tokens for {} bytes", ids.len(), text.len());
            }
        }
        Command::Shards { text, tokenizer, valid_fraction, out } => {
            let tokenizer = codec(tokenizer)?.install(&out)?;
            let sources = common::sources(&text.text, &text.extensions)?;
            let options = PrepareOptions { valid_fraction, ..Default::default() };
            let report = prepare(&sources, &tokenizer, &out, &options, &bar)?;
            println!(
                "{}: {} documents, {} bytes, {} training and {} validation tokens",
                out.display(),
                report.documents,
                report.bytes,
                report.train_tokens,
                report.valid_tokens
            );
            report.skipped.iter().for_each(|path| println!("passed over, not UTF-8: {}", path.display()));
        }
        Command::Inspect { shard, tokenizer, tokens } => {
            let tokenizer = codec(tokenizer)?;
            let shard = Shard::open(&shard)?;
            shard.verify()?;
            println!(
                "{} tokens in {} documents, vocabulary {}",
                shard.tokens(),
                shard.documents().len(),
                shard.vocab_size()
            );
            if shard.tokenizer() != tokenizer.fingerprint() {
                println!("made with another tokenizer ({:016x}): the text below is not the shard's", shard.tokenizer());
            }
            let mut ids = Vec::new();
            shard.read(0, tokens.min(shard.tokens()), |id| ids.push(id));
            println!("{}", tokenizer.decode(&ids));
        }
    }
    Ok(())
}

/// The tokenizer that is named, or bytes.
fn codec(path: Option<PathBuf>) -> Result<Codec> {
    Ok(path.map_or_else(|| Ok(Tokenizer::bytes().into()), |path| text::codec(&path))?)
}
