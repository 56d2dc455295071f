//! A few queries over many keys, as in decoding: there is no tile of queries to share a packed key with, so keys and values are
//! read where they are, in whatever floats they are kept.

use std::ops::Range;

use burn::tensor::{DType, Element};
use burn_flex::FlexTensor;
use bytemuck::Pod;
use half::{bf16, f16};

use super::super::simd::{exp, max, replace, vectorized};
use super::super::team;
use super::super::vector::{Float, by_vectors};
use super::vectors::{self, Strip};
use super::{Buffer, Heads, Sizes, Starts};

/// Keys that a task takes, of one head: fixed, so that results do not depend on the number of threads.
pub(super) const CHUNK: usize = 64;
/// Queries of a group that are computed together, at most.
pub(super) const QUERIES: usize = 4;
/// Bytes of a position that a task reads, at most, where one head has fewer.
const RUN: usize = 1024;
/// Elements of all keys from which several threads are faster.
const PARALLEL: usize = 1 << 14;

/// Attention of a few queries to keys and values in any floats, in two steps (the split over keys is that of FlashDecoding): a part of the
/// result for each chunk of keys, with its largest score and its sum of exponentials, and then the parts of each query put together.
pub(super) fn forward(
    sizes: &Sizes,
    qs: &Heads,
    [k, v]: [&FlexTensor; 2],
    starts: &Starts,
    scale: f32,
    results: [&mut [f32]; 2],
) {
    match k.dtype() {
        DType::BF16 => over::<bf16>(sizes, qs, [k, v].map(Heads::new), starts, scale, results),
        DType::F16 => over::<f16>(sizes, qs, [k, v].map(Heads::new), starts, scale, results),
        _ => over::<f32>(sizes, qs, [k, v].map(Heads::new), starts, scale, results),
    }
}

fn over<T: Float + Element + Pod>(
    sizes: &Sizes,
    qs: &Heads,
    [ks, vs]: [Heads<T>; 2],
    starts: &Starts,
    scale: f32,
    [out, lse]: [&mut [f32]; 2],
) {
    let Sizes { batch, q_len, kv_len, n_heads, n_kv_heads, head_dim, .. } = *sizes;
    let group = sizes.group();
    let queries = group * q_len;
    let chunks = kv_len.div_ceil(CHUNK);
    // For each chunk and key head the queries' parts, and behind them largest score and sum of each.
    let part = queries * (head_dim + 2);
    if part == 0 {
        return;
    }
    let together = heads_together(n_kv_heads, head_dim * size_of::<T>());
    let sets = n_kv_heads / together;
    // SAFETY: the tasks write all of them.
    let mut parts = unsafe { Buffer::unwritten(batch * n_kv_heads * chunks * part) };
    let task = |(index, parts): (usize, &mut [f32])| {
        let (b, set, start) = (index / chunks / sets, index / chunks % sets, index % chunks * CHUNK);
        let rows = CHUNK.min(kv_len - start);
        for (i, part) in parts.chunks_exact_mut(part).enumerate() {
            let kv_head = set * together + i;
            let [keys, values] = [&ks, &vs].map(|heads| {
                let (ptr, stride) = heads.at(b, kv_head, start);
                Strip { ptr, rows, stride }
            });
            let (outs, sums) = part.split_at_mut(queries * head_dim);
            let blocks = outs.chunks_mut(QUERIES * head_dim).zip(sums.as_chunks_mut::<2>().0.chunks_mut(QUERIES));
            for (block, (outs, sums)) in blocks.enumerate() {
                let mut of_block: [Query; QUERIES] = std::array::from_fn(|_| (&[][..], 0..0));
                for (i, (q, seen)) in of_block[..sums.len()].iter_mut().enumerate() {
                    let query = block * QUERIES + i;
                    let row = query % q_len;
                    *q = qs.row(b, kv_head * group + query / q_len, row);
                    *seen = sizes.range(row, starts.of(b), start, rows);
                }
                attend(outs, sums, &of_block[..sums.len()], [keys, values], scale);
            }
        }
    };
    let tasks = parts.chunks_exact_mut(together * part).enumerate();
    let alone = batch * n_kv_heads * kv_len * head_dim < PARALLEL;
    if alone {
        tasks.for_each(task)
    } else {
        team::each(tasks, task)
    }
    // Sequence, position and head of a result.
    let place = |index: usize| (index / n_heads / q_len, index / n_heads % q_len, index % n_heads);
    let put_together = |((index, out), lse): ((usize, &mut [f32]), &mut f32)| {
        let (b, row, head) = place(index);
        let (kv_head, query) = (head / group, head % group * q_len + row);
        let (set, i) = (kv_head / together, kv_head % together);
        let parts = &parts[((b * sets + set) * chunks * together + i) * part..];
        let stride = together * part;
        *lse = combine(out, parts.chunks(stride).take(chunks), query * head_dim, queries * head_dim + 2 * query);
    };
    let mut lses = vec![0.0f32; batch * q_len * n_heads];
    let results = out.chunks_exact_mut(head_dim).enumerate().zip(&mut lses);
    if alone {
        results.for_each(put_together)
    } else {
        team::each(results, put_together)
    }
    for (index, of_query) in lses.into_iter().enumerate() {
        let (b, row, head) = place(index);
        lse[(b * n_heads + head) * q_len + row] = of_query;
    }
}

/// Heads that a task takes one after the other, since what they read is side by side: as many as make rows of [`RUN`] bytes.
fn heads_together(n_kv_heads: usize, bytes: usize) -> usize {
    (1..=RUN / bytes).rev().find(|count| n_kv_heads.is_multiple_of(*count)).unwrap_or(1)
}

/// A query, and which of the keys it sees.
type Query<'a> = (&'a [f32], Range<usize>);

/// Up to [`QUERIES`] over a chunk: `outs = Σ exp(score - largest) · value`, one result behind the other, and in `sums` the largest score and
/// the sum of exponentials; without keys minus infinity and 0.
fn attend<T: Float>(
    outs: &mut [f32],
    sums: &mut [[f32; 2]],
    queries: &[Query],
    [keys, values]: [Strip<T>; 2],
    scale: f32,
) {
    let mut weights = [[0.0f32; CHUNK]; QUERIES];
    let weights = &mut weights[..queries.len()];
    let mut rows = [&[][..]; QUERIES];
    rows.iter_mut().zip(queries).for_each(|(row, (query, _))| *row = query);
    // SAFETY: the CPU was asked; keys and values are rows of tensors that are borrowed, as long as the queries.
    unsafe { by_vectors!(vectors::scores(weights, &rows[..queries.len()], keys, scale)) };
    for ((weights, (_, seen)), sums) in weights.iter_mut().zip(queries).zip(sums) {
        weights[..seen.start].fill(0.0);
        weights[seen.end..].fill(0.0);
        *sums = if seen.is_empty() { [f32::NEG_INFINITY, 0.0] } else { exponentials(&mut weights[seen.clone()]) };
    }
    // SAFETY: as above.
    unsafe { by_vectors!(vectors::mix(outs, weights, values)) };
}

/// Adds a query's parts up, which have its result at `at` and its largest score and sum at `sums`. Returns the log-sum-exp.
fn combine<'a>(out: &mut [f32], parts: impl Iterator<Item = &'a [f32]> + Clone, at: usize, sums: usize) -> f32 {
    let mut weights: Vec<f32> = parts.clone().map(|part| part[sums]).collect();
    let [largest, _] = exponentials(&mut weights);
    let total: f32 = weights.iter().zip(parts.clone()).map(|(weight, part)| weight * part[sums + 1]).sum();
    for (weight, part) in weights.iter().zip(parts) {
        let weight = weight / total;
        out.iter_mut().zip(&part[at..]).for_each(|(out, x)| *out += weight * x);
    }
    largest + total.ln()
}

vectorized! {
    /// Scores become their exponentials relative to the largest. Returns that one and the sum.
    fn exponentials<'a>(scores: &'a mut [f32]) -> [f32; 2] {
        let largest = max(scores, |x| x);
        [largest, replace(scores, |x| exp(x - largest))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::vector::Plain;
    use super::*;

    /// With SIMD and without, for heads that fill vectors or do not, in each type, against f64.
    #[test]
    fn queries_over_keys_of_any_number() {
        for (head_dim, count, queries) in [(64, 1, 1), (64, 6, 3), (80, 35, 4), (128, 7, 2), (8, 5, 1), (100, 64, 3)] {
            check::<f32>(head_dim, count, queries, |x| x);
            check::<bf16>(head_dim, count, queries, bf16::from_f32);
            check::<f16>(head_dim, count, queries, f16::from_f32);
        }
    }

    fn check<T: Float>(head_dim: usize, count: usize, queries: usize, round: impl Fn(f32) -> T) {
        let noise = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
        };
        let q = noise(queries * head_dim, 1);
        let [k, v] = [2, 3].map(|seed| noise(2 * head_dim * count, seed).into_iter().map(&round).collect::<Vec<T>>());
        // Every other row is another head's.
        let strip = |data: &[T]| Strip { ptr: data.as_ptr(), rows: count, stride: 2 * head_dim as isize };
        // Each query sees one key less than the one before, but the first.
        let of_block: Vec<Query> =
            q.chunks_exact(head_dim).enumerate().map(|(i, q)| (q, i.min(count - 1)..count)).collect();
        let at = |data: &[T], t: usize, i: usize| f64::from(data[2 * t * head_dim + i].value());
        let score = |q: &[f32], t: usize| 0.3 * (0..head_dim).map(|i| f64::from(q[i]) * at(&k, t, i)).sum::<f64>();
        let (mut outs, mut sums) = (vec![0.0; queries * head_dim], vec![[0.0; 2]; queries]);
        attend(&mut outs, &mut sums, &of_block, [strip(&k), strip(&v)], 0.3);
        for ((out, [largest, total]), (q, seen)) in outs.chunks_exact(head_dim).zip(&sums).zip(&of_block) {
            let sum: f64 = seen.clone().map(|t| score(q, t).exp()).sum();
            assert!((f64::from(largest + total.ln()) - sum.ln()).abs() < 1e-5, "{head_dim}x{count}");
            for (i, found) in out.iter().enumerate() {
                let expected: f64 = seen.clone().map(|t| score(q, t).exp() / sum * at(&v, t, i)).sum();
                assert!((f64::from(*found) / f64::from(*total) - expected).abs() < 1e-5, "{head_dim}x{count}");
            }
        }
        // What every CPU has gives the same to rounding.
        let rows: Vec<&[f32]> = q.chunks_exact(head_dim).collect();
        let (mut chosen, mut plain) = (vec![[0.0; CHUNK]; queries], vec![[0.0; CHUNK]; queries]);
        let mut plain_outs = vec![0.0; outs.len()];
        unsafe {
            by_vectors!(vectors::scores(&mut chosen, &rows, strip(&k), 0.3));
            vectors::scores::<Plain>(&mut plain, &rows, strip(&k), 0.3);
            chosen.iter_mut().for_each(|weights| weights[count..].fill(0.0));
            by_vectors!(vectors::mix(&mut outs, &chosen, strip(&v)));
            vectors::mix::<Plain>(&mut plain_outs, &chosen, strip(&v));
        }
        for (chosen, plain) in chosen.iter().zip(&plain) {
            assert!(chosen[..count].iter().zip(plain).all(|(a, b)| (a - b).abs() < 1e-5), "{head_dim}x{count}");
        }
        assert!(outs.iter().zip(&plain_outs).all(|(a, b)| (a - b).abs() < 1e-4), "{head_dim}x{count}");
    }
}
