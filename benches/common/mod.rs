//! What the benches share: arguments, medians, and where results go.
#![allow(dead_code)]

use std::io::Write;
use std::time::Duration;

use llama::model::{BackendTask, Device, LlamaConfig};

/// Arguments of a bench.
pub struct Arguments {
    all: Vec<String>,
    /// `--device`
    pub device: Device,
    /// `cargo test --benches` runs every bench once, to see that it works.
    pub smoke: bool,
}

impl Arguments {
    /// Those of a bench that computes on the CPU only.
    pub fn new(all: Vec<String>) -> Self {
        let smoke = !all.iter().any(|arg| arg == "--bench");
        Self { all, device: Device::Flex, smoke }
    }

    /// The value after a name.
    pub fn value(&self, name: &str) -> Option<String> {
        self.all.iter().position(|arg| arg == name).and_then(|at| self.all.get(at + 1)).cloned()
    }

    /// Whether a flag is there.
    pub fn flag(&self, name: &str) -> bool {
        self.all.iter().any(|arg| arg == name)
    }

    /// The number after a name.
    pub fn number(&self, name: &str) -> Option<usize> {
        self.value(name)?.parse().ok()
    }

    /// Whether `--size` asks for this one, or for none.
    pub fn selects(&self, size: &str) -> bool {
        self.value("--size").is_none_or(|only| only == size) && (!self.smoke || size == "tiny")
    }
}

#[global_allocator]
static MEMORY: llama::model::HugePages = llama::model::HugePages;

/// Runs a bench on the device of `--device`.
pub fn run<T: BackendTask>(task: impl FnOnce(Arguments) -> T) {
    llama::model::tune_process();
    let mut args = Arguments::new(std::env::args().collect());
    let result = args.value("--device").unwrap_or_else(|| "flex".into()).parse::<Device>().and_then(|device| {
        args.device = device;
        device.run(task(args))
    });
    if let Err(error) = result {
        eprintln!("{error}");
        std::process::exit(2);
    }
}

/// Appends a line to the file of `--json`, if one is asked for.
pub fn append(args: &Arguments, line: &serde_json::Value) {
    let Some(path) = args.value("--json") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
        eprintln!("{path}: {error}");
    }
}

/// Median in milliseconds.
pub fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Resident memory of the process in bytes, where the system tells (Linux): `VmRSS` now, `VmHWM` the most so far.
pub fn memory(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}

/// The sizes that training is measured on: name, model, sequence length, sequences. A GPU gets batches that fill it, and larger models.
pub fn sizes(device: &Device) -> Vec<(&'static str, LlamaConfig, usize, usize)> {
    let tiny = LlamaConfig {
        d_model: 128,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 32,
        d_ff: 352,
        ..LlamaConfig::tiny(512)
    };
    // SmolLM2-135M.
    let smollm2 = LlamaConfig {
        vocab_size: 49152,
        d_model: 576,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        d_ff: 1536,
        ..LlamaConfig::small_110m()
    };
    let large = |d_model, n_heads, head_dim, d_ff| LlamaConfig {
        d_model,
        n_layers: 24,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        d_ff,
        max_seq_len: 2048,
        ..LlamaConfig::llama_7b()
    };
    match device {
        Device::Flex => vec![
            ("tiny", tiny, 256, 8),
            ("15m", LlamaConfig::small_15m(), 256, 8),
            ("60m", LlamaConfig::small_60m(), 512, 4),
            ("110m", LlamaConfig::small_110m(), 1024, 1),
            ("135m", smollm2, 128, 1),
        ],
        _ => vec![
            ("tiny", tiny, 256, 8),
            ("110m", LlamaConfig::small_110m(), 1024, 16),
            ("350m", large(1024, 16, 64, 2816), 2048, 8),
            ("1.1b", large(2048, 16, 128, 5632), 2048, 4),
            ("7b", LlamaConfig::llama_7b(), 2048, 1),
        ],
    }
}
