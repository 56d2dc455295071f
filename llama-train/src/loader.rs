//! The data as burn-train sees it.

use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::backend::Backend;
use llama_data::loader::{Loader, Rank, Sequences, TokenBatch};

/// Micro-batches from a position on. They stay on the host until the training step uploads them.
#[derive(Clone)]
pub struct TokenLoader {
    data: Arc<dyn Sequences>,
    batch: usize,
    start: u64,
    end: u64,
}

impl TokenLoader {
    /// Batches of `batch` sequences at the positions `start..end`.
    pub fn new(data: Arc<dyn Sequences>, batch: usize, start: u64, end: u64) -> Self {
        Self { data, batch, start, end }
    }
}

impl<B: Backend> DataLoader<B, TokenBatch> for TokenLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        let loader = Loader::start(self.data.clone(), Rank::ONLY, self.start, self.batch, 4);
        Box::new(TokenIterator { loader, batch: self.batch as u64, start: self.start, next: self.start, end: self.end })
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
        self.next += self.batch;
        self.loader.next_batch().ok()
    }
}

impl DataLoaderIterator<TokenBatch> for TokenIterator {
    fn progress(&self) -> Progress {
        Progress::new((self.next - self.start) as usize, (self.end - self.start) as usize)
    }
}
