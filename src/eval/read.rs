//! Rows of benchmark files: JSON lines, JSON, and tables with commas or tabs.

use std::io::Read;
use std::path::{Path, PathBuf};

use llama_data::DataError;
use llama_data::input::{self, Limits};
use serde_json::{Map, Value};

/// One row, with where it stands.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub fields: Map<String, Value>,
    /// The file's name without endings.
    pub stem: String,
    /// The file.
    pub path: PathBuf,
    /// Line or entry.
    pub place: String,
}

/// Columns of MMLU's tables, which have no line with their names.
const MMLU: [&str; 6] = ["question", "A", "B", "C", "D", "answer"];

/// All rows of a file, or of the files in a folder and below it, in the order of their names.
pub(super) fn rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    if !path.is_dir() {
        return file_rows(path);
    }
    let mut entries: Vec<PathBuf> = std::fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<_, _>>())
        .map_err(io)?;
    entries.retain(|entry| entry.is_dir() || matches!(kind(entry), Some(kind) if kind != Kind::Labels));
    entries.sort();
    let mut all = Vec::new();
    for entry in entries {
        all.extend(rows(&entry)?);
    }
    Ok(all)
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Lines,
    Json,
    Table(u8),
    Labels,
}

/// What a file is by its ending, below that of a compression.
fn kind(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    let name = [".gz", ".zst", ".bz2"].iter().find_map(|packed| name.strip_suffix(packed)).unwrap_or(&name);
    match name.rsplit_once('.')?.1 {
        "jsonl" => Some(Kind::Lines),
        // RACE's articles are JSON in files of text.
        "json" | "txt" => Some(Kind::Json),
        "csv" => Some(Kind::Table(b',')),
        "tsv" => Some(Kind::Table(b'\t')),
        "lst" => Some(Kind::Labels),
        _ => None,
    }
}

fn file_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let wrong = |reason: String| DataError::Format { path: path.into(), reason };
    let mut text = String::new();
    let mut reader = input::open(path, Limits::default())?;
    reader.read_to_string(&mut text).map_err(|source| DataError::Io { path: path.into(), source })?;
    let text = text.trim_start_matches('\u{feff}');
    let object = |value: Value, place: &dyn Fn() -> String| match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(wrong(format!("{}: not a JSON object", place()))),
    };
    let mut found: Vec<(Map<String, Value>, String)> = Vec::new();
    match kind(path) {
        Some(Kind::Lines) => {
            for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let place = || format!("line {}", index + 1);
                let value = serde_json::from_str(line).map_err(|error| wrong(format!("{}: {error}", place())))?;
                found.push((object(value, &place)?, place()));
            }
        }
        Some(Kind::Json) => {
            let value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
            // TriviaQA has its list in `Data`; RACE an article in each file.
            let list = match value {
                Value::Array(list) => list,
                Value::Object(mut fields) => match fields.remove("Data") {
                    Some(Value::Array(list)) => list,
                    _ => vec![Value::Object(fields)],
                },
                _ => return Err(wrong("neither a JSON list nor an object".into())),
            };
            for (index, value) in list.into_iter().enumerate() {
                let place = || format!("entry {}", index + 1);
                found.push((object(value, &place)?, place()));
            }
        }
        Some(Kind::Table(delimiter)) => {
            let mut table =
                csv::ReaderBuilder::new().delimiter(delimiter).has_headers(false).from_reader(text.as_bytes());
            let mut names: Option<Vec<String>> = None;
            for record in table.records() {
                let record = record.map_err(|error| wrong(error.to_string()))?;
                let names = names.get_or_insert_with(|| match record.get(5) {
                    Some("A" | "B" | "C" | "D" | "0" | "1" | "2" | "3") if record.len() == 6 => {
                        MMLU.map(String::from).into()
                    }
                    _ => record.iter().map(String::from).collect(),
                });
                if record.iter().ne(names.iter().map(String::as_str)) {
                    let fields = names.iter().cloned().zip(record.iter().map(Value::from)).collect();
                    let line = record.position().map_or(0, csv::Position::line);
                    found.push((fields, format!("line {line}")));
                }
            }
        }
        Some(Kind::Labels) | None => {
            let reason = "its ending is none of .jsonl, .json, .txt, .csv and .tsv, perhaps with .gz, .zst or .bz2";
            return Err(wrong(reason.into()));
        }
    }
    add_labels(path, &mut found)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split('.').next().unwrap_or_default().to_string();
    let row = |(fields, place)| Row { fields, stem: stem.clone(), path: path.into(), place };
    Ok(found.into_iter().map(row).collect())
}

/// PIQA and SIQA keep the answers of `dev.jsonl` in `dev-labels.lst`.
fn add_labels(path: &Path, rows: &mut [(Map<String, Value>, String)]) -> Result<(), DataError> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jsonl")) else { return Ok(()) };
    let labels = path.with_file_name(format!("{name}-labels.lst"));
    if rows.iter().any(|(fields, _)| fields.contains_key("label")) || !labels.is_file() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&labels).map_err(|source| DataError::Io { path: labels.clone(), source })?;
    let answers: Vec<&str> = text.split_whitespace().collect();
    if answers.len() != rows.len() {
        let reason = format!("{} labels for the {} rows of {}", answers.len(), rows.len(), path.display());
        return Err(DataError::Format { path: labels, reason });
    }
    for ((fields, _), answer) in rows.iter_mut().zip(answers) {
        fields.insert("label".into(), answer.into());
    }
    Ok(())
}
