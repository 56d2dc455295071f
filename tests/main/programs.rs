//! The example programs as a user runs them. `cargo test` builds them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::support::device;

pub fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let path: PathBuf = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.is_file(), "{} is not built: `cargo build --release --examples`", path.display());
    let mut command = Command::new(path);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

pub fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8_lossy(&stderr).into_owned());
    assert!(status.success(), "{command:?} failed:\n{stdout}\n{stderr}");
    stdout
}

pub fn fails(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success() && !stderr.contains("panicked"), "{command:?}: {stderr}");
    stderr
}

/// A small run on this project's own sources.
pub fn pretrain(folder: &Path, steps: u64) -> Command {
    let mut command = program("pretrain");
    command.args(["--text", "llama-model/src", "--extensions", "rs", "--vocab-size", "400", "--seq-len", "64"]);
    command.args(["--sequences", "2", "--checkpoint-every", "3", "--eval-every", "10", "--peak-gflops", "100"]);
    command.args(["--device", &device().to_string(), "--log-every", "1", "--warmup", "3", "--valid-fraction", "0.1"]);
    command.arg("--steps").arg(steps.to_string()).arg("--run").arg(folder);
    command
}

pub fn resume(folder: &Path) -> Command {
    let mut command = program("pretrain");
    command.args(["--resume", "--text", "llama-model/src", "--device", &device().to_string()]).arg("--run").arg(folder);
    command
}

#[test]
fn every_program_has_help() {
    for name in ["pretrain", "finetune", "generate", "chat", "evaluate", "convert", "inspect", "prepare", "tokenize"] {
        let help = run(program(name).arg("--help"));
        assert!(help.contains("Usage"), "{help}");
    }
    assert!(run(program("pretrain").arg("--help")).contains("flex"));
}

#[test]
fn half_precision_with_a_scaled_loss_trains_as_f32_does() {
    let folder = tempfile::tempdir().unwrap();
    let last_loss = |precision: &str| {
        let path = folder.path().join(precision);
        run(pretrain(&path, 12).args(["--precision", precision]));
        let metrics = std::fs::read_to_string(path.join("metrics.jsonl")).unwrap();
        let line = metrics.lines().rfind(|line| line.contains("\"lr\"")).unwrap();
        serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap()
    };
    let (exact, half) = (last_loss("f32"), last_loss("f16"));
    assert!((exact - half).abs() < 0.01 * exact && exact != half, "{exact} {half}");
}

#[test]
fn pretrain_then_generate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let out = run(&mut pretrain(&path, 20));
    assert!(out.contains("step     20/20") && out.contains("samples"), "{out}");
    for file in ["metrics.jsonl", "loss.svg", "samples.txt", "data/train-00000.bin", "data/tokenizer.model"] {
        assert!(path.join(file).is_file(), "{file}");
    }
    let error = fails(&mut pretrain(&path, 20));
    assert!(error.contains("--resume") && error.contains("--fresh"), "{error}");

    let generate = |extra: &[&str]| {
        let mut command = program("generate");
        command
            .arg("--model")
            .arg(&path)
            .args(["--max-new-tokens", "20", "--device", &device().to_string()])
            .args(extra);
        run(&mut command)
    };
    let one = generate(&["--prompt", "pub fn "]);
    assert!(one.starts_with("pub fn "), "{one}");
    assert_eq!(one, generate(&["--prompt", "pub fn "]), "the same seed gives the same text");
    let batch = generate(&["--prompt", "pub fn ", "impl", "--temperature", "0", "--top-k", "5"]);
    assert_eq!(batch.matches("----").count(), 2, "{batch}");
    let short = generate(&["--prompt", "pub fn ", "--cache", "f16"]);
    assert!(short.starts_with("pub fn "), "{short}");
    let error = fails(program("generate").arg("--model").arg(&path).args(["--cache", "q8"]));
    assert!(error.contains("q8") && error.contains("f32, bf16, f16"), "{error}");
    let error = fails(program("generate").arg("--model").arg(folder.path().join("nothing")));
    assert!(error.contains("nothing") && error.contains("pretrain"), "{error}");
    into_other_formats_and_back(&path, folder.path());
}

/// What was trained, in llama.cpp's format and in Hugging Face's from there: the same text everywhere.
fn into_other_formats_and_back(trained: &Path, folder: &Path) {
    let greedy = |model: &Path, extra: &[&str]| {
        let mut command = program("generate");
        command.args(["--prompt", "pub fn ", "--temperature", "0", "--max-new-tokens", "20"]);
        run(command.arg("--model").arg(model).args(["--device", &device().to_string()]).args(extra))
    };
    let (gguf, again) = (folder.join("tiny.gguf"), folder.join("again"));
    run(program("convert").arg(trained).arg(&gguf));
    run(program("convert").arg(&gguf).arg(&again));
    let expected = greedy(trained, &[]);
    assert_eq!(greedy(&gguf, &[]), expected);
    assert_eq!(greedy(&again, &[]), expected);
    let guessed = greedy(&gguf, &["--draft", trained.to_str().unwrap()]);
    assert_eq!(guessed, expected);
    let new = expected.strip_prefix("pub fn ").and_then(|text| text.strip_suffix('\n')).unwrap();
    let stop = &new[new.char_indices().nth(3).unwrap().0..];
    let before = &new[..new.find(stop).unwrap()];
    assert_eq!(greedy(&gguf, &["--stop", stop]), format!("pub fn {before}\n"));
    let log_probs = greedy(&gguf, &["--log-probs"]);
    assert_eq!(log_probs.lines().skip(1).filter(|line| line.trim_start().starts_with('-')).count(), 20, "{log_probs}");

    let shown = run(program("inspect").arg(&gguf).arg("--tensors"));
    for part in ["format                  gguf", "SentencePiece, 400 tokens", "blk.0.attn_q.weight", "F32"] {
        assert!(shown.contains(part), "no `{part}` in {shown}");
    }
    let lines = folder.join("lines.txt");
    std::fs::write(&lines, "pub fn new\nlet x = 1;\n").unwrap();
    let ids = |tokenizer: &Path| {
        run(program("tokenize").args(["encode", "--tokenizer"]).arg(tokenizer).arg("--lines").arg(&lines))
    };
    assert_eq!(ids(&gguf), ids(&again.join("tokenizer.json")));
    assert_eq!(ids(&gguf), ids(&again.join("tokenizer.model")));

    let evaluate = |extra: &[&str]| {
        let mut command = program("evaluate");
        run(command.arg("--model").arg(&gguf).args(["--device", &device().to_string()]).args(extra))
    };
    let text = evaluate(&["--perplexity", lines.to_str().unwrap(), "--window", "8"]);
    assert!(text.contains("22 bytes, in windows of 8") && text.contains("bits a byte"), "{text}");
    let (rows, log) = (folder.join("piqa.jsonl"), folder.join("log.jsonl"));
    let row = "{\"goal\": \"pub fn\", \"sol1\": \"new\", \"sol2\": \"let\", \"label\": 0}\n";
    std::fs::write(&rows, row.repeat(3)).unwrap();
    let table =
        evaluate(&["--task", "piqa", "--data", rows.to_str().unwrap(), "--limit", "2", "--log", log.to_str().unwrap()]);
    assert!(table.contains("of 2 |") && table.contains("by likelihood per character"), "{table}");
    assert_eq!(std::fs::read_to_string(&log).unwrap().matches("\"log_likelihoods\"").count(), 2);

    // A conversation in a template's form.
    let chat = |model: &Path| {
        let input = folder.join("input.txt");
        std::fs::write(&input, "pub fn\n/new\nimpl\n").unwrap();
        let mut command = program("chat");
        command.arg("--model").arg(model).args(["--temperature", "0", "--max-new-tokens", "5"]);
        command.args(["--device", &device().to_string(), "--context", "64"]);
        command.stdin(std::fs::File::open(input).unwrap());
        command
    };
    assert!(fails(&mut chat(&again)).contains("not made for conversations"));
    std::fs::write(again.join("chat_template.jinja"), "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    assert_eq!(run(&mut chat(&again)).matches("> ").count(), 4, "a prompt for each line, and one at the end");

    for (arguments, reason) in [
        (vec!["--type", "q9"], "q9"),
        (vec!["--to", "onnx"], "onnx"),
        (vec!["--to", "meta", "--type", "q8_0"], "f32, f16 or bf16"),
    ] {
        let error = fails(program("convert").arg(&gguf).arg(folder.join("refused")).args(arguments));
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_killed_run_resumes_bit_for_bit() {
    const STEPS: u64 = 40;
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    run(&mut pretrain(&whole, STEPS));

    let mut child = pretrain(&killed, STEPS).stdout(std::process::Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let whole_checkpoint = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("step-"))
    };
    while !std::fs::read_dir(killed.join("checkpoints")).is_ok_and(|mut entries| entries.any(whole_checkpoint)) {
        assert!(Instant::now() < deadline, "no checkpoint appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Anywhere in a step or in the writing of a checkpoint.
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    std::thread::sleep(Duration::from_micros(u64::from(clock) % 200_000));
    child.kill().unwrap();
    child.wait().unwrap();

    run(&mut resume(&killed));
    if device().to_string() == "flex" {
        for file in ["model.safetensors", "optimizer.safetensors", "tokenizer.model"] {
            let read = |run: &Path| std::fs::read(run.join(format!("checkpoints/step-{STEPS:08}")).join(file)).unwrap();
            assert!(read(&whole) == read(&killed), "{file} differs");
        }
    }
    let left = std::fs::read_dir(killed.join("checkpoints")).unwrap().count();
    assert_eq!(left, 2, "what the killed process left half-written is gone");
    let steps = std::fs::read_to_string(killed.join("metrics.jsonl")).unwrap();
    assert_eq!(steps.matches("\"split\":\"train\"").count() as u64, STEPS);
}

/// A limit on the size of files stands for the full disk: writes fail in the same way.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    run(&mut pretrain(&path, 4));
    let mut limited = Command::new("bash");
    // 2 MB: the data is there, the next checkpoint does not fit.
    limited.args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$@\"", "bash"]);
    let mut longer = pretrain(&path, 8);
    longer.arg("--fresh");
    let inner = resume(&path);
    let newest = path.join("checkpoints/step-00000004");
    let state = newest.join("state.json");
    // The run of 4 steps is made longer, as if it had been stopped.
    let text = std::fs::read_to_string(&state).unwrap().replace("\"steps\": 4", "\"steps\": 8");
    std::fs::write(&state, text).unwrap();
    limited.arg(inner.get_program()).args(inner.get_args()).current_dir(env!("CARGO_MANIFEST_DIR"));
    let error = fails(&mut limited);
    assert!(error.contains("checkpoints") && error.contains("large"), "{error}");
    let left: Vec<_> = std::fs::read_dir(path.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.contains(&"step-00000004".into()) && left.len() == 2, "{left:?}");
    // With room again it goes on.
    run(&mut resume(&path));
    assert!(path.join("checkpoints/step-00000008").is_dir());
}

#[test]
fn tokenize_trains_encodes_and_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("t.model"), folder.path().join("shards"));
    let tokenize = |args: &[&str]| {
        let mut command = program("tokenize");
        command.args(args);
        command
    };
    let text = ["--text", "llama-data/src", "--extensions", "rs"];
    let file = model.to_str().unwrap();
    let made = run(tokenize(&["train"]).args(text).args(["--vocab-size", "500", "--out", file]));
    assert!(made.contains("500 pieces"), "{made}");
    let encoded = run(&mut tokenize(&["encode", "--tokenizer", file, "let x42"]));
    assert!(
        encoded.contains("\"let\"\n") && encoded.contains("\"4\"\n") && encoded.contains("tokens for 7 bytes"),
        "{encoded}"
    );
    run(tokenize(&["shards"]).args(text).args(["--tokenizer", file, "--out"]).arg(&out));
    let shard = out.join("train-00000.bin");
    let shown = run(tokenize(&["inspect", "--tokenizer", file]).arg(&shard));
    assert!(shown.contains("vocabulary 500") && shown.contains("//!"), "{shown}");

    let error = fails(&mut tokenize(&["encode", "--tokenizer", "/no/such.model", "x"]));
    assert!(error.contains("/no/such.model"), "{error}");
    let error =
        fails(tokenize(&["train", "--text", "llama-data/src/error.rs", "--out", file]).args(["--vocab-size", "30000"]));
    assert!(error.contains("lower vocab_size"), "{error}");
    let error = fails(tokenize(&["inspect"]).arg(&model));
    assert!(error.contains("LLAMATOK"), "{error}");
}

#[test]
fn unknown_devices_and_presets_list_the_choices() {
    let error = fails(program("pretrain").args(["--device", "tpu"]));
    assert!(error.contains("tpu") && error.contains("flex"), "{error}");
    let error = fails(program("pretrain").args(["--preset", "8b"]));
    assert!(error.contains("8b") && error.contains("65b"), "{error}");
}
