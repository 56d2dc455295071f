//! Encoding: merge the neighbouring pair with the best score, the leftmost among equals, until none can be merged.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Mutex;

use super::{Kind, Piece, SPACE, Tokenizer};

/// Words longer than this are not cached.
const MAX_CACHED_WORD: usize = 48;
/// Words a cache holds before it starts anew.
const MAX_CACHED_WORDS: usize = 1 << 17;

/// Words that were encoded before, with their ids.
#[derive(Clone, Debug, Default)]
pub struct EncodeCache(HashMap<String, Vec<u32>>);

/// Caches for many threads: each takes one that is free, or begins one.
#[derive(Debug, Default)]
pub struct EncodeCaches(Mutex<Vec<EncodeCache>>);

impl EncodeCaches {
    /// Calls with a cache that nobody else uses meanwhile.
    pub fn with<T>(&self, work: impl FnOnce(&mut EncodeCache) -> T) -> T {
        let lock = || self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut cache = lock().pop().unwrap_or_default();
        let result = work(&mut cache);
        lock().push(cache);
        result
    }
}

/// A part of a text while it is merged: an id of the vocabulary, or of a character outside it.
type Symbol = u32;

/// Which pairs of symbols make a piece.
#[derive(Clone, Debug)]
pub(super) struct Merges {
    /// Symbol of each character: its piece, or a number past the vocabulary where pieces contain it but it is none.
    characters: HashMap<char, Symbol>,
    pairs: HashMap<(Symbol, Symbol), Merge>,
    words_are_independent: bool,
}

#[derive(Clone, Copy, Debug)]
struct Merge {
    score: f32,
    id: Symbol,
}

impl Merges {
    pub(super) fn new(pieces: &[Piece], ids: &HashMap<String, u32>) -> Self {
        let normal = || pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Normal);
        let mut characters = HashMap::new();
        let mut next = pieces.len() as Symbol;
        for c in normal().flat_map(|(_, piece)| piece.text.chars()) {
            characters.entry(c).or_insert_with(|| {
                let mut buffer = [0; 4];
                ids.get(&*c.encode_utf8(&mut buffer)).copied().unwrap_or_else(|| {
                    next += 1;
                    next - 1
                })
            });
        }
        let symbol = |text: &str| {
            let mut chars = text.chars();
            match (chars.next(), chars.next()) {
                (Some(c), None) => characters.get(&c).copied(),
                _ => ids.get(text).copied(),
            }
        };
        let mut pairs = HashMap::new();
        for (id, piece) in normal() {
            for (at, _) in piece.text.char_indices().skip(1) {
                if let (Some(left), Some(right)) = (symbol(&piece.text[..at]), symbol(&piece.text[at..])) {
                    pairs.insert((left, right), Merge { score: piece.score, id: id as Symbol });
                }
            }
        }
        let words_are_independent = normal().all(|(_, piece)| word_ends(&piece.text).next().is_none());
        Self { characters, pairs, words_are_independent }
    }

    /// Whether no piece reaches from one word into the next, so that words can be encoded one by one.
    pub(super) fn words_are_independent(&self) -> bool {
        self.words_are_independent
    }
}

/// Where a space follows something else: the ends of all words but the last.
fn word_ends(text: &str) -> impl Iterator<Item = usize> {
    let mut before = SPACE;
    text.char_indices().filter_map(move |(at, c)| {
        let end = c == SPACE && before != SPACE;
        before = c;
        end.then_some(at)
    })
}

/// The words of a text, spaces in front, or the whole text if it must not be split.
pub(super) fn independent_words(text: &str, split: bool) -> impl Iterator<Item = &str> {
    let mut start = 0;
    let ends = word_ends(text).filter(move |_| split).chain([text.len()]);
    ends.map(move |end| {
        let word = &text[start..end];
        start = end;
        word
    })
}

/// A possible merge, ordered by score, then from left to right.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    symbols: (Symbol, Symbol),
    id: Symbol,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Part of a text while it is merged; merged parts form a doubly linked list by index.
struct Part<'a> {
    text: &'a str,
    symbol: Option<Symbol>,
    previous: Option<usize>,
    next: Option<usize>,
}

impl Tokenizer {
    pub(super) fn encode_word(&self, word: &str, cache: &mut EncodeCache, ids: &mut Vec<u32>) {
        if let Some(known) = cache.0.get(word) {
            ids.extend_from_slice(known);
            return;
        }
        let start = ids.len();
        self.merge(word, ids);
        if word.len() <= MAX_CACHED_WORD {
            if cache.0.len() >= MAX_CACHED_WORDS {
                cache.0.clear();
            }
            cache.0.insert(word.to_string(), ids[start..].to_vec());
        }
    }

    /// Encodes escaped text in one go.
    pub(super) fn merge(&self, text: &str, ids: &mut Vec<u32>) {
        let mut parts: Vec<Part> = text
            .char_indices()
            .map(|(at, c)| Part {
                text: &text[at..at + c.len_utf8()],
                symbol: self.merges.characters.get(&c).copied(),
                previous: None,
                next: None,
            })
            .collect();
        let last = parts.len().saturating_sub(1);
        for (index, part) in parts.iter_mut().enumerate() {
            part.previous = index.checked_sub(1);
            part.next = (index < last).then_some(index + 1);
        }

        let mut queue = BinaryHeap::new();
        for left in 0..last {
            queue.extend(self.candidate(&parts, left));
        }
        while let Some(best) = queue.pop() {
            // Either side may have been merged with something else meanwhile.
            let current = (parts[best.left].symbol, parts[best.right].symbol);
            if current != (Some(best.symbols.0), Some(best.symbols.1)) || parts[best.left].next != Some(best.right) {
                continue;
            }
            let start = parts[best.left].text.as_ptr() as usize - text.as_ptr() as usize;
            let len = parts[best.left].text.len() + parts[best.right].text.len();
            parts[best.left].text = &text[start..start + len];
            parts[best.left].symbol = Some(best.id);
            parts[best.right].symbol = None;
            parts[best.left].next = parts[best.right].next;
            if let Some(next) = parts[best.left].next {
                parts[next].previous = Some(best.left);
                queue.extend(self.candidate(&parts, best.left));
            }
            if let Some(previous) = parts[best.left].previous {
                queue.extend(self.candidate(&parts, previous));
            }
        }

        let mut at = (!parts.is_empty()).then_some(0);
        while let Some(index) = at {
            let part = &parts[index];
            match (part.symbol.filter(|&symbol| (symbol as usize) < self.pieces.len()), &self.bytes) {
                (Some(id), _) => ids.push(id),
                (None, Some(bytes)) => ids.extend(part.text.bytes().map(|byte| bytes[byte as usize])),
                (None, None) => ids.push(self.unk),
            }
            at = part.next;
        }
    }

    /// The merge of a part with the next, if they make a piece.
    fn candidate(&self, parts: &[Part], left: usize) -> Option<Candidate> {
        let right = parts[left].next?;
        let symbols = (parts[left].symbol?, parts[right].symbol?);
        let merge = self.merges.pairs.get(&symbols)?;
        Some(Candidate { score: merge.score, left, right, symbols, id: merge.id })
    }
}
