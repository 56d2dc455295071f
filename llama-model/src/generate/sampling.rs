//! Choosing the next token from logits, on the host.

use std::borrow::Cow;
use std::cmp::Ordering;

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
    /// [`ModelError::Generation`] if no logit is a number, or one is infinite.
    pub fn sample(&mut self, logits: &[f32], past: &[u32]) -> Result<u32, ModelError> {
        Ok(self.draw(&self.distribution(logits, past)?))
    }

    /// The tokens that may be chosen, with their probabilities.
    pub(super) fn distribution(&self, logits: &[f32], past: &[u32]) -> Result<Vec<(u32, f64)>, ModelError> {
        let Sampling { repetition_penalty, temperature, top_k, top_p } = self.sampling;
        let logits = match repetition_penalty {
            1.0 => Cow::Borrowed(logits),
            penalty => Cow::Owned(penalised(logits, past, penalty)),
        };
        let max = largest(&logits);
        if !max.is_finite() {
            return Err(not_finite(max));
        }
        let tokens = (0u32..).zip(logits.iter().copied()).filter(|(_, logit)| !logit.is_nan());
        // As good as zero, if its inverse is infinite.
        if temperature < f32::MIN_POSITIVE {
            return Ok(tokens.filter(|(_, logit)| *logit == max).take(1).map(|(token, _)| (token, 1.0)).collect());
        }
        let scale = Scale { max, inverse: temperature.recip() };
        let mut weights = match (top_k, top_p) {
            (None, None) => scale.weights(tokens),
            (None, Some(p)) => nucleus(tokens, scale, f64::from(p)),
            (Some(k), None) => scale.weights(most_likely(tokens, k).into_iter()),
            (Some(k), Some(p)) => nucleus(most_likely(tokens, k).into_iter(), scale, f64::from(p)),
        };
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

/// Divides the positive and multiplies the negative logits of `past`.
fn penalised(logits: &[f32], past: &[u32], penalty: f32) -> Vec<f32> {
    let (mut logits, mut seen) = (logits.to_vec(), past.to_vec());
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    logits
}

/// The largest that is a number; in lanes, which are compared at once.
fn largest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in logits.chunks(lanes.len()) {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(*logit);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Tokens and their logits, or weights; the most likely first, and the lower id first among equals.
fn by_likelihood<T: Into<f64> + Copy>(a: &(u32, T), b: &(u32, T)) -> Ordering {
    b.1.into().total_cmp(&a.1.into()).then(a.0.cmp(&b.0))
}

/// The `k` most likely tokens.
fn most_likely(tokens: impl Iterator<Item = (u32, f32)>, k: usize) -> Vec<(u32, f32)> {
    let mut best = Vec::new();
    let mut least = f32::NEG_INFINITY;
    let keep = |best: &mut Vec<(u32, f32)>| {
        best.select_nth_unstable_by(k - 1, by_likelihood);
        best.truncate(k);
        best[k - 1].1
    };
    // Of equals the later ones are not better.
    for (token, logit) in tokens {
        if best.len() < k || logit > least {
            best.push((token, logit));
            if best.len() == k.saturating_mul(2) {
                least = keep(&mut best);
            }
        }
    }
    if best.len() > k {
        keep(&mut best);
    }
    best
}

/// From logits to weights.
#[derive(Clone, Copy)]
struct Scale {
    max: f32,
    /// One over the temperature.
    inverse: f32,
}

impl Scale {
    /// How far a logit is below the largest, in temperatures.
    fn depth(self, logit: f32) -> f32 {
        (self.max - logit) * self.inverse
    }

    /// Of which the largest is 1.
    fn weight(self, logit: f32) -> f64 {
        f64::from((-self.depth(logit)).exp())
    }

    fn weights(self, tokens: impl Iterator<Item = (u32, f32)>) -> Vec<(u32, f64)> {
        tokens.map(|(token, logit)| (token, self.weight(logit))).collect()
    }
}

/// The most likely tokens, in order, as long as those before them sum to at most `p` of all weights.
///
/// Sorting a whole vocabulary takes as long as a small model's token. So weights are first summed by their tokens' depth, and only
/// tokens that are as deep as the nucleus reaches are sorted.
fn nucleus(tokens: impl Iterator<Item = (u32, f32)> + Clone, scale: Scale, p: f64) -> Vec<(u32, f64)> {
    const DEPTHS: usize = 64;
    let mut sums = [0.0; DEPTHS];
    for (_, logit) in tokens.clone() {
        // The last is for all that are deeper.
        sums[scale.depth(logit).min(DEPTHS as f32 - 1.0) as u8 as usize] += scale.weight(logit);
    }
    let total: f64 = sums.iter().sum();
    let mut sum_above = 0.0;
    let last = sums[..DEPTHS - 1].iter().position(|sum| {
        sum_above += sum;
        // By more than what adding in another order makes of it.
        sum_above > total * p * (1.0 + 1e-9)
    });
    let mut weights = match last {
        Some(last) => scale.weights(tokens.filter(|(_, logit)| scale.depth(*logit) < last as f32 + 1.0)),
        None => scale.weights(tokens),
    };
    weights.sort_unstable_by(by_likelihood);
    let mut before = 0.0;
    let kept = weights.iter().take_while(|(_, weight)| {
        let keep = before / total <= p;
        before += weight;
        keep
    });
    let kept = kept.count();
    weights.truncate(kept);
    weights
}

fn not_finite(max: f32) -> ModelError {
    let what = if max > 0.0 { "a logit is infinite" } else { "no logit is a finite number (NaN, infinity)" };
    ModelError::Generation(format!("{what}; the weights are broken, or too large for their precision"))
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
    fn top_k_keeps_k_and_of_equals_the_first() {
        let top = Sampling { temperature: 1.0, top_k: Some(2), ..Sampling::greedy() };
        close(&frequencies(top, &logits(), &[]), &[0.0, 0.625, 0.0, 0.375]);
        let logits: Vec<f32> = (0..999u32).map(|i| (i * 7919 % 101) as f32).collect();
        for k in [1, 2, 10, 500, 998, 999, 2000, usize::MAX] {
            let mut expected: Vec<u32> = (0..999).collect();
            expected.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            expected.truncate(k);
            let mut found: Vec<u32> = most_likely((0..).zip(logits.iter().copied()), k).iter().map(|x| x.0).collect();
            expected.sort_unstable();
            found.sort_unstable();
            assert_eq!(found, expected, "{k}");
        }
    }

    #[test]
    fn the_nucleus_keeps_the_token_that_crosses_p() {
        let nucleus = |p| Sampling { temperature: 1.0, top_p: Some(p), ..Sampling::greedy() };
        close(&frequencies(nucleus(0.6), &logits(), &[]), &[0.0, 0.625, 0.0, 0.375]);
        close(&frequencies(nucleus(0.4), &logits(), &[]), &[0.0, 1.0, 0.0, 0.0]);
        close(&frequencies(nucleus(1.0), &logits(), &[]), &[0.15, 0.5, 0.05, 0.3]);
    }

    /// Against sorting everything and walking, for vocabularies from peaked to flat, with ties.
    #[test]
    fn the_nucleus_is_that_of_a_sorted_vocabulary() {
        for (seed, spread) in [0.0f32, 0.1, 1.0, 4.0, 30.0].into_iter().enumerate() {
            let noise = |i: u32| ((i * 7919 + seed as u32 * 104_729) % 2003) as f32 / 2003.0;
            let logits: Vec<f32> = (0..5000).map(|i| spread * noise(i).powi(3)).collect();
            for (p, temperature) in [(0.1f32, 1.0f32), (0.5, 0.7), (0.95, 0.8), (1.0, 1.0), (0.999, 3.0)] {
                let max = largest(&logits);
                let weight = |x: &f32| f64::from(((x - max) * temperature.recip()).exp());
                let mut expected: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(weight)).collect();
                expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let total: f64 = expected.iter().map(|(_, weight)| weight).sum();
                let mut before = 0.0;
                expected.retain(|(_, weight)| {
                    before += weight;
                    (before - weight) / total <= f64::from(p)
                });
                let sampling = Sampling { temperature, top_p: Some(p), ..Sampling::greedy() };
                let found = Sampler::new(sampling, 0, 0).distribution(&logits, &[]).unwrap();
                // Sums in another order may decide otherwise about one token.
                assert!(found.len().abs_diff(expected.len()) <= 1, "{spread} {p}: {} {}", found.len(), expected.len());
                let kept: f64 = expected.iter().map(|(_, weight)| weight).sum();
                for ((token, found), (expected, weight)) in found.iter().zip(&expected) {
                    assert_eq!(token, expected, "{spread} {p}");
                    assert!((found - weight / kept).abs() < 1e-3 * found, "{spread} {p}: {found}");
                }
            }
        }
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
        for sampling in
            [Sampling::greedy(), Sampling::default(), Sampling { temperature: 1e-40, ..Sampling::default() }]
        {
            let mut sampler = Sampler::new(sampling, 0, 0);
            for broken in [[f32::NAN; 2], [f32::NEG_INFINITY; 2], [1.0, f32::INFINITY]] {
                let error = sampler.sample(&broken, &[]).expect_err("no number is the largest").to_string();
                assert!(error.contains("infini"), "{error}");
            }
            assert_eq!(sampler.sample(&[f32::NAN, 1.0, f32::NEG_INFINITY], &[]).unwrap(), 1);
        }
    }
}
