//! Inference with a divided model: one member leads, chooses tokens and tells the others what it reads, so that nothing but the forward pass
//! knows of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::{Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{KvCache, Llama};
use crate::shard::Team;
use crate::{LlamaBackend, ModelError};

/// What the member that leads does with a cache, for the others to do alike.
#[derive(Serialize, Deserialize)]
pub(super) enum Call {
    /// Reads `tokens`, `[batch, len]`, after `past` positions of a cache.
    Read { cache: u64, past: usize, tokens: Vec<i32> },
    /// Makes a cache.
    Make { cache: u64, batch: usize, capacity: usize },
    /// Lets the sequences of a cache begin with the one of another, of which `len` positions are in use.
    Begin { cache: u64, with: u64, len: usize },
    /// Drops a cache.
    Drop { cache: u64 },
}

/// A cache that the other members have, too.
#[derive(Debug)]
pub(super) struct Mirror {
    pub cache: u64,
    team: Team,
}

impl Mirror {
    /// Tells the other members of a new cache; none if there are none to be told.
    pub fn new(team: &Team, batch: usize, capacity: usize) -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        team.leads().then(|| {
            let mirror = Self { cache: NEXT.fetch_add(1, Ordering::Relaxed), team: team.clone() };
            mirror.call(&Call::Make { cache: mirror.cache, batch, capacity });
            mirror
        })
    }

    /// Tells the other members, when none of them reads for another thread.
    pub fn call(&self, call: &Call) {
        let _turn = self.team.turn();
        self.tell(call);
    }

    /// Tells the other members, in this thread's turn.
    pub fn tell(&self, call: &Call) {
        self.team.tell(&serde_json::to_vec(call).expect("numbers have a JSON form"));
    }

    /// Another of the same team.
    pub fn another(&self, batch: usize, capacity: usize) -> Option<Self> {
        Self::new(&self.team, batch, capacity)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.call(&Call::Drop { cache: self.cache });
    }
}

impl<B: LlamaBackend> Llama<B> {
    /// The model as the member that leads: what it reads into caches the others read with it, while they [`follow`](Self::follow). Without
    /// this, all members must make the same calls. Only the first can lead.
    #[must_use]
    pub fn leading(self) -> Self {
        Self { team: self.team.leading(), ..self }
    }

    /// Does what the member that [leads](Self::leading) does, until it is gone.
    ///
    /// # Errors
    /// [`ModelError::Member`] if it sends what is no call, and those of its calls.
    pub fn follow(&self) -> Result<(), ModelError> {
        let mut caches: HashMap<u64, KvCache<B>> = HashMap::new();
        let lost = || ModelError::Member("the member that leads sent what is no call; is it another version?".into());
        while let Some(bytes) = self.team.hear() {
            match serde_json::from_slice(&bytes).map_err(|_| lost())? {
                Call::Make { cache, batch, capacity } => {
                    caches.insert(cache, KvCache::new(self, batch, capacity)?);
                }
                Call::Read { cache, past, tokens } => {
                    let cache = caches.get_mut(&cache).ok_or_else(lost)?;
                    cache.truncate(past);
                    let (batch, len) = (cache.batch(), tokens.len() / cache.batch().max(1));
                    let tokens = TensorData::new(tokens, [batch, len]);
                    self.hidden(Tensor::<B, 2, Int>::from_data(tokens, &self.device()), Some(cache))?;
                }
                Call::Begin { cache, with, len } => {
                    let mut one = caches.remove(&with).ok_or_else(lost)?;
                    one.truncate(len);
                    caches.get_mut(&cache).ok_or_else(lost)?.begin_with(&one);
                    caches.insert(with, one);
                }
                Call::Drop { cache } => {
                    caches.remove(&cache);
                }
            }
        }
        Ok(())
    }
}
