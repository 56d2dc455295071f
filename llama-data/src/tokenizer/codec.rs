//! Whatever vocabulary a checkpoint comes with, behind one interface: text to ids and back, special tokens, and the
//! template of a conversation.

use xxhash_rust::xxh3::Xxh3;

use super::byte_level::ByteLevel;
use super::stream::{DecodeStream, Utf8Stream};
use super::words::Words;
use super::{Kind, Piece, SPACE, Tokenizer};
use crate::DataError;

/// A vocabulary with its special tokens.
#[derive(Clone, Debug)]
pub struct Codec {
    vocabulary: Vocabulary,
    /// Text and id of tokens that text is searched for where that is asked for, the longest first.
    special: Vec<(String, u32)>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text, or a turn of a conversation.
    pub eos: Option<u32>,
    /// Whether texts begin with [`bos`](Self::bos).
    pub add_bos: bool,
    /// A Jinja template that makes a text of a conversation.
    pub chat_template: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) enum Vocabulary {
    SentencePiece(Box<Tokenizer>),
    ByteLevel(Box<ByteLevel>),
}

/// A vocabulary as plain lists, as a GGUF file has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RawVocabulary {
    /// `llama` for SentencePiece, `gpt2` for byte-level BPE.
    pub model: String,
    /// How text is cut into words, by llama.cpp's name; byte-level only.
    pub words: String,
    /// Text of each token; spaces and bytes are written as the vocabulary's kind does.
    pub tokens: Vec<String>,
    /// SentencePiece: which merges come first.
    pub scores: Vec<f32>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub types: Vec<u32>,
    /// Byte-level: pairs with a space between, the best first.
    pub merges: Vec<String>,
    /// Whether a space is put before a text; SentencePiece only.
    pub space_prefix: bool,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Whether texts begin with BOS.
    pub add_bos: bool,
    /// A Jinja template that makes a text of a conversation.
    pub chat_template: Option<String>,
}

const NORMAL: u32 = 1;
const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;
const UNUSED: u32 = 5;
const BYTE: u32 = 6;

impl From<Tokenizer> for Codec {
    fn from(tokenizer: Tokenizer) -> Self {
        let control = |piece: &Piece| piece.kind == Kind::Control;
        let special = tokenizer.pieces.iter().zip(0..).filter(|(piece, _)| control(piece));
        let special = special.map(|(piece, id)| (piece.text.clone(), id)).collect();
        let (bos, eos) = (tokenizer.bos(), tokenizer.eos());
        let vocabulary = Vocabulary::SentencePiece(Box::new(tokenizer));
        Self { vocabulary, special, bos, eos, add_bos: bos.is_some(), chat_template: None }.sorted()
    }
}

impl Codec {
    /// A byte-level vocabulary with special tokens, which are in it.
    pub fn byte_level(vocabulary: ByteLevel, special: Vec<(String, u32)>) -> Self {
        let vocabulary = Vocabulary::ByteLevel(Box::new(vocabulary));
        Self { vocabulary, special, bos: None, eos: None, add_bos: false, chat_template: None }.sorted()
    }

    /// From plain lists.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_raw(raw: RawVocabulary) -> Result<Self, String> {
        let count = raw.tokens.len();
        let kind = |id: usize| raw.types.get(id).copied().unwrap_or(NORMAL);
        for (name, id) in [("bos", raw.bos), ("eos", raw.eos)] {
            if id.is_some_and(|id| id as usize >= count) {
                return Err(format!("{name} is token {id:?} of {count}"));
            }
        }
        let is_special = |id: usize| matches!(kind(id), CONTROL | USER_DEFINED);
        let special =
            raw.tokens.iter().enumerate().filter(|(id, _)| is_special(*id)).map(|(id, text)| (text.clone(), id as u32));
        let special: Vec<_> = special.filter(|(text, _)| !text.is_empty()).collect();
        let codec = match raw.model.as_str() {
            "llama" => {
                if raw.scores.len() != count {
                    return Err(format!("{} scores for {count} tokens", raw.scores.len()));
                }
                let pieces = raw.tokens.iter().zip(&raw.scores).enumerate().map(|(id, (text, score))| {
                    let kind = match kind(id) {
                        UNKNOWN => Kind::Unknown,
                        CONTROL | USER_DEFINED | UNUSED => Kind::Control,
                        BYTE => Kind::Byte,
                        _ => Kind::Normal,
                    };
                    Piece { text: text.clone(), score: *score, kind }
                });
                let tokenizer = Tokenizer::new(pieces.collect(), raw.space_prefix, true)?;
                Self { special, ..tokenizer.into() }
            }
            "gpt2" => {
                let words = Words::by_name(&raw.words).ok_or_else(|| {
                    format!("words are cut as \"{}\": gpt-2, smollm and llama-bpe are known", raw.words)
                })?;
                let pair = |merge: &String| {
                    let pair = merge.split_once(' ').ok_or_else(|| format!("the merge `{merge}` is not a pair"))?;
                    Ok((pair.0.to_string(), pair.1.to_string()))
                };
                let merges = raw.merges.iter().map(pair).collect::<Result<Vec<_>, String>>()?;
                let whole_words = raw.words.starts_with("llama");
                Self::byte_level(ByteLevel::from_text(&raw.tokens, &merges, words, whole_words)?, special)
            }
            other => return Err(format!("a vocabulary of kind \"{other}\"; \"llama\" and \"gpt2\" are read")),
        };
        let Self { vocabulary, special, .. } = codec;
        let RawVocabulary { bos, eos, add_bos, chat_template, .. } = raw;
        Ok(Self { vocabulary, special, bos, eos, add_bos: add_bos && bos.is_some(), chat_template }.sorted())
    }

    /// As plain lists.
    ///
    /// # Errors
    /// If words are cut in a way that llama.cpp has no name for.
    pub fn to_raw(&self) -> Result<RawVocabulary, String> {
        let is_special = |id: u32| self.special.iter().any(|(_, special)| *special == id);
        let mut raw = RawVocabulary {
            bos: self.bos,
            eos: self.eos,
            add_bos: self.add_bos,
            chat_template: self.chat_template.clone(),
            ..RawVocabulary::default()
        };
        match &self.vocabulary {
            Vocabulary::SentencePiece(tokenizer) => {
                raw.model = "llama".into();
                raw.space_prefix = tokenizer.dummy_prefix;
                for piece in &tokenizer.pieces {
                    let escaped = |text: &str| {
                        if tokenizer.escape_spaces { text.into() } else { text.replace(' ', &SPACE.to_string()) }
                    };
                    raw.tokens.push(escaped(&piece.text));
                    raw.scores.push(piece.score);
                    raw.types.push(match piece.kind {
                        Kind::Normal => NORMAL,
                        Kind::Unknown => UNKNOWN,
                        Kind::Control => CONTROL,
                        Kind::Byte => BYTE,
                    });
                }
            }
            Vocabulary::ByteLevel(vocabulary) => {
                raw.model = "gpt2".into();
                let name = vocabulary.words().name();
                raw.words = name.ok_or("llama.cpp has no name for how this vocabulary cuts words")?.into();
                let (tokens, merges) = vocabulary.to_text();
                raw.tokens = tokens;
                raw.merges = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
                raw.types =
                    (0..raw.tokens.len() as u32).map(|id| if is_special(id) { CONTROL } else { NORMAL }).collect();
                for (text, id) in &self.special {
                    raw.tokens[*id as usize] = text.clone();
                }
            }
        }
        Ok(raw)
    }

    fn sorted(mut self) -> Self {
        self.special.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.1.cmp(&b.1)));
        self
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match &self.vocabulary {
            Vocabulary::SentencePiece(tokenizer) => tokenizer.vocab_size(),
            Vocabulary::ByteLevel(vocabulary) => vocabulary.len(),
        }
    }

    /// A hash of all that encoding depends on. Shards carry it, so that a shard and another tokenizer are not mixed.
    pub fn fingerprint(&self) -> u64 {
        match &self.vocabulary {
            Vocabulary::SentencePiece(tokenizer) => tokenizer.fingerprint(),
            Vocabulary::ByteLevel(vocabulary) => {
                let mut hash = Xxh3::new();
                vocabulary.hash_into(&mut hash);
                for (text, id) in &self.special {
                    hash.update(text.as_bytes());
                    hash.update(&id.to_le_bytes());
                }
                hash.digest()
            }
        }
    }

    pub(super) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Text and id of every special token, the longest first.
    pub fn specials(&self) -> &[(String, u32)] {
        &self.special
    }

    /// The SentencePiece tokenizer, if it is one.
    pub fn sentence_piece(&self) -> Option<&Tokenizer> {
        match &self.vocabulary {
            Vocabulary::SentencePiece(tokenizer) => Some(tokenizer),
            Vocabulary::ByteLevel(_) => None,
        }
    }

    /// The id of a special token.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.special.iter().find(|(special, _)| special == text).map(|(_, id)| *id)
    }

    /// The text of a special token.
    pub fn special_text(&self, id: u32) -> Option<&str> {
        self.special.iter().find(|(_, special)| *special == id).map(|(text, _)| text.as_str())
    }

    /// Whether documents of shards are told apart: by BOS, or by EOS if they end with it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if they would run together.
    pub fn check_separates(&self, eos: bool) -> Result<(), DataError> {
        match (self.bos.filter(|_| self.add_bos), self.eos.filter(|_| eos)) {
            (None, None) => Err(DataError::Tokenizer(
                "documents would run together: it puts no BOS before a text, and no EOS was asked for or is known; is its \
                 tokenizer_config.json missing?"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream(false);
        let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The text of one token, with its space; bytes that are no character as `U+FFFD`. For showing tokens, not texts.
    pub fn decode_piece(&self, id: u32) -> String {
        if let Some(text) = self.special_text(id) {
            return text.into();
        }
        let mut stream = self.stream(true);
        let text = stream.push(id);
        text + &stream.finish()
    }

    /// Turns tokens into text as they come. `continuing` a text, the first token's space stays.
    pub fn stream(&self, continuing: bool) -> CodecStream<'_> {
        let state = match &self.vocabulary {
            Vocabulary::SentencePiece(tokenizer) if continuing => State::Pieces(DecodeStream::continuing(tokenizer)),
            Vocabulary::SentencePiece(tokenizer) => State::Pieces(DecodeStream::new(tokenizer)),
            Vocabulary::ByteLevel(vocabulary) => State::Bytes(vocabulary, Utf8Stream::default()),
        };
        CodecStream { codec: self, state }
    }
}

/// Text of tokens as they come; see [`Codec::stream`].
pub struct CodecStream<'a> {
    codec: &'a Codec,
    state: State<'a>,
}

enum State<'a> {
    Pieces(DecodeStream<'a>),
    Bytes(&'a ByteLevel, Utf8Stream),
}

impl CodecStream<'_> {
    /// The text that `id` completes. Special tokens and ids outside the vocabulary give none.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.state {
            State::Pieces(stream) => stream.push(id),
            State::Bytes(vocabulary, stream) => match vocabulary.token(id) {
                Some(bytes) if self.codec.special_text(id).is_none() => stream.push(bytes),
                _ => String::new(),
            },
        }
    }

    /// What is left at the end: an unfinished character as `U+FFFD`.
    pub fn finish(mut self) -> String {
        self.take_rest()
    }

    /// The same, for a stream that is part of something else.
    pub fn take_rest(&mut self) -> String {
        match &mut self.state {
            State::Pieces(stream) => stream.take_rest(),
            State::Bytes(_, stream) => stream.take_rest(),
        }
    }
}
