//! JSON lines.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{Record, broken_record, too_long};
use crate::input::{Line, Lines};
use crate::source::Document;

pub(super) struct JsonLines {
    path: PathBuf,
    lines: Lines<Box<dyn BufRead>>,
    buffer: Vec<u8>,
    number: u64,
}

impl JsonLines {
    pub(super) fn new(path: PathBuf, lines: Lines<Box<dyn BufRead>>) -> Self {
        Self { path, lines, buffer: Vec::new(), number: 0 }
    }
}

impl Iterator for JsonLines {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        loop {
            let line = self.lines.next(&mut self.buffer)?;
            self.number += 1;
            let broken = |offset, reason| broken_record(&self.path, offset, format!("line {}: {reason}", self.number));
            let offset = match line {
                Line::Read(offset) => offset,
                Line::TooLong(offset) => return broken(offset, too_long(self.lines.limit())),
                Line::Failed(offset, error) => return broken(offset, error.to_string()),
            };
            if self.buffer.trim_ascii().is_empty() {
                continue;
            }
            let origin = || format!("{}:{}", self.path.display(), self.number);
            return match parse(&self.buffer, origin) {
                Ok(document) => Some(Ok(document)),
                Err(reason) => broken(offset, reason),
            };
        }
    }
}

fn parse(line: &[u8], origin: impl Fn() -> String) -> Result<Document, String> {
    match serde_json::from_slice(line).map_err(|error| error.to_string())? {
        Value::Object(object) => document(object, origin),
        _ => Err("not a JSON object".into()),
    }
}

/// A document from an object with a string `text` or `content`. Other strings, also those of a nested `meta` or `metadata`, become
/// its metadata; what else there is, is dropped.
pub(super) fn document(mut object: Map<String, Value>, origin: impl Fn() -> String) -> Result<Document, String> {
    let text = match (object.remove("text"), object.remove("content")) {
        (Some(Value::String(text)), _) | (None, Some(Value::String(text))) => text,
        _ => return Err("there is no string `text` or `content`".into()),
    };
    let mut meta = BTreeMap::new();
    let nested: Vec<_> = ["meta", "metadata"].iter().filter_map(|key| object.remove(*key)).collect();
    let nested = nested.into_iter().filter_map(|value| match value {
        Value::Object(fields) => Some(fields),
        _ => None,
    });
    for (key, value) in nested.flatten().chain(object) {
        match value {
            Value::String(value) => meta.insert(key, value),
            Value::Number(value) => meta.insert(key, value.to_string()),
            _ => None,
        };
    }
    let origin = meta.remove("origin").unwrap_or_else(origin);
    Ok(Document { text, origin, meta })
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::super::tests::read_bytes;

    #[test]
    fn lines_become_documents_with_metadata() {
        let bytes = b"{\"text\": \"one\", \"url\": \"http://a\", \"meta\": {\"language\": \"en\"}, \"n\": [1]}\n\n{\"content\": \"two\"}";
        let (documents, broken) = read_bytes(Format::Jsonl, "a.jsonl", bytes);
        assert!(broken.is_empty());
        assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(documents[0].meta["url"], "http://a");
        assert_eq!(documents[0].meta["language"], "en");
        assert!(documents[1].origin.ends_with("a.jsonl:3"));
    }

    #[test]
    fn broken_lines_say_where_and_the_rest_is_read() {
        let mut bytes = b"{\"text\": \"one\"}\n{\"text\": 1}\nnonsense\n{\"text\": \"\xff\"}\n{\"text\": \"".to_vec();
        bytes.extend([b'x'; 1 << 17]);
        bytes.extend(b"\"}\n{\"text\": \"two\"}\n");
        let (documents, broken) = read_bytes(Format::Jsonl, "a.jsonl", &bytes);
        assert_eq!(documents.len(), 2);
        assert_eq!(broken.iter().map(|b| b.offset).collect::<Vec<_>>(), [16, 28, 37, 51].map(Some));
        for (broken, line) in broken.iter().zip(2..) {
            assert!(broken.to_string().contains(&format!("line {line}: ")), "{broken}");
        }
        // A line that is too long is one, too.
        assert!(documents[1].origin.ends_with("a.jsonl:6"));
    }
}
