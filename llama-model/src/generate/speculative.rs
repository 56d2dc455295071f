//! Speculative decoding (Leviathan et al. 2023; Chen et al. 2023): a smaller model with the same vocabulary guesses a few
//! tokens, the model checks them in one pass. What comes out is distributed as if the model had sampled alone, and greedy
//! generation gives the same tokens.
//!
//! A guess `x` is kept with probability `min(1, p(x) / q(x))`, where `p` is the model's distribution and `q` the smaller
//! one's; at the first that is not, a token is drawn from `max(0, p - q)` instead.

use super::{GenerateOptions, Generated, Sampler, check, read};
use crate::{KvCache, Llama, LlamaBackend, ModelError};

/// A model with what it has read.
struct Reader<'a, B: LlamaBackend> {
    model: &'a Llama<B>,
    cache: KvCache<B>,
}

impl<B: LlamaBackend> Reader<'_, B> {
    /// Reads what it has not read of `tokens`, and returns the logits after each of the last `count`.
    fn logits(&mut self, tokens: &[u32], count: usize, options: &GenerateOptions) -> Result<Vec<Vec<f32>>, ModelError> {
        let new = &tokens[self.cache.len()..];
        let logits = read(self.model, &mut self.cache, &[new], count, options.prefill_chunk)?;
        Ok(logits.chunks_exact(self.model.vocab_size()).map(<[f32]>::to_vec).collect())
    }
}

/// A running speculative generation: an iterator over rounds, each of one token or more.
pub struct Speculation<'a, B: LlamaBackend> {
    target: Reader<'a, B>,
    draft: Reader<'a, B>,
    /// Tokens that the draft guesses at a time, at most.
    guesses: usize,
    options: GenerateOptions,
    sampler: Sampler,
    prompt_len: usize,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    done: bool,
}

impl<'a, B: LlamaBackend> Speculation<'a, B> {
    /// Prepares a generation of `target` with guesses of `draft`; nothing runs before the first round.
    ///
    /// # Errors
    /// As [`Generation::new`](super::Generation::new), for either model, and [`ModelError::Generation`] if they have
    /// different vocabularies or nothing is to be guessed.
    pub fn new(
        target: &'a Llama<B>,
        draft: &'a Llama<B>,
        guesses: usize,
        prompt: Vec<u32>,
        options: GenerateOptions,
    ) -> Result<Self, ModelError> {
        if target.vocab_size() != draft.vocab_size() {
            return Err(ModelError::Generation(format!(
                "the draft has a vocabulary of {}, the model one of {}",
                draft.vocab_size(),
                target.vocab_size()
            )));
        }
        if guesses == 0 {
            return Err(ModelError::Generation("the draft must guess a token at least".into()));
        }
        check(target, std::slice::from_ref(&prompt), &options)?;
        check(draft, std::slice::from_ref(&prompt), &options)?;
        let room = prompt.len() + options.max_new_tokens + guesses;
        let reader = |model: &'a Llama<B>| {
            let cache = KvCache::new(model, 1, room.min(model.max_seq_len()))?;
            Ok::<_, ModelError>(Reader { model, cache })
        };
        Ok(Self {
            target: reader(target)?,
            draft: reader(draft)?,
            guesses,
            sampler: Sampler::new(options.sampling.clone(), options.seed, 0),
            done: options.max_new_tokens == 0,
            options,
            prompt_len: prompt.len(),
            tokens: prompt,
        })
    }

    /// Runs to the end and returns the generated tokens.
    ///
    /// # Errors
    /// As the rounds'.
    pub fn finish(self) -> Result<Vec<u32>, ModelError> {
        let rounds: Vec<Vec<Generated>> = self.collect::<Result<_, _>>()?;
        Ok(rounds.into_iter().flatten().map(|new| new.token).collect())
    }

    fn round(&mut self) -> Result<Vec<Generated>, ModelError> {
        let left = self.options.max_new_tokens - (self.tokens.len() - self.prompt_len);
        let room = [&self.target, &self.draft].map(|reader| reader.cache.capacity().saturating_sub(self.tokens.len()));
        let guesses = self.guesses.min(left - 1).min(room[0]).min(room[1]);
        let mut guessed = Vec::with_capacity(guesses);
        let mut tokens = self.tokens.clone();
        for _ in 0..guesses {
            let logits = self.draft.logits(&tokens, 1, &self.options)?;
            let distribution = self.sampler.distribution(&logits[0], &tokens)?;
            let token = self.sampler.draw(&distribution);
            tokens.push(token);
            guessed.push((token, distribution));
        }
        let checked = self.target.logits(&tokens, guesses + 1, &self.options)?;

        let mut new = Vec::with_capacity(guesses + 1);
        for (i, logits) in checked.iter().enumerate() {
            let mut wanted = self.sampler.distribution(logits, &self.tokens)?;
            let (token, kept) = match guessed.get(i) {
                None => (self.sampler.draw(&wanted), false),
                Some((token, guess)) => {
                    let of = |distribution: &[(u32, f64)], token: u32| {
                        distribution.iter().find(|(other, _)| *other == token).map_or(0.0, |(_, weight)| *weight)
                    };
                    if self.sampler.uniform() * of(guess, *token) < of(&wanted, *token) {
                        (*token, true)
                    } else {
                        let guess: std::collections::HashMap<u32, f64> = guess.iter().copied().collect();
                        for (token, weight) in &mut wanted {
                            *weight = (*weight - guess.get(token).copied().unwrap_or(0.0)).max(0.0);
                        }
                        (self.sampler.draw(&wanted), false)
                    }
                }
            };
            if self.options.stop_tokens.contains(&token) {
                self.done = true;
                break;
            }
            self.tokens.push(token);
            new.push(Generated::new(token, logits, &self.options));
            if !kept {
                break;
            }
        }
        self.done |= self.tokens.len() - self.prompt_len >= self.options.max_new_tokens;
        // What was read of guesses that were not kept is forgotten; the last token is read with the next round.
        for reader in [&mut self.target, &mut self.draft] {
            reader.cache.truncate(self.tokens.len() - 1);
        }
        Ok(new)
    }
}

impl<B: LlamaBackend> Iterator for Speculation<'_, B> {
    type Item = Result<Vec<Generated>, ModelError>;

    /// The next round, until the text has ended. A context that is full before that is the error
    /// [`ModelError::CacheFull`], once.
    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let round = self.round();
        self.done |= round.is_err();
        Some(round)
    }
}
