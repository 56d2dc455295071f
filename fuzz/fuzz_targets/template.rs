//! A chat template from a stranger's checkpoint.
#![no_main]

use llama::data::tokenizer::{Codec, Tokenizer};
use llama::text::{Message, chat_prompt};

libfuzzer_sys::fuzz_target!(|template: &str| {
    let mut codec = Codec::from(Tokenizer::bytes());
    codec.chat_template = Some(template.into());
    let _ = chat_prompt(&codec, &[Message::new("user", "Hi"), Message::new("assistant", "Ho")]);
});
