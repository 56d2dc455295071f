//! A safetensors file, as a checkpoint and as adapters.
#![no_main]

use llama::model::lora::Adapters;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = llama_fuzz::folder();
    std::fs::write(folder.join("config.json"), include_bytes!("../../tests/fixtures/gqa/config.json")).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    llama_fuzz::read_all(folder);
    let config = include_bytes!("../../tests/fixtures/lora/adapter_config.json");
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    let _ = Adapters::open(folder);
});
