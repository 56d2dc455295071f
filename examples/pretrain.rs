//! Pretrains a LLaMA: text to tokenizer to shards to a trained model, with checkpoints, a loss curve and samples.
//!
//! ```sh
//! cargo run --release --example pretrain                                # ten minutes on two CPU cores
//! cargo run --release --example pretrain -- --text my.txt --run runs/mine
//! cargo run --release --example pretrain -- --resume                    # goes on after Ctrl-C or a crash
//! cargo run --release --example pretrain -- --from model.gguf --text my.txt --run runs/more   # goes on with a model's weights
//! cargo run --release --example pretrain -- --preset 7b --print-config  # the paper's run
//! ```

mod common;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use common::DeviceArgs;
use llama::data::NoProgress;
use llama::data::prepare::{PrepareOptions, PrepareReport, prepare, train_tokenizer};
use llama::data::tokenizer::{Codec, Tokenizer, TrainOptions};
use llama::model::formats::Checkpoint;
use llama::model::generate::GenerateOptions;
use llama::model::{Precision, Recompute};
use llama::train::checkpoint;
use llama::train::{Display, PretrainConfig, Stop};
use llama::{Devices, Engine, EngineOptions, RunOptions, pretrain, text};
use serde::{Deserialize, Serialize};

/// Pretrains a LLaMA on text.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// Files or folders with text (.txt, .md, .jsonl, also .gz and .zst, .parquet) [default: the Rust sources of this project's
    /// dependencies, in cargo's folder]
    #[arg(long, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Folder that `prepare` wrote: token shards, their tokenizer and a mixture
    #[arg(long, conflicts_with = "text")]
    data: Option<PathBuf>,
    /// A token attends only to its own document
    #[arg(long)]
    block_causal: bool,
    /// File endings to take from folders
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    extensions: Vec<String>,
    /// Model and run: tiny, 15m, 60m, 110m, 7b, 13b, 33b, 65b
    #[arg(long, default_value = "tiny")]
    preset: String,
    /// Goes on with the weights, sizes and tokenizer of a checkpoint in any format, or of a run, instead of a preset
    #[arg(long, conflicts_with_all = ["preset", "config", "vocab_size", "resume"], requires = "run")]
    from: Option<PathBuf>,
    /// Tokenizer of --from, where that has none beside it
    #[arg(long, requires = "from")]
    tokenizer: Option<PathBuf>,
    /// A configuration file (.toml or .json) instead of a preset
    #[arg(long, conflicts_with = "preset")]
    config: Option<PathBuf>,
    /// Folder for data, checkpoints and results
    #[arg(long)]
    run: Option<PathBuf>,
    /// Goes on from the newest checkpoint of the run, with the configuration saved in it
    #[arg(long)]
    resume: bool,
    /// Removes the checkpoints of an earlier run in the folder
    #[arg(long, conflicts_with = "resume")]
    fresh: bool,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Devices that divide a model among them, each with a part of every block, instead of sharing micro-batches
    #[arg(long, default_value_t = 1)]
    tensor_parallel: usize,
    /// Pieces of the tokenizer that is trained on the text; 259 is bytes alone
    #[arg(long)]
    vocab_size: Option<usize>,
    /// Share of the text held out for validation
    #[arg(long, default_value_t = 0.01)]
    valid_fraction: f64,
    /// Optimizer steps
    #[arg(long)]
    steps: Option<u64>,
    /// Warmup steps
    #[arg(long)]
    warmup: Option<u64>,
    /// Tokens of a sequence
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
    /// Precision of the products with weights: f32, bf16 or f16
    #[arg(long)]
    precision: Option<Precision>,
    /// What a block keeps for its backward: none (all is kept), selective, or full (least memory)
    #[arg(long)]
    recompute: Option<Recompute>,
    /// Steps between checkpoints
    #[arg(long)]
    checkpoint_every: Option<u64>,
    /// Steps between evaluations
    #[arg(long)]
    eval_every: Option<u64>,
    /// Seed of weights and data order
    #[arg(long)]
    seed: Option<u64>,
    /// Peak of the device in GFLOP/s, for the MFU [default: measured]
    #[arg(long)]
    peak_gflops: Option<f64>,
    /// Lines of text, or burn-train's dashboard (needs `--features tui`)
    #[arg(long, value_enum, default_value_t = Show::Lines)]
    display: Show,
    /// Steps between lines
    #[arg(long, default_value_t = 10)]
    log_every: usize,
    /// How the samples after the run begin
    #[arg(long, num_args = 1..)]
    prompt: Vec<String>,
    /// Prints the configuration as TOML and stops
    #[arg(long)]
    print_config: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Show {
    Lines,
    Dashboard,
}

/// What made the shards in a folder, so that they are made again only when it changes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prepared {
    paths: Vec<PathBuf>,
    extensions: Vec<String>,
    #[serde(default)]
    tokenizer: Option<PathBuf>,
    vocab_size: usize,
    valid_fraction: f64,
    bytes: u64,
    documents: u64,
    train_tokens: u64,
    valid_tokens: u64,
    valid_bytes: u64,
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

fn main() -> Result<()> {
    llama::model::tune_process();
    let args = Args::parse();
    let devices = Devices { tensor_parallel: args.tensor_parallel, ..args.devices.devices()? };
    if args.resume {
        let folder = args.run.clone().unwrap_or_else(|| format!("runs/{}", args.preset).into());
        let newest = checkpoint::latest(&folder)?;
        let mut config = checkpoint::load_state(&newest)?.config;
        // The run may have been moved.
        if folder.join("data").exists() {
            config.data.folder = folder.join("data");
        }
        config.run.folder = folder;
        println!("resuming from {}", newest.display());
        return train(args, &config, &devices, Some(&newest));
    }
    let config = configuration(&args)?;
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    // Of several processes the first has the run's folder.
    if devices.lead() {
        begin(&config.run.folder, args.fresh)?;
    }
    let config = prepare_data(&args, config, devices.lead())?;
    train(args, &config, &devices, None)
}

/// A new run must not mix with an earlier one in its folder.
fn begin(folder: &Path, fresh: bool) -> Result<()> {
    if let Ok(newest) = checkpoint::latest(folder)
        && !fresh
    {
        bail!(
            "{} is a run with a checkpoint ({}): go on with --resume, start over with --fresh, or name another folder with --run",
            folder.display(),
            newest.display()
        );
    }
    for (_, path) in checkpoint::list(folder)? {
        std::fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// The configuration of the preset or file, with what the command line says.
fn configuration(args: &Args) -> Result<PretrainConfig> {
    let mut config = match (&args.config, &args.from) {
        (Some(path), _) => PretrainConfig::load(path)?,
        (None, Some(from)) => {
            let from = common::checkpoint_path(from)?;
            PretrainConfig::continuing(&from, Checkpoint::open(&from)?.config())
        }
        (None, None) => PretrainConfig::preset(&args.preset)?,
    };
    common::set(&mut config.run.folder, &args.run);
    common::set(&mut config.model.vocab_size, &args.vocab_size);
    common::set(&mut config.schedule.steps, &args.steps);
    common::set(&mut config.schedule.warmup_steps, &args.warmup);
    common::set(&mut config.batch.seq_len, &args.seq_len);
    common::set(&mut config.batch.sequences, &args.sequences);
    common::set(&mut config.batch.accumulation, &args.accumulation);
    common::set(&mut config.schedule.peak_lr, &args.lr);
    common::set(&mut config.compute.precision, &args.precision);
    common::set(&mut config.compute.recompute, &args.recompute);
    common::set(&mut config.run.checkpoint_every, &args.checkpoint_every);
    common::set(&mut config.run.eval_every, &args.eval_every);
    common::set(&mut config.seed, &args.seed);
    config.data.block_causal |= args.block_causal;
    config.run.peak_flops = args.peak_gflops.map(|peak| peak * 1e9).or(config.run.peak_flops);
    config.schedule.warmup_steps = config.schedule.warmup_steps.min(config.schedule.steps);
    if let Some(folder) = &args.data {
        config.data.folder = folder.clone();
        if config.base.is_none() {
            config.model.vocab_size = Codec::load(folder)?.vocab_size();
        }
    } else if args.config.is_none() {
        config.data.folder = config.run.folder.join("data");
    }
    config.validate()?;
    Ok(config)
}

/// Tokenizer and shards in the data folder: there already, or, by the process that leads, made from the text.
fn prepare_data(args: &Args, config: PretrainConfig, leads: bool) -> Result<PretrainConfig> {
    let folder = &config.data.folder;
    if args.data.is_some() || (args.config.is_some() && args.text.is_empty() && Codec::load(folder).is_ok()) {
        return Ok(config);
    }
    let sources = common::sources(&args.text, &args.extensions)?;
    let vocab_size = config.model.vocab_size;
    let named = args.tokenizer.clone().or(config.base.clone());
    let record = folder.join("prepared.json");
    if let Ok(text) = std::fs::read_to_string(&record)
        && let Ok(old) = serde_json::from_str::<Prepared>(&text)
        && (&old.paths, &old.extensions) == (&sources.paths, &sources.extensions)
        && (&old.tokenizer, old.vocab_size, old.valid_fraction) == (&named, vocab_size, args.valid_fraction)
    {
        println!("data: {} training tokens in {}", old.train_tokens, folder.display());
        return Ok(evaluable(config, old.valid_tokens));
    }
    if !leads {
        bail!(
            "{} has no shards of this text yet: the first process makes them. Start this one after that, or let all take prepared --data",
            folder.display()
        );
    }
    let bar = common::Bar::default();
    let tokenizer: Codec = match (&named, vocab_size) {
        (Some(path), _) => text::codec(path)?,
        (None, 259) => Tokenizer::bytes().into(),
        (None, _) => {
            let options = TrainOptions { vocab_size, ..Default::default() };
            train_tokenizer(&sources, &options, 16 << 20, &bar)?.into()
        }
    };
    let tokenizer = tokenizer.install(folder)?;
    remove_shards(folder)?;
    let options = PrepareOptions { valid_fraction: args.valid_fraction, ..Default::default() };
    let report = prepare(&sources, &tokenizer, folder, &options, &bar)?;
    let PrepareReport { documents, bytes, train_tokens, valid_tokens, valid_bytes, skipped } = report;
    println!(
        "data: {documents} documents, {:.1} MB of text, {train_tokens} training and {valid_tokens} validation tokens, {:.2} bytes per token",
        bytes as f64 / 1e6,
        bytes as f64 / (train_tokens + valid_tokens) as f64
    );
    for path in &skipped {
        println!("passed over, not UTF-8: {}", path.display());
    }
    let (paths, extensions) = (sources.paths, sources.extensions);
    let valid_fraction = args.valid_fraction;
    let prepared = Prepared {
        paths,
        extensions,
        tokenizer: named,
        vocab_size,
        valid_fraction,
        bytes,
        documents,
        train_tokens,
        valid_tokens,
        valid_bytes,
    };
    std::fs::write(&record, serde_json::to_string(&prepared)?).with_context(|| record.display().to_string())?;
    Ok(evaluable(config, valid_tokens))
}

/// The configuration without evaluation where too little text was held out for it.
fn evaluable(mut config: PretrainConfig, valid_tokens: u64) -> PretrainConfig {
    if config.run.eval_every > 0 && valid_tokens <= config.batch.seq_len as u64 {
        println!(
            "no evaluation: {valid_tokens} validation tokens are less than a sequence; raise --valid-fraction or add text"
        );
        config.run.eval_every = 0;
    }
    config
}

/// Shards of an earlier text must not mix with those to come.
fn remove_shards(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "bin") {
            std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Runs the configuration, then shows what the model writes.
fn train(args: Args, config: &PretrainConfig, devices: &Devices, resume_from: Option<&Path>) -> Result<()> {
    println!(
        "model: {} parameters; {} steps of {} tokens on {devices}",
        config.model.num_params(),
        config.schedule.steps,
        config.tokens_per_step(),
    );
    let display = match args.display {
        Show::Dashboard => Display::Dashboard,
        Show::Lines => Display::Lines { out: Box::new(std::io::stdout()), every: args.log_every },
    };
    let (bar, interrupter) = (common::Bar::default(), common::interrupter()?);
    let options = RunOptions { resume_from, display, progress: &bar, interrupter };
    let start = Instant::now();
    let report = pretrain(config, devices, options)?;
    println!("trained for {:.0} s", start.elapsed().as_secs_f64());
    if !devices.lead() {
        return Ok(());
    }
    common::print_report(&report, "checkpoint");
    if report.stop == Stop::Interrupted {
        return Ok(());
    }
    let prompts = match (args.prompt.is_empty(), args.text.is_empty() && args.data.is_none()) {
        (false, _) => args.prompt,
        (true, true) => ["pub fn new", "impl", "use std::", "/// Returns"].map(String::from).into(),
        (true, false) => vec![String::new(); 3],
    };
    // On one device, or on as many as the model was divided among.
    let Some(own) = devices.devices.get(..devices.tensor_parallel) else {
        println!("no samples: the model is divided among processes; `generate` takes --nodes, too");
        return Ok(());
    };
    let devices = Devices { devices: own.into(), ..own[0].into() };
    let options = EngineOptions { precision: Some(config.compute.precision), ..EngineOptions::new(devices) };
    let samples = samples(&Engine::open_with(&report.checkpoint, &options, &NoProgress)?, &prompts)?;
    let path = config.run.folder.join("samples.txt");
    std::fs::write(&path, &samples).with_context(|| path.display().to_string())?;
    println!("samples ({}):\n{samples}", path.display());
    Ok(())
}

fn samples(engine: &Engine, prompts: &[String]) -> Result<String> {
    let max_new_tokens = 160.min(engine.config().max_seq_len.saturating_sub(32));
    let texts = engine.complete(prompts, GenerateOptions { max_new_tokens, ..Default::default() }, &[])?;
    Ok(prompts.iter().zip(texts).map(|(prompt, text)| format!("----\n{prompt}{text}\n")).collect())
}
