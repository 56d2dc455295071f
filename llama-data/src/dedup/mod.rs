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
            found.push(shard as usize, pair[1].0, item);
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

/// The items of a shard that any of the files found by [`duplicates`] or [`minhash::Clusters`] lists, sorted.
///
/// # Errors
/// Those of reading.
pub fn items_of_shard(found: &[KeyFile], shard: usize) -> Result<Vec<u64>, DataError> {
    let mut items = Vec::new();
    for file in found {
        items.extend(file.partition(shard)?.into_iter().map(|(_, item)| item));
    }
    items.sort_unstable();
    items.dedup();
    Ok(items)
}
