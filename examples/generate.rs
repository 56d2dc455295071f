//! Generates text with a trained model, token by token. The model may be a run of `pretrain`, a Hugging Face or Meta
//! folder, a GGUF file or one of llama2.c.
//!
//! ```sh
//! cargo run --release --example generate -- --model runs/tiny --prompt "fn main() {"
//! cargo run --release --example generate -- --model smollm2.gguf --prompt "The capital of France is"
//! ```

mod common;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use common::{ModelArgs, SamplingArgs, show};
use llama::data::tokenizer::Codec;
use llama::model::generate::{GenerateOptions, Generated};
use llama::text::TextStream;

/// Generates text with a trained model.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format, or a run folder: its newest checkpoint
    #[arg(long, default_value = "runs/tiny")]
    model: PathBuf,
    /// How the text begins; several make a batch
    #[arg(long, num_args = 1.., default_values_t = [String::new()])]
    prompt: Vec<String>,
    /// Tokens to generate, at most
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    /// Text that ends the generation; may be given several times
    #[arg(long)]
    stop: Vec<String>,
    /// Shows each token with its log-probability instead of the text
    #[arg(long)]
    log_probs: bool,
    /// A smaller checkpoint with the same vocabulary that guesses ahead (speculative decoding)
    #[arg(long)]
    draft: Option<PathBuf>,
    /// Tokens that the smaller checkpoint guesses at a time
    #[arg(long, default_value_t = 4)]
    guesses: usize,
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
    let prompts: Vec<Vec<u32>> = args.prompt.iter().map(|prompt| codec.encode_prompt(prompt)).collect();
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampling: args.sampling.sampling(),
        seed: args.sampling.seed,
        stop_tokens: codec.eos.into_iter().collect(),
        log_probs: args.log_probs,
        ..Default::default()
    };
    let draft = args.draft.as_ref().map(|path| common::open_draft(path, &args.loading)).transpose()?;
    let start = Instant::now();
    let mut shown = Shown::new(codec, &prompts, &args);
    shown.begin()?;
    match (&draft, &prompts[..]) {
        (Some(draft), [prompt]) => {
            for new in engine.speculate(draft, args.guesses, prompt.clone(), options)? {
                for new in new? {
                    shown.push(0, new)?;
                }
                if shown.stopped() {
                    break;
                }
            }
        }
        (Some(_), _) => bail!("a draft guesses for one prompt at a time"),
        (None, _) => {
            for step in engine.generate(&prompts, options)? {
                for (row, new) in step?.into_iter().enumerate() {
                    if let Some(new) = new {
                        shown.push(row, new)?;
                    }
                }
                if shown.stopped() {
                    break;
                }
            }
        }
    }
    let tokens = shown.finish()?;
    eprintln!("{tokens} tokens, {:.0} tokens/s", tokens as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

/// What is on the terminal. A single text appears as it is made; several are shown when they are done.
struct Shown<'a> {
    codec: &'a Codec,
    texts: Vec<String>,
    streams: Vec<TextStream<'a>>,
    tokens: usize,
}

impl<'a> Shown<'a> {
    fn new(codec: &'a Codec, prompts: &[Vec<u32>], args: &Args) -> Self {
        let texts: Vec<String> = prompts.iter().map(|prompt| codec.decode(prompt)).collect();
        let stream = |text: &String| TextStream::new(codec, !text.is_empty(), args.stop.clone());
        Self { codec, streams: texts.iter().map(stream).collect(), texts, tokens: 0 }
    }

    fn alone(&self) -> bool {
        self.texts.len() == 1
    }

    fn begin(&self) -> Result<()> {
        if self.alone() { show(&self.texts[0]) } else { Ok(()) }
    }

    fn push(&mut self, row: usize, new: Generated) -> Result<()> {
        if self.streams[row].stopped() {
            return Ok(());
        }
        self.tokens += 1;
        let mut text = self.streams[row].push(new.token);
        if let Some(log_prob) = new.log_prob {
            text = format!("\n{log_prob:9.4}  {:6}  {:?}", new.token, self.codec.decode_piece(new.token));
        }
        if self.alone() {
            show(&text)?;
        }
        self.texts[row].push_str(&text);
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.streams.iter().all(TextStream::stopped)
    }

    /// The number of tokens that were generated.
    fn finish(self) -> Result<usize> {
        let alone = self.alone();
        for (mut text, stream) in self.texts.into_iter().zip(self.streams) {
            let rest = stream.finish();
            text.push_str(&rest);
            if alone {
                show(&format!("{rest}\n"))?;
            } else {
                show(&format!("----\n{text}\n"))?;
            }
        }
        Ok(self.tokens)
    }
}
