//! Training that begins with the weights of a checkpoint: pretraining that goes on, and fine-tuning of all weights.

use std::path::Path;

use llama::model::RopeScaling;
use llama::train::{Group, PretrainConfig, RunOptions, checkpoint, pretrain};

use crate::behaviour::{parameters, run_config};
use crate::parallel::losses;
use crate::programs::{self, fails, program, run};
use crate::support::{close, device, device_test, tolerance};

device_test! {
    fn a_run_begins_with_a_checkpoint<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        let begin = |config: &PretrainConfig| pretrain::<B>(config, &device, Group::alone(), RunOptions::silent());
        let (_, first) = begin(&config).unwrap();

        // A step that changes next to nothing.
        let mut next = config.clone();
        next.base = Some(first.checkpoint.clone());
        next.run.folder = folder.path().join("next");
        (next.schedule.steps, next.schedule.warmup_steps, next.schedule.peak_lr) = (1, 0, 1e-9);
        let (_, second) = begin(&next).unwrap();
        let weights = |checkpoint: &Path| parameters(&checkpoint::load::<B>(checkpoint, &device).unwrap().model);
        close("weights", &weights(&second.checkpoint), &weights(&first.checkpoint), 1e-6);
        let valid = |folder: &Path| *losses(folder).last().unwrap();
        let (before, after) = (valid(&config.run.folder), valid(&next.run.folder));
        close("validation loss", &[after], &[before], tolerance(1e-5, before));

        // Longer sequences than before, with stretched positions.
        next.model.max_seq_len *= 2;
        next.model.rope_scaling = Some(RopeScaling::Linear { factor: 2.0 });
        next.batch.seq_len = next.model.max_seq_len;
        next.run.folder = folder.path().join("longer");
        let (_, longer) = begin(&next).unwrap();
        assert_eq!(checkpoint::load_state(&longer.checkpoint).unwrap().config.model, next.model);

        for (change, field) in [
            ((|config| config.model.d_ff += 8) as fn(&mut PretrainConfig), "d_ff"),
            (|config| config.model.n_layers += 1, "n_layers"),
            (|config| config.model.norm_eps *= 10.0, "norm_eps"),
        ] {
            let mut other = next.clone();
            change(&mut other);
            let error = begin(&other).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("step-00000009"), "{error}");
        }
        next.base = Some(folder.path().join("nothing"));
        assert!(begin(&next).unwrap_err().to_string().contains("nothing"));
    }
}

/// A small model of a user's, with its tokenizer inside.
fn base(folder: &Path) -> std::path::PathBuf {
    let (path, gguf) = (folder.join("base"), folder.join("base.gguf"));
    // Of its heads and inner features two devices can have half each.
    run(programs::pretrain(&path, 20).args(["--preset", "15m"]));
    run(program("convert").arg(&path).arg(&gguf));
    gguf
}

#[test]
fn a_model_reads_more_text() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = base(folder.path());
    let more = |name: &str, extra: &[&str]| {
        let mut command = program("pretrain");
        command.args(["--steps", "3", "--warmup", "0", "--lr", "1e-9", "--sequences", "2", "--seq-len", "64"]);
        command.args(["--accumulation", "1", "--peak-gflops", "100", "--device", &device().to_string()]);
        command.args(extra).arg("--from").arg(&gguf).arg("--run").arg(folder.path().join(name));
        command
    };
    let text = ["--text", "llama-model/src", "--extensions", "rs", "--valid-fraction", "0.1"];
    let out = run(&mut more("more", &text));
    assert!(out.contains("step     3/3") || out.contains("step      3/3"), "{out}");
    // From where the model was, not from chance: ln 400 is 6.
    let first = losses(&folder.path().join("more"))[0];
    assert!(first < 5.8, "{first}");
    let weights = |path: &str| std::fs::read(folder.path().join(path).join("model.safetensors")).unwrap();
    assert_eq!(weights("more/checkpoints/step-00000003").len(), weights("base/checkpoints/step-00000020").len());
    // The data is there, the tokenizer the model's.
    assert!(run(&mut more("again", &["--data", folder.path().join("more/data").to_str().unwrap()])).contains("3/3"));
    run(program("tokenize")
        .args(["shards", "--text", "llama-model/src", "--extensions", "rs", "--out"])
        .arg(folder.path().join("bytes")));
    let error = fails(&mut more("other", &["--data", folder.path().join("bytes").to_str().unwrap()]));
    assert!(error.contains("another vocabulary"), "{error}");
    let error = fails(more("other", &text).args(["--vocab-size", "300"]));
    assert!(error.contains("--vocab-size"), "{error}");
}

/// The way of a user, with all weights: fine-tune, stop and go on, generate; alone and on devices that divide the model.
#[test]
fn all_weights_are_fine_tuned() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let gguf = base(folder.path());
    let lines = (0..40).map(|i| format!("{{\"prompt\": \"{i} + 1 =\", \"completion\": \" {}\"}}\n", i + 1));
    std::fs::write(at("data.jsonl"), lines.collect::<String>()).unwrap();
    let device = device().to_string();
    let finetune = |name: &str, extra: &[&str]| {
        let mut command = program("finetune");
        command.args(["--full", "--steps", "60", "--seq-len", "48", "--sequences", "2", "--lr", "0.0002"]);
        command.arg("--model").arg(&gguf).arg("--data").arg(at("data.jsonl")).arg("--run").arg(at(name));
        command.args(extra);
        command
    };
    let out = run(&mut finetune("whole", &["--device", &device]));
    assert!(out.contains("all trained") && out.contains("step     60/60"), "{out}");
    let trained = losses(&at("whole"));
    assert!(trained.last().unwrap() < &(0.6 * trained[0]), "{trained:?}");

    // A checkpoint from the middle, as if the run had ended there.
    let step = |name: &str, step: usize| at(name).join(format!("checkpoints/step-{step:08}"));
    std::fs::create_dir_all(at("parts/checkpoints")).unwrap();
    run(std::process::Command::new("cp").arg("-r").arg(step("whole", 50)).arg(step("parts", 50)));
    run(program("finetune").args(["--resume", "--device", &device]).arg("--run").arg(at("parts")));
    if device == "flex" {
        for file in ["model.safetensors", "optimizer.safetensors", "tokenizer.json"] {
            let read = |name: &str| std::fs::read(step(name, 60).join(file)).unwrap();
            assert!(read("whole") == read("parts"), "a resumed run is another run: {file}");
        }
    }

    let both = format!("{device},{device}");
    run(&mut finetune("divided", &["--device", &both, "--tensor-parallel", "2"]));
    // AdamW divides a gradient by its own size, so what rounding makes of the smallest ones grows tenfold with a step:
    // the first losses tell wrong gradients from roundings, later ones and high learning rates do not.
    close("losses", &losses(&at("divided"))[..3], &trained[..3], tolerance(5e-5, 6.0));

    let generate = |model: &Path| {
        let mut command = program("generate");
        command.args(["--prompt", "7 + 1 =", "--temperature", "0", "--max-new-tokens", "4", "--device", &device]);
        run(command.arg("--model").arg(model))
    };
    assert_ne!(generate(&at("whole")), generate(&gguf));
    for file in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json", "model.safetensors"] {
        assert!(step("whole", 60).join(file).is_file(), "{file}");
    }
    for (extra, reason) in
        [(["--rank", "4"], "--rank"), (["--weights", "q8"], "--weights"), (["--tensor-parallel", "3"], "tensor")]
    {
        let error = fails(&mut finetune("refused", &extra));
        assert!(error.contains(reason), "{error}");
    }
}
