//! From dumps to a training mixture: reads, cleans, deduplicates and tokenizes the sources that a TOML file names, by the recipes of the
//! paper (section 2.1). `docs/data.md` has the recipes.
//!
//! ```sh
//! cargo run --release --example prepare -- example > prepare.toml      # every source, to be edited
//! cargo run --release --example prepare -- run prepare.toml            # again after a kill, or on several machines at once
//! cargo run --release --example pretrain -- --data prepared            # trains on what it wrote
//! ```
mod common;

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use llama::data::clean::ccnet;
use llama::data::filter::fasttext::FastText;
use llama::data::filter::ngram::{NgramModel, Units};
use llama::data::filter::train::ClassifierOptions;
use llama::data::pipeline::{PrepareConfig, run};
use llama::data::source::Sources;
use llama::data::tokenizer::Tokenizer;

/// Prepares training data
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Does what a configuration says and is not done yet
    Run {
        /// The configuration
        config: PathBuf,
        /// Threads; all cores if absent
        #[arg(long)]
        threads: Option<usize>,
    },
    /// Prints a configuration with the paper's seven sources and their shares
    Example,
    /// Trains the n-gram language model of the perplexity filter, on Wikipedia's text for example
    Ngram {
        /// Text files, JSONL files and folders
        #[arg(required = true)]
        text: Vec<PathBuf>,
        /// Longest n-gram
        #[arg(long, default_value_t = 5)]
        order: usize,
        /// Trains on the pieces of this SentencePiece model instead of on words
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// The ARPA file
        #[arg(long, default_value = "lm.arpa")]
        out: PathBuf,
    },
    /// Names the language of each line of a file, with its probability
    Language {
        /// lid.176.bin or lid.176.ftz
        #[arg(long)]
        model: PathBuf,
        /// The lines
        lines: PathBuf,
    },
    /// Trains the classifier of pages that Wikipedia cites against random pages
    Classifier {
        /// Cited pages: text files, JSONL files and folders
        #[arg(long, required = true)]
        reference: Vec<PathBuf>,
        /// Random pages
        #[arg(long, required = true)]
        random: Vec<PathBuf>,
        /// The fastText model
        #[arg(long, default_value = "quality.bin")]
        out: PathBuf,
    },
}

const EXAMPLE: &str = include_str!("prepare.toml");

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Example => common::show(EXAMPLE),
        Command::Run { config, threads } => {
            let config = PrepareConfig::load(&config)?;
            let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
            let start = Instant::now();
            let report = run(&config, threads, &common::Bar::default())?;
            common::show(&report.table())?;
            println!("\n{:.0} s; {}", start.elapsed().as_secs_f64(), config.output.join("report.html").display());
            println!("train on it: cargo run --release --example pretrain -- --data {}", config.output.display());
            Ok(())
        }
        Command::Ngram { text, order, tokenizer, out } => {
            if !(1..=5).contains(&order) {
                bail!("--order {order}: 1 to 5 are supported");
            }
            let units = match tokenizer {
                Some(file) => Units::pieces(Tokenizer::load(&file)?),
                None => Units::Words,
            };
            let texts = texts(&text)?;
            let lines = texts.iter().flat_map(|text| text.lines()).map(ccnet::normalize);
            let model = NgramModel::train(lines, order, units)?;
            model.save_arpa(&out)?;
            // What the filter's bound can be chosen from.
            let mut perplexities: Vec<f64> =
                texts.iter().map(|text| model.perplexity(text.lines().map(ccnet::normalize))).collect();
            perplexities.retain(|perplexity| perplexity.is_finite());
            perplexities.sort_by(f64::total_cmp);
            let at = |share: f64| perplexities[((perplexities.len() - 1) as f64 * share) as usize];
            println!("{}: order {}", out.display(), model.order());
            println!("perplexity of the text itself, by document: median {:.1}, 90% below {:.1}", at(0.5), at(0.9));
            Ok(())
        }
        Command::Language { model, lines } => {
            let model = FastText::load(&model)?;
            let text = std::fs::read_to_string(&lines).with_context(|| lines.display().to_string())?;
            let mut out = String::new();
            for line in text.lines() {
                match model.predict(line, 1).pop() {
                    Some((label, probability)) => writeln!(out, "{label} {probability:.6}")?,
                    None => writeln!(out, "- 0")?,
                }
            }
            common::show(&out)
        }
        Command::Classifier { reference, random, out } => {
            let label = |label: &str, paths| -> Result<Vec<(String, String)>> {
                Ok(texts(paths)?.into_iter().map(|text| (label.to_string(), text)).collect())
            };
            let mut all = label("reference", &reference)?;
            all.extend(label("random", &random)?);
            let model = FastText::train(&all, &ClassifierOptions::default())?;
            model.save(&out)?;
            let right = all.iter().filter(|(label, text)| {
                model.predict(text, 1).first().is_some_and(|(found, _)| found.ends_with(label.as_str()))
            });
            println!("{}: {} of {} training texts are recognised", out.display(), right.count(), all.len());
            Ok(())
        }
    }
}

/// All documents of files and folders.
fn texts(paths: &[PathBuf]) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for file in Sources::new(paths).files()? {
        for document in file.documents()? {
            texts.push(document.with_context(|| file.path.display().to_string())?.text);
        }
    }
    Ok(texts)
}
