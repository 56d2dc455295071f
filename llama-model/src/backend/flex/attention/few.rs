//! One query over many keys, as in decoding: there is no tile of queries to share a packed key with, so keys and values are
//! read where they are.

use super::super::simd::{exp, max, replace, sum2, vectorized};
use super::super::team;
use super::super::vector::{MAX_LANES, by_vectors};
use super::{Heads, Rows, Sizes, Starts, vectors};

/// Keys that a task takes, of one head: fixed, so that results do not depend on the number of threads. The queries of a group
/// find them in the cache after the first.
const CHUNK: usize = 64;
/// Elements of all keys from which several threads are faster.
const PARALLEL: usize = 1 << 14;

/// Attention of a few queries, in two steps (the split over keys is that of FlashDecoding): a part of the result for each chunk
/// of keys, with its largest score and its sum of exponentials, and then the parts of each query put together.
pub(super) fn forward(
    sizes: &Sizes,
    [qs, ks, vs]: [&Heads; 3],
    starts: &Starts,
    scale: f32,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let Sizes { batch, q_len, kv_len, n_heads, n_kv_heads, head_dim, .. } = *sizes;
    let queries = sizes.group() * q_len;
    let chunks = kv_len.div_ceil(CHUNK);
    // For each key head and chunk the queries' parts, and behind them largest score and sum of each.
    let part = queries * (head_dim + 2);
    if part == 0 {
        return;
    }
    let count = batch * n_kv_heads * chunks;
    let mut parts = vec![0.0f32; count * part];
    let task = |(index, part): (usize, &mut [f32])| {
        let (b, kv_head, start) = (index / chunks / n_kv_heads, index / chunks % n_kv_heads, index % chunks * CHUNK);
        let (outs, sums) = part.split_at_mut(queries * head_dim);
        let rows = outs.chunks_exact_mut(head_dim).zip(sums.as_chunks_mut::<2>().0);
        for (query, (out, sums)) in rows.enumerate() {
            let (head, row) = (kv_head * sizes.group() + query / q_len, query % q_len);
            let seen = sizes.range(row, starts.of(b), start, CHUNK.min(kv_len - start));
            let seen = start + seen.start..start + seen.end;
            let q = qs.rows(b, head, row..row + 1).row(0);
            *sums = attend(out, q, ks.rows(b, kv_head, seen.clone()), vs.rows(b, kv_head, seen), scale);
        }
    };
    if count * CHUNK * head_dim < PARALLEL {
        parts.chunks_exact_mut(part).enumerate().for_each(task);
    } else {
        team::each(parts.chunks_exact_mut(part).enumerate(), task);
    }
    for (index, parts) in parts.chunks_exact(chunks * part).enumerate() {
        let (b, kv_head) = (index / n_kv_heads, index % n_kv_heads);
        for query in 0..queries {
            let (head, row) = (kv_head * sizes.group() + query / q_len, query % q_len);
            let sums = |part: &[f32]| (part[queries * head_dim + 2 * query], part[queries * head_dim + 2 * query + 1]);
            let largest = parts.chunks_exact(part).map(|part| sums(part).0).fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = parts.chunks_exact(part).map(|part| sums(part).1 * (sums(part).0 - largest).exp()).sum();
            let out = &mut out[((b * q_len + row) * n_heads + head) * head_dim..][..head_dim];
            for part in parts.chunks_exact(part) {
                let weight = (sums(part).0 - largest).exp() / total;
                out.iter_mut().zip(&part[query * head_dim..]).for_each(|(out, x)| *out += weight * x);
            }
            lse[(b * n_heads + head) * q_len + row] = largest + total.ln();
        }
    }
}

/// One query over keys and values, one after the other: `out = Σ exp(score - largest) · value`. Returns the largest score and
/// the sum of exponentials; without keys minus infinity and 0.
fn attend(out: &mut [f32], q: &[f32], keys: Rows, vals: Rows, scale: f32) -> [f32; 2] {
    if keys.tile.rows == 0 {
        return [f32::NEG_INFINITY, 0.0];
    }
    let mut weights = [0.0f32; CHUNK];
    let weights = &mut weights[..keys.tile.rows];
    if q.len().is_multiple_of(MAX_LANES) {
        // SAFETY: the CPU was asked; keys and values are rows as long as the query, which fills vectors.
        unsafe { by_vectors!(vectors::scores(weights, q, keys.tile, scale)) };
        let sums = exponentials(weights);
        unsafe { by_vectors!(vectors::mix(out, weights, vals.tile)) };
        return sums;
    }
    scores(weights, q, keys, scale);
    let sums = exponentials(weights);
    mix(out, weights, vals);
    sums
}

vectorized! {
    /// `scores[t] = scale · q · keys[t]`
    fn scores<'a>(scores: &'a mut [f32], q: &'a [f32], keys: Rows<'a>, scale: f32) -> () {
        for (t, score) in scores.iter_mut().enumerate() {
            *score = scale * sum2(q, keys.row(t), |q, k| q * k);
        }
    }
}

vectorized! {
    /// Scores become their exponentials relative to the largest. Returns that one and the sum.
    fn exponentials<'a>(scores: &'a mut [f32]) -> [f32; 2] {
        let largest = max(scores, |x| x);
        [largest, replace(scores, |x| exp(x - largest))]
    }
}

vectorized! {
    /// `out = Σ weights[t] · vals[t]`, where `out` begins as zeros.
    fn mix<'a>(out: &'a mut [f32], weights: &'a [f32], vals: Rows<'a>) -> () {
        for (t, weight) in weights.iter().enumerate() {
            for (out, v) in out.iter_mut().zip(vals.row(t)) {
                *out += weight * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::product::Matrix;
    use super::*;

    /// With SIMD and without, for heads that fill vectors or do not, against f64.
    #[test]
    fn one_query_over_keys_of_any_number() {
        let noise = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
        };
        for (head_dim, count) in [(64, 1), (64, 6), (80, 35), (128, 7), (8, 5), (48, 64)] {
            let (q, k, v) = (noise(head_dim, 1), noise(2 * head_dim * count, 2), noise(2 * head_dim * count, 3));
            // Every other row is another head's.
            let rows = |data: &[f32]| Rows {
                tile: Matrix { row_stride: 2 * head_dim as isize, ..Matrix::rows(data, count, head_dim) },
                tensor: std::marker::PhantomData,
            };
            let at = |data: &[f32], t: usize, i: usize| f64::from(data[2 * t * head_dim + i]);
            let score = |t: usize| 0.3 * (0..head_dim).map(|i| f64::from(q[i]) * at(&k, t, i)).sum::<f64>();
            let sum: f64 = (0..count).map(|t| score(t).exp()).sum();
            let expected = |i: usize| (0..count).map(|t| score(t).exp() / sum * at(&v, t, i)).sum::<f64>();
            let check = |name: &str, out: &[f32], [largest, total]: [f32; 2]| {
                assert!((f64::from(largest + total.ln()) - sum.ln()).abs() < 1e-5, "{name} {head_dim}x{count}");
                for (i, found) in out.iter().enumerate() {
                    let found = f64::from(*found) / f64::from(total);
                    assert!((found - expected(i)).abs() < 1e-5, "{name} {head_dim}x{count}");
                }
            };
            let mut out = vec![0.0; head_dim];
            let sums = attend(&mut out, &q, rows(&k), rows(&v), 0.3);
            check("chosen", &out, sums);
            let (mut out, mut weights) = (vec![0.0; head_dim], vec![0.0; count]);
            scores(&mut weights, &q, rows(&k), 0.3);
            let sums = exponentials(&mut weights);
            mix(&mut out, &weights, rows(&v));
            check("portable", &out, sums);
        }
    }
}
