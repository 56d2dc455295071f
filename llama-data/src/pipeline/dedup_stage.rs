//! Comparing all shards of a source, partition by partition.

use std::path::{Path, PathBuf};

use super::claims::{self, Task};
use super::segment::ShardPath;
use super::step::Dedup;
use crate::dedup::keys::KeyFile;
use crate::dedup::minhash::{Clusters, Signatures, read_pairs, write_pairs};
use crate::dedup::{ItemSet, duplicates, items_of_shard};
use crate::{DataError, Progress};

/// What a comparison reads and writes.
pub(super) struct DedupStage<'a> {
    pub dedup: Dedup,
    pub partitions: usize,
    /// The shards that are compared.
    pub shards: &'a [ShardPath],
    /// Where the findings go.
    pub folder: PathBuf,
}

/// Partitions in which lines or documents are compared: a partition of 64-bit keys and places is 16 bytes a line, so that a gigabyte of
/// text needs some megabytes.
pub(super) fn partitions(dedup: Dedup, input_bytes: u64) -> usize {
    match dedup {
        Dedup::Near(rules) => rules.bands(),
        _ => input_bytes.div_ceil(1 << 30).clamp(8, 4096) as usize,
    }
}

impl DedupStage<'_> {
    /// Compares what is not compared yet.
    pub(super) fn run(&self, name: &str, threads: usize, progress: &dyn Progress) -> Result<(), DataError> {
        std::fs::create_dir_all(&self.folder).map_err(|error| DataError::io(&self.folder, error))?;
        let keys = || self.shards.iter().map(|shard| KeyFile::open(&shard.keys())).collect::<Result<Vec<_>, _>>();
        let Dedup::Near(rules) = self.dedup else {
            let tasks: Vec<Task> = self
                .found_files()
                .into_iter()
                .enumerate()
                .map(|(partition, result)| {
                    let path = result.clone();
                    let work = Box::new(move || duplicates(&keys()?, partition)?.write(&path));
                    Task { result, units: 1, work }
                })
                .collect();
            return claims::run(name, &tasks, threads, progress);
        };
        let pairs = |band: usize| self.folder.join(format!("pairs-{band:03}.json"));
        let tasks: Vec<Task> = (0..self.partitions)
            .map(|band| {
                let work = Box::new(move || {
                    let open = |shard: &ShardPath| Signatures::open(&shard.signatures());
                    let signatures = self.shards.iter().map(open).collect::<Result<Vec<_>, _>>()?;
                    write_pairs(&pairs(band), &rules.pairs(&keys()?, &signatures, band)?)
                });
                Task { result: pairs(band), units: 1, work }
            })
            .collect();
        claims::run(name, &tasks, threads, progress)?;
        let result = self.found_files().remove(0);
        let path = result.clone();
        let join = Box::new(move || {
            let mut clusters = Clusters::default();
            for band in 0..self.partitions {
                read_pairs(&pairs(band))?.into_iter().for_each(|(a, b)| clusters.join(a, b));
            }
            clusters.duplicates(self.shards.len())?.write(&path)
        });
        claims::run(name, &[Task { result, units: 1, work: join }], 1, progress)
    }

    /// The lines or documents of a shard that are duplicates.
    pub(super) fn duplicates_of(&self, shard: usize) -> Result<ItemSet, DataError> {
        let open = |path: &PathBuf| KeyFile::open(path);
        let found = self.found_files().iter().map(open).collect::<Result<Vec<_>, _>>()?;
        items_of_shard(&found, shard)
    }

    fn found_files(&self) -> Vec<PathBuf> {
        let file = |folder: &Path, index: usize| folder.join(format!("found-{index:05}.keys"));
        match self.dedup {
            Dedup::Near(_) => vec![file(&self.folder, 0)],
            _ => (0..self.partitions).map(|index| file(&self.folder, index)).collect(),
        }
    }
}
