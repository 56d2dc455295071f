//! A conversation with an instruction-tuned model, in the form of its own template.
//!
//! ```sh
//! cargo run --release --example chat -- --model smollm2.gguf
//! echo "What is the capital of France?" | cargo run --release --example chat -- --model smollm2.gguf --temperature 0
//! ```
//!
//! `/new` begins a new conversation, the end of the input (Ctrl-D) ends the program.

mod common;

use std::io::BufRead;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use common::{ModelArgs, SamplingArgs, show};
use llama::model::ModelError;
use llama::model::generate::{GenerateOptions, Generated};
use llama::text::{self, Message};

/// A conversation with a model.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format whose tokenizer has a chat template
    #[arg(long)]
    model: PathBuf,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
    /// Tokens of an answer, at most
    #[arg(long, default_value_t = 512)]
    max_new_tokens: usize,
    /// Tokens of the conversation, at most
    #[arg(long, default_value_t = 4096)]
    context: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    loading: ModelArgs,
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

fn main() -> Result<()> {
    llama::model::tune_process();
    let args = Args::parse();
    let engine = common::open(&args.model, &args.loading)?;
    let codec = engine.codec();
    let system: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let mut messages = system.clone();
    // Different vocabularies end a turn in different ways.
    let ends = ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"];
    let stop_tokens: Vec<u32> = codec.eos.into_iter().chain(ends.iter().filter_map(|end| codec.special(end))).collect();
    // What was read of the conversation is not read again.
    let mut session = engine.session(args.context.min(engine.config().max_seq_len))?;
    show("> ")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "/new" {
            messages = system.clone();
        } else if !line.trim().is_empty() {
            messages.push(Message::new("user", line));
            let prompt = text::chat_prompt(codec, &messages)?;
            let options = GenerateOptions {
                max_new_tokens: args.max_new_tokens,
                sampling: args.sampling.sampling(),
                seed: args.sampling.seed + messages.len() as u64,
                stop_tokens: stop_tokens.clone(),
                ..Default::default()
            };
            let mut stream = codec.stream(true);
            let mut answer = String::new();
            for step in session.generate(prompt, options)? {
                let tokens = match step {
                    Err(ModelError::CacheFull { .. }) => {
                        show("\n(the context is full; /new begins a new conversation)")?;
                        break;
                    }
                    step => step?,
                };
                for Generated { token, .. } in tokens.into_iter().flatten() {
                    let new = stream.push(token);
                    show(&new)?;
                    answer.push_str(&new);
                }
            }
            let rest = stream.finish();
            show(&rest)?;
            messages.push(Message::new("assistant", answer + &rest));
            println!();
        }
        show("> ")?;
    }
    println!();
    Ok(())
}
