//! Wikipedia's markup to text: "we process the data to remove hyperlinks, comments and other formatting boilerplate" (paper,
//! section 2.1).
//!
//! Links become their text; templates, tables, references, files and categories go, save for a few templates that stand for words
//! (`{{lang|fr|mot}}`, `{{convert|5|km}}`); formulas stay as `$..$`. Sections of references and links at an article's end go, and
//! headings with nothing left under them.

mod markup;
mod names;

use super::{Clean, Tally, html, tidy};
use crate::source::Document;
use markup::Markup;
use names::{DROPPED, TAIL_SECTIONS};

/// Turns wikitext into text and drops what has next to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wikipedia {
    /// Characters an article has at least.
    pub min_chars: usize,
}

impl Default for Wikipedia {
    fn default() -> Self {
        Self { min_chars: 100 }
    }
}

impl Clean for Wikipedia {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        document.text = to_text(&document.text);
        if document.text.chars().take(self.min_chars).count() < self.min_chars {
            return tally.drop("wikipedia: short", bytes);
        }
        if let Some(title) = document.meta.get("title") {
            document.text = format!("{title}\n\n{}", document.text);
        }
        tally.trim("wikipedia: markup", bytes.saturating_sub(document.text.len()));
        Some(document)
    }
}

/// The text of an article.
///
/// ```
/// use llama_data::clean::wikitext::to_text;
///
/// let wiki = "'''Rust''' is a [[Programming language|language]]{{Citation needed}}.<ref>x</ref>\n\n== See also ==\n* [[C]]";
/// assert_eq!(to_text(wiki), "Rust is a language.");
/// ```
pub fn to_text(wikitext: &str) -> String {
    let text = remove_elements(&remove_comments(wikitext));
    let text = Markup::new(&text).render();
    let text = html::unescape(&text).replace('\u{a0}', " ");
    tidy(&sections(&tidy_lines(&text)))
}

fn remove_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("<!--") {
        out.push_str(&rest[..start]);
        match rest[start..].find("-->") {
            Some(end) => rest = &rest[start + end + 3..],
            None => return out,
        }
    }
    out.push_str(rest);
    out
}

/// Removes references and the like with their content, keeps `<nowiki>` as characters, and turns `<math>` into `$..$`.
fn remove_elements(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let name_end = rest[1..].find(|c: char| !c.is_ascii_alphanumeric()).map_or(rest.len(), |end| end + 1);
        let name = rest[1..name_end].to_ascii_lowercase();
        let known = DROPPED.contains(&name.as_str()) || name == "math" || name == "nowiki";
        let Some(tag_end) = rest.find('>').filter(|_| known) else {
            out.push('<');
            rest = &rest[1..];
            continue;
        };
        if rest[..tag_end].ends_with('/') {
            rest = &rest[tag_end + 1..];
            continue;
        }
        let close = format!("</{name}");
        let end = rest[tag_end..].to_ascii_lowercase_find(&close).map(|end| tag_end + end);
        let content = &rest[tag_end + 1..end.unwrap_or(tag_end + 1)];
        match name.as_str() {
            "math" => {
                out.push('$');
                out.extend(content.trim().chars().map(|c| if c == '\n' { ' ' } else { c }).map(protect));
                out.push('$');
            }
            "nowiki" => out.extend(content.chars().map(protect)),
            _ => {}
        }
        // Without an end only the tag goes.
        rest = match end {
            Some(end) => rest[end..].find('>').map_or("", |close| &rest[end + close + 1..]),
            None => &rest[tag_end + 1..],
        };
    }
    out.push_str(rest);
    out
}

trait FindLowercase {
    fn to_ascii_lowercase_find(&self, pattern: &str) -> Option<usize>;
}

impl FindLowercase for str {
    /// Where an ASCII pattern in lower case begins, whatever the text's case.
    fn to_ascii_lowercase_find(&self, pattern: &str) -> Option<usize> {
        self.match_indices('<').map(|(at, _)| at).find(|&at| {
            self.as_bytes()
                .get(at..at + pattern.len())
                .is_some_and(|part| part.eq_ignore_ascii_case(pattern.as_bytes()))
        })
    }
}

/// Characters that mean markup, as private ones until all markup is gone.
const PROTECTED: [(char, char); 8] = [
    ('{', '\u{e000}'),
    ('}', '\u{e001}'),
    ('[', '\u{e002}'),
    (']', '\u{e003}'),
    ('|', '\u{e004}'),
    ('\'', '\u{e005}'),
    ('<', '\u{e006}'),
    ('=', '\u{e007}'),
];

fn protect(c: char) -> char {
    PROTECTED.iter().find(|(plain, _)| *plain == c).map_or(c, |(_, private)| *private)
}

fn unprotect(c: char) -> char {
    PROTECTED.iter().find(|(_, private)| *private == c).map_or(c, |(plain, _)| *plain)
}

/// Marks at the start of lines, switches, and what removed parts leave behind.
fn tidy_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let mut line = line.trim().to_string();
        while let Some((start, end)) = switch(&line) {
            line.replace_range(start..end, "");
        }
        if line.starts_with("----") || line.starts_with("{|") || line.starts_with("|") || line.starts_with('!') {
            continue;
        }
        let item = line.trim_start_matches(['*', '#', ':', ';']).trim_start();
        let mark = match line.as_bytes().first() {
            Some(b'*' | b'#') if !item.is_empty() => "- ",
            _ => "",
        };
        let mut item = item.to_string();
        for mark in ["{{{", "}}}", "{{", "}}", "[[", "]]", "{|", "|}"] {
            if item.contains(mark) {
                item = item.replace(mark, "");
            }
        }
        out.push_str(mark);
        out.push_str(&punctuation(&item));
        out.push('\n');
    }
    out.chars().map(unprotect).collect()
}

/// A `__SWITCH__` in a line.
fn switch(line: &str) -> Option<(usize, usize)> {
    let start = line.find("__")?;
    let word = &line[start + 2..];
    let length = word.find(|c: char| !c.is_ascii_uppercase()).unwrap_or(word.len());
    (length >= 3 && word[length..].starts_with("__")).then_some((start, start + length + 4))
}

/// Without the empty brackets, double spaces and spaces before marks that removed parts leave.
fn punctuation(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    for c in line.chars() {
        match c {
            ' ' if out.ends_with([' ', '(']) => {}
            ',' | ';' if out.trim_end().ends_with('(') => {
                out.truncate(out.trim_end().len());
            }
            ')' => {
                let kept = out.trim_end_matches([' ', ',', ';']).len();
                out.truncate(kept);
                match out.ends_with('(') {
                    true => {
                        out.pop();
                        out.truncate(out.trim_end().len());
                    }
                    false => out.push(')'),
                }
            }
            ',' | '.' if out.ends_with(' ') => {
                out.truncate(out.trim_end().len());
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

/// Headings as lines of their own, without those that have nothing under them and the sections at the end.
fn sections(text: &str) -> String {
    struct Section<'a> {
        level: usize,
        title: &'a str,
        body: String,
    }
    let mut all = vec![Section { level: 0, title: "", body: String::new() }];
    for line in text.lines() {
        let level = line.bytes().take_while(|&b| b == b'=').count();
        let closed = line.len() > 2 * level && line.ends_with(&"=".repeat(level));
        if (1..=6).contains(&level) && closed {
            all.push(Section { level, title: line[level..line.len() - level].trim(), body: String::new() });
        } else if let Some(section) = all.last_mut() {
            section.body.push_str(line);
            section.body.push('\n');
        }
    }
    let mut out = String::with_capacity(text.len());
    let mut dropped_level = None;
    for (index, section) in all.iter().enumerate() {
        if dropped_level.is_some_and(|level| section.level <= level) {
            dropped_level = None;
        }
        if section.level > 0 && TAIL_SECTIONS.contains(&section.title.to_lowercase().as_str()) {
            dropped_level.get_or_insert(section.level);
        }
        if dropped_level.is_some() {
            continue;
        }
        let filled = |section: &Section| {
            !section.body.trim().is_empty() && !TAIL_SECTIONS.contains(&section.title.to_lowercase().as_str())
        };
        let inner = all[index + 1..].iter().take_while(|inner| inner.level > section.level);
        if section.level > 0 && (filled(section) || inner.into_iter().any(filled)) {
            out.push_str(&format!("\n{}\n\n", section.title));
        }
        out.push_str(&section.body);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_becomes_text() {
        let wiki = "{{Infobox|a={{b|c}}|d=[[e]]}}\n[[File:x.jpg|thumb|A [[caption]] here]]\n\
            '''Anarchism''' ({{lang-el|αναρχία}}; \"{{lang|fr|sans}}\") is<!-- hidden --> a [[political philosophy]]<ref name=\"a\">{{cite|x}}</ref><ref name=b />.\n\
            It is {{convert|5|km}} long &ndash; [http://x.org see ''here''] [http://y.org].\n\
            {| class=\"x\"\n|-\n| cell || [[link]]\n|}\n\
            == Empty ==\n{{x}}\n== Formula ==\nThe area is <math>\\frac{a}{b}</math>.\n* one\n** two\n__NOTOC__\n\
            === See also ===\n* [[gone]]\n== References ==\n{{reflist}}\n=== Sub ===\ngone\n[[fr:Anarchisme]]\n[[Category:Politics]]";
        let text = "Anarchism (\"sans\") is a political philosophy.\nIt is 5 km long – see here.\n\nFormula\n\nThe area is $\\frac{a}{b}$.\n- one\n- two";
        assert_eq!(to_text(wiki), text);
    }

    #[test]
    fn unbalanced_brackets_are_marks_that_go() {
        assert_eq!(to_text("a [[b c\nd {{e\nf ]] g }}"), "a b c\nd e\nf  g".replace("f  g", "f g"));
        assert_eq!(to_text("x <ref>never closed"), "x never closed");
        assert_eq!(to_text("<nowiki>[[a]]</nowiki> 'tis"), "[[a]] 'tis");
    }

    #[test]
    fn deep_and_hostile_nesting_ends() {
        let deep = "[[a|".repeat(20_000) + &"]]".repeat(20_000);
        assert!(to_text(&deep).len() < deep.len());
        to_text(&"{{".repeat(100_000));
        to_text(&"<ref>".repeat(20_000));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[\\[\\]{}|'=<>a \n:é!-]{0,60}") {
            to_text(&text);
        }
    }
}
