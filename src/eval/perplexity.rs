//! How well a model predicts texts.

use std::path::PathBuf;

use llama_data::Progress;
use llama_data::source::Sources;
use llama_model::generate::ScoreRequest;
use serde::Serialize;

use super::likelihood::beginning;
use crate::{Engine, Error};

/// How well a model predicts texts. Figures by word and by byte can be compared between tokenizers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Texts that were read.
    pub documents: usize,
    /// Their tokens, of which each was predicted once.
    pub tokens: u64,
    /// Their words, parted by whitespace.
    pub words: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sum of the natural log-probabilities of all tokens.
    pub log_likelihood: f64,
}

impl Perplexity {
    /// `exp` of the mean loss of a token.
    pub fn per_token(&self) -> f64 {
        (-self.log_likelihood / self.tokens as f64).exp()
    }

    /// `exp` of the mean loss of a word.
    pub fn per_word(&self) -> f64 {
        (-self.log_likelihood / self.words as f64).exp()
    }

    /// Mean loss of a byte in bits.
    pub fn bits_per_byte(&self) -> f64 {
        -self.log_likelihood / self.bytes as f64 / std::f64::consts::LN_2
    }
}

/// Windows that are scored together.
const TOGETHER: usize = 16;

/// Perplexity of files and folders: text, or JSON lines with `text`. A text is predicted in windows of `window` tokens that do not
/// overlap, the first after BOS, the others after the last token of the one before, as the evaluation harness does.
///
/// # Errors
/// For what cannot be read, texts without a token, and a window of 0 or longer than the model's context.
pub fn perplexity(
    engine: &Engine,
    paths: &[PathBuf],
    window: usize,
    progress: &dyn Progress,
) -> Result<Perplexity, Error> {
    let max = engine.config().max_seq_len;
    if window == 0 || window > max {
        return Err(Error::Evaluation(format!("a window of {window} tokens: the model's context has 1 to {max}")));
    }
    let mut sum = Perplexity { documents: 0, tokens: 0, words: 0, bytes: 0, log_likelihood: 0.0 };
    let first = beginning(engine)?;
    let files = Sources::new(paths).files()?;
    progress.start("bytes", Some(files.iter().map(|file| file.bytes).sum()));
    for file in files {
        for document in file.documents()? {
            let text = document?.text;
            let tokens = engine.codec().encode(&text);
            sum.documents += 1;
            sum.tokens += tokens.len() as u64;
            sum.words += text.split_whitespace().count() as u64;
            sum.bytes += text.len() as u64;
            let mut before = first;
            let mut requests = Vec::new();
            for part in tokens.chunks(window) {
                let tokens = std::iter::once(before).chain(part.iter().copied()).collect();
                requests.push(ScoreRequest { tokens, from: 1 });
                before = *part.last().unwrap_or(&before);
            }
            for requests in requests.chunks(TOGETHER) {
                let log_probs = engine.score(requests)?.into_iter().flatten();
                sum.log_likelihood += log_probs.map(f64::from).sum::<f64>();
            }
        }
        progress.advance(file.bytes);
    }
    progress.finish();
    if sum.tokens == 0 {
        return Err(Error::Evaluation("the texts have no token".into()));
    }
    Ok(sum)
}
