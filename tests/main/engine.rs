//! A checkpoint on a device chosen at run time gives what the generic code below it gives.

use std::path::Path;

use llama::data::tokenizer::Tokenizer;
use llama::model::generate::{GenerateOptions, Generated, Generation, Sampling, ScoreRequest};
use llama::model::{LlamaConfig, ModelError, Precision, WeightFormat, hf};
use llama::{Engine, EngineOptions, Error};

use crate::behaviour::small;
use crate::support::{close, device, device_test, floats, ints, tolerance};

fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, sampling: Sampling::greedy(), ..Default::default() }
}

fn tokens(steps: llama::engine::Steps) -> Vec<u32> {
    steps.flat_map(|step| step.unwrap()[0]).map(|new: Generated| new.token).collect()
}

device_test! {
    fn an_engine_is_its_model<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::bytes();
        let config = LlamaConfig { vocab_size: tokenizer.vocab_size(), max_seq_len: 64, ..small() };
        let model = config.init::<B::InnerBackend>(5, &device).unwrap();
        hf::save(&model, &config, folder.path()).unwrap();
        tokenizer.save(&folder.path().join("tokenizer.model")).unwrap();
        // On one device, and divided among two.
        let one = crate::support::device().to_string();
        for devices in [one.clone(), format!("{one},{one}")] {
            let engine = Engine::open(folder.path(), devices.parse().unwrap()).unwrap();
            let prompts: Vec<Vec<u32>> = ["fn main", "a longer one"].map(|text| engine.codec().encode_prompt(text)).into();
            let expected = Generation::new(&model, &prompts, greedy(9)).unwrap().finish().unwrap();

            let mut found = vec![Vec::new(); 2];
            for step in engine.generate(&prompts, greedy(9)).unwrap() {
                for (row, new) in found.iter_mut().zip(step.unwrap()) {
                    row.extend(new.map(|new| new.token));
                }
            }
            assert_eq!(found, expected);
            let rounds = engine.speculate(&engine, 3, prompts[0].clone(), greedy(9)).unwrap();
            assert_eq!(rounds.flat_map(|round| round.unwrap()).map(|new| new.token).collect::<Vec<_>>(), expected[0]);
            let texts = engine.complete(&["fn main"], greedy(9), &[]).unwrap();
            let mut stream = engine.codec().stream(true);
            let text: String = expected[0].iter().map(|id| stream.push(*id)).collect();
            assert_eq!(texts[0], text + &stream.finish());

            // Two threads at a time.
            std::thread::scope(|scope| {
                let generate = |row: usize| tokens(engine.generate(&prompts[row..=row], greedy(9)).unwrap());
                let other = scope.spawn(move || generate(1));
                assert_eq!((generate(0), other.join().unwrap()), (expected[0].clone(), expected[1].clone()));
            });

            // A session goes on whatever came before: a generation, one that was given up or refused.
            let mut session = engine.session(40).unwrap();
            assert_eq!(tokens(session.generate(prompts[0].clone(), greedy(9)).unwrap()), expected[0]);
            session.generate(prompts[1].clone(), greedy(9)).unwrap().next();
            assert!(session.generate(Vec::new(), greedy(9)).is_err());
            assert_eq!(tokens(session.generate(prompts[1].clone(), greedy(9)).unwrap()), expected[1]);
            let text = engine.codec().encode_prompt("a longer text");
            let ids: Vec<i64> = text.iter().map(|id| i64::from(*id)).collect();
            let dims = [1, ids.len() - 1];
            let losses = model.token_losses(ints(&ids[..dims[1]], dims, &device), ints(&ids[1..], dims, &device)).unwrap();
            let losses: Vec<f64> = floats(losses).iter().map(|loss| -loss).collect();
            // Whatever is scored together: other ends of the same text, other texts, long and short.
            let request = |tokens: &[u32], from| ScoreRequest { tokens: tokens.to_vec(), from };
            let mut requests: Vec<_> = [1, text.len() - 1, 4, 1].map(|from| request(&text, from)).into();
            requests.extend((2..text.len()).map(|len| request(&text[..len], 1)));
            let other: Vec<u32> = prompts[1].iter().chain(&expected[1]).copied().collect();
            requests.push(request(&other, 3));
            requests.push(request(&text, text.len()));
            let found = engine.score(&requests).unwrap();
            for (request, found) in requests.iter().zip(&found).filter(|(request, _)| request.tokens != other) {
                let found: Vec<f64> = found.iter().map(|log_prob| f64::from(*log_prob)).collect();
                let expected = &losses[request.from - 1..request.tokens.len() - 1];
                close("log-probabilities", &found, expected, tolerance(1e-5, 1.0));
            }
            let alone = engine.score(&[request(&other, 3)]).unwrap().remove(0);
            let alone: Vec<f64> = alone.into_iter().map(f64::from).collect();
            let together: Vec<f64> = found[requests.len() - 2].iter().map(|log_prob| f64::from(*log_prob)).collect();
            close("alone and together", &alone, &together, tolerance(1e-5, 1.0));
            let fails = |tokens: &[u32], from| engine.score(&[request(tokens, from)]).unwrap_err();
            assert!(matches!(fails(&text, 0), ModelError::Generation(_)));
            assert!(matches!(fails(&text, 50), ModelError::Generation(_)));
            assert!(matches!(fails(&[1, 400], 1), ModelError::TokenOutOfRange { token: 400, .. }));
            assert!(matches!(fails(&[1; 66], 1), ModelError::SequenceTooLong { len: 65, max: 64 }));
            assert_eq!(engine.score(&[request(&[1; 65], 1)]).unwrap()[0].len(), 64);
        }
    }
}

/// What a cache keeps suits the weights, unless it is chosen.
#[test]
fn caches_are_short_where_weights_are() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::bytes();
    let config = LlamaConfig { vocab_size: tokenizer.vocab_size(), d_ff: 96, ..small() };
    hf::save(&config.init::<burn::backend::Flex>(5, &Default::default()).unwrap(), &config, folder.path()).unwrap();
    tokenizer.save(&folder.path().join("tokenizer.model")).unwrap();
    let log_probs = |weights, cache| -> Vec<f32> {
        let options = EngineOptions { weights: Some(weights), cache, ..EngineOptions::new("flex".parse().unwrap()) };
        let engine = Engine::open_with(folder.path(), &options, &llama::data::NoProgress).unwrap();
        let options = GenerateOptions { log_probs: true, ..greedy(6) };
        let steps = engine.generate(&[engine.codec().encode_prompt("fn main")], options).unwrap();
        steps.flat_map(|step| step.unwrap()[0]).filter_map(|new| new.log_prob).collect()
    };
    for (weights, suits, other) in [
        (WeightFormat::F32, Precision::F32, Precision::F16),
        (WeightFormat::Bf16, Precision::F16, Precision::F32),
        (WeightFormat::Q8, Precision::F16, Precision::Bf16),
    ] {
        let found = log_probs(weights, None);
        assert_eq!(found.len(), 6);
        assert_eq!(found, log_probs(weights, Some(suits)), "{weights}");
        assert_ne!(found, log_probs(weights, Some(other)), "{weights}");
    }
}

#[test]
fn what_does_not_go_together_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, cpu) = (Tokenizer::bytes(), Default::default());
    let saved = |vocab_size: usize| {
        let (config, path) = (LlamaConfig { vocab_size, ..small() }, folder.path().join(vocab_size.to_string()));
        hf::save(&config.init::<burn::backend::Flex>(5, &cpu).unwrap(), &config, &path).unwrap();
        path
    };
    let open = |path: &Path, adapter: Option<&Path>| {
        let options = EngineOptions { adapter: adapter.map(Path::to_path_buf), ..EngineOptions::new(device().into()) };
        Engine::open_with(path, &options, &llama::data::NoProgress)
    };
    let small = saved(200);
    assert!(open(&small, None).err().unwrap().to_string().contains("tokenizer"));
    tokenizer.save(&small.join("tokenizer.model")).unwrap();
    let error = open(&small, None).err().unwrap();
    assert!(matches!(error, Error::Vocabulary { tokenizer: 259, model: 200 }), "{error}");
    let error = open(&folder.path().join("nowhere"), None).err().unwrap().to_string();
    assert!(error.contains("nowhere"), "{error}");
    let path = saved(259);
    tokenizer.save(&path.join("tokenizer.model")).unwrap();
    let error = open(&path, Some(&small)).err().unwrap().to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
    assert!(matches!(open(&path, None).unwrap().session(1 << 20), Err(ModelError::SequenceTooLong { .. })));
    let among = |count: usize| vec![device().to_string(); count].join(",").parse().unwrap();
    let error = Engine::open(&path, among(4)).err().unwrap().to_string();
    assert!(error.contains("n_kv_heads is 2, which 4 devices cannot divide"), "{error}");
}
