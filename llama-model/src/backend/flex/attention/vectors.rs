//! One query over many keys by hand: the compiler makes pairs of the sum over a head's few elements.

use std::marker::PhantomData;

use super::super::product::Matrix;
use super::super::vector::{Task, Vector};

/// Vectors of a head that are summed at a time, at most.
const WIDTH: usize = 4;

/// Rows between what is read and what is asked for: rows of a head lie apart, and the hardware does not see the pattern.
const AHEAD: usize = 16;

/// `scores[t] = factor · q · keys[t]`
///
/// # Safety
/// The keys must have a row as long as `q`, whole vectors, for each score; the CPU must have them.
pub unsafe fn scores<V: Vector>(scores: &mut [f32], q: &[f32], keys: Matrix, factor: f32) {
    unsafe { V::run(Scores::<V> { scores, q, keys, factor, kind: PhantomData }) }
}

struct Scores<'a, V> {
    scores: &'a mut [f32],
    q: &'a [f32],
    keys: Matrix,
    factor: f32,
    kind: PhantomData<V>,
}

impl<V: Vector> Task for Scores<'_, V> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { scores, q, keys, factor, .. } = self;
        let (fours, rest) = scores.as_chunks_mut::<4>();
        let count = fours.len();
        // SAFETY: the caller's promise; fetching reads nothing.
        unsafe {
            for (t, four) in fours.iter_mut().enumerate() {
                let [mut a, mut b, mut c, mut d] = [V::splat(0.0); 4];
                for at in (0..q.len()).step_by(V::LANES) {
                    for key in 0..4 {
                        V::prefetch(row(keys, 4 * t + key + AHEAD).wrapping_add(at));
                    }
                    let q = V::load(q.as_ptr().add(at), V::LANES);
                    a = V::load(row(keys, 4 * t).add(at), V::LANES).multiply_add(q, a);
                    b = V::load(row(keys, 4 * t + 1).add(at), V::LANES).multiply_add(q, b);
                    c = V::load(row(keys, 4 * t + 2).add(at), V::LANES).multiply_add(q, c);
                    d = V::load(row(keys, 4 * t + 3).add(at), V::LANES).multiply_add(q, d);
                }
                *four = V::four_totals([a, b, c, d]);
                for score in four {
                    *score *= factor;
                }
            }
            for (t, score) in rest.iter_mut().enumerate() {
                let mut sum = V::splat(0.0);
                for at in (0..q.len()).step_by(V::LANES) {
                    let key = V::load(row(keys, 4 * count + t).add(at), V::LANES);
                    sum = key.multiply_add(V::load(q.as_ptr().add(at), V::LANES), sum);
                }
                *score = factor * sum.total();
            }
        }
    }
}

#[inline(always)]
fn row(matrix: Matrix, t: usize) -> *const f32 {
    matrix.ptr.wrapping_offset(t as isize * matrix.row_stride)
}

/// `out = Σ weights[t] · values[t]`
///
/// # Safety
/// The values must have a row as long as `out`, whole vectors, for each weight; the CPU must have them.
pub unsafe fn mix<V: Vector>(out: &mut [f32], weights: &[f32], values: Matrix) {
    unsafe { V::run(Mix::<V> { out, weights, values, kind: PhantomData }) }
}

struct Mix<'a, V> {
    out: &'a mut [f32],
    weights: &'a [f32],
    values: Matrix,
    kind: PhantomData<V>,
}

impl<V: Vector> Task for Mix<'_, V> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { out, weights, values, .. } = self;
        let mut at = 0;
        while at < out.len() {
            let from = Matrix { ptr: values.ptr.wrapping_add(at), ..values };
            // SAFETY: the caller's promise; so many vectors are left.
            unsafe {
                if out.len() - at >= WIDTH * V::LANES {
                    mix_columns::<V, WIDTH>(&mut out[at..], weights, from);
                    at += WIDTH * V::LANES;
                } else {
                    mix_columns::<V, 1>(&mut out[at..], weights, from);
                    at += V::LANES;
                }
            }
        }
    }
}

/// The first `N` vectors of [`mix`].
#[inline(always)]
unsafe fn mix_columns<V: Vector, const N: usize>(out: &mut [f32], weights: &[f32], values: Matrix) {
    // SAFETY: the caller's promise; fetching reads nothing.
    unsafe {
        // Two sums for each vector, so that none waits for the one before.
        let mut even = [V::splat(0.0); N];
        let mut odd = even;
        let (pairs, rest) = weights.as_chunks::<2>();
        for (t, [first, second]) in pairs.iter().enumerate() {
            let (a, b) = (row(values, 2 * t), row(values, 2 * t + 1));
            let (first, second) = (V::splat(*first), V::splat(*second));
            for i in 0..N {
                V::prefetch(row(values, 2 * t + AHEAD).wrapping_add(V::LANES * i));
                V::prefetch(row(values, 2 * t + 1 + AHEAD).wrapping_add(V::LANES * i));
                even[i] = V::load(a.add(V::LANES * i), V::LANES).multiply_add(first, even[i]);
                odd[i] = V::load(b.add(V::LANES * i), V::LANES).multiply_add(second, odd[i]);
            }
        }
        for weight in rest {
            let last = row(values, weights.len() - 1);
            for (i, even) in even.iter_mut().enumerate() {
                *even = V::load(last.add(V::LANES * i), V::LANES).multiply_add(V::splat(*weight), *even);
            }
        }
        for i in 0..N {
            even[i].add(odd[i]).store(out.as_mut_ptr().add(V::LANES * i), V::LANES);
        }
    }
}
