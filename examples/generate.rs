//! Generates text with a trained model, token by token. The model may be a run of `pretrain`, a Hugging Face or Meta
//! folder, a GGUF file or one of llama2.c.
//!
//! ```sh
//! cargo run --release --example generate -- --model runs/tiny --prompt "fn main() {"
//! cargo run --release --example generate -- --model smollm2.gguf --prompt "The capital of France is"
//! ```
#![recursion_limit = "256"]

mod common;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use common::{Loaded, show};
use llama::data::tokenizer::CodecStream;
use llama::model::generate::{GenerateOptions, Generation, Sampling};
use llama::model::{BackendTask, Device, TrainBackend, WeightFormat};

/// Generates text with a trained model.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format, or a run folder: its newest checkpoint
    #[arg(long, default_value = "runs/tiny")]
    model: PathBuf,
    /// Tokenizer, where the checkpoint has none beside it: tokenizer.model or tokenizer.json
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// How the text begins; several make a batch
    #[arg(long, num_args = 1.., default_values_t = [String::new()])]
    prompt: Vec<String>,
    /// Tokens to generate, at most
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Keeps the k most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Keeps the most likely tokens up to this probability
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Above 1 makes tokens that occurred less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// How matrices are kept in memory: f32, bf16 or q8 (8 bits in blocks of 32); fewer bytes decode faster
    #[arg(long, default_value = "f32")]
    weights: WeightFormat,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to compute
    #[arg(long, default_value = "flex", help = format!("Where to compute: {}", Device::choices().join(", ")))]
    device: String,
}

fn main() -> Result<()> {
    llama::model::keep_freed_memory();
    let args = Args::parse();
    let device: Device = args.device.parse()?;
    device.run(Generate(args))?
}

struct Generate(Args);

impl BackendTask for Generate {
    type Output = Result<()>;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<()> {
        let Self(args) = self;
        let Loaded { model, config, codec } =
            common::load::<B::InnerBackend>(&args.model, args.tokenizer.as_deref(), args.weights, &device)?;
        let prompts: Vec<Vec<u32>> = args.prompt.iter().map(|prompt| codec.encode_prompt(prompt)).collect();
        let options = GenerateOptions {
            max_new_tokens: args.max_new_tokens,
            sampling: Sampling {
                repetition_penalty: args.repetition_penalty,
                temperature: args.temperature,
                top_k: args.top_k,
                top_p: Some(args.top_p),
            },
            seed: args.seed,
            stop_tokens: codec.eos.into_iter().collect(),
        };
        let start = Instant::now();
        let generation = Generation::new(&model, &config, &prompts, options, &device)?;
        let mut tokens = 0;
        // A single text appears as it is made; several are shown when they are done.
        let mut texts = vec![String::new(); prompts.len()];
        let mut streams: Vec<CodecStream> = prompts.iter().map(|_| codec.stream(false)).collect();
        for (text, (stream, prompt)) in texts.iter_mut().zip(streams.iter_mut().zip(&prompts)) {
            text.extend(prompt.iter().map(|&id| stream.push(id)));
        }
        let alone = prompts.len() == 1;
        if alone {
            show(&texts[0])?;
        }
        for step in generation {
            for ((text, stream), token) in texts.iter_mut().zip(&mut streams).zip(step?) {
                if let Some(token) = token {
                    let new = stream.push(token);
                    tokens += 1;
                    if alone {
                        show(&new)?;
                    }
                    text.push_str(&new);
                }
            }
        }
        for (text, stream) in texts.iter_mut().zip(streams) {
            let rest = stream.finish();
            if alone {
                show(&rest)?;
            }
            text.push_str(&rest);
        }
        if alone {
            println!();
        } else {
            texts.iter().for_each(|text| println!("----\n{text}"));
        }
        eprintln!("{tokens} tokens, {:.0} tokens/s", tokens as f64 / start.elapsed().as_secs_f64());
        Ok(())
    }
}
