//! One query over many keys by hand: the compiler makes pairs of the sum over a head's few elements.

use std::arch::x86_64::*;

use super::super::product::Matrix;

/// Lanes of a vector.
const LANES: usize = 16;
/// Vectors of a head that are summed at a time, at most.
const WIDTH: usize = 4;

/// Rows between what is read and what is asked for: rows of a head lie apart, and the hardware does not see the pattern.
const AHEAD: usize = 16;

/// `scores[t] = factor · q · keys[t]`
///
/// # Safety
/// The keys must have a row as long as `q`, a multiple of 16, for each score; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn scores(scores: &mut [f32], q: &[f32], keys: Matrix, factor: f32) {
    let row = |t: usize| keys.ptr.wrapping_offset(t as isize * keys.row_stride);
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let count = fours.len();
    for (t, four) in fours.iter_mut().enumerate() {
        let [mut a, mut b, mut c, mut d] = [_mm512_setzero_ps(); 4];
        let [k0, k1, k2, k3] = [row(4 * t), row(4 * t + 1), row(4 * t + 2), row(4 * t + 3)];
        for at in (0..q.len()).step_by(LANES) {
            // SAFETY: 16 elements follow in each row.
            unsafe {
                for key in 0..4 {
                    fetch(row(4 * t + key + AHEAD).wrapping_add(at));
                }
                let q = _mm512_loadu_ps(q.as_ptr().add(at));
                a = _mm512_fmadd_ps(q, _mm512_loadu_ps(k0.add(at)), a);
                b = _mm512_fmadd_ps(q, _mm512_loadu_ps(k1.add(at)), b);
                c = _mm512_fmadd_ps(q, _mm512_loadu_ps(k2.add(at)), c);
                d = _mm512_fmadd_ps(q, _mm512_loadu_ps(k3.add(at)), d);
            }
        }
        let sums = _mm_mul_ps(four_totals(a, b, c, d), _mm_set1_ps(factor));
        // SAFETY: there are four.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
    }
    for (t, score) in rest.iter_mut().enumerate() {
        let mut sum = _mm512_setzero_ps();
        for at in (0..q.len()).step_by(LANES) {
            // SAFETY: as above.
            unsafe {
                let key = row(4 * count + t).add(at);
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(q.as_ptr().add(at)), _mm512_loadu_ps(key), sum);
            }
        }
        *score = factor * _mm512_reduce_add_ps(sum);
    }
}

/// Asks for what will be read soon, or lies behind the last row.
#[inline(always)]
unsafe fn fetch(ptr: *const f32) {
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
}

/// The sums of four vectors' elements.
#[target_feature(enable = "avx512f")]
pub fn four_totals(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
    // Two steps make each quarter hold a part of all four sums.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let [ab, cd] = [_mm512_castps_pd(ab), _mm512_castps_pd(cd)];
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let all = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    let halves = _mm256_add_ps(
        _mm512_castps512_ps256(all),
        _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(all))),
    );
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

/// `out = Σ weights[t] · values[t]`
///
/// # Safety
/// The values must have a row as long as `out`, a multiple of 16, for each weight; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn mix(out: &mut [f32], weights: &[f32], values: Matrix) {
    let mut at = 0;
    while at < out.len() {
        let from = Matrix { ptr: values.ptr.wrapping_add(at), ..values };
        // SAFETY: the caller's promise; so many vectors are left.
        unsafe {
            if out.len() - at >= WIDTH * LANES {
                mix_columns::<WIDTH>(&mut out[at..], weights, from);
                at += WIDTH * LANES;
            } else {
                mix_columns::<1>(&mut out[at..], weights, from);
                at += LANES;
            }
        }
    }
}

/// The first `N` vectors of [`mix`].
#[target_feature(enable = "avx512f")]
unsafe fn mix_columns<const N: usize>(out: &mut [f32], weights: &[f32], values: Matrix) {
    let row = |t: usize| values.ptr.wrapping_offset(t as isize * values.row_stride);
    // Two sums for each vector, so that none waits for the one before.
    let mut even = [_mm512_setzero_ps(); N];
    let mut odd = even;
    let (pairs, rest) = weights.as_chunks::<2>();
    for (t, [first, second]) in pairs.iter().enumerate() {
        let (a, b) = (row(2 * t), row(2 * t + 1));
        let (first, second) = (_mm512_set1_ps(*first), _mm512_set1_ps(*second));
        for i in 0..N {
            // SAFETY: 16 elements follow in each row.
            unsafe {
                fetch(row(2 * t + AHEAD).wrapping_add(LANES * i));
                fetch(row(2 * t + 1 + AHEAD).wrapping_add(LANES * i));
                even[i] = _mm512_fmadd_ps(first, _mm512_loadu_ps(a.add(LANES * i)), even[i]);
                odd[i] = _mm512_fmadd_ps(second, _mm512_loadu_ps(b.add(LANES * i)), odd[i]);
            }
        }
    }
    for weight in rest {
        let last = row(weights.len() - 1);
        for (i, even) in even.iter_mut().enumerate() {
            // SAFETY: as above.
            unsafe {
                *even = _mm512_fmadd_ps(_mm512_set1_ps(*weight), _mm512_loadu_ps(last.add(LANES * i)), *even);
            }
        }
    }
    for i in 0..N {
        // SAFETY: the vector is inside `out`.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(LANES * i), _mm512_add_ps(even[i], odd[i])) };
    }
}
