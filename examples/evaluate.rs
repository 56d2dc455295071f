//! Evaluates a model as section 3 of the paper does: benchmarks by likelihood or by generation, and perplexity.
//!
//! ```sh
//! cargo run --release --example evaluate -- --model smollm2.gguf --task piqa --data valid.jsonl
//! cargo run --release --example evaluate -- --model smollm2.gguf --task mmlu --data data/test --shots 5 --shots-from data/dev
//! cargo run --release --example evaluate -- --model runs/tiny --perplexity my.txt
//! ```

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use common::{Bar, ModelArgs};
use llama::eval::{self, EvalOptions, EvalReport, Tally, Task};
use llama::model::Precision;
use llama::model::generate::Sampling;

/// Evaluates a model.
#[derive(Parser)]
#[command(about, long_about = None)]
struct Args {
    /// A checkpoint in any format, or a run folder: its newest checkpoint
    #[arg(long, default_value = "runs/tiny")]
    model: PathBuf,
    /// The benchmark
    #[arg(long, requires = "data", required_unless_present = "perplexity", help = format!("The benchmark: {}", Task::ALL.map(|task| task.to_string()).join(", ")))]
    task: Option<Task>,
    /// Its files (.jsonl, .json, .csv, .tsv, also .gz, .zst and .bz2, .parquet) or folders, as its authors publish them or with the fields they have
    /// on the Hugging Face hub
    #[arg(long, num_args = 1.., requires = "task")]
    data: Vec<PathBuf>,
    /// Solved examples before each question
    #[arg(long, default_value_t = 0, requires = "shots_from")]
    shots: usize,
    /// File or folder that the examples come from: its first rows, for MMLU those of the question's subject
    #[arg(long)]
    shots_from: Option<PathBuf>,
    /// Rows of the benchmark, at most
    #[arg(long)]
    limit: Option<usize>,
    /// gsm8k and math: solutions to sample, of which the most frequent answer counts; humaneval and mbpp: programs; 1 is greedy
    #[arg(long, default_value_t = 1)]
    samples: usize,
    /// Temperature of several samples
    #[arg(long, default_value_t = 0.6)]
    temperature: f32,
    /// Seed of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of a generated answer, at most [default: 32, for gsm8k 256, for math, humaneval and mbpp 512]
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// humaneval and mbpp: lets a Python [python3] run what the model writes, which may do all that you may: in a container, for example
    #[arg(long, num_args = 0..=1, default_missing_value = "python3")]
    execute: Option<PathBuf>,
    /// A file for every question with its answer, as JSON lines
    #[arg(long)]
    log: Option<PathBuf>,
    /// Text to predict instead: files or folders (.txt, .md, .jsonl, also .gz and .zst, .parquet)
    #[arg(long, num_args = 1.., conflicts_with = "task")]
    perplexity: Vec<PathBuf>,
    /// Tokens of the windows that a text is predicted in [default: the model's context, at most 2048]
    #[arg(long, requires = "perplexity")]
    window: Option<usize>,
    #[command(flatten)]
    loading: ModelArgs,
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

fn main() -> Result<()> {
    llama::model::tune_process();
    let mut args = Args::parse();
    // Figures are compared with those of others, so nothing is rounded unless that is asked for.
    args.loading.precision.get_or_insert(Precision::F32);
    args.loading.cache.get_or_insert(Precision::F32);
    let engine = common::open(&args.model, &args.loading)?;
    let Some(task) = args.task else {
        let window = args.window.unwrap_or(engine.config().max_seq_len.min(2048));
        let found = eval::perplexity(&engine, &args.perplexity, window, &Bar::default())?;
        println!(
            "{} texts, {} tokens, {} bytes, in windows of {window}: perplexity {:.4} a token, {:.4} a word; {:.4} bits a byte",
            found.documents,
            found.tokens,
            found.bytes,
            found.per_token(),
            found.per_word(),
            found.bits_per_byte()
        );
        return Ok(());
    };
    let options = EvalOptions {
        shots: args.shots,
        shots_from: args.shots_from,
        limit: args.limit,
        samples: args.samples,
        sampling: Sampling { temperature: args.temperature, ..Sampling::default() },
        seed: args.seed,
        max_new_tokens: args.max_new_tokens,
        python: args.execute,
    };
    let open = |path: &PathBuf| File::create(path).with_context(|| path.display().to_string());
    let mut log = args.log.as_ref().map(open).transpose()?.map(BufWriter::new);
    let mut failed = None;
    let report = eval::evaluate(&engine, task, &args.data, &options, &Bar::default(), |answered| {
        let Some(log) = &mut log else { return };
        let line = serde_json::to_string(answered).map_err(std::io::Error::from);
        failed = line.and_then(|line| writeln!(log, "{line}")).err().or(failed.take());
    })?;
    if let Some(error) = failed.or_else(|| log.and_then(|mut log| log.flush().err())) {
        return Err(error).context("writing the log");
    }
    common::show(&table(task, args.shots, &report))
}

fn table(task: Task, shots: usize, report: &EvalReport) -> String {
    let row = |name: &str, tally: &Tally| {
        let (share, error) = (100.0 * tally.accuracy(), 100.0 * tally.standard_error());
        format!("| {name} | {share:.2} ± {error:.2} | {} of {} |\n", tally.correct, tally.questions)
    };
    let mut out = format!("| {task}, {shots} examples | % | right |\n| --- | --- | --- |\n");
    for (group, tally) in &report.groups {
        out += &row(group, tally);
    }
    if task == Task::Mmlu {
        let mut categories: BTreeMap<&str, Tally> = BTreeMap::new();
        for (subject, tally) in &report.groups {
            *categories.entry(eval::mmlu_category(subject)).or_default() += *tally;
        }
        for (category, tally) in &categories {
            out += &row(&format!("**{category}**"), tally);
        }
    }
    out += &row("**all**", &report.result);
    for (name, tally) in [("by likelihood", report.by_sum), ("by likelihood per character", report.by_character)] {
        out += &tally.map_or(String::new(), |tally| row(name, &tally));
    }
    for (k, share) in &report.pass_at {
        out += &format!("| pass@{k} | {:.2} | |\n", 100.0 * share);
    }
    if report.cut > 0 {
        out += &format!("\n{} texts did not fit into the model's context and lost their beginning\n", report.cut);
    }
    out
}
