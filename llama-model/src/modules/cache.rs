//! Keys and values of past positions. The caller owns the cache and hands it to `forward`.

use burn::tensor::{Int, Tensor};

use super::follow::{Call, Mirror};
use super::{Attention, Block, Llama};
use crate::backend::{BlockCache, LlamaBackend, ops};
use crate::{ModelError, Precision};

const TAKEN: &str = "buffers are away only inside an operation";

/// Room for the keys and values of every layer. Full is an error, never a silent slide.
#[derive(Debug)]
pub struct KvCache<B: LlamaBackend> {
    layers: Vec<LayerCache<B>>,
    batch: usize,
    capacity: usize,
    /// The caches of the other members, where this is the one of the member that leads.
    mirror: Option<Mirror>,
}

/// One layer's keys and values, `[batch, capacity, n_kv_heads, head_dim]` each, in what [`Llama::cache`] says.
#[derive(Debug)]
pub struct LayerCache<B: LlamaBackend> {
    keys: Option<Tensor<B, 4>>,
    values: Option<Tensor<B, 4>>,
    len: usize,
}

impl<B: LlamaBackend> KvCache<B> {
    /// An empty cache of a model for `batch` sequences of up to `capacity` positions.
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`] if the model's rotary tables end before `capacity`.
    pub fn new(model: &Llama<B>, batch: usize, capacity: usize) -> Result<Self, ModelError> {
        if capacity > model.max_seq_len() {
            return Err(ModelError::SequenceTooLong { len: capacity, max: model.max_seq_len() });
        }
        let (device, dtype) = (model.device(), model.cache.dtype());
        let layer = |block: &Block<B>| {
            let Attention { wk, head_dim, .. } = &block.attention;
            let [width, _] = wk.dims();
            let zeros = || Some(Tensor::zeros([batch, capacity, width / head_dim, *head_dim], (&device, dtype)));
            LayerCache { keys: zeros(), values: zeros(), len: 0 }
        };
        let mirror = Mirror::new(model.team(), batch, capacity);
        Ok(Self { layers: model.layers.iter().map(layer).collect(), batch, capacity, mirror })
    }

    /// Positions in use.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether no position is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sequences.
    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    /// Tells the other members, where this is the cache of the member that leads, what is read into it in this thread's turn.
    pub(crate) fn tell(&self, tokens: &Tensor<B, 2, Int>) {
        if let Some(mirror) = &self.mirror {
            let tokens = tokens.to_data().iter::<i32>().collect();
            mirror.tell(&Call::Read { cache: mirror.cache, past: self.len(), tokens });
        }
    }

    /// Positions there are.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.len = layer.len.min(len));
    }

    /// An empty cache of the same model.
    pub(crate) fn empty_like(&self, batch: usize, capacity: usize) -> Self {
        let zeros = |cache: &Option<Tensor<B, 4>>| {
            let cache = cache.as_ref()?;
            let [_, _, heads, head_dim] = cache.dims();
            Some(Tensor::zeros([batch, capacity, heads, head_dim], (&cache.device(), cache.dtype())))
        };
        let layer =
            |layer: &LayerCache<B>| LayerCache { keys: zeros(&layer.keys), values: zeros(&layer.values), len: 0 };
        let mirror = self.mirror.as_ref().and_then(|mirror| mirror.another(batch, capacity));
        Self { layers: self.layers.iter().map(layer).collect(), batch, capacity, mirror }
    }

    /// Lets every sequence begin with the one of another cache.
    pub(crate) fn begin_with(&mut self, one: &Self) {
        let (rows, len) = (self.batch, one.len());
        if let (Some(mirror), Some(with)) = (&self.mirror, &one.mirror) {
            mirror.call(&Call::Begin { cache: mirror.cache, with: with.cache, len });
        }
        let begin = |cache: &mut Option<Tensor<B, 4>>, one: &Option<Tensor<B, 4>>| {
            if let (Some(all), Some(one)) = (cache.take(), one) {
                let read = one.clone().narrow(1, 0, len).repeat_dim(0, rows);
                *cache = Some(all.slice_assign([0..rows, 0..len], read));
            }
        };
        for (layer, one) in self.layers.iter_mut().zip(&one.layers) {
            begin(&mut layer.keys, &one.keys);
            begin(&mut layer.values, &one.values);
            layer.len = len;
        }
    }

    /// Whether `[batch, seq_len]` new tokens fit.
    pub(crate) fn check(&self, batch: usize, seq_len: usize, n_layers: usize) -> Result<(), ModelError> {
        if (batch, n_layers) != (self.batch, self.layers.len()) {
            return Err(ModelError::CacheMismatch {
                expected: format!("batch {} and {} layers", self.batch, self.layers.len()),
                found: format!("batch {batch} and {n_layers} layers"),
            });
        }
        if self.len() + seq_len > self.capacity {
            return Err(ModelError::CacheFull { len: self.len(), new: seq_len, capacity: self.capacity });
        }
        Ok(())
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut LayerCache<B> {
        &mut self.layers[layer]
    }
}

impl<B: LlamaBackend> LayerCache<B> {
    /// Positions in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is in use.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the buffers out for an operation that adds positions, so that they have one owner and are changed in place.
    pub(crate) fn update<T>(&mut self, operation: impl FnOnce(BlockCache<B>) -> (T, BlockCache<B>)) -> T {
        let take = |slot: &mut Option<Tensor<B, 4>>| ops::primitive(slot.take().expect(TAKEN));
        let cache = BlockCache { keys: take(&mut self.keys), values: take(&mut self.values), len: self.len };
        let (result, BlockCache { keys, values, len }) = operation(cache);
        *self = Self { keys: Some(ops::tensor(keys)), values: Some(ops::tensor(values)), len };
        result
    }

    /// Appends keys and values, and attends to all there are.
    pub(crate) fn attend(&mut self, [q, k, v]: [Tensor<B, 4>; 3], precision: Precision) -> Tensor<B, 4> {
        let (start, len) = (self.len, self.len + k.dims()[1]);
        // Taken out for the write, so that the buffer has one owner and is changed in place.
        let write = |slot: &mut Option<Tensor<B, 4>>, new: Tensor<B, 4>| {
            let buffer = slot.take().expect(TAKEN);
            slot.insert(ops::cache_write(buffer, new, start)).clone()
        };
        let (keys, values) = (write(&mut self.keys, k), write(&mut self.values, v));
        self.len = len;
        ops::cached_attention(q, keys, values, len, precision)
    }
}
