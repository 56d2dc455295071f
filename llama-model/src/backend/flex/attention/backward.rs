//! The backward: probabilities are made again from the log-sum-exp.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;

use super::super::product::{Matrix, Operand, Packing};
use super::super::simd::{exp2, sum2, vectorized};
use super::super::vector::Float;
use super::super::{Buffer, Output, contiguous, rows, team, values};
use super::packed::{Tiles, with_scratch};
use super::{Heads, K_TILE, Q_TILE, Sizes, Starts, readable};
use crate::backend::{AttentionSaved, AttentionSpec};

/// Tasks below which threads cannot share them evenly. Fixed, so that results do not depend on the number of threads.
const FEW_TASKS: usize = 16;

/// The gradients of queries, keys and values in `T`, as all are.
pub(in crate::backend::flex) fn backward<T: Operand>(saved: AttentionSaved<Flex>, grad: FlexTensor) -> [FlexTensor; 3] {
    let AttentionSaved { q, k, v, starts, out, lse, spec: AttentionSpec { scale, precision } } = saved;
    let scale = scale as f32;
    let [q, k, v, out, grad] = [q, k, v, out, grad].map(readable);
    let lse = contiguous(lse);
    let sizes = Sizes::new(&q, &k);
    let Sizes { batch, q_len, kv_len, n_heads, n_kv_heads, head_dim, .. } = sizes;
    let starts = Starts::new(starts, q_len);
    let (qs, ks) = (Heads::<T>::new(&q), Heads::<T>::new(&k));
    let packing = Packing::fastest(precision, false);
    let (k_columns, v_columns) =
        (Tiles::columns(packing, &sizes, &ks), Tiles::columns(packing, &sizes, &Heads::<T>::new(&v)));
    let k_terms = Tiles::terms(packing, &sizes, &ks);
    let (outs, grads, lse) = (Heads::<T>::new(&out), Heads::<T>::new(&grad), values::<f32>(&lse));
    let mut d_q = Buffer::zeros(batch * q_len * n_heads * head_dim);
    // A task has a key head and all query heads of its group, so it alone writes the key head's gradient. Of few key heads each query head is
    // a task, whose gradients are summed afterwards.
    let apart = sizes.group() > 1 && batch * n_kv_heads < FEW_TASKS;
    let (together, d_heads) = if apart { (1, n_heads) } else { (sizes.group(), n_kv_heads) };
    let mut d_k = Buffer::zeros(batch * kv_len * d_heads * head_dim);
    let mut d_v = Buffer::zeros(batch * kv_len * d_heads * head_dim);
    let [d_q_ptr, d_k_ptr, d_v_ptr] = [&mut d_q, &mut d_k, &mut d_v].map(|x| Output(x.as_mut_ptr()));
    let (rows_lanes, terms_lanes) = (packing.left_lanes(Q_TILE, head_dim), packing.right_lanes(head_dim, Q_TILE));
    let tile_lanes = packing.left_lanes(Q_TILE, K_TILE).max(packing.left_lanes(K_TILE, Q_TILE));
    let tile_len = Q_TILE * K_TILE;
    let lens = [rows_lanes, rows_lanes, terms_lanes, terms_lanes, tile_lanes, tile_len, tile_len];
    team::for_each(batch * d_heads, |index| {
        with_scratch(lens, |[q_rows, d_out_rows, q_terms, d_out_terms, panels, weights, d_scores]| {
            let (b, d_head) = (index / d_heads, index % d_heads);
            for head in d_head * together..(d_head + 1) * together {
                let kv_head = head / sizes.group();
                for tile in (0..sizes.q_tiles()).map(|tile| sizes.q_tile(tile)) {
                    let (start, rows) = tile;
                    let (q, d_out) = (qs.tile(b, head, start, rows), grads.tile(b, head, start, rows));
                    // SAFETY: there is room for tiles.
                    let (q_rows, d_out_rows) = unsafe { (packing.left(q_rows, q), packing.left(d_out_rows, d_out)) };
                    // SAFETY: as above.
                    let (q_terms, d_out_terms) =
                        unsafe { (packing.right(q_terms, q), packing.right(d_out_terms, d_out)) };
                    let lse = &lse[(b * n_heads + head) * q_len + start..][..rows];
                    let mut delta = [0.0f32; Q_TILE];
                    for (row, delta) in delta.iter_mut().enumerate().take(rows) {
                        *delta = dot(outs.row(b, head, start + row), grads.row(b, head, start + row));
                    }
                    let d_q = d_q_ptr.at(((b * q_len + start) * n_heads + head) * head_dim);
                    for (k_start, cols) in sizes.k_tiles(tile, starts.of(b)) {
                        let k = k_columns.tile(b, kv_head, k_start).first_columns(cols);
                        let v = v_columns.tile(b, kv_head, k_start).first_columns(cols);
                        // SAFETY: both buffers hold a tile.
                        let (weights, d_scores) = unsafe {
                            packing.multiply(weights, cols, q_rows, k, false);
                            packing.multiply(d_scores, cols, d_out_rows, v, false);
                            let tile = |scores| std::slice::from_raw_parts_mut(scores, rows * cols);
                            (tile(weights), tile(d_scores))
                        };
                        let tiles = weights.chunks_exact_mut(cols).zip(d_scores.chunks_exact_mut(cols));
                        for (row, (weights, d_scores)) in tiles.enumerate() {
                            let seen = sizes.range(start + row, starts.of(b), k_start, cols);
                            softmax_backward(weights, d_scores, seen, lse[row], delta[row], scale);
                        }
                        let weights = Matrix::rows(weights, rows, cols);
                        let d_scores = Matrix::rows(d_scores, rows, cols);
                        let at_key = ((b * kv_len + k_start) * d_heads + d_head) * head_dim;
                        let (q_stride, k_stride) = (n_heads * head_dim, d_heads * head_dim);
                        let k = k_terms.tile(b, kv_head, k_start).first_terms(cols);
                        // SAFETY: there is room; these rows of these heads are this task's own; the outputs begin as zeros.
                        unsafe {
                            let by_key = packing.left(panels, weights.transposed());
                            packing.multiply(d_v_ptr.at(at_key), k_stride, by_key, d_out_terms, true);
                            let by_key = packing.left(panels, d_scores.transposed());
                            packing.multiply(d_k_ptr.at(at_key), k_stride, by_key, q_terms, true);
                            let by_query = packing.left(panels, d_scores);
                            packing.multiply(d_q, q_stride, by_query, k, true);
                        }
                    }
                }
            }
        });
    });
    let [d_k, d_v] = [d_k, d_v].map(|d| if apart { sum_groups(&d, sizes.group(), head_dim) } else { d });
    [(d_q, q), (d_k, k), (d_v, v)].map(|(d, x)| rows::rounded(d.into_tensor(x.shape()), T::dtype()))
}

/// `[.., n_kv_heads, group, head_dim]` summed over groups.
fn sum_groups(x: &[f32], group: usize, head_dim: usize) -> Buffer {
    /// Elements of a task.
    const BLOCK: usize = 1 << 14;
    let mut out = Buffer::zeros(x.len() / group);
    let heads = BLOCK.div_ceil(head_dim);
    team::each(out.chunks_mut(heads * head_dim).zip(x.chunks(heads * group * head_dim)), |(out, x)| {
        for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(group * head_dim)) {
            x.chunks_exact(head_dim).for_each(|x| rows::add(out, x));
        }
    });
    out
}

vectorized! {
    /// One row of one tile: scores, still to be scaled, become weights, their gradients the scores' gradients, those outside
    /// `seen` zero.
    fn softmax_backward<'a>(
        weights: &'a mut [f32],
        d_scores: &'a mut [f32],
        seen: Range<usize>,
        lse: f32,
        delta: f32,
        scale: f32,
    ) -> () {
        for hidden in [0..seen.start, seen.end..weights.len()] {
            weights[hidden.clone()].fill(0.0);
            d_scores[hidden].fill(0.0);
        }
        for (weight, d_score) in weights[seen.clone()].iter_mut().zip(&mut d_scores[seen]) {
            *weight = exp2(weight.mul_add(scale * LOG2_E, -lse * LOG2_E));
            *d_score = *weight * (*d_score - delta) * scale;
        }
    }
}

vectorized! {
    fn dot<'a; T: Float>(a: &'a [T], b: &'a [T]) -> f32 {
        sum2(a, b, |a, b| a * b)
    }
}
