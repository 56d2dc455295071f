//! Choosing the next token from logits, on the host.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ModelError;

/// How a token is chosen. The filters apply in the order of the fields; all are off in [`Sampling::greedy`].
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides positive and multiplies negative logits of tokens that occurred before (Keskar et al., CTRL); 1 is off.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f32,
    /// Keeps the most likely `k` tokens.
    pub top_k: Option<usize>,
    /// Keeps the most likely tokens as long as those before them sum to at most `p` (the released code's nucleus, so
    /// the token that crosses `p` is kept).
    pub top_p: Option<f32>,
}

impl Default for Sampling {
    /// The released code's: temperature 0.8, nucleus 0.95.
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 0.8, top_k: None, top_p: Some(0.95) }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { repetition_penalty: 1.0, temperature: 0.0, top_k: None, top_p: None }
    }

    /// # Errors
    /// [`ModelError::Generation`] names the field that is out of range.
    pub fn validate(&self) -> Result<(), ModelError> {
        let fail = |message: String| Err(ModelError::Generation(message));
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return fail(format!("temperature must be 0 or above, but is {}", self.temperature));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return fail(format!("repetition_penalty must be above 0, but is {}", self.repetition_penalty));
        }
        if self.top_k == Some(0) {
            return fail("top_k must be at least 1".into());
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return fail(format!("top_p must be above 0 and at most 1, but is {p}"));
        }
        Ok(())
    }
}

/// A [`Sampling`] with its random numbers.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Sampler number `stream` of `seed`.
    pub fn new(sampling: Sampling, seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self { sampling, rng }
    }

    /// Chooses a token. `past` are the sequence's tokens so far, for the repetition penalty.
    ///
    /// # Errors
    /// [`ModelError::Generation`] if no logit is a number.
    pub fn sample(&mut self, logits: &[f32], past: &[u32]) -> Result<u32, ModelError> {
        Ok(self.draw(&self.distribution(logits, past)?))
    }

    /// The tokens that may be chosen and their probabilities, the most likely first.
    pub(super) fn distribution(&self, logits: &[f32], past: &[u32]) -> Result<Vec<(u32, f64)>, ModelError> {
        let Sampling { repetition_penalty, temperature, top_k, top_p } = self.sampling;
        let mut logits = logits.to_vec();
        if repetition_penalty != 1.0 {
            let mut seen = past.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
                }
            }
        }
        // Most likely first, and the lower id first among equals.
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&token| !logits[token as usize].is_nan()).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if temperature == 0.0 {
            return order.into_iter().min_by(by_logit).map(|token| vec![(token, 1.0)]).ok_or_else(no_numbers);
        }
        if let Some(k) = top_k.filter(|&k| k < order.len()) {
            order.select_nth_unstable_by(k - 1, by_logit);
            order.truncate(k);
        }
        order.sort_unstable_by(by_logit);
        let &first = order.first().ok_or_else(no_numbers)?;

        let max = logits[first as usize];
        let weight = |token: u32| (f64::from(logits[token as usize] - max) / f64::from(temperature)).exp();
        let mut weights: Vec<(u32, f64)> = order.into_iter().map(|token| (token, weight(token))).collect();
        if let Some(p) = top_p {
            let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
            let mut before = 0.0;
            let kept = weights.iter().take_while(|(_, weight)| {
                let keep = before / total <= f64::from(p);
                before += weight;
                keep
            });
            let kept = kept.count();
            weights.truncate(kept);
        }
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.iter_mut().for_each(|(_, weight)| *weight /= total);
        Ok(weights)
    }

    /// One of the tokens of a distribution, which need not be normalised.
    pub(super) fn draw(&mut self, distribution: &[(u32, f64)]) -> u32 {
        let [(first, _), rest @ ..] = distribution else { unreachable!("a distribution has a token") };
        if rest.is_empty() {
            return *first;
        }
        let mut left = self.uniform() * distribution.iter().map(|(_, weight)| weight).sum::<f64>();
        for (token, weight) in distribution {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        distribution[distribution.len() - 1].0
    }

    /// A number from 0 to 1.
    pub(super) fn uniform(&mut self) -> f64 {
        self.rng.random()
    }
}

fn no_numbers() -> ModelError {
    ModelError::Generation("the logits are not numbers (NaN); the weights are broken".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(sampling: Sampling, logits: &[f32], past: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling, 1, 0);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.sample(logits, past).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 0.02), "{found:?}, expected {expected:?}");
    }

    /// Logits of probabilities 0.5, 0.3, 0.15, 0.05 in shuffled order.
    fn logits() -> [f32; 4] {
        [0.15f32.ln(), 0.5f32.ln(), 0.05f32.ln(), 0.3f32.ln()]
    }

    #[test]
    fn temperature_one_samples_the_distribution() {
        let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
        close(&frequencies(plain, &logits(), &[]), &[0.15, 0.5, 0.05, 0.3]);
    }

    #[test]
    fn greedy_takes_the_largest_and_the_first_of_equals() {
        let mut sampler = Sampler::new(Sampling::greedy(), 0, 0);
        assert_eq!(sampler.sample(&logits(), &[]).unwrap(), 1);
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0], &[]).unwrap(), 1);
    }

    #[test]
    fn top_k_keeps_k() {
        let top = Sampling { temperature: 1.0, top_k: Some(2), ..Sampling::greedy() };
        close(&frequencies(top, &logits(), &[]), &[0.0, 0.625, 0.0, 0.375]);
    }

    #[test]
    fn the_nucleus_keeps_the_token_that_crosses_p() {
        let nucleus = |p| Sampling { temperature: 1.0, top_p: Some(p), ..Sampling::greedy() };
        close(&frequencies(nucleus(0.6), &logits(), &[]), &[0.0, 0.625, 0.0, 0.375]);
        close(&frequencies(nucleus(0.4), &logits(), &[]), &[0.0, 1.0, 0.0, 0.0]);
        close(&frequencies(nucleus(1.0), &logits(), &[]), &[0.15, 0.5, 0.05, 0.3]);
    }

    #[test]
    fn repetition_is_penalised_whatever_the_sign() {
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut sampler = Sampler::new(penalty, 0, 0);
        assert_eq!(sampler.sample(&[3.0, 2.0], &[0, 0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]).unwrap(), 1);
    }

    #[test]
    fn seeds_repeat_and_streams_differ() {
        let draw = |seed, stream| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, ..Sampling::greedy() }, seed, stream);
            (0..50).map(|_| sampler.sample(&[0.0; 100], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3, 0), draw(3, 0));
        assert_ne!(draw(3, 0), draw(3, 1));
        assert_ne!(draw(3, 0), draw(4, 0));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            Sampling { temperature: -1.0, ..Sampling::greedy() },
            Sampling { temperature: f32::NAN, ..Sampling::greedy() },
            Sampling { top_k: Some(0), ..Sampling::greedy() },
            Sampling { top_p: Some(1.5), ..Sampling::greedy() },
            Sampling { repetition_penalty: 0.0, ..Sampling::greedy() },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
        assert!(Sampler::new(Sampling::greedy(), 0, 0).sample(&[f32::NAN; 3], &[]).is_err());
    }
}
