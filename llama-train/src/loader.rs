//! The data as burn-train sees it.

use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::backend::Backend;
use llama_data::loader::{Loader, Rank, Sequences, TokenBatch};

/// A rank's micro-batches from a position on. They stay on the host until the training step uploads them.
#[derive(Clone)]
pub struct TokenLoader {
    data: Arc<dyn Sequences>,
    rank: Rank,
    batch: usize,
    start: u64,
    end: u64,
}

impl TokenLoader {
    /// Of the batches of `batch` sequences at the positions `start..end` each `count`-th, from the rank's own on.
    pub fn new(data: Arc<dyn Sequences>, rank: Rank, batch: usize, start: u64, end: u64) -> Self {
        Self { data, rank, batch, start, end }
    }
}

impl<B: Backend> DataLoader<B, TokenBatch> for TokenLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        let loader = Loader::start(self.data.clone(), self.rank, self.start, self.batch, 4);
        let (batch, start, end) = (self.batch as u64, self.start, self.end);
        let (next, stride) = (start + self.rank.index * batch, self.rank.count * batch);
        Box::new(TokenIterator { loader, batch, stride, start, next, end })
    }

    fn num_items(&self) -> usize {
        (self.end - self.start) as usize
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, TokenBatch>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, TokenBatch>> {
        let (start, end) = (self.start + start as u64, (self.start + end as u64).min(self.end));
        Arc::new(Self { start, end, ..self.clone() })
    }
}

struct TokenIterator {
    loader: Loader,
    batch: u64,
    stride: u64,
    start: u64,
    next: u64,
    end: u64,
}

impl Iterator for TokenIterator {
    type Item = TokenBatch;

    /// `None` at the end, and if the loader's thread stopped before it.
    fn next(&mut self) -> Option<TokenBatch> {
        if self.next + self.batch > self.end {
            return None;
        }
        self.next += self.stride;
        self.loader.next_batch().ok()
    }
}

impl DataLoaderIterator<TokenBatch> for TokenIterator {
    fn progress(&self) -> Progress {
        let done = self.next.min(self.end) - self.start;
        Progress::new(done as usize, (self.end - self.start) as usize)
    }
}
