//! Where a trained piece must not reach across: the words that BPE training counts.
//!
//! A word is one space (or none) and letters, or punctuation; a digit stands alone; further spaces and line breaks form
//! words of their own, so that indentation becomes few tokens.

use super::SPACE;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Break,
    Digit,
    Letter,
    Other,
}

fn class(c: char) -> Class {
    match c {
        SPACE | ' ' => Class::Space,
        c if c.is_whitespace() => Class::Break,
        c if c.is_numeric() => Class::Digit,
        c if c.is_alphabetic() || c == '_' => Class::Letter,
        _ => Class::Other,
    }
}

/// Calls `each` for every word of escaped text.
pub(super) fn words<'a>(text: &'a str, mut each: impl FnMut(&'a str)) {
    let mut start = 0;
    let mut before: Option<Class> = None;
    let mut spaces = 0;
    for (at, c) in text.char_indices() {
        let now = class(c);
        let joins = match (before, now) {
            (None, _) => true,
            (Some(Class::Space), Class::Space) => true,
            // The last space of a run goes with the word behind it, the others are a word.
            (Some(Class::Space), Class::Letter | Class::Other) => {
                if spaces > 1 {
                    let cut = at - SPACE.len_utf8();
                    each(&text[start..cut]);
                    start = cut;
                }
                true
            }
            (Some(Class::Digit), _) | (_, Class::Digit) => false,
            (Some(a), b) => a == b,
        };
        if !joins {
            each(&text[start..at]);
            start = at;
        }
        spaces = if now == Class::Space { spaces + 1 } else { 0 };
        before = Some(now);
    }
    if start < text.len() {
        each(&text[start..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_split_where_pieces_must_end() {
        let text = "▁let▁x1▁=▁42;\n\n▁▁▁▁foo()▁▁";
        let mut found = Vec::new();
        words(text, |word| found.push(word));
        assert_eq!(found, ["▁let", "▁x", "1", "▁=", "▁", "4", "2", ";", "\n\n", "▁▁▁", "▁foo", "()", "▁▁"]);
        assert_eq!(found.concat(), text);
    }
}
