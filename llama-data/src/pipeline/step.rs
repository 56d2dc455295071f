//! The rules a configuration can name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::clean::books::Books;
use crate::clean::c4::C4;
use crate::clean::github::{GitHub, PERMISSIVE};
use crate::clean::html::Html;
use crate::clean::latex::Arxiv;
use crate::clean::wikitext::Wikipedia;
use crate::clean::{Clean, Tally};
use crate::dedup::minhash::MinHash;
use crate::filter::fasttext::FastText;
use crate::filter::ngram::{NgramModel, Units};
use crate::filter::{Language, Perplexity, Quality};
use crate::source::Document;
use crate::tokenizer::Tokenizer;

/// A rule with its thresholds; those that are not named have the values of their module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Step {
    /// [`crate::clean::c4`].
    C4 {
        /// Words of a line.
        #[serde(default = "c4_words")]
        min_words: usize,
        /// Sentences of a page.
        #[serde(default = "c4_sentences")]
        min_sentences: usize,
        /// Characters of a word.
        #[serde(default = "c4_word")]
        max_word: usize,
        /// File of words, one a line, that drop a page.
        #[serde(default)]
        bad_words: Option<PathBuf>,
    },
    /// [`crate::clean::github`].
    Github {
        /// Beginnings of SPDX identifiers; an empty list keeps every file.
        #[serde(default = "github_licenses")]
        licenses: Vec<String>,
        /// Characters of a line.
        #[serde(default = "github_max_line")]
        max_line: usize,
        /// Mean characters of a line.
        #[serde(default = "github_mean_line")]
        mean_line: f64,
        /// Share of alphanumeric characters.
        #[serde(default = "github_alphanumeric")]
        alphanumeric: f64,
    },
    /// [`crate::clean::wikitext`].
    Wikipedia {
        /// Characters of an article.
        #[serde(default = "hundred")]
        min_chars: usize,
    },
    /// [`crate::clean::books`].
    Books {
        /// Characters of a book.
        #[serde(default = "thousand")]
        min_chars: usize,
    },
    /// [`crate::clean::latex`].
    Arxiv {
        /// Characters of a paper.
        #[serde(default = "hundred")]
        min_chars: usize,
    },
    /// [`crate::clean::html`].
    Html {},
    /// Documents of these lengths only.
    Length {
        /// Characters at least.
        #[serde(default)]
        min_chars: usize,
        /// Characters at most.
        #[serde(default = "unlimited")]
        max_chars: usize,
    },
    /// [`Language`].
    Language {
        /// fastText model.
        model: PathBuf,
        /// Languages.
        keep: Vec<String>,
        /// Probability.
        #[serde(default = "half")]
        min_probability: f32,
    },
    /// [`Perplexity`].
    Perplexity {
        /// ARPA file.
        model: PathBuf,
        /// SentencePiece model whose pieces the language model was trained on.
        #[serde(default)]
        tokenizer: Option<PathBuf>,
        /// Largest perplexity.
        max: f64,
    },
    /// [`Quality`].
    Quality {
        /// fastText model.
        model: PathBuf,
        /// The label that is kept.
        label: String,
        /// Its probability.
        #[serde(default = "half")]
        min_probability: f32,
    },
    /// Lines that occurred before, in whatever document.
    DuplicateLines {},
    /// Documents that occurred before.
    DuplicateDocuments {},
    /// Documents that are nearly one that occurred before.
    NearDuplicates {
        /// Jaccard similarity of the sets of shingles.
        similarity: f64,
        /// Words of a shingle.
        #[serde(default = "five")]
        shingle: usize,
    },
}

fn c4_words() -> usize {
    C4::default().min_words
}
fn c4_sentences() -> usize {
    C4::default().min_sentences
}
fn c4_word() -> usize {
    C4::default().max_word
}
fn github_licenses() -> Vec<String> {
    PERMISSIVE.map(String::from).into()
}
fn github_max_line() -> usize {
    GitHub::default().max_line
}
fn github_mean_line() -> f64 {
    GitHub::default().mean_line
}
fn github_alphanumeric() -> f64 {
    GitHub::default().alphanumeric
}
fn hundred() -> usize {
    100
}
fn thousand() -> usize {
    1000
}
fn unlimited() -> usize {
    usize::MAX
}
fn half() -> f32 {
    0.5
}
fn five() -> usize {
    5
}

/// A comparison of all documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Dedup {
    Lines,
    Documents,
    Near(MinHash),
}

impl Step {
    pub(super) fn c4() -> Self {
        Self::C4 { min_words: c4_words(), min_sentences: c4_sentences(), max_word: c4_word(), bad_words: None }
    }

    pub(super) fn github() -> Self {
        Self::Github {
            licenses: github_licenses(),
            max_line: github_max_line(),
            mean_line: github_mean_line(),
            alphanumeric: github_alphanumeric(),
        }
    }

    /// The files it names.
    pub(super) fn files(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Language { model, .. } | Self::Quality { model, .. } => vec![model],
            Self::Perplexity { model, tokenizer, .. } => std::iter::once(model).chain(tokenizer).collect(),
            Self::C4 { bad_words, .. } => bad_words.iter_mut().collect(),
            _ => Vec::new(),
        }
    }

    /// What it is, if it looks at all documents.
    pub(super) fn dedup(&self) -> Option<Dedup> {
        match *self {
            Self::DuplicateLines {} => Some(Dedup::Lines),
            Self::DuplicateDocuments {} => Some(Dedup::Documents),
            Self::NearDuplicates { similarity, shingle } => Some(Dedup::Near(MinHash { shingle, similarity })),
            _ => None,
        }
    }

    /// The rule, its models loaded. Rules over all documents are none of this kind.
    ///
    /// # Errors
    /// Those of reading its files.
    pub(super) fn load(&self) -> Result<Option<Box<dyn Clean>>, DataError> {
        let fasttext = |model: &Path| FastText::load(model).map(Arc::new);
        Ok(Some(match self.clone() {
            Self::C4 { min_words, min_sentences, max_word, bad_words } => {
                let bad_words = match bad_words {
                    Some(file) => {
                        let text = std::fs::read_to_string(&file).map_err(|error| DataError::io(&file, error))?;
                        text.lines().map(|line| line.trim().to_lowercase()).filter(|line| !line.is_empty()).collect()
                    }
                    None => Vec::new(),
                };
                Box::new(C4 { min_words, min_sentences, max_word, bad_words })
            }
            Self::Github { licenses, max_line, mean_line, alphanumeric } => {
                Box::new(GitHub { licenses, max_line, mean_line, alphanumeric, ..Default::default() })
            }
            Self::Wikipedia { min_chars } => Box::new(Wikipedia { min_chars }),
            Self::Books { min_chars } => Box::new(Books { min_chars }),
            Self::Arxiv { min_chars } => Box::new(Arxiv { min_chars }),
            Self::Html {} => Box::new(Html),
            Self::Length { min_chars, max_chars } => Box::new(Length { min_chars, max_chars }),
            Self::Language { model, keep, min_probability } => {
                Box::new(Language { model: fasttext(&model)?, keep, min_probability })
            }
            Self::Perplexity { model, tokenizer, max } => {
                let units = match tokenizer {
                    Some(file) => Units::pieces(Tokenizer::load(&file)?),
                    None => Units::Words,
                };
                Box::new(Perplexity { model: Arc::new(NgramModel::load_arpa(&model, units)?), max })
            }
            Self::Quality { model, label, min_probability } => {
                let classifier = fasttext(&model)?;
                if !classifier.labels().contains(&label) {
                    let reason = format!("there is no label `{label}`; there are {}", classifier.labels().join(", "));
                    return Err(DataError::format(&model, reason));
                }
                Box::new(Quality { model: classifier, label, min_probability })
            }
            Self::DuplicateLines {} | Self::DuplicateDocuments {} | Self::NearDuplicates { .. } => return Ok(None),
        }))
    }
}

struct Length {
    min_chars: usize,
    max_chars: usize,
}

impl Clean for Length {
    fn clean(&self, document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        let chars = document.text.chars().count();
        if chars < self.min_chars {
            return tally.drop("length: short", bytes);
        }
        match chars > self.max_chars {
            true => tally.drop("length: long", bytes),
            false => Some(document),
        }
    }
}
