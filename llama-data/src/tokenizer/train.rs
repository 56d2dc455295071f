//! Training BPE (Sennrich et al. 2016): merge the most frequent pair of neighbours, again and again.
//!
//! What is counted and in which order equal counts are merged is SentencePiece's (0.2.0), so that the same text gives the same
//! vocabulary: lines are sentences, a piece never crosses into the next word, from one script into another or over a digit, and
//! what is written like a special piece is no text.
//!
//! The vocabulary is laid out as LLaMA's: `<unk>`, `<s>`, `</s>`, 256 bytes, the merges in their order, the characters.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Mutex;

use rustc_hash::{FxHashMap, FxHashSet};

use super::pretokenize::{is_piece, words};
use super::{Kind, Piece, Tokenizer, special_pieces};
use crate::{DataError, Progress};

/// How a tokenizer is trained.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Pieces in all: 259 special ones, the characters, the merges.
    pub vocab_size: usize,
    /// Share of the text's characters that get a piece; the rarest are left to bytes.
    pub character_coverage: f64,
    /// Longest piece in characters.
    pub max_piece_chars: usize,
}

impl Default for TrainOptions {
    /// The paper's: 32,000 pieces.
    fn default() -> Self {
        Self { vocab_size: 32_000, character_coverage: 0.9995, max_piece_chars: 16 }
    }
}

/// SentencePiece passes over lines with this character, which is its own.
const RESERVED: char = '\u{2585}';

type Symbol = u32;
type Pair = (Symbol, Symbol);

impl Tokenizer {
    /// Trains on texts, each a document. The result depends on the texts and options only.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the text is too small or too uniform for the vocabulary, or the vocabulary too small
    /// for the characters.
    pub fn train<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        options: &TrainOptions,
        progress: &dyn Progress,
    ) -> Result<Self, DataError> {
        let counts = count_words(texts);
        let alphabet = alphabet(&counts, options.character_coverage);
        let specials = special_pieces();
        let merges_wanted = options.vocab_size.checked_sub(specials.len() + alphabet.len()).ok_or_else(|| {
            DataError::Tokenizer(format!(
                "a vocabulary of {} is too small: {} special pieces and {} characters of the text need a place; raise vocab_size or lower character_coverage",
                options.vocab_size, specials.len(), alphabet.len()
            ))
        })?;
        progress.start("training tokenizer", Some(merges_wanted as u64));
        let merged = merge(&counts, &alphabet, merges_wanted, options.max_piece_chars, progress);
        progress.finish();
        if merged.len() < merges_wanted {
            return Err(DataError::Tokenizer(format!(
                "the text is too small for a vocabulary of {}: it gives {} pieces; add text or lower vocab_size",
                options.vocab_size,
                specials.len() + alphabet.len() + merged.len()
            )));
        }
        let mut pieces = specials;
        let learned = merged.into_iter().chain(alphabet.into_iter().map(String::from));
        pieces.extend(learned.zip(0..).map(|(text, rank)| Piece { text, score: -(rank as f32), kind: Kind::Normal }));
        Self::new(pieces, true, true).map_err(DataError::Tokenizer)
    }
}

/// All words with their counts, sorted, so that nothing depends on a hash map's order or on who counted what.
fn count_words<'a>(texts: impl Iterator<Item = &'a str> + Send) -> Vec<(String, i64)> {
    const LINES: usize = 4096;
    let lines = texts.flat_map(|text| text.split('\n')).filter(|line| !line.is_empty() && !line.contains(RESERVED));
    let lines = Mutex::new(lines);
    let specials: FxHashSet<String> = special_pieces().into_iter().map(|piece| piece.text).collect();
    let counted = rayon::broadcast(|_| {
        let mut counts: FxHashMap<String, i64> = FxHashMap::default();
        loop {
            let some: Vec<&str> = lines.lock().expect("no thread panics").by_ref().take(LINES).collect();
            if some.is_empty() {
                return counts;
            }
            for line in some {
                let escaped = format!("{}{}", super::SPACE, line.replace(' ', "\u{2581}"));
                let escaped = without(&specials, &escaped);
                words(&escaped, |word| match counts.get_mut(word) {
                    Some(count) => *count += 1,
                    None => {
                        counts.insert(word.to_string(), 1);
                    }
                });
            }
        }
    });
    let mut counted = counted.into_iter();
    let mut counts = counted.next().unwrap_or_default();
    counted.flatten().for_each(|(word, count)| *counts.entry(word).or_default() += count);
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    counts
}

/// A text with a tab in place of each special piece.
fn without(specials: &FxHashSet<String>, text: &str) -> String {
    let (mut kept, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('<') {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        // The longest is `<0x00>`.
        let end = rest.bytes().take(6).position(|byte| byte == b'>').map(|at| at + 1);
        let special = end.filter(|end| specials.contains(&rest[..*end]));
        kept.push(if special.is_some() { '\t' } else { '<' });
        rest = &rest[special.unwrap_or(1)..];
    }
    kept + rest
}

/// The most frequent characters that together make up `coverage` of the text, most frequent first. A tab is none: SentencePiece keeps it
/// for itself, so it is a byte; a NUL is no character there.
fn alphabet(counts: &[(String, i64)], coverage: f64) -> Vec<char> {
    let mut characters: FxHashMap<char, i64> = FxHashMap::default();
    for (word, count) in counts {
        word.chars().filter(|&c| c != '\0').for_each(|c| *characters.entry(c).or_default() += count);
    }
    let total: i64 = characters.values().sum();
    let mut characters: Vec<_> = characters.into_iter().map(|(c, count)| (Reverse(count), c)).collect();
    characters.sort_unstable();
    let mut covered = 0;
    characters
        .into_iter()
        .take_while(|(Reverse(count), _)| {
            let take = (covered as f64) < coverage * total as f64;
            covered += count;
            take
        })
        .map(|(_, c)| c)
        .filter(|&c| c != '\t')
        .collect()
}

/// The texts of the merges, best first.
fn merge(
    counts: &[(String, i64)],
    alphabet: &[char],
    wanted: usize,
    max_chars: usize,
    progress: &dyn Progress,
) -> Vec<String> {
    let mut words = Words::new(counts, alphabet);
    let mut pairs = Pairs { symbols: Symbols::new(alphabet, max_chars), ..Default::default() };
    for index in 0..words.ends.len() {
        let count = words.counts[index];
        words.symbols(index).windows(2).for_each(|pair| pairs.gain((pair[0], pair[1]), count, index as u32));
    }
    let mut queue = Queue::default();
    pairs.queue_new(&mut queue);

    while pairs.symbols.texts.len() - alphabet.len() < wanted {
        let Some(pair) = queue.next(&pairs) else { break };
        let places = pairs.places.remove(&pair).unwrap_or_default().words;
        // Two pairs can spell one piece: the second is never merged.
        let Some(new) = pairs.symbols.add(pair) else { continue };
        progress.advance(1);
        places.into_iter().for_each(|index| words.merge(index, pair, new, &mut pairs));
        pairs.queue_new(&mut queue);
    }
    pairs.symbols.texts.split_off(alphabet.len())
}

/// Characters and pieces.
#[derive(Default)]
struct Symbols {
    texts: Vec<String>,
    known: FxHashSet<String>,
    max_chars: usize,
}

impl Symbols {
    fn new(alphabet: &[char], max_chars: usize) -> Self {
        let texts: Vec<String> = alphabet.iter().map(|c| c.to_string()).collect();
        Self { known: texts.iter().cloned().collect(), texts, max_chars }
    }

    fn text(&self, (left, right): Pair) -> String {
        [self.texts[left as usize].as_str(), &self.texts[right as usize]].concat()
    }

    /// A new symbol of two, unless there is one with its text.
    fn add(&mut self, pair: Pair) -> Option<Symbol> {
        let text = self.text(pair);
        self.known.insert(text.clone()).then(|| {
            self.texts.push(text);
            self.texts.len() as Symbol - 1
        })
    }

    fn is_piece(&self, (left, right): Pair) -> bool {
        let [left, right] = [left, right].map(|symbol| self.texts[symbol as usize].chars());
        is_piece(left.chain(right), self.max_chars)
    }
}

/// The text's different words, side by side.
#[derive(Default)]
struct Words {
    symbols: Vec<Symbol>,
    starts: Vec<usize>,
    ends: Vec<usize>,
    counts: Vec<i64>,
}

impl Words {
    /// A character outside the alphabet ends a word: no piece contains it.
    fn new(counts: &[(String, i64)], alphabet: &[char]) -> Self {
        let ids: FxHashMap<char, Symbol> = alphabet.iter().copied().zip(0..).collect();
        let mut words = Self::default();
        for (word, count) in counts {
            for part in word.split(|c| !ids.contains_key(&c)).filter(|part| part.chars().nth(1).is_some()) {
                words.starts.push(words.symbols.len());
                words.symbols.extend(part.chars().map(|c| ids[&c]));
                words.ends.push(words.symbols.len());
                words.counts.push(*count);
            }
        }
        words
    }

    fn symbols(&mut self, index: usize) -> &mut [Symbol] {
        &mut self.symbols[self.starts[index]..self.ends[index]]
    }

    /// Makes `new` of a pair wherever it stands in a word, from the left.
    fn merge(&mut self, index: u32, pair: Pair, new: Symbol, pairs: &mut Pairs) {
        let count = self.counts[index as usize];
        let symbols = self.symbols(index as usize);
        let (mut kept, mut at) = (0_usize, 0);
        while at < symbols.len() {
            let merges = symbols.get(at + 1).is_some_and(|&next| (symbols[at], next) == pair);
            if merges {
                if let Some(&before) = kept.checked_sub(1).map(|last| &symbols[last]) {
                    pairs.lose((before, pair.0), count);
                    pairs.gain((before, new), count, index);
                }
                if let Some(&after) = symbols.get(at + 2) {
                    pairs.lose((pair.1, after), count);
                    pairs.gain((new, after), count, index);
                }
            }
            symbols[kept] = if merges { new } else { symbols[at] };
            kept += 1;
            at += 1 + merges as usize;
        }
        self.ends[index as usize] = self.starts[index as usize] + kept;
    }
}

/// Pairs of neighbours with their counts and the words they stand in. As in SentencePiece, three equal symbols are two pairs.
#[derive(Default)]
struct Pairs {
    symbols: Symbols,
    places: FxHashMap<Pair, Places>,
    new: Vec<Pair>,
}

/// Where a pair stands: how often, and in which words, in order; perhaps in some no longer.
#[derive(Default)]
struct Places {
    count: i64,
    words: Vec<u32>,
}

impl Pairs {
    fn count(&self, pair: Pair) -> i64 {
        self.places.get(&pair).map_or(0, |places| places.count)
    }

    fn lose(&mut self, pair: Pair, count: i64) {
        if let Some(places) = self.places.get_mut(&pair) {
            places.count -= count;
        }
    }

    fn gain(&mut self, pair: Pair, count: i64, word: u32) {
        let places = self.places.entry(pair).or_insert_with(|| {
            self.new.push(pair);
            Places::default()
        });
        places.count += count;
        if places.words.last() != Some(&word) {
            places.words.push(word);
        }
    }

    /// Queues the pairs that a merge has made. From then on their counts can only sink, for the next merges make others.
    fn queue_new(&mut self, queue: &mut Queue) {
        for pair in self.new.drain(..) {
            if self.symbols.is_piece(pair) {
                queue.push(pair, self.places[&pair].count, &self.symbols);
            } else {
                self.places.remove(&pair);
            }
        }
    }
}

/// Pairs to merge by their counts, which may have sunk since.
#[derive(Default)]
struct Queue {
    by_count: BTreeMap<i64, Vec<Pair>>,
    /// Those of the highest count: the shorter piece comes first, then the alphabetically first.
    highest: BinaryHeap<(Reverse<(usize, String)>, Pair)>,
    count: i64,
}

impl Queue {
    fn push(&mut self, pair: Pair, count: i64, symbols: &Symbols) {
        if count == self.count {
            let text = symbols.text(pair);
            self.highest.push((Reverse((text.chars().count(), text)), pair));
        } else if count > 0 {
            self.by_count.entry(count).or_default().push(pair);
        }
    }

    /// The most frequent pair.
    fn next(&mut self, pairs: &Pairs) -> Option<Pair> {
        loop {
            while let Some((_, pair)) = self.highest.pop() {
                match pairs.count(pair) {
                    count if count == self.count => return Some(pair),
                    count => self.push(pair, count, &pairs.symbols),
                }
            }
            let (count, candidates) = self.by_count.pop_last()?;
            self.count = count;
            candidates.into_iter().for_each(|pair| self.push(pair, pairs.count(pair), &pairs.symbols));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_in_no_piece() {
        let counts = count_words(["x <s>y\r\n<0x0A>\0<\n\u{2585} x", "x"].into_iter());
        let expected = [("▁\t\0<", 1), ("▁\ty\r", 1), ("▁x", 2)].map(|(word, count)| (word.to_string(), count));
        assert_eq!(counts, expected);
        let mut characters = alphabet(&counts, 1.0);
        characters.sort_unstable();
        assert_eq!(characters, ['\r', '<', 'x', 'y', '▁']);
        let merged = merge(&counts, &characters, usize::MAX, 16, &crate::NoProgress);
        assert_eq!(merged, ["▁x"]);
    }
}
