//! Where text meets the model: the tokenizer that a checkpoint comes with, and conversations as text.

use std::path::{Path, PathBuf};

use llama_data::DataError;
use llama_data::tokenizer::{Codec, CodecStream, RawVocabulary};
use llama_model::ModelError;
use llama_model::formats::{Format, GgufFile, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

/// What can go wrong here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A tokenizer file.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A GGUF file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The vocabulary in a GGUF file.
    #[error("{}: the vocabulary: {reason}; name another with --tokenizer", path.display())]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The template of a conversation.
    #[error("the chat template: {0}")]
    Template(String),
}

/// The tokenizer of a checkpoint: in a GGUF file, or beside the weights (`tokenizer.json`, `tokenizer.model`). The path may
/// be that of such a file, too.
///
/// # Errors
/// If there is none, or it is broken.
pub fn codec(checkpoint: &Path) -> Result<Codec, TextError> {
    if checkpoint.extension().is_some_and(|extension| extension == "json" || extension == "model") {
        return Ok(Codec::load(checkpoint)?);
    }
    if checkpoint.is_file() && Format::detect(checkpoint)? == Format::Gguf {
        let file = GgufFile::open(checkpoint)?;
        let fail = |reason| TextError::Vocabulary { path: checkpoint.into(), reason };
        return vocabulary(&file).and_then(Codec::from_raw).map_err(fail);
    }
    let folder = if checkpoint.is_dir() { checkpoint } else { checkpoint.parent().unwrap_or(Path::new(".")) };
    Ok(Codec::load(folder)?)
}

const MODEL: &str = "tokenizer.ggml.model";
const WORDS: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The vocabulary in a GGUF file.
fn vocabulary(file: &GgufFile) -> Result<RawVocabulary, String> {
    let text = |key: &str| file.get(key).and_then(Value::as_str);
    let list = |key: &str| file.get(key).and_then(Value::as_array).unwrap_or_default();
    let texts = |key: &str| list(key).iter().map(|value| value.as_str().unwrap_or_default().to_string()).collect();
    let id = |key: &str| file.get(key).and_then(Value::as_usize).map(|id| id as u32);
    let flag = |key: &str| file.get(key).and_then(Value::as_bool);
    let model = text(MODEL).ok_or_else(|| format!("`{MODEL}` is missing"))?;
    let sentence_piece = model == "llama";
    Ok(RawVocabulary {
        model: model.into(),
        words: text(WORDS).unwrap_or("default").into(),
        tokens: texts(TOKENS),
        scores: list(SCORES).iter().filter_map(Value::as_f64).map(|score| score as f32).collect(),
        types: list(TYPES).iter().filter_map(Value::as_usize).map(|kind| kind as u32).collect(),
        merges: texts(MERGES),
        space_prefix: flag(SPACE_PREFIX).unwrap_or(sentence_piece),
        bos: id(BOS).or(sentence_piece.then_some(1)),
        eos: id(EOS).or(sentence_piece.then_some(2)),
        // llama.cpp's defaults, where a file says nothing.
        add_bos: flag(ADD_BOS).unwrap_or(sentence_piece || text(WORDS).is_some_and(|words| words.starts_with("llama"))),
        chat_template: text(TEMPLATE).map(str::to_string),
    })
}

/// A tokenizer as the metadata of a GGUF file.
///
/// # Errors
/// If llama.cpp has no such vocabulary.
pub fn gguf_metadata(codec: &Codec) -> Result<Vec<(String, Value)>, String> {
    let raw = codec.to_raw()?;
    let texts = |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::Text).collect());
    let types = raw.types.iter().map(|kind| Value::Signed((*kind).into())).collect();
    let mut metadata =
        vec![(MODEL, Value::Text(raw.model.clone())), (TOKENS, texts(raw.tokens)), (TYPES, Value::Array(types))];
    if raw.model == "llama" {
        let scores = raw.scores.iter().map(|score| Value::Float((*score).into())).collect();
        metadata.push((SCORES, Value::Array(scores)));
        metadata.push((SPACE_PREFIX, Value::Bool(raw.space_prefix)));
        metadata.push((WORDS, Value::Text("default".into())));
    } else {
        metadata.push((MERGES, texts(raw.merges)));
        metadata.push((WORDS, Value::Text(raw.words)));
    }
    metadata.extend(raw.bos.map(|id| (BOS, Value::Unsigned(id.into()))));
    metadata.extend(raw.eos.map(|id| (EOS, Value::Unsigned(id.into()))));
    metadata.push((ADD_BOS, Value::Bool(raw.add_bos)));
    metadata.extend(raw.chat_template.map(|template| (TEMPLATE, Value::Text(template))));
    Ok(metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

/// Text of tokens as they come, up to the first of some strings.
pub struct TextStream<'a> {
    stream: CodecStream<'a>,
    stops: Vec<String>,
    /// Text that may be the beginning of a string that ends it.
    held: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// A stream that ends before the first of `stops`, which are not shown. `continuing` a text, the first token's space
    /// stays.
    pub fn new(codec: &'a Codec, continuing: bool, stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stream: codec.stream(continuing), stops, held: String::new(), stopped: false }
    }

    /// The text that `id` completes, but for what may belong to a string that ends it.
    pub fn push(&mut self, id: u32) -> String {
        let new = self.stream.push(id);
        self.extend(&new)
    }

    /// Whether the end was found. What is pushed after it gives nothing.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What is left when no more tokens come.
    pub fn finish(mut self) -> String {
        let rest = self.stream.take_rest();
        let mut text = self.extend(&rest);
        text.push_str(&self.held);
        text
    }

    fn extend(&mut self, new: &str) -> String {
        if self.stopped {
            return String::new();
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(new);
        if let Some(end) = self.stops.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            self.stopped = true;
            text.truncate(end);
            return text;
        }
        let may_begin = |at: usize| self.stops.iter().any(|stop| stop.starts_with(&text[at..]));
        let first = text.char_indices().map(|(at, _)| at).find(|at| may_begin(*at)).unwrap_or(text.len());
        self.held = text.split_off(first);
        text
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Steps that a template may take: a conversation needs some thousand, an endless loop is stopped.
const TEMPLATE_STEPS: u64 = 5_000_000;

/// A conversation as the tokens that the model was trained on, up to where the assistant's answer begins.
///
/// # Errors
/// [`TextError::Template`] if there is no template, it does not parse, or it refuses the conversation.
pub fn chat_prompt(codec: &Codec, messages: &[Message]) -> Result<Vec<u32>, TextError> {
    conversation(codec, messages, true)
}

/// A conversation as tokens; `open` for an answer, or as it is.
///
/// # Errors
/// As [`chat_prompt`].
pub fn conversation(codec: &Codec, messages: &[Message], open: bool) -> Result<Vec<u32>, TextError> {
    let Some(template) = &codec.chat_template else {
        return Err(TextError::Template("the checkpoint has none; it was not made for conversations".into()));
    };
    let mut environment = Environment::new();
    environment.set_fuel(Some(TEMPLATE_STEPS));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    let special = |id: Option<u32>| id.and_then(|id| codec.special_text(id)).unwrap_or_default();
    let render = |environment: &Environment| {
        environment.template_from_str(template)?.render(context! {
            messages => messages,
            add_generation_prompt => open,
            bos_token => special(codec.bos),
            eos_token => special(codec.eos),
        })
    };
    let text = render(&environment).map_err(|error| TextError::Template(format!("{error:#}")))?;
    let ids = codec.encode_with_special(&text);
    // Most templates write BOS; for the others it is put before the text as everywhere.
    let missing = codec.bos.filter(|bos| codec.add_bos && ids.first() != Some(bos));
    Ok(missing.into_iter().chain(ids).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_data::tokenizer::Tokenizer;

    fn codec_with(template: &str) -> Codec {
        let mut codec = Codec::from(Tokenizer::bytes());
        codec.chat_template = Some(template.into());
        codec
    }

    #[test]
    fn a_conversation_becomes_text() {
        let codec = codec_with(
            "{{ bos_token }}{% for m in messages %}\n[{{ m['role'].upper() }}] {{ m.content | trim }}\n{% endfor %}\
             {% if add_generation_prompt %}>{% endif %}",
        );
        let ids = chat_prompt(&codec, &[Message::new("user", " Hi "), Message::new("assistant", "Ho")]).unwrap();
        assert_eq!(ids[0], codec.bos.unwrap());
        assert_eq!(codec.decode(&ids), "[USER] Hi\n[ASSISTANT] Ho\n>");
    }

    #[test]
    fn a_text_ends_before_its_stop() {
        let codec = Codec::from(Tokenizer::bytes());
        for (stops, expected) in [(vec!["END"], "a EN b "), (vec!["zzz"], "a EN b END é"), (vec!["b", "EN b"], "a ")] {
            let mut stream = TextStream::new(&codec, false, stops.iter().map(|stop| stop.to_string()).collect());
            let mut text = String::new();
            for id in codec.encode("a EN b END é") {
                let new = stream.push(id);
                text.push_str(&new);
                // Nothing is shown that is taken back later.
                assert!(expected.starts_with(&text), "{text}");
            }
            assert_eq!(stream.stopped(), stops != ["zzz"]);
            text.push_str(&stream.finish());
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn bad_templates_are_errors() {
        for (template, reason) in [
            ("{% for", "unexpected end"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}", "fuel"),
        ] {
            let error = chat_prompt(&codec_with(template), &[]).unwrap_err().to_string();
            assert!(error.contains(reason), "{template}: {error}");
        }
        let error = chat_prompt(&Codec::from(Tokenizer::bytes()), &[]).unwrap_err().to_string();
        assert!(error.contains("not made for conversations"), "{error}");
    }
}
