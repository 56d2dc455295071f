//! Byte-level BPE, as GPT-2's, LLaMA 3's and SmolLM's vocabularies have it: text is cut into words by a pattern, and the
//! bytes of each word are merged, always the pair with the best rank, the leftmost among equals.

use std::collections::HashMap;

use fancy_regex::Regex;
use xxhash_rust::xxh3::Xxh3;

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// LLaMA 3's words.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// A regular expression that matches words one after the other.
    pub pattern: String,
    /// Every digit is cut off before.
    pub single_digits: bool,
}

impl Words {
    /// GPT-2's.
    pub fn gpt2() -> Self {
        Self { pattern: GPT2.into(), single_digits: false }
    }

    /// SmolLM's: GPT-2's, and every digit alone.
    pub fn smollm() -> Self {
        Self { single_digits: true, ..Self::gpt2() }
    }

    /// LLaMA 3's: up to three digits together.
    pub fn llama3() -> Self {
        Self { pattern: LLAMA3.into(), single_digits: false }
    }

    /// By llama.cpp's name.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" | "gpt2" => Self::gpt2(),
            "smollm" => Self::smollm(),
            "llama-bpe" | "llama3" | "llama-v3" => Self::llama3(),
            _ => return None,
        })
    }

    /// llama.cpp's name, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        let names = ["gpt-2", "smollm", "llama-bpe"];
        names.into_iter().find(|name| Self::by_name(name).as_ref() == Some(self))
    }
}

/// A byte-level BPE vocabulary.
#[derive(Clone, Debug)]
pub struct ByteLevel {
    /// Bytes of each token; empty for numbers that are not used.
    tokens: Vec<Vec<u8>>,
    ids: HashMap<Vec<u8>, u32>,
    /// Rank and result of each pair that merges.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Some vocabularies lack bytes that no text has; as in the reference they are left out.
    bytes: [Option<u32>; 256],
    words: Words,
    pattern: Regex,
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
        let mut pairs = HashMap::with_capacity(merges.len());
        for ((left, right), rank) in merges.iter().zip(0..) {
            let id = |text: &str| {
                ids.get(text)
                    .copied()
                    .ok_or_else(|| format!("the merge of `{left}` and `{right}` has no token `{text}`"))
            };
            let merged = id(&format!("{left}{right}"))?;
            pairs.entry((id(left)?, id(right)?)).or_insert((rank, merged));
        }
        Self::new(bytes, pairs, words, whole_words)
    }

    /// From tokens by rank, as tiktoken's files have them: a pair merges if it makes a token, the lowest rank first.
    ///
    /// # Errors
    /// What is wrong with the vocabulary.
    pub fn from_ranks(tokens: Vec<Vec<u8>>, words: Words) -> Result<Self, String> {
        let ids: HashMap<&[u8], u32> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
        let mut pairs = HashMap::new();
        for (token, id) in tokens.iter().zip(0u32..) {
            for at in 1..token.len() {
                if let (Some(left), Some(right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                    pairs.insert((*left, *right), (id, id));
                }
            }
        }
        Self::new(tokens, pairs, words, true)
    }

    fn new(
        tokens: Vec<Vec<u8>>,
        merges: HashMap<(u32, u32), (u32, u32)>,
        words: Words,
        whole_words: bool,
    ) -> Result<Self, String> {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0u32..) {
            ids.entry(token.clone()).or_insert(id);
        }
        let bytes: [Option<u32>; 256] = std::array::from_fn(|byte| ids.get(&[byte as u8][..]).copied());
        if let Some(byte) = (b' '..=b'~').find(|byte| bytes[usize::from(*byte)].is_none()) {
            return Err(format!("`{}` has no token", char::from(byte)));
        }
        let pattern = Regex::new(&words.pattern).map_err(|error| format!("the pattern of words: {error}"))?;
        Ok(Self { tokens, ids, merges, bytes, words, pattern, whole_words })
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

    /// Whether a word that is a token is not merged.
    pub fn whole_words(&self) -> bool {
        self.whole_words
    }

    /// Tokens and merges in the form of [`from_text`](Self::from_text).
    pub fn to_text(&self) -> (Vec<String>, Vec<(String, String)>) {
        let text = |bytes: &Vec<u8>| bytes.iter().map(|byte| character(*byte)).collect::<String>();
        let tokens: Vec<String> = self.tokens.iter().map(text).collect();
        let mut merges: Vec<_> = self.merges.iter().map(|(pair, (rank, _))| (*rank, *pair)).collect();
        merges.sort_unstable();
        let token = |id: u32| tokens[id as usize].clone();
        let merges = merges.into_iter().map(|(_, (left, right))| (token(left), token(right))).collect();
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
        let mut merges: Vec<_> = self.merges.iter().map(|(pair, (rank, merged))| (rank, pair, merged)).collect();
        merges.sort_unstable();
        for (_, (left, right), merged) in merges {
            [left, right, merged].into_iter().for_each(|id| hash.update(&id.to_le_bytes()));
        }
        hash.update(self.words.pattern.as_bytes());
        hash.update(&[u8::from(self.words.single_digits), u8::from(self.whole_words)]);
    }

    /// Appends the tokens of `text`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        if self.words.single_digits {
            let mut rest = text;
            while let Some((at, digit)) = rest.char_indices().find(|(_, c)| c.is_numeric()) {
                self.encode_words(&rest[..at], ids);
                let after = at + digit.len_utf8();
                self.encode_words(&rest[at..after], ids);
                rest = &rest[after..];
            }
            return self.encode_words(rest, ids);
        }
        self.encode_words(text, ids);
    }

    fn encode_words(&self, text: &str, ids: &mut Vec<u32>) {
        let mut end = 0;
        for word in self.pattern.find_iter(text) {
            // The patterns match everything; should one give up, the rest is one word.
            let Ok(word) = word else { break };
            self.encode_word(&text.as_bytes()[end..word.end()], ids);
            end = word.end();
        }
        self.encode_word(&text.as_bytes()[end..], ids);
    }

    fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.is_empty() {
            return;
        }
        if let Some(id) = self.ids.get(word).filter(|_| self.whole_words) {
            return ids.push(*id);
        }
        let start = ids.len();
        ids.extend(word.iter().filter_map(|byte| self.bytes[usize::from(*byte)]));
        // Words are short: looking at all pairs again costs less than keeping them in order. Long ones are cut where
        // nothing merges, so that a line of a million bytes is not quadratic.
        if word.len() > LONG_WORD {
            let tokens = ids.split_off(start);
            return self.merge_long(&tokens, ids);
        }
        let mut tokens = ids.split_off(start);
        self.merge(&mut tokens);
        ids.extend(tokens);
    }

    fn merge(&self, tokens: &mut Vec<u32>) {
        loop {
            let pairs = tokens.windows(2).enumerate();
            let best =
                pairs.filter_map(|(at, pair)| self.merges.get(&(pair[0], pair[1])).map(|m| (m.0, at, m.1))).min();
            let Some((_, at, merged)) = best else { return };
            tokens[at] = merged;
            tokens.remove(at + 1);
        }
    }

    /// The same with a queue.
    fn merge_long(&self, tokens: &[u32], ids: &mut Vec<u32>) {
        use std::cmp::Reverse;
        use std::collections::BinaryHeap;
        let mut parts: Vec<Option<u32>> = tokens.iter().copied().map(Some).collect();
        let mut next: Vec<usize> = (1..=parts.len()).collect();
        let mut previous: Vec<Option<usize>> = (0..parts.len()).map(|i| i.checked_sub(1)).collect();
        let candidate = |parts: &[Option<u32>], left: usize, right: usize| {
            let pair = (parts[left]?, (*parts.get(right)?)?);
            let (rank, merged) = self.merges.get(&pair)?;
            Some(Reverse((*rank, left, right, pair, *merged)))
        };
        let mut queue: BinaryHeap<_> =
            (1..parts.len()).filter_map(|right| candidate(&parts, right - 1, right)).collect();
        while let Some(Reverse((_, left, right, pair, merged))) = queue.pop() {
            if (parts[left], parts[right]) != (Some(pair.0), Some(pair.1)) || next[left] != right {
                continue;
            }
            parts[left] = Some(merged);
            parts[right] = None;
            next[left] = next[right];
            if next[left] < parts.len() {
                previous[next[left]] = Some(left);
            }
            queue.extend(candidate(&parts, left, next[left]));
            if let Some(before) = previous[left] {
                queue.extend(candidate(&parts, before, left));
            }
        }
        ids.extend(parts.into_iter().flatten());
    }
}

/// Bytes of a word from which a queue pays.
const LONG_WORD: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn small(words: Words) -> ByteLevel {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        for token in ["th", "the", " the", "aa", "aaaa", "12", "123", " t"] {
            tokens.push(token.as_bytes().to_vec());
        }
        ByteLevel::from_ranks(tokens, words).unwrap()
    }

    fn texts(vocabulary: &ByteLevel, text: &str) -> Vec<String> {
        let mut ids = Vec::new();
        vocabulary.encode(text, &mut ids);
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
                vocabulary.encode(&text, &mut ids);
                let bytes: Vec<u8> = ids.iter().flat_map(|id| vocabulary.token(*id).unwrap().to_vec()).collect();
                prop_assert_eq!(bytes, text.as_bytes());
            }
        }

        #[test]
        fn both_ways_to_merge_agree(text in "[the a12]{0,200}") {
            let vocabulary = small(Words::llama3());
            let mut short: Vec<u32> = text.bytes().map(u32::from).collect();
            let mut long = Vec::new();
            vocabulary.merge_long(&short, &mut long);
            vocabulary.merge(&mut short);
            prop_assert_eq!(short, long);
        }
    }
}
