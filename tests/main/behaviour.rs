//! What a model and a run must do, whatever their numbers.

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use llama::data::NoProgress;
use llama::data::loader::TokenBatch;
use llama::data::prepare::{PrepareOptions, prepare};
use llama::data::source::Sources;
use llama::data::tokenizer::{Codec, Tokenizer};
use llama::model::{KvCache, LlamaConfig, ModelError, Precision, TrainBackend, WeightFormat, weights};
use llama::train::log::{self, Line};
use llama::train::{
    AdamW, GradientList, Group, Interrupter, OptimizerConfig, PretrainConfig, Pretrainer, RunOptions, Stop, TrainError,
    checkpoint, pretrain,
};

use crate::support::{close, device, device_test, floats, scale, tolerance};

pub fn small() -> LlamaConfig {
    LlamaConfig {
        d_model: 64,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        d_ff: 176,
        ..LlamaConfig::tiny(259)
    }
}

pub fn tokens(len: usize, seed: usize) -> Vec<i32> {
    (0..len).map(|i| ((i * 37 + seed * 101 + i * i * 7) % 259) as i32).collect()
}

fn upload<B: Backend>(ids: Vec<i32>, dims: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(ids, dims), device)
}

fn batch(rows: std::ops::Range<usize>, seq_len: usize) -> TokenBatch {
    let all = rows.clone().map(|row| tokens(seq_len + 1, row));
    let (inputs, targets) = all.map(|row| (row[..seq_len].to_vec(), row[1..].to_vec())).unzip::<_, _, Vec<_>, Vec<_>>();
    TokenBatch { inputs: inputs.concat(), targets: targets.concat(), starts: None, batch: rows.len(), seq_len }
}

/// One optimizer step over micro-batches.
fn step<B: TrainBackend>(
    model: Pretrainer<B>,
    optimizer: &mut AdamW<B>,
    batches: &[TokenBatch],
    lr: f64,
) -> (Pretrainer<B>, f64) {
    let (mut grads, mut loss, mut count) = (GradientList::default(), 0.0, 0);
    for batch in batches {
        let output = burn::train::TrainStep::step(&model, batch.clone());
        grads.accumulate::<B, _>(&model, output.grads);
        loss += output.item.loss_sum;
        count += output.item.tokens;
    }
    let per_token = 1.0 / count as f64;
    let scale = optimizer.clip_factor(grads.norm() * per_token) * per_token;
    (optimizer.update(lr, model, grads, scale), loss * per_token)
}

fn new_model<B: TrainBackend>(config: &LlamaConfig, device: &B::Device) -> (Pretrainer<B>, AdamW<B>) {
    (
        Pretrainer { llama: config.init::<B>(1, device).unwrap(), z_loss: 0.0, loss_scale: 1.0 },
        AdamW::new(OptimizerConfig::default()),
    )
}

pub fn parameters<B: TrainBackend>(model: &Pretrainer<B>) -> Vec<f64> {
    let mut all = Vec::new();
    weights::visit_params(&model.llama, |_, value| all.extend(value.to_data().iter::<f64>()));
    all
}

device_test! {
    fn an_untrained_model_knows_nothing<B>(device) {
        for config in [small(), LlamaConfig { tied_head: false, ..small() }, LlamaConfig::tiny(2048)] {
            let model = Pretrainer { llama: config.init::<B::InnerBackend>(3, &device).unwrap(), z_loss: 0.0, loss_scale: 1.0 };
            let batch = batch(0..4, 64);
            let loss = floats(model.loss(&batch, 0.0).unwrap())[0] / batch.tokens() as f64;
            let chance = (config.vocab_size as f64).ln();
            assert!((loss / chance - 1.0).abs() < 0.02, "loss {loss}, ln(vocab) {chance}");
        }
    }
}

device_test! {
    fn one_batch_is_learned_by_heart<B>(device) {
        let (mut model, mut optimizer) = new_model::<B>(&small(), &device);
        let batch = [batch(0..2, 32)];
        let mut loss = f64::INFINITY;
        for _ in 0..200 {
            (model, loss) = step(model, &mut optimizer, &batch, 3e-3);
            if loss < 0.01 {
                return;
            }
        }
        panic!("the loss is still {loss}");
    }
}

device_test! {
    fn the_future_does_not_leak<B>(device) {
        let model = small().init::<B::InnerBackend>(1, &device).unwrap();
        let (a, at) = (tokens(40, 0), 25);
        let mut b = a.clone();
        b[at] = (b[at] + 1) % 259;
        let logits = |ids: Vec<i32>| floats(model.forward(upload(ids, [1, 40], &device), None).unwrap());
        let (a, b) = (logits(a), logits(b));
        assert_eq!(a[..at * 259], b[..at * 259]);
        assert_ne!(a[at * 259..], b[at * 259..]);
    }
}

device_test! {
    /// Joined documents with attention inside each have the losses and gradients they have apart.
    fn documents_do_not_see_one_another<B>(device) {
        let model = Pretrainer { llama: small().init::<B>(1, &device).unwrap(), z_loss: 0.0, loss_scale: 1.0 };
        let of = |parts: &[(usize, usize)], block_causal: bool| {
            let (mut inputs, mut targets, mut starts) = (Vec::new(), Vec::new(), Vec::new());
            for &(seed, len) in parts {
                let ids = tokens(len + 1, seed);
                starts.extend(vec![inputs.len() as i32; len]);
                inputs.extend(&ids[..len]);
                targets.extend(&ids[1..]);
            }
            let seq_len = inputs.len();
            let batch = TokenBatch { inputs, targets, starts: block_causal.then_some(starts), batch: 1, seq_len };
            let output = burn::train::TrainStep::step(&model, batch);
            let mut grads = GradientList::default();
            grads.accumulate::<B, _>(&model, output.grads);
            (output.item.loss_sum, grads.norm())
        };
        let (apart, joined) = (of(&[(3, 22)], true).0 + of(&[(5, 18)], true).0, of(&[(3, 22), (5, 18)], true));
        assert!((apart - joined.0).abs() < 1e-3, "{apart} {joined:?}");
        let open = of(&[(3, 22), (5, 18)], false);
        assert!((open.0 - joined.0).abs() > 1e-3 && open.1 != joined.1, "{open:?} {joined:?}");
    }
}

device_test! {
    fn cached_decoding_equals_the_full_forward<B>(device) {
        let config = small();
        let model = config.init::<B::InnerBackend>(1, &device).unwrap();
        let ids = [tokens(24, 0), tokens(24, 1)].concat();
        let full = model.forward(upload(ids.clone(), [2, 24], &device), None).unwrap();
        // A cache in half precision rounds what it keeps.
        for (kept, rounding) in [(Precision::F32, 1e-5), (Precision::F16, 1e-3)] {
            if let Err(error) = kept.check::<B::InnerBackend>("cache", &device) {
                eprintln!("skipped: {error}");
                continue;
            }
            let model = model.clone().with_cache(kept);
            for chunks in [vec![10, 1, 1, 12], vec![1; 24], vec![24]] {
                let mut cache = KvCache::new(&model, 2, 24).unwrap();
                let mut start = 0;
                let mut parts = Vec::new();
                for len in chunks {
                    let rows = [0, 24].map(|row| ids[row + start..row + start + len].to_vec()).concat();
                    parts.push(model.forward(upload(rows, [2, len], &device), Some(&mut cache)).unwrap());
                    start += len;
                }
                let cached = floats(Tensor::cat(parts, 1));
                close("logits", &cached, &floats(full.clone()), tolerance(rounding, 1.0));
            }
        }
    }
}

device_test! {
    /// Weights in fewer bytes give nearly the same logits, decoding or not, with a head of its own or tied.
    fn weights_in_fewer_bytes_give_nearly_the_same_logits<B>(device) {
        for tied_head in [true, false] {
            let config = LlamaConfig { tied_head, d_ff: 96, ..small() };
            let ids = tokens(12, 0);
            let logits = |format| {
                let model = config.init::<B::InnerBackend>(1, &device).unwrap().with_weights(format).unwrap();
                let whole = floats(model.forward(upload(ids.clone(), [1, 12], &device), None).unwrap());
                let mut cache = KvCache::new(&model, 1, 12).unwrap();
                let step = |id: &i32| model.forward(upload(vec![*id], [1, 1], &device), Some(&mut cache)).unwrap();
                let steps = floats(Tensor::cat(ids.iter().map(step).collect(), 1));
                close(&format!("{format}: decoding"), &steps, &whole, tolerance(2e-3, 1.0) * scale(&whole));
                whole
            };
            let exact = logits(WeightFormat::F32);
            let formats = [(WeightFormat::Bf16, 0.02), (WeightFormat::F16, 0.01), (WeightFormat::Q8, 0.05), (WeightFormat::Q4, 0.25)];
            for (format, error) in formats {
                if format.check::<B::InnerBackend>(&device).is_err() {
                    continue;
                }
                let rounded = logits(format);
                assert_ne!(rounded, exact, "{format} rounds");
                close(&format!("{format}"), &rounded, &exact, error * scale(&exact));
            }
        }
    }
}

#[test]
fn blocks_need_rows_of_whole_blocks() {
    let config = LlamaConfig { d_ff: 90, ..small() };
    let model = config.init::<burn::backend::Flex>(1, &Default::default()).unwrap();
    for format in [WeightFormat::Q8, WeightFormat::Q4] {
        let error = model.clone().with_weights(format).unwrap_err().to_string();
        assert!(error.contains("multiples of 32") && error.contains("90"), "{error}");
    }
    assert!("q3".parse::<WeightFormat>().unwrap_err().to_string().contains("q8"));
}

device_test! {
    fn a_full_cache_and_a_long_sequence_are_errors<B>(device) {
        let config = small();
        let model = config.init::<B::InnerBackend>(1, &device).unwrap();
        let mut cache = KvCache::new(&model, 1, 8).unwrap();
        let run = |len: usize, cache: Option<&mut KvCache<B::InnerBackend>>| {
            model.forward(upload(tokens(len, 0), [1, len], &device), cache).map(|_| ())
        };
        run(6, Some(&mut cache)).unwrap();
        let error = run(3, Some(&mut cache)).unwrap_err();
        assert!(matches!(error, ModelError::CacheFull { len: 6, new: 3, capacity: 8 }), "{error}");
        run(2, Some(&mut cache)).unwrap();
        cache.clear();
        run(8, Some(&mut cache)).unwrap();
        assert!(matches!(run(257, None), Err(ModelError::SequenceTooLong { len: 257, max: 256 })));
        assert!(matches!(KvCache::new(&model, 1, 257), Err(ModelError::SequenceTooLong { .. })));
        let mut wide = KvCache::new(&model, 2, 8).unwrap();
        assert!(matches!(run(1, Some(&mut wide)), Err(ModelError::CacheMismatch { .. })));
    }
}

device_test! {
    fn accumulation_changes_nothing<B>(device) {
        let run = |batches: Vec<TokenBatch>| {
            let (mut model, mut optimizer) = new_model::<B>(&small(), &device);
            let mut losses = Vec::new();
            for _ in 0..3 {
                let loss;
                (model, loss) = step(model, &mut optimizer, &batches, 1e-3);
                losses.push(loss);
            }
            (losses, parameters(&model))
        };
        let (one, one_params) = run(vec![batch(0..8, 32)]);
        let (eight, eight_params) = run((0..8).map(|row| batch(row..row + 1, 32)).collect());
        close("losses", &eight, &one, tolerance(1e-5, 5.0));
        close("parameters", &eight_params, &one_params, tolerance(1e-5, 1.0));
    }
}

device_test! {
    fn a_seed_gives_the_same_weights<B>(device) {
        let params = |seed| parameters(&Pretrainer { llama: small().init::<B>(seed, &device).unwrap(), z_loss: 0.0, loss_scale: 1.0 });
        assert_eq!(params(1), params(1));
        assert_ne!(params(1), params(2));
        // Pinned, so that they are the same on every backend and in every version.
        let first: Vec<f64> = params(1)[..3].to_vec();
        close("weights", &first, &PINNED_WEIGHTS, 1e-9);
        let ids = || burn::module::list_param_ids(&small().init::<B>(1, &device).unwrap());
        assert_eq!(ids(), ids());
    }
}

const PINNED_WEIGHTS: [f64; 3] = [0.044384993612766266, -0.0007716849795542657, 0.002516132779419422];

/// A folder with byte shards of this project's own sources, and a run on it.
pub fn run_config(folder: &Path) -> PretrainConfig {
    let data = folder.join("data");
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("llama-model/src");
    let sources = Sources { extensions: vec!["rs".into()], ..Sources::new([text]) };
    let tokenizer = Codec::from(Tokenizer::bytes()).install(&data).unwrap();
    let options = PrepareOptions { valid_fraction: 0.1, ..Default::default() };
    prepare(&sources, &tokenizer, &data, &options, &NoProgress).unwrap();
    let mut config = PretrainConfig::preset("tiny").unwrap();
    config.model = small();
    config.data.folder = data;
    config.run.folder = folder.join("run");
    (config.batch.seq_len, config.batch.sequences, config.batch.accumulation) = (32, 2, 2);
    (config.schedule.steps, config.schedule.warmup_steps) = (9, 3);
    (config.run.eval_every, config.run.eval_batches, config.run.checkpoint_every) = (4, 2, 3);
    config.run.peak_flops = Some(1e11);
    config
}

/// Goes on from a checkpoint, silently.
pub fn from(checkpoint: &Path) -> RunOptions<'_> {
    RunOptions { resume_from: Some(checkpoint), ..RunOptions::silent() }
}

device_test! {
    fn a_resumed_run_ends_as_one_that_never_stopped<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        let (_, report) = pretrain::<B>(&config, &device, Group::alone(), RunOptions::silent()).unwrap();
        assert_eq!((report.stop, report.step), (Stop::Finished, 9));
        // keep_checkpoints is 2.
        let kept: Vec<u64> = checkpoint::list(&config.run.folder).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(kept, [6, 9]);
        assert!(std::fs::read_to_string(&report.curve).unwrap().contains("<svg"));
        let lines = log::read(&config.run.folder.join(log::METRICS_FILE)).unwrap();
        assert_eq!(lines.iter().filter(|line| matches!(line, Line::Train { .. })).count(), 9);
        assert_eq!(lines.iter().filter(|line| matches!(line, Line::Valid { .. })).count(), 3);

        let mut again = config.clone();
        again.run.folder = folder.path().join("again");
        let (_, resumed) = pretrain::<B>(&again, &device, Group::alone(), from(&checkpoint::list(&config.run.folder).unwrap()[0].1)).unwrap();
        if crate::support::device().to_string() == "flex" {
            for file in ["model.safetensors", "optimizer.safetensors"] {
                let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
                assert!(read(&report.checkpoint) == read(&resumed.checkpoint), "{file} differs");
            }
        }
        let last = |folder: &Path| {
            let lines = log::read(&folder.join(log::METRICS_FILE)).unwrap();
            lines.into_iter().filter_map(|line| match line { Line::Train { step, loss, .. } if step > 6 => Some(loss), _ => None }).collect::<Vec<_>>()
        };
        close("losses", &last(&again.run.folder), &last(&config.run.folder), tolerance(0.0, 5.0));
    }
}

device_test! {
    fn an_interrupt_leaves_a_checkpoint<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        let interrupter = Interrupter::new();
        interrupter.stop(Some("test"));
        let (_, report) = pretrain::<B>(&config, &device, Group::alone(), RunOptions { interrupter, ..RunOptions::silent() }).unwrap();
        assert_eq!((report.stop, report.step), (Stop::Interrupted, 0));
        let (_, report) = pretrain::<B>(&config, &device, Group::alone(), from(&report.checkpoint)).unwrap();
        assert_eq!((report.stop, report.step), (Stop::Finished, 9));
    }
}

device_test! {
    fn steps_that_are_not_finite_are_skipped_and_reported<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let mut config = run_config(folder.path());
        // The first update throws the weights so far that every later loss overflows.
        config.schedule.peak_lr = 1e30;
        (config.schedule.steps, config.schedule.warmup_steps) = (40, 0);
        (config.run.checkpoint_every, config.run.eval_every) = (1, 0);
        let error = pretrain::<B>(&config, &device, Group::alone(), RunOptions::silent()).err().unwrap();
        assert!(matches!(error, TrainError::NotFinite { step: 21, count: 20 }), "{error}");
        let lines = log::read(&config.run.folder.join(log::METRICS_FILE)).unwrap();
        assert_eq!(lines.iter().filter(|line| matches!(line, Line::Skipped { .. })).count(), 20);
        // No update was made from what is not a number.
        let newest = checkpoint::latest(&config.run.folder).unwrap();
        assert_eq!(checkpoint::load_state(&newest).unwrap().updates, 1);
        let restored = checkpoint::load::<B>(&newest, &device).unwrap();
        assert!(parameters(&restored.model).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn the_device_under_test_is_the_one_asked_for() {
    if let Ok(name) = std::env::var("LLAMA_TEST_DEVICE") {
        assert_eq!(device().to_string(), name);
    }
}
