//! Whole training steps (forward, backward, clip, AdamW) of several model sizes: tokens per second and the share of the
//! device's measured matrix-product peak.
//!
//! ```sh
//! cargo bench --bench training                                   # every size, on the CPU
//! cargo bench --bench training -- --size 15m --device flex
//! cargo bench --bench training -- --precision bf16 --recompute full
//! cargo bench --bench training -- --size 60m --seq-len 4096      # one sequence of so many tokens
//! cargo bench --bench training -- --size 60m --lengths           # the same for several lengths
//! cargo bench --bench training -- --json results.jsonl           # also as JSON lines
//! ```
#![recursion_limit = "256"]

use std::time::Instant;

use burn::module::AutodiffModule;
use burn::tensor::{Int, Tensor, TensorData};
use burn::train::TrainStep;
use llama::data::loader::TokenBatch;
use llama::model::{
    BackendTask, Compute, Llama, LlamaBackend, LlamaConfig, ModelError, Precision, Recompute, TrainBackend,
};
use llama::train::{AdamW, GradientList, OptimizerConfig, Pretrainer, measure_peak_flops};

#[path = "common/mod.rs"]
mod common;
use common::{Arguments, append, median, memory};

fn main() {
    common::run(|args| Training { args });
}

struct Training {
    args: Arguments,
}

impl BackendTask for Training {
    type Output = ();

    fn run<B: TrainBackend>(self, device: B::Device) {
        let compute = match compute(&self.args) {
            Ok(compute) => compute,
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(2);
            }
        };
        let peak = measure_peak_flops::<B::InnerBackend>(&device, compute.precision);
        println!("measured matrix-product peak: {:.0} GFLOP/s", peak / 1e9);
        println!(
            "| size | parameters | seq_len x batch | precision | recompute | device | tokens/s | of peak | memory MB | forward tokens/s |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for (name, config, seq_len, batch) in common::sizes(&self.args.device) {
            if !self.args.selects(name) {
                continue;
            }
            // Memory is the most so far, so lengths grow.
            let lengths = [512, 1024, 2048, 4096, 8192].map(|len| (len, 1));
            let shapes = match self.args.number("--seq-len") {
                Some(len) => vec![(len, 1)],
                None if self.args.flag("--lengths") => lengths.to_vec(),
                None => vec![(seq_len, batch)],
            };
            for shape in shapes {
                let config = LlamaConfig { max_seq_len: config.max_seq_len.max(shape.0), ..config.clone() };
                self.measure::<B>(name, &config, shape, compute, peak, &device);
            }
        }
    }
}

/// `--precision` and `--recompute`, by the names of the training configuration.
fn compute(args: &Arguments) -> Result<Compute, ModelError> {
    let precision = args.value("--precision").map_or(Ok(Precision::default()), |name| name.parse())?;
    let recompute = args.value("--recompute").map_or(Ok(Recompute::default()), |name| name.parse())?;
    Ok(Compute { precision, recompute })
}

impl Training {
    fn measure<B: TrainBackend>(
        &self,
        name: &str,
        config: &LlamaConfig,
        (seq_len, batch): (usize, usize),
        compute: Compute,
        peak: f64,
        device: &B::Device,
    ) {
        let llama = config.init::<B>(0, device).expect("the size is a valid model").with_compute(compute);
        let mut model = Pretrainer { llama, z_loss: 0.0, loss_scale: 1.0 };
        let mut optimizer = AdamW::<B>::new(OptimizerConfig::default());
        let ids: Vec<i32> = (0..batch * seq_len).map(|i| (i * 7919 % config.vocab_size) as i32).collect();
        let data = TokenBatch { inputs: ids.clone(), targets: ids, starts: None, batch, seq_len };
        let (warmup, steps) = if self.args.smoke { (0, 1) } else { (2, self.args.number("--steps").unwrap_or(10)) };
        let mut times = Vec::new();
        for step in 0..warmup + steps {
            let start = Instant::now();
            let output = TrainStep::step(&model, data.clone());
            let mut grads = GradientList::default();
            grads.accumulate::<B, _>(&model, output.grads);
            let per_token = 1.0 / output.item.tokens as f64;
            let scale = optimizer.clip_factor(grads.norm() * per_token) * per_token;
            model = optimizer.update(1e-4, model, grads, scale);
            B::sync(device).expect("the device answers");
            if step >= warmup {
                times.push(start.elapsed());
            }
        }
        let peak_memory = memory("VmHWM");
        let rate = (batch * seq_len) as f64 / median(times) * 1e3;
        let forward = self.forward_rate(&model.llama.valid(), (seq_len, batch), device);
        let share = rate * config.flops_per_token(seq_len).training() / peak;
        println!(
            "| {name} | {} | {seq_len} x {batch} | {} | {} | {} | {rate:.0} | {:.0}% | {:.0} | {forward:.0} |",
            config.num_params(),
            compute.precision,
            compute.recompute,
            self.args.device,
            100.0 * share,
            peak_memory / 1e6
        );
        append(
            &self.args,
            &serde_json::json!({
                "bench": "training", "size": name, "parameters": config.num_params(), "seq_len": seq_len, "batch": batch,
                "precision": compute.precision, "recompute": compute.recompute, "device": self.args.device.to_string(),
                "tokens_per_second": rate, "share_of_peak": share, "peak_flops": peak, "memory_bytes": peak_memory,
                "forward_tokens_per_second": forward,
            }),
        );
    }

    /// Tokens per second of forward passes that make all logits.
    fn forward_rate<B: LlamaBackend>(
        &self,
        model: &Llama<B>,
        (seq_len, batch): (usize, usize),
        device: &B::Device,
    ) -> f64 {
        let ids: Vec<i32> = (0..batch * seq_len).map(|i| (i * 7919 % model.vocab_size()) as i32).collect();
        let tokens = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [batch, seq_len]), device);
        let pass = || {
            let start = Instant::now();
            let logits = model.forward(tokens.clone(), None).expect("the sequence fits");
            B::sync(device).expect("the device answers");
            drop(logits);
            start.elapsed()
        };
        // The first one warms up.
        let passes = if self.args.smoke { 1 } else { 5 };
        (batch * seq_len) as f64 / median((0..=passes).map(|_| pass()).skip(1).collect()) * 1e3
    }
}
