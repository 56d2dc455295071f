//! A StackExchange site's `Posts.xml`: each question with its answers.
//!
//! An answer stands anywhere after its question, and the largest site's file has 100 GB: rows are first spread over temporary files
//! by question, each small enough to be held, and joined there.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, BufWriter, Seek, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Record, broken_record, too_long, xml};
use crate::input::{Line, Lines};
use crate::source::Document;

/// Bytes of rows that are joined at a time.
const PART_BYTES: u64 = 128 << 20;
/// Open files at most.
const MAX_PARTS: u64 = 512;

/// A question or an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Post {
    /// Its id.
    id: u64,
    /// Of an answer, its question.
    parent: Option<u64>,
    /// Votes for less those against.
    score: i64,
    /// Of a question.
    title: Option<String>,
    /// HTML.
    body: String,
}

/// A question with its answers.
type Question = (Post, Vec<Post>);

pub(super) struct Questions {
    path: PathBuf,
    /// Rows to read; `None` when they are spread.
    rows: Option<Lines<Box<dyn BufRead>>>,
    buffer: Vec<u8>,
    parts: Parts,
    /// Questions of the part in memory, last first.
    ready: Vec<Question>,
}

impl Questions {
    pub(super) fn new(path: PathBuf, rows: Lines<Box<dyn BufRead>>) -> Self {
        // Compressed, a file holds about six times its size.
        let size = std::fs::metadata(&path).map_or(0, |meta| meta.len());
        let plain = path.extension().is_some_and(|extension| extension == "xml");
        let parts = (size * if plain { 1 } else { 8 }).div_ceil(PART_BYTES).clamp(1, MAX_PARTS);
        Self { path, rows: Some(rows), buffer: Vec::new(), parts: Parts::new(parts), ready: Vec::new() }
    }

    /// Puts the next row into its part; `None` when there is none.
    fn spread(&mut self) -> Option<Result<(), (u64, String)>> {
        let rows = self.rows.as_mut()?;
        let offset = match rows.next(&mut self.buffer)? {
            Line::Read(offset) => offset,
            Line::TooLong(offset) => return Some(Err((offset, too_long(rows.limit())))),
            Line::Failed(offset, error) => return Some(Err((offset, error.to_string()))),
        };
        let line = self.buffer.trim_ascii();
        if !line.starts_with(b"<row ") {
            return Some(Ok(()));
        }
        let post = xml::empty_element(line).and_then(parse_post).and_then(|post| match post {
            Some(post) => self.parts.push(&post).map_err(|error| format!("temporary file: {error}")),
            None => Ok(()),
        });
        Some(post.map_err(|reason| (offset, reason)))
    }
}

impl Iterator for Questions {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        while self.rows.is_some() {
            match self.spread() {
                Some(Ok(())) => {}
                Some(Err((offset, reason))) => return broken_record(&self.path, offset, reason),
                None => self.rows = None,
            }
        }
        loop {
            if let Some((question, answers)) = self.ready.pop() {
                return Some(Ok(document(&self.path, question, answers)));
            }
            match self.parts.next()? {
                Ok(mut questions) => {
                    questions.reverse();
                    self.ready = questions;
                }
                Err(error) => return broken_record(&self.path, 0, format!("temporary file: {error}")),
            }
        }
    }
}

/// A post of a row; `None` for other kinds (tag wikis, nominations).
fn parse_post(mut row: BTreeMap<String, String>) -> Result<Option<Post>, String> {
    let number = |row: &BTreeMap<String, String>, key: &str| match row.get(key) {
        Some(value) => value.parse::<i64>().map(Some).map_err(|_| format!("{key} `{value}` is not a number")),
        None => Ok(None),
    };
    let required = |key: &str| number(&row, key)?.ok_or_else(|| format!("the row has no {key}"));
    let kind = required("PostTypeId")?;
    if kind != 1 && kind != 2 {
        return Ok(None);
    }
    let id = required("Id")? as u64;
    let parent = number(&row, "ParentId")?.map(|parent| parent as u64);
    if kind == 2 && parent.is_none() {
        return Err(format!("answer {id} has no ParentId"));
    }
    let score = number(&row, "Score")?.unwrap_or(0);
    let body = row.remove("Body").ok_or_else(|| format!("post {id} has no Body"))?;
    let parent = parent.filter(|_| kind == 2);
    Ok(Some(Post { id, parent, score, title: row.remove("Title"), body }))
}

/// A question and its answers as HTML, the best answer first. Scores are compared as numbers.
fn document(path: &std::path::Path, question: Post, mut answers: Vec<Post>) -> Document {
    answers.sort_by_key(|answer| (std::cmp::Reverse(answer.score), answer.id));
    let mut meta = BTreeMap::new();
    meta.insert("question_id".to_string(), question.id.to_string());
    meta.insert("score".to_string(), question.score.to_string());
    meta.insert("answers".to_string(), answers.len().to_string());
    let title = quick_xml::escape::escape(question.title.as_deref().unwrap_or("")).into_owned();
    let mut text = format!("<p>Q: {title}</p>\n{}", question.body);
    for answer in &answers {
        text.push_str("\n<p>A: </p>\n");
        text.push_str(&answer.body);
    }
    Document { text, origin: format!("{}#{}", path.display(), question.id), meta }
}

/// Posts by question, in temporary files.
struct Parts {
    files: Vec<Option<BufWriter<std::fs::File>>>,
    next: usize,
}

impl Parts {
    fn new(parts: u64) -> Self {
        Self { files: (0..parts).map(|_| None).collect(), next: 0 }
    }

    fn push(&mut self, post: &Post) -> std::io::Result<()> {
        let part = (post.parent.unwrap_or(post.id) % self.files.len() as u64) as usize;
        let file = match &mut self.files[part] {
            Some(file) => file,
            empty => empty.insert(BufWriter::new(tempfile::tempfile()?)),
        };
        serde_json::to_writer(&mut *file, post)?;
        file.write_all(b"\n")
    }

    /// The questions of the next part, by id.
    fn next(&mut self) -> Option<std::io::Result<Vec<Question>>> {
        while self.next < self.files.len() {
            self.next += 1;
            if let Some(file) = self.files[self.next - 1].take() {
                return Some(Self::join(file));
            }
        }
        None
    }

    fn join(file: BufWriter<std::fs::File>) -> std::io::Result<Vec<Question>> {
        let mut file = file.into_inner().map_err(|error| error.into_error())?;
        file.rewind()?;
        let mut questions: BTreeMap<u64, Question> = BTreeMap::new();
        let mut answers = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            let post: Post = serde_json::from_slice(&line?)?;
            match post.parent {
                Some(parent) => answers.push((parent, post)),
                None => drop(questions.insert(post.id, (post, Vec::new()))),
            }
        }
        // An answer whose question was deleted stands alone in the dump and is of no use.
        for (parent, answer) in answers {
            if let Some((_, all)) = questions.get_mut(&parent) {
                all.push(answer);
            }
        }
        Ok(questions.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::super::tests::read_bytes;

    #[test]
    fn answers_follow_their_question_best_first() {
        let file = "\u{feff}<?xml version=\"1.0\"?>\n<posts>\n\
            <row Id=\"1\" PostTypeId=\"1\" Score=\"3\" Title=\"Why &lt;x&gt;?\" Body=\"&lt;p&gt;q&lt;/p&gt;\" />\n\
            <row Id=\"2\" PostTypeId=\"2\" ParentId=\"1\" Score=\"9\" Body=\"nine\" />\n\
            <row Id=\"3\" PostTypeId=\"2\" ParentId=\"1\" Score=\"10\" Body=\"ten\" />\n\
            <row Id=\"4\" PostTypeId=\"2\" ParentId=\"1\" Score=\"-1\" Body=\"minus\" />\n\
            <row Id=\"5\" PostTypeId=\"5\" Body=\"tag wiki\" />\n\
            <row Id=\"x\" PostTypeId=\"1\" Body=\"broken\" />\n\
            <row Id=\"6\" PostTypeId=\"2\" Body=\"no parent\" />\n</posts>\n";
        let (documents, broken) = read_bytes(Format::StackExchange, "Posts.xml", file.as_bytes());
        assert_eq!(documents.len(), 1);
        let text = &documents[0].text;
        assert!(text.starts_with("<p>Q: Why &lt;x&gt;?</p>\n<p>q</p>"), "{text}");
        let at = |word: &str| text.find(word).unwrap();
        assert!(at("ten") < at("nine") && at("nine") < at("minus"), "{text}");
        assert_eq!(broken.len(), 2, "{broken:?}");
    }
}
