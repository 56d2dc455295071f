//! Reading and cleaning text, comparing it, and cutting it into tokens: megabytes per second of one thread and of all.
//!
//! ```sh
//! cargo bench --bench data -- --text wiki.jsonl                      # documents of `text`, and what else the rule needs
//! cargo bench --bench data -- --text wiki.jsonl --tokenizer tokenizer.model --language lid.176.ftz
//! python3 benches/compare_data.py --text wiki.jsonl                  # beside datatrove, tokenizers, sentencepiece, fastText
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use llama::data::NoProgress;
use llama::data::clean::c4::C4;
use llama::data::clean::{Clean, Tally, ccnet, html, latex, wikitext};
use llama::data::dedup::minhash::MinHash;
use llama::data::filter::fasttext::FastText;
use llama::data::source::{Document, Sources};
use llama::data::tokenizer::{EncodeCaches, Tokenizer, TrainOptions};
use rayon::prelude::*;

#[path = "common/mod.rs"]
mod common;
use common::{Arguments, append, median};

fn main() {
    let all: Vec<String> = std::env::args().collect();
    let args = Arguments::new(all);
    if let Err(error) = run(&args) {
        eprintln!("{error}");
        std::process::exit(2);
    }
}

fn run(args: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let texts = texts(args)?;
    let bytes: usize = texts.iter().map(String::len).sum();
    let tokenizer = Arc::new(match args.value("--tokenizer") {
        Some(path) => Tokenizer::load(Path::new(&path))?,
        None => {
            let options = TrainOptions { vocab_size: 2000, ..Default::default() };
            Tokenizer::train(texts.iter().map(String::as_str), &options, &NoProgress)?
        }
    });
    let language = args.value("--language").map(|path| FastText::load(Path::new(&path))).transpose()?;
    println!("{} documents, {:.1} MB; MB/s", texts.len(), bytes as f64 / 1e6);
    println!("| what | one thread | {} threads |", rayon::current_num_threads());
    println!("| --- | --- | --- |");

    let c4 = C4 { min_words: 3, min_sentences: 0, ..Default::default() };
    let document = |text: &str| Document { text: text.into(), ..Default::default() };
    let bench = Bench { args, texts: &texts, bytes };
    bench.measure("c4", &|text| c4.clean(document(text), &mut Tally::default()).map_or(0, |kept| kept.text.len()));
    bench.measure("wikitext", &|text| wikitext::to_text(text).len());
    bench.measure("html", &|text| html::to_text(text).len());
    bench.measure("latex comments", &|text| latex::strip_comments(text).len());
    bench.measure("line keys", &|text| text.lines().filter_map(ccnet::line_key).count());
    let near = MinHash { shingle: 5, similarity: 0.8 };
    bench.measure("minhash", &|text| near.signature(text).map_or(0, |signature| signature[0] as usize));
    if let Some(model) = &language {
        bench.measure("language", &|text| model.predict(text, 1).len());
    }
    // Every round begins with empty caches.
    bench.measure_with("tokens", EncodeCaches::default, &|caches, text| {
        caches.with(|cache| tokenizer.encode_with(text, cache).len())
    });
    Ok(())
}

/// The documents of `--text`, or this project's own sources.
fn texts(args: &Arguments) -> Result<Vec<String>, llama::data::DataError> {
    let (path, extension) = match args.value("--text") {
        Some(path) => (PathBuf::from(path), None),
        None => (Path::new(env!("CARGO_MANIFEST_DIR")).join("llama-data/src"), Some("rs".to_string())),
    };
    let mut sources = Sources::new([path]);
    sources.extensions.extend(extension);
    let mut texts = Vec::new();
    for file in sources.files()? {
        for document in file.documents()? {
            texts.push(document?.text);
        }
    }
    Ok(texts)
}

struct Bench<'a> {
    args: &'a Arguments,
    texts: &'a [String],
    bytes: usize,
}

impl Bench<'_> {
    fn measure(&self, name: &str, work: &(dyn Fn(&str) -> usize + Sync)) {
        self.measure_with(name, || (), &|(), text| work(text));
    }

    fn measure_with<S: Sync>(&self, name: &str, state: impl Fn() -> S, work: &(dyn Fn(&S, &str) -> usize + Sync)) {
        let rounds = if self.args.smoke { 1 } else { 5 };
        let timed = |run: &dyn Fn() -> usize| {
            let times: Vec<Duration> = (0..rounds)
                .map(|_| {
                    let start = Instant::now();
                    std::hint::black_box(run());
                    start.elapsed()
                })
                .collect();
            self.bytes as f64 / 1e6 / (median(times) / 1e3)
        };
        let one = timed(&|| {
            let state = state();
            self.texts.iter().map(|text| work(&state, text)).sum()
        });
        let all = timed(&|| {
            let state = state();
            self.texts.par_iter().map(|text| work(&state, text)).sum()
        });
        println!("| {name} | {one:.1} | {all:.1} |");
        let result = serde_json::json!({ "bench": "data", "what": name, "one": one, "all": all, "bytes": self.bytes });
        append(self.args, &result);
    }
}
