//! The training mixture (paper, table 1): which source gives the next sequence.
//!
//! Proportions are probabilities of training **tokens**, and every sequence has the same number of them, so they are shares of the
//! sequences. The order is a pure function of seed and position: every block of [`BLOCK`] positions is a permutation in which
//! each source has its exact share (rounded, the remainders carried on), and the k-th sequence of a source is the k-th window of its own
//! order, epoch after epoch. So a run can go on at any position, on any number of ranks, with no state but the position.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::loader::Sequences;
use crate::order::Order;
use crate::{DataError, TokenDataset};

/// Positions in which every source has its share.
pub const BLOCK: u64 = 1000;
/// One, as a weight.
const UNIT: u64 = 1 << 32;

/// The file `mixture.toml` of a data folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// The sources.
    pub source: Vec<MixtureSource>,
}

/// A source of the mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureSource {
    /// Its name in reports.
    pub name: String,
    /// Folder of its shards; relative to the file.
    pub folder: PathBuf,
    /// Its share of the training tokens, in any unit.
    pub weight: f64,
}

impl MixtureConfig {
    /// Name of the file in a data folder.
    pub const FILE: &'static str = "mixture.toml";

    /// Table 1 of the paper, in percent.
    ///
    /// ```
    /// let paper = llama_data::mixture::MixtureConfig::paper();
    /// assert_eq!(paper.source.iter().map(|source| source.weight).sum::<f64>(), 100.0);
    /// ```
    pub fn paper() -> Self {
        let table = [
            ("commoncrawl", 67.0),
            ("c4", 15.0),
            ("github", 4.5),
            ("wikipedia", 4.5),
            ("books", 4.5),
            ("arxiv", 2.5),
            ("stackexchange", 2.0),
        ];
        let source = |(name, weight): (&str, f64)| {
            let folder = Path::new("tokens").join(name);
            MixtureSource { name: name.into(), folder, weight }
        };
        Self { source: table.map(source).into() }
    }

    /// Reads the file of a folder; `None` if it has none.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`].
    pub fn load(folder: &Path) -> Result<Option<Self>, DataError> {
        let path = folder.join(Self::FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let config: Self = toml::from_str(&text).map_err(|error| DataError::format(&path, error))?;
                let bad = config.source.iter().find(|source| !(source.weight.is_finite() && source.weight >= 0.0));
                match bad {
                    Some(source) => {
                        let reason = format!("weight {} of `{}` is not a share", source.weight, source.name);
                        Err(DataError::format(&path, reason))
                    }
                    None if config.source.iter().all(|source| source.weight == 0.0) => {
                        Err(DataError::format(&path, "no source has a weight"))
                    }
                    None => Ok(Some(config)),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(DataError::io(&path, error)),
        }
    }

    /// Writes the file of a folder, atomically.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save(&self, folder: &Path) -> Result<(), DataError> {
        let path = folder.join(Self::FILE);
        let text = toml::to_string(self).map_err(|error| DataError::format(&path, error))?;
        crate::write_atomically(&path, |file| std::io::Write::write_all(file, text.as_bytes()))
    }
}

/// Shares of sources in an order of positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// In units of 2⁻³²; the largest source has what the others leave.
    weights: Vec<u64>,
    largest: usize,
    blocks: Order,
}

impl Shares {
    /// # Panics
    /// If there is no weight, or one is negative, or all are zero.
    pub fn new(weights: &[f64], seed: u64) -> Self {
        let sum: f64 = weights.iter().sum();
        assert!(sum > 0.0 && weights.iter().all(|&weight| weight >= 0.0), "weights {weights:?} are no shares");
        let weights: Vec<u64> = weights.iter().map(|weight| (weight / sum * UNIT as f64) as u64).collect();
        let largest = (0..weights.len()).max_by_key(|&index| weights[index]).unwrap_or(0);
        Self { weights, largest, blocks: Order::new(BLOCK, seed) }
    }

    /// The source of a position, and how many positions before it were the source's.
    ///
    /// Inside a block, a source's sequences come in the order of the permutation.
    pub fn locate(&self, position: u64) -> (usize, u64) {
        if self.weights.len() == 1 {
            return (0, position);
        }
        let block = position / BLOCK;
        let mut slot = self.blocks.window(position);
        for source in 0..self.weights.len() {
            let before = self.before(source, block);
            let here = self.before(source, block + 1) - before;
            if slot < here {
                return (source, before + slot);
            }
            slot -= here;
        }
        unreachable!("the shares of a block make up the block")
    }

    /// Positions of a source in the first `blocks` blocks.
    fn before(&self, source: usize, blocks: u64) -> u64 {
        let share = |weight: u64| ((u128::from(blocks * BLOCK) * u128::from(weight)) >> 32) as u64;
        match source == self.largest {
            false => share(self.weights[source]),
            true => {
                let others = (0..self.weights.len()).filter(|&other| other != source);
                blocks * BLOCK - others.map(|other| share(self.weights[other])).sum::<u64>()
            }
        }
    }

    /// Positions of each source among the first `position`, to within one block.
    pub fn counts(&self, position: u64) -> Vec<u64> {
        (0..self.weights.len()).map(|source| self.before(source, position / BLOCK)).collect()
    }
}

/// Windows of all sources in the order of training.
#[derive(Debug)]
pub struct Mixture {
    names: Vec<String>,
    sources: Vec<(TokenDataset, Order)>,
    shares: Shares,
    block_causal: bool,
}

impl Mixture {
    /// Opens a data folder: the sources its `mixture.toml` names, or the shards that lie in it.
    ///
    /// Sources without weight are left out, and for the split `valid` also those of which nothing was held out.
    ///
    /// # Errors
    /// Those of [`TokenDataset::open`] and [`MixtureConfig::load`].
    pub fn open(folder: &Path, split: &str, tokenizer: u64, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        let Some(config) = MixtureConfig::load(folder)? else {
            let data = TokenDataset::open(folder, split, tokenizer, seq_len)?;
            return Ok(Self::new(vec![("text".into(), 1.0, data)], seed));
        };
        let mut sources = Vec::new();
        for MixtureSource { name, folder: shards, weight } in config.source {
            if weight == 0.0 {
                continue;
            }
            match TokenDataset::open(&folder.join(shards), split, tokenizer, seq_len) {
                Ok(data) => sources.push((name, weight, data)),
                Err(DataError::Empty { .. } | DataError::TooShort { .. }) if split != "train" => {}
                Err(error) => return Err(error),
            }
        }
        if sources.is_empty() {
            let hint = format!("no source has enough text in the split `{split}`; hold out more for it");
            return Err(DataError::Empty { path: folder.into(), hint });
        }
        Ok(Self::new(sources, seed))
    }

    /// Names, weights and windows of the sources.
    ///
    /// # Panics
    /// If there is no source, or no weight.
    pub fn new(sources: Vec<(String, f64, TokenDataset)>, seed: u64) -> Self {
        let weights: Vec<f64> = sources.iter().map(|(_, weight, _)| *weight).collect();
        let shares = Shares::new(&weights, seed);
        let mut names = Vec::new();
        let datasets = sources.into_iter().map(|(name, _, data)| {
            names.push(name);
            let order = Order::new(data.windows(), seed);
            (data, order)
        });
        Self { sources: datasets.collect(), names, shares, block_causal: false }
    }

    /// Whether batches say where each token's document begins, so that attention can stay inside documents.
    #[must_use]
    pub fn block_causal(self, block_causal: bool) -> Self {
        Self { block_causal, ..self }
    }

    /// Tokens of all sources.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(|(data, _)| data.tokens()).sum()
    }

    /// The source of a position, and its window.
    fn locate(&self, position: u64) -> (&TokenDataset, u64) {
        let (source, index) = self.shares.locate(position);
        let (data, order) = &self.sources[source];
        (data, order.window(index))
    }

    /// Each source with the passes over it that the first `position` sequences make.
    pub fn epochs(&self, position: u64) -> Vec<(&str, f64)> {
        let counts = match self.sources.len() {
            1 => vec![position],
            _ => self.shares.counts(position),
        };
        let epochs = counts.iter().zip(&self.sources).map(|(&count, (data, _))| count as f64 / data.windows() as f64);
        self.names.iter().map(String::as_str).zip(epochs).collect()
    }
}

impl Sequences for Mixture {
    fn seq_len(&self) -> usize {
        self.sources[0].0.seq_len()
    }

    fn sequences(&self) -> u64 {
        self.sources.iter().map(|(data, _)| data.windows()).sum()
    }

    fn read(&self, position: u64, inputs: &mut Vec<i32>, targets: &mut Vec<i32>, starts: &mut Option<Vec<i32>>) {
        let (data, window) = self.locate(position);
        data.read(window, inputs, targets);
        if self.block_causal {
            data.read_starts(window, starts.get_or_insert_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_table_1() {
        let weights: Vec<f64> = MixtureConfig::paper().source.iter().map(|source| source.weight).collect();
        let shares = Shares::new(&weights, 1);
        let mut counts = vec![0u64; weights.len()];
        let positions = 1_000_000;
        for position in 0..positions {
            let (source, index) = shares.locate(position);
            counts[source] += 1;
            assert!(index < (positions as f64 * weights[source] / 100.0) as u64 + BLOCK);
        }
        for (count, weight) in counts.iter().zip(&weights) {
            assert!((100.0 * *count as f64 / positions as f64 - weight).abs() < 0.1, "{counts:?}");
        }
        assert_eq!(shares.counts(positions), counts);
        // Also in a short stretch no source is far from its share.
        let first = (0..100).filter(|&position| shares.locate(position).0 == 0).count();
        assert!((55..80).contains(&first), "{first}");
    }

    proptest::proptest! {
        /// Every sequence of every source comes once, whatever the weights.
        #[test]
        fn indices_of_a_source_are_all_there(weights in proptest::collection::vec(0.0f64..1.0, 1..6), seed: u64) {
            proptest::prop_assume!(weights.iter().sum::<f64>() > 1e-3);
            let shares = Shares::new(&weights, seed);
            let mut seen = vec![Vec::new(); weights.len()];
            for position in 0..5 * BLOCK {
                let (source, index) = shares.locate(position);
                seen[source].push(index);
            }
            for mut indices in seen {
                indices.sort_unstable();
                proptest::prop_assert!(indices.iter().copied().eq(0..indices.len() as u64));
            }
        }
    }

    #[test]
    fn files_round_trip_and_mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MixtureConfig::load(folder.path()).unwrap(), None);
        let mut config = MixtureConfig::paper();
        config.save(folder.path()).unwrap();
        assert_eq!(MixtureConfig::load(folder.path()).unwrap(), Some(config.clone()));
        config.source[1].weight = -1.0;
        config.save(folder.path()).unwrap();
        assert!(MixtureConfig::load(folder.path()).unwrap_err().to_string().contains("`c4`"));
    }
}
