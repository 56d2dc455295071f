//! What the programs share: progress bars, the default corpus, arguments of those that generate.
#![allow(dead_code, reason = "each program uses a part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use llama::data::Progress;
use llama::data::source::Sources;
use llama::model::generate::Sampling;
use llama::model::{Device, Precision, WeightFormat};
use llama::train::parallel::Rendezvous;
use llama::train::{Interrupter, RunReport, Stop};
use llama::{Devices, Engine, EngineOptions, engine};

/// A progress bar on the terminal; silent where the output is none.
#[derive(Default)]
pub struct Bar(Mutex<Option<ProgressBar>>);

impl Progress for Bar {
    fn start(&self, task: &str, total: Option<u64>) {
        let style = "{msg} [{bar:40}] {percent}% {per_sec} {eta}";
        let bar = ProgressBar::new(total.unwrap_or(0)).with_message(task.to_string());
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(bar);
    }

    fn advance(&self, units: u64) {
        if let Some(bar) = &*self.0.lock().unwrap_or_else(|e| e.into_inner()) {
            bar.inc(units);
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.0.lock().unwrap_or_else(|e| e.into_inner()).take() {
            bar.finish_and_clear();
        }
    }
}

/// Sets a field to what the command line says, if it says anything.
pub fn set<T: Clone>(field: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        *field = value.clone();
    }
}

/// Where a run computes.
#[derive(Args)]
pub struct DeviceArgs {
    #[arg(long = "device", default_value = "flex", help = format!("Where to compute: {}; several, with commas between them, share the steps of a training, or divide the model of a generation", Device::choices().join(", ")))]
    devices: Devices,
    /// Processes whose devices work together, perhaps on several machines that trust their network
    #[arg(long, default_value_t = 1, requires = "address")]
    nodes: usize,
    /// Which of them this is, from 0; the first reads and writes, the others serve it
    #[arg(long, default_value_t = 0)]
    node: usize,
    /// Where they meet: host and port of the first
    #[arg(long)]
    address: Option<String>,
}

impl DeviceArgs {
    pub fn devices(&self) -> Result<Devices> {
        if self.node >= self.nodes {
            bail!("--node counts from 0 to --nodes less one: {} of {} is none", self.node, self.nodes);
        }
        let rendezvous = |address: &String| Rendezvous::new(address, self.node, self.nodes);
        Ok(Devices { rendezvous: self.address.as_ref().map(rendezvous), ..self.devices.clone() })
    }
}

/// Stops a run after its step at the first Ctrl-C, and the program at the second.
pub fn interrupter() -> Result<Interrupter> {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    ctrlc::set_handler(move || {
        if handle.should_stop() {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step with a checkpoint; once more to stop at once");
        handle.stop(Some("Ctrl-C"));
    })
    .context("setting the Ctrl-C handler")?;
    Ok(interrupter)
}

/// Prints what a run left; `made` is what its checkpoint is.
pub fn print_report(report: &RunReport, made: &str) {
    if report.skipped > 0 {
        println!("{} steps were skipped: their loss or gradient was not finite", report.skipped);
    }
    let epochs: Vec<_> = report.epochs.iter().map(|(name, epochs)| format!("{name} {epochs:.2}")).collect();
    println!("passes over the training text: {}", epochs.join(", "));
    println!("{made}: {}", report.checkpoint.display());
    println!("loss curve: {}", report.curve.display());
    if report.stop == Stop::Interrupted {
        println!("interrupted after step {}; go on with --resume", report.step);
    }
}

/// The sources the user named, or the default corpus.
pub fn sources(paths: &[PathBuf], extensions: &[String]) -> Result<Sources> {
    let mut sources = if paths.is_empty() { rust_sources()? } else { Sources::new(paths) };
    if !extensions.is_empty() {
        sources.extensions = extensions.to_vec();
    }
    Ok(sources)
}

/// The default corpus: the Rust sources of this project's pinned dependencies, which cargo has put on every machine
/// that built it. The paper's GitHub source, in small.
fn rust_sources() -> Result<Sources> {
    /// Larger files are mostly generated tables and bindings.
    const MAX_FILE: u64 = 64 << 10;
    /// Crates that are generated bindings from end to end.
    const GENERATED: [&str; 4] = ["windows", "winapi", "web-sys", "js-sys"];
    /// More than a small model sees in its run.
    const MAX_BYTES: u64 = 48 << 20;

    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    let text = std::fs::read_to_string(&lock).with_context(|| format!("reading {}", lock.display()))?;
    let lock: toml::Table = toml::from_str(&text).context("Cargo.lock")?;
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let registry = home.context("neither CARGO_HOME nor HOME is set; name a text with --text")?.join("registry/src");
    let mut folders = Vec::new();
    let Ok(entries) = std::fs::read_dir(&registry) else {
        bail!("{} has no crate sources; name a text with --text", registry.display());
    };
    let indexes: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    for package in lock.get("package").and_then(|packages| packages.as_array()).into_iter().flatten() {
        let field = |name: &str| package.get(name).and_then(|value| value.as_str());
        if let (Some(name), Some(version)) = (field("name"), field("version")) {
            if GENERATED.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let folder = format!("{name}-{version}/src");
            folders.extend(indexes.iter().map(|index| index.join(&folder)).filter(|path| path.is_dir()));
        }
    }
    if folders.is_empty() {
        bail!("{} has no sources of our dependencies; name a text with --text", registry.display());
    }
    let mut sources = Sources { paths: folders, extensions: vec!["rs".into()] };
    let mut files = sources.files()?;
    files.retain(|file| file.bytes <= MAX_FILE);
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    // Every n-th file, so that all crates stay represented.
    let every = total.div_ceil(MAX_BYTES).max(1) as usize;
    sources.paths = files.into_iter().step_by(every).map(|file| file.path).collect();
    Ok(sources)
}

/// The checkpoint at `path`: itself, in any format, or the newest of the run there.
pub fn checkpoint_path(path: &Path) -> Result<PathBuf> {
    if !path.exists() {
        bail!("{} does not exist; train a model with `cargo run --release --example pretrain`", path.display());
    }
    Ok(engine::checkpoint_path(path)?)
}

/// How a program that generates opens its model.
#[derive(Args)]
pub struct ModelArgs {
    /// Tokenizer, where the checkpoint has none beside it: tokenizer.model, tokenizer.json or a GGUF file
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Adapters that fine-tuning made: a folder in PEFT's layout, or a run of `finetune`
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// How matrices are kept in memory: f32, bf16, f16, q8 or q4 (8 or 4 bits in blocks of 32), fewer bytes decode faster; by default as the checkpoint has them
    #[arg(long)]
    pub weights: Option<WeightFormat>,
    /// Precision of products when a text is read, f32, bf16 or f16; by default short for short weights, but f32 for an evaluation
    #[arg(long)]
    pub precision: Option<Precision>,
    /// What keys and values of past positions are kept in, f32, bf16 or f16; by default f16 for short weights, but f32 for an evaluation
    #[arg(long)]
    pub cache: Option<Precision>,
    #[command(flatten)]
    pub devices: DeviceArgs,
}

/// How a program chooses tokens.
#[derive(Args)]
pub struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Keeps the k most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Keeps the most likely tokens up to this probability
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Above 1 makes tokens that occurred less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    pub fn sampling(&self) -> Sampling {
        let Self { temperature, top_k, top_p, repetition_penalty, .. } = *self;
        Sampling { repetition_penalty, temperature, top_k, top_p: Some(top_p) }
    }
}

impl ModelArgs {
    fn options(&self) -> Result<EngineOptions> {
        Ok(EngineOptions {
            weights: self.weights,
            precision: self.precision,
            cache: self.cache,
            adapter: self.adapter.clone(),
            tokenizer: self.tokenizer.clone(),
            ..EngineOptions::new(self.devices.devices()?)
        })
    }
}

/// Opens a checkpoint in any format with its tokenizer, or the one named, and shows its progress. A process that is not the first does what that does, until it
/// ends, and ends, too.
pub fn open(path: &Path, args: &ModelArgs) -> Result<Engine> {
    let (path, options) = (checkpoint_path(path)?, args.options()?);
    if !options.devices.lead() {
        engine::follow(&path, &options)?;
        std::process::exit(0);
    }
    Ok(Engine::open_with(&path, &options, &Bar::default())?)
}

/// Opens a small model that guesses for a large one, whole on its first device.
pub fn open_draft(path: &Path, args: &ModelArgs) -> Result<Engine> {
    let options = args.options()?;
    let options = EngineOptions { devices: options.devices.devices[0].into(), ..options };
    Ok(Engine::open_with(&checkpoint_path(path)?, &options, &Bar::default())?)
}

/// Prints without waiting for the end of the line.
pub fn show(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
