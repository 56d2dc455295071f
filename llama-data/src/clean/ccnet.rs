//! CCNet's text normalisation (Wenzek et al., [arXiv 1911.00359](https://arxiv.org/abs/1911.00359)): the key under which lines of
//! CommonCrawl are compared, and the form its language model reads.

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use xxhash_rust::xxh3::xxh3_64;

/// The key of a line: without case, punctuation and non-printing characters, each digit as 0 (`normalize_for_dedup`). `None` for a line
/// with nothing left.
///
/// ```
/// use llama_data::clean::ccnet::line_key;
///
/// assert_eq!(line_key("  Page 3 of 12!"), line_key("page 4 of 57"));
/// assert_eq!(line_key("--- * ---"), None);
/// ```
pub fn line_key(line: &str) -> Option<u64> {
    let mut key = String::with_capacity(line.len());
    for c in line.trim().chars() {
        match c {
            '0'..='9' => key.push('0'),
            c if c.is_ascii() => {
                if !c.is_ascii_punctuation() && !c.is_ascii_control() {
                    key.push(c.to_ascii_lowercase());
                }
            }
            c if c.is_numeric() => key.push('0'),
            c if ascii_punctuation(c).is_some() || c.is_control() => {}
            c => key.extend(c.to_lowercase()),
        }
    }
    (!key.trim().is_empty()).then(|| xxh3_64(key.as_bytes()))
}

/// A line as the language model reads it: lower case, no accents, each digit as 0, punctuation as its ASCII form, no control
/// characters (`normalize(accent=True, case=True, numbers=True, punct=1)`).
///
/// ```
/// use llama_data::clean::ccnet::normalize;
///
/// assert_eq!(normalize("Café №\u{a0}42 – “ja”"), "cafe no 00 - \"ja\"");
/// ```
pub fn normalize(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut push = |c: char| match c {
        '0'..='9' => out.push('0'),
        c if c.is_ascii_control() => {}
        c => out.push(c),
    };
    for c in line.trim().chars() {
        if c.is_ascii() {
            push(c.to_ascii_lowercase());
        } else if let Some(ascii) = ascii_punctuation(c) {
            ascii.chars().for_each(&mut push);
        } else if c.is_whitespace() {
            push(' ');
        } else {
            c.nfd().filter(|&c| !is_combining_mark(c)).flat_map(char::to_lowercase).for_each(&mut push);
        }
    }
    out
}

/// The ASCII form of a Unicode punctuation mark.
fn ascii_punctuation(c: char) -> Option<&'static str> {
    Some(match c {
        '，' | '、' => ",",
        '。' | '．' => ".",
        '„' | '”' | '“' | '«' | '»' | '″' | '『' | '』' | '「' | '」' | '《' | '》' => "\"",
        '´' | '’' | '‘' | '′' | '`' => "'",
        '∶' | '：' => ":",
        '？' => "?",
        '！' => "!",
        '（' | '【' => "(",
        '）' | '】' => ")",
        '；' => ";",
        '–' | '—' | '−' | '━' | '─' => "-",
        '…' => "...",
        '～' => "~",
        '〈' => "<",
        '〉' => ">",
        '％' => "%",
        '►' | '•' | '●' | '·' => "-",
        '№' => "no",
        '¿' | '¡' | '§' | '¶' => "",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_differ_in_form_only_are_equal() {
        assert_eq!(line_key("Copyright © 2019, “All” rights"), line_key("copyright © 2021 all rights"));
        assert_ne!(line_key("one two"), line_key("one three"));
        assert_eq!(line_key("\u{200b}\u{7}"), line_key("\u{200b}"));
    }
}
