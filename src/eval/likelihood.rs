//! Log-likelihoods of completions.

use llama_model::ModelError;
use llama_model::generate::{ScoreRequest, common_prefix};

use super::question::{Candidate, Rule};
use crate::Engine;

/// A completion after its context. Spaces at the end of the context count to the completion, as in the evaluation harness; where
/// both are cut into other tokens than the context alone, scoring begins with the first of those.
pub(super) fn request(engine: &Engine, context: &str, completion: &str) -> Result<ScoreRequest, ModelError> {
    let codec = engine.codec();
    let mut tokens = codec.encode_prompt(&format!("{context}{completion}"));
    let before = codec.encode_prompt(context.trim_end());
    let mut from = common_prefix(&tokens, &before).min(tokens.len().max(1) - 1);
    if from == 0 {
        tokens.insert(0, beginning(engine)?);
        from = 1;
    }
    Ok(ScoreRequest { tokens, from })
}

/// Takes the beginning off a text that is longer than the model's context. Says whether it did.
fn fit(request: &mut ScoreRequest, max_seq_len: usize) -> bool {
    // The last token is only predicted.
    let excess = request.tokens.len().saturating_sub(max_seq_len + 1);
    request.tokens.drain(..excess);
    request.from = request.from.saturating_sub(excess).max(1);
    excess > 0
}

/// The token that a text without context comes after.
pub(super) fn beginning(engine: &Engine) -> Result<u32, ModelError> {
    let codec = engine.codec();
    let reason = "the tokenizer has neither BOS nor EOS, one of which a text without context must come after";
    codec.bos.or(codec.eos).ok_or_else(|| ModelError::Generation(reason.into()))
}

/// What was found of a request.
#[derive(Clone, Copy, Default)]
pub(super) struct Scored {
    /// Sum of the natural log-probabilities.
    pub log_prob: f64,
    /// How many tokens they are of.
    pub tokens: usize,
    /// Whether the beginning did not fit into the context.
    pub cut: bool,
}

/// Scores requests, and returns them in their order.
pub(super) fn score(engine: &Engine, mut requests: Vec<ScoreRequest>) -> Result<Vec<Scored>, ModelError> {
    let max_seq_len = engine.config().max_seq_len;
    let cut: Vec<bool> = requests.iter_mut().map(|request| fit(request, max_seq_len)).collect();
    let scored = engine.score(&requests)?.into_iter().zip(cut).map(|(log_probs, cut)| {
        let log_prob = log_probs.iter().map(|log_prob| f64::from(*log_prob)).sum();
        Scored { log_prob, tokens: log_probs.len(), cut }
    });
    Ok(scored.collect())
}

impl Rule {
    /// What is compared of a completion; `unconditional` is its log-likelihood after the rule's own context.
    pub fn value(self, candidate: &Candidate, scored: Scored, unconditional: Option<Scored>) -> f64 {
        match self {
            Self::Sum => scored.log_prob,
            Self::PerCharacter => scored.log_prob / candidate.completion.trim().chars().count().max(1) as f64,
            Self::PerToken => scored.log_prob / scored.tokens.max(1) as f64,
            Self::Unconditional(_) => scored.log_prob - unconditional.map_or(0.0, |other| other.log_prob),
        }
    }
}
