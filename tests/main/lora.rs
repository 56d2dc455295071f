//! Adapters against PEFT, on weights in every format, and their files.

use std::path::Path;

use burn::optim::GradientsParams;
use burn::tensor::{Int, Tensor};
use llama::model::formats::{Checkpoint, ModelWeights, Weights};
use llama::model::lora::{self, Adapters, LoraConfig};
use llama::model::{KvCache, Llama, LlamaConfig, Precision, TrainBackend, WeightFormat};
use llama::train::GradientList;

use crate::programs::{program, run};
use crate::support::{close, device, device_test, fixture, floats, ints, scale, stored, stored_ints, tolerance};

fn base<B: TrainBackend>(format: WeightFormat, device: &B::Device) -> (Llama<B>, LlamaConfig) {
    let checkpoint = Checkpoint::open(&fixture("gqa")).unwrap();
    (checkpoint.load::<B>(format, device, |_| ()).unwrap(), checkpoint.config().clone())
}

fn tokens<B: TrainBackend>(device: &B::Device) -> (Tensor<B, 2, Int>, Tensor<B, 2, Int>) {
    let (ids, dims) = stored_ints("lora/ref.safetensors", "input_ids");
    let rows = dims[1];
    let target = |i: usize| if i % rows == rows - 1 { -100 } else { ids[i + 1] };
    let targets: Vec<i64> = (0..ids.len()).map(target).collect();
    (ints(&ids, [2, rows], device), ints(&targets, [2, rows], device))
}

/// Mean loss and the gradients of all parameters that have one, by path.
fn gradients<B: TrainBackend>(model: &Llama<B>, device: &B::Device) -> (f64, Vec<(String, Vec<f64>)>) {
    let (inputs, targets) = tokens::<B>(device);
    let loss = model.loss(inputs, targets, 0.0).unwrap().div_scalar(46.0);
    let value = floats(loss.clone())[0];
    let mut list = GradientList::default();
    list.accumulate::<B, _>(model, GradientsParams::from_grads(loss.backward(), model));
    (value, list.entries.into_iter().map(|(path, gradient)| (path, floats(gradient))).collect())
}

/// PEFT's name of an adapter's parameter.
fn peft_name(path: &str) -> String {
    let (layer, part) = path.split_once(".adapter.").unwrap();
    let stem = llama::model::weights::file_name(&format!("{layer}.weight")).unwrap();
    let part = if part == "a" { "lora_A" } else { "lora_B" };
    format!("base_model.model.{}.{part}.weight", stem.trim_end_matches(".weight"))
}

device_test! {
    fn adapters_of_peft_give_its_logits_and_gradients<B>(device) {
        let (model, _) = base::<B>(WeightFormat::F32, &device);
        let model = Adapters::open(&fixture("lora")).unwrap().apply(model).unwrap();
        let expected = stored("lora/ref.safetensors", "logits");
        let (inputs, _) = tokens::<B>(&device);
        let logits = floats(model.forward(inputs.clone(), None).unwrap());
        close("logits", &logits, &expected, tolerance(2e-5, scale(&expected)));
        // Decoding goes the same way.
        for (kept, rounding) in [(Precision::F32, 2e-5), (Precision::F16, 4e-3 * scale(&expected))] {
            if kept.check::<B>("cache", &device).is_ok() {
                let model = model.clone().with_cache(kept);
                let mut cache = KvCache::new(&model, 2, 24).unwrap();
                let cached = floats(model.forward(inputs.clone(), Some(&mut cache)).unwrap());
                close("cached", &cached, &expected, tolerance(rounding, scale(&expected)));
            }
        }

        let (loss, found) = gradients(&model, &device);
        let expected_loss = stored("lora/ref.safetensors", "loss")[0];
        assert!((loss - expected_loss).abs() < tolerance(1e-5, expected_loss), "{loss} {expected_loss}");
        // The adapters' and no others.
        assert_eq!(found.len(), 2 * 5 * 2);
        for (path, gradient) in &found {
            let expected = stored("lora/ref.safetensors", &format!("grad.{}", peft_name(path)));
            close(path, gradient, &expected, tolerance(1e-5, 1.0) * scale(&expected).max(1.0));
        }

        let merged = model.merge_adapters();
        let logits = floats(merged.forward(inputs, None).unwrap());
        let expected = stored("lora/ref.safetensors", "logits");
        close("merged", &logits, &expected, tolerance(2e-5, scale(&expected)));
    }
}

device_test! {
    /// Gradients through frozen weights in fewer bytes are those through the same weights in f32.
    fn frozen_weights_may_be_stored_in_fewer_bytes<B>(device) {
        // Rows of whole blocks.
        let config = LlamaConfig { d_ff: 96, ..base::<B>(WeightFormat::F32, &device).1 };
        let adapted = |model: Llama<B>| model.with_adapters(&LoraConfig::default(), 3).unwrap();
        for format in [WeightFormat::Bf16, WeightFormat::F16, WeightFormat::Q8, WeightFormat::Q4] {
            if format.check::<B>(&device).is_err() {
                continue;
            }
            let short = config.init::<B>(5, &device).unwrap().with_weights(format).unwrap();
            let wide = short.clone().with_weights(WeightFormat::F32).unwrap();
            let (expected_loss, expected) = gradients(&adapted(wide), &device);
            let (loss, found) = gradients(&adapted(short), &device);
            assert!((loss - expected_loss).abs() < tolerance(1e-4, expected_loss), "{format}: {loss} {expected_loss}");
            assert_eq!(found.len(), expected.len());
            for ((path, found), (_, expected)) in found.iter().zip(&expected) {
                close(&format!("{format}: {path}"), found, expected, tolerance(1e-4, 1.0) * scale(expected).max(1.0));
            }
        }
    }
}

device_test! {
    fn new_adapters_change_nothing_and_are_all_that_is_trained<B>(device) {
        let (model, config) = base::<B>(WeightFormat::F32, &device);
        let (inputs, _) = tokens::<B>(&device);
        let before = floats(model.forward(inputs.clone(), None).unwrap());
        let targets = vec!["q_proj".to_string(), "down_proj".into()];
        let lora = LoraConfig { rank: 2, alpha: 4.0, targets };
        let model = model.with_adapters(&lora, 7).unwrap();
        close("new", &floats(model.forward(inputs, None).unwrap()), &before, tolerance(1e-6, scale(&before)));
        let (_, found) = gradients(&model, &device);
        let paths: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths.len(), config.n_layers * 2 * 2, "{paths:?}");
        assert!(paths.iter().all(|path| path.contains(".wq.adapter.") || path.contains(".w2.adapter.")), "{paths:?}");
        // `B` is zero, so nothing reaches `A` yet.
        for (path, gradient) in &found {
            assert_eq!(scale(gradient) > 0.0, path.ends_with(".b"), "{path}");
        }
    }
}

/// What is written is read back, by us, and by the merge that converts.
#[test]
fn files_round_trip_and_merge() {
    type B = burn::backend::Autodiff<burn::backend::Flex>;
    let device = Default::default();
    let adapters = Adapters::open(&fixture("lora")).unwrap();
    let model = adapters.apply(base::<B>(WeightFormat::F32, &device).0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"].map(String::from).into();
    lora::save(&model, &LoraConfig { rank: 3, alpha: 5.0, targets }, "../gqa", folder.path()).unwrap();
    let tensors = |folder: &Path| {
        let bytes = std::fs::read(folder.join(lora::WEIGHTS_FILE)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> = file.iter().map(|(name, view)| (name.to_string(), view.data().to_vec())).collect();
        all.sort();
        all
    };
    assert_eq!(tensors(folder.path()), tensors(&fixture("lora")));

    let again = Adapters::open(folder.path()).unwrap();
    let checkpoint = Checkpoint::open(&fixture("gqa")).unwrap();
    let merged = again.merged(&checkpoint);
    let in_memory = ModelWeights::new(&model.merge_adapters());
    for (path, dims) in checkpoint.config().parameters() {
        let [found, expected] =
            [&merged as &dyn Weights, &in_memory].map(|weights| weights.weight(&path, &dims).unwrap());
        let [found, expected] = [found, expected].map(|data| data.convert::<f64>().to_vec::<f64>().unwrap());
        close(&path, &found, &expected, 1e-6);
    }
}

#[test]
fn bad_adapters_are_errors() {
    type B = burn::backend::Flex;
    let device = Default::default();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let open_error = || Adapters::open(folder.path()).err().unwrap().to_string();
    assert!(open_error().contains(lora::CONFIG_FILE));
    let config = std::fs::read_to_string(fixture("lora").join(lora::CONFIG_FILE)).unwrap();
    std::fs::copy(fixture("lora").join(lora::WEIGHTS_FILE), at(lora::WEIGHTS_FILE)).unwrap();
    for (from, to, reason) in [
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"LORA\"", "\"IA3\"", "IA3"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"r\": 3", "\"r\": 0", "`r` is 0"),
        ("\"r\": 3", "\"r\": \"three\"", lora::CONFIG_FILE),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(at(lora::CONFIG_FILE), config.replace(from, to)).unwrap();
        assert!(open_error().contains(reason), "{to}: {}", open_error());
    }
    // Another rank than the tensors have, and a model with fewer layers.
    let model = || Checkpoint::open(&fixture("gqa")).unwrap();
    let apply_error = |llama: Llama<burn::backend::Flex>| {
        Adapters::open(folder.path()).unwrap().apply(llama).err().unwrap().to_string()
    };
    std::fs::write(at(lora::CONFIG_FILE), config.replace("\"r\": 3", "\"r\": 4")).unwrap();
    let llama = || model().load::<B>(WeightFormat::F32, &device, |_| ()).unwrap();
    assert!(apply_error(llama()).contains("lora_A"), "{}", apply_error(llama()));
    std::fs::write(at(lora::CONFIG_FILE), &config).unwrap();
    let mut short = llama();
    short.layers.truncate(1);
    assert!(apply_error(short).contains("layers.1"));
    // No panic for any cut of the file.
    let bytes = std::fs::read(at(lora::WEIGHTS_FILE)).unwrap();
    for len in (0..bytes.len()).step_by(997) {
        std::fs::write(at(lora::WEIGHTS_FILE), &bytes[..len]).unwrap();
        assert!(open_error().contains(lora::WEIGHTS_FILE));
    }
    for (lora, field) in [
        (LoraConfig { rank: 0, ..Default::default() }, "lora.rank"),
        (LoraConfig { alpha: -1.0, ..Default::default() }, "lora.alpha"),
        (LoraConfig { targets: vec!["wq".into()], ..Default::default() }, "lora.targets"),
    ] {
        assert!(llama().with_adapters(&lora, 0).unwrap_err().to_string().contains(field));
    }
}

/// The way of a user: pretrain, fine-tune, stop and go on, generate, merge. A run in two parts ends as one in a piece.
#[test]
fn finetune_resume_generate_and_merge() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let device = device().to_string();
    let mut pretrain = program("pretrain");
    pretrain.args(["--text", "llama-model/src", "--extensions", "rs", "--vocab-size", "400", "--seq-len", "64"]);
    pretrain
        .args(["--steps", "3", "--sequences", "2", "--eval-every", "0", "--device", &device])
        .arg("--run")
        .arg(at("base"));
    run(&mut pretrain);
    let lines: String =
        (0..40).map(|i| format!("{{\"prompt\": \"{i} + 1 =\", \"completion\": \" {}\"}}\n", i + 1)).collect();
    std::fs::write(at("data.jsonl"), lines).unwrap();
    let finetune_on = |devices: &str, name: &str, steps: &str, resume: bool| {
        let mut command = program("finetune");
        command.args(["--device", devices]).arg("--run").arg(at(name));
        if resume {
            command.arg("--resume");
        } else {
            command.args(["--steps", steps, "--seq-len", "48", "--sequences", "2", "--rank", "4", "--lr", "0.002"]);
            command.arg("--model").arg(at("base")).arg("--data").arg(at("data.jsonl"));
        }
        command
    };
    let finetune = |name: &str, steps: &str, resume: bool| finetune_on(&device, name, steps, resume);
    let out = run(&mut finetune("whole", "60", false));
    assert!(out.contains("38 to train on") && out.contains("2 held out") && out.contains("step     60/60"), "{out}");
    let loss = |step: usize| {
        let text = std::fs::read_to_string(at("whole/metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let line = lines.iter().find(|line| line["step"] == step && line.get("lr").is_some()).unwrap();
        line["loss"].as_f64().unwrap()
    };
    assert!(loss(60) < 0.9 * loss(1), "{} {}", loss(1), loss(60));
    // A checkpoint from the middle, as if the run had ended there.
    let step = |name: &str, step: usize| at(name).join(format!("checkpoints/step-{step:08}"));
    std::fs::create_dir_all(at("parts/checkpoints")).unwrap();
    run(std::process::Command::new("cp").arg("-r").arg(step("whole", 50)).arg(step("parts", 50)));
    run(&mut finetune("parts", "", true));
    if device == "flex" {
        let weights = |name: &str| std::fs::read(step(name, 60).join(lora::WEIGHTS_FILE)).unwrap();
        assert!(weights("whole") == weights("parts"), "a resumed run is another run");
    }

    // Two devices that share its steps, as one that takes both parts.
    run(finetune("two parts", "5", false).args(["--accumulation", "2"]));
    run(finetune_on(&format!("{device},{device}"), "shared", "5", false).args(["--accumulation", "2"]));
    if device == "flex" {
        let weights = |name: &str| std::fs::read(step(name, 5).join(lora::WEIGHTS_FILE)).unwrap();
        assert!(weights("two parts") == weights("shared"), "two devices train something else than one");
    }

    let generate = |model: &str, more: &[&str]| {
        let mut command = program("generate");
        command.args(["--prompt", "7 + 1 =", "--temperature", "0", "--max-new-tokens", "8", "--device", &device]);
        run(command.args(more).current_dir(folder.path()).arg("--model").arg(at(model)))
    };
    let tuned = generate("base", &["--adapter", "whole"]);
    run(program("convert").arg(at("base")).arg(at("merged")).arg("--adapter").arg(at("whole")));
    assert_eq!(generate("merged", &[]), tuned);
    assert_ne!(generate("base", &["--log-probs"]), generate("base", &["--log-probs", "--adapter", "whole"]));
}
