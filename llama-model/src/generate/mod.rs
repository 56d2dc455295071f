//! Generation: the engine speaks token ids, text lives at the edge.
//!
//! Prompts of different lengths run as one batch in the way of the released code: the prefix that all have is read in
//! one pass, and from then on a row whose prompt has not ended takes its next prompt token instead of a sampled one.
//! All rows are thus always at the same position and no padding exists.

mod sampling;

pub use sampling::{Sampler, Sampling};

use burn::tensor::{Int, Tensor, TensorData};

use crate::{KvCache, Llama, LlamaBackend, LlamaConfig, ModelError};

/// What to generate, beside the prompts.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate for each prompt, at most.
    pub max_new_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Seed of the random numbers. Each row has a stream of its own.
    pub seed: u64,
    /// Tokens that end a row; they are not part of the result.
    pub stop_tokens: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, sampling: Sampling::default(), seed: 0, stop_tokens: Vec::new() }
    }
}

struct Row {
    prompt: Vec<u32>,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    sampler: Sampler,
    done: bool,
}

/// A running generation: an iterator over steps. Each item has one entry per prompt: the token generated in this step,
/// or `None` where the row is still inside its prompt or has ended.
pub struct Generation<'a, B: LlamaBackend> {
    model: &'a Llama<B>,
    cache: KvCache<B>,
    device: B::Device,
    options: GenerateOptions,
    rows: Vec<Row>,
    failed: bool,
}

impl<'a, B: LlamaBackend> Generation<'a, B> {
    /// Prepares a generation; nothing runs before the first step.
    ///
    /// # Errors
    /// [`ModelError::Generation`] for no or empty prompts or sampling out of range, [`ModelError::TokenOutOfRange`],
    /// and [`ModelError::SequenceTooLong`] if the longest prompt leaves no room for a token.
    pub fn new(
        model: &'a Llama<B>,
        config: &LlamaConfig,
        prompts: &[Vec<u32>],
        options: GenerateOptions,
        device: &B::Device,
    ) -> Result<Self, ModelError> {
        options.sampling.validate()?;
        if prompts.is_empty() {
            return Err(ModelError::Generation("there are no prompts".into()));
        }
        if prompts.iter().any(Vec::is_empty) {
            return Err(ModelError::Generation("a prompt has no tokens; begin it with the BOS token".into()));
        }
        let vocab_size = model.vocab_size();
        if let Some(&token) = prompts.iter().flatten().find(|&&token| token as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { token, vocab_size });
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let max = model.max_seq_len();
        if longest > max {
            return Err(ModelError::SequenceTooLong { len: longest, max });
        }
        let capacity = (longest + options.max_new_tokens).min(max);
        let rows = prompts
            .iter()
            .zip(0..)
            .map(|(prompt, row)| Row {
                prompt: prompt.clone(),
                tokens: Vec::new(),
                sampler: Sampler::new(options.sampling.clone(), options.seed, row),
                done: options.max_new_tokens == 0,
            })
            .collect();
        let cache = KvCache::new(config, prompts.len(), capacity, device)?;
        Ok(Self { model, cache, device: device.clone(), options, rows, failed: false })
    }

    /// Runs to the end and returns each row's generated tokens, without prompt and stop token.
    ///
    /// # Errors
    /// As the steps'.
    pub fn finish(mut self) -> Result<Vec<Vec<u32>>, ModelError> {
        let mut generated = vec![Vec::new(); self.rows.len()];
        for step in &mut self {
            for (row, token) in generated.iter_mut().zip(step?) {
                row.extend(token);
            }
        }
        Ok(generated)
    }

    fn step(&mut self) -> Result<Vec<Option<u32>>, ModelError> {
        // The first pass reads what every prompt has, later ones the token each row got last.
        let start = self.cache.len();
        let end = match start {
            0 => self.rows.iter().map(|row| row.prompt.len()).min().unwrap_or(0),
            _ => start + 1,
        };
        let input: Vec<i32> = self
            .rows
            .iter()
            .flat_map(|row| {
                let known = if row.tokens.is_empty() { &row.prompt } else { &row.tokens };
                known[start..end].iter().map(|&token| token as i32)
            })
            .collect();
        let input = TensorData::new(input, [self.rows.len(), end - start]);
        let input = Tensor::<B, 2, Int>::from_data(input, &self.device);
        let hidden = self.model.hidden(input, Some(&mut self.cache))?;
        let last = hidden.narrow(1, end - start - 1, 1);
        let logits = self.model.head(last).into_data().convert::<f32>();
        let logits = logits.as_slice::<f32>().map_err(|error| ModelError::Generation(format!("{error:?}")))?;
        let vocab_size = self.model.vocab_size();

        let mut generated = Vec::with_capacity(self.rows.len());
        for (row, logits) in self.rows.iter_mut().zip(logits.chunks_exact(vocab_size)) {
            if row.tokens.is_empty() {
                row.tokens.extend_from_slice(&row.prompt[..end]);
            }
            // A row past its end goes on with its last token, so that the batch stays rectangular.
            let (token, new) = match row.prompt.get(end) {
                Some(&token) => (token, None),
                None if row.done => (row.tokens[end - 1], None),
                None => {
                    let token = row.sampler.sample(logits, &row.tokens)?;
                    let stop = self.options.stop_tokens.contains(&token);
                    let count = end + 1 - row.prompt.len();
                    row.done = stop || count >= self.options.max_new_tokens;
                    (token, (!stop).then_some(token))
                }
            };
            row.tokens.push(token);
            generated.push(new);
        }
        Ok(generated)
    }
}

impl<B: LlamaBackend> Iterator for Generation<'_, B> {
    type Item = Result<Vec<Option<u32>>, ModelError>;

    /// The next step, until every row has ended. A context that is full before that is the error
    /// [`ModelError::CacheFull`], once; what was generated before it stands.
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.rows.iter().all(|row| row.done) {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        Some(step)
    }
}
