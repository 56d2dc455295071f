//! The model and its training against `transformers` and torch; see `tests/fixtures/README.md`.
//!
//! The tolerances are a few times the noise between the reference in f32 and in f64. They never loosen.

use burn::module::AutodiffModule;
use burn::tensor::Tensor;
use llama::data::loader::TokenBatch;
use llama::model::generate::{GenerateOptions, Generation, Sampling};
use llama::model::{Llama, LlamaBackend, LlamaConfig, RopeScaling, TrainBackend, hf, weights};
use llama::train::{AdamW, GradientList, OptimizerConfig, Pretrainer, ScheduleConfig, WarmupCosine};

use crate::support::{close, device_test, fixture, floats, ints, json, numbers, scale, stored, stored_ints, tolerance};

const VARIANTS: [&str; 3] = ["mha", "gqa", "gqa_tied"];

const LOGITS: f64 = 5e-5;
const HIDDEN: f64 = 5e-5;
const LOSS: f64 = 5e-6;
const GRADIENT: f64 = 1e-5;
const TRAIN_LOSS: f64 = 2e-5;
const TRAIN_NORM: f64 = 5e-4;
const FINAL_PARAMETER: f64 = 2e-4;
const LOG_LIKELIHOOD: f64 = 5e-5;

fn load<B: LlamaBackend>(variant: &str, device: &B::Device) -> (Llama<B>, LlamaConfig) {
    hf::load(&fixture(variant), device).unwrap()
}

/// Inputs and next-token targets of labels `[batch, len]`, the last position without a target.
fn shifted(labels: &[i64], len: usize) -> Vec<i64> {
    labels.chunks(len).flat_map(|row| row[1..].iter().copied().chain([-100])).collect()
}

fn mean_loss<B: LlamaBackend>(model: &Llama<B>, ids: &[i64], targets: &[i64], device: &B::Device) -> Tensor<B, 1> {
    let dims = [2, 32];
    let counted = targets.iter().filter(|&&t| t != -100).count() as f64;
    model.loss(ints(ids, dims, device), ints(targets, dims, device), 0.0).unwrap() / counted
}

#[test]
fn both_styles_of_configuration_are_read() {
    for variant in VARIANTS {
        let old = hf::load_config(&fixture(&format!("{variant}/config_v4.json"))).unwrap();
        assert_eq!(hf::load_config(&fixture(&format!("{variant}/config.json"))).unwrap(), old);
        assert_eq!(old.norm_eps, 1e-5);
        assert_eq!(old.tied_head, variant == "gqa_tied");
    }
}

device_test! {
    fn forward<B>(device) {
        for variant in VARIANTS {
            let (model, config) = load::<B::InnerBackend>(variant, &device);
            let path = format!("{variant}/ref.safetensors");
            let (ids, _) = stored_ints(&path, "input_ids");
            let check = |name: &str, found: Vec<f64>, cpu| {
                let expected = stored(&path, name);
                close(&format!("{variant} {name}"), &found, &expected, tolerance(cpu, scale(&expected)));
            };
            let tokens = ints::<B::InnerBackend>(&ids, [2, 32], &device);
            check("logits", floats(model.forward(tokens.clone(), None).unwrap()), LOGITS);

            let mut x = model.tok_embeddings.forward(tokens);
            check("hidden.0", floats(x.clone()), HIDDEN);
            x = model.layers[0].forward(x, model.block_spec(0, [2, 32], None).unwrap());
            check("hidden.1", floats(x.clone()), HIDDEN);
            x = model.layers[1].forward(x, model.block_spec(0, [2, 32], None).unwrap());
            check("hidden.prenorm_last", floats(x.clone()), HIDDEN);
            check("hidden.2", floats(model.norm.forward(x)), HIDDEN);
            assert_eq!(config.n_layers, 2);
        }
    }
}

device_test! {
    fn rotary_scalings<B>(device) {
        let (_, config) = load::<B::InnerBackend>("gqa", &device);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_seq_len: 32,
        };
        let (ids, _) = stored_ints("gqa_rope/ref.safetensors", "input_ids");
        for (name, rope_theta, rope_scaling) in [
            ("default", 1e4, None),
            ("llama3", 5e5, Some(llama3)),
            ("linear", 1e4, Some(RopeScaling::Linear { factor: 4.0 })),
        ] {
            let config = LlamaConfig { rope_theta, rope_scaling, ..config.clone() };
            let model = config.init::<B::InnerBackend>(0, &device).unwrap();
            let model = weights::load_model(model, &fixture("gqa/model.safetensors")).unwrap();
            let logits = model.forward(ints(&ids, [1, 96], &device), None).unwrap().narrow(1, 80, 16);
            let expected = stored("gqa_rope/ref.safetensors", &format!("logits_{name}_last16"));
            close(name, &floats(logits), &expected, tolerance(LOGITS, scale(&expected)));
        }
    }
}

device_test! {
    fn bf16_weights_computed_in_f32<B>(device) {
        let (model, _) = load::<B::InnerBackend>("gqa_bf16", &device);
        let (ids, _) = stored_ints("gqa_bf16/ref.safetensors", "input_ids");
        let expected = stored("gqa_bf16/ref.safetensors", "logits_upcast_f32");
        let logits = model.forward(ints(&ids, [1, 32], &device), None).unwrap();
        close("logits", &floats(logits), &expected, tolerance(LOGITS, scale(&expected)));
    }
}

device_test! {
    fn losses_and_every_gradient<B>(device) {
        for variant in VARIANTS {
            let (model, _) = load::<B>(variant, &device);
            let path = format!("{variant}/ref.safetensors");
            let (ids, _) = stored_ints(&path, "input_ids");
            let (masked, _) = stored_ints(&path, "masked_labels");
            let reference = json(&format!("{variant}/ref.json"));
            let expected = |key: &str| reference[key].as_f64().unwrap();

            let masked_loss = floats(mean_loss(&model, &ids, &shifted(&masked, 32), &device))[0];
            close("masked loss", &[masked_loss], &[expected("masked_loss")], tolerance(LOSS, 5.0));

            let loss = mean_loss(&model, &ids, &shifted(&ids, 32), &device);
            close("loss", &floats(loss.clone()), &[expected("loss")], tolerance(LOSS, 5.0));
            let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
            let mut list = GradientList::<B::InnerBackend>::default();
            list.accumulate::<B, _>(&model, grads);
            close("gradient norm", &[list.norm()], &[expected("grad_norm")], tolerance(TRAIN_NORM, 5.0));
            let names = if variant == "gqa_tied" { 20 } else { 21 };
            assert_eq!(list.entries.len(), names, "{variant}: a parameter has no gradient");
            for (path, gradient) in list.entries {
                let name = weights::file_name(&path).unwrap();
                let expected = stored(&format!("{variant}/grads.safetensors"), &name);
                let tolerance = tolerance(GRADIENT, scale(&expected));
                close(&format!("{variant} gradient of {name}"), &floats(gradient), &expected, tolerance);
            }
        }
    }
}

/// Twenty optimizer steps; returns the model after them.
fn train<B: TrainBackend>(variant: &str, decay_norms: bool, device: &B::Device) -> Pretrainer<B> {
    let reference = json(&format!("{variant}/ref.json"));
    let run = &reference[if decay_norms { "wd_all" } else { "wd_matrices" }];
    let config = OptimizerConfig { decay_norms, clip: reference["clip"].as_f64().unwrap(), ..Default::default() };
    let schedule = WarmupCosine::new(ScheduleConfig { peak_lr: 1e-2, final_fraction: 0.1, warmup_steps: 5, steps: 20 });
    let (tokens, dims) = stored_ints(&format!("{variant}/train_tokens.safetensors"), "tokens");
    assert_eq!(dims, [20, 4, 33]);

    let mut model = Pretrainer { llama: load::<B>(variant, device).0, z_loss: 0.0, loss_scale: 1.0 };
    let mut optimizer = AdamW::<B>::new(config);
    let (mut losses, mut norms, mut clips, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (step, tokens) in tokens.chunks(4 * 33).enumerate() {
        let part = |from: usize| tokens.chunks(33).flat_map(|row| &row[from..from + 32]).map(|&t| t as i32).collect();
        let batch = TokenBatch { inputs: part(0), targets: part(1), starts: None, batch: 4, seq_len: 32 };
        let output = burn::train::TrainStep::step(&model, batch);
        let mut grads = GradientList::default();
        grads.accumulate::<B, _>(&model, output.grads);
        let norm = grads.norm() / 128.0;
        let (lr, clip) = (schedule.lr(step as u64), optimizer.clip_factor(norm));
        model = optimizer.update(lr, model, grads, clip / 128.0);
        losses.push(output.item.loss());
        norms.push(norm);
        clips.push(clip);
        rates.push(lr);
    }
    let what = |name: &str| format!("{variant} decay_norms={decay_norms}: {name}");
    close(&what("losses"), &losses, &numbers(&run["loss"]), tolerance(TRAIN_LOSS, 6.0));
    close(&what("gradient norms"), &norms, &numbers(&run["grad_norm"]), tolerance(TRAIN_NORM, 6.0));
    close(&what("clip factors"), &clips, &numbers(&run["clip_coef"]), tolerance(TRAIN_NORM, 1.0));
    close(&what("learning rates"), &rates, &numbers(&run["lr"]), 1e-12);
    check_final(&model.llama, &what("final"), &run["final_stats"]);
    model
}

fn check_final<B: TrainBackend>(model: &Llama<B>, what: &str, stats: &serde_json::Value) {
    weights::visit_params(model, |path, value| {
        let name = weights::file_name(path).unwrap();
        let values: Vec<f64> = value.to_data().iter().collect();
        let first: Vec<f64> = values[..4].to_vec();
        let tolerance = tolerance(FINAL_PARAMETER, 2.0);
        close(&format!("{what} {name}"), &first, &numbers(&stats[&name]["first4"]), tolerance);
        let l2 = values.iter().map(|x| x * x).sum::<f64>().sqrt();
        close(&format!("{what} {name} l2"), &[l2], &[stats[&name]["l2"].as_f64().unwrap()], 10.0 * tolerance);
    });
}

fn check_final_file<B: TrainBackend>(model: &Llama<B>, file: &str) {
    weights::visit_params(model, |path, value| {
        let name = weights::file_name(path).unwrap();
        let values: Vec<f64> = value.to_data().iter().collect();
        close(&format!("{file} {name}"), &values, &stored(file, &name), tolerance(FINAL_PARAMETER, 2.0));
    });
}

fn greedy<B: LlamaBackend>(model: &Llama<B>, prompt: &serde_json::Value) -> Vec<f64> {
    let prompt: Vec<u32> = numbers(prompt).iter().map(|&id| id as u32).collect();
    let options = GenerateOptions { max_new_tokens: 32, sampling: Sampling::greedy(), ..Default::default() };
    let tokens = Generation::new(model, &[prompt], options).unwrap().finish().unwrap();
    tokens[0].iter().map(|&id| f64::from(id)).collect()
}

device_test! {
    fn twenty_adamw_steps_then_generation<B>(device) {
        for variant in VARIANTS {
            train::<B>(variant, true, &device);
            let trained = train::<B>(variant, false, &device).llama;
            check_final_file(&trained, &format!("{variant}/final_wd_matrices.safetensors"));
            let (fresh, _) = load::<B::InnerBackend>(variant, &device);
            let reference = json(&format!("{variant}/ref.json"));
            for (what, model) in [("generation", fresh), ("trained_generation", trained.valid())] {
                let expected = numbers(&reference[what]["greedy"]);
                assert_eq!(expected.len(), 32);
                assert_eq!(greedy(&model, &reference[what]["prompt"]), expected, "{variant} {what}");
            }
        }
        check_final_file(&train::<B>("gqa", true, &device).llama, "gqa/final_wd_all.safetensors");
    }
}

device_test! {
    fn log_likelihoods<B>(device) {
        for variant in VARIANTS {
            let (model, _) = load::<B::InnerBackend>(variant, &device);
            for pair in json(&format!("{variant}/ref.json"))["loglik"].as_array().unwrap() {
                let context = numbers(&pair["context"]);
                let text: Vec<i64> = context.iter().chain(&numbers(&pair["continuation"])).map(|&x| x as i64).collect();
                let len = text.len() - 1;
                let (inputs, targets) = (ints(&text[..len], [1, len], &device), ints(&text[1..], [1, len], &device));
                let losses = floats(model.token_losses(inputs, targets).unwrap());
                let found: Vec<f64> = losses[context.len() - 1..].iter().map(|loss| -loss).collect();
                let expected = numbers(&pair["token_logprobs"]);
                close(&format!("{variant} tokens"), &found, &expected, tolerance(LOG_LIKELIHOOD, scale(&expected)));
                let sum = pair["sum_logprob"].as_f64().unwrap();
                close("sum", &[found.iter().sum()], &[sum], tolerance(LOG_LIKELIHOOD, sum.abs()));
            }
        }
    }
}
