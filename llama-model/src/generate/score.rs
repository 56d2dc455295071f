//! Log-probabilities of given texts, as evaluation needs them: texts that share their beginning are read from where they part.

use burn::tensor::{Int, Tensor, TensorData, activation};

use super::Session;
use crate::{Llama, LlamaBackend, ModelError};

/// Positions that are read in one pass, at most.
const PASS: usize = 512;
/// Positions whose logits exist at a time.
const LOGITS: usize = 128;

impl<B: LlamaBackend> Session<B> {
    /// Natural log-probability of each of `tokens[from..]`, given all tokens before it. Of `tokens`, only what the session
    /// has not read yet is read; logits exist of 128 positions at a time.
    ///
    /// # Errors
    /// [`ModelError::Generation`] if nothing comes before `from`, [`ModelError::TokenOutOfRange`], and
    /// [`ModelError::CacheFull`] or [`ModelError::SequenceTooLong`] if they are too many.
    pub fn score(
        &mut self,
        model: &Llama<B>,
        tokens: &[u32],
        from: usize,
        device: &B::Device,
    ) -> Result<Vec<f32>, ModelError> {
        if from == 0 || from > tokens.len() {
            let reason = format!("tokens from {from} of {} cannot be scored: something must come before", tokens.len());
            return Err(ModelError::Generation(reason));
        }
        let vocab_size = model.vocab_size();
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { token, vocab_size });
        }
        self.keep_prefix_of(&tokens[..from]);
        let ids = |range: std::ops::Range<usize>| {
            let ids: Vec<i32> = tokens[range.clone()].iter().map(|&token| token as i32).collect();
            Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [range.len()]), device)
        };
        // The last token is only predicted.
        let end = tokens.len() - 1;
        let mut log_probs = Vec::with_capacity(tokens.len() - from);
        while self.cache.len() < end {
            let start = self.cache.len();
            let stop = end.min(start + PASS);
            let hidden = model.hidden(ids(start..stop).unsqueeze(), Some(&mut self.cache))?;
            self.tokens.extend_from_slice(&tokens[start..stop]);
            let mut first = start.max(from - 1);
            while first < stop {
                let last = stop.min(first + LOGITS);
                let wanted = hidden.clone().narrow(1, first - start, last - first);
                let logits = model.head(wanted).reshape([last - first, vocab_size]);
                let targets = ids(first + 1..last + 1).reshape([last - first, 1]);
                let new = activation::log_softmax(logits, 1).gather(1, targets).into_data().convert::<f32>();
                log_probs.extend(new.into_vec::<f32>().map_err(|error| ModelError::Generation(format!("{error:?}")))?);
                first = last;
            }
        }
        Ok(log_probs)
    }
}
