//! The stages in their order.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::claims::{self, Task};
use super::config::{PrepareConfig, SourceConfig};
use super::dedup_stage::{DedupStage, partitions};
use super::report::{PipelineReport, ShardReport, SourceReport};
use super::segment::{Input, ShardPath, process};
use super::step::{Dedup, Step};
use super::{html, tokens};
use crate::clean::Clean;
use crate::input::Limits;
use crate::mixture::{MixtureConfig, MixtureSource};
use crate::read::Format;
use crate::source::{SourceFile, Sources};
use crate::tokenizer::{Codec, JSON_FILE, PIECES_FILE};
use crate::{DataError, Progress};

/// What a source's shards are made of: written once, so that a run on a changed input or with changed rules is refused instead of mixed
/// with the old one.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Plan {
    format: Format,
    steps: Vec<Step>,
    /// Files of each part.
    parts: Vec<Vec<PathBuf>>,
    bytes: u64,
}

/// Rules between two comparisons, and the comparison after them.
struct Segment {
    steps: Vec<Step>,
    after: Option<Dedup>,
}

/// Does what is not done yet, on `threads` threads, and returns the report, which is also written into the output folder as `report.json`,
/// `report.txt` and `report.html`, beside `mixture.toml` and `tokenizer.model`: the folder is what training reads.
///
/// # Errors
/// Those of reading the configuration's files and of writing; broken records are no errors.
pub fn run(config: &PrepareConfig, threads: usize, progress: &dyn Progress) -> Result<PipelineReport, DataError> {
    let mut report = PipelineReport::default();
    let mut cleaned = Vec::new();
    let weights: f64 = config.source.iter().map(|source| source.weight).sum();
    for source in &config.source {
        let mut source_report =
            SourceReport { name: source.name.clone(), share: source.weight / weights, ..Default::default() };
        cleaned.push(clean(config, source, threads, progress, &mut source_report)?);
        report.sources.push(source_report);
    }

    let bytes: Vec<u64> = report.sources.iter().map(|source| source.total.kept.bytes).collect();
    let given = config.tokenizer.file.as_deref().map(Codec::load).transpose()?;
    let at = |name: &str| config.output.join(name);
    type Work<'a> = Box<dyn Fn() -> Result<(), DataError> + Send + Sync + 'a>;
    let (result, work): (_, Work) = match given.as_ref().map(|codec| (codec, codec.sentence_piece())) {
        Some((_, Some(pieces))) => (at(PIECES_FILE), Box::new(|| pieces.save(&at(PIECES_FILE)))),
        // A byte-level vocabulary has no such file.
        Some((codec, None)) => (at(JSON_FILE), Box::new(|| codec.install(&config.output).map(drop))),
        None => {
            let train = || tokens::train(config, &cleaned, &bytes, &at(PIECES_FILE), progress);
            (at(PIECES_FILE), Box::new(train))
        }
    };
    claims::run("tokenizer", &[Task { result: result.clone(), units: 1, work }], 1, &crate::NoProgress)?;
    let tokenizer = Codec::load(&result)?;
    tokenizer.check_separates(config.tokenizer.eos)?;

    for ((source, shards), report) in config.source.iter().zip(&cleaned).zip(&mut report.sources) {
        let folder = create(config.output.join("tokens").join(&source.name))?;
        let tasks: Vec<Task> = shards
            .iter()
            .enumerate()
            .map(|(index, shard)| {
                let (folder, tokenizer) = (&folder, &tokenizer);
                Task {
                    result: ShardPath::new(folder, index).report(),
                    units: size(&shard.documents()),
                    work: Box::new(move || tokens::tokenize(shard, index, folder, tokenizer, config)),
                }
            })
            .collect();
        claims::run(&format!("{}: tokens", source.name), &tasks, threads, progress)?;
        for task in &tasks {
            report.add(&ShardReport::load(&task.result)?, false, false);
        }
    }

    let sources = config.source.iter().map(|source| MixtureSource {
        name: source.name.clone(),
        folder: Path::new("tokens").join(&source.name),
        weight: source.weight,
    });
    MixtureConfig { source: sources.collect() }.save(&config.output)?;
    crate::write_atomically(&config.output.join("report.json"), |file| {
        serde_json::to_writer_pretty(file, &report).map_err(Into::into)
    })?;
    for (name, text) in [("report.txt", report.table()), ("report.html", html::page(&report))] {
        crate::write_atomically(&config.output.join(name), |file| std::io::Write::write_all(file, text.as_bytes()))?;
    }
    Ok(report)
}

/// Reads and cleans a source; returns its cleaned shards.
fn clean(
    config: &PrepareConfig,
    source: &SourceConfig,
    threads: usize,
    progress: &dyn Progress,
    report: &mut SourceReport,
) -> Result<Vec<ShardPath>, DataError> {
    let work = create(config.output.join("work").join(&source.name))?;
    let plan = plan(config, source, &work.join("plan.json"))?;
    let segments = segments(plan.steps);
    let mut stage: Option<DedupStage> = None;
    // The shards of every segment, held here because the comparison after it refers to them.
    let folders = (0..segments.len())
        .map(|index| match index + 1 == segments.len() {
            true => create(config.output.join("clean").join(&source.name)),
            false => create(work.join(index.to_string())),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let shards: Vec<Vec<ShardPath>> =
        folders.iter().map(|folder| (0..plan.parts.len()).map(|part| ShardPath::new(folder, part)).collect()).collect();
    for (index, segment) in segments.iter().enumerate() {
        let rules: OnceLock<Result<Vec<Box<dyn Clean>>, String>> = OnceLock::new();
        let load = || {
            let rules = segment.steps.iter().filter_map(|step| step.load().transpose()).collect::<Result<_, _>>();
            rules.map_err(|error| error.to_string())
        };
        let partitions = segment.after.map(|dedup| (dedup, partitions(dedup, plan.bytes)));
        let tasks: Vec<Task> = (0..plan.parts.len())
            .map(|part| {
                let (out, before, stage, rules) = (&shards[index][part], index.checked_sub(1), &stage, &rules);
                let (files, format) = (plan.parts[part].as_slice(), plan.format);
                let input_bytes = match before {
                    Some(before) => size(&shards[before][part].documents()),
                    None => files.iter().map(|file| size(file)).sum(),
                };
                let shards = &shards;
                let work = move || {
                    let rules = rules.get_or_init(load).as_ref().map_err(|error| rule_error(source, error))?;
                    let input = match (before, stage) {
                        (Some(before), Some(stage)) => Input::Shard {
                            documents: shards[before][part].documents(),
                            dedup: stage.dedup,
                            duplicates: stage.duplicates_of(part)?,
                        },
                        _ => Input::Files { files, format, limits: limits(config) },
                    };
                    process(&input, rules, partitions, out)
                };
                Task { result: out.report(), units: input_bytes, work: Box::new(work) }
            })
            .collect();
        claims::run(&format!("{}: clean {}/{}", source.name, index + 1, segments.len()), &tasks, threads, progress)?;
        for task in &tasks {
            report.add(&ShardReport::load(&task.result)?, index == 0, index + 1 == segments.len());
        }
        drop(tasks);
        if let Some((dedup, partitions)) = partitions {
            let folder = work.join(format!("{index}-found"));
            let next = DedupStage { dedup, partitions, shards: &shards[index], folder };
            next.run(&format!("{}: duplicates", source.name), threads, progress)?;
            stage = Some(next);
        }
    }
    let last = segments.len() - 1;
    Ok(shards.into_iter().nth(last).unwrap_or_default())
}

fn rule_error(source: &SourceConfig, error: &str) -> DataError {
    DataError::Rule { source_name: source.name.clone(), reason: error.into() }
}

fn limits(config: &PrepareConfig) -> Limits {
    Limits { record: config.record_bytes, ..Default::default() }
}

/// Cuts rules at the comparisons; there is always a last segment without one.
fn segments(steps: Vec<Step>) -> Vec<Segment> {
    let mut all = Vec::new();
    let mut open = Vec::new();
    for step in steps {
        match step.dedup() {
            Some(dedup) => all.push(Segment { steps: std::mem::take(&mut open), after: Some(dedup) }),
            None => open.push(step),
        }
    }
    all.push(Segment { steps: open, after: None });
    all
}

/// The source's plan: as it was written by the first run, or a new one.
fn plan(config: &PrepareConfig, source: &SourceConfig, path: &Path) -> Result<Plan, DataError> {
    let format = source.format.unwrap_or(source.recipe.format());
    let steps = config.steps(source).map_err(|reason| DataError::format(path, reason))?;
    let files = files(source, format)?;
    let bytes = files.iter().map(|file| file.bytes).sum();
    let mut parts: Vec<Vec<PathBuf>> = Vec::new();
    let mut room = 0;
    for file in files {
        match parts.last_mut() {
            Some(part) if file.bytes <= room => part.push(file.path),
            _ => {
                parts.push(vec![file.path]);
                room = config.shard_bytes;
            }
        }
        room = room.saturating_sub(file.bytes);
    }
    let plan = Plan { format, steps, parts, bytes };
    if let Ok(old) = std::fs::read(path) {
        let old: Plan = serde_json::from_slice(&old).map_err(|error| DataError::format(path, error))?;
        if old != plan {
            let reason =
                "the input files or rules are not those this folder was begun with; give another output, or delete it";
            return Err(DataError::format(path, reason));
        }
    } else {
        crate::write_atomically(path, |file| serde_json::to_writer(file, &plan).map_err(Into::into))?;
    }
    Ok(plan)
}

/// The source's files, sorted within each path. A folder of LaTeX is itself one.
fn files(source: &SourceConfig, format: Format) -> Result<Vec<SourceFile>, DataError> {
    let usual = || format.extensions().iter().map(ToString::to_string).collect();
    let extensions = source.extensions.clone().unwrap_or_else(usual);
    if format != Format::Latex {
        return Sources { paths: source.paths.clone(), extensions }.files();
    }
    // A folder holds tars, or is read as papers itself.
    let mut files = Vec::new();
    for path in &source.paths {
        let meta = std::fs::metadata(path).map_err(|error| DataError::io(path, error))?;
        let tars = Sources { paths: vec![path.clone()], extensions: vec!["tar".into()] }.files();
        match tars {
            Ok(tars) if meta.is_dir() => files.extend(tars),
            _ => files.push(SourceFile { path: path.clone(), bytes: meta.len(), found: false }),
        }
    }
    Ok(files)
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

fn create(folder: PathBuf) -> Result<PathBuf, DataError> {
    std::fs::create_dir_all(&folder).map_err(|error| DataError::io(&folder, error))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::NoProgress;

    /// A number as letters: to line deduplication all digits are equal.
    fn name(number: usize) -> String {
        number.to_string().bytes().map(|digit| (digit - b'0' + b'a') as char).collect()
    }

    /// Texts in several files, some of them twice, some nearly.
    fn input(folder: &Path) {
        let text = folder.join("text");
        std::fs::create_dir_all(&text).unwrap();
        for file in 0..6 {
            let mut lines = String::new();
            for document in 0..40 {
                let seed = if document % 8 == 0 { 0 } else { file };
                let word = |word: usize| {
                    name(xxhash_rust::xxh3::xxh3_64(&[seed as u8, document as u8, word as u8]) as usize % 997)
                };
                let body = (0..60).map(word).collect::<Vec<_>>().join(" ");
                let (file, document) = (name(file), name(document));
                lines +=
                    &format!("{{\"text\": \"Shared line {document}.\\n{body}.\\nTail of {file} and {document}.\"}}\n");
            }
            lines += "not json\n";
            std::fs::write(text.join(format!("{file}.jsonl")), lines).unwrap();
        }
    }

    fn config(folder: &Path, output: &str) -> PrepareConfig {
        let toml = format!(
            "output = \"{output}\"\nshard_bytes = 1000\nvalid_fraction = 0.2\n[tokenizer]\nvocab_size = 290\n\
            [[source]]\nname = \"a\"\nrecipe = \"text\"\nformat = \"jsonl\"\npaths = [\"text\"]\nweight = 3.0\n\
            steps = [{{ rule = \"duplicate_lines\" }}, {{ rule = \"length\", min_chars = 30 }}, \
            {{ rule = \"near_duplicates\", similarity = 0.8 }}, {{ rule = \"duplicate_documents\" }}]\n\
            [[source]]\nname = \"b\"\nrecipe = \"text\"\nformat = \"jsonl\"\npaths = [\"text/0.jsonl\"]\n"
        );
        let path = folder.join(format!("{output}.toml"));
        std::fs::write(&path, toml).unwrap();
        PrepareConfig::load(&path).unwrap()
    }

    fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut open = vec![folder.to_path_buf()];
        while let Some(inner) = open.pop() {
            for entry in std::fs::read_dir(inner).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else if !path.ends_with("plan.json") {
                    found.insert(path.strip_prefix(folder).unwrap().into(), std::fs::read(&path).unwrap());
                }
            }
        }
        found
    }

    #[test]
    fn documents_are_cleaned_compared_and_tokenized() {
        let folder = tempfile::tempdir().unwrap();
        input(folder.path());
        let config = config(folder.path(), "out");
        let report = run(&config, 2, &NoProgress).unwrap();
        let a = &report.sources[0];
        assert_eq!((a.total.read.number, a.total.broken), (240, 6));
        // Shared lines stay once, in the first file; the eighth of the documents that all files share goes, but for the first.
        assert_eq!(a.total.tally.trimmed["duplicates: line"].number, 5 * 40 + 5 * 5);
        let dropped: u64 = a.total.tally.dropped.values().map(|count| count.number).sum();
        assert_eq!(a.total.kept.number + dropped, 240);
        assert_eq!(a.total.tally.dropped["length: short"].number, 25, "{:?}", a.total.tally);
        assert!(a.total.train_tokens > 4 * a.total.valid_tokens / 2 && a.total.valid_tokens > 0);
        assert!((a.share - 0.75).abs() < 1e-12);
        for name in ["report.json", "report.html", "report.txt", "mixture.toml", "tokenizer.model"] {
            assert!(config.output.join(name).exists(), "{name}");
        }
        let tokenizer = Codec::load(&config.output).unwrap();
        let mixture = crate::mixture::Mixture::open(&config.output, "train", tokenizer.fingerprint(), 16, 1).unwrap();
        assert_eq!(mixture.tokens(), report.sources.iter().map(|source| source.total.train_tokens).sum::<u64>());
    }

    /// Whatever a killed run left, the next one ends with the same files; so do several at once.
    #[test]
    fn unfinished_and_shared_work_ends_the_same() {
        let folder = tempfile::tempdir().unwrap();
        input(folder.path());
        let whole = config(folder.path(), "whole");
        run(&whole, 2, &NoProgress).unwrap();
        let expected = files(&whole.output);

        let shared = config(folder.path(), "shared");
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| run(&shared, 1, &NoProgress).unwrap());
            }
        });
        assert!(files(&shared.output) == expected);

        // Some results are gone, as if they had not been written, and a claim of a dead process is left.
        for (index, path) in expected.keys().enumerate() {
            if index % 3 == 0 {
                std::fs::remove_file(shared.output.join(path)).unwrap();
            }
        }
        let claim = shared.output.join("clean/a/00001.report.json.claim");
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        std::fs::write(&claim, format!("{} 4194999\n", host.trim())).unwrap();
        // What stands for a shard is written last: the shard itself may be there without it, not the other way.
        for path in expected.keys().filter(|path| path.to_string_lossy().ends_with(".jsonl.zst")) {
            if !shared.output.join(path).exists() {
                let report = path.to_string_lossy().replace(".jsonl.zst", ".report.json");
                let _ = std::fs::remove_file(shared.output.join(report));
            }
        }
        for path in expected
            .keys()
            .filter(|path| path.extension().is_some_and(|e| e == "keys" || e == "signatures" || e == "bin"))
        {
            if !shared.output.join(path).exists() {
                let name = path.to_string_lossy().replace("train-", "").replace("valid-", "");
                let stem = name.rsplit_once('.').unwrap().0.to_string();
                let _ = std::fs::remove_file(shared.output.join(format!("{stem}.report.json")));
            }
        }
        run(&shared, 2, &NoProgress).unwrap();
        assert!(files(&shared.output) == expected);
    }

    #[test]
    fn changed_rules_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        input(folder.path());
        let mut config = config(folder.path(), "out");
        run(&config, 2, &NoProgress).unwrap();
        config.source[0].steps = Some(vec![Step::DuplicateLines {}]);
        let error = run(&config, 2, &NoProgress).unwrap_err().to_string();
        assert!(error.contains("another output"), "{error}");
        config.source[1].steps = Some(vec![Step::Quality {
            model: folder.path().join("none.bin"),
            label: "x".into(),
            min_probability: 0.5,
        }]);
        config.source.remove(0);
        config.output = folder.path().join("other");
        let error = run(&config, 2, &NoProgress).unwrap_err().to_string();
        assert!(error.contains("source `b`") && error.contains("none.bin"), "{error}");
    }
}
