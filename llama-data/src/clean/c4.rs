//! C4's heuristics (Raffel et al., [arXiv 1910.10683](https://arxiv.org/abs/1910.10683), section 2.2): the paper takes C4 as it was
//! published, "presence of punctuation marks or the number of words and sentences in a webpage".

use super::{Clean, Tally};
use crate::source::Document;

/// The rules with their published thresholds.
#[derive(Clone, Debug, PartialEq)]
pub struct C4 {
    /// A line needs as many words; 5 in C4's text ("only retained lines that contained at least 5 words").
    pub min_words: usize,
    /// A page needs as many sentences; 3 in C4's text ("fewer than 3 sentences"), 5 in its program.
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
const TERMINAL: [char; 6] = ['.', '!', '?', '"', '\u{201d}', '\u{2019}'];
/// Phrases of notices that are lines of pages ("terms-of-service notices").
const POLICY: [&str; 6] =
    ["terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"];

impl Clean for C4 {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        // "Some pages inadvertently contained code": the curly bracket; and placeholder text.
        if document.text.contains('{') {
            return tally.drop("c4: curly bracket", bytes);
        }
        let lower = document.text.to_lowercase();
        if lower.contains("lorem ipsum") {
            return tally.drop("c4: lorem ipsum", bytes);
        }
        if !self.bad_words.is_empty() {
            let mut words = lower.split(|c: char| !c.is_alphanumeric());
            if words.any(|word| self.bad_words.iter().any(|bad| bad == word)) {
                return tally.drop("c4: bad word", bytes);
            }
        }
        let mut out = String::with_capacity(bytes);
        let mut sentences = 0;
        for line in document.text.lines() {
            let line = without_citations(line.trim());
            let Some(reason) = self.reject(&line) else {
                if !out.is_empty() {
                    out.push('\n');
                }
                out.push_str(&line);
                sentences += count_sentences(&line);
                continue;
            };
            if !line.is_empty() {
                tally.trim(reason, line.len());
            }
        }
        if sentences < self.min_sentences {
            return tally.drop("c4: few sentences", bytes);
        }
        document.text = out;
        Some(document)
    }
}

impl C4 {
    /// Why a line is removed, if it is.
    fn reject(&self, line: &str) -> Option<&'static str> {
        if line.ends_with("...") || !line.ends_with(TERMINAL) {
            return Some("c4: no terminal punctuation");
        }
        let (mut words, mut longest) = (0, 0);
        for word in line.split_whitespace() {
            words += 1;
            longest = longest.max(word.len());
        }
        if words < self.min_words {
            return Some("c4: few words");
        }
        if longest > self.max_word && line.split_whitespace().any(|word| word.chars().count() > self.max_word) {
            return Some("c4: long word");
        }
        if contains_ignoring_case(line, "javascript") {
            return Some("c4: javascript");
        }
        POLICY.iter().any(|phrase| contains_ignoring_case(line, phrase)).then_some("c4: policy notice")
    }
}

/// Whether a text contains an ASCII phrase in whatever case.
fn contains_ignoring_case(text: &str, phrase: &str) -> bool {
    let (text, phrase) = (text.as_bytes(), phrase.as_bytes());
    let (lower, upper) = (phrase[0], phrase[0].to_ascii_uppercase());
    let mut from = 0;
    while let Some(at) = text[from..].iter().position(|&byte| byte == lower || byte == upper) {
        let start = from + at;
        if text.len() - start < phrase.len() {
            return false;
        }
        if text[start..start + phrase.len()].eq_ignore_ascii_case(phrase) {
            return true;
        }
        from = start + 1;
    }
    false
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
