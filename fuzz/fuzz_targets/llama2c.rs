//! A `.bin` file of llama2.c, of any version.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = llama_fuzz::folder().join("model.bin");
    std::fs::write(&path, bytes).unwrap();
    llama_fuzz::read_all(&path);
});
