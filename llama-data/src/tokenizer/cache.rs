//! Words that were encoded before.

use std::sync::Mutex;

use rustc_hash::FxHashMap;

/// Bytes of a word that is worth keeping.
const MAX_WORD: usize = 48;
/// Words a cache holds before it starts anew.
const MAX_WORDS: usize = 1 << 17;

/// Words that were encoded before, with their ids.
#[derive(Clone, Debug, Default)]
pub struct EncodeCache {
    /// Where each word's ids begin and end.
    words: FxHashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

impl EncodeCache {
    /// Appends the ids of a word, which `encode` appends if it is new.
    pub(super) fn append(&mut self, word: &str, ids: &mut Vec<u32>, encode: impl FnOnce(&mut Vec<u32>)) {
        if let Some(&(start, end)) = self.words.get(word) {
            return ids.extend_from_slice(&self.ids[start as usize..end as usize]);
        }
        let start = ids.len();
        encode(ids);
        if word.len() <= MAX_WORD {
            if self.words.len() >= MAX_WORDS {
                self.words.clear();
                self.ids.clear();
            }
            let range = (self.ids.len() as u32, (self.ids.len() + ids.len() - start) as u32);
            self.ids.extend_from_slice(&ids[start..]);
            self.words.insert(word.into(), range);
        }
    }
}

/// Caches for many threads: each takes one that is free, or begins one.
#[derive(Debug, Default)]
pub struct EncodeCaches(Mutex<Vec<EncodeCache>>);

impl Clone for EncodeCaches {
    /// Empty ones.
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl EncodeCaches {
    /// Calls with a cache that nobody else uses meanwhile.
    pub fn with<T>(&self, work: impl FnOnce(&mut EncodeCache) -> T) -> T {
        let lock = || self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut cache = lock().pop().unwrap_or_default();
        let result = work(&mut cache);
        lock().push(cache);
        result
    }
}
