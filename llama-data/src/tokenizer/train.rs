//! Training BPE (Sennrich et al. 2016): merge the most frequent pair of neighbours, again and again.
//!
//! The vocabulary is laid out as LLaMA's: `<unk>`, `<s>`, `</s>`, 256 bytes, the merges in their order, the characters.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::{Kind, Piece, Tokenizer, pretokenize, special_pieces};
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
    for text in texts {
        let escaped = format!("{}{}", super::SPACE, text.replace(' ', "\u{2581}"));
        pretokenize::words(&escaped, |word| match counts.get_mut(word) {
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

/// The most frequent characters that together make up `coverage` of the text, most frequent first.
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

    let mut pairs: HashMap<Pair, i64> = HashMap::new();
    let mut places: HashMap<Pair, Vec<usize>> = HashMap::new();
    for (index, word) in words.iter().enumerate() {
        for pair in word.symbols.windows(2).map(|pair| (pair[0], pair[1])) {
            *pairs.entry(pair).or_default() += word.count;
            let places = places.entry(pair).or_default();
            if places.last() != Some(&index) {
                places.push(index);
            }
        }
    }
    let mut queue: BinaryHeap<(i64, Reverse<Pair>)> =
        pairs.iter().map(|(pair, count)| (*count, Reverse(*pair))).collect();

    let mut merged = Vec::new();
    while merged.len() < wanted {
        let Some((count, Reverse(pair))) = queue.pop() else { break };
        // Counts in the queue may be out of date; the true one is put back.
        let current = pairs.get(&pair).copied().unwrap_or(0);
        if current != count {
            if current > 0 {
                queue.push((current, Reverse(pair)));
            }
            continue;
        }
        let text = format!("{}{}", texts[pair.0 as usize], texts[pair.1 as usize]);
        if text.chars().count() > max_chars {
            pairs.remove(&pair);
            continue;
        }
        // Two pairs can spell one piece: then it is made already.
        let new = *known.entry(text).or_insert_with_key(|text| {
            merged.push(text.clone());
            texts.push(text.clone());
            progress.advance(1);
            texts.len() as Symbol - 1
        });

        let mut changed: HashSet<Pair> = HashSet::new();
        for index in places.remove(&pair).unwrap_or_default() {
            let Word { symbols, count } = &mut words[index];
            let mut at = 0;
            while at + 1 < symbols.len() {
                if (symbols[at], symbols[at + 1]) != pair {
                    at += 1;
                    continue;
                }
                let mut change = |pair: Pair, by: i64| {
                    *pairs.entry(pair).or_default() += by;
                    if by > 0 {
                        places.entry(pair).or_default().push(index);
                        changed.insert(pair);
                    }
                };
                if at > 0 {
                    change((symbols[at - 1], pair.0), -*count);
                    change((symbols[at - 1], new), *count);
                }
                if let Some(&after) = symbols.get(at + 2) {
                    change((pair.1, after), -*count);
                    change((new, after), *count);
                }
                symbols[at] = new;
                symbols.remove(at + 1);
                at += 1;
            }
        }
        pairs.remove(&pair);
        queue.extend(changed.into_iter().filter_map(|pair| Some((*pairs.get(&pair)?, Reverse(pair)))));
    }
    merged
}
