//! n-gram language models with backoff, as CCNet scores pages (Wenzek et al., 2019, section 3.3): the paper "filters low quality content with
//! an n-gram language model".
//!
//! log₁₀ p(w | c) is the entry of the longest known n-gram that ends in w, plus the backoff weights of the longer contexts that
//! were tried before. Models are trained by [`NgramModel::train`] or read from ARPA files, such as KenLM writes.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::Write;
use std::path::Path;

use rustc_hash::FxHashMap;

use crate::DataError;
use crate::input::{self, Limits, Line, Lines};
use crate::tokenizer::{EncodeCaches, Tokenizer};

/// Longest n-gram that is read.
pub const MAX_ORDER: usize = 5;
pub(super) const UNKNOWN: u32 = 0;
pub(super) const BEGIN: u32 = 1;
pub(super) const END: u32 = 2;
/// Bits of a word in a key; the id plus one, so that keys of different orders differ.
const BITS: u32 = 25;

/// An n-gram's words in one number.
pub(super) fn key(words: &[u32]) -> u128 {
    words.iter().fold(0, |key, &word| key << BITS | u128::from(word + 1))
}

/// log₁₀ of the probability of the last word, and of the weight its n-gram has as a context.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Entry {
    pub probability: f32,
    pub backoff: f32,
}

/// A map by keys that are spread by one multiplication.
pub(super) type Table = HashMap<u128, Entry, BuildHasherDefault<KeyHasher>>;

#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxhash_rust::xxh3::xxh3_64(bytes);
    }

    fn write_u128(&mut self, key: u128) {
        let folded =
            (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((key >> 64) as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
        self.0 = folded ^ folded >> 31;
    }
}

/// How a line becomes words.
#[derive(Clone, Debug, Default)]
pub enum Units {
    /// What stands between spaces.
    #[default]
    Words,
    /// The pieces of a tokenizer, as CCNet has it. In an ARPA file a piece is its text.
    Pieces(Box<Tokenizer>, EncodeCaches),
}

/// A model.
#[derive(Clone, Debug)]
pub struct NgramModel {
    pub(super) words: FxHashMap<String, u32>,
    pub(super) tables: Vec<Table>,
    pub(super) units: Units,
}

impl NgramModel {
    /// Reads an ARPA file, perhaps compressed.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] with the line.
    pub fn load_arpa(path: &Path, units: Units) -> Result<Self, DataError> {
        let mut lines = Lines::new(input::open(path, Limits::default())?, 1 << 16);
        let mut words = no_words();
        let mut tables: Vec<Table> = Vec::new();
        let mut announced: Vec<usize> = Vec::new();
        let mut order = 0;
        let (mut buffer, mut number) = (Vec::new(), 0u64);
        while let Some(line) = lines.next(&mut buffer) {
            number += 1;
            let fail = |reason: String| DataError::format(path, format!("line {number}: {reason}"));
            match line {
                Line::Read(_) => {}
                Line::TooLong(_) => return Err(fail("longer than 65,536 bytes".into())),
                Line::Failed(_, error) => return Err(DataError::io(path, error)),
            }
            let line = std::str::from_utf8(&buffer).map_err(|error| fail(error.to_string()))?.trim();
            if let Some(count) = line.strip_prefix("ngram ") {
                let count = count.split_once('=').and_then(|(_, count)| count.trim().parse().ok());
                announced.push(count.ok_or_else(|| fail("expected `ngram n=count`".into()))?);
            } else if let Some(section) = line.strip_prefix('\\').and_then(|line| line.strip_suffix("-grams:")) {
                order = section.parse().ok().filter(|&n| n == tables.len() + 1 && n <= MAX_ORDER).ok_or_else(|| {
                    fail(format!("section `{line}` is out of order; n-grams up to {MAX_ORDER} are read"))
                })?;
                tables.push(Table::default());
            } else if line == "\\end\\" {
                break;
            } else if order > 0 && !line.is_empty() {
                let entry = parse_entry(line, order, &mut words).map_err(fail)?;
                tables[order - 1].insert(entry.0, entry.1);
            }
        }
        let found: Vec<usize> = tables.iter().map(Table::len).collect();
        if found.is_empty() || found != announced {
            return Err(DataError::format(path, format!("{announced:?} n-grams are announced, {found:?} are there")));
        }
        Ok(Self { words, tables, units })
    }

    /// Writes an ARPA file, atomically.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save_arpa(&self, path: &Path) -> Result<(), DataError> {
        let mut texts = vec![""; self.words.len()];
        self.words.iter().for_each(|(text, &id)| texts[id as usize] = text);
        crate::write_atomically(path, |file| {
            writeln!(file, "\\data\\")?;
            for (index, table) in self.tables.iter().enumerate() {
                writeln!(file, "ngram {}={}", index + 1, table.len())?;
            }
            for (index, table) in self.tables.iter().enumerate() {
                writeln!(file, "\n\\{}-grams:", index + 1)?;
                let mut keys: Vec<&u128> = table.keys().collect();
                keys.sort_unstable();
                for key in keys {
                    let Entry { probability, backoff } = table[key];
                    write!(file, "{probability}")?;
                    for place in (0..=index as u32).rev() {
                        let word = (key >> (BITS * place)) as u32 & ((1 << BITS) - 1);
                        write!(file, "{}{}", if place == index as u32 { '\t' } else { ' ' }, texts[word as usize - 1])?;
                    }
                    match index + 1 < self.tables.len() {
                        true => writeln!(file, "\t{backoff}")?,
                        false => writeln!(file)?,
                    }
                }
            }
            writeln!(file, "\n\\end\\")
        })
    }

    /// Longest n-gram.
    pub fn order(&self) -> usize {
        self.tables.len()
    }

    /// log₁₀ of the probability of a line with its end, and the number of its words, the end included.
    pub fn score(&self, line: &str) -> (f64, u64) {
        let mut ids = vec![BEGIN];
        self.ids(line, &mut ids);
        ids.push(END);
        let mut sum = 0.0;
        for end in 2..=ids.len() {
            let start = end.saturating_sub(self.tables.len());
            sum += f64::from(self.log_probability(&ids[start..end]));
        }
        (sum, ids.len() as u64 - 1)
    }

    /// 10 to the negative mean of log₁₀ probabilities over all words of the lines and their ends; lines without words do not count.
    /// Infinite without any.
    pub fn perplexity(&self, lines: impl Iterator<Item = impl AsRef<str>>) -> f64 {
        let (mut sum, mut count) = (0.0, 0);
        for line in lines {
            if line.as_ref().trim().is_empty() {
                continue;
            }
            let (log, words) = self.score(line.as_ref());
            sum += log;
            count += words;
        }
        if count == 0 { f64::INFINITY } else { 10f64.powf(-sum / count as f64) }
    }

    /// Appends the ids of a line's words.
    pub(super) fn ids(&self, line: &str, ids: &mut Vec<u32>) {
        let id = |word: &str| self.words.get(word).copied().unwrap_or(UNKNOWN);
        self.units.split(line, |word| ids.push(id(word)));
    }

    /// Of the last word after the others.
    pub(super) fn log_probability(&self, ngram: &[u32]) -> f32 {
        let mut backoff = 0.0;
        for start in 0..ngram.len() {
            let part = &ngram[start..];
            if let Some(entry) = self.tables[part.len() - 1].get(&key(part)) {
                return backoff + entry.probability;
            }
            if part.len() > 1 {
                let context = &part[..part.len() - 1];
                backoff += self.tables[context.len() - 1].get(&key(context)).map_or(0.0, |entry| entry.backoff);
            }
        }
        // Only a model without an entry for unknown words comes here; KenLM gives such words -100.
        backoff - 100.0
    }
}

impl Units {
    /// The pieces of a tokenizer.
    pub fn pieces(tokenizer: Tokenizer) -> Self {
        Self::Pieces(Box::new(tokenizer), EncodeCaches::default())
    }

    /// Calls with each unit of a line.
    pub(super) fn split(&self, line: &str, each: impl FnMut(&str)) {
        match self {
            Self::Words => line.split_whitespace().for_each(each),
            Self::Pieces(tokenizer, caches) => {
                let ids = caches.with(|cache| tokenizer.encode_with(line, cache));
                ids.into_iter().filter_map(|id| tokenizer.piece(id)).for_each(each);
            }
        }
    }
}

/// The numbers of what is no word.
pub(super) fn no_words() -> FxHashMap<String, u32> {
    [("<unk>".into(), UNKNOWN), ("<s>".into(), BEGIN), ("</s>".into(), END)].into_iter().collect()
}

/// `log10p<tab>w1 w2 ..[<tab>backoff]`.
fn parse_entry(line: &str, order: usize, words: &mut FxHashMap<String, u32>) -> Result<(u128, Entry), String> {
    let number = |text: &str| text.parse::<f32>().map_err(|_| format!("`{text}` is not a number"));
    let mut fields = line.split(['\t', ' ']).filter(|field| !field.is_empty());
    let probability = number(fields.next().unwrap_or(""))?;
    let mut ids = [0; MAX_ORDER];
    for slot in &mut ids[..order] {
        let word = fields.next().ok_or_else(|| format!("expected {order} words"))?;
        let next = words.len() as u32;
        if next >= (1 << BITS) - 2 {
            return Err("more than 33 million words".into());
        }
        *slot = match words.get(word) {
            Some(&id) => id,
            None if order == 1 => {
                words.insert(word.to_string(), next);
                next
            }
            None => return Err(format!("`{word}` is not among the 1-grams")),
        };
    }
    let backoff = fields.next().map_or(Ok(0.0), number)?;
    if !probability.is_finite() || !backoff.is_finite() {
        return Err("a weight is not finite".into());
    }
    Ok((key(&ids[..order]), Entry { probability, backoff }))
}
