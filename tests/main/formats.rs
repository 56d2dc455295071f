//! Checkpoints of other programs: their logits and tokens, round trips through every format, and hostile files.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use llama::model::formats::{self, Checkpoint, Extras, FileType, Format, GgufFile, ModelWeights, Weights};
use llama::model::generate::{GenerateOptions, Generation, Sampling};
use llama::model::{LlamaConfig, RopeScaling, WeightFormat, hf};
use proptest::prelude::*;
use serde_json::json;

use crate::support::{
    close, data, device_test, fixture, floats, ints, json, numbers, scale, stored, stored_ints, tolerance,
};

/// As the parity tests'.
const LOGITS: f64 = 5e-5;

fn no_extras() -> Extras<'static> {
    Extras { gguf: Vec::new(), files: Vec::new() }
}

/// Every weight of a checkpoint by name.
fn weights(checkpoint: &Checkpoint) -> Vec<(String, TensorData)> {
    let parameters = checkpoint.config().parameters().into_iter();
    parameters.map(|(path, dims)| (path.clone(), checkpoint.weight(&path, &dims).unwrap())).collect()
}

device_test! {
    /// Logits of the reference implementation, whatever the file.
    fn every_format_has_the_references_logits<B>(device) {
        for (file, reference, format) in [
            ("gqa", "gqa", Format::HuggingFace),
            ("gqa_sharded", "gqa", Format::HuggingFace),
            ("gqa_tied", "gqa_tied", Format::HuggingFace),
            ("gqa_bf16", "gqa_bf16", Format::HuggingFace),
            ("mha_meta", "mha", Format::Meta),
            ("gqa_meta", "gqa_bf16", Format::Meta),
            ("gqa_meta_mp2", "gqa_bf16", Format::Meta),
            ("gguf/gqa-f32.gguf", "gqa", Format::Gguf),
            ("llama2c/v1.bin", "gqa", Format::Llama2c),
        ] {
            let checkpoint = Checkpoint::open(&fixture(file)).unwrap();
            assert_eq!(checkpoint.format(), format, "{file}");
            let mut read = 0;
            let model = checkpoint.load::<B::InnerBackend>(WeightFormat::F32, &device, |n| read += n).unwrap();
            assert_eq!(read, checkpoint.config().num_params());
            let path = format!("{reference}/ref.safetensors");
            let (ids, dims) = stored_ints(&path, "input_ids");
            let tokens = ints::<B::InnerBackend>(&ids, [dims[0], dims[1]], &device);
            let name = if reference == "gqa_bf16" { "logits_upcast_f32" } else { "logits" };
            let expected = stored(&path, name);
            let found = floats(model.forward(tokens, None).unwrap());
            close(file, &found, &expected, tolerance(LOGITS, scale(&expected)));
        }
    }
}

#[test]
fn metas_sizes_are_read() {
    let mha = Checkpoint::open(&fixture("mha_meta")).unwrap();
    assert_eq!(
        mha.config(),
        &LlamaConfig { max_seq_len: 2048, ..hf::load_config(&fixture("mha/config.json")).unwrap() }
    );
    let parts = Checkpoint::open(&fixture("gqa_meta_mp2")).unwrap();
    let whole = Checkpoint::open(&fixture("gqa_meta")).unwrap();
    assert_eq!(parts.config(), whole.config());
    assert_eq!(weights(&parts), weights(&whole));
    assert_eq!(parts.tensors().len(), 2 * whole.tensors().iter().filter(|tensor| tensor.name != "rope.freqs").count());
}

/// llama2.c's 8 bits in groups, against what its rules make of the same weights.
#[test]
fn llama2cs_rounded_weights_are_read() {
    let checkpoint = Checkpoint::open(&fixture("llama2c/v2.bin")).unwrap();
    assert!(checkpoint.tensors().iter().any(|tensor| tensor.dtype == "Q8 in groups of 32"));
    let path = "llama2c/v2_rounded.safetensors";
    let parts = ["attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"];
    let layers = parts.iter().flat_map(|part| (0..2).map(move |layer| format!("layers.{layer}.{part}.weight")));
    let names = layers.zip(5..).chain([("tok_embeddings.weight".to_string(), 0), ("output.weight".to_string(), 15)]);
    let all = checkpoint.config().parameters();
    for (name, index) in names {
        let (_, dims) = all.iter().find(|(path, _)| *path == name).unwrap();
        let found = checkpoint.weight(&name, dims).unwrap().convert::<f64>().to_vec::<f64>().unwrap();
        close(&name, &found, &stored(path, &format!("{index:02}")), 1e-7);
    }
    // The norms, and the order of rows in `wq` and `wk`, are those of the model in f32.
    let exact = Checkpoint::open(&fixture("gqa")).unwrap();
    for (name, dims) in
        all.iter().filter(|(name, _)| name.contains("norm") || name.contains(".wq") || name.contains(".wk"))
    {
        let values = |c: &Checkpoint| c.weight(name, dims).unwrap().convert::<f64>().to_vec::<f64>().unwrap();
        close(name, &values(&checkpoint), &values(&exact), if name.contains("norm") { 0.0 } else { 5e-3 });
    }
}

/// Through every format and back: the same bits.
#[test]
fn round_trips_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (name, formats) in [
        ("gqa", vec![Format::Meta, Format::Gguf, Format::Llama2c, Format::HuggingFace]),
        ("gqa_tied", vec![Format::Gguf, Format::Llama2c, Format::HuggingFace]),
    ] {
        let first = Checkpoint::open(&fixture(name)).unwrap();
        let mut path = fixture(name);
        for (step, format) in formats.into_iter().enumerate() {
            let from = Checkpoint::open(&path).unwrap();
            path = folder.path().join(format!("{name}-{step}"));
            formats::save(&from, from.config(), &path, format, FileType::F32, &no_extras()).unwrap();
            let again = Checkpoint::open(&path).unwrap();
            assert_eq!((again.format(), again.config()), (format, first.config()), "{name}");
            assert!(weights(&again) == weights(&first), "{name} as {format}");
        }
    }
    // Meta's code has no tied heads: the embedding is written twice.
    let tied = Checkpoint::open(&fixture("gqa_tied")).unwrap();
    let path = folder.path().join("meta");
    formats::save(&tied, tied.config(), &path, Format::Meta, FileType::F32, &no_extras()).unwrap();
    let meta = Checkpoint::open(&path).unwrap();
    let dims = [tied.config().vocab_size, tied.config().d_model];
    let head = meta.weight("output.weight", &dims).unwrap();
    assert_eq!(head, tied.weight("tok_embeddings.weight", &dims).unwrap());
}

device_test! {
    /// A model in memory is exported as the checkpoint that it came from.
    fn a_model_in_memory_is_exported<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&fixture("gqa")).unwrap();
        let model = source.load::<B::InnerBackend>(WeightFormat::F32, &device, |_| ()).unwrap();
        let path = folder.path().join("model.gguf");
        let in_memory = ModelWeights::new(&model);
        formats::save(&in_memory, source.config(), &path, Format::Gguf, FileType::F32, &no_extras()).unwrap();
        assert!(weights(&Checkpoint::open(&path).unwrap()) == weights(&source));
        let error = in_memory.weight("output.weight", &[1, 2]).unwrap_err().to_string();
        assert!(error.contains("output.weight") && error.contains("[1, 2]"), "{error}");
    }
}

#[test]
fn short_types_are_rounded_once() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("gqa")).unwrap();
    for (format, dtype, tolerance) in [
        (Format::Gguf, FileType::F16, 1e-3),
        (Format::Gguf, FileType::Bf16, 5e-3),
        (Format::Gguf, FileType::Q8_0, 1e-2),
        (Format::Gguf, FileType::Q4_0, 0.2),
        (Format::HuggingFace, FileType::Bf16, 5e-3),
        (Format::Meta, FileType::F16, 1e-3),
    ] {
        let path = folder.path().join(format!("{format}-{dtype}"));
        formats::save(&source, source.config(), &path, format, dtype, &no_extras()).unwrap();
        let found = weights(&Checkpoint::open(&path).unwrap());
        for ((name, found), (_, expected)) in found.into_iter().zip(weights(&source)) {
            let [found, expected] = [found, expected].map(|data| data.convert::<f64>().to_vec::<f64>().unwrap());
            close(&format!("{format} {dtype} {name}"), &found, &expected, tolerance * scale(&expected));
        }
    }
    for (format, dtype) in
        [(Format::Llama2c, FileType::F16), (Format::Meta, FileType::Q8_0), (Format::HuggingFace, FileType::Q4_0)]
    {
        let path = folder.path().join("refused");
        let error =
            formats::save(&source, source.config(), &path, format, dtype, &no_extras()).unwrap_err().to_string();
        assert!(error.contains("f32"), "{error}");
    }
}

#[test]
fn rope_scalings_survive_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("gqa")).unwrap();
    let llama3 = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_seq_len: 8192,
    };
    for scaling in [RopeScaling::Linear { factor: 4.0 }, llama3(8.0), llama3(32.0)] {
        let config = LlamaConfig { rope_theta: 500_000.0, rope_scaling: Some(scaling), ..source.config().clone() };
        let path = folder.path().join("scaled.gguf");
        formats::save(&source, &config, &path, Format::Gguf, FileType::F32, &no_extras()).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap().config(), &config);
    }
}

/// Every type of block, against the values that llama.cpp's Python package reads from the same bytes.
#[test]
fn quantised_blocks_have_llama_cpps_values() {
    let checkpoint = Checkpoint::open(&fixture("quants/model.gguf")).unwrap();
    let types: std::collections::BTreeSet<String> =
        checkpoint.tensors().into_iter().map(|tensor| tensor.dtype).collect();
    assert_eq!(types.len(), 13, "{types:?}");
    let gguf_name = |path: &str| {
        let name = path
            .replace("layers.", "blk.")
            .replace("tok_embeddings", "token_embd")
            .replace("attention_norm", "attn_norm");
        let name = name
            .replace("feed_forward.w1", "ffn_gate")
            .replace("feed_forward.w2", "ffn_down")
            .replace("feed_forward.w3", "ffn_up");
        let name = ["q", "k", "v"]
            .iter()
            .fold(name, |name, part| name.replace(&format!("attention.w{part}"), &format!("attn_{part}")));
        let name = name.replace("attention.wo", "attn_output");
        if name.starts_with("norm") { "output_norm.weight".to_string() } else { name }
    };
    for (path, found) in weights(&checkpoint) {
        let found = found.convert::<f64>().to_vec::<f64>().unwrap();
        let expected = stored("quants/values.safetensors", &gguf_name(&path));
        close(&path, &found, &expected, 1e-6 * scale(&expected));
    }
}

device_test! {
    /// The published text of a real model, from three files.
    fn stories260k_tells_its_story<B>(device) {
        let Some(oracle) = data("ckpt/stories260K_oracle.json") else { return };
        let oracle: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(oracle).unwrap()).unwrap();
        let mut expected: Vec<u32> = numbers(&oracle["greedy_ids"]).into_iter().map(|id| id as u32).collect();
        let folder = tempfile::tempdir().unwrap();
        let legacy = data("ckpt/stories260K_rebuilt_legacy.bin").unwrap();
        let again = folder.path().join("again.bin");
        let source = Checkpoint::open(&legacy).unwrap();
        formats::save(&source, source.config(), &again, Format::Llama2c, FileType::F32, &no_extras()).unwrap();
        let mut paths = vec![data("ckpt/stories260K_f32_ggufv1.gguf").unwrap(), legacy, again];
        if llama::model::Device::Flex != crate::support::device() {
            // A GPU in software makes a few tokens a second.
            paths.truncate(1);
            expected.truncate(32);
        }
        for path in paths {
            let checkpoint = Checkpoint::open(&path).unwrap();
            let model = checkpoint.load::<B::InnerBackend>(WeightFormat::F32, &device, |_| ()).unwrap();
            let options = GenerateOptions { max_new_tokens: expected.len(), sampling: Sampling::greedy(), ..Default::default() };
            let found = Generation::new(&model, &[vec![1]], options).unwrap().finish().unwrap();
            assert_eq!(found[0], expected, "{}", path.display());
            if let Ok(codec) = llama::text::codec(&path) {
                // The first token's space is the one that encoding puts before a text.
                let (found, text) = (codec.decode(&found[0]), oracle["greedy_text"].as_str().unwrap().trim_start());
                assert!(text.starts_with(&found), "{found}");
                assert_eq!(found.len() == text.len(), expected.len() == 256, "the whole text of all tokens");
            }
        }
    }
}

/// A checkpoint in each format, for files to break.
fn samples(folder: &Path) -> Vec<PathBuf> {
    let source = Checkpoint::open(&fixture("gqa")).unwrap();
    let save = |name: &str, format| {
        let path = folder.join(name);
        formats::save(&source, source.config(), &path, format, FileType::F32, &no_extras()).unwrap();
        path
    };
    let meta = save("meta", Format::Meta);
    let hf = save("hf", Format::HuggingFace);
    vec![
        save("model.gguf", Format::Gguf),
        save("model.bin", Format::Llama2c),
        meta.join("consolidated.00.pth"),
        hf.join("model.safetensors"),
    ]
}

/// The checkpoint of a file: itself or its folder.
fn opened(file: &Path) -> Result<(), String> {
    let in_folder = file.extension().is_some_and(|extension| extension == "pth" || extension == "safetensors");
    let path = if in_folder { file.parent().unwrap() } else { file };
    let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
    for (path, dims) in checkpoint.config().parameters() {
        checkpoint.weight(&path, &dims).map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[test]
fn truncated_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for file in samples(folder.path()) {
        assert_eq!(opened(&file), Ok(()));
        let whole = std::fs::read(&file).unwrap();
        for part in 0..60 {
            let len = whole.len() * part / 60;
            std::fs::write(&file, &whole[..len]).unwrap();
            assert!(opened(&file).is_err(), "{} at {len} bytes", file.display());
        }
        std::fs::write(&file, &whole).unwrap();
        assert_eq!(opened(&file), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Changed bytes: an error or other weights, never a panic, and never memory for what is not there. Most changes are
    /// where the headers are.
    #[test]
    fn changed_files_do_not_panic(changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..6), from_end in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        for file in samples(folder.path()) {
            let mut bytes = std::fs::read(&file).unwrap();
            for (at, value) in &changes {
                let at = if from_end { bytes.len() - 1 - at } else { *at };
                bytes[at] = *value;
            }
            std::fs::write(&file, &bytes).unwrap();
            let _ = opened(&file);
        }
    }
}

/// A GGUF file of metadata and tensor headers, each tensor's as name, dimensions, type and offset.
fn gguf(version: u32, values: &[(&str, u32, Vec<u8>)], tensors: &[(&str, Vec<u64>, u32, u64)], len: usize) -> Vec<u8> {
    let text = |text: &str| [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat();
    let mut out = [b"GGUF".as_slice(), &version.to_le_bytes(), &(tensors.len() as u64).to_le_bytes()].concat();
    out.extend((values.len() as u64).to_le_bytes());
    for (name, kind, value) in values {
        out.extend([text(name), kind.to_le_bytes().into(), value.clone()].concat());
    }
    for (name, dims, kind, offset) in tensors {
        out.extend([text(name), (dims.len() as u32).to_le_bytes().into()].concat());
        dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32) + len, 0);
    out
}

#[test]
fn hostile_gguf_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("evil.gguf");
    let huge = u64::MAX.to_le_bytes().to_vec();
    let array = |kind: u32, len: u64| [kind.to_le_bytes().as_slice(), &len.to_le_bytes()].concat();
    let nested = (0..10).flat_map(|_| array(9, 1)).chain(array(4, 0)).collect();
    let one = |dims: Vec<u64>, kind, offset| vec![("t", dims, kind, offset)];
    for (what, bytes, reason) in [
        ("version", gguf(9, &[], &[], 0), "version 9"),
        ("text longer than the file", gguf(3, &[("a", 8, huge)], &[], 0), "ends inside its header"),
        ("array longer than the file", gguf(3, &[("a", 9, array(4, u64::MAX / 2))], &[], 0), "ends inside its header"),
        ("too many values", gguf(3, &[("a", 9, array(0, 1 << 25))], &[], 1 << 25), "too many values"),
        ("arrays in arrays", gguf(3, &[("a", 9, nested)], &[], 0), "nested"),
        ("type of a value", gguf(3, &[("a", 77, vec![])], &[], 0), "unknown type 77"),
        ("alignment", gguf(3, &[("general.alignment", 4, 0u32.to_le_bytes().into())], &[], 0), "power of two"),
        ("same value twice", gguf(3, &[("a", 7, vec![1]), ("a", 7, vec![1])], &[], 0), "stands twice"),
        ("dimensions", gguf(3, &[], &one(vec![], 0, 0), 0), "0 dimensions"),
        ("overflow", gguf(3, &[], &one(vec![1 << 40, 1 << 40], 0, 0), 0), "cannot have the shape"),
        ("past the end", gguf(3, &[], &one(vec![100], 0, 0), 32), "past the end"),
        ("offset", gguf(3, &[], &one(vec![1], 0, u64::MAX - 31), 32), "past the end"),
        ("misaligned", gguf(3, &[], &one(vec![1], 0, 4), 64), "multiple of 32"),
        ("type of a tensor", gguf(3, &[], &one(vec![32], 99, 0), 64), "type number 99"),
        ("blocks", gguf(3, &[], &one(vec![33], 8, 0), 64), "cannot have the shape"),
        ("overlap", gguf(3, &[], &[("a", vec![16], 0, 0), ("b", vec![16], 0, 32)], 96), "overlap"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = GgufFile::open(&path).err().unwrap_or_else(|| panic!("{what} was accepted")).to_string();
        assert!(error.contains(reason) && error.contains("evil.gguf"), "{what}: {error}");
    }
}

#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let copy = |name: &str| {
        let to = path.join(name);
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    };
    let error = |path: &Path| opened(path).unwrap_err();
    let mentions = |error: String, parts: &[&str]| {
        parts.iter().for_each(|part| assert!(error.contains(part), "`{error}` does not mention `{part}`"));
    };

    let sharded = copy("gqa_sharded");
    std::fs::remove_file(sharded.join("model-00002-of-00002.safetensors")).unwrap();
    mentions(error(&sharded), &["model-00002-of-00002.safetensors"]);
    let second = "model-00001-of-00002.safetensors";
    std::fs::copy(sharded.join(second), sharded.join("model-00002-of-00002.safetensors")).unwrap();
    mentions(error(&sharded), &["stands in two files"]);

    let parts = copy("gqa_meta_mp2");
    std::fs::remove_file(parts.join("consolidated.01.pth")).unwrap();
    mentions(error(&parts), &["gqa_meta_mp2", "tok_embeddings.weight", "shape"]);

    let meta = copy("mha_meta");
    let params = meta.join("params.json");
    std::fs::write(
        &params,
        json!({ "dim": 32, "n_layers": 3, "n_heads": 4, "multiple_of": 8, "vocab_size": -1 }).to_string(),
    )
    .unwrap();
    mentions(error(&meta), &["layers.2", "missing"]);
    std::fs::write(&params, json!({ "dim": "wide", "n_layers": 2, "n_heads": 4 }).to_string()).unwrap();
    mentions(error(&meta), &["params.json", "dim"]);
    std::fs::write(meta.join("consolidated.00.pth"), b"PK\x03\x04 no").unwrap();
    mentions(error(&meta), &["consolidated.00.pth", "zip"]);

    let hf = copy("gqa");
    let mut config = json("gqa/config.json");
    config["num_hidden_layers"] = 1.into();
    std::fs::write(hf.join("config.json"), config.to_string()).unwrap();
    mentions(error(&hf), &["no place for", "model.layers.1."]);

    std::fs::write(path.join("text.txt"), "only text, longer than any header of the older files").unwrap();
    mentions(error(&path.join("text.txt")), &["not a GGUF"]);
    std::fs::create_dir(path.join("empty")).unwrap();
    mentions(error(&path.join("empty")), &["neither config.json"]);
    mentions(error(&path.join("nowhere")), &["nowhere"]);
}
