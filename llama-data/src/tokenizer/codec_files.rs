//! Tokenizers from the files that checkpoints come with: SentencePiece's `.model`, tiktoken's ranks (LLaMA 3's
//! `tokenizer.model`), and Hugging Face's `tokenizer.json` with `tokenizer_config.json` beside it.

use std::io::Write;
use std::path::Path;

use base64::Engine;
use serde_json::{Value, json};

use super::byte_level::ByteLevel;
use super::words::Words;
use super::{Codec, Tokenizer, hf_json};
use crate::{DataError, write_atomically};

/// Name of Hugging Face's file of a tokenizer.
pub const JSON_FILE: &str = "tokenizer.json";
/// Name of SentencePiece's file of a tokenizer.
pub const PIECES_FILE: &str = "tokenizer.model";
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Numbers that LLaMA 3 keeps for special tokens after its ranks.
const LLAMA3_SPECIAL: usize = 256;

impl Codec {
    /// Reads a tokenizer file, or the one in a model folder.
    ///
    /// # Errors
    /// [`DataError::Io`] if there is none, [`DataError::Format`] that says what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        if path.is_dir() {
            let names = [JSON_FILE, PIECES_FILE];
            let found = names.iter().map(|name| path.join(name)).find(|file| file.is_file());
            return Self::load(&found.unwrap_or_else(|| path.join(names[1])));
        }
        let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
        let format = |reason: String| DataError::format(path, reason);
        let mut codec = if path.extension().is_some_and(|extension| extension == "json") {
            let json: Value = serde_json::from_slice(&bytes).map_err(|error| format(error.to_string()))?;
            hf_json::read(&json).map_err(format)?
        } else if let Some(ranks) = ranks(&bytes) {
            llama3(ranks).map_err(format)?
        } else {
            Tokenizer::load(path)?.into()
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        let config = folder.join(CONFIG_FILE);
        if config.is_file() {
            let text = std::fs::read_to_string(&config).map_err(|error| DataError::io(&config, error))?;
            let json = serde_json::from_str(&text).map_err(|error| DataError::format(&config, error.to_string()))?;
            codec.configure(&json);
        }
        let template = folder.join("chat_template.jinja");
        if template.is_file() {
            let text = std::fs::read_to_string(&template).map_err(|error| DataError::io(&template, error))?;
            codec.chat_template = Some(text);
        }
        Ok(codec)
    }

    /// Writes the tokenizer as a Hugging Face folder has it: `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` for the
    /// tokens that begin and end a text, and SentencePiece's `tokenizer.model` where it is such a vocabulary.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save(&self, folder: &Path) -> Result<(), DataError> {
        // What ends a text: transformers asks the model's files for it, not the tokenizer's.
        let ids = json!({ "bos_token_id": self.bos, "eos_token_id": self.eos });
        write_json(&folder.join("generation_config.json"), &ids)?;
        self.save_pieces(folder)?;
        // The last: what finds it finds the others.
        write_json(&folder.join(JSON_FILE), &hf_json::write(self))
    }

    /// Puts the tokenizer into a folder of shards and reads it back, so that what makes the shards is what training will find.
    /// Of a SentencePiece vocabulary it is the `tokenizer.model`, which has more of it than `tokenizer.json`.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn install(&self, folder: &Path) -> Result<Self, DataError> {
        std::fs::create_dir_all(folder).map_err(|error| DataError::io(folder, error))?;
        self.save_pieces(folder)?;
        let json = folder.join(JSON_FILE);
        if self.sentence_piece().is_none() {
            write_json(&json, &hf_json::write(self))?;
        } else if json.exists() {
            std::fs::remove_file(&json).map_err(|error| DataError::io(&json, error))?;
        }
        Self::load(folder)
    }

    /// `tokenizer.model`, if it is such a vocabulary, and `tokenizer_config.json`.
    fn save_pieces(&self, folder: &Path) -> Result<(), DataError> {
        if let Some(tokenizer) = self.sentence_piece() {
            tokenizer.save(&folder.join(PIECES_FILE))?;
        }
        let text = |id: Option<u32>| id.and_then(|id| self.special_text(id));
        let mut config = json!({
            // The class that takes the file as it is; transformers' own for LLaMA changes it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "bos_token": text(self.bos),
            "eos_token": text(self.eos),
        });
        if let Some(template) = &self.chat_template {
            config["chat_template"] = template.as_str().into();
        }
        write_json(&folder.join(CONFIG_FILE), &config)
    }

    /// What `tokenizer_config.json` says.
    fn configure(&mut self, json: &Value) {
        let token =
            |key: &str| json[key].as_str().or(json[key]["content"].as_str()).and_then(|text| self.special(text));
        let (bos, eos) = (token("bos_token"), token("eos_token"));
        self.bos = bos.or(self.bos);
        self.eos = eos.or(self.eos);
        self.add_bos = json["add_bos_token"].as_bool().unwrap_or(self.add_bos) && self.bos.is_some();
        self.chat_template = json["chat_template"].as_str().map(str::to_string).or(self.chat_template.take());
    }
}

fn write_json(path: &Path, json: &Value) -> Result<(), DataError> {
    write_atomically(path, |file| writeln!(file, "{json:#}"))
}

/// Lines of a token in base64 and its rank; none if the file is something else.
fn ranks(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut tokens = Vec::new();
    for (line, expected) in text.lines().filter(|line| !line.is_empty()).zip(0usize..) {
        let (token, rank) = line.split_once(' ')?;
        if rank.parse() != Ok(expected) {
            return None;
        }
        tokens.push(base64::engine::general_purpose::STANDARD.decode(token).ok()?);
    }
    (tokens.len() > 256).then_some(tokens)
}

/// LLaMA 3's special tokens follow its ranks.
fn llama3(mut tokens: Vec<Vec<u8>>) -> Result<Codec, String> {
    let first = tokens.len();
    let mut names: Vec<String> = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    .map(str::to_string)
    .into();
    names.extend((3..LLAMA3_SPECIAL - names.len() + 3).map(|n| format!("<|reserved_special_token_{n}|>")));
    // They have no bytes, so no text becomes one by merging.
    tokens.extend(std::iter::repeat_n(Vec::new(), names.len()));
    let special = names.into_iter().zip(first as u32..).collect();
    let mut codec = Codec::byte_level(ByteLevel::from_ranks(tokens, Words::llama3())?, special);
    codec.bos = codec.special("<|begin_of_text|>");
    codec.eos = codec.special("<|end_of_text|>");
    codec.add_bos = true;
    Ok(codec)
}
