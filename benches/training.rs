//! Whole training steps (forward, backward, clip, AdamW) of several model sizes: tokens per second and the share of the
//! device's measured matrix-product peak.
//!
//! ```sh
//! cargo bench --bench training                                   # every size, on the CPU
//! cargo bench --bench training -- --size 15m --device flex
//! cargo bench --bench training -- --json results.jsonl           # also as JSON lines
//! ```
#![recursion_limit = "256"]

use std::io::Write;
use std::time::Instant;

use burn::train::TrainStep;
use llama::data::loader::TokenBatch;
use llama::model::{BackendTask, Device, LlamaConfig, TrainBackend};
use llama::train::{AdamW, GradientList, OptimizerConfig, Pretrainer, measure_peak_flops};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    let result = value("--device").unwrap_or_else(|| "flex".into()).parse().and_then(|device: Device| {
        // `cargo test --benches` runs every bench once, to see that it works.
        let smoke = !args.iter().any(|arg| arg == "--bench");
        device.run(Training { device, smoke, size: value("--size"), json: value("--json") })
    });
    if let Err(error) = result {
        eprintln!("{error}");
        std::process::exit(2);
    }
}

struct Training {
    device: Device,
    smoke: bool,
    size: Option<String>,
    json: Option<String>,
}

/// Name, model, sequence length, sequences.
fn sizes() -> Vec<(&'static str, LlamaConfig, usize, usize)> {
    let tiny = LlamaConfig {
        d_model: 128,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 32,
        d_ff: 352,
        ..LlamaConfig::tiny(512)
    };
    vec![
        ("tiny", tiny, 256, 8),
        ("15m", LlamaConfig::small_15m(), 256, 8),
        ("60m", LlamaConfig::small_60m(), 512, 4),
        ("110m", LlamaConfig::small_110m(), 1024, 1),
    ]
}

impl BackendTask for Training {
    type Output = ();

    fn run<B: TrainBackend>(self, device: B::Device) {
        let peak = measure_peak_flops::<B::InnerBackend>(&device);
        println!("measured matrix-product peak: {:.0} GFLOP/s", peak / 1e9);
        println!("| size | parameters | seq_len x batch | dtype | device | tokens/s | of peak | memory MB |");
        println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
        for (name, config, seq_len, batch) in sizes() {
            if self.size.as_deref().is_some_and(|size| size != name) || (self.smoke && name != "tiny") {
                continue;
            }
            let mut model =
                Pretrainer { llama: config.init::<B>(0, &device).expect("the size is a valid model"), z_loss: 0.0 };
            let mut optimizer = AdamW::<B>::new(OptimizerConfig::default());
            let ids: Vec<i32> = (0..batch * seq_len).map(|i| (i * 7919 % config.vocab_size) as i32).collect();
            let data = TokenBatch { inputs: ids.clone(), targets: ids, batch, seq_len };
            let (warmup, steps) = if self.smoke { (0, 1) } else { (2, 10) };
            let mut times = Vec::new();
            for step in 0..warmup + steps {
                let start = Instant::now();
                let output = TrainStep::step(&model, data.clone());
                let mut grads = GradientList::default();
                grads.accumulate::<B, _>(&model, output.grads);
                let per_token = 1.0 / output.item.tokens as f64;
                let scale = optimizer.clip_factor(grads.norm() * per_token) * per_token;
                model = optimizer.update(1e-4, model, grads, scale);
                B::sync(&device).expect("the device answers");
                if step >= warmup {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
            times.sort_by(f64::total_cmp);
            let rate = (batch * seq_len) as f64 / times[times.len() / 2];
            let share = rate * config.flops_per_token(seq_len).training() / peak;
            let memory = memory();
            println!(
                "| {name} | {} | {seq_len} x {batch} | f32 | {} | {rate:.0} | {:.0}% | {:.0} |",
                config.num_params(),
                self.device,
                100.0 * share,
                memory / 1e6
            );
            if let Some(path) = &self.json {
                let line = serde_json::json!({
                    "size": name, "parameters": config.num_params(), "seq_len": seq_len, "batch": batch, "dtype": "f32",
                    "device": self.device.to_string(), "tokens_per_second": rate, "share_of_peak": share,
                    "peak_flops": peak, "memory_bytes": memory,
                });
                let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
                if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
                    eprintln!("{path}: {error}");
                }
            }
        }
    }
}

/// Most resident memory of the process so far in bytes, where the system tells (Linux).
fn memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}
