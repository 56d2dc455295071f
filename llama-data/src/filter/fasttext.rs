//! fastText classifiers (Joulin et al., [arXiv 1607.01759](https://arxiv.org/abs/1607.01759)): reading `.bin` and quantised `.ftz` files and
//! predicting as the original program does.
//!
//! A line is the set of its words, their character n-grams and its word n-grams, hashed; the hidden vector is the mean of their rows, and
//! the output layer a softmax, one sigmoid a label, or a tree of sigmoids.

use std::path::Path;

use rustc_hash::FxHashMap;

use super::parser::Parser;
use super::quantized::Matrix;
use crate::DataError;

const MAGIC: i32 = 793_712_314;
const VERSION: i32 = 12;
/// Appended to every line.
const END: &str = "</s>";
const LABEL: &str = "__label__";
/// Longer n-grams than any model has.
const MAX_NGRAM: usize = 64;

/// Words with their rows.
pub(super) type Words = FxHashMap<String, u32>;

/// How the output layer turns scores into probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    Hierarchical,
    Softmax,
    /// One sigmoid a label: negative sampling and one-vs-all.
    Independent,
}

/// The sizes that matter for prediction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub dim: usize,
    pub word_ngrams: usize,
    pub buckets: usize,
    pub min_chars: usize,
    pub max_chars: usize,
    pub loss: Loss,
}

/// A classifier.
#[derive(Clone, Debug)]
pub struct FastText {
    pub(super) sizes: Sizes,
    pub(super) words: Words,
    pub(super) labels: Vec<String>,
    /// Rows that n-grams kept when the model was pruned.
    pruned: Option<FxHashMap<u32, u32>>,
    pub(super) input: Matrix,
    pub(super) output: Matrix,
    tree: Vec<Node>,
}

impl FastText {
    /// Reads a supervised model.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is none or is not whole.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
        Self::parse(&bytes).map_err(|reason| DataError::format(path, reason))
    }

    /// Reads a model from its bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut file = Parser::new(bytes);
        if file.int()? != MAGIC {
            return Err("not a fastText model".into());
        }
        let version = file.int()?;
        if !(11..=VERSION).contains(&version) {
            return Err(format!("fastText version {version}; 11 and 12 are read"));
        }
        let mut ints = [0; 12];
        for value in &mut ints {
            *value = file.int()?;
        }
        let [dim, _, _, _, _, word_ngrams, loss, model, buckets, min_chars, max_chars, _] = ints;
        file.long()?;
        if model != 3 {
            return Err("not a classifier: the model holds word vectors".into());
        }
        let size = |value: i32, name: &str| usize::try_from(value).map_err(|_| format!("{name} is {value}"));
        let mut sizes = Sizes {
            dim: size(dim, "dim")?,
            word_ngrams: size(word_ngrams, "wordNgrams")?,
            buckets: size(buckets, "bucket")?,
            min_chars: size(min_chars, "minn")?,
            max_chars: size(max_chars, "maxn")?,
            loss: match loss {
                1 => Loss::Hierarchical,
                2 | 4 => Loss::Independent,
                3 => Loss::Softmax,
                _ => return Err(format!("unknown loss {loss}")),
            },
        };
        if version == 11 {
            // That version's classifiers had no character n-grams, whatever the file says.
            sizes.max_chars = 0;
        }

        let has_ngrams = sizes.max_chars > 0 || sizes.word_ngrams > 1;
        if (has_ngrams && sizes.buckets == 0) || sizes.word_ngrams > MAX_NGRAM || sizes.max_chars > MAX_NGRAM {
            return Err(format!(
                "n-grams of {} words and {} characters in {} buckets",
                sizes.word_ngrams, sizes.max_chars, sizes.buckets
            ));
        }
        let [entries, word_count, label_count] = [file.int()?, file.int()?, file.int()?];
        file.long()?;
        let pruned_len = file.long()?;
        if entries.checked_sub(word_count) != Some(label_count) || word_count < 0 || label_count <= 0 {
            return Err(format!("{entries} entries are not {word_count} words and {label_count} labels"));
        }
        let mut words = Words::default();
        let (mut labels, mut counts) = (Vec::new(), Vec::new());
        for index in 0..entries {
            let text = file.text()?;
            let count = file.long()?;
            match file.byte()? {
                0 if index < word_count => drop(words.insert(text, index as u32)),
                1 if index >= word_count => {
                    labels.push(text);
                    counts.push(count);
                }
                _ => return Err(format!("entry `{text}` is out of place")),
            }
        }
        let mut pruned = (pruned_len >= 0).then(FxHashMap::default);
        for _ in 0..pruned_len.max(0) {
            let (from, to) = (file.int()?, file.int()?);
            pruned.get_or_insert_default().insert(from as u32, to as u32);
        }
        let input = file.matrix()?;
        let output = file.matrix()?;
        let ngram_rows = match &pruned {
            Some(pruned) => pruned.values().max().map_or(0, |&row| row as usize + 1),
            None if sizes.max_chars == 0 && sizes.word_ngrams < 2 => 0,
            None => sizes.buckets,
        };
        if input.columns() != sizes.dim || output.columns() != sizes.dim || output.rows() != labels.len() {
            return Err(format!(
                "matrices of [{}, {}] and [{}, {}] do not fit {} labels in {} dimensions",
                input.rows(),
                input.columns(),
                output.rows(),
                output.columns(),
                labels.len(),
                sizes.dim
            ));
        }
        if input.rows() < word_count as usize + ngram_rows {
            return Err(format!("{} rows are fewer than {word_count} words and {ngram_rows} n-grams", input.rows()));
        }
        let tree = match sizes.loss {
            Loss::Hierarchical => tree(&counts),
            _ => Vec::new(),
        };
        Ok(Self { sizes, words, labels, pruned, input, output, tree })
    }

    /// A model that was trained here.
    pub(super) fn new(sizes: Sizes, words: Words, labels: Vec<String>, input: Matrix, output: Matrix) -> Self {
        Self { sizes, words, labels, pruned: None, input, output, tree: Vec::new() }
    }

    /// The labels, most frequent in training first.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The `k` most probable labels of a text, best first; none for one that nothing is known of. The lines of a page are joined, as
    /// CCNet joins them: an end of line separates words.
    pub fn predict(&self, line: &str, k: usize) -> Vec<(String, f32)> {
        let rows = self.features(line);
        if rows.is_empty() {
            return Vec::new();
        }
        let hidden = self.hidden(&rows);
        let mut scores = self.probabilities(&hidden);
        scores.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scores.truncate(k);
        scores.into_iter().map(|(label, probability)| (self.labels[label].clone(), probability)).collect()
    }

    /// The rows of the input matrix a line stands for.
    pub(super) fn features(&self, line: &str) -> Vec<u32> {
        let mut rows = Vec::with_capacity(2 * line.len());
        let mut hashes = Vec::new();
        let is_space = |c: char| matches!(c, ' ' | '\n' | '\r' | '\t' | '\u{b}' | '\u{c}' | '\0');
        for word in line.split(is_space).filter(|word| !word.is_empty()).chain([END]) {
            let id = self.words.get(word).copied();
            if id.is_none() && word.starts_with(LABEL) {
                continue;
            }
            rows.extend(id);
            if self.sizes.max_chars > 0 && word != END {
                self.character_ngrams(word, &mut rows);
            }
            hashes.push(hash(word.as_bytes()) as i32);
            if word == END {
                break;
            }
        }
        for first in 0..hashes.len() {
            let mut key = hashes[first] as u64;
            for &hash in hashes.iter().take(first + self.sizes.word_ngrams).skip(first + 1) {
                key = key.wrapping_mul(116_049_371).wrapping_add(hash as u64);
                self.ngram_row((key % self.sizes.buckets as u64) as u32, &mut rows);
            }
        }
        rows
    }

    /// The n-grams of `<word>`, in characters, without `<` and `>` alone.
    fn character_ngrams(&self, word: &str, rows: &mut Vec<u32>) {
        let all = || [b'<'].into_iter().chain(word.bytes()).chain([b'>']);
        let begins = |byte: u8| byte & 0xc0 != 0x80;
        let len = word.len() + 2;
        for (start, _) in all().enumerate().filter(|&(_, byte)| begins(byte)) {
            // The hash grows byte by byte; where the next character begins, an n-gram ends.
            let (mut hash, mut n) = (HASH_START, 0);
            let mut bytes = all().skip(start).peekable();
            let mut end = start;
            while let Some(byte) = bytes.next() {
                hash = hash_byte(hash, byte);
                end += 1;
                if bytes.peek().is_some_and(|&next| !begins(next)) {
                    continue;
                }
                n += 1;
                if n >= self.sizes.min_chars && !(n == 1 && (start == 0 || end == len)) {
                    self.ngram_row(hash % self.sizes.buckets as u32, rows);
                }
                if n == self.sizes.max_chars {
                    break;
                }
            }
        }
    }

    fn ngram_row(&self, bucket: u32, rows: &mut Vec<u32>) {
        let row = match &self.pruned {
            Some(pruned) => pruned.get(&bucket).copied(),
            None => Some(bucket),
        };
        rows.extend(row.map(|row| self.words.len() as u32 + row));
    }

    pub(super) fn hidden(&self, rows: &[u32]) -> Vec<f32> {
        let mut hidden = vec![0.0; self.sizes.dim];
        for &row in rows {
            self.input.add_row(row as usize, &mut hidden);
        }
        let scale = 1.0 / rows.len() as f32;
        hidden.iter_mut().for_each(|value| *value *= scale);
        hidden
    }

    fn probabilities(&self, hidden: &[f32]) -> Vec<(usize, f32)> {
        let score = |label: usize| self.output.dot_row(label, hidden);
        let labels = self.labels.len();
        match self.sizes.loss {
            Loss::Independent => (0..labels).map(|label| (label, sigmoid(score(label)))).collect(),
            Loss::Softmax => {
                let scores: Vec<f32> = (0..labels).map(score).collect();
                softmax(&scores).into_iter().enumerate().collect()
            }
            Loss::Hierarchical => {
                let mut found = Vec::new();
                let mut open = vec![(self.tree.len() - 1, 0.0f32)];
                while let Some((node, log)) = open.pop() {
                    let Node { left, right } = self.tree[node];
                    if node < labels {
                        found.push((node, log.exp()));
                        continue;
                    }
                    let right_share = sigmoid(score(node - labels));
                    open.push((left, log + (1.0 - right_share + 1e-5).ln()));
                    open.push((right, log + (right_share + 1e-5).ln()));
                }
                found
            }
        }
    }
}

pub(super) fn softmax(scores: &[f32]) -> Vec<f32> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f32 = all.iter().sum();
    all.iter_mut().for_each(|value| *value /= sum);
    all
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

const HASH_START: u32 = 2_166_136_261;

/// A step of FNV-1a, the byte taken as signed, as the original has it.
fn hash_byte(hash: u32, byte: u8) -> u32 {
    (hash ^ byte as i8 as u32).wrapping_mul(16_777_619)
}

fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(HASH_START, |hash, &byte| hash_byte(hash, byte))
}

/// A node of the labels' Huffman tree; the first nodes are the labels themselves.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    left: usize,
    right: usize,
}

/// Huffman's tree over labels in falling order of their counts.
fn tree(counts: &[i64]) -> Vec<Node> {
    let labels = counts.len();
    let mut nodes = vec![Node::default(); 2 * labels - 1];
    let mut weights: Vec<i64> =
        counts.iter().copied().chain(std::iter::repeat_n(1_000_000_000_000_000, labels - 1)).collect();
    let (mut leaf, mut inner) = (labels, labels);
    for at in labels..2 * labels - 1 {
        let mut least = || {
            if leaf > 0 && weights[leaf - 1] < weights[inner] {
                leaf -= 1;
                leaf
            } else {
                inner += 1;
                inner - 1
            }
        };
        let (left, right) = (least(), least());
        nodes[at] = Node { left, right };
        weights[at] = weights[left].saturating_add(weights[right]);
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the 176 languages' model, where it lies beside the project; predictions of fastText 0.9.2 itself.
    #[test]
    fn predicts_as_fasttext_does() {
        let Some(folder) = std::env::var_os("LLAMA_TEST_DATA") else {
            eprintln!("skipped: LLAMA_TEST_DATA is not set");
            return;
        };
        let path = Path::new(&folder).join("clean/lid.176.ftz");
        if !path.exists() {
            eprintln!("skipped: {} is not there", path.display());
            return;
        }
        let model = FastText::load(&path).unwrap();
        let cases = [
            ("The quick brown fox jumps over the lazy dog", [("en", 0.720_583_9), ("es", 0.041_742_51)]),
            ("Bonjour tout le monde, comment allez-vous?", [("fr", 0.975_915_2), ("en", 0.007_942_17)]),
            ("Привет, как дела?", [("ru", 0.959_980_1), ("sr", 0.011_184_48)]),
        ];
        for (line, expected) in cases {
            let found = model.predict(line, 2);
            for ((label, probability), (code, value)) in found.iter().zip(expected) {
                assert_eq!(label, &format!("__label__{code}"), "{line}: {found:?}");
                assert!((probability - value).abs() < 1e-5, "{line}: {found:?}");
            }
        }
        assert!(!model.predict("", 1).is_empty(), "an empty line is its end mark");
    }

    proptest::proptest! {
        /// A changed file is refused, or is a model that predicts.
        #[test]
        fn changed_files_do_not_panic(changes in proptest::collection::vec((0.0f64..1.0, proptest::num::u8::ANY), 1..6)) {
            thread_local! {
                static TOY: Vec<u8> = {
                    let mut bytes = Vec::new();
                    super::super::train::tests::toy().write_to(&mut bytes).unwrap();
                    bytes
                };
            }
            let mut bytes = TOY.with(Clone::clone);
            for (place, byte) in changes {
                // Half of the changes go to the header, whose numbers matter most.
                let len = if place < 0.5 { 100 } else { bytes.len() };
                let at = (place.fract() * 2.0 % 1.0 * len as f64) as usize;
                bytes[at] = byte;
            }
            if let Ok(model) = FastText::parse(&bytes) {
                model.predict("the committee published a report", 3);
            }
        }
    }

    #[test]
    fn broken_files_are_errors() {
        let error = FastText::parse(b"GGUF....").unwrap_err();
        assert!(error.contains("not a fastText model"));
        let model = super::super::train::tests::toy();
        let mut bytes = Vec::new();
        model.write_to(&mut bytes).unwrap();
        assert!(FastText::parse(&bytes).is_ok());
        for cut in (0..bytes.len()).step_by(7) {
            assert!(FastText::parse(&bytes[..cut]).is_err(), "{cut}");
        }
        // A length that lies.
        let at = bytes.len() - 8 - 4 * model.output.rows() * model.sizes.dim;
        bytes[at - 8..at].copy_from_slice(&i64::MAX.to_le_bytes());
        assert!(FastText::parse(&bytes).is_err());
    }
}
