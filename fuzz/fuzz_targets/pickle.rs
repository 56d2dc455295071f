//! Meta's files: a zip archive with a pickle program, beside a `params.json` that fits the one in the tests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = llama_fuzz::folder();
    std::fs::write(folder.join("params.json"), include_bytes!("../../tests/fixtures/mha_meta/params.json")).unwrap();
    std::fs::write(folder.join("consolidated.00.pth"), bytes).unwrap();
    llama_fuzz::read_all(folder);
});
