//! `tokenizer.json`, or SentencePiece's or tiktoken's `tokenizer.model`: the first byte says which.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let name = if first % 2 == 0 { "tokenizer.json" } else { "tokenizer.model" };
    let path = llama_fuzz::folder().join(name);
    std::fs::write(&path, bytes).unwrap();
    let Ok(codec) = llama::text::codec(&path) else { return };
    let ids = codec.encode_with_special("Hello, wörld 123 <s>\n");
    let _ = codec.decode(&ids);
});
