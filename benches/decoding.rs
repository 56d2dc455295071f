//! Reading a prompt (of 128 tokens unless told) in one pass, then decoding token by token with a cache: tokens per second of both, and
//! the share of what reading the weights allows.
//!
//! ```sh
//! cargo bench --bench decoding                                  # every size and weight format, on the CPU
//! cargo bench --bench decoding -- --size 110m --weights q8
//! cargo bench --bench decoding -- --model smollm2.gguf          # a checkpoint of any format instead of the sizes
//! cargo bench --bench decoding -- --model smollm2.gguf --prompt 4000 --cache f32
//! cargo bench --bench decoding -- --model smollm2.gguf --batch 16       # so many prompts at once
//! cargo bench --bench decoding -- --json results.jsonl          # also as JSON lines
//! ```
//!
//! The memory's bandwidth is measured in the same run, on the host: it bounds the CPU's figures only.
#![recursion_limit = "256"]

use std::path::Path;
use std::time::Instant;

use llama::model::formats::Checkpoint;
use llama::model::generate::{GenerateOptions, Generation, Sampling};
use llama::model::{BackendTask, Compute, Llama, LlamaBackend, LlamaConfig, Precision, TrainBackend, WeightFormat};

#[path = "common/mod.rs"]
mod common;
use common::{Arguments, append, median};

fn main() {
    common::run(|args| Decoding { args });
}

struct Decoding {
    args: Arguments,
}

fn sizes() -> Vec<(&'static str, LlamaConfig)> {
    let billion = LlamaConfig {
        vocab_size: 32_000,
        d_model: 2048,
        n_layers: 22,
        n_heads: 32,
        n_kv_heads: 4,
        head_dim: 64,
        d_ff: 5632,
        max_seq_len: 2048,
        ..LlamaConfig::tiny(32_000)
    };
    vec![
        ("tiny", LlamaConfig::tiny(512)),
        ("15m", LlamaConfig::small_15m()),
        ("110m", LlamaConfig::small_110m()),
        ("1.1b", LlamaConfig { tied_head: false, ..billion }),
    ]
}

/// `--cache`, by the names of precisions.
fn cache(args: &Arguments, default: Precision) -> Precision {
    args.value("--cache").map_or(Ok(default), |name| name.parse()).unwrap_or_else(|error| panic!("{error}"))
}

/// Bytes that one token reads of the weights: all matrices, but of untied embeddings only a row.
fn bytes_per_token(config: &LlamaConfig, format: WeightFormat) -> f64 {
    let head = (config.vocab_size * config.d_model) as u64;
    let blocks = config.num_params() - head * if config.tied_head { 1 } else { 2 };
    // Embeddings and the head stay in 8 bits.
    let of_head = if format == WeightFormat::Q4 { WeightFormat::Q8 } else { format };
    blocks as f64 * format.bytes_per_weight() + head as f64 * of_head.bytes_per_weight()
}

impl BackendTask for Decoding {
    type Output = ();

    fn run<B: TrainBackend>(self, device: B::Device) {
        println!(
            "| model | weights | device | prefill tokens/s | ms a step | tokens/s | GB/s | memory GB/s | share | resident MB |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for &format in WeightFormat::ALL {
            if self.args.value("--weights").is_some_and(|only| only != format.to_string()) {
                continue;
            }
            if let Some(path) = self.args.value("--model") {
                let checkpoint = Checkpoint::open(Path::new(&path)).unwrap_or_else(|error| panic!("{error}"));
                let model = checkpoint.load::<B::InnerBackend>(format, &device, |_| ());
                let model = model.unwrap_or_else(|error| panic!("{error}"));
                self.measure("checkpoint", checkpoint.config(), model, format, &device);
                continue;
            }
            for (name, config) in sizes().into_iter().filter(|(name, _)| self.args.selects(name)) {
                let model = config.init::<B::InnerBackend>(0, &device).expect("the size is a valid model");
                let model = model.with_weights(format).expect("the sizes are multiples of 32");
                self.measure(name, &config, model, format, &device);
            }
        }
    }
}

impl Decoding {
    fn measure<B: LlamaBackend>(
        &self,
        name: &str,
        config: &LlamaConfig,
        model: Llama<B>,
        format: WeightFormat,
        device: &B::Device,
    ) {
        let compute = Compute { precision: format.precision::<B>(device), ..Default::default() };
        let model = model.with_compute(compute).with_cache(cache(&self.args, format.cache::<B>(device)));
        let (prefills, steps) = if self.args.smoke { (1, 2) } else { (5, self.args.number("--steps").unwrap_or(48)) };
        let tokens = self.args.number("--prompt").unwrap_or(128);
        let batch = self.args.number("--batch").unwrap_or(1);
        let token = |sequence: usize, i: usize| ((37 * i + sequence) % config.vocab_size) as u32;
        let prompts: Vec<Vec<u32>> = (0..batch).map(|s| (0..tokens).map(|i| token(s, i)).collect()).collect();
        let begin = || {
            let options = GenerateOptions { max_new_tokens: steps, sampling: Sampling::greedy(), ..Default::default() };
            let mut generation = Generation::new(&model, &prompts, options).expect("it fits");
            let start = Instant::now();
            generation.next();
            (generation, start.elapsed())
        };
        // The first one warms up.
        let prefill = median((0..=prefills).map(|_| begin().1).skip(1).collect());
        let mut bandwidths = vec![bandwidth(self.args.smoke)];
        let (mut generation, _) = begin();
        let mut times = Vec::new();
        let mut start = Instant::now();
        while generation.next().is_some() {
            times.push(start.elapsed());
            start = Instant::now();
        }
        bandwidths.push(bandwidth(self.args.smoke));
        let memory = bandwidths.iter().sum::<f64>() / bandwidths.len() as f64;
        let ms = median(times);
        let read = bytes_per_token(config, format) / ms * 1e3;
        let prefill = (batch * tokens) as f64 / prefill * 1e3;
        let decoding = batch as f64 / ms * 1e3;
        println!(
            "| {name} | {format} | {} | {prefill:.0} | {ms:.2} | {decoding:.1} | {:.1} | {:.1} | {:.0}% | {:.0} |",
            self.args.device,
            read / 1e9,
            memory / 1e9,
            100.0 * read / memory,
            common::memory("VmRSS") / 1e6
        );
        append(
            &self.args,
            &serde_json::json!({
                "bench": "decoding", "model": name, "weights": format.to_string(), "device": self.args.device.to_string(),
                "prefill_tokens_per_second": prefill, "tokens_per_second": decoding, "batch": batch, "bytes_per_second": read,
                "memory_bytes_per_second": memory,
            }),
        );
    }
}

/// Bytes a second that all threads read from memory: the best of a few passes over a buffer that no cache holds.
fn bandwidth(smoke: bool) -> f64 {
    let len = if smoke { 1 << 20 } else { 1 << 27 };
    let data = vec![1u64; len];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in data.chunks(len.div_ceil(threads)) {
                scope.spawn(move || {
                    // Four places at a time, so that the hardware fetches ahead at each.
                    let quarter = part.len() / 4;
                    let mut sums = [0u64; 32];
                    for at in (0..quarter / 8 * 8).step_by(8) {
                        for stream in 0..4 {
                            let block = &part[stream * quarter + at..][..8];
                            for (sum, x) in sums[8 * stream..].iter_mut().zip(block) {
                                *sum ^= *x;
                            }
                        }
                    }
                    std::hint::black_box(sums)
                });
            }
        });
        (len * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (0..3).map(|_| pass()).fold(0.0, f64::max)
}
