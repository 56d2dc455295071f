//! C4's heuristics (Raffel et al., [arXiv 1910.10683](https://arxiv.org/abs/1910.10683), section 2.2): the paper takes C4 as it was
//! published, "presence of punctuation marks or the number of words and sentences in a webpage".

use std::sync::LazyLock;

use aho_corasick::AhoCorasick;

use super::{Clean, Tally};
use crate::source::Document;

/// The rules with their published thresholds.
#[derive(Clone, Debug, PartialEq)]
pub struct C4 {
    /// A line needs as many words; 5 in C4's text ("only retained lines that contained at least 5 words").
    pub min_words: usize,
    /// A page needs as many sentences; 3 in C4's text ("fewer than 3 sentences"). 0 does not count them.
    pub min_sentences: usize,
    /// A line with a longer word is removed; 1,000 in its program.
    pub max_word: usize,
    /// Pages with any of these words, in lower case, are dropped. C4 takes a public list; none here by default.
    pub bad_words: Vec<String>,
}

impl Default for C4 {
    fn default() -> Self {
        Self { min_words: 5, min_sentences: 3, max_word: 1000, bad_words: Vec::new() }
    }
}

/// Lines that end otherwise are removed: "we only retained lines that ended in a terminal punctuation mark".
const TERMINAL: [char; 5] = ['.', '!', '?', '"', '\u{201d}'];
/// Phrases, in whatever case: the first drops its page, a line with one of the others is removed ("any line with the word Javascript",
/// "terms-of-service notices").
const PHRASES: [&str; 8] = [
    "lorem ipsum",
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
];

static FIND_PHRASES: LazyLock<AhoCorasick> = LazyLock::new(|| {
    let search = AhoCorasick::builder().ascii_case_insensitive(true).build(PHRASES);
    search.expect("eight short phrases make a small automaton")
});

impl Clean for C4 {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let text = &document.text;
        let bytes = text.len();
        // "Some pages inadvertently contained code": the curly bracket; and placeholder text.
        if text.contains('{') {
            return tally.drop("c4: curly bracket", bytes);
        }
        let found: Vec<(usize, usize)> =
            FIND_PHRASES.find_iter(text).map(|found| (found.start(), found.pattern().as_usize())).collect();
        if found.iter().any(|(_, phrase)| *phrase == 0) {
            return tally.drop("c4: lorem ipsum", bytes);
        }
        if !self.bad_words.is_empty() {
            let lower = text.to_lowercase();
            let mut words = lower.split(|c: char| !c.is_alphanumeric());
            if words.any(|word| self.bad_words.iter().any(|bad| bad == word)) {
                return tally.drop("c4: bad word", bytes);
            }
        }
        let mut found = found.into_iter().peekable();
        let mut out = String::with_capacity(bytes);
        let mut sentences = 0;
        let mut end = 0;
        for whole in text.split_inclusive('\n') {
            end += whole.len();
            let mut phrase = None;
            while let Some((_, inside)) = found.next_if(|(at, _)| *at < end) {
                phrase.get_or_insert(inside);
            }
            let line = without_citations(whole.trim());
            match self.reject(&line, phrase) {
                Some(_) if line.is_empty() => {}
                Some(reason) => tally.trim(reason, line.len()),
                None => {
                    if !out.is_empty() {
                        out.push('\n');
                    }
                    out.push_str(&line);
                    if self.min_sentences > 0 {
                        sentences += count_sentences(&line);
                    }
                }
            }
        }
        if out.is_empty() || sentences < self.min_sentences {
            return tally.drop("c4: few sentences", bytes);
        }
        document.text = out;
        Some(document)
    }
}

impl C4 {
    /// Why a line, in which a phrase was found or none, is removed, if it is.
    fn reject(&self, line: &str, phrase: Option<usize>) -> Option<&'static str> {
        if line.ends_with("...") || !line.ends_with(TERMINAL) {
            return Some("c4: no terminal punctuation");
        }
        let (words, longest) = measure_words(line);
        if words < self.min_words {
            return Some("c4: few words");
        }
        if longest > self.max_word {
            return Some("c4: long word");
        }
        phrase.map(|phrase| if phrase == 1 { "c4: javascript" } else { "c4: policy notice" })
    }
}

/// Words of a line, and the characters of the longest.
fn measure_words(line: &str) -> (usize, usize) {
    if !line.is_ascii() {
        return line.split_whitespace().fold((0, 0), |(n, longest), word| (n + 1, longest.max(word.chars().count())));
    }
    let (mut words, mut longest, mut length) = (0, 0, 0);
    for byte in line.bytes() {
        let space = byte == b' ' || (b'\t'..=b'\r').contains(&byte);
        words += usize::from(!space && length == 0);
        length = if space { 0 } else { length + 1 };
        longest = longest.max(length);
    }
    (words, longest)
}

/// A line without Wikipedia's citation marks: `[12]`, `[edit]`, `[citation needed]`.
fn without_citations(line: &str) -> std::borrow::Cow<'_, str> {
    if !line.contains('[') {
        return line.into();
    }
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find('[') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let mark = rest.find(']').map(|end| &rest[1..end]);
        match mark {
            Some(mark) if mark.bytes().all(|b| b.is_ascii_digit()) || mark == "edit" || mark == "citation needed" => {
                rest = &rest[mark.len() + 2..];
            }
            _ => {
                out.push('[');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out.into()
}

/// Ends of sentences: terminal marks before a space or the end of the line. A run of them counts once.
fn count_sentences(line: &str) -> usize {
    let mut count = 0;
    let mut ended = false;
    for c in line.chars() {
        match c {
            '.' | '!' | '?' => ended = true,
            '"' | '\'' | ')' | '\u{201d}' | '\u{2019}' => {}
            c if c.is_whitespace() => count += usize::from(std::mem::take(&mut ended)),
            _ => ended = false,
        }
    }
    count + usize::from(ended)
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use super::*;

    #[test]
    fn lines_and_pages_by_the_published_rules() {
        let page = "Home | About\nThis is the first sentence. And here comes a second one!\nToo short.\n\
            Please enable JavaScript to see all of this page.\nThis site Uses Cookies to know who you are.\n\
            An ellipsis ends this line of words ...\nThe third[12] one says \"this is quoted.\"";
        let mut tally = Tally::default();
        let kept = C4::default().clean(document(page), &mut tally).unwrap();
        assert_eq!(
            kept.text,
            "This is the first sentence. And here comes a second one!\nThe third one says \"this is quoted.\""
        );
        assert_eq!(tally.trimmed.len(), 4, "{tally:?}");
        let dropped = |text: &str| {
            let mut tally = Tally::default();
            assert!(
                C4 { bad_words: vec!["bad".into()], ..Default::default() }.clean(document(text), &mut tally).is_none()
            );
            tally.dropped.into_keys().next().unwrap()
        };
        assert_eq!(dropped("fn main() { }"), "c4: curly bracket");
        assert_eq!(dropped("Lorem Ipsum dolor."), "c4: lorem ipsum");
        assert_eq!(dropped("A Bad page of several words."), "c4: bad word");
        assert_eq!(dropped("Only one sentence is on this page."), "c4: few sentences");
    }

    #[test]
    fn sentences() {
        assert_eq!(count_sentences("One. Two! Three?! \"Four.\" v1.2 is no end"), 4);
    }
}
