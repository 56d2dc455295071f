//! GitHub: "projects distributed under the Apache, BSD and MIT licenses"; "low quality files" by "line length or proportion of
//! alphanumeric characters"; "boilerplate, such as headers" removed (paper, section 2.1). Thresholds are RedPajama's, where the paper gives none.

use super::{Clean, Tally};
use crate::source::Document;

/// Licences of the paper, as the beginnings of SPDX identifiers.
pub const PERMISSIVE: [&str; 4] = ["Apache-2.0", "BSD-", "MIT", "0BSD"];

/// Endings of files that are program text or its documentation.
#[rustfmt::skip]
pub const EXTENSIONS: [&str; 61] = [
    "asm", "bash", "bat", "c", "cc", "clj", "cmake", "cpp", "cs", "css", "cu", "cuh", "cxx", "dart", "dockerfile",
    "el", "erl", "ex", "exs", "f", "f90", "go", "h", "hh", "hpp", "hs", "html", "hxx", "java", "jl", "js", "jsx",
    "kt", "lisp", "lua", "m", "makefile", "md", "ml", "mli", "php", "pl", "pm", "ps1", "py", "r", "rb", "rs", "rst",
    "scala", "scm", "sh", "sql", "swift", "tex", "toml", "ts", "tsx", "vb", "vim", "zig",
];

/// The rules.
#[derive(Clone, Debug, PartialEq)]
pub struct GitHub {
    /// Files whose `license` is none of these are dropped; with an empty list, none is.
    pub licenses: Vec<String>,
    /// Longest line in characters.
    pub max_line: usize,
    /// Largest mean length of lines.
    pub mean_line: f64,
    /// Smallest share of alphanumeric characters.
    pub alphanumeric: f64,
    /// Smallest mean number of letters for each run of characters between spaces.
    pub letters_per_token: f64,
    /// Whether only files with the ending of a programming language are kept.
    pub known_extensions: bool,
}

impl Default for GitHub {
    fn default() -> Self {
        Self {
            licenses: PERMISSIVE.map(String::from).into(),
            max_line: 1000,
            mean_line: 100.0,
            alphanumeric: 0.25,
            letters_per_token: 1.5,
            known_extensions: true,
        }
    }
}

impl Clean for GitHub {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        if !self.licenses.is_empty() && !self.permits(document.meta.get("license").map(String::as_str)) {
            return tally.drop("github: licence", bytes);
        }
        let path = document.meta.get("path").unwrap_or(&document.origin);
        if self.known_extensions && !EXTENSIONS.contains(&ending(path).as_str()) {
            return tally.drop("github: file type", bytes);
        }
        let (mut lines, mut longest, mut characters, mut alphanumeric, mut letters) = (0u64, 0, 0u64, 0u64, 0u64);
        for line in document.text.lines() {
            let mut length = 0;
            for c in line.chars() {
                length += 1;
                alphanumeric += u64::from(c.is_alphanumeric());
                letters += u64::from(c.is_alphabetic());
            }
            lines += 1;
            longest = longest.max(length);
            characters += length as u64;
        }
        if characters == 0 {
            return tally.drop("github: empty", bytes);
        }
        if longest > self.max_line {
            return tally.drop("github: long line", bytes);
        }
        if characters as f64 > self.mean_line * lines as f64 {
            return tally.drop("github: long lines", bytes);
        }
        if (alphanumeric as f64) < self.alphanumeric * characters as f64 {
            return tally.drop("github: few alphanumeric characters", bytes);
        }
        let tokens = document.text.split_whitespace().count();
        if (letters as f64) < self.letters_per_token * tokens as f64 {
            return tally.drop("github: few letters", bytes);
        }
        let header = licence_header(&document.text);
        if header > 0 {
            tally.trim("github: licence header", header);
            document.text.drain(..header);
        }
        match document.text.trim().is_empty() {
            true => tally.drop("github: only a header", bytes),
            false => Some(document),
        }
    }
}

impl GitHub {
    /// Whether an SPDX expression allows use under one of the licences: one side of an `OR`, all sides of an `AND`.
    fn permits(&self, expression: Option<&str>) -> bool {
        let Some(expression) = expression else { return false };
        let one = |licence: &str| {
            let licence = licence.trim().trim_matches(['(', ')']).trim().to_lowercase();
            self.licenses.iter().any(|known| licence.starts_with(&known.to_lowercase()))
        };
        let choices = expression.replace('/', " OR ");
        choices
            .split(" OR ")
            .any(|choice| choice.split(" AND ").all(|part| one(part.split(" WITH ").next().unwrap_or(part))))
    }
}

/// The ending of a file, or its whole name where it has none, in lower case.
fn ending(path: &str) -> String {
    let name = path.rsplit(['/', '\\']).next().unwrap_or(path);
    name.rsplit_once('.').map_or(name, |(_, ending)| ending).to_lowercase()
}

/// Bytes of the comment at a file's start that is about its licence, with the empty lines after it; 0 if there is none.
fn licence_header(text: &str) -> usize {
    let about_licence = |comment: &str| {
        let comment = comment.to_lowercase();
        comment.contains("copyright") || comment.contains("licen")
    };
    // A script's first line and encoding line stay in front.
    let start = text.len() - text.trim_start().len();
    if text[start..].starts_with("#!") {
        return 0;
    }
    let rest = &text[start..];
    let block = [("/*", "*/"), ("<!--", "-->"), ("\"\"\"", "\"\"\""), ("(*", "*)"), ("--[[", "]]"), ("{-", "-}")];
    let end = block.iter().find_map(|(open, close)| {
        let inner = rest.strip_prefix(open)?;
        Some(open.len() + inner.find(close)? + close.len())
    });
    let end = end.or_else(|| {
        // Doc comments (`///`, `//!`) are text of their own.
        let marks = ["//", "#", "--", ";;", "%", "\"", "REM "];
        let mark = marks.iter().find(|mark| rest.starts_with(**mark))?;
        let comment = |line: &&str| {
            line.starts_with(mark)
                && !line.starts_with("///")
                && !line.starts_with("//!")
                && !line.starts_with("#[")
                && !line.starts_with("#include")
        };
        let end: usize = rest.split_inclusive('\n').take_while(comment).map(str::len).sum();
        (end > 0).then_some(end)
    });
    match end {
        Some(end) if about_licence(&rest[..end]) => {
            let after = &rest[end..];
            // Indentation of the first line that stays is kept.
            let blank = after.len() - after.trim_start().len();
            let blank = after[..blank].rfind('\n').map_or(0, |line| line + 1);
            start + end + blank
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use super::*;

    fn file(path: &str, license: &str, text: &str) -> Document {
        let mut document = document(text);
        document.meta.insert("path".into(), path.into());
        document.meta.insert("license".into(), license.into());
        document
    }

    fn reason(document: Document) -> String {
        let mut tally = Tally::default();
        assert!(GitHub::default().clean(document, &mut tally).is_none());
        tally.dropped.into_keys().next().unwrap()
    }

    #[test]
    fn files_are_dropped_for_their_reasons() {
        let code = "fn main() {\n    println!(\"hello\");\n}\n";
        assert!(GitHub::default().clean(file("a.rs", "MIT/Apache-2.0", code), &mut Tally::default()).is_some());
        assert_eq!(reason(file("a.rs", "GPL-3.0", code)), "github: licence");
        assert_eq!(reason(file("a.rs", "MIT AND GPL-3.0", code)), "github: licence");
        assert_eq!(reason(document(code)), "github: licence");
        assert_eq!(reason(file("a.lock", "MIT", code)), "github: file type");
        assert_eq!(reason(file("a.rs", "MIT", &"x".repeat(1001))), "github: long line");
        assert_eq!(reason(file("a.rs", "MIT", &format!("{}\n", "x ".repeat(60)).repeat(3))), "github: long lines");
        assert_eq!(reason(file("a.rs", "MIT", "+-*/ ==\n")), "github: few alphanumeric characters");
        assert_eq!(reason(file("a.rs", "MIT", "1 2 3 4 5\n")), "github: few letters");
        assert_eq!(reason(file("a.rs", "MIT", "// Copyright me\n")), "github: only a header");
    }

    #[test]
    fn licence_headers_go_and_other_comments_stay() {
        let cleaned = |text: &str| {
            GitHub::default().clean(file("a.c", "BSD-3-Clause", text), &mut Tally::default()).unwrap().text
        };
        assert_eq!(cleaned("/* Copyright 2020\n * License */\n\n  int main;\n"), "  int main;\n");
        assert_eq!(cleaned("// Copyright A\n// License B\n\n/// Doc\nint main;\n"), "/// Doc\nint main;\n");
        assert_eq!(cleaned("// What it does\nint main;\n"), "// What it does\nint main;\n");
        assert_eq!(cleaned("#include <license.h>\nint main;\n"), "#include <license.h>\nint main;\n");
    }
}
