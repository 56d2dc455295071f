//! Near-duplicates by MinHash (Broder, 1997) and locality-sensitive hashing.
//!
//! A document is the set of its shingles, runs of `shingle` words. Of each of [`HASHES`] hash functions the smallest value over the set is
//! kept: two documents agree in a share of these values that estimates the Jaccard similarity of their sets, with a deviation of
//! √(s(1−s)/128), 0.035 at s = 0.8. The signature is cut into bands of `rows` values; documents that agree in a whole band are
//! candidates, and their signatures decide.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use xxhash_rust::xxh3::xxh3_64;

use super::keys::{KeyFile, KeyWriter};
use super::{Item, gather};
use crate::{AtomicFile, DataError};

/// Values of a signature.
pub const HASHES: usize = 128;
/// Documents of one band that others are compared with, at most.
const MAX_LEADERS: usize = 16;

/// The values of a document.
pub type Signature = [u32; HASHES];

/// What counts as a near-duplicate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinHash {
    /// Words of a shingle.
    pub shingle: usize,
    /// Smallest similarity of duplicates.
    pub similarity: f64,
}

impl MinHash {
    /// Rows of a band: the most with which pairs of just this similarity share a band with a probability of 0.95.
    pub fn rows(&self) -> usize {
        let shares = |rows: usize| {
            let bands = (HASHES / rows) as i32;
            1.0 - (1.0 - self.similarity.powi(rows as i32)).powi(bands)
        };
        (1..=HASHES / 2).rev().find(|&rows| shares(rows) >= 0.95).unwrap_or(1)
    }

    /// Number of bands.
    pub fn bands(&self) -> usize {
        HASHES / self.rows()
    }

    /// A text's signature; `None` for a text without words. A text shorter than a shingle is one shingle.
    ///
    /// Words are runs of alphanumeric characters in lower case, so punctuation and layout do not count.
    pub fn signature(&self, text: &str) -> Option<Signature> {
        let lower = text.to_lowercase();
        let words: Vec<u64> = lower
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(|word| xxh3_64(word.as_bytes()))
            .collect();
        if words.is_empty() {
            return None;
        }
        let mut smallest = [u32::MAX; HASHES];
        for shingle in words.windows(self.shingle.clamp(1, words.len())) {
            let base = shingle.iter().fold(0u64, |all, word| mix(all.rotate_left(5) ^ word));
            for (slot, seed) in smallest.iter_mut().zip(&SEEDS) {
                *slot = (*slot).min((mix(base ^ seed) >> 32) as u32);
            }
        }
        Some(smallest)
    }

    /// The key of each band.
    pub fn band_keys(&self, signature: &Signature) -> impl Iterator<Item = u64> {
        let rows = self.rows();
        signature.chunks_exact(rows).map(|band| xxh3_64(bytemuck::cast_slice(band)))
    }

    /// Pairs of one band's documents that are near-duplicates, each with the first of its group in front.
    ///
    /// # Errors
    /// Those of reading.
    pub fn pairs(
        &self,
        shards: &[KeyFile],
        signatures: &[Signatures],
        band: usize,
    ) -> Result<Vec<(Item, Item)>, DataError> {
        let mut all = gather(shards, band)?;
        all.sort_unstable();
        let mut pairs = Vec::new();
        for group in all.chunk_by(|a, b| a.0 == b.0) {
            let mut leaders: Vec<(Item, &[u32])> = Vec::new();
            for &(_, item) in group {
                let own = signatures[item.0 as usize].get(item.1)?;
                match leaders.iter().find(|(_, leader)| similarity(leader, own) >= self.similarity) {
                    Some(&(leader, _)) => pairs.push((leader, item)),
                    None if leaders.len() < MAX_LEADERS => leaders.push((item, own)),
                    None => {}
                }
            }
        }
        Ok(pairs)
    }
}

/// The share of equal values: an estimate of the Jaccard similarity.
pub fn similarity(a: &[u32], b: &[u32]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / HASHES as f64
}

const fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ value >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

const SEEDS: [u64; HASHES] = {
    let mut seeds = [0; HASHES];
    let mut index = 0;
    while index < HASHES {
        seeds[index] = mix(mix(index as u64 + 1));
        index += 1;
    }
    seeds
};

/// The signatures of a shard's documents, one after the other, mapped into memory.
#[derive(Debug)]
pub struct Signatures {
    path: PathBuf,
    /// None for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

/// Writes signatures as they come.
pub struct SignatureWriter(AtomicFile);

impl SignatureWriter {
    /// Begins a file beside its place.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn create(path: &Path) -> Result<Self, DataError> {
        AtomicFile::create(path).map(Self)
    }

    /// Appends a signature.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn push(&mut self, signature: &Signature) -> Result<(), DataError> {
        self.0.push(bytemuck::cast_slice(signature))
    }

    /// Renames the file into its place.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn finish(self) -> Result<(), DataError> {
        self.0.finish()
    }
}

impl Signatures {
    /// Opens a file of signatures of the same machine's byte order.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for a file that is not whole.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let io = |error| DataError::io(path, error);
        let file = std::fs::File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        if len % size_of::<Signature>() as u64 != 0 {
            return Err(DataError::format(path, format!("{len} bytes are no whole number of signatures")));
        }
        // SAFETY: the map is read only; the file is written once and renamed into place, and nothing changes it.
        let map = if len == 0 { None } else { Some(unsafe { Mmap::map(&file) }.map_err(io)?) };
        Ok(Self { path: path.into(), map })
    }

    /// A document's signature.
    ///
    /// # Errors
    /// [`DataError::Format`] if the file has none for the document.
    pub fn get(&self, document: u64) -> Result<&[u32], DataError> {
        let all: &[u32] = self.map.as_deref().map_or(&[], bytemuck::cast_slice);
        all.chunks_exact(HASHES).nth(document as usize).ok_or_else(|| {
            DataError::format(
                &self.path,
                format!("there is no signature of document {document}; delete the file's folder"),
            )
        })
    }
}

/// Groups of documents that pairs connect; all but the first of each are duplicates.
#[derive(Debug, Default)]
pub struct Clusters {
    parents: HashMap<Item, Item>,
}

impl Clusters {
    /// Joins the groups of a pair.
    pub fn join(&mut self, a: Item, b: Item) {
        let (a, b) = (self.root(a), self.root(b));
        let (first, second) = (a.min(b), a.max(b));
        if first != second {
            self.parents.insert(second, first);
        }
    }

    fn root(&mut self, item: Item) -> Item {
        let mut root = item;
        while let Some(&parent) = self.parents.get(&root) {
            root = parent;
        }
        let mut at = item;
        while at != root {
            at = self.parents.insert(at, root).unwrap_or(root);
        }
        root
    }

    /// All duplicates by shard.
    ///
    /// # Errors
    /// [`DataError::Io`] of a temporary file.
    pub fn duplicates(&self, shards: usize) -> Result<KeyWriter, DataError> {
        let mut items: Vec<&Item> = self.parents.keys().collect();
        items.sort_unstable();
        let mut found = KeyWriter::new(shards);
        for &&(shard, item) in &items {
            found.push(shard as usize, 0, item)?;
        }
        Ok(found)
    }
}

/// Pairs on disk between the two steps: shard and document of both, as text.
///
/// # Errors
/// [`DataError::Io`].
pub fn write_pairs(path: &Path, pairs: &[(Item, Item)]) -> Result<(), DataError> {
    crate::write_atomically(path, |file| serde_json::to_writer(file, pairs).map_err(Into::into))
}

/// What [`write_pairs`] wrote.
///
/// # Errors
/// [`DataError::Io`], or [`DataError::Format`].
pub fn read_pairs(path: &Path) -> Result<Vec<(Item, Item)>, DataError> {
    let bytes = std::fs::read(path).map_err(|error| DataError::io(path, error))?;
    serde_json::from_slice(&bytes).map_err(|error| DataError::format(path, error))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn rows_follow_the_similarity() {
        let rows = |similarity| MinHash { shingle: 5, similarity }.rows();
        assert_eq!([rows(0.5), rows(0.7), rows(0.8), rows(0.9)], [3, 5, 7, 12]);
    }

    /// Texts of 1,000 random words with copies of Jaccard similarity 0.8 and others of 0.5: recall and precision over 5-word shingles.
    #[test]
    fn recall_and_precision_on_planted_duplicates() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let rules = MinHash { shingle: 5, similarity: 0.7 };
        let words = |rng: &mut rand_chacha::ChaCha8Rng, n: usize| {
            (0..n).map(|_| rng.random_range(0..50_000u32)).collect::<Vec<_>>()
        };
        let text = |words: &[u32]| words.iter().map(|word| format!("w{word}")).collect::<Vec<_>>().join(" ");
        // A block of s(1+s)⁻¹·2 of the words is common: similarity of shingles s.
        let copy = |rng: &mut rand_chacha::ChaCha8Rng, original: &[u32], s: f64| {
            let common = (2.0 * s / (1.0 + s) * original.len() as f64) as usize;
            [&original[..common], &words(rng, original.len() - common)].concat()
        };
        let mut texts = Vec::new();
        let pairs = 300;
        for index in 0..2 * pairs {
            let original = words(&mut rng, 1000);
            texts.push(text(&original));
            texts.push(text(&copy(&mut rng, &original, if index < pairs { 0.8 } else { 0.5 })));
        }
        let folder = tempfile::tempdir().unwrap();
        let signatures: Vec<_> = texts.iter().map(|text| rules.signature(text).unwrap()).collect();
        let mut keys = KeyWriter::new(rules.bands());
        for (item, signature) in signatures.iter().enumerate() {
            for (band, key) in rules.band_keys(signature).enumerate() {
                keys.push(band, key, item as u64).unwrap();
            }
        }
        let path = folder.path().join("signatures");
        let mut writer = SignatureWriter::create(&path).unwrap();
        signatures.iter().for_each(|signature| writer.push(signature).unwrap());
        writer.finish().unwrap();
        keys.write(&folder.path().join("keys")).unwrap();
        let keys = [KeyFile::open(&folder.path().join("keys")).unwrap()];
        let signatures = [Signatures::open(&path).unwrap()];
        let mut clusters = Clusters::default();
        for band in 0..rules.bands() {
            for (a, b) in rules.pairs(&keys, &signatures, band).unwrap() {
                clusters.join(a, b);
            }
        }
        let out = folder.path().join("found");
        clusters.duplicates(1).unwrap().write(&out).unwrap();
        let found = super::super::items_of_shard(&[KeyFile::open(&out).unwrap()], 0).unwrap();
        let found: Vec<u64> = found.iter().collect();
        let right = found.iter().filter(|&&item| item % 2 == 1 && item < 2 * pairs as u64).count();
        let (recall, precision) = (right as f64 / pairs as f64, right as f64 / found.len() as f64);
        assert!(recall >= 0.95 && precision >= 0.95, "recall {recall}, precision {precision}");
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signatures");
        let mut writer = SignatureWriter::create(&path).unwrap();
        writer.push(&[7; HASHES]).unwrap();
        writer.finish().unwrap();
        let signatures = Signatures::open(&path).unwrap();
        assert_eq!(signatures.get(0).unwrap(), [7; HASHES]);
        assert!(signatures.get(1).unwrap_err().to_string().contains("document 1"));
        std::fs::write(&path, "").unwrap();
        assert!(Signatures::open(&path).unwrap().get(0).is_err());
    }

    #[test]
    fn chains_of_pairs_are_one_group() {
        let mut clusters = Clusters::default();
        clusters.join((0, 5), (1, 2));
        clusters.join((1, 2), (0, 1));
        clusters.join((2, 0), (2, 1));
        let folder = tempfile::tempdir().unwrap();
        clusters.duplicates(3).unwrap().write(&folder.path().join("f")).unwrap();
        let file = [KeyFile::open(&folder.path().join("f")).unwrap()];
        let found: Vec<_> = (0..3).map(|shard| super::super::items_of_shard(&file, shard).unwrap()).collect();
        let found: Vec<Vec<u64>> = found.iter().map(|items| items.iter().collect()).collect();
        assert_eq!(found, [vec![5], vec![2], vec![1]]);
    }
}
