//! Text to ids.

use rayon::prelude::*;

use super::codec::{Codec, Vocabulary};
use super::{EncodeCache, EncodeCaches};

/// Bytes of a text from which it is worth a thread of its own.
const PART: usize = 1 << 18;

impl Codec {
    /// Tokens of `text` as it is: what looks like a special token is text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.append(text, &mut ids, &mut EncodeCache::default());
        ids
    }

    /// Tokens of a document as it stands in a shard: BOS, if that is how the vocabulary's texts begin, the text, and EOS if `eos`. All
    /// threads share the work on a long one. Caches belong to one vocabulary; they make the encoding of much text several times faster.
    pub fn encode_document(&self, text: &str, eos: bool, caches: &EncodeCaches) -> Vec<u32> {
        let encoded: Vec<Vec<u32>> = self
            .parts(text, PART)
            .into_par_iter()
            .map(|part| {
                let mut ids = Vec::new();
                caches.with(|cache| self.append(part, &mut ids, cache));
                ids
            })
            .collect();
        let mut ids: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        ids.reserve_exact(encoded.iter().map(Vec::len).sum::<usize>() + 1);
        encoded.into_iter().for_each(|part| ids.extend(part));
        ids.extend(self.eos.filter(|_| eos));
        ids
    }

    /// Parts of a text, of at least `size` bytes but the last, that give the tokens of the text one after the other.
    fn parts<'a>(&self, text: &'a str, size: usize) -> Vec<&'a str> {
        let dropped = match self.vocabulary() {
            // A text begins as if there were a space before it: that is the part's own then.
            Vocabulary::SentencePiece(tokenizer) if tokenizer.words_are_independent() => {
                usize::from(tokenizer.dummy_prefix)
            }
            // Other patterns may match anything.
            Vocabulary::ByteLevel(vocabulary) if vocabulary.cuts_known_words() => 0,
            _ => return vec![text],
        };
        // A word begins, whatever the vocabulary, with a single space before a letter.
        let begins = |text: &[u8]| text[0].is_ascii_graphic() && text[1] == b' ' && text[2].is_ascii_alphabetic();
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some(at) = rest.as_bytes().windows(3).skip(size).position(begins).map(|at| size + at + 1) {
            parts.push(&rest[..at]);
            rest = &rest[at + dropped..];
        }
        parts.push(rest);
        parts
    }

    /// Tokens of a text with BOS before it, if that is how the vocabulary's texts begin.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        let mut ids: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        self.append(text, &mut ids, &mut EncodeCache::default());
        ids
    }

    /// Tokens of a text in which special tokens are written out, such as a conversation after its template. Never for
    /// text of somebody else's alone: whoever writes it could end the turn.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        let (mut ids, mut cache) = (Vec::new(), EncodeCache::default());
        let mut rest = text;
        'text: while !rest.is_empty() {
            for at in rest.char_indices().map(|(at, _)| at) {
                if let Some((special, id)) =
                    self.specials().iter().find(|(special, _)| rest[at..].starts_with(special.as_str()))
                {
                    self.append(&rest[..at], &mut ids, &mut cache);
                    ids.push(*id);
                    rest = &rest[at + special.len()..];
                    continue 'text;
                }
            }
            self.append(rest, &mut ids, &mut cache);
            break;
        }
        ids
    }

    fn append(&self, text: &str, ids: &mut Vec<u32>, cache: &mut EncodeCache) {
        match self.vocabulary() {
            Vocabulary::SentencePiece(tokenizer) => ids.extend(tokenizer.encode_with(text, cache)),
            Vocabulary::ByteLevel(vocabulary) => vocabulary.encode(text, cache, ids),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::byte_level::tests::small;
    use crate::tokenizer::{Tokenizer, Words, tests::trained};

    #[test]
    fn parts_give_the_tokens_of_the_text() {
        let words = [Words::gpt2(), Words::smollm(), Words::llama3()];
        let byte_level = words.map(|words| Codec::byte_level(small(words), Vec::new()));
        let codecs = byte_level.into_iter().chain([trained(320).into(), Tokenizer::bytes().into()]);
        for codec in codecs.collect::<Vec<Codec>>() {
            proptest!(|(text in "[ the12a\n\r\t'▁\u{a0}.]{0,80}", size in 0usize..9)| {
                let parts = codec.parts(&text, size);
                let ids: Vec<u32> = parts.iter().flat_map(|part| codec.encode(part)).collect();
                prop_assert_eq!(ids, codec.encode(&text));
            });
            let text = "the cat. ".repeat(PART);
            assert!(codec.encode_document(&text, false, &EncodeCaches::default()) == codec.encode_prompt(&text));
        }
    }
}
