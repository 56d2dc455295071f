//! Text of tokens as they come.

use super::{Kind, SPACE, Tokenizer};

/// Turns tokens into text one by one. A character whose bytes come in several tokens appears when it is whole.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not whole yet.
    pending: Utf8Stream,
    /// Nothing was written yet: the space that encoding put before the text is dropped.
    at_start: bool,
}

impl<'a> DecodeStream<'a> {
    /// A stream at the beginning of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Utf8Stream::default(), at_start: true }
    }

    /// A stream that continues a text: the first token's space stays.
    pub fn continuing(tokenizer: &'a Tokenizer) -> Self {
        Self { at_start: false, ..Self::new(tokenizer) }
    }

    /// The text that `id` completes. Control tokens and ids outside the vocabulary give none.
    pub fn push(&mut self, id: u32) -> String {
        let Some(piece) = self.tokenizer.pieces.get(id as usize) else { return String::new() };
        let text = match piece.kind {
            Kind::Control => return String::new(),
            Kind::Byte => {
                self.at_start = false;
                let byte = super::parse_byte(&piece.text).map(|byte| byte as u8);
                return self.pending.push(byte.as_slice());
            }
            Kind::Unknown => " \u{2047} ",
            Kind::Normal if self.at_start && self.tokenizer.dummy_prefix => {
                piece.text.strip_prefix([SPACE, ' ']).unwrap_or(&piece.text)
            }
            Kind::Normal => &piece.text,
        };
        self.at_start = false;
        if self.tokenizer.escape_spaces {
            self.pending.push(text.replace(SPACE, " ").as_bytes())
        } else {
            self.pending.push(text.as_bytes())
        }
    }

    /// What is left at the end: an unfinished character as `U+FFFD`.
    pub fn finish(mut self) -> String {
        self.take_rest()
    }

    pub(super) fn take_rest(&mut self) -> String {
        self.pending.take_rest()
    }
}

/// Bytes as they come, as text: a character appears when it is whole.
#[derive(Clone, Debug, Default)]
pub(super) struct Utf8Stream(Vec<u8>);

impl Utf8Stream {
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.0.extend_from_slice(bytes);
        self.take(false)
    }

    pub(super) fn take_rest(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, end: bool) -> String {
        let mut text = String::new();
        loop {
            let Err(error) = std::str::from_utf8(&self.0) else {
                text.push_str(&String::from_utf8_lossy(&self.0));
                self.0.clear();
                return text;
            };
            text.push_str(&String::from_utf8_lossy(&self.0[..error.valid_up_to()]));
            match error.error_len() {
                Some(len) => {
                    text.push('\u{FFFD}');
                    self.0.drain(..error.valid_up_to() + len);
                }
                None => {
                    self.0.drain(..error.valid_up_to());
                    if end {
                        text.push('\u{FFFD}');
                        self.0.clear();
                    }
                    return text;
                }
            }
        }
    }
}
