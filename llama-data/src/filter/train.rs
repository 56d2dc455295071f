//! Training a fastText classifier: the paper's linear model of pages that Wikipedia cites against random pages.
//!
//! Stochastic gradient descent on the softmax of the mean of the features' rows, with a learning rate that falls to zero. One thread, so
//! that the result depends on texts, options and seed only. The file is read by the original program, too.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use super::fasttext::{FastText, Loss, Sizes, softmax};
use super::quantized::Matrix;
use crate::DataError;
use rand::{Rng, SeedableRng, seq::SliceRandom};

/// How a classifier is trained; the defaults are fastText's, but for word pairs and the buckets they hash to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassifierOptions {
    /// Columns of the rows.
    pub dim: usize,
    /// Longest word n-gram.
    pub word_ngrams: usize,
    /// Rows of the n-grams.
    pub buckets: usize,
    /// Words that occur less often have no row.
    pub min_count: u64,
    /// Passes over the texts.
    pub epochs: usize,
    /// First learning rate.
    pub learning_rate: f32,
    /// Seed of the order and of the first rows.
    pub seed: u64,
}

impl Default for ClassifierOptions {
    fn default() -> Self {
        Self { dim: 16, word_ngrams: 2, buckets: 1 << 18, min_count: 2, epochs: 5, learning_rate: 0.1, seed: 0 }
    }
}

impl FastText {
    /// Trains on texts with their labels (without the prefix `__label__`).
    ///
    /// # Errors
    /// [`DataError::Empty`] without two labels.
    pub fn train(texts: &[(String, String)], options: &ClassifierOptions) -> Result<Self, DataError> {
        let mut word_counts: HashMap<&str, u64> = HashMap::new();
        let mut label_counts: HashMap<&str, u64> = HashMap::new();
        for (label, text) in texts {
            *label_counts.entry(label).or_default() += 1;
            text.split_whitespace().chain(["</s>"]).for_each(|word| *word_counts.entry(word).or_default() += 1);
        }
        if label_counts.len() < 2 {
            let hint = format!("a classifier needs texts of two labels, and there are {}", label_counts.len());
            return Err(DataError::Empty { path: Default::default(), hint });
        }
        let by_count = |counts: HashMap<&str, u64>, least: u64| {
            let mut all: Vec<_> = counts.into_iter().filter(|&(_, count)| count >= least).collect();
            all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
            all.into_iter().map(|(text, _)| text.to_string()).collect::<Vec<_>>()
        };
        let words = by_count(word_counts, options.min_count);
        let labels = by_count(label_counts, 0);
        let label_of: HashMap<&str, usize> = labels.iter().map(String::as_str).zip(0..).collect();
        let targets: Vec<usize> = texts.iter().map(|(label, _)| label_of[label.as_str()]).collect();

        let sizes = Sizes {
            dim: options.dim,
            word_ngrams: options.word_ngrams,
            buckets: options.buckets,
            min_chars: 0,
            max_chars: 0,
            loss: Loss::Softmax,
        };
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(options.seed);
        let bound = 1.0 / options.dim as f32;
        let rows = words.len() + options.buckets;
        let input = (0..rows * options.dim).map(|_| rng.random_range(-bound..bound)).collect();
        let mut model = Self::new(
            sizes,
            words.into_iter().zip(0..).collect(),
            labels.iter().map(|label| format!("__label__{label}")).collect(),
            Matrix::Dense { values: input, columns: options.dim },
            Matrix::Dense { values: vec![0.0; labels.len() * options.dim], columns: options.dim },
        );
        let features: Vec<Vec<u32>> = texts.iter().map(|(_, text)| model.features(text)).collect();
        let mut order: Vec<usize> = (0..texts.len()).collect();
        let steps = (options.epochs * texts.len()) as f32;
        for epoch in 0..options.epochs {
            order.shuffle(&mut rng);
            for (index, &text) in order.iter().enumerate() {
                let progress = (epoch * texts.len() + index) as f32 / steps;
                model.step(&features[text], targets[text], options.learning_rate * (1.0 - progress));
            }
        }
        Ok(model)
    }

    fn step(&mut self, rows: &[u32], target: usize, rate: f32) {
        if rows.is_empty() {
            return;
        }
        let hidden = self.hidden(rows);
        let scores: Vec<f32> = (0..self.labels.len()).map(|label| self.output.dot_row(label, &hidden)).collect();
        let mut gradient = vec![0.0; self.sizes.dim];
        for (label, probability) in softmax(&scores).into_iter().enumerate() {
            let alpha = rate * (f32::from(u8::from(label == target)) - probability);
            let Matrix::Dense { values, columns } = &mut self.output else { return };
            let row = &mut values[label * *columns..][..*columns];
            for ((weight, gradient), hidden) in row.iter_mut().zip(&mut gradient).zip(&hidden) {
                *gradient += alpha * *weight;
                *weight += alpha * hidden;
            }
        }
        let Matrix::Dense { values, columns } = &mut self.input else { return };
        let scale = 1.0 / rows.len() as f32;
        for &row in rows {
            let row = &mut values[row as usize * *columns..][..*columns];
            row.iter_mut().zip(&gradient).for_each(|(weight, gradient)| *weight += scale * gradient);
        }
    }

    /// Writes a dense model in fastText's format, atomically.
    ///
    /// # Errors
    /// [`DataError::Io`]; [`DataError::Format`] for a quantised model.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        if !matches!((&self.input, &self.output), (Matrix::Dense { .. }, Matrix::Dense { .. })) {
            return Err(DataError::format(path, "a quantised model cannot be written"));
        }
        crate::write_atomically(path, |file| self.write_to(file))
    }

    pub(super) fn write_to(&self, file: &mut impl Write) -> std::io::Result<()> {
        let Sizes { dim, word_ngrams, buckets, min_chars, max_chars, .. } = self.sizes;
        let int = |value: usize| (value as i32).to_le_bytes();
        let long = |value: usize| (value as i64).to_le_bytes();
        file.write_all(&793_712_314i32.to_le_bytes())?;
        file.write_all(&int(12))?;
        // dim, window, epochs, least count, negatives, word n-grams, softmax, supervised, buckets, n-grams, rate of updates.
        for value in [dim, 5, 5, 1, 5, word_ngrams, 3, 3, buckets, min_chars, max_chars, 100] {
            file.write_all(&int(value))?;
        }
        file.write_all(&1e-4f64.to_le_bytes())?;
        let mut words: Vec<(&String, &u32)> = self.words.iter().collect();
        words.sort_by_key(|(_, id)| **id);
        for value in [words.len() + self.labels.len(), words.len(), self.labels.len()] {
            file.write_all(&int(value))?;
        }
        file.write_all(&long(0))?;
        file.write_all(&(-1i64).to_le_bytes())?;
        for (kind, text) in words.iter().map(|(word, _)| (0u8, *word)).chain(self.labels.iter().map(|label| (1, label)))
        {
            file.write_all(text.as_bytes())?;
            file.write_all(&[0])?;
            file.write_all(&long(1))?;
            file.write_all(&[kind])?;
        }
        for matrix in [&self.input, &self.output] {
            let Matrix::Dense { values, columns } = matrix else { continue };
            file.write_all(&[0])?;
            file.write_all(&long(values.len() / columns))?;
            file.write_all(&long(*columns))?;
            file.write_all(bytemuck::cast_slice(values))?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn toy() -> FastText {
        let mut texts = Vec::new();
        for index in 0..60 {
            texts.push(("ref".to_string(), format!("the committee published a report on study {index}")));
            texts.push(("random".to_string(), format!("buy cheap pills now {index} click here")));
        }
        let options = ClassifierOptions { dim: 4, buckets: 64, epochs: 20, ..Default::default() };
        FastText::train(&texts, &options).unwrap()
    }

    #[test]
    fn a_trained_classifier_separates_and_survives_its_file() {
        let model = toy();
        let best = |model: &FastText, text: &str| model.predict(text, 1).remove(0);
        assert_eq!(best(&model, "a report of the committee").0, "__label__ref");
        assert_eq!(best(&model, "click here now").0, "__label__random");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.bin");
        model.save(&path).unwrap();
        let read = FastText::load(&path).unwrap();
        for text in ["a report of the committee", "click", ""] {
            assert_eq!(model.predict(text, 2), read.predict(text, 2));
        }
    }

    #[test]
    fn one_label_is_not_enough() {
        let error = FastText::train(&[("a".into(), "b".into())], &ClassifierOptions::default()).unwrap_err();
        assert!(error.to_string().contains("two labels"));
    }
}
