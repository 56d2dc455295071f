//! CommonCrawl's WARC and WET files ([WARC 1.1](https://iipc.github.io/warc-specifications/)).

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::PathBuf;

use super::{Record, broken_record, too_long};
use crate::clean::html;
use crate::input::{Line, Lines};
use crate::source::Document;

/// More header lines than any real record has.
const MAX_HEADERS: usize = 1000;

pub(super) struct Warc {
    path: PathBuf,
    lines: Lines<Box<dyn BufRead>>,
    buffer: Vec<u8>,
    done: bool,
}

struct Header {
    offset: u64,
    fields: BTreeMap<String, String>,
}

impl Warc {
    pub(super) fn new(path: PathBuf, lines: Lines<Box<dyn BufRead>>) -> Self {
        Self { path, lines, buffer: Vec::new(), done: false }
    }

    /// The next record's header. What stands between records is passed over up to the next version line, and reported unless it is blank.
    fn header(&mut self) -> Option<Result<Header, (u64, String)>> {
        let mut garbage = None;
        let offset = loop {
            match self.lines.next(&mut self.buffer) {
                Some(Line::Read(offset)) if self.buffer.starts_with(b"WARC/1.") => break offset,
                Some(Line::Read(offset) | Line::TooLong(offset)) => {
                    if !self.buffer.trim_ascii().is_empty() {
                        garbage.get_or_insert(offset);
                    }
                }
                Some(Line::Failed(offset, error)) => return self.fail(offset, error.to_string()),
                None => {
                    self.done = true;
                    return garbage.map(|offset| Err((offset, "no WARC record begins here".into())));
                }
            }
        };
        let mut fields = BTreeMap::new();
        for _ in 0..MAX_HEADERS {
            match self.lines.next(&mut self.buffer) {
                Some(Line::Read(_)) if self.buffer.trim_ascii().is_empty() => {
                    return Some(Ok(Header { offset, fields }));
                }
                Some(Line::Read(_)) => {
                    let line = String::from_utf8_lossy(&self.buffer);
                    if let Some((key, value)) = line.split_once(':') {
                        fields.insert(key.trim().to_ascii_lowercase(), value.trim().to_string());
                    }
                }
                Some(Line::TooLong(_)) => {}
                Some(Line::Failed(offset, error)) => return self.fail(offset, error.to_string()),
                None => return self.fail(offset, "the file ends inside a record's header".into()),
            }
        }
        Some(Err((offset, format!("a record's header has more than {MAX_HEADERS} lines"))))
    }

    fn fail<T>(&mut self, offset: u64, reason: String) -> Option<Result<T, (u64, String)>> {
        self.done = true;
        Some(Err((offset, reason)))
    }

    fn record(&mut self, header: &Header) -> Result<Option<Document>, String> {
        let length = header.fields.get("content-length").and_then(|length| length.parse::<u64>().ok());
        let length = length.ok_or("the record has no valid Content-Length")?;
        if let Err(error) = self.lines.take(length, &mut self.buffer) {
            self.done = true;
            return Err(format!("the record's content is cut short: {error}"));
        }
        let kind = header.fields.get("warc-type").map(String::as_str);
        if !matches!(kind, Some("conversion" | "response")) {
            return Ok(None);
        }
        if length > self.lines.limit() as u64 {
            return Err(too_long(self.lines.limit()));
        }
        let text = match kind {
            Some("conversion") => {
                std::str::from_utf8(&self.buffer).map_err(|error| format!("not UTF-8 text: {error}"))?.to_string()
            }
            _ => match html_body(&self.buffer) {
                Some(body) => html::to_text(&String::from_utf8_lossy(body)),
                None => return Ok(None),
            },
        };
        let field = |name: &str| header.fields.get(name).cloned();
        let origin = field("warc-target-uri").unwrap_or_else(|| format!("{}@{}", self.path.display(), header.offset));
        let mut meta = BTreeMap::new();
        for (key, name) in [("url", "warc-target-uri"), ("date", "warc-date"), ("digest", "warc-block-digest")] {
            if let Some(value) = field(name) {
                meta.insert(key.to_string(), value);
            }
        }
        Ok(Some(Document { text, origin, meta }))
    }
}

impl Iterator for Warc {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        while !self.done {
            let header = match self.header()? {
                Ok(header) => header,
                Err((offset, reason)) => return broken_record(&self.path, offset, reason),
            };
            match self.record(&header) {
                Ok(Some(document)) => return Some(Ok(document)),
                Ok(None) => {}
                Err(reason) => return broken_record(&self.path, header.offset, reason),
            }
        }
        None
    }
}

/// The body of a successful HTTP response with HTML.
fn html_body(response: &[u8]) -> Option<&[u8]> {
    let end = response.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&response[..end]).to_ascii_lowercase();
    let success = head.split_whitespace().nth(1)?.starts_with('2');
    let html = head.lines().any(|line| line.starts_with("content-type:") && line.contains("html"));
    (success && html && !head.contains("\ncontent-encoding: gzip")).then(|| &response[end + 4..])
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::super::tests::read_bytes;

    fn record(kind: &str, url: &str, body: &str) -> String {
        format!(
            "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: {}\r\n\r\n{body}\r\n\r\n",
            body.len()
        )
    }

    #[test]
    fn conversions_and_responses_are_read() {
        let http = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>Hello <b>web</b></p><script>x()</script>";
        let not_html = "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n...";
        let file = [
            record("warcinfo", "", "software: x"),
            record("conversion", "http://a", "one\ntwo"),
            record("response", "http://b", http),
            record("response", "http://c", not_html),
        ]
        .concat();
        let (documents, broken) = read_bytes(Format::Warc, "a.wet", file.as_bytes());
        assert_eq!(broken, []);
        assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["one\ntwo", "Hello web"]);
        assert_eq!(documents[0].meta["url"], "http://a");
    }

    #[test]
    fn broken_records_do_not_hide_the_next() {
        let file = [
            "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: many\r\n\r\nlost\r\n\r\n".to_string(),
            record("conversion", "http://a", "kept"),
            record("conversion", "http://b", &"x".repeat(1 << 17)),
            record("conversion", "http://c", "kept too"),
            "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 99\r\n\r\ncut".to_string(),
        ]
        .concat();
        let (documents, broken) = read_bytes(Format::Warc, "a.wet", file.as_bytes());
        assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["kept", "kept too"]);
        assert_eq!(broken.len(), 3, "{broken:?}");
        assert!(broken[2].reason.contains("3 of 99"), "{broken:?}");
    }
}
