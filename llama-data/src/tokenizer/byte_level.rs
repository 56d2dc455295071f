//! Byte-level BPE, as GPT-2's, LLaMA 3's and SmolLM's vocabularies have it: text is cut into words by a pattern, and the
//! bytes of each word are merged, always the pair with the best rank, the leftmost among equals.

use std::collections::HashMap;

use rustc_hash::FxHashMap;
use xxhash_rust::xxh3::Xxh3;

use super::EncodeCache;
use super::bpe::{Merge, Merges};
use super::words::{Cutter, Words};

/// A byte-level BPE vocabulary.
#[derive(Clone, Debug)]
pub struct ByteLevel {
    /// Bytes of each token; empty for numbers that are not used.
    tokens: Vec<Vec<u8>>,
    ids: FxHashMap<Vec<u8>, u32>,
    merges: Merges,
    /// Some vocabularies lack bytes that no text has; as in the reference they are left out.
    bytes: [Option<u32>; 256],
    words: Words,
    cutter: Cutter,
    /// A word that is a token is not merged: LLaMA 3.
    whole_words: bool,
}

/// The character that stands for a byte in vocabularies that are written as text: printable bytes for themselves, the
/// others from U+0100 on.
fn character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(' ')
}

/// The bytes of a token that is written as text; none if a character stands for no byte.
fn bytes_of(text: &str, table: &HashMap<char, u8>) -> Option<Vec<u8>> {
    text.chars().map(|c| table.get(&c).copied()).collect()
}

impl ByteLevel {
    /// From tokens and merges as `tokenizer.json` and GGUF files have them: text in which a character stands for a byte,
    /// and pairs with a space between, the best first.
    ///
    /// # Errors
    /// What is wrong with the vocabulary.
    pub fn from_text(
        tokens: &[String],
        merges: &[(String, String)],
        words: Words,
        whole_words: bool,
    ) -> Result<Self, String> {
        let table: HashMap<char, u8> = (0..=255).map(|byte| (character(byte), byte)).collect();
        // Special tokens need not be bytes: they are not merged.
        let bytes: Vec<Vec<u8>> =
            tokens.iter().map(|text| bytes_of(text, &table).unwrap_or_else(|| text.clone().into_bytes())).collect();
        let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
        let mut pairs = FxHashMap::default();
        for ((left, right), rank) in merges.iter().zip(0..) {
            let id = |text: &str| {
                ids.get(text)
                    .copied()
                    .ok_or_else(|| format!("the merge of `{left}` and `{right}` has no token `{text}`"))
            };
            let merged = id(&format!("{left}{right}"))?;
            pairs.entry((id(left)?, id(right)?)).or_insert(Merge { rank, symbol: merged });
        }
        Self::new(bytes, pairs.into_iter().collect(), words, whole_words)
    }

    /// From tokens by rank, as tiktoken's files have them: a pair merges if it makes a token, the lowest rank first.
    ///
    /// # Errors
    /// What is wrong with the vocabulary.
    pub fn from_ranks(tokens: Vec<Vec<u8>>, words: Words) -> Result<Self, String> {
        let ids: FxHashMap<&[u8], u32> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
        let mut pairs = Vec::new();
        for (token, id) in tokens.iter().zip(0u32..) {
            for at in 1..token.len() {
                if let (Some(left), Some(right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                    pairs.push(((*left, *right), Merge { rank: id, symbol: id }));
                }
            }
        }
        Self::new(tokens, pairs.into_iter().collect(), words, true)
    }

    fn new(tokens: Vec<Vec<u8>>, merges: Merges, words: Words, whole_words: bool) -> Result<Self, String> {
        let mut ids = FxHashMap::default();
        for (token, id) in tokens.iter().zip(0u32..) {
            ids.entry(token.clone()).or_insert(id);
        }
        let bytes: [Option<u32>; 256] = std::array::from_fn(|byte| ids.get(&[byte as u8][..]).copied());
        if let Some(byte) = (b' '..=b'~').find(|byte| bytes[usize::from(*byte)].is_none()) {
            return Err(format!("`{}` has no token", char::from(byte)));
        }
        let cutter = Cutter::new(&words.pattern)?;
        Ok(Self { tokens, ids, merges, bytes, words, cutter, whole_words })
    }

    /// Number of tokens, special ones included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none; there always are.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How text is cut into words.
    pub fn words(&self) -> &Words {
        &self.words
    }

    /// Whether words are cut by one of the known patterns.
    pub(super) fn cuts_known_words(&self) -> bool {
        matches!(self.cutter, Cutter::Known(_))
    }

    /// Whether a word that is a token is not merged.
    pub fn whole_words(&self) -> bool {
        self.whole_words
    }

    /// Tokens and merges in the form of [`from_text`](Self::from_text).
    pub fn to_text(&self) -> (Vec<String>, Vec<(String, String)>) {
        let text = |bytes: &Vec<u8>| bytes.iter().map(|byte| character(*byte)).collect::<String>();
        let tokens: Vec<String> = self.tokens.iter().map(text).collect();
        let token = |id: u32| tokens[id as usize].clone();
        let merges = self.merges.ranked().into_iter().map(|((left, right), _)| (token(left), token(right))).collect();
        (tokens, merges)
    }

    /// The bytes of a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize).map(Vec::as_slice)
    }

    /// Hashes all that encoding depends on.
    pub(super) fn hash_into(&self, hash: &mut Xxh3) {
        for token in &self.tokens {
            hash.update(&(token.len() as u64).to_le_bytes());
            hash.update(token);
        }
        for ((left, right), merge) in self.merges.ranked() {
            [left, right, merge.symbol].into_iter().for_each(|id| hash.update(&id.to_le_bytes()));
        }
        hash.update(self.words.pattern.as_bytes());
        hash.update(&[u8::from(self.words.single_digits), u8::from(self.whole_words)]);
    }

    /// Appends the tokens of `text`.
    pub fn encode(&self, text: &str, cache: &mut EncodeCache, ids: &mut Vec<u32>) {
        let mut rest = text;
        if self.words.single_digits {
            while let Some((at, digit)) = rest.char_indices().find(|(_, c)| c.is_numeric()) {
                let (before, from) = rest.split_at(at);
                let (digit, after) = from.split_at(digit.len_utf8());
                self.encode_words(before, cache, ids);
                self.encode_words(digit, cache, ids);
                rest = after;
            }
        }
        self.encode_words(rest, cache, ids);
    }

    fn encode_words(&self, text: &str, cache: &mut EncodeCache, ids: &mut Vec<u32>) {
        let whole = |word: &str| if self.whole_words { self.ids.get(word.as_bytes()) } else { None };
        self.cutter.words(text, |word| match whole(word) {
            Some(id) => ids.push(*id),
            None => cache.append(word, ids, |ids| {
                let mut tokens = word.bytes().filter_map(|byte| self.bytes[usize::from(byte)]).collect();
                self.merges.merge(&mut tokens);
                ids.extend(tokens);
            }),
        });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::tokenizer) fn small(words: Words) -> ByteLevel {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        for token in ["th", "the", " the", "aa", "aaaa", "12", "123", " t"] {
            tokens.push(token.as_bytes().to_vec());
        }
        ByteLevel::from_ranks(tokens, words).unwrap()
    }

    fn texts(vocabulary: &ByteLevel, text: &str) -> Vec<String> {
        let mut ids = Vec::new();
        vocabulary.encode(text, &mut EncodeCache::default(), &mut ids);
        ids.iter().map(|id| String::from_utf8_lossy(vocabulary.token(*id).unwrap()).into_owned()).collect()
    }

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let characters: std::collections::HashSet<char> = (0..=255).map(character).collect();
        assert_eq!(characters.len(), 256);
        assert_eq!((character(b' '), character(b'\n'), character(b'a')), ('Ġ', 'Ċ', 'a'));
    }

    #[test]
    fn digits_are_cut_as_the_pattern_says() {
        assert_eq!(texts(&small(Words::llama3()), "1234"), ["123", "4"]);
        assert_eq!(texts(&small(Words::smollm()), "12 the"), ["1", "2", " the"]);
    }

    #[test]
    fn missing_bytes_are_an_error() {
        let error = ByteLevel::from_ranks(vec![b"a".to_vec()], Words::llama3()).unwrap_err();
        assert!(error.contains("has no token"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "\\PC{0,60}|[ the12a\n]{0,200}") {
            for words in [Words::gpt2(), Words::smollm(), Words::llama3()] {
                let vocabulary = small(words);
                let mut ids = Vec::new();
                vocabulary.encode(&text, &mut EncodeCache::default(), &mut ids);
                let bytes: Vec<u8> = ids.iter().flat_map(|id| vocabulary.token(*id).unwrap().to_vec()).collect();
                prop_assert_eq!(bytes, text.as_bytes());
            }
        }
    }
}
