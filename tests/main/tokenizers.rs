//! Vocabularies of released models against the ids of their own tokenizers, from files that are not ours to ship.

use llama::data::tokenizer::Codec;
use llama::text;

use crate::support::data;

/// llama.cpp's cases: texts, and a line of ids for each.
fn cases(name: &str) -> Option<Vec<(String, Vec<u32>)>> {
    let read = |extension: &str| Some(std::fs::read_to_string(data(&format!("tok/{name}.gguf.{extension}"))?).unwrap());
    let (texts, ids) = (read("inp")?, read("out")?);
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect());
    let cases: Vec<_> = texts.split("\n__ggml_vocab_test__\n").map(str::to_string).zip(ids).collect();
    assert!(cases.len() >= 46, "{} cases", cases.len());
    Some(cases)
}

fn check(what: &str, codec: &Codec, cases: &[(String, Vec<u32>)]) {
    for (text, expected) in cases {
        let found = codec.encode(text);
        assert_eq!(&found, expected, "{what}: {text:?}");
        assert_eq!(&codec.decode(&found), text, "{what}");
    }
}

#[test]
fn llama_2s_vocabulary_gives_its_ids() {
    let Some(cases) = cases("ggml-vocab-llama-spm") else { return };
    let gguf = text::codec(&data("tok/ggml-vocab-llama-spm.gguf").unwrap()).unwrap();
    check("GGUF", &gguf, &cases);
    let model = Codec::load(&data("tok/llama2_tokenizer.model").unwrap()).unwrap();
    check("SentencePiece", &model, &cases);
    assert_eq!((gguf.bos, gguf.eos), (Some(1), Some(2)));
    // Out and in again.
    check("lists", &Codec::from_raw(model.to_raw().unwrap()).unwrap(), &cases);
    let folder = tempfile::tempdir().unwrap();
    model.save(folder.path()).unwrap();
    check("saved", &Codec::load(folder.path()).unwrap(), &cases);
}

#[test]
fn llama_3s_vocabulary_gives_its_ids() {
    let Some(cases) = cases("ggml-vocab-llama-bpe") else { return };
    let gguf = text::codec(&data("tok/ggml-vocab-llama-bpe.gguf").unwrap()).unwrap();
    check("GGUF", &gguf, &cases);
    let ranks = Codec::load(&data("tok/llama3_tokenizer.model").unwrap()).unwrap();
    check("tiktoken", &ranks, &cases);
    for (text, id) in [("<|begin_of_text|>", 128_000), ("<|eot_id|>", 128_009), ("<|start_header_id|>", 128_006)] {
        assert_eq!(ranks.special(text), Some(id), "{text}");
        assert_eq!(gguf.special(text), Some(id), "{text}");
        assert_eq!(ranks.encode_with_special(text), [id]);
        assert_ne!(ranks.encode(text), [id], "what a user writes is text");
    }
    check("lists", &Codec::from_raw(gguf.to_raw().unwrap()).unwrap(), &cases);
    let folder = tempfile::tempdir().unwrap();
    ranks.save(folder.path()).unwrap();
    let saved = Codec::load(folder.path()).unwrap();
    check("saved", &saved, &cases);
    assert_eq!((saved.bos, saved.eos, saved.add_bos), (ranks.bos, ranks.eos, true));
}
