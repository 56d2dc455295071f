//! How byte-level vocabularies cut text into words.

use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class, HirKind};

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// LLaMA 3's words.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// A regular expression that matches words one after the other.
    pub pattern: String,
    /// Every digit is cut off before.
    pub single_digits: bool,
}

impl Words {
    /// GPT-2's.
    pub fn gpt2() -> Self {
        Self { pattern: GPT2.into(), single_digits: false }
    }

    /// SmolLM's: GPT-2's, and every digit alone.
    pub fn smollm() -> Self {
        Self { single_digits: true, ..Self::gpt2() }
    }

    /// LLaMA 3's: up to three digits together.
    pub fn llama3() -> Self {
        Self { pattern: LLAMA3.into(), single_digits: false }
    }

    /// By llama.cpp's name.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" | "gpt2" => Self::gpt2(),
            "smollm" => Self::smollm(),
            "llama-bpe" | "llama3" | "llama-v3" => Self::llama3(),
            _ => return None,
        })
    }

    /// llama.cpp's name, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        let names = ["gpt-2", "smollm", "llama-bpe"];
        names.into_iter().find(|name| Self::by_name(name).as_ref() == Some(self))
    }
}

/// Cuts text into words.
#[derive(Clone, Debug)]
pub(super) enum Cutter {
    /// A known pattern, by hand: the length of a text's first word.
    Known(fn(&str) -> usize),
    Pattern(Regex),
}

impl Cutter {
    pub(super) fn new(pattern: &str) -> Result<Self, String> {
        Ok(match pattern {
            GPT2 => Self::Known(gpt2),
            LLAMA3 => Self::Known(llama3),
            other => Self::Pattern(Regex::new(other).map_err(|error| format!("the pattern of words: {error}"))?),
        })
    }

    /// Calls with each word.
    pub(super) fn words<'a>(&self, mut text: &'a str, mut each: impl FnMut(&'a str)) {
        match self {
            Self::Known(first) => {
                while !text.is_empty() {
                    let (word, rest) = text.split_at(first(text));
                    each(word);
                    text = rest;
                }
            }
            Self::Pattern(pattern) => {
                let mut end = 0;
                // What lies between matches is a word, too; should the pattern give up, so is the rest.
                let ends = pattern.find_iter(text).map_while(Result::ok).map(|found| found.end());
                for next in ends.chain([text.len()]) {
                    if next > end {
                        each(&text[end..next]);
                    }
                    end = next;
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

/// What the classes of regular expressions say of each character.
static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let mut kinds = vec![Kind::Other; char::MAX as usize + 1];
    for (class, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
        let class = regex_syntax::parse(class).expect("a class of Unicode");
        if let HirKind::Class(Class::Unicode(class)) = class.kind() {
            class.iter().for_each(|range| kinds[range.start() as usize..=range.end() as usize].fill(kind));
        }
    }
    kinds
});

/// The length of what `text` begins with, as long as characters are `of` it.
fn run(text: &str, of: impl Fn(char) -> bool) -> usize {
    text.find(|c| !of(c)).unwrap_or(text.len())
}

/// The length of a run of spaces that ends before the last, if a word follows: the last belongs to that.
fn spaces(text: &str, kinds: &[Kind]) -> usize {
    let all = run(text, |c| kinds[c as usize] == Kind::Space);
    let last = text[..all].chars().next_back().map_or(0, char::len_utf8);
    if all == text.len() || all == last { all } else { all - last }
}

/// The first word by [`GPT2`].
fn gpt2(text: &str) -> usize {
    let kinds = &**KINDS;
    if let Some(rest) = text.strip_prefix('\'') {
        let endings = ["s", "t", "re", "ve", "m", "ll", "d"];
        if let Some(ending) = endings.into_iter().find(|ending| rest.starts_with(ending)) {
            return 1 + ending.len();
        }
    }
    let space = usize::from(text.starts_with(' '));
    match text[space..].chars().next().map(|c| kinds[c as usize]) {
        None | Some(Kind::Space) => spaces(text, kinds),
        Some(kind) => space + run(&text[space..], |c| kinds[c as usize] == kind),
    }
}

/// The first word by [`LLAMA3`].
fn llama3(text: &str) -> usize {
    let kinds = &**KINDS;
    let kind = |c: char| kinds[c as usize];
    let mut chars = text.chars();
    let (first, second) = (chars.next().unwrap_or_default(), chars.next());
    if first == '\''
        && let Some(second) = second
    {
        // The long s is one, too, where case does not matter.
        let ending = match (second.to_ascii_lowercase(), chars.next().map(|c| c.to_ascii_lowercase())) {
            ('s' | 't' | 'm' | 'd' | 'ſ', _) => second.len_utf8(),
            ('r' | 'v', Some('e')) | ('l', Some('l')) => 2,
            _ => 0,
        };
        if ending > 0 {
            return 1 + ending;
        }
    }
    let newline = |c: char| c == '\r' || c == '\n';
    let letters = |from: usize| from + run(&text[from..], |c| kind(c) == Kind::Letter);
    let others = |from: usize| {
        let end = from + run(&text[from..], |c| kind(c) == Kind::Other);
        end + run(&text[end..], newline)
    };
    match (kind(first), second.map(kind)) {
        (Kind::Letter, _) => letters(0),
        (Kind::Number, _) => text.chars().take(3).take_while(|c| kind(*c) == Kind::Number).map(char::len_utf8).sum(),
        (_, Some(Kind::Letter)) if !newline(first) => letters(first.len_utf8()),
        (Kind::Space, Some(Kind::Other)) if first == ' ' => others(1),
        (Kind::Other, _) => others(0),
        (Kind::Space, _) => {
            let all = run(text, |c| kind(c) == Kind::Space);
            text[..all].rfind(newline).map_or_else(|| spaces(text, kinds), |last| last + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words<'a>(cutter: &Cutter, text: &'a str) -> Vec<&'a str> {
        let mut words = Vec::new();
        cutter.words(text, |word| words.push(word));
        words
    }

    proptest! {
        #[test]
        fn known_patterns_are_cut_as_they_say(
            text in "\\PC{0,40}|[ \\t\r\n\u{a0}\u{2003}a'sStTrReEvVlLmMdDſſéǅ中ⅷ٣½12.(_\u{301}ⓐ\u{1f600}\u{0903}]{0,60}"
        ) {
            for pattern in [GPT2, LLAMA3] {
                let known = Cutter::new(pattern).unwrap();
                prop_assert!(matches!(known, Cutter::Known(_)));
                let regex = Cutter::Pattern(Regex::new(pattern).unwrap());
                prop_assert_eq!(words(&known, &text), words(&regex, &text));
            }
        }
    }

    #[test]
    fn words_of_other_patterns_leave_nothing_out() {
        let cutter = Cutter::new("[a-z]+").unwrap();
        assert_eq!(words(&cutter, "ab, cd!"), ["ab", ", cd", "!"]);
        assert!(Cutter::new("(").unwrap_err().contains("pattern"));
    }
}
