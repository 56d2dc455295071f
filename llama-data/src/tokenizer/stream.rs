//! Text of tokens as they come.

use super::{Kind, SPACE, Tokenizer};

/// Turns tokens into text one by one. A character whose bytes come in several tokens appears when it is whole.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not whole yet.
    pending: Vec<u8>,
    /// Nothing was written yet: the space that encoding put before the text is dropped.
    at_start: bool,
}

impl<'a> DecodeStream<'a> {
    /// A stream at the beginning of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), at_start: true }
    }

    /// A stream that continues a text: the first token's space stays.
    pub fn continuing(tokenizer: &'a Tokenizer) -> Self {
        Self { at_start: false, ..Self::new(tokenizer) }
    }

    /// The text that `id` completes. Control tokens and ids outside the vocabulary give none.
    pub fn push(&mut self, id: u32) -> String {
        let Some(piece) = self.tokenizer.pieces.get(id as usize) else { return String::new() };
        match piece.kind {
            Kind::Control => return String::new(),
            Kind::Byte => self.pending.extend(super::parse_byte(&piece.text).map(|byte| byte as u8)),
            Kind::Unknown => self.pending.extend(" \u{2047} ".as_bytes()),
            Kind::Normal => {
                let mut text = piece.text.as_str();
                if self.at_start && self.tokenizer.dummy_prefix {
                    text = text.strip_prefix([SPACE, ' ']).unwrap_or(text);
                }
                if self.tokenizer.escape_spaces {
                    self.pending.extend(text.replace(SPACE, " ").as_bytes());
                } else {
                    self.pending.extend(text.as_bytes());
                }
            }
        }
        self.at_start = false;
        self.take(false)
    }

    /// What is left at the end: an unfinished character as `U+FFFD`.
    pub fn finish(mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, end: bool) -> String {
        let mut text = String::new();
        loop {
            let Err(error) = std::str::from_utf8(&self.pending) else {
                text.push_str(&String::from_utf8_lossy(&self.pending));
                self.pending.clear();
                return text;
            };
            text.push_str(&String::from_utf8_lossy(&self.pending[..error.valid_up_to()]));
            match error.error_len() {
                Some(len) => {
                    text.push('\u{FFFD}');
                    self.pending.drain(..error.valid_up_to() + len);
                }
                None => {
                    self.pending.drain(..error.valid_up_to());
                    if end {
                        text.push('\u{FFFD}');
                        self.pending.clear();
                    }
                    return text;
                }
            }
        }
    }
}
