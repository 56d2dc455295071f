//! Batches, made ahead of the training thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use crate::order::Order;
use crate::{DataError, TokenDataset};

/// One micro-batch on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[batch, seq_len]`, row after row.
    pub inputs: Vec<i32>,
    /// The token after each input, `[batch, seq_len]`.
    pub targets: Vec<i32>,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq_len: usize,
}

impl TokenBatch {
    /// The batch of the `batch` windows at `position` of an order.
    pub fn read(data: &TokenDataset, order: Order, position: u64, batch: usize) -> Self {
        let len = batch * data.seq_len();
        let (mut inputs, mut targets) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for index in 0..batch as u64 {
            data.read(order.window(position + index), &mut inputs, &mut targets);
        }
        Self { inputs, targets, batch, seq_len: data.seq_len() }
    }

    /// Tokens that are trained on.
    pub fn tokens(&self) -> usize {
        self.targets.len()
    }
}

/// Reads the batches of an order from a position on, a few ahead, on a thread of its own.
pub struct Loader {
    batches: Receiver<TokenBatch>,
}

impl Loader {
    /// Starts reading `batch` windows at a time from `position` on, at most `ahead` batches early.
    pub fn start(data: Arc<TokenDataset>, order: Order, position: u64, batch: usize, ahead: usize) -> Self {
        let (sender, batches) = sync_channel(ahead);
        std::thread::spawn(move || {
            let mut position = position;
            // Ends when the receiver is gone.
            while sender.send(TokenBatch::read(&data, order, position, batch)).is_ok() {
                position += batch as u64;
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
    use crate::shard::ShardWriter;

    #[test]
    fn a_loader_started_later_continues_the_same_batches() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(&folder.path().join("train-0.bin"), 500, 7).unwrap();
        writer.push(&(0..401).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        let data = Arc::new(TokenDataset::open(folder.path(), "train", 7, 8).unwrap());
        let order = Order::new(data.windows(), 3);
        let take = |position, n| {
            let mut loader = Loader::start(data.clone(), order, position, 4, 2);
            (0..n).map(|_| loader.next_batch().unwrap()).collect::<Vec<_>>()
        };
        // 30 batches of 4 windows are more than two epochs of 50.
        let all = take(0, 30);
        assert_eq!(take(4 * 17, 13), all[17..]);
        assert_ne!(all[0], all[1]);
    }
}
