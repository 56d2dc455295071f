//! Which parts of a text BPE training may make pieces of: SentencePiece's rules with LLaMA's settings (`split_by_whitespace`,
//! `split_by_unicode_script`, `split_digits`, `allow_whitespace_only_pieces`).

use unicode_script::{Script, UnicodeScript};

use super::SPACE;

/// Calls `each` for every word of an escaped line: spaces and what follows them, up to the next space.
pub(super) fn words<'a>(line: &'a str, mut each: impl FnMut(&'a str)) {
    let mut start = 0;
    let mut before = SPACE;
    for (at, c) in line.char_indices() {
        if c == SPACE && before != SPACE {
            each(&line[start..at]);
            start = at;
        }
        before = c;
    }
    if start < line.len() {
        each(&line[start..]);
    }
}

/// Whether characters can be a piece of up to `max_chars`: spaces alone, or at most one space in front of characters of one
/// script (punctuation is a script of its own). A digit stands alone.
pub(super) fn is_piece(chars: impl Iterator<Item = char> + Clone, max_chars: usize) -> bool {
    let length = chars.clone().count();
    if length > max_chars {
        return false;
    }
    let only_spaces = chars.clone().all(|c| c == SPACE);
    let mut script: Option<Script> = None;
    for (at, c) in chars.enumerate() {
        if c == SPACE {
            if at > 0 && !only_spaces {
                return false;
            }
            continue;
        }
        let digit = c.is_ascii_digit() || ('\u{ff10}'..='\u{ff19}').contains(&c);
        if digit && length > 1 {
            return false;
        }
        let own = match c.script() {
            Script::Hiragana | Script::Katakana => Script::Han,
            _ if c == 'ー' => Script::Han,
            Script::Inherited => script.unwrap_or(Script::Inherited),
            own => own,
        };
        if script.is_some_and(|script| script != own) {
            return false;
        }
        script = Some(own);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_begin_with_their_spaces() {
        let text = "▁let▁x1▁▁▁=▁42;▁▁";
        let mut found = Vec::new();
        words(text, |word| found.push(word));
        assert_eq!(found, ["▁let", "▁x1", "▁▁▁=", "▁42;", "▁▁"]);
        assert_eq!(found.concat(), text);
    }

    #[test]
    fn pieces_stay_in_one_script() {
        let check = |text: &str| is_piece(text.chars(), 16);
        assert!(["▁the", "▁▁▁", "();", "▁=", "7", "ひらカナ漢字", "e\u{301}"].into_iter().all(check));
        assert!(!["▁▁the", "the▁", "42", "▁4", "x1", "foo(", "aб", "abcdefghijklmnopq"].into_iter().any(check));
    }
}
