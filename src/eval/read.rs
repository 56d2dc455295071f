//! Rows of benchmark files: JSON lines, JSON, tables with commas or tabs, and Parquet.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use llama_data::DataError;
use llama_data::input::{self, Limits};
use llama_data::read::ParquetRows;
use llama_data::source::{Sources, inner_extension};
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

/// Endings of the files that are read, below a compression's. RACE's articles are JSON in files of text.
const ENDINGS: [&str; 6] = ["jsonl", "json", "txt", "csv", "tsv", "parquet"];

/// All rows of a file, or of the files in a folder and below it, in the order of their names.
pub(super) fn rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let files = Sources { paths: vec![path.into()], extensions: ENDINGS.map(String::from).into() }.files()?;
    let rows: Vec<_> = files.iter().map(|file| file_rows(&file.path)).collect::<Result<_, _>>()?;
    Ok(rows.concat())
}

fn file_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let wrong = |reason: String| DataError::format(path, reason);
    let kind = inner_extension(path);
    if kind == "parquet" {
        let rows = ParquetRows::open(path)?.enumerate().map(|(index, row)| {
            Ok(Row { fields: row?, stem: stem(path), path: path.into(), place: format!("row {}", index + 1) })
        });
        return rows.collect();
    }
    let mut text = String::new();
    let mut reader = input::open(path, Limits::default())?;
    reader.read_to_string(&mut text).map_err(|error| DataError::io(path, error))?;
    let text = text.trim_start_matches('\u{feff}');
    let object = |value: Value, place: &dyn Fn() -> String| match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(wrong(format!("{}: not a JSON object", place()))),
    };
    let mut found: Vec<(Map<String, Value>, String)> = Vec::new();
    match kind.as_str() {
        "jsonl" => {
            for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let place = || format!("line {}", index + 1);
                let value = serde_json::from_str(line).map_err(|error| wrong(format!("{}: {error}", place())))?;
                found.push((object(value, &place)?, place()));
            }
        }
        "json" | "txt" => {
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
        kind @ ("csv" | "tsv") => {
            let delimiter = if kind == "csv" { b',' } else { b'\t' };
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
        _ => {
            let endings = ENDINGS.join(", .");
            return Err(wrong(format!("its ending is none of .{endings}, perhaps with .gz, .zst or .bz2")));
        }
    }
    add_labels(path, &mut found)?;
    add_occupations(path, &mut found)?;
    let row = |(fields, place)| Row { fields, stem: stem(path), path: path.into(), place };
    Ok(found.into_iter().map(row).collect())
}

/// A file's name without endings.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_string()
}

/// Share of women in an occupation, where WinoGender's rows have it from the file beside them.
pub(super) const PERCENT_FEMALE: &str = "bls_pct_female";
const OCCUPATIONS: &str = "occupations-stats.tsv";

/// WinoGender's sentences begin their names with an occupation, whose statistics are in a file beside theirs.
fn add_occupations(path: &Path, rows: &mut [(Map<String, Value>, String)]) -> Result<(), DataError> {
    let statistics = path.with_file_name(OCCUPATIONS);
    if rows.first().is_none_or(|(fields, _)| !fields.contains_key("sentid")) || !statistics.is_file() {
        return Ok(());
    }
    let known = file_rows(&statistics)?;
    let of = |row: &Row, name: &str| row.fields.get(name).and_then(Value::as_str).map(String::from);
    let known: HashMap<_, _> =
        known.iter().filter_map(|row| Some((of(row, "occupation")?, of(row, PERCENT_FEMALE)?))).collect();
    for (fields, _) in rows {
        let name = fields.get("sentid").and_then(Value::as_str).unwrap_or_default();
        if let Some(percent) = known.get(name.split('.').next().unwrap_or_default()).cloned() {
            fields.insert(PERCENT_FEMALE.into(), percent.into());
        }
    }
    Ok(())
}

/// PIQA and SIQA keep the answers of `dev.jsonl` in `dev-labels.lst`.
fn add_labels(path: &Path, rows: &mut [(Map<String, Value>, String)]) -> Result<(), DataError> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jsonl")) else { return Ok(()) };
    let labels = path.with_file_name(format!("{name}-labels.lst"));
    if rows.iter().any(|(fields, _)| fields.contains_key("label")) || !labels.is_file() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&labels).map_err(|error| DataError::io(&labels, error))?;
    let answers: Vec<&str> = text.split_whitespace().collect();
    if answers.len() != rows.len() {
        let reason = format!("{} labels for the {} rows of {}", answers.len(), rows.len(), path.display());
        return Err(DataError::format(&labels, reason));
    }
    for ((fields, _), answer) in rows.iter_mut().zip(answers) {
        fields.insert("label".into(), answer.into());
    }
    Ok(())
}
