//! Training BPE (Sennrich et al. 2016): merge the most frequent pair of neighbours, again and again.
//!
//! What is counted and in which order equal counts are merged is SentencePiece's, so that the same text gives the same
//! vocabulary: lines are sentences, a piece never crosses into the next word, from one script into another or over a digit.
//!
//! The vocabulary is laid out as LLaMA's: `<unk>`, `<s>`, `</s>`, 256 bytes, the merges in their order, the characters.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

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

type Symbol = u32;
type Pair = (Symbol, Symbol);

struct Word {
    symbols: Vec<Symbol>,
    count: i64,
}

impl Tokenizer {
    /// Trains on texts, each a document. The result depends on the texts and options only.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the text is too small or too uniform for the vocabulary, or the vocabulary too small
    /// for the characters.
    pub fn train<'a>(
        texts: impl Iterator<Item = &'a str>,
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

/// All words with their counts, sorted, so that nothing depends on a hash map's order.
fn count_words<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<(String, i64)> {
    let mut counts: HashMap<String, i64> = HashMap::new();
    for line in texts.flat_map(str::lines).filter(|line| !line.is_empty()) {
        let escaped = format!("{}{}", super::SPACE, line.replace(' ', "\u{2581}"));
        words(&escaped, |word| match counts.get_mut(word) {
            Some(count) => *count += 1,
            None => {
                counts.insert(word.to_string(), 1);
            }
        });
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    counts
}

/// The most frequent characters that together make up `coverage` of the text, most frequent first. A tab is none: SentencePiece keeps it
/// for itself, so it is a byte.
fn alphabet(counts: &[(String, i64)], coverage: f64) -> Vec<char> {
    let mut characters: HashMap<char, i64> = HashMap::new();
    for (word, count) in counts {
        word.chars().for_each(|c| *characters.entry(c).or_default() += count);
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
    let ids: HashMap<char, Symbol> = alphabet.iter().copied().zip(0..).collect();
    let mut texts: Vec<String> = alphabet.iter().map(|c| c.to_string()).collect();
    let mut known: HashMap<String, Symbol> = texts.iter().cloned().zip(0..).collect();
    // A character outside the alphabet ends a word: no piece contains it.
    let mut words: Vec<Word> = Vec::new();
    for (word, count) in counts {
        let mut symbols = Vec::new();
        for c in word.chars().map(Some).chain([None]) {
            match c.and_then(|c| ids.get(&c)) {
                Some(&symbol) => symbols.push(symbol),
                None if symbols.len() > 1 => words.push(Word { symbols: std::mem::take(&mut symbols), count: *count }),
                None => symbols.clear(),
            }
        }
    }

    let mut pairs = Pairs { max_chars, ..Default::default() };
    for (index, word) in words.iter().enumerate() {
        pairs.add(word, index, &texts);
    }
    let mut queue: BinaryHeap<Candidate> = BinaryHeap::new();
    pairs.queue_changed(&mut queue, &texts);

    let mut merged = Vec::new();
    while merged.len() < wanted {
        let Some((count, Reverse((_, text)), pair)) = queue.pop() else { break };
        // Counts in the queue may be out of date: the true one was queued when it changed.
        if pairs.count(pair) != count {
            continue;
        }
        // Two pairs can spell one piece: the second is never merged.
        if known.contains_key(&text) {
            pairs.forbid(pair);
            continue;
        }
        let new = texts.len() as Symbol;
        known.insert(text.clone(), new);
        merged.push(text.clone());
        texts.push(text);
        progress.advance(1);
        for index in pairs.take_places(pair) {
            let word = &mut words[index];
            pairs.remove(word);
            word.merge(pair, new);
            pairs.add(word, index, &texts);
        }
        pairs.queue_changed(&mut queue, &texts);
    }
    merged
}

/// A pair to merge: its count; among equals the shorter piece comes first, then the alphabetically first.
type Candidate = (i64, Reverse<(usize, String)>, Pair);

/// Pairs of neighbours with their counts and the words they stand in.
#[derive(Default)]
struct Pairs {
    /// No count for pairs that must not be merged.
    counts: HashMap<Pair, Option<i64>>,
    places: HashMap<Pair, Vec<usize>>,
    changed: HashSet<Pair>,
    max_chars: usize,
}

impl Pairs {
    fn count(&self, pair: Pair) -> i64 {
        self.counts.get(&pair).copied().flatten().unwrap_or(0)
    }

    fn forbid(&mut self, pair: Pair) {
        self.counts.insert(pair, None);
        self.places.remove(&pair);
    }

    fn add(&mut self, word: &Word, index: usize, texts: &[String]) {
        word.pairs(|pair| {
            let count = self.counts.entry(pair).or_insert_with(|| {
                let text = [&texts[pair.0 as usize], &texts[pair.1 as usize]];
                is_piece(text[0].chars().chain(text[1].chars()), self.max_chars).then_some(0)
            });
            if let Some(count) = count {
                *count += word.count;
                self.places.entry(pair).or_default().push(index);
                self.changed.insert(pair);
            }
        });
    }

    fn remove(&mut self, word: &Word) {
        word.pairs(|pair| {
            if let Some(Some(count)) = self.counts.get_mut(&pair) {
                *count -= word.count;
                self.changed.insert(pair);
            }
        });
    }

    /// The words a pair stands in, in order; perhaps some it has left.
    fn take_places(&mut self, pair: Pair) -> Vec<usize> {
        let mut places = self.places.remove(&pair).unwrap_or_default();
        places.sort_unstable();
        places.dedup();
        places
    }

    fn queue_changed(&mut self, queue: &mut BinaryHeap<Candidate>, texts: &[String]) {
        for pair in self.changed.drain() {
            let count = self.counts.get(&pair).copied().flatten().unwrap_or(0);
            if count > 0 {
                let text = format!("{}{}", texts[pair.0 as usize], texts[pair.1 as usize]);
                queue.push((count, Reverse((text.chars().count(), text)), pair));
            }
        }
    }
}

impl Word {
    /// Calls with every pair of neighbours. As in SentencePiece, three equal symbols are two pairs.
    fn pairs(&self, each: impl FnMut(Pair)) {
        self.symbols.windows(2).map(|pair| (pair[0], pair[1])).for_each(each);
    }

    fn merge(&mut self, pair: Pair, new: Symbol) {
        let mut at = 0;
        while at + 1 < self.symbols.len() {
            if (self.symbols[at], self.symbols[at + 1]) == pair {
                self.symbols[at] = new;
                self.symbols.remove(at + 1);
            }
            at += 1;
        }
    }
}
