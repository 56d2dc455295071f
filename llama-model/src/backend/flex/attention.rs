//! Causal attention in tiles (paper, section 2.4; Dao, FlashAttention-2): scores exist for one tile at a time, tiles
//! above the diagonal are never touched, the backward recomputes the probabilities from the log-sum-exp.
//!
//! Keys and values are packed once for all queries and heads that read them (`packed`). Then threads take heads, forward tiles of
//! their queries. Tensors are read with their strides, so neither projections nor caches are copied otherwise, but for caches in
//! fewer bits that many queries read.

mod backward;
mod few;
mod packed;
mod vectors;

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, Element, FloatDType, Int, Shape, Tensor, TensorMetadata};
use burn_flex::FlexTensor;
use bytemuck::Pod;
use half::bf16;

pub(super) use self::backward::backward;
use self::packed::{Tiles, with_scratch};
use super::product::{Matrix, Operand, Packing};
use super::simd::{exp2, max, replace, vectorized};
use super::stored::Stored;
use super::vector::Number;
use super::{Buffer, Output, Strided, contiguous, rows, team, whole};
use crate::backend::AttentionSpec;
use burn::backend::Flex;

/// Queries of a tile.
const Q_TILE: usize = 64;
/// Keys of a tile.
const K_TILE: usize = 256;

/// Queries below which tiles, which pack all keys and values, are no use.
const FEW: usize = 8;

/// Numbers of a query that a matrix unit takes at a time.
const TERMS: usize = 32;

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    q_len: usize,
    kv_len: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

impl Sizes {
    fn new(q: &FlexTensor, k: &FlexTensor) -> Self {
        let [batch, q_len, n_heads, head_dim] = q.shape().dims();
        let [_, kv_len, n_kv_heads, _] = k.shape().dims();
        Self { batch, q_len, kv_len, n_heads, n_kv_heads, head_dim }
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// How many tiles of queries there are.
    fn q_tiles(&self) -> usize {
        self.q_len.div_ceil(Q_TILE)
    }

    /// A tile of queries: first query and number.
    fn q_tile(&self, tile: usize) -> (usize, usize) {
        let start = tile * Q_TILE;
        (start, Q_TILE.min(self.q_len - start))
    }

    /// Keys that query `i` sees: bottom-right aligned.
    fn visible(&self, i: usize) -> usize {
        self.kv_len - self.q_len + i + 1
    }

    /// Tiles of keys that a tile of queries sees: first key and number.
    fn k_tiles(
        &self,
        (q_start, q_rows): (usize, usize),
        starts: &[usize],
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let end = self.visible(q_start + q_rows - 1);
        // The rows' documents begin one after the other.
        let first = starts.get(q_start).map_or(0, |first| first / K_TILE * K_TILE);
        (first..end).step_by(K_TILE).map(move |start| (start, K_TILE.min(end - start)))
    }

    /// Of the `cols` keys from `k_start` on, those that query `i` sees.
    fn range(&self, i: usize, starts: &[usize], k_start: usize, cols: usize) -> Range<usize> {
        let end = self.visible(i).saturating_sub(k_start).min(cols);
        let first = starts.get(i).map_or(0, |first| first.saturating_sub(k_start));
        first.min(end)..end
    }
}

/// The first key of each query, sequence after sequence, or nothing.
struct Starts {
    all: Vec<usize>,
    q_len: usize,
}

impl Starts {
    fn new(starts: Option<FlexTensor>, q_len: usize) -> Self {
        let read =
            |starts| Tensor::<Flex, 2, Int>::from_primitive(starts).into_data().iter::<i64>().collect::<Vec<_>>();
        let all: Vec<usize> =
            starts.map(read).unwrap_or_default().into_iter().map(|start| start.max(0) as usize).collect();
        Self { all, q_len }
    }

    /// Those of a sequence.
    fn of(&self, batch: usize) -> &[usize] {
        self.all.get(batch * self.q_len..(batch + 1) * self.q_len).unwrap_or(&[])
    }
}

/// `[batch, len, heads, head_dim]` with unit stride inside a head.
struct Heads<'a, T = f32>(Strided<'a, T>);

// SAFETY: the pointers inside are only read, and the borrow keeps the tensor alive.
unsafe impl<T: Sync> Sync for Heads<'_, T> {}

impl<'a, T: Element + Pod> Heads<'a, T> {
    fn new(x: &'a FlexTensor) -> Self {
        Self(Strided::new(x))
    }
}

impl<T> Heads<'_, T> {
    /// The first element of a head's row, and how many are between rows.
    fn at(&self, batch: usize, head: usize, row: usize) -> (*const T, isize) {
        let x = &self.0;
        let offset = batch as isize * x.stride(0) + row as isize * x.stride(1) + head as isize * x.stride(2);
        // SAFETY: batch, head and row are inside the tensor.
        (unsafe { x.ptr().offset(offset) }, x.stride(1))
    }
}

impl<T: Operand> Heads<'_, T> {
    /// Rows `start..start + rows` of a head.
    fn tile(&self, batch: usize, head: usize, start: usize, rows: usize) -> Matrix {
        let (first, row_stride) = self.at(batch, head, start);
        Matrix { elements: T::elements(first), rows, cols: self.0.dim(3), row_stride, col_stride: 1 }
    }

    /// A row of a head.
    fn row(&self, batch: usize, head: usize, row: usize) -> &[T] {
        let (first, _) = self.at(batch, head, row);
        // SAFETY: the row is inside the tensor.
        unsafe { std::slice::from_raw_parts(first, self.0.dim(3)) }
    }
}

/// Keeps a tensor whose heads have unit stride, else copies it.
fn readable(x: FlexTensor) -> FlexTensor {
    if x.layout().strides()[3] == 1 { x } else { contiguous(x) }
}

/// Whether [`cached`] reads a cache of this type.
pub(super) fn reads(cache: &FlexTensor) -> bool {
    matches!(cache.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// Attention to the first `len` positions of a cache, in whatever floats it keeps them.
pub(super) fn cached(
    q: FlexTensor,
    keys: FlexTensor,
    values: FlexTensor,
    len: usize,
    spec: AttentionSpec,
) -> FlexTensor {
    let few = q.shape()[1] < FEW;
    let [keys, values] = [keys, values].map(|cache| match cache.dtype() {
        dtype if few || dtype == DType::F32 => cache.narrow(1, 0, len),
        // Packing for tiles reads f32; it is little beside what many queries make of it.
        _ => widened(&whole(cache), len),
    });
    forward(q, keys, values, None, spec).0
}

/// The first `len` positions of a cache in f32.
fn widened(cache: &FlexTensor, len: usize) -> FlexTensor {
    let [batch, capacity, heads, head_dim] = cache.shape().dims();
    let (width, stored) = (heads * head_dim, Stored::floats(cache));
    // SAFETY: every position is written.
    let mut out = unsafe { Buffer::unwritten(batch * len * width) };
    team::each(out.chunks_exact_mut(width).enumerate(), |(row, out)| {
        let at = row / len * capacity + row % len;
        stored.rows(at, at + 1, width).widen(out);
    });
    out.into_tensor(Shape::new([batch, len, heads, head_dim]))
}

/// Attention, and the log-sum-exp of each query's scores: of f32 or of bf16. Of fewer than [`FEW`] queries keys and values may be of another type.
pub(super) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    starts: Option<FlexTensor>,
    spec: AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let tensors = [q, k, v].map(readable);
    let [q, k, _] = &tensors;
    let sizes = Sizes::new(q, k);
    let starts = Starts::new(starts, sizes.q_len);
    match q.dtype() {
        DType::BF16 if sizes.q_len < FEW => {
            let [q, k, v] = tensors;
            let (out, lse) = of_few([Flex::float_cast(q, FloatDType::F32), k, v], &sizes, &starts, spec);
            (rows::rounded(out, DType::BF16), lse)
        }
        DType::BF16 => in_tiles::<bf16>(tensors, &sizes, &starts, spec),
        _ if sizes.q_len < FEW => of_few(tensors, &sizes, &starts, spec),
        _ => in_tiles::<f32>(tensors, &sizes, &starts, spec),
    }
}

fn of_few([q, k, v]: [FlexTensor; 3], sizes: &Sizes, starts: &Starts, spec: AttentionSpec) -> (FlexTensor, FlexTensor) {
    let &Sizes { batch, q_len, n_heads, head_dim, .. } = sizes;
    let (out_len, lse_len) = (batch * q_len * n_heads * head_dim, batch * n_heads * q_len);
    let (mut out, mut lse) = (Buffer::zeros(out_len), Buffer::zeros(lse_len));
    few::forward(sizes, &Heads::new(&q), [&k, &v], starts, spec.scale as f32, [&mut out, &mut lse]);
    (out.into_tensor(q.shape()), lse.into_tensor(Shape::new([batch, n_heads, q_len])))
}

fn in_tiles<T: Operand>(
    [q, k, v]: [FlexTensor; 3],
    sizes: &Sizes,
    starts: &Starts,
    spec: AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let scale = spec.scale as f32;
    let &Sizes { batch, q_len, n_heads, head_dim, .. } = sizes;
    let (out_len, lse_len) = (batch * q_len * n_heads * head_dim, batch * n_heads * q_len);
    // SAFETY: every query's row and sum are written below.
    let (mut out, mut lse) = unsafe { (Buffer::<T>::unwritten(out_len), Buffer::unwritten(lse_len)) };
    let packing = Packing::fastest(spec.precision, q_len >= Q_TILE && head_dim.is_multiple_of(TERMS));
    let (keys, values) =
        (Tiles::columns(packing, sizes, &Heads::<T>::new(&k)), Tiles::terms(packing, sizes, &Heads::<T>::new(&v)));
    let qs = Heads::<T>::new(&q);
    let (out_ptr, lse_ptr) = (Output(out.as_mut_ptr()), Output(lse.as_mut_ptr()));
    let tiles = sizes.q_tiles();
    // Sums are made where they lie together: rows of a head lie so far apart that they push each other out of the cache.
    let lens =
        [packing.left_lanes(Q_TILE, head_dim), packing.left_lanes(Q_TILE, K_TILE), Q_TILE * K_TILE, Q_TILE * head_dim];
    team::for_each(batch * n_heads * tiles, |index| {
        with_scratch(lens, |[q_panels, panels, scores, outs]| {
            // The last tiles see the most keys: what is left to share at the end is little.
            let (index, tile) = (index / tiles, tiles - 1 - index % tiles);
            let (b, head) = (index / n_heads, index % n_heads);
            let kv_head = head / sizes.group();
            let (start, rows) = sizes.q_tile(tile);
            // SAFETY: there is room for a tile.
            let q = unsafe { packing.left(q_panels, qs.tile(b, head, start, rows)) };
            // SAFETY: these rows of this head are this task's own.
            let lse = unsafe { lse_ptr.slice(index * q_len + start, rows) };
            let mut maxima = [f32::NEG_INFINITY; Q_TILE];
            let mut sums = [0.0f32; Q_TILE];
            for (index, (k_start, cols)) in sizes.k_tiles((start, rows), starts.of(b)).enumerate() {
                let (k, v) = (keys.tile(b, kv_head, k_start), values.tile(b, kv_head, k_start));
                // SAFETY: `scores` holds a tile.
                let scores = unsafe {
                    packing.multiply(scores, cols, q, k.first_columns(cols), false);
                    std::slice::from_raw_parts_mut(scores, rows * cols)
                };
                for (row, scores) in scores.chunks_exact_mut(cols).enumerate() {
                    let seen = sizes.range(start + row, starts.of(b), k_start, cols);
                    let keep = online_softmax(scores, seen, scale * LOG2_E, &mut maxima[row], &mut sums[row]);
                    if index > 0 && keep != 1.0 {
                        // SAFETY: they are written.
                        let out = unsafe { std::slice::from_raw_parts_mut(outs.add(row * head_dim), head_dim) };
                        out.iter_mut().for_each(|x| *x *= keep);
                    }
                }
                // SAFETY: there is room.
                unsafe {
                    let weights = packing.left(panels, Matrix::rows(scores, rows, cols));
                    packing.multiply(outs, head_dim, weights, v.first_terms(cols), index > 0);
                }
            }
            for row in 0..rows {
                lse[row] = maxima[row] * LN_2 + sums[row].ln();
                let inverse = 1.0 / sums[row];
                let at = ((b * q_len + start + row) * n_heads + head) * head_dim;
                // SAFETY: this row of this head is this task's own; all sums are written.
                let (out, sums) = unsafe {
                    (out_ptr.slice(at, head_dim), std::slice::from_raw_parts(outs.add(row * head_dim), head_dim))
                };
                finish_row(out, sums, inverse);
            }
        });
    });
    (out.into_tensor(q.shape()), lse.into_tensor(Shape::new([batch, n_heads, q_len])))
}

vectorized! {
    fn finish_row<'a; T: Number>(out: &'a mut [T], sums: &'a [f32], inverse: f32) -> () {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::nearest(sum * inverse);
        }
    }
}

vectorized! {
    /// One row of one tile of the online softmax: scores, still to be scaled, become weights relative to the largest so far,
    /// those outside `seen` zero. Returns the factor for what was summed before. `scale` and `largest` are in powers of two.
    fn online_softmax<'a>(
        scores: &'a mut [f32],
        seen: Range<usize>,
        scale: f32,
        largest: &'a mut f32,
        sum: &'a mut f32,
    ) -> f32 {
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        let seen = &mut scores[seen];
        if seen.is_empty() {
            return 1.0;
        }
        let new_largest = (scale * max(seen, |score| score)).max(*largest);
        let keep = exp2(*largest - new_largest);
        *sum = *sum * keep + replace(seen, |score| exp2(score.mul_add(scale, -new_largest)));
        *largest = new_largest;
        keep
    }
}
