//! The products with weights of each model size, in the three forms that training needs: floating-point operations per
//! second, against Burn's own matrix product on the same backend.
//!
//! ```sh
//! cargo bench --bench products                              # every size, f32 and bf16, on the CPU
//! cargo bench --bench products -- --size 60m --device flex
//! cargo bench --bench products -- --json results.jsonl      # also as JSON lines
//! ```
#![recursion_limit = "256"]

use std::time::Instant;

use burn::tensor::{DType, Distribution, Tensor};
use llama::model::backend::LlamaBackend;
use llama::model::backend::ops::{primitive, tensor};
use llama::model::{BackendTask, Precision, TrainBackend};

#[path = "common/mod.rs"]
mod common;
use common::{Arguments, append};

fn main() {
    common::run(|args| Products { args });
}

struct Products {
    args: Arguments,
}

impl BackendTask for Products {
    type Output = ();

    fn run<B: TrainBackend>(self, device: B::Device) {
        println!("GFLOP/s of the best round; plain is Burn's matmul in f32.");
        println!("| size | weight | tokens | device | product | plain | f32 | bf16 |");
        println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
        let rounds = if self.args.smoke { 1 } else { 40 };
        for (name, config, seq_len, batch) in common::sizes(&self.args.device) {
            if !self.args.selects(name) {
                continue;
            }
            let tokens = seq_len * batch;
            let (d, ff) = (config.d_model, config.d_ff);
            // The head's products run in chunks of rows.
            for (weight, rows, d_out, d_in) in [
                ("wq", tokens, d, d),
                ("w1", tokens, ff, d),
                ("w2", tokens, d, ff),
                ("output", 512, config.vocab_size, d),
            ] {
                let random = |rows, cols| {
                    Tensor::<B::InnerBackend, 2>::random([rows, cols], Distribution::Normal(0.0, 1.0), &device)
                };
                let (x, w, grad) = (random(rows, d_in), random(d_out, d_in), random(rows, d_out));
                let plain: [&dyn Fn() -> Tensor<B::InnerBackend, 2>; 3] =
                    [&|| x.clone().matmul(w.clone().transpose()), &|| grad.clone().matmul(w.clone()), &|| {
                        grad.clone().transpose().matmul(x.clone())
                    }];
                for (form, product) in ["x wᵀ", "dy w", "dyᵀ x"].into_iter().enumerate() {
                    let ours = |precision| {
                        let [x, w, grad] = [&x, &w, &grad].map(|tensor| primitive(tensor.clone()));
                        let out = match form {
                            0 => B::InnerBackend::project(x, w, precision),
                            1 => B::InnerBackend::project_backward_input(vec![(grad, w)], precision, DType::F32),
                            _ => B::InnerBackend::project_backward_weight(grad, x, precision),
                        };
                        tensor::<B::InnerBackend, 2>(out)
                    };
                    let flops = 2.0 * (rows * d_out * d_in) as f64;
                    let rate = |run: &dyn Fn() -> Tensor<B::InnerBackend, 2>| {
                        let time = |_| {
                            let start = Instant::now();
                            // Reading one number waits for the product without moving it.
                            run().narrow(0, 0, 1).narrow(1, 0, 1).into_data();
                            start.elapsed()
                        };
                        time(0);
                        flops / (0..rounds).map(time).min().unwrap_or_default().as_secs_f64() / 1e9
                    };
                    let plain = rate(plain[form]);
                    let [f32, bf16] = [Precision::F32, Precision::Bf16].map(|precision| rate(&|| ours(precision)));
                    let device = &self.args.device;
                    println!(
                        "| {name} | {weight} {d_out}x{d_in} | {rows} | {device} | {product} | {plain:.0} | {f32:.0} | {bf16:.0} |"
                    );
                    append(
                        &self.args,
                        &serde_json::json!({
                            "bench": "products", "size": name, "weight": weight, "rows": rows, "d_out": d_out, "d_in": d_in,
                            "device": device.to_string(), "product": product, "plain_gflops": plain, "f32_gflops": f32,
                            "bf16_gflops": bf16,
                        }),
                    );
                }
            }
        }
    }
}
