//! The SentencePiece BPE tokenizer of the paper (section 2.1): digits one by one, unknown characters as bytes.
//!
//! A tokenizer is a list of pieces with scores in SentencePiece's own `.model` format, so the released vocabularies are
//! read and what is trained here is read by SentencePiece. [`Tokenizer::train`] makes one from the user's text,
//! [`Tokenizer::bytes`] needs none: its pieces are the 256 bytes.

mod bpe;
mod byte_level;
mod cache;
mod codec;
mod codec_files;
mod encode;
mod hf_json;
mod pretokenize;
mod proto;
mod sentencepiece;
mod stream;
mod train;
mod words;

pub use byte_level::ByteLevel;
pub use cache::{EncodeCache, EncodeCaches};
pub use codec::{Codec, CodecStream, RawVocabulary};
pub use codec_files::{JSON_FILE, PIECES_FILE};
pub use stream::DecodeStream;
pub use train::TrainOptions;
pub use words::Words;

use std::collections::HashMap;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::DataError;
use sentencepiece::Pieces;

/// What SentencePiece writes for a space inside a piece.
pub(crate) const SPACE: char = '\u{2581}';

/// What a piece stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Unknown,
    Control,
    Byte,
}

/// An entry of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub text: String,
    /// Among two possible merges the higher score comes first.
    pub score: f32,
    pub kind: Kind,
}

/// A SentencePiece BPE tokenizer. Immutable; encoding can use a caller's [`EncodeCache`].
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Vec<Piece>,
    bytes: Option<[u32; 256]>,
    encoding: Pieces,
    unk: u32,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Text begins as if a space stood before it.
    dummy_prefix: bool,
    /// Spaces are written as `▁` inside pieces.
    escape_spaces: bool,
}

impl Tokenizer {
    /// The tokenizer whose pieces are bytes: `<unk>`, `<s>`, `</s>`, then byte `b` as id `b + 3`.
    pub fn bytes() -> Self {
        Self::new(special_pieces(), false, false).expect("the byte pieces are complete")
    }

    /// Reads a SentencePiece `.model` file.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is not a BPE model or uses features that LLaMA's
    /// tokenizers do not have (normalisation, user-defined pieces).
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
        let (pieces, dummy_prefix, escape_spaces) =
            proto::parse(&bytes).map_err(|reason| DataError::format(path, reason))?;
        Self::new(pieces, dummy_prefix, escape_spaces).map_err(|reason| DataError::format(path, reason))
    }

    /// Writes a SentencePiece `.model` file, atomically.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        crate::write_atomically(path, |file| std::io::Write::write_all(file, &self.to_proto()))
    }

    pub(crate) fn new(pieces: Vec<Piece>, dummy_prefix: bool, escape_spaces: bool) -> Result<Self, String> {
        let control = |text: &str| {
            pieces.iter().position(|piece| piece.text == text && piece.kind == Kind::Control).map(|id| id as u32)
        };
        let unk =
            pieces.iter().position(|piece| piece.kind == Kind::Unknown).ok_or("there is no unknown piece")? as u32;
        let mut bytes = [unk; 256];
        let mut found = 0;
        for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Byte) {
            bytes[parse_byte(&piece.text).ok_or_else(|| format!("`{}` is not a byte piece", piece.text))?] = id as u32;
            found += 1;
        }
        if found != 0 && found != 256 {
            return Err(format!("{found} byte pieces; there must be 256 or none"));
        }
        let mut ids = HashMap::with_capacity(pieces.len());
        for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Normal) {
            if ids.insert(piece.text.clone(), id as u32).is_some() {
                return Err(format!("piece `{}` stands twice", piece.text));
            }
        }
        Ok(Self {
            encoding: Pieces::new(&pieces, &ids),
            bytes: (found == 256).then_some(bytes),
            bos: control("<s>"),
            eos: control("</s>"),
            unk,
            pieces,
            dummy_prefix,
            escape_spaces,
        })
    }

    fn to_proto(&self) -> Vec<u8> {
        proto::write(&self.pieces, self.dummy_prefix, self.escape_spaces)
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The token before each document.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token after each document.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// A hash of all that encoding depends on. Shards carry it, so that a shard and another tokenizer are not mixed.
    pub fn fingerprint(&self) -> u64 {
        xxh3_64(&self.to_proto())
    }

    /// Token ids of `text`, without BOS and EOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_with(text, &mut EncodeCache::default())
    }

    /// [`encode`](Self::encode) with a cache of words, which makes the encoding of much text several times faster. A
    /// cache belongs to one tokenizer.
    pub fn encode_with(&self, text: &str, cache: &mut EncodeCache) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        if text.is_empty() {
            return ids;
        }
        self.encode_escaped(&self.escape(text), cache, &mut ids);
        ids
    }

    /// Text of token ids. Control tokens are left out, bytes that are no UTF-8 become `U+FFFD`.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = DecodeStream::new(self);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The piece with this id as it stands in the vocabulary (`▁the`, `<0x0A>`).
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| piece.text.as_str())
    }

    fn escape(&self, text: &str) -> String {
        let mut escaped = String::with_capacity(text.len() + text.len() / 4);
        if self.dummy_prefix {
            escaped.push(if self.escape_spaces { SPACE } else { ' ' });
        }
        if self.escape_spaces {
            escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        } else {
            escaped.push_str(text);
        }
        escaped
    }
}

/// The pieces every vocabulary begins with: `<unk>`, `<s>`, `</s>` and the bytes.
pub(crate) fn special_pieces() -> Vec<Piece> {
    let piece = |text: String, kind| Piece { text, score: 0.0, kind };
    let mut pieces = vec![
        piece("<unk>".into(), Kind::Unknown),
        piece("<s>".into(), Kind::Control),
        piece("</s>".into(), Kind::Control),
    ];
    pieces.extend((0..=255u8).map(|byte| piece(format!("<0x{byte:02X}>"), Kind::Byte)));
    pieces
}

fn parse_byte(text: &str) -> Option<usize> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok().map(usize::from)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::NoProgress;

    const TEXT: &str = "the cat sat on the mat, the cat ate 1234 rats.\n    let x = 42;\n    let y = x + 17;\n\tthe end\n\
        a shard holds tokens of many documents; every batch reads windows in an order that depends on seed and step.\n";

    pub(crate) fn trained(vocab_size: usize) -> Tokenizer {
        let options = TrainOptions { vocab_size, ..TrainOptions::default() };
        Tokenizer::train([TEXT.repeat(20)].iter().map(String::as_str), &options, &NoProgress).unwrap()
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "\\PC{0,40}|[ a-e\n\t\u{2581}0-9]{0,40}") {
            // SentencePiece cannot tell `▁` from a space.
            let expected = text.replace(SPACE, " ");
            for tokenizer in [trained(300), Tokenizer::bytes()] {
                let expected = if tokenizer.escape_spaces { &expected } else { &text };
                prop_assert_eq!(&tokenizer.decode(&tokenizer.encode(&text)), expected);
            }
        }

        /// The cache of words changes nothing.
        #[test]
        fn cached_and_whole_text_encoding_agree(text in "[ a-e,\n0-9]{0,60}") {
            let tokenizer = trained(320);
            let mut whole = Vec::new();
            if !text.is_empty() {
                tokenizer.encode_whole(&tokenizer.escape(&text), &mut whole);
            }
            prop_assert_eq!(tokenizer.encode(&text), whole);
        }
    }

    #[test]
    fn digits_stand_alone_and_unknown_characters_are_bytes() {
        let tokenizer = trained(330);
        let pieces = |text: &str| {
            tokenizer.encode(text).into_iter().map(|id| tokenizer.piece(id).unwrap().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(pieces("42")[1..], ["4", "2"]);
        assert_eq!(pieces("é")[1..], ["<0xC3>", "<0xA9>"]);
        assert_eq!(pieces("the"), ["▁the"]);
        for piece in &tokenizer.pieces {
            let digits = piece.text.chars().filter(char::is_ascii_digit).count();
            assert!(piece.kind != Kind::Normal || digits == 0 || piece.text.len() == 1, "{}", piece.text);
        }
    }

    #[test]
    fn training_fills_the_vocabulary_and_compresses() {
        let tokenizer = trained(340);
        assert_eq!(tokenizer.vocab_size(), 340);
        assert!(tokenizer.encode(TEXT).len() * 3 < TEXT.len() * 2);
        let error = Tokenizer::train(["a"].into_iter(), &TrainOptions::default(), &NoProgress).unwrap_err().to_string();
        assert!(error.contains("add text or lower vocab_size"), "{error}");
        let small = TrainOptions { vocab_size: 261, ..TrainOptions::default() };
        let error = Tokenizer::train([TEXT].into_iter(), &small, &NoProgress).unwrap_err().to_string();
        assert!(error.contains("raise vocab_size"), "{error}");
    }

    #[test]
    fn files_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.model");
        for tokenizer in [trained(310), Tokenizer::bytes()] {
            tokenizer.save(&path).unwrap();
            let again = Tokenizer::load(&path).unwrap();
            assert_eq!(again.pieces, tokenizer.pieces);
            assert_eq!(again.fingerprint(), tokenizer.fingerprint());
            assert_eq!(again.encode(TEXT), tokenizer.encode(TEXT));
        }
        assert_ne!(trained(310).fingerprint(), trained(311).fingerprint());
        std::fs::write(&path, b"\xff\xff not a model").unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model"), "{error}");
    }

    #[test]
    fn streamed_text_is_whole_text() {
        let tokenizer = trained(330);
        let text = " two spaces, é and 日本\n";
        let ids = tokenizer.encode(text);
        let mut stream = DecodeStream::new(&tokenizer);
        let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(parts.concat() + &stream.finish(), text);
        assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')));
    }
}
