//! Batches, made ahead of the training thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use crate::DataError;

/// One micro-batch on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[batch, seq_len]`, row after row.
    pub inputs: Vec<i32>,
    /// The token after each input, `[batch, seq_len]`.
    pub targets: Vec<i32>,
    /// For each input the position of the first token of its document, `[batch, seq_len]`; none lets attention reach into
    /// the documents before.
    pub starts: Option<Vec<i32>>,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq_len: usize,
}

/// Target of an input that is not trained on.
pub const NO_TARGET: i32 = -100;

impl TokenBatch {
    /// Tokens that are trained on.
    pub fn tokens(&self) -> usize {
        self.tokens_in(0..self.targets.len())
    }

    /// Tokens that are trained on, of some of `batch · seq_len`.
    pub fn tokens_in(&self, rows: Range<usize>) -> usize {
        self.targets[rows].iter().filter(|target| **target != NO_TARGET).count()
    }

    /// Tokens that the model reads.
    pub fn positions(&self) -> usize {
        self.inputs.len()
    }
}

/// Training sequences of one length by their place in a run: what is read there follows from the place alone, so that a run
/// can be resumed.
pub trait Sequences: Send + Sync {
    /// Tokens of a sequence.
    fn seq_len(&self) -> usize;

    /// Sequences there are; places past them begin another pass.
    fn sequences(&self) -> u64;

    /// Appends inputs and targets of the sequence at a place, and of its inputs the first positions of their documents, where
    /// attention is to stay inside them.
    fn read(&self, position: u64, inputs: &mut Vec<i32>, targets: &mut Vec<i32>, starts: &mut Option<Vec<i32>>);

    /// The sequences from a place on, as a batch.
    fn batch(&self, position: u64, batch: usize) -> TokenBatch {
        let len = batch * self.seq_len();
        let (mut inputs, mut targets, mut starts) = (Vec::with_capacity(len), Vec::with_capacity(len), None);
        for index in 0..batch as u64 {
            self.read(position + index, &mut inputs, &mut targets, &mut starts);
        }
        TokenBatch { inputs, targets, starts, batch, seq_len: self.seq_len() }
    }
}

/// One of several processes that train together on parts of each batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Which.
    pub index: u64,
    /// Of how many.
    pub count: u64,
}

impl Rank {
    /// The only one.
    pub const ONLY: Self = Self { index: 0, count: 1 };
}

/// Reads batches from a position on, a few ahead, on a thread of its own.
pub struct Loader {
    batches: Receiver<TokenBatch>,
}

impl Loader {
    /// Starts reading `batch` windows at a time, at most `ahead` batches early.
    ///
    /// All ranks together take `rank.count` · `batch` windows from `position` on, and so forth: which windows a step has depends on
    /// their product only, so a run can go on with more or fewer ranks.
    pub fn start(data: Arc<dyn Sequences>, rank: Rank, position: u64, batch: usize, ahead: usize) -> Self {
        let (sender, batches) = sync_channel(ahead);
        std::thread::spawn(move || {
            let mut position = position + rank.index * batch as u64;
            // Ends when the receiver is gone.
            while sender.send(data.batch(position, batch)).is_ok() {
                position += rank.count * batch as u64;
            }
        });
        Self { batches }
    }

    /// The next batch; waits until it is there.
    ///
    /// # Errors
    /// [`DataError::Loader`] if the thread ended, for example because a shard was truncated while it was read.
    pub fn next_batch(&mut self) -> Result<TokenBatch, DataError> {
        self.batches.recv().map_err(|error| DataError::Loader(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenDataset;
    use crate::mixture::Mixture;
    use crate::shard::ShardWriter;

    #[test]
    fn a_loader_started_later_continues_the_same_batches() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(&folder.path().join("train-0.bin"), 500, 7).unwrap();
        writer.push(&(0..401).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        let open = || TokenDataset::open(folder.path(), "train", 7, 8).unwrap();
        let sources = vec![("a".to_string(), 2.0, open()), ("b".to_string(), 1.0, open())];
        let data = Arc::new(Mixture::new(sources, 3));
        let take = |rank, position, batch, n| {
            let mut loader = Loader::start(data.clone(), rank, position, batch, 2);
            (0..n).map(|_| loader.next_batch().unwrap()).collect::<Vec<_>>()
        };
        // 30 batches of 4 windows are more than two epochs of 50.
        let all = take(Rank::ONLY, 0, 4, 30);
        assert_eq!(take(Rank::ONLY, 4 * 17, 4, 13), all[17..]);
        // Two ranks see the halves of each batch, and one goes on where two have stopped.
        let halves = [0, 1].map(|index| take(Rank { index, count: 2 }, 0, 2, 17));
        for (step, whole) in all[..17].iter().enumerate() {
            let inputs = [halves[0][step].inputs.clone(), halves[1][step].inputs.clone()].concat();
            assert_eq!(inputs, whole.inputs);
        }
        assert_ne!(all[0], all[1]);
    }
}
