//! Bad inputs: each a clear error that names the file or field, and no panic.

use std::path::Path;

use llama::data::prepare::{PrepareOptions, prepare};
use llama::data::source::Sources;
use llama::data::tokenizer::{Codec, Tokenizer};
use llama::data::{DataError, NoProgress};
use llama::model::{ModelError, hf};
use llama::train::{Group, PretrainConfig, RunOptions, TrainError, checkpoint, pretrain};

use crate::behaviour::{from, run_config};
use crate::support::{device_test, fixture};

fn mentions(error: impl ToString, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "`{text}` does not mention `{part}`");
    }
}

/// Prepares `text` as the data of a run.
fn data(folder: &Path, text: &str) -> Result<PretrainConfig, DataError> {
    let mut config = run_config(folder);
    config.data.folder = folder.join("other");
    let file = folder.join("text.txt");
    std::fs::write(&file, text).unwrap();
    let options = PrepareOptions { valid_fraction: 0.0, ..Default::default() };
    let tokenizer = Codec::from(Tokenizer::bytes()).install(&config.data.folder)?;
    prepare(&Sources::new([file]), &tokenizer, &config.data.folder, &options, &NoProgress)?;
    config.run.eval_every = 0;
    Ok(config)
}

device_test! {
    fn corpora<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let run = |config: &PretrainConfig| {
            pretrain::<B>(config, &device, Group::alone(), RunOptions::silent()).expect_err("this must fail")
        };
        mentions(Sources::new(["/no/such/text.txt"]).files().unwrap_err(), &["/no/such/text.txt"]);
        mentions(data(folder.path(), "").unwrap_err(), &["no text"]);
        let short = data(folder.path(), "too short").unwrap();
        mentions(run(&short), &["fewer than", "33"]);

        let mut config = run_config(folder.path());
        config.data.folder = folder.path().join("nowhere");
        mentions(run(&config), &["nowhere"]);
        let mut config = run_config(folder.path());
        config.model.vocab_size = 300;
        mentions(run(&config), &["model.vocab_size", "300", "259"]);
        let mut config = run_config(folder.path());
        config.batch.seq_len = 1000;
        mentions(run(&config), &["batch.seq_len", "1000"]);

        // A shard of another tokenizer, and one that is no shard.
        let config = run_config(folder.path());
        let shard = config.data.folder.join("train-00000.bin");
        let mut writer = llama::data::shard::ShardWriter::create(&shard, 259, 42).unwrap();
        writer.push(&[1; 1000]).unwrap();
        writer.finish().unwrap();
        mentions(run(&config), &["train-00000.bin", "tokenizer"]);
        std::fs::write(&shard, "this is not a shard, but long enough to have a header of sixty-four bytes").unwrap();
        mentions(run(&config), &["train-00000.bin", "LLAMATOK"]);
    }
}

device_test! {
    fn checkpoints<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        mentions(checkpoint::latest(&config.run.folder).unwrap_err(), &["no checkpoint"]);
        let (_, report) = pretrain::<B>(&config, &device, Group::alone(), RunOptions::silent()).unwrap();
        let load = || checkpoint::load::<B>(&report.checkpoint, &device).map(|_| ());
        load().unwrap();
        for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
            let path = report.checkpoint.join(file);
            let whole = std::fs::read(&path).unwrap();
            for len in [0, 7, whole.len() / 2, whole.len() - 1] {
                // JSON may end in a newline that nothing needs.
                if file == "state.json" && len == whole.len() - 1 {
                    continue;
                }
                std::fs::write(&path, &whole[..len]).unwrap();
                mentions(load().unwrap_err(), &[file]);
            }
            std::fs::remove_file(&path).unwrap();
            mentions(load().unwrap_err(), &[file]);
            std::fs::write(&path, whole).unwrap();
        }
        load().unwrap();

        // A run that would not continue what the checkpoint began.
        let mut other = config.clone();
        other.optimizer.weight_decay = 0.2;
        let resumed = pretrain::<B>(&other, &device, Group::alone(), from(&report.checkpoint));
        mentions(resumed.err().unwrap(), &["optimizer", "differs"]);

        // Weights of another model.
        std::fs::copy(fixture("gqa/model.safetensors"), report.checkpoint.join("model.safetensors")).unwrap();
        let error = load().unwrap_err();
        assert!(matches!(error, TrainError::Model(ModelError::TensorShape { .. })), "{error}");
    }
}

device_test! {
    fn model_folders<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let load = || hf::load::<B>(folder.path(), &device).expect_err("this must fail");
        mentions(load(), &["config.json"]);
        std::fs::write(folder.path().join("config.json"), "{").unwrap();
        mentions(load(), &["config.json"]);
        std::fs::copy(fixture("gqa/config.json"), folder.path().join("config.json")).unwrap();
        mentions(load(), &["model.safetensors"]);
        // A tied model's file lacks the head that this configuration asks for.
        let weights = folder.path().join("model.safetensors");
        std::fs::copy(fixture("gqa_tied/model.safetensors"), &weights).unwrap();
        mentions(load(), &["model.safetensors", "shape"]);
        std::fs::copy(fixture("mha/model.safetensors"), &weights).unwrap();
        std::fs::copy(fixture("gqa_tied/config.json"), folder.path().join("config.json")).unwrap();
        mentions(load(), &["model.safetensors"]);
    }
}

#[test]
fn configurations() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    mentions(PretrainConfig::load(&path).unwrap_err(), &["run.toml"]);
    let good = PretrainConfig::preset("tiny").unwrap().to_toml();
    for (from, to, parts) in [
        ("peak_lr", "paek_lr", ["run.toml", "paek_lr"]),
        ("version = 1", "version = 9", ["version", "9"]),
        ("n_heads = 3", "n_heads = 0", ["n_heads", "at least 1"]),
        ("steps = 2200", "steps = \"many\"", ["run.toml", "steps"]),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        mentions(PretrainConfig::load(&path).unwrap_err(), &parts);
    }
    mentions(PretrainConfig::preset("8b").err().unwrap(), &["8b", "65b"]);
}
