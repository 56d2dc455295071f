//! Generation: batches, chunks and sessions, speculation, the end of the context.

use burn::tensor::Tensor;
use llama::model::generate::{GenerateOptions, Generated, Generation, Sampling, Session, Speculation};
use llama::model::{LlamaConfig, ModelError};

use crate::behaviour::{small, tokens};
use crate::support::{close, device_test, floats, ints, tolerance};

device_test! {
    fn generation_in_a_batch_equals_generation_alone<B>(device) {
        let config = small();
        let model = config.init::<B::InnerBackend>(5, &device).unwrap();
        let prompts: Vec<Vec<u32>> =
            [3, 9, 5].iter().zip(0..).map(|(len, seed)| tokens(*len, seed).iter().map(|&t| t as u32).collect()).collect();
        let generate = |prompts: &[Vec<u32>], stop_tokens: Vec<u32>| {
            let options =
                GenerateOptions { max_new_tokens: 12, sampling: Sampling::greedy(), stop_tokens, ..Default::default() };
            Generation::new(&model, prompts, options).unwrap().finish().unwrap()
        };
        let together = generate(&prompts, vec![]);
        for (prompt, tokens) in prompts.iter().zip(&together) {
            assert_eq!(tokens.len(), 12);
            assert_eq!(generate(std::slice::from_ref(prompt), vec![])[0], *tokens);
        }
        // What all begin with is read once, where it is long.
        let beginning: Vec<u32> = tokens(40, 7).iter().map(|&t| t as u32).collect();
        let longer: Vec<Vec<u32>> = prompts.iter().map(|prompt| [&beginning[..], prompt].concat()).collect();
        for prompts in [longer.clone(), vec![longer[0].clone(); 3]] {
            for (prompt, tokens) in prompts.iter().zip(generate(&prompts, vec![])) {
                assert_eq!(generate(std::slice::from_ref(prompt), vec![])[0], tokens);
            }
        }
        // A stop token ends its row before it, and the others go on.
        let stop = together[1][4];
        let stopped = generate(&prompts, vec![stop]);
        for (row, tokens) in stopped.iter().enumerate() {
            let end = together[row].iter().position(|&token| token == stop).unwrap_or(12);
            assert_eq!(tokens[..], together[row][..end]);
        }
    }
}

device_test! {
    fn prompts_are_read_in_chunks_and_sessions_go_on<B>(device) {
        let config = small();
        let model = config.init::<B::InnerBackend>(5, &device).unwrap();
        let prompt: Vec<u32> = tokens(21, 3).iter().map(|&t| t as u32).collect();
        let options = |prefill_chunk| GenerateOptions {
            max_new_tokens: 6, sampling: Sampling::greedy(), prefill_chunk, log_probs: true, ..Default::default()
        };
        let expected: Vec<Generated> = Generation::new(&model, std::slice::from_ref(&prompt), options(512))
            .unwrap()
            .flat_map(|step| step.unwrap().into_iter().flatten())
            .collect();
        let ids: Vec<u32> = expected.iter().map(|new| new.token).collect();
        // Log-probabilities are those that the loss has.
        let text: Vec<i64> = prompt.iter().chain(&ids).map(|&t| i64::from(t)).collect();
        let dims = [1, text.len() - 1];
        let losses = model.token_losses(ints(&text[..dims[1]], dims, &device), ints(&text[1..], dims, &device)).unwrap();
        let losses = &floats(losses)[prompt.len() - 1..];
        let found: Vec<f64> = expected.iter().map(|new| -f64::from(new.log_prob.unwrap())).collect();
        close("log-probabilities", &found, losses, tolerance(1e-5, 1.0));

        for chunk in [1, 4, 20, 21] {
            let found = Generation::new(&model, std::slice::from_ref(&prompt), options(chunk)).unwrap().finish();
            assert_eq!(found.unwrap()[0], ids, "in chunks of {chunk}");
        }
        // A conversation: the same tokens, whether its beginning is read again or not.
        let mut session = Session::new(&model, 32).unwrap();
        for (turn, len) in [(1, 12), (2, 21), (3, 15), (4, 21)] {
            let part = prompt[..len].to_vec();
            let alone = Generation::new(&model, std::slice::from_ref(&part), options(8)).unwrap().finish().unwrap();
            let mut generation = Generation::in_session(&model, session, part, options(8)).unwrap();
            let found: Vec<u32> = generation.by_ref().flat_map(|step| step.unwrap()[0]).map(|new| new.token).collect();
            assert_eq!(found, alone[0], "turn {turn}");
            session = generation.into_session();
        }
    }
}

device_test! {
    /// Whatever the draft guesses, greedy tokens are the model's own.
    fn speculation_gives_the_models_tokens<B>(device) {
        let config = LlamaConfig { max_seq_len: 48, ..small() };
        let model = config.init::<B::InnerBackend>(5, &device).unwrap();
        let draft_config = LlamaConfig { n_layers: 1, ..config.clone() };
        let drafts = [config.init(5, &device).unwrap(), draft_config.init(6, &device).unwrap()];
        let prompt: Vec<u32> = tokens(7, 3).iter().map(|&t| t as u32).collect();
        let options = |stop_tokens| GenerateOptions {
            max_new_tokens: 17, sampling: Sampling::greedy(), stop_tokens, ..Default::default()
        };
        let expected =
            Generation::new(&model, std::slice::from_ref(&prompt), options(vec![])).unwrap().finish().unwrap();
        let speculate = |draft: usize, guesses, options| {
            Speculation::new(&model, &drafts[draft], guesses, prompt.clone(), options)
        };
        for (draft, guesses) in [(0, 1), (0, 5), (1, 3), (1, 30)] {
            let found = speculate(draft, guesses, options(vec![])).unwrap().finish().unwrap();
            assert_eq!(found, expected[0], "draft {draft}, {guesses} guesses");
            let stop = expected[0][6];
            let end = expected[0].iter().position(|&token| token == stop).unwrap();
            assert_eq!(speculate(draft, guesses, options(vec![stop])).unwrap().finish().unwrap(), expected[0][..end]);
        }
        // The same model as draft: all guesses are kept.
        let rounds: Vec<_> = speculate(0, 5, options(vec![])).unwrap().map(|round| round.unwrap().len()).collect();
        assert_eq!(rounds, [6, 6, 5]);
        // The context ends in a round: what came before it stands.
        let long = GenerateOptions { max_new_tokens: 100, ..options(vec![]) };
        let rounds: Vec<_> = speculate(1, 4, long).unwrap().collect();
        assert!(matches!(rounds.last().unwrap(), Err(ModelError::CacheFull { .. })));
        let count: usize = rounds.iter().flatten().map(Vec::len).sum();
        assert_eq!(count, 48 - 7 + 1);
        assert!(speculate(0, 0, options(vec![])).is_err());
    }
}

#[test]
fn speculation_keeps_the_distribution() {
    use burn::backend::Flex;
    let device = Default::default();
    let config = LlamaConfig {
        vocab_size: 5,
        d_model: 16,
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: 8,
        n_layers: 1,
        ..LlamaConfig::tiny(5)
    };
    let (model, draft) = (config.init::<Flex>(1, &device).unwrap(), config.init::<Flex>(2, &device).unwrap());
    // Wide logits, so that the two differ.
    let widen = |model: llama::model::Llama<Flex>, factor: f64| {
        struct Scale(f64);
        impl<B: burn::tensor::backend::Backend> llama::model::weights::ParamMap<B> for Scale {
            fn map<const D: usize>(&mut self, _: &str, value: Tensor<B, D>) -> Tensor<B, D> {
                if D > 1 { value.mul_scalar(self.0) } else { value }
            }
        }
        llama::model::weights::map_params(model, &mut Scale(factor))
    };
    let (model, draft) = (widen(model, 12.0), widen(draft, 12.0));
    const RUNS: usize = 12_000;
    let mut counts = [[0.0f64; 125]; 3];
    for seed in 0..RUNS as u64 {
        let sampling = Sampling { temperature: 1.0, top_p: Some(0.95), ..Sampling::greedy() };
        let options = GenerateOptions { max_new_tokens: 3, sampling, seed, ..Default::default() };
        let prompt = vec![1, 2];
        let alone =
            |model| Generation::new(model, std::slice::from_ref(&prompt), options.clone()).unwrap().finish().unwrap();
        let (plain, other) = (alone(&model), alone(&draft));
        let guessed = Speculation::new(&model, &draft, 2, prompt.clone(), options.clone()).unwrap();
        let guessed = guessed.finish().unwrap();
        for (counts, tokens) in counts.iter_mut().zip([&plain[0], &guessed, &other[0]]) {
            counts[tokens.iter().fold(0, |index, token| 5 * index + *token as usize)] += 1.0;
        }
    }
    // Half the sum of absolute differences of the frequencies. Two samples of one distribution over 125 texts differ by up
    // to 0.4 sqrt(2 / RUNS) sqrt(125) = 0.058 on average.
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / (2 * RUNS) as f64;
    let [plain, guessed, other] = &counts;
    assert!(distance(plain, guessed) < 0.07, "{}", distance(plain, guessed));
    assert!(distance(plain, other) > 0.2, "the draft is another model: {}", distance(plain, other));
}

device_test! {
    fn generation_ends_where_the_context_does<B>(device) {
        let config = LlamaConfig { max_seq_len: 16, ..small() };
        let model = config.init::<B::InnerBackend>(5, &device).unwrap();
        let options = GenerateOptions { max_new_tokens: 50, sampling: Sampling::greedy(), ..Default::default() };
        let start = |prompt: &[u32]| Generation::new(&model, &[prompt.to_vec()], options.clone());
        let steps: Vec<_> = start(&[1, 2, 3]).unwrap().collect();
        // Positions 3 to 16: the last token needs no place in the cache.
        assert_eq!(steps.iter().filter(|step| step.is_ok()).count(), 14);
        assert!(matches!(steps.last().unwrap(), Err(ModelError::CacheFull { .. })));
        assert!(matches!(start(&[1; 17]).err().unwrap(), ModelError::SequenceTooLong { .. }));
        assert!(matches!(start(&[259]).err().unwrap(), ModelError::TokenOutOfRange { token: 259, .. }));
        assert!(matches!(start(&[]).err().unwrap(), ModelError::Generation(_)));
    }
}
