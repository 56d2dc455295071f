//! Each operation of the backend trait against the plain Burn composition on the same backend, forward and backward.
//!
//! ```sh
//! cargo bench --bench operations                       # on the CPU
//! cargo bench --bench operations --features cuda -- --device cuda
//! cargo bench --bench operations -- --json results.jsonl   # also as JSON lines
//! ```
//!
//! A row names operation, shape, dtype and device. Data is made outside the timer, the device is synchronised before
//! the clock stops, and the two sides alternate, so that a change in the machine's load meets both.
#![recursion_limit = "256"]

use std::time::Instant;

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Distribution, Int, Tensor};
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{AttentionSpec, LlamaBackend, LossSpec, ops, reference};
use llama::model::{BackendTask, Precision, TrainBackend};

const EPS: f64 = 1e-5;

#[path = "common/mod.rs"]
mod common;
use common::{Arguments, append, median};

fn main() {
    common::run(|args| Operations { args });
}

struct Operations {
    args: Arguments,
}

impl Operations {
    fn report(&self, name: &str, shape: &str, plain: f64, ours: f64) {
        println!("| {name} | {shape} | f32 | {} | {plain:.2} | {ours:.2} | {:.1} |", self.args.device, plain / ours);
        append(
            &self.args,
            &serde_json::json!({
                "bench": "operations", "operation": name, "shape": shape, "device": self.args.device.to_string(),
                "plain_ms": plain, "ours_ms": ours,
            }),
        );
    }
}

/// A function of float tensors whose result is summed and differentiated.
type Op<'a, B> = &'a dyn Fn(&[Tensor<B, 2>]) -> Tensor<B, 2>;

impl BackendTask for Operations {
    type Output = ();

    fn run<B: TrainBackend>(self, device: B::Device) {
        println!("| operation | shape | dtype | device | plain ms | ours ms | ratio |");
        println!("| --- | --- | --- | --- | --- | --- | --- |");
        let (tokens, d_model, d_ff, vocab) = if self.args.smoke { (8, 16, 32, 64) } else { (2048, 512, 1376, 32_000) };
        let bench = |name: &str, shapes: &[[usize; 2]], ours: Op<B>, plain: Op<B>| {
            let inputs: Vec<Tensor<B, 2>> = shapes
                .iter()
                .map(|dims| Tensor::random(*dims, Distribution::Normal(0.0, 1.0), &device).require_grad())
                .collect();
            let step = |op: Op<B>| {
                let start = Instant::now();
                let grads = op(&inputs).sum().backward();
                let taken: Vec<_> = inputs.iter().filter_map(|x| x.grad(&grads)).collect();
                B::sync(&device).expect("the device answers");
                drop(taken);
                start.elapsed()
            };
            let (mut ours_times, mut plain_times) = (Vec::new(), Vec::new());
            let rounds = if self.args.smoke { 1 } else { 15 };
            step(ours);
            step(plain);
            for _ in 0..rounds {
                ours_times.push(step(ours));
                plain_times.push(step(plain));
            }
            let (ours, plain) = (median(ours_times), median(plain_times));
            let shape: Vec<String> = shapes.iter().map(|[a, b]| format!("{a}x{b}")).collect();
            self.report(name, &shape.join(" "), plain, ours);
        };

        bench(
            "linear",
            &[[tokens, d_model], [d_ff, d_model]],
            &|x| ops::linear(x[0].clone(), x[1].clone(), Precision::F32),
            &|x| x[0].clone().matmul(x[1].clone().transpose()),
        );
        bench(
            "rms_norm",
            &[[tokens, d_model], [1, d_model]],
            &|x| ops::rms_norm(x[0].clone(), x[1].clone().flatten(0, 1), EPS),
            &|x| {
                let weight = primitive(x[1].clone().flatten::<1>(0, 1));
                tensor(reference::rms_norm::<B>(primitive(x[0].clone()), weight, EPS).0)
            },
        );
        bench("swiglu", &[[tokens, d_ff], [tokens, d_ff]], &|x| ops::swiglu(x[0].clone(), x[1].clone()), &|x| {
            tensor(reference::swiglu::<B>(primitive(x[0].clone()), primitive(x[1].clone())))
        });
        let heads = d_model / 8;
        let split = |x: &Tensor<B, 2>| x.clone().reshape([4, tokens / 4, 8, heads]);
        let [cos, sin] =
            [0, 1].map(|_| Tensor::<B, 2>::random([tokens / 4, heads / 2], Distribution::Uniform(-1.0, 1.0), &device));
        bench(
            "rotary",
            &[[tokens, d_model]],
            &|x| ops::rotary(split(&x[0]), cos.clone(), sin.clone()).reshape([tokens, d_model]),
            &|x| {
                let tables = (primitive(cos.clone()), primitive(sin.clone()));
                let out = reference::rotary::<B>(primitive(split(&x[0])), tables.0, tables.1, false);
                tensor::<B, 4>(out).reshape([tokens, d_model])
            },
        );
        bench(
            "causal_attention",
            &[[tokens, d_model], [tokens, d_model], [tokens, d_model]],
            &|x| {
                ops::causal_attention(split(&x[0]), split(&x[1]), split(&x[2]), None, Precision::F32)
                    .reshape([tokens, d_model])
            },
            &|x| {
                let [q, k, v] = [0, 1, 2].map(|i| primitive(split(&x[i])));
                let spec = AttentionSpec::new(heads, Precision::F32);
                let out = reference::causal_attention::<B>(q, k, v, None, spec).0;
                tensor::<B, 4>(out).reshape([tokens, d_model])
            },
        );
        let targets = targets::<B>(tokens, vocab, &device);
        bench(
            "linear_cross_entropy",
            &[[tokens, d_model], [vocab, d_model]],
            &|x| {
                ops::linear_cross_entropy(x[0].clone(), x[1].clone(), targets.clone(), LossSpec::default()).unsqueeze()
            },
            &|x| {
                let logits = x[0].clone().matmul(x[1].clone().transpose());
                let log_probs = burn::tensor::activation::log_softmax(logits, 1);
                log_probs.gather(1, targets.clone().unsqueeze_dim(1)).neg()
            },
        );
        update::<B>(&self, d_model * d_ff, &device);
    }
}

fn targets<B: Backend>(tokens: usize, vocab: usize, device: &B::Device) -> Tensor<B, 1, Int> {
    Tensor::arange(0..tokens as i64, device).mul_scalar(7).remainder_scalar(vocab as i64)
}

/// AdamW has no backward: the two bodies on the inner backend.
fn update<B: TrainBackend>(run: &Operations, len: usize, device: &B::Device) {
    type Inner<B> = <B as AutodiffBackend>::InnerBackend;
    let step = llama::model::backend::AdamWStep {
        lr: 1e-3,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 10,
        grad_scale: 0.5,
    };
    let random = || Tensor::<Inner<B>, 1>::random([len], Distribution::Uniform(0.0, 1.0), device);
    let grad = random();
    let time = |ours: bool, state: &mut Option<[Tensor<Inner<B>, 1>; 3]>| {
        let [param, m, v] = state.take().expect("it is put back").map(primitive);
        let start = Instant::now();
        let tensors = [param, primitive(grad.clone()), m, v];
        let new = match ours {
            true => Inner::<B>::adamw(vec![tensors], &step).remove(0),
            false => reference::adamw::<Inner<B>>(tensors, &step),
        };
        let new = new.map(tensor);
        <Inner<B> as Backend>::sync(device).expect("the device answers");
        *state = Some(new);
        start.elapsed()
    };
    let mut states = [0, 1].map(|_| Some([random(), random(), random()]));
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..if run.args.smoke { 2 } else { 16 } {
        for (which, times) in times.iter_mut().enumerate() {
            let time = time(which == 1, &mut states[which]);
            if round > 0 {
                times.push(time);
            }
        }
    }
    let [plain, ours] = times.map(median);
    run.report("adamw", &len.to_string(), plain, ours);
}
