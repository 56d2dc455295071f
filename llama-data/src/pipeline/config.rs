//! What to prepare, as a TOML file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::step::Step;
use crate::DataError;
use crate::read::Format;

/// A preparation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareConfig {
    /// Folder of everything that is written.
    pub output: PathBuf,
    /// Bytes of input files that one task reads, about: small files are put together, a larger file is one task.
    #[serde(default = "default_shard_bytes")]
    pub shard_bytes: u64,
    /// Share of the documents held out for validation, chosen by their hash.
    #[serde(default = "default_valid_fraction")]
    pub valid_fraction: f64,
    /// Bytes of one record at most; longer ones are reported as broken.
    #[serde(default = "default_record_bytes")]
    pub record_bytes: usize,
    /// The tokenizer.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
    /// Models that recipes ask for.
    #[serde(default)]
    pub models: Models,
    /// What to read.
    pub source: Vec<SourceConfig>,
}

fn default_shard_bytes() -> u64 {
    256 << 20
}

fn default_valid_fraction() -> f64 {
    0.001
}

fn default_record_bytes() -> usize {
    64 << 20
}

/// A tokenizer from a file, or one that is trained on the cleaned text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// A tokenizer's file: SentencePiece's `.model`, `tokenizer.json`, or tiktoken's ranks.
    pub file: Option<PathBuf>,
    /// Pieces of a trained one; 32,000 as in the paper.
    pub vocab_size: usize,
    /// Bytes of text it is trained on, from all sources by weight.
    pub train_bytes: u64,
    /// Whether a document ends with EOS. It begins with BOS, if that is how the vocabulary's texts begin.
    pub eos: bool,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { file: None, vocab_size: 32_000, train_bytes: 256 << 20, eos: true }
    }
}

/// Files of models.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Models {
    /// fastText's language identification, `lid.176.bin` or `lid.176.ftz`.
    pub language: Option<PathBuf>,
    /// A language model in ARPA format.
    pub perplexity: Option<PathBuf>,
    /// Largest perplexity that is kept.
    pub max_perplexity: Option<f64>,
    /// A fastText classifier with the label `__label__reference`.
    pub quality: Option<PathBuf>,
}

/// A source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Name of its folders.
    pub name: String,
    /// The paper's recipe for it.
    pub recipe: Recipe,
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Share of the training tokens, in any unit.
    #[serde(default = "one")]
    pub weight: f64,
    /// What the files are, instead of the recipe's.
    #[serde(default)]
    pub format: Option<Format>,
    /// Endings of the files taken from folders, instead of the format's.
    #[serde(default)]
    pub extensions: Option<Vec<String>>,
    /// Rules, instead of the recipe's.
    #[serde(default)]
    pub steps: Option<Vec<Step>>,
}

fn one() -> f64 {
    1.0
}

/// The paper's way with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Recipe {
    /// CommonCrawl through CCNet's pipeline, then the classifier.
    CommonCrawl,
    /// C4.
    C4,
    /// GitHub.
    GitHub,
    /// Wikipedia.
    Wikipedia,
    /// Gutenberg and Books3.
    Books,
    /// ArXiv.
    Arxiv,
    /// StackExchange.
    StackExchange,
    /// Text as it is, without exact duplicates.
    Text,
}

impl Recipe {
    /// What its files are.
    pub fn format(self) -> Format {
        match self {
            Self::CommonCrawl => Format::Warc,
            Self::C4 => Format::Jsonl,
            Self::GitHub => Format::Code,
            Self::Wikipedia => Format::MediaWiki,
            Self::Books | Self::Text => Format::Text,
            Self::Arxiv => Format::Latex,
            Self::StackExchange => Format::StackExchange,
        }
    }

    /// Its rules in their order.
    ///
    /// # Errors
    /// The name of a model that it needs and is not given.
    pub fn steps(self, models: &Models) -> Result<Vec<Step>, &'static str> {
        let needs = |model: &Option<PathBuf>, name| model.clone().ok_or(name);
        Ok(match self {
            Self::CommonCrawl => vec![
                Step::DuplicateLines {},
                Step::Language {
                    model: needs(&models.language, "language")?,
                    keep: vec!["en".into()],
                    min_probability: 0.5,
                },
                Step::Perplexity {
                    model: needs(&models.perplexity, "perplexity")?,
                    tokenizer: None,
                    max: models.max_perplexity.ok_or("max_perplexity")?,
                },
                Step::Quality {
                    model: needs(&models.quality, "quality")?,
                    label: "__label__reference".into(),
                    min_probability: 0.5,
                },
            ],
            Self::C4 => vec![Step::c4()],
            Self::GitHub => vec![Step::github(), Step::DuplicateDocuments {}],
            Self::Wikipedia => vec![Step::Wikipedia { min_chars: 100 }],
            Self::Books => {
                vec![Step::Books { min_chars: 1000 }, Step::NearDuplicates { similarity: 0.9, shingle: 5 }]
            }
            Self::Arxiv => vec![Step::Arxiv { min_chars: 200 }],
            Self::StackExchange => vec![Step::Html {}],
            Self::Text => vec![Step::DuplicateDocuments {}],
        })
    }
}

impl PrepareConfig {
    /// Reads a file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is not a valid configuration.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let text = std::fs::read_to_string(path).map_err(|error| DataError::io(path, error))?;
        let mut config: Self = toml::from_str(&text).map_err(|error| DataError::format(path, error))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
        resolve(&mut config.output);
        let Models { language, perplexity, quality, .. } = &mut config.models;
        [&mut config.tokenizer.file, language, perplexity, quality].into_iter().flatten().for_each(resolve);
        for source in &mut config.source {
            source.paths.iter_mut().for_each(resolve);
            source.steps.iter_mut().flatten().for_each(|step| step.files().into_iter().for_each(resolve));
        }
        config.validate().map_err(|reason| DataError::format(path, reason))?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), String> {
        if self.source.is_empty() {
            return Err("there is no [[source]]".into());
        }
        for (index, source) in self.source.iter().enumerate() {
            let SourceConfig { name, weight, .. } = source;
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(format!("source name `{name}`: letters, digits, `-` and `_` make a folder's name"));
            }
            if self.source[..index].iter().any(|other| other.name == *name) {
                return Err(format!("two sources are named `{name}`"));
            }
            if !(weight.is_finite() && *weight >= 0.0) {
                return Err(format!("source `{name}`: weight {weight} is not a share"));
            }
            self.steps(source)?;
        }
        if !(0.0..1.0).contains(&self.valid_fraction) {
            return Err(format!("valid_fraction {} is not in 0..1", self.valid_fraction));
        }
        if self.source.iter().map(|source| source.weight).sum::<f64>() <= 0.0 {
            return Err("all weights are zero".into());
        }
        Ok(())
    }

    /// A source's rules.
    pub(super) fn steps(&self, source: &SourceConfig) -> Result<Vec<Step>, String> {
        match &source.steps {
            Some(steps) => Ok(steps.clone()),
            None => source.recipe.steps(&self.models).map_err(|model| {
                format!(
                    "source `{}`: its recipe needs `models.{model}`; give it, or list the source's `steps` yourself",
                    source.name
                )
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<PrepareConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prepare.toml");
        std::fs::write(&path, text).unwrap();
        PrepareConfig::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_short_file_is_enough() {
        let source = "output = \"out\"\n[[source]]\nname = \"wiki\"\nrecipe = \"wikipedia\"\npaths = [\"a.xml.bz2\"]\n";
        let config = load(source).unwrap();
        assert_eq!(config.tokenizer.vocab_size, 32_000);
        assert!(config.source[0].paths[0].is_absolute());
        let steps = "steps = [{ rule = \"c4\", min_words = 3 }, { rule = \"near_duplicates\", similarity = 0.8 }]";
        assert_eq!(load(&format!("{source}{steps}")).unwrap().source[0].steps.as_ref().unwrap().len(), 2);
    }

    #[test]
    fn mistakes_are_named() {
        let with =
            |rest: &str| format!("output = \"out\"\n[[source]]\nname = \"a\"\nrecipe = \"text\"\npaths = []\n{rest}");
        let error = |text: &str| load(text).unwrap_err();
        assert!(error("output = \"x\"\nsource = []").contains("no [[source]]"));
        assert!(error(&with("wight = 1")).contains("wight"));
        assert!(error(&with("weight = -1.0")).contains("weight -1"));
        assert!(error(&with("steps = [{ rule = \"c5\" }]")).contains("c5"));
        assert!(error(&with("").replace("\"a\"", "\"../a\"")).contains("folder's name"));
        assert!(error(&with("").replace("text", "commoncrawl")).contains("models.language"));
    }
}
