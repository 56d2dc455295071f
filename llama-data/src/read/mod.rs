//! Readers of the dumps of the paper's sources (section 2.1). Each is a stream of documents: memory does not grow with the
//! file, and what is broken is an item of the stream, with file and offset, and not the end of it.
//!
//! | [`Format`] | file | a document is |
//! | --- | --- | --- |
//! | `text` | plain text | the file |
//! | `jsonl` | JSON lines: C4, RedPajama, the output of this crate | a line with a string `text` or `content`; other strings become metadata |
//! | `parquet` | tables of the Hugging Face hub | a row with a string `text` or `content`, alike |
//! | `warc` | CommonCrawl WARC and WET | a `conversion` record, or the text of an HTML `response` |
//! | `mediawiki` | Wikipedia's `pages-articles` export | the wikitext of an article |
//! | `stackexchange` | a site's `Posts.xml` | a question with its answers, as HTML |
//! | `latex` | arXiv's tars, or folders with `.tex` files | a paper, its `\input` files in place |
//! | `code` | source trees | a file, with the licence of its package |
//!
//! Every format but `parquet`, which compresses by itself, may be compressed by gzip, zstd or bzip2.

mod code;
mod json_lines;
mod latex;
mod mediawiki;
mod parquet;
mod stackexchange;
mod warc;
mod xml;

pub use parquet::ParquetRows;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::clean::github;
use crate::input::{self, Limits, Lines};
use crate::source::Document;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// Plain text, a document a file.
    Text,
    /// JSON lines.
    Jsonl,
    /// Parquet.
    Parquet,
    /// CommonCrawl's WARC and WET.
    Warc,
    /// MediaWiki's XML export.
    MediaWiki,
    /// StackExchange's `Posts.xml`.
    StackExchange,
    /// LaTeX sources in folders and tars.
    Latex,
    /// Source trees.
    Code,
}

/// A record that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// The file.
    pub path: PathBuf,
    /// Where in its unpacked bytes the record begins. None for Parquet, whose rows do not lie there one after the other: `reason` names the row.
    pub offset: Option<u64>,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at byte {offset}: {}", self.path.display(), self.reason),
            None => write!(f, "{}: {}", self.path.display(), self.reason),
        }
    }
}

impl From<Broken> for DataError {
    fn from(broken: Broken) -> Self {
        Self::format(&broken.path, broken.reason)
    }
}

/// A document, or what could not be read as one.
pub type Record = Result<Document, Broken>;

/// The documents of a stream.
pub type Records = Box<dyn Iterator<Item = Record>>;

impl Format {
    /// Endings of the files that belong to the format, without dot and compression.
    pub fn extensions(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["txt", "md"],
            Self::Jsonl => &["jsonl", "json", "ndjson"],
            Self::Parquet => &["parquet"],
            Self::Warc => &["warc", "wet"],
            Self::MediaWiki | Self::StackExchange => &["xml"],
            Self::Latex => &["tex", "tar"],
            Self::Code => &github::EXTENSIONS,
        }
    }

    /// Streams the documents of a file, or of a folder for `latex`.
    ///
    /// # Errors
    /// [`DataError::Io`] if it cannot be opened.
    pub fn read(self, path: &Path, limits: Limits) -> Result<Records, DataError> {
        match self {
            Self::Latex => return latex::read(path, limits),
            Self::Parquet => return Ok(Box::new(parquet::documents(path, limits.record)?)),
            _ => {}
        }
        let lines = Lines::new(input::open(path, limits)?, limits.record);
        let path = path.to_path_buf();
        Ok(match self {
            Self::Jsonl => Box::new(json_lines::JsonLines::new(path, lines)),
            Self::Warc => Box::new(warc::Warc::new(path, lines)),
            Self::MediaWiki => Box::new(mediawiki::MediaWiki::new(path, lines)),
            Self::StackExchange => Box::new(stackexchange::Questions::new(path, lines)),
            Self::Code => Box::new(std::iter::once_with(move || code::read(&path, limits))),
            Self::Text | Self::Latex | Self::Parquet => {
                Box::new(std::iter::once_with(move || whole_file(&path, limits)))
            }
        })
    }
}

/// A file as one document.
fn whole_file(path: &Path, limits: Limits) -> Record {
    let broken = |offset: usize, reason: String| Broken { path: path.into(), offset: Some(offset as u64), reason };
    let reader = input::open(path, limits).map_err(|error| broken(0, error.to_string()))?;
    let mut bytes = Vec::new();
    let read = reader.take(limits.record as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| broken(bytes.len(), error.to_string()))?;
    if bytes.len() > limits.record {
        return Err(broken(0, format!("longer than {} bytes", limits.record)));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        broken(at, "not UTF-8 text".into())
    })?;
    let text = text.strip_prefix('\u{feff}').map(String::from).unwrap_or(text);
    Ok(Document { text, origin: path.display().to_string(), meta: BTreeMap::new() })
}

/// The item of a stream that stands for a record that cannot be read.
fn broken_record(path: &Path, offset: u64, reason: String) -> Option<Record> {
    Some(Err(Broken { path: path.into(), offset: Some(offset), reason }))
}

/// The message for a record above the limit.
fn too_long(limit: usize) -> String {
    format!("the record is longer than {limit} bytes")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The documents and the broken records of bytes in a format.
    pub fn read_bytes(format: Format, name: &str, bytes: &[u8]) -> (Vec<Document>, Vec<Broken>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mut documents = Vec::new();
        let mut broken = Vec::new();
        for record in format.read(&path, Limits { record: 1 << 16, ratio: 250 }).unwrap() {
            match record {
                Ok(document) => documents.push(document),
                Err(error) => broken.push(error),
            }
        }
        (documents, broken)
    }

    proptest::proptest! {
        /// Nor do damaged files of its format.
        #[test]
        fn damaged_files_are_read_to_their_end(
            format in 0usize..6,
            changes in proptest::collection::vec((proptest::num::usize::ANY, proptest::num::u8::ANY), 1..8),
            compress: bool,
        ) {
            use std::io::Write;
            let table = parquet::tests::sample();
            let (format, sample): (_, &[u8]) = [
                (Format::Parquet, table.as_slice()),
                (Format::Jsonl, b"{\"text\": \"one\", \"meta\": {\"a\": \"b\"}}\n{\"content\": \"two\"}\n".as_slice()),
                (Format::Warc, b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 4\r\n\r\ntext\r\n\r\nWARC/1.0\r\nWARC-Type: response\r\nContent-Length: 54\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>a</p>\r\n\r\n"),
                (Format::MediaWiki, b"<page>\n<title>A &amp; B</title>\n<ns>0</ns>\n<revision><text xml:space=\"preserve\">[[a|b]] {{c}}</text></revision>\n</page>\n"),
                (Format::StackExchange, b"<row Id=\"1\" PostTypeId=\"1\" Score=\"3\" Title=\"t\" Body=\"&lt;p&gt;\" />\n<row Id=\"2\" PostTypeId=\"2\" ParentId=\"1\" Body=\"b\" />\n"),
                (Format::Latex, b"\\documentclass{a}\\newcommand{\\b}[1]{#1}\\begin{document}\\section{c}\\b{d} \\input{e}\\end{document}"),
            ][format];
            let mut bytes = sample.to_vec();
            if compress {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&bytes).unwrap();
                bytes = encoder.finish().unwrap();
            }
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            read_bytes(format, "input", &bytes);
        }

        /// No bytes make a reader panic or go on for ever.
        #[test]
        fn any_bytes_are_read_to_their_end(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            start in 0usize..8,
        ) {
            let starts: [&[u8]; 8] = [
                b"", b"WARC/1.0\r\nContent-Length: 5\r\n", b"<page><title>a</title><text>", b"  <row Id=\"1\" ",
                b"{\"text\": \"", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], b"BZh91AY&SY", &[0x28, 0xb5, 0x2f, 0xfd],
            ];
            let all = [starts[start], &bytes].concat();
            for format in [Format::Text, Format::Jsonl, Format::Parquet, Format::Warc, Format::MediaWiki, Format::StackExchange, Format::Latex, Format::Code] {
                read_bytes(format, "input.tar", &all);
            }
        }
    }
}
