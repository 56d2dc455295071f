//! Encoding with pieces: characters are merged to pieces, those outside the vocabulary become bytes.

use std::collections::HashMap;

use rustc_hash::FxHashMap;

use super::bpe::{Merge, Merges, Pair, Symbol};
use super::pretokenize::words;
use super::{EncodeCache, Kind, Piece, Tokenizer};

/// The symbol of a character that is no piece is the character and this.
const OUTSIDE: Symbol = 1 << 31;

/// What pieces make of characters.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    characters: FxHashMap<char, Symbol>,
    merges: Merges,
    /// Whether no piece reaches from one word into the next, so that words can be encoded one by one.
    words_are_independent: bool,
}

impl Pieces {
    pub(super) fn new(pieces: &[Piece], ids: &HashMap<String, u32>) -> Self {
        let normal = || pieces.iter().zip(0..).filter(|(piece, _)| piece.kind == Kind::Normal);
        let only = |text: &str| {
            let mut chars = text.chars();
            chars.next().filter(|_| chars.next().is_none())
        };
        let symbol = |text: &str| ids.get(text).copied().or_else(|| only(text).map(|c| OUTSIDE | c as Symbol));
        // The higher score comes first; equal ones have one rank.
        let mut scores: Vec<f32> = normal().map(|(piece, _)| piece.score).collect();
        scores.sort_unstable_by(|a, b| b.total_cmp(a));
        scores.dedup_by(|a, b| a.total_cmp(b).is_eq());
        let splits = |(piece, id): (&Piece, Symbol)| -> Vec<(Pair, Merge)> {
            let rank = scores.partition_point(|score| score.total_cmp(&piece.score).is_gt()) as u32;
            let parts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
            let pairs = parts.filter_map(|(left, right)| Some((symbol(left)?, symbol(right)?)));
            pairs.map(|pair| (pair, Merge { rank, symbol: id })).collect()
        };
        Self {
            characters: normal().filter_map(|(piece, id)| Some((only(&piece.text)?, id))).collect(),
            merges: normal().flat_map(splits).collect(),
            words_are_independent: normal().all(|(piece, _)| in_a_word(&piece.text)),
        }
    }

    fn symbol(&self, c: char) -> Symbol {
        self.characters.get(&c).copied().unwrap_or(OUTSIDE | c as Symbol)
    }
}

/// Whether a piece is not longer than a word.
fn in_a_word(piece: &str) -> bool {
    let mut count = 0;
    words(piece, |_| count += 1);
    count <= 1
}

impl Tokenizer {
    /// Whether the words of a text can be encoded one by one.
    pub(super) fn words_are_independent(&self) -> bool {
        self.encoding.words_are_independent && self.escape_spaces
    }

    /// Appends the ids of escaped text.
    pub(super) fn encode_escaped(&self, text: &str, cache: &mut EncodeCache, ids: &mut Vec<u32>) {
        if !self.encoding.words_are_independent {
            return self.encode_whole(text, ids);
        }
        words(text, |word| cache.append(word, ids, |ids| self.encode_whole(word, ids)));
    }

    /// Appends the ids of escaped text, encoded in one go.
    pub(super) fn encode_whole(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text.chars().map(|c| self.encoding.symbol(c)).collect();
        self.encoding.merges.merge(&mut symbols);
        for symbol in symbols {
            match (char::from_u32(symbol & !OUTSIDE).filter(|_| symbol & OUTSIDE != 0), &self.bytes) {
                (None, _) => ids.push(symbol),
                (Some(c), Some(bytes)) => {
                    ids.extend(c.encode_utf8(&mut [0; 4]).bytes().map(|byte| bytes[usize::from(byte)]));
                }
                (Some(_), None) => ids.push(self.unk),
            }
        }
    }
}
