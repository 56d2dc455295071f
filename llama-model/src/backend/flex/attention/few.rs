//! One query over many keys, as in decoding: there is no tile of queries to share a packed key with, so keys and values are
//! read where they are.

#[cfg(target_arch = "x86_64")]
use super::super::simd::has_avx512;
use super::super::simd::{exp, max, sum1, sum2, vectorized};
use super::Rows;
#[cfg(target_arch = "x86_64")]
use super::avx512;

/// One query over the keys and values it sees, one after the other. Returns the log-sum-exp.
pub(super) fn attend(out: &mut [f32], q: &[f32], keys: Rows, vals: Rows, scale: f32) -> f32 {
    let mut weights = vec![0.0f32; keys.tile.rows];
    #[cfg(target_arch = "x86_64")]
    if has_avx512() && q.len().is_multiple_of(16) {
        // SAFETY: the CPU was asked; keys and values are rows as long as the query, which fills vectors.
        unsafe { avx512::scores(&mut weights, q, keys.tile, scale) };
        let (largest, sum) = exponentials(&mut weights);
        unsafe { avx512::mix(out, &weights, vals.tile, 1.0 / sum) };
        return largest + sum.ln();
    }
    scores(&mut weights, q, keys, scale);
    let (largest, sum) = exponentials(&mut weights);
    mix(out, &weights, vals, 1.0 / sum);
    largest + sum.ln()
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
    fn exponentials<'a>(scores: &'a mut [f32]) -> (f32, f32) {
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        (largest, sum1(scores, |x| x))
    }
}

vectorized! {
    /// `out = scale · Σ weights[t] · vals[t]`, where `out` begins as zeros.
    fn mix<'a>(out: &'a mut [f32], weights: &'a [f32], vals: Rows<'a>, scale: f32) -> () {
        for (t, weight) in weights.iter().enumerate() {
            let weight = scale * weight;
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
        for (head_dim, count) in [(64, 1), (64, 6), (80, 35), (128, 7), (8, 5), (48, 100)] {
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
            let check = |name: &str, out: &[f32], lse: f32| {
                assert!((f64::from(lse) - sum.ln()).abs() < 1e-5, "{name} {head_dim}x{count}");
                for (i, found) in out.iter().enumerate() {
                    assert!((f64::from(*found) - expected(i)).abs() < 1e-5, "{name} {head_dim}x{count}");
                }
            };
            let mut out = vec![0.0; head_dim];
            let lse = attend(&mut out, &q, rows(&k), rows(&v), 0.3);
            check("chosen", &out, lse);
            let (mut out, mut weights) = (vec![0.0; head_dim], vec![0.0; count]);
            scores(&mut weights, &q, rows(&k), 0.3);
            let (largest, sum) = exponentials(&mut weights);
            mix(&mut out, &weights, rows(&v), 1.0 / sum);
            check("portable", &out, largest + sum.ln());
        }
    }
}
