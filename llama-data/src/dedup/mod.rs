//! Duplicates over more documents than fit into memory.
//!
//! Every shard of documents writes the keys of its items (lines, files, bands of MinHash signatures) into a [`keys`] file, divided
//! into partitions by key. A partition of all shards is then held at a time: of items with one key all but the first, by shard and
//! place, are duplicates. Partitions are independent, so they are divided over threads and machines.
//!
//! | what | key | paper |
//! | --- | --- | --- |
//! | lines | [`crate::clean::ccnet::line_key`] | CommonCrawl: "deduplicates the data at the line level" |
//! | documents | hash of the text | GitHub: "deduplicate the resulting dataset at the file level, with exact matches" |
//! | near-duplicates | [`minhash`] | books: "more than 90% content overlap" |

pub mod keys;
pub mod minhash;

use crate::DataError;
use keys::{KeyFile, KeyWriter};

/// An item: the index of its shard, and its index there.
pub type Item = (u32, u64);

/// The duplicates of one partition in all shards' key files, by shard.
///
/// # Errors
/// Those of reading.
pub fn duplicates(shards: &[KeyFile], partition: usize) -> Result<KeyWriter, DataError> {
    let mut all = gather(shards, partition)?;
    all.sort_unstable();
    let mut found = KeyWriter::new(shards.len());
    for pair in all.windows(2) {
        if pair[0].0 == pair[1].0 {
            let (shard, item) = pair[1].1;
            found.push(shard as usize, pair[1].0, item)?;
        }
    }
    Ok(found)
}

/// All entries of a partition.
pub(crate) fn gather(shards: &[KeyFile], partition: usize) -> Result<Vec<(u64, Item)>, DataError> {
    let mut all = Vec::new();
    for (shard, file) in shards.iter().enumerate() {
        all.extend(file.partition(partition)?.into_iter().map(|(key, item)| (key, (shard as u32, item))));
    }
    Ok(all)
}

/// Some items of a shard, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ItemSet(Vec<u64>);

impl ItemSet {
    /// Adds an item.
    pub fn insert(&mut self, item: u64) {
        let word = (item / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (item % 64);
    }

    /// Whether an item is there.
    pub fn contains(&self, item: u64) -> bool {
        self.0.get((item / 64) as usize).is_some_and(|word| word >> (item % 64) & 1 == 1)
    }

    /// All items, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        (0..self.0.len() as u64 * 64).filter(|&item| self.contains(item))
    }
}

/// The items of a shard that any of the files found by [`duplicates`] or [`minhash::Clusters`] lists.
///
/// # Errors
/// Those of reading.
pub fn items_of_shard(found: &[KeyFile], shard: usize) -> Result<ItemSet, DataError> {
    let mut items = ItemSet::default();
    for file in found {
        file.partition(shard)?.into_iter().for_each(|(_, item)| items.insert(item));
    }
    Ok(items)
}
