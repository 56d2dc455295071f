//! Generation: the engine speaks token ids, text lives at the edge.
//!
//! Prompts of different lengths run as one batch in the way of the released code: as many tokens as the shortest has are
//! read first (what all begin with only once, for all of them), and from then on a row whose prompt has not ended takes its
//! next prompt token instead of a sampled one.
//! All rows are thus always at the same position and no padding exists.
//!
//! [`Generation`] is the engine. A [`Session`] keeps what one generation has read for the next, as in a conversation;
//! [`Speculation`] lets a smaller model guess ahead; [`score()`] tells the log-probabilities of given texts.

mod sampling;
mod score;
mod speculative;

pub use sampling::{Sampler, Sampling};
pub use score::{ScoreRequest, score};
pub use speculative::Speculation;

use burn::tensor::{Int, Tensor, TensorData};

use crate::{KvCache, Llama, LlamaBackend, ModelError};

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
    /// Whether each token comes with its log-probability.
    pub log_probs: bool,
    /// Prompt tokens that are read in one pass, at most: bounds the memory that a long prompt takes.
    pub prefill_chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::default(),
            seed: 0,
            stop_tokens: Vec::new(),
            log_probs: false,
            prefill_chunk: 512,
        }
    }
}

/// How many tokens two texts begin with alike.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A token that was generated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generated {
    /// Its id.
    pub token: u32,
    /// Its natural log-probability by the model, whatever the sampling; where
    /// [`log_probs`](GenerateOptions::log_probs) asks for it.
    pub log_prob: Option<f32>,
}

impl Generated {
    fn new(token: u32, logits: &[f32], options: &GenerateOptions) -> Self {
        Self { token, log_prob: options.log_probs.then(|| log_prob(logits, token)) }
    }
}

/// `log softmax(logits)[token]`
fn log_prob(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    (f64::from(logits[token as usize] - max) - sum.ln()) as f32
}

/// What was read and generated of one text, for the next generation to go on from.
#[derive(Debug)]
pub struct Session<B: LlamaBackend> {
    cache: KvCache<B>,
    tokens: Vec<u32>,
}

impl<B: LlamaBackend> Session<B> {
    /// A session with a model, with room for `capacity` tokens.
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`] if the model's context is shorter.
    pub fn new(model: &Llama<B>, capacity: usize) -> Result<Self, ModelError> {
        Ok(Self { cache: KvCache::new(model, 1, capacity)?, tokens: Vec::new() })
    }

    /// Forgets all that `prompt` does not begin with, and leaves at least one of its tokens to read.
    fn keep_prefix_of(&mut self, prompt: &[u32]) {
        let common = common_prefix(&self.tokens, prompt);
        self.cache.truncate(common.min(prompt.len().saturating_sub(1)));
        self.tokens.truncate(self.cache.len());
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
    options: GenerateOptions,
    rows: Vec<Row>,
    started: bool,
    failed: bool,
}

impl<'a, B: LlamaBackend> Generation<'a, B> {
    /// Prepares a generation; nothing runs before the first step.
    ///
    /// # Errors
    /// [`ModelError::Generation`] for no or empty prompts or sampling out of range, [`ModelError::TokenOutOfRange`],
    /// and [`ModelError::SequenceTooLong`] if the longest prompt leaves no room for a token.
    pub fn new(model: &'a Llama<B>, prompts: &[Vec<u32>], options: GenerateOptions) -> Result<Self, ModelError> {
        check(model, prompts, &options)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let capacity = (longest + options.max_new_tokens).min(model.max_seq_len());
        let cache = KvCache::new(model, prompts.len(), capacity)?;
        Ok(Self::with_cache(model, cache, prompts, options))
    }

    /// One generation of a longer text: of the prompt, only what the session has not read yet is read.
    ///
    /// # Errors
    /// As [`new`](Self::new). A session that is full is the error [`ModelError::CacheFull`] of a step.
    pub fn in_session(
        model: &'a Llama<B>,
        mut session: Session<B>,
        prompt: Vec<u32>,
        options: GenerateOptions,
    ) -> Result<Self, ModelError> {
        let prompts = [prompt];
        check(model, &prompts, &options)?;
        session.keep_prefix_of(&prompts[0]);
        Ok(Self::with_cache(model, session.cache, &prompts, options))
    }

    fn with_cache(model: &'a Llama<B>, cache: KvCache<B>, prompts: &[Vec<u32>], options: GenerateOptions) -> Self {
        let row = |(prompt, stream): (&Vec<u32>, u64)| Row {
            prompt: prompt.clone(),
            tokens: Vec::new(),
            sampler: Sampler::new(options.sampling.clone(), options.seed, stream),
            done: options.max_new_tokens == 0,
        };
        let rows = prompts.iter().zip(0..).map(row).collect();
        Self { model, cache, options, rows, started: false, failed: false }
    }

    /// What was read and generated, for the next generation of the same text.
    ///
    /// # Panics
    /// If there are several prompts.
    pub fn into_session(self) -> Session<B> {
        let [row] = <[Row; 1]>::try_from(self.rows).unwrap_or_else(|_| panic!("a session has one text"));
        let mut tokens = row.tokens;
        // The last token was chosen but not read.
        tokens.truncate(self.cache.len());
        Session { cache: self.cache, tokens }
    }

    /// Runs to the end and returns each row's generated tokens, without prompt and stop token.
    ///
    /// # Errors
    /// As the steps'.
    pub fn finish(mut self) -> Result<Vec<Vec<u32>>, ModelError> {
        let mut generated = vec![Vec::new(); self.rows.len()];
        for step in &mut self {
            for (row, new) in generated.iter_mut().zip(step?) {
                row.extend(new.map(|new| new.token));
            }
        }
        Ok(generated)
    }

    /// Reads what all prompts begin with once, where that saves more than a pass of its own costs.
    fn read_shared(&mut self) -> Result<(), ModelError> {
        let Some((first, others)) = self.rows.split_first() else { return Ok(()) };
        let shared = |row: &Row| common_prefix(&first.prompt, &row.prompt).min(row.prompt.len() - 1);
        let shared = others.iter().map(shared).min().unwrap_or(0).min(first.prompt.len() - 1);
        if shared * others.len() <= PASS {
            return Ok(());
        }
        let mut one = self.cache.empty_like(1, shared);
        absorb(self.model, &mut one, &first.prompt[..shared], self.options.prefill_chunk)?;
        self.cache.begin_with(&one);
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<Option<Generated>>, ModelError> {
        if !self.started {
            self.read_shared()?;
        }
        // The first pass reads what every prompt has, later ones the token each row got last.
        let start = self.cache.len();
        let end =
            if self.started { start + 1 } else { self.rows.iter().map(|row| row.prompt.len()).min().unwrap_or(0) };
        let known = self.rows.iter().map(|row| if row.tokens.is_empty() { &row.prompt } else { &row.tokens });
        let known: Vec<&[u32]> = known.map(|tokens| &tokens[start..end]).collect();
        let logits = read(self.model, &mut self.cache, &known, 1, self.options.prefill_chunk)?;
        self.started = true;

        let mut generated = Vec::with_capacity(self.rows.len());
        for (row, logits) in self.rows.iter_mut().zip(logits.chunks_exact(self.model.vocab_size())) {
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
                    (token, (!stop).then(|| Generated::new(token, logits, &self.options)))
                }
            };
            row.tokens.push(token);
            generated.push(new);
        }
        Ok(generated)
    }
}

/// What a pass over the weights costs, in tokens of a batch.
const PASS: usize = 64;

/// Rows of one length as a tensor.
fn input<'t, B: LlamaBackend>(rows: impl ExactSizeIterator<Item = &'t [u32]>, device: &B::Device) -> Tensor<B, 2, Int> {
    let count = rows.len();
    let ids: Vec<i32> = rows.flatten().map(|&token| token as i32).collect();
    let len = ids.len() / count.max(1);
    Tensor::from_data(TensorData::new(ids, [count, len]), device)
}

/// Reads tokens of one sequence into its cache, in chunks.
fn absorb<B: LlamaBackend>(
    model: &Llama<B>,
    cache: &mut KvCache<B>,
    tokens: &[u32],
    chunk: usize,
) -> Result<(), ModelError> {
    for part in tokens.chunks(chunk) {
        model.hidden(input(std::iter::once(part), &model.device()), Some(cache))?;
    }
    Ok(())
}

fn check<B: LlamaBackend>(model: &Llama<B>, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<(), ModelError> {
    options.sampling.validate()?;
    if prompts.is_empty() {
        return Err(ModelError::Generation("there are no prompts".into()));
    }
    if options.prefill_chunk == 0 {
        return Err(ModelError::Generation("prefill_chunk must be at least 1".into()));
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
    Ok(())
}

/// Reads rows of tokens of one length, in chunks, and returns the logits after the last `count` of each row.
fn read<B: LlamaBackend>(
    model: &Llama<B>,
    cache: &mut KvCache<B>,
    rows: &[&[u32]],
    count: usize,
    chunk: usize,
) -> Result<Vec<f32>, ModelError> {
    let len = rows.first().map_or(0, |row| row.len());
    let mut start = 0;
    loop {
        // The last chunk has all whose logits are wanted.
        let end = if len - start <= chunk.max(count) { len } else { (start + chunk).min(len - count) };
        let hidden = model.hidden(input(rows.iter().map(|row| &row[start..end]), &model.device()), Some(cache))?;
        if end == len {
            let last = hidden.narrow(1, end - start - count, count);
            let logits = model.head(last).into_data().convert::<f32>();
            return logits.into_vec::<f32>().map_err(|error| ModelError::Generation(format!("{error:?}")));
        }
        start = end;
    }
}

impl<B: LlamaBackend> Iterator for Generation<'_, B> {
    type Item = Result<Vec<Option<Generated>>, ModelError>;

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
