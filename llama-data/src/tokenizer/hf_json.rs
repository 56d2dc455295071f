//! Hugging Face's `tokenizer.json`, as LLaMA's vocabularies have it: SentencePiece's BPE with byte fallback, or byte-level BPE.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::byte_level::ByteLevel;
use super::codec::Vocabulary;
use super::words::Words;
use super::{Codec, Kind, Piece, SPACE, Tokenizer};

/// The tokenizer in a file's JSON.
pub(super) fn read(json: &Value) -> Result<Codec, String> {
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

/// A tokenizer as the JSON of a file.
pub(super) fn write(codec: &Codec) -> Value {
    let added = |(text, id): &(String, u32)| {
        json!({
            "id": id, "content": text, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let bos = codec.bos.filter(|_| codec.add_bos).and_then(|id| Some((id, codec.special_text(id)?)));
    let post_processor = bos.map(|(id, text)| {
        let special = |sequence: u8| json!({ "SpecialToken": { "id": text, "type_id": sequence } });
        let sequence = |name: &str, sequence: u8| json!({ "Sequence": { "id": name, "type_id": sequence } });
        json!({
            "type": "TemplateProcessing",
            "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": { text: { "id": text, "ids": [id], "tokens": [text] } },
        })
    });
    let mut file = match codec.vocabulary() {
        Vocabulary::SentencePiece(tokenizer) => write_sentence_piece(tokenizer),
        Vocabulary::ByteLevel(vocabulary) => write_byte_level(codec, vocabulary),
    };
    file["version"] = "1.0".into();
    file["truncation"] = Value::Null;
    file["padding"] = Value::Null;
    file["added_tokens"] = codec.specials().iter().map(added).collect();
    file["post_processor"] = post_processor.into();
    file
}

/// A model whose tokens are in the order of their ids.
fn bpe(tokens: Vec<String>, merges: Vec<(String, String)>, unknown: Option<&str>, whole_words: bool) -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0u32..).map(|(text, id)| (text, id.into())).collect();
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": unknown.is_some(),
        "byte_fallback": unknown.is_some(),
        "ignore_merges": whole_words,
        "vocab": vocab,
        "merges": merges.into_iter().map(|(left, right)| json!([left, right])).collect::<Vec<_>>(),
    })
}

fn write_byte_level(codec: &Codec, vocabulary: &ByteLevel) -> Value {
    let (mut tokens, merges) = vocabulary.to_text();
    codec.specials().iter().for_each(|(text, id)| tokens[*id as usize] = text.clone());
    let words = vocabulary.words();
    let digits = words.single_digits.then(|| json!({ "type": "Digits", "individual_digits": true }));
    let split =
        json!({ "type": "Split", "pattern": { "Regex": words.pattern }, "behavior": "Isolated", "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let steps: Vec<Value> = digits.into_iter().chain([split, bytes.clone()]).collect();
    json!({
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
        "decoder": bytes,
        "model": bpe(tokens, merges, None, vocabulary.whole_words()),
    })
}

/// Scores become an order of merges: every way to make a piece of two others, the best score first.
fn write_sentence_piece(tokenizer: &Tokenizer) -> Value {
    let space = SPACE.to_string();
    let text = |piece: &Piece| {
        if tokenizer.escape_spaces || piece.kind != Kind::Normal {
            piece.text.clone()
        } else {
            piece.text.replace(' ', &space)
        }
    };
    let tokens: Vec<String> = tokenizer.pieces.iter().map(text).collect();
    let normal =
        || tokens.iter().zip(&tokenizer.pieces).zip(0u32..).filter(|((_, piece), _)| piece.kind == Kind::Normal);
    let ids: HashMap<&str, u32> = normal().map(|((text, _), id)| (text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for ((text, piece), id) in normal() {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((piece.score, id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let merges = merges.into_iter().map(|(_, _, left, right)| (left.to_string(), right.to_string())).collect();
    let unknown = tokenizer.pieces.iter().find(|piece| piece.kind == Kind::Unknown).map(|piece| piece.text.clone());
    let prefix = tokenizer.dummy_prefix;
    let prepend = prefix.then(|| json!({ "type": "Prepend", "prepend": space }));
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let strip = prefix.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    let normalizers: Vec<Value> = prepend.into_iter().chain([replace(" ", &space)]).collect();
    let decoders = [replace(&space, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    let decoders: Vec<Value> = decoders.into_iter().chain(strip).collect();
    json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": bpe(tokens.clone(), merges, Some(unknown.as_deref().unwrap_or("<unk>")), false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoProgress;
    use crate::tokenizer::TrainOptions;

    #[test]
    fn what_is_written_is_read() {
        let text = ["the cat sat on the mat, the cat ate 12 rats.\n    let x = 42;\n".repeat(20)];
        let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
        let trained = Tokenizer::train(text.iter().map(String::as_str), &options, &NoProgress).unwrap();
        let mut bytes: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        bytes.extend(["th", "the", " the", "ca"].map(|token| token.as_bytes().to_vec()));
        bytes.push(Vec::new());
        let special = vec![("<|end|>".to_string(), 260)];
        let mut byte_level = Codec::byte_level(ByteLevel::from_ranks(bytes, Words::smollm()).unwrap(), special);
        byte_level.bos = Some(260);
        byte_level.add_bos = true;
        for codec in [Codec::from(trained), byte_level] {
            let again = read(&write(&codec)).unwrap();
            assert_eq!((again.bos, again.add_bos, again.specials()), (codec.bos, codec.add_bos, codec.specials()));
            for text in ["the cat", " 123 mats\n\tthe rat é", "", "    let the"] {
                assert_eq!(again.encode(text), codec.encode(text), "{text:?}");
                assert_eq!(again.decode(&again.encode(text)), text);
            }
        }
    }

    #[test]
    fn other_tokenizers_are_refused() {
        for (file, reason) in [
            (json!({ "model": { "type": "Unigram" } }), "Unigram"),
            (json!({ "model": { "type": "BPE", "vocab": { "a": 5 }, "merges": [] } }), "no token has id 0"),
            (json!({ "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": ["ab"] } }), "not a pair"),
            (json!({ "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] } }), "byte fallback"),
            (
                json!({ "model": { "type": "BPE", "vocab": {}, "merges": [] },
                        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [{ "type": "ByteLevel" }, { "type": "Odd" }] } }),
                "Odd",
            ),
        ] {
            let error = read(&file).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
