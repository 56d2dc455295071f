//! A GGUF file: header, tensors, and the vocabulary in it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = llama_fuzz::folder().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    llama_fuzz::read_all(&path);
    let _ = llama::text::codec(&path).map(|codec| codec.encode("Hello, world"));
});
