//! Filters that a model decides: the language of a page ([`fasttext`]), how much it reads like an encyclopedia ([`ngram`]), and whether it
//! resembles the pages Wikipedia cites ([`fasttext`], trained by [`train`]).

pub mod fasttext;
pub mod ngram;
mod ngram_train;
mod parser;
mod quantized;
pub mod train;

use std::sync::Arc;

use crate::clean::{Clean, Tally, ccnet};
use crate::source::Document;
use fasttext::FastText;
use ngram::NgramModel;

/// Keeps documents in some languages and writes the language into their metadata (paper: "performs language identification with
/// a fastText linear classifier to remove non-English pages").
#[derive(Clone, Debug)]
pub struct Language {
    /// `lid.176.bin` or `lid.176.ftz`.
    pub model: Arc<FastText>,
    /// Codes of the languages that are kept, as in the model's labels.
    pub keep: Vec<String>,
    /// Smallest probability; CCNet's is 0.5.
    pub min_probability: f32,
}

impl Clean for Language {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        let Some((label, probability)) = self.model.predict(&document.text, 1).pop() else {
            return tally.drop("language: no words", bytes);
        };
        let language = label.strip_prefix("__label__").unwrap_or(&label);
        if probability < self.min_probability {
            return tally.drop("language: uncertain", bytes);
        }
        if !self.keep.iter().any(|keep| keep == language) {
            return tally.drop("language: other", bytes);
        }
        document.meta.insert("language".into(), language.into());
        document.meta.insert("language_score".into(), format!("{probability:.4}"));
        Some(document)
    }
}

/// Keeps documents that a language model finds probable enough (paper: "filters low quality content with an n-gram language model").
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// The model.
    pub model: Arc<NgramModel>,
    /// Largest perplexity per word. CCNet keeps a share of the pages ("head" and "middle" thirds): its bounds are percentiles of a sample.
    pub max: f64,
}

impl Clean for Perplexity {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        let perplexity = self.model.perplexity(document.text.lines().map(ccnet::normalize));
        if perplexity > self.max {
            return tally.drop("perplexity: high", bytes);
        }
        document.meta.insert("perplexity".into(), format!("{perplexity:.1}"));
        Some(document)
    }
}

/// Keeps documents that a classifier gives a label (paper: "trained a linear model to classify pages used as references in Wikipedia v.s.
/// randomly sampled pages, and discarded pages not classified as references").
#[derive(Clone, Debug)]
pub struct Quality {
    /// The classifier.
    pub model: Arc<FastText>,
    /// The label that is kept, with its prefix.
    pub label: String,
    /// Its smallest probability; 0.5 is the paper's "classified as".
    pub min_probability: f32,
}

impl Clean for Quality {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        let predicted = self.model.predict(&document.text, usize::MAX);
        let probability = predicted.iter().find(|(label, _)| *label == self.label).map_or(0.0, |(_, p)| *p);
        if probability < self.min_probability {
            return tally.drop("quality: not like a reference", bytes);
        }
        document.meta.insert("quality".into(), format!("{probability:.4}"));
        Some(document)
    }
}
