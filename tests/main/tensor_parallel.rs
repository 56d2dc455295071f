//! Models that are divided among devices, against the same models on one.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use llama::data::tokenizer::Tokenizer;
use llama::model::lora::LoraConfig;
use llama::model::shard::{Split, Team};
use llama::model::weights::{self, TrainedParam};
use llama::model::{Compute, KvCache, LlamaConfig, Precision, Recompute, TrainBackend, hf};
use llama::train::parallel::join;
use llama::train::{GradientList, Group, checkpoint};

use crate::behaviour::{run_config, small, tokens};
use crate::parallel::{assert_same, device_is_flex, losses, together};
use crate::programs;
use crate::support::{close, device_test, f32s, floats, ints, scale, tolerance};

const BATCH: usize = 3;
const SEQ_LEN: usize = 17;

/// What every member of a team of `parts` makes.
fn in_team<T: Send>(parts: usize, member: impl Fn(Team) -> T + Sync) -> Vec<T> {
    let groups = join(parts, None).unwrap().into_iter().map(|group| Arc::new(group.dividing_models(parts).unwrap()));
    let member = &member;
    std::thread::scope(|scope| {
        let members: Vec<_> = groups.map(|group| scope.spawn(move || member(group.team()))).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

/// A loss and the gradients of all parameters, by path.
type Gradients = (f64, BTreeMap<String, Vec<f64>>);

/// What a member of a team has of the loss and of the gradients.
fn part_of_gradients<B: TrainBackend>(
    config: &LlamaConfig,
    team: &Team,
    compute: Compute,
    device: &B::Device,
) -> (f64, BTreeMap<String, TensorData>) {
    let model = config.init_in::<B>(team, 3, device).unwrap().with_compute(compute);
    let upload =
        |ids: Vec<i32>| ints::<B>(&ids.into_iter().map(i64::from).collect::<Vec<_>>(), [BATCH, SEQ_LEN], device);
    let starts = (0..BATCH * SEQ_LEN).map(|at| if at % SEQ_LEN < 5 { 0 } else { 5 }).collect();
    let mut targets = tokens(BATCH * SEQ_LEN, 8);
    targets[20..30].fill(-100);
    let (inputs, targets) = (upload(tokens(BATCH * SEQ_LEN, 7)), upload(targets));
    let loss = model.document_loss(inputs, targets, Some(upload(starts)), 1e-4).unwrap();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    let mut list = GradientList::default();
    list.accumulate::<B, _>(&model, grads);
    let dims: BTreeMap<_, _> =
        weights::trained_params(&model).into_iter().map(|TrainedParam { path, dims, .. }| (path, dims)).collect();
    let shaped = |(path, gradient): (String, Tensor<_, 1>)| {
        let mut data = gradient.into_data();
        data.shape = dims[&path].clone().into();
        (path, data)
    };
    (floats(loss)[0], list.entries.into_iter().map(shaped).collect())
}

fn gradients<B: TrainBackend>(config: &LlamaConfig, parts: usize, compute: Compute, device: &B::Device) -> Gradients {
    let mut members = in_team(parts, |team| part_of_gradients::<B>(config, &team, compute, device));
    let loss = members.iter().map(|(loss, _)| loss).sum();
    let paths: Vec<_> = members[0].1.keys().cloned().collect();
    let whole = |path: String| {
        let of_members = members.iter_mut().map(|(_, gradients)| gradients.remove(&path).unwrap());
        let values = match Split::of(&path) {
            // Each has the gradients of its rows.
            Split::Whole => of_members
                .map(|data| data.iter::<f64>().collect::<Vec<_>>())
                .reduce(|sum, part| sum.iter().zip(part).map(|(sum, part)| sum + part).collect())
                .unwrap(),
            split => split.join(of_members.collect()).iter().collect(),
        };
        (path, values)
    };
    (loss, paths.into_iter().map(whole).collect())
}

fn four_heads() -> LlamaConfig {
    LlamaConfig { n_kv_heads: 4, tied_head: true, ..small() }
}

device_test! {
    fn gradients_of_a_divided_model_are_those_of_the_whole<B>(device) {
        for (config, parts) in [(small(), 2), (four_heads(), 4)] {
            for recompute in [Recompute::Selective, Recompute::None, Recompute::Full] {
                let compute = Compute { recompute, ..Default::default() };
                let (loss, expected) = gradients::<B>(&config, 1, compute, &device);
                let (found, gradients) = gradients::<B>(&config, parts, compute, &device);
                close("loss", &[found], &[loss], tolerance(2e-6 * loss, loss));
                assert_eq!(gradients.len(), expected.len());
                for (path, gradient) in &gradients {
                    let expected = &expected[path];
                    let what = format!("{parts} parts, {recompute:?}: {path}");
                    close(&what, gradient, expected, tolerance(2e-6, 1.0) * scale(expected));
                }
            }
        }
    }
}

device_test! {
    fn gradients_of_a_divided_model_in_bf16<B>(device) {
        if Precision::Bf16.check::<B>("precision", &device).is_err() {
            return;
        }
        let compute = Compute { precision: Precision::Bf16, ..Default::default() };
        let (loss, expected) = gradients::<B>(&small(), 1, compute, &device);
        let (found, gradients) = gradients::<B>(&small(), 2, compute, &device);
        close("loss", &[found], &[loss], 1e-3 * loss);
        for (path, gradient) in &gradients {
            close(path, gradient, &expected[path], 2e-2 * scale(&expected[path]));
        }
    }
}

device_test! {
    fn a_divided_model_predicts_as_the_whole<B>(device) {
        let config = small();
        let logits = |team: Team| {
            let model = config.init_in::<B>(&team, 3, &device).unwrap();
            let ids: Vec<i64> = tokens(2 * 9, 4).into_iter().map(i64::from).collect();
            let ids = ints::<B>(&ids, [2, 9], &device);
            let mut cache = KvCache::new(&model, 2, 12).unwrap();
            let mut all = vec![floats(model.forward(ids.clone(), None).unwrap())];
            for range in [0..6, 6..7, 7..9] {
                all.push(floats(model.forward(ids.clone().slice([0..2, range]), Some(&mut cache)).unwrap()));
            }
            all.push(floats(model.forward(ids.slice([0..1, 0..1]), None).unwrap()));
            all
        };
        let expected = logits(Team::default());
        for found in in_team(2, logits) {
            for (found, expected) in found.iter().zip(&expected) {
                close("logits", found, expected, tolerance(2e-6, 1.0) * scale(expected));
            }
        }
    }
}

/// The members of `count` whose every two divide a model.
fn pairs(count: usize) -> Vec<Group> {
    join(count, None).unwrap().into_iter().map(|group| group.dividing_models(2).unwrap()).collect()
}

fn tensors(folder: &Path, file: &str) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(folder.join(file)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_string(), f32s(view.data()))).collect()
}

device_test! {
    fn runs_with_divided_models_are_those_with_whole_ones<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let config = run_config(folder.path());
        let one = together::<B>(&config, &device, vec![Group::alone()], &at("one"), None);
        let two = together::<B>(&config, &device, pairs(2), &at("two"), None);
        let four = together::<B>(&config, &device, pairs(4), &at("four"), None);
        let again = together::<B>(&config, &device, pairs(4), &at("again"), None);
        // A checkpoint is whole, whatever wrote it.
        let first = |run: &str| checkpoint::list(&at(run)).unwrap()[0].1.clone();
        let joined = together::<B>(&config, &device, vec![Group::alone()], &at("joined"), Some(&first("four")));
        let divided = together::<B>(&config, &device, pairs(4), &at("divided"), Some(&first("one")));
        for (run, name) in [(&two, "two"), (&four, "four"), (&joined, "joined"), (&divided, "divided")] {
            let (found, expected) = (losses(&at(name)), losses(&at("one")));
            close(name, &found, &expected[expected.len() - found.len()..], tolerance(1e-5, 5.0));
            for (file, near) in [("model.safetensors", 2e-3), ("optimizer.safetensors", 2e-3)] {
                let (found, expected) = (tensors(&run.checkpoint, file), tensors(&one.checkpoint, file));
                assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
                for (tensor, expected) in &expected {
                    let what = format!("{name}: {tensor}");
                    close(&what, &found[tensor], expected, near * scale(expected));
                }
            }
        }
        if device_is_flex() {
            assert_same(&four.checkpoint, &again.checkpoint);
        }
    }
}

device_test! {
    fn what_cannot_be_divided_is_told<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let mut config = run_config(folder.path());
        let error = join(3, None).unwrap().remove(0).dividing_models(2).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("tensor_parallel is 2, of which 3 devices are no multiple"), "{error}");
        let error = small().init_in::<B>(&in_team(4, |team| team)[1], 0, &device).unwrap_err().to_string();
        assert!(error.contains("n_kv_heads is 2, which 4 devices cannot divide"), "{error}");
        let part = small().init_in::<B>(&in_team(2, |team| team)[0], 0, &device).unwrap();
        let error = part.with_adapters(&LoraConfig::default(), 0).unwrap_err().to_string();
        assert!(error.contains("adapters are for models that are whole"), "{error}");
        config.batch.accumulation = 3;
        for outcome in crate::parallel::run::<B>(pairs(4), &device, |_| (config.clone(), None, Default::default())) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("batch.accumulation is 3, which 2 groups of 2 devices"), "{error}");
        }
        // Members that do not divide models alike.
        config.batch.accumulation = 2;
        let mut groups = join(2, None).unwrap();
        let second = groups.remove(1).dividing_models(2).unwrap();
        groups.push(second);
        for outcome in crate::parallel::run::<B>(groups, &device, |_| (config.clone(), None, Default::default())) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("tensor_parallel of member 1"), "{error}");
        }
    }
}

/// Two processes of the program, of which the second has a part of the model and ends with the first; and two devices of one.
#[test]
fn two_processes_generate_what_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let config = LlamaConfig { vocab_size: 259, ..small() };
    hf::save(&config.init::<burn::backend::Flex>(5, &Default::default()).unwrap(), &config, folder.path()).unwrap();
    Tokenizer::bytes().save(&folder.path().join("tokenizer.model")).unwrap();
    let device = crate::support::device().to_string();
    let generate = |device: &str| {
        let mut command = programs::program("generate");
        command.arg("--model").arg(folder.path()).args([
            "--prompt",
            "impl",
            "--max-new-tokens",
            "20",
            "--temperature",
            "0",
        ]);
        command.args(["--device", device]);
        command
    };
    let expected = programs::run(&mut generate(&device));
    // The devices of one process have threads of their own, which must not wait for the only one that rayon has: it waits for them.
    let mut two = generate(&format!("{device},{device}"));
    assert_eq!(programs::run(two.env("RAYON_NUM_THREADS", "1")), expected);
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let node = |node| {
        let mut command = generate(&device);
        command.args(["--nodes", "2", "--node", node, "--address", &address]);
        command
    };
    let other = node("1").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(programs::run(&mut node("0")), expected);
    let other = other.wait_with_output().unwrap();
    assert!(other.status.success() && other.stdout.is_empty(), "{}", String::from_utf8_lossy(&other.stderr));
}
