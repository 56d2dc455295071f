//! Tokenizers from the files that checkpoints come with: SentencePiece's `.model`, tiktoken's ranks (LLaMA 3's
//! `tokenizer.model`), and Hugging Face's `tokenizer.json` with `tokenizer_config.json` beside it.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine;
use serde_json::{Value, json};

use super::byte_level::{ByteLevel, Words};
use super::codec::Vocabulary;
use super::{Codec, Kind, Piece, Tokenizer};
use crate::DataError;

/// Numbers that LLaMA 3 keeps for special tokens after its ranks.
const LLAMA3_SPECIAL: usize = 256;

impl Codec {
    /// Reads a tokenizer file, or the one in a model folder.
    ///
    /// # Errors
    /// [`DataError::Io`] if there is none, [`DataError::Format`] that says what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        if path.is_dir() {
            let names = ["tokenizer.json", "tokenizer.model"];
            let found = names.iter().map(|name| path.join(name)).find(|file| file.is_file());
            return Self::load(&found.unwrap_or_else(|| path.join(names[1])));
        }
        let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
        let format = |reason: String| DataError::format(path, reason);
        let mut codec = if path.extension().is_some_and(|extension| extension == "json") {
            let json: Value = serde_json::from_slice(&bytes).map_err(|error| format(error.to_string()))?;
            json_codec(&json).map_err(format)?
        } else if let Some(ranks) = ranks(&bytes) {
            llama3(ranks).map_err(format)?
        } else {
            Tokenizer::load(path)?.into()
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        let config = folder.join("tokenizer_config.json");
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

    /// Writes the tokenizer as a Hugging Face folder has it: `tokenizer.model` or `tokenizer.json`, and
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save(&self, folder: &Path) -> Result<(), DataError> {
        let write = |name: &str, json: Value| {
            let path = folder.join(name);
            std::fs::write(&path, format!("{json:#}\n")).map_err(|error| DataError::io(&path, error))
        };
        let class = match self.vocabulary() {
            Vocabulary::SentencePiece(tokenizer) => {
                tokenizer.save(&folder.join("tokenizer.model"))?;
                "LlamaTokenizer"
            }
            Vocabulary::ByteLevel(vocabulary) => {
                write("tokenizer.json", byte_level_json(self, vocabulary))?;
                "PreTrainedTokenizerFast"
            }
        };
        let text = |id: Option<u32>| id.and_then(|id| self.special_text(id));
        let mut config = json!({
            "tokenizer_class": class,
            "add_bos_token": self.add_bos,
            "bos_token": text(self.bos),
            "eos_token": text(self.eos),
        });
        if let Some(template) = &self.chat_template {
            config["chat_template"] = template.as_str().into();
        }
        write("tokenizer_config.json", config)
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

fn json_codec(json: &Value) -> Result<Codec, String> {
    let model = &json["model"];
    match model["type"].as_str() {
        Some("BPE") => {}
        // Files from before the field have merges all the same.
        None if model["merges"].is_array() => {}
        other => return Err(format!("a model of type {other:?}; only BPE is read")),
    }
    let vocab = model["vocab"].as_object().ok_or("`model.vocab` is missing")?;
    let mut special = Vec::new();
    let mut tokens: HashMap<u32, String> = HashMap::with_capacity(vocab.len());
    let id_of =
        |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or("a token's id is not a number");
    for (text, id) in vocab {
        tokens.insert(id_of(id)?, text.clone());
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (text, id) = (added["content"].as_str().ok_or("an added token has no content")?, id_of(&added["id"])?);
        tokens.insert(id, text.into());
        special.push((text.to_string(), id));
    }
    let count = tokens.len();
    let tokens: Vec<String> = (0..count as u32)
        .map(|id| tokens.remove(&id).ok_or_else(|| format!("no token has id {id}, though there are {count}")))
        .collect::<Result<_, _>>()?;
    let merge = |merge: &Value| -> Option<(String, String)> {
        if let Some(text) = merge.as_str() {
            return text.split_once(' ').map(|(left, right)| (left.into(), right.into()));
        }
        Some((merge[0].as_str()?.into(), merge[1].as_str()?.into()))
    };
    let merges = model["merges"].as_array().ok_or("`model.merges` is missing")?.iter().map(merge);
    let merges: Vec<_> = merges.collect::<Option<_>>().ok_or("a merge is not a pair")?;
    let mut codec = match words(&json["pre_tokenizer"])? {
        Some(words) => {
            let whole_words = model["ignore_merges"].as_bool().unwrap_or(false);
            Codec::byte_level(ByteLevel::from_text(&tokens, &merges, words, whole_words)?, special)
        }
        None => sentence_piece(json, &tokens, &merges, &special)?.into(),
    };
    // What is put before each text.
    let single = &json["post_processor"];
    let parts = std::iter::once(single).chain(single["processors"].as_array().into_iter().flatten());
    let first = parts.filter_map(|part| part["single"][0]["SpecialToken"]["id"].as_str()).next();
    codec.bos = first.and_then(|text| codec.special(text)).or(codec.bos);
    codec.add_bos = first.is_some();
    Ok(codec)
}

/// A byte-level vocabulary as `tokenizer.json`.
fn byte_level_json(codec: &Codec, vocabulary: &ByteLevel) -> Value {
    let (mut tokens, merges) = vocabulary.to_text();
    let added: Vec<Value> = codec
        .specials()
        .iter()
        .map(|(text, id)| {
            tokens[*id as usize] = text.clone();
            json!({
                "id": id, "content": text, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0u32..).map(|(text, id)| (text, id.into())).collect();
    let words = vocabulary.words();
    let mut steps = Vec::new();
    if words.single_digits {
        steps.push(json!({ "type": "Digits", "individual_digits": true }));
    }
    let split =
        json!({ "type": "Split", "pattern": { "Regex": words.pattern }, "behavior": "Isolated", "invert": false });
    steps.push(split);
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    steps.push(byte_level.clone());
    let post_processor = codec.bos.filter(|_| codec.add_bos).and_then(|id| Some((id, codec.special_text(id)?)));
    let post_processor = post_processor.map(|(id, text)| {
        let part = |name: &str| {
            json!([
                { "SpecialToken": { "id": text, "type_id": 0 } },
                { "Sequence": { "id": name, "type_id": 0 } },
            ])
        };
        let special = json!({ text: { "id": text, "ids": [id], "tokens": [text] } });
        json!({ "type": "TemplateProcessing", "single": part("A"), "pair": part("B"), "special_tokens": special })
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": vocabulary.whole_words(),
            "vocab": vocab,
            "merges": merges.into_iter().map(|(left, right)| json!([left, right])).collect::<Vec<_>>(),
        },
    })
}

/// How a byte-level vocabulary cuts words; none for other vocabularies.
fn words(pre_tokenizer: &Value) -> Result<Option<Words>, String> {
    let steps = pre_tokenizer["pretokenizers"].as_array().map_or(std::slice::from_ref(pre_tokenizer), Vec::as_slice);
    if !steps.iter().any(|step| step["type"] == "ByteLevel") {
        return Ok(None);
    }
    let mut words = Words::gpt2();
    for step in steps {
        match step["type"].as_str() {
            Some("ByteLevel") if step["add_prefix_space"].as_bool() == Some(true) => {
                return Err("a space before each text is not read for byte-level vocabularies".into());
            }
            Some("ByteLevel") => {}
            Some("Digits") => words.single_digits = step["individual_digits"].as_bool().unwrap_or(false),
            Some("Split") => {
                words.pattern = step["pattern"]["Regex"].as_str().ok_or("a split without a regular expression")?.into();
            }
            other => return Err(format!("a pre-tokenizer of type {other:?}; ByteLevel, Digits and Split are read")),
        }
    }
    Ok(Some(words))
}

/// SentencePiece's vocabulary in this form: the order of the merges is the order of the scores.
fn sentence_piece(
    json: &Value,
    tokens: &[String],
    merges: &[(String, String)],
    special: &[(String, u32)],
) -> Result<Tokenizer, String> {
    if json["model"]["byte_fallback"].as_bool() != Some(true) {
        return Err("neither byte-level nor SentencePiece with byte fallback, as LLaMA's vocabularies are".into());
    }
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for ((left, right), rank) in merges.iter().zip(0..) {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let unknown = json["model"]["unk_token"].as_str().unwrap_or("<unk>");
    let piece = |(text, id): (&String, u32)| {
        let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let kind = if text == unknown {
            Kind::Unknown
        } else if special.iter().any(|(_, special)| *special == id) {
            Kind::Control
        } else if is_byte {
            Kind::Byte
        } else {
            Kind::Normal
        };
        let score = -(ranks.get(text).copied().unwrap_or(merges.len()) as f32);
        Piece { text: text.clone(), score, kind }
    };
    let steps = |value: &Value, list: &str| value[list].as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    let prefix = steps(&json["normalizer"], "normalizers").iter().any(|step| step["type"] == "Prepend")
        || steps(&json["pre_tokenizer"], "pretokenizers").iter().any(|step| {
            step["type"] == "Metaspace"
                && step["prepend_scheme"].as_str().map_or(step["add_prefix_space"] != false, |scheme| scheme != "never")
        });
    Tokenizer::new(tokens.iter().zip(0..).map(piece).collect(), prefix, true)
}
