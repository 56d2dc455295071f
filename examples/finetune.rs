//! Fine-tunes a checkpoint of any format, by low-rank adapters (LoRA) or all its weights, on conversations, instructions or text.
//!
//! ```sh
//! cargo run --release --example finetune -- --model smollm2.gguf --data mine.jsonl --run runs/mine
//! cargo run --release --example finetune -- --run runs/mine --resume
//! cargo run --release --example chat -- --model smollm2.gguf --adapter runs/mine
//! cargo run --release --example finetune -- --model smollm2.gguf --data mine.jsonl --run runs/whole --full
//! cargo run --release --example chat -- --model runs/whole
//! ```

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use common::{Bar, DeviceArgs};
use llama::data::examples::ExampleSet;
use llama::data::loader::Sequences;
use llama::model::formats::Checkpoint;
use llama::model::{Device, Precision, Recompute, WeightFormat};
use llama::train::{Display, FinetuneConfig, FinetuneData, checkpoint};
use llama::{Devices, RunOptions, engine, finetune, instruct, text};

/// Fine-tunes a checkpoint by low-rank adapters, or all its weights.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format, or a run of `pretrain`
    #[arg(long, required_unless_present = "resume")]
    model: Option<PathBuf>,
    /// JSON lines with `messages`, with `instruction` and `output`, with `prompt` and `completion` or with `text`; or text
    #[arg(long, num_args = 1.., required_unless_present = "resume")]
    data: Vec<PathBuf>,
    /// Folder for checkpoints and results
    #[arg(long)]
    run: PathBuf,
    /// Goes on from the newest checkpoint of the run, with the configuration saved in it
    #[arg(long)]
    resume: bool,
    /// Trains all weights, instead of adapters
    #[arg(long, conflicts_with_all = ["rank", "alpha", "targets", "weights"])]
    full: bool,
    /// Rank of the adapters
    #[arg(long)]
    rank: Option<usize>,
    /// Their factor, times the rank
    #[arg(long)]
    alpha: Option<f64>,
    /// Layers with adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    targets: Vec<String>,
    /// How the frozen matrices are kept: f32, bf16, f16, q8 or q4
    #[arg(long, default_value = "f32")]
    weights: WeightFormat,
    /// Precision of the products: f32, bf16 or f16
    #[arg(long)]
    precision: Option<Precision>,
    /// What a block keeps for its backward with --full: none (all is kept), selective, or full (least memory)
    #[arg(long, requires = "full")]
    recompute: Option<Recompute>,
    /// Passes over the examples
    #[arg(long, default_value_t = 3.0)]
    epochs: f64,
    /// Optimizer steps, instead of passes
    #[arg(long)]
    steps: Option<u64>,
    /// Tokens of a sequence, into which short examples are packed
    #[arg(long)]
    seq_len: Option<usize>,
    /// Sequences of a micro-batch
    #[arg(long)]
    sequences: Option<usize>,
    /// Micro-batches of a step
    #[arg(long)]
    accumulation: Option<usize>,
    /// Peak learning rate
    #[arg(long)]
    lr: Option<f64>,
    /// Share of the examples held out for validation
    #[arg(long, default_value_t = 0.05)]
    valid_fraction: f64,
    /// Seed of adapters and order
    #[arg(long)]
    seed: Option<u64>,
    /// Tokenizer, where the checkpoint has none beside it
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Devices that divide a model among them with --full, each with a part of every block, instead of sharing micro-batches
    #[arg(long, default_value_t = 1)]
    tensor_parallel: usize,
    /// Steps between lines
    #[arg(long, default_value_t = 1)]
    log_every: usize,
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

fn main() -> Result<()> {
    llama::model::tune_process();
    let args = Args::parse();
    let devices = Devices { tensor_parallel: args.tensor_parallel, ..args.devices.devices()? };
    let newest = checkpoint::latest(&args.run);
    let (config, resume_from) = match (args.resume, newest) {
        (true, newest) => {
            let newest = newest?;
            let mut config = FinetuneConfig::of_checkpoint(&newest)?;
            config.run.folder = args.run.clone();
            println!("resuming from {}", newest.display());
            (config, Some(newest))
        }
        (false, Ok(newest)) if devices.lead() => bail!(
            "{} is a run with a checkpoint ({}): go on with --resume, or name another folder with --run",
            args.run.display(),
            newest.display()
        ),
        (false, _) => (configuration(&args, devices.devices[0])?, None),
    };
    // A whole model has its tokenizer beside it.
    let own = resume_from.as_ref().filter(|_| config.lora.is_none());
    let codec = text::codec(args.tokenizer.as_ref().or(own).unwrap_or(&config.base))?;
    let (train, valid) = examples(&args, &config, &codec)?;
    let config = match resume_from {
        Some(_) => config,
        None => with_steps(&args, config, train.sequences()),
    };
    config.validate()?;
    let trained = match &config.lora {
        Some(lora) => {
            let (weights, rank, targets) = (&config.weights, lora.rank, lora.targets.join(", "));
            format!(" in {weights}, frozen; adapters of rank {rank} on {targets}")
        }
        None => ", all trained".into(),
    };
    let (parameters, steps) = (config.model.num_params(), config.schedule.steps);
    println!("model: {parameters} parameters{trained}; {steps} steps on {devices}");
    let display = Display::Lines { out: Box::new(std::io::stdout()), every: args.log_every };
    let (bar, interrupter) = (Bar::default(), common::interrupter()?);
    let options = RunOptions { resume_from: resume_from.as_deref(), display, progress: &bar, interrupter };
    let start = Instant::now();
    let report = finetune(&config, &FinetuneData { train, valid, codec: &codec }, &devices, options)?;
    println!("trained for {:.0} s", start.elapsed().as_secs_f64());
    if devices.lead() {
        common::print_report(&report, if config.lora.is_some() { "adapters" } else { "model" });
    }
    Ok(())
}

/// The defaults for the model, with what the command line says. Steps follow from the examples.
fn configuration(args: &Args, device: Device) -> Result<FinetuneConfig> {
    let base = common::checkpoint_path(args.model.as_ref().context("--model names the checkpoint")?)?;
    let checkpoint = Checkpoint::open(&base)?;
    let new = if args.full { FinetuneConfig::of_all_weights } else { FinetuneConfig::new };
    let mut config = new(&base, checkpoint.config(), args.data.clone(), &args.run);
    if let Some(lora) = &mut config.lora {
        common::set(&mut lora.rank, &args.rank);
        common::set(&mut lora.alpha, &args.alpha);
        if !args.targets.is_empty() {
            lora.targets = args.targets.clone();
        }
    }
    common::set(&mut config.compute.recompute, &args.recompute);
    common::set(&mut config.batch.seq_len, &args.seq_len);
    common::set(&mut config.batch.sequences, &args.sequences);
    common::set(&mut config.batch.accumulation, &args.accumulation);
    common::set(&mut config.schedule.peak_lr, &args.lr);
    common::set(&mut config.seed, &args.seed);
    config.weights = args.weights.to_string();
    config.compute.precision = match args.precision {
        Some(precision) => precision,
        None => engine::suitable_precision(args.weights, device)?,
    };
    Ok(config)
}

/// The configuration with the steps that the passes take.
fn with_steps(args: &Args, mut config: FinetuneConfig, sequences: u64) -> FinetuneConfig {
    let per_step = (config.batch.sequences * config.batch.accumulation) as f64;
    let passes = (args.epochs * sequences as f64 / per_step).ceil().max(1.0) as u64;
    config.schedule.steps = args.steps.unwrap_or(passes);
    config.schedule.warmup_steps = config.schedule.warmup_steps.min(config.schedule.steps / 10);
    config
}

/// Examples to train on, and those held out.
#[allow(clippy::type_complexity)]
fn examples(
    args: &Args,
    config: &FinetuneConfig,
    codec: &llama::data::tokenizer::Codec,
) -> Result<(Arc<dyn Sequences>, Option<Arc<dyn Sequences>>)> {
    let seq_len = config.batch.seq_len;
    let all = instruct::read(&config.data, codec, seq_len)?;
    let count = all.len();
    // Every n-th one, so that all files are represented and a resumed run holds out the same.
    let every =
        if args.valid_fraction > 0.0 { (1.0 / args.valid_fraction).round().max(2.0) as usize } else { usize::MAX };
    let (mut train, mut valid) = (Vec::new(), Vec::new());
    for (index, example) in all.into_iter().enumerate() {
        let held_out = index % every == every - 1;
        if held_out { valid.push(example) } else { train.push(example) }
    }
    let train = ExampleSet::new(train, seq_len, config.seed)?;
    let valid = ExampleSet::new(valid, seq_len, 0).ok();
    println!(
        "data: {count} examples, {} to train on in {} sequences of {seq_len} tokens, {} held out",
        train.examples(),
        train.sequences(),
        valid.as_ref().map_or(0, ExampleSet::examples)
    );
    if train.cut > 0 {
        println!("{} examples are longer than a sequence and lose their end; raise --seq-len", train.cut);
    }
    if train.useless > 0 {
        println!("{} examples are left out: nothing in them is trained on", train.useless);
    }
    Ok((Arc::new(train), valid.map(|valid| Arc::new(valid) as Arc<dyn Sequences>)))
}
