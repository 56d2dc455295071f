//! A few queries over many keys by vectors: what is read of keys and values is used for as many queries as registers have sums for.

use std::marker::PhantomData;

use super::super::vector::{Float, Task, Vector};
use super::few::{CHUNK, QUERIES};

/// Keys that are multiplied at a time.
const KEYS: usize = 4;
/// Vectors of values that are added up at a time.
const WIDTH: usize = 4;
/// Rows between what is read and what is asked for: rows of a head lie apart, and the hardware does not see the pattern.
const AHEAD: isize = 16;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of a head in memory, `stride` elements apart.
pub(super) struct Strip<T> {
    pub ptr: *const T,
    pub rows: usize,
    pub stride: isize,
}

impl<T> Clone for Strip<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Strip<T> {}

impl<T> Strip<T> {
    /// The first element of a row; behind the last one, of the last.
    #[inline(always)]
    fn row(self, row: usize) -> *const T {
        self.ptr.wrapping_offset(row.min(self.rows - 1) as isize * self.stride)
    }

    /// Asks for a part of a row that will be read soon, where a line begins.
    #[inline(always)]
    fn fetch<V: Vector>(self, row: usize, at: usize) {
        if (at * size_of::<T>()).is_multiple_of(LINE) {
            V::prefetch(self.ptr.wrapping_offset((row as isize + AHEAD) * self.stride).wrapping_add(at).cast());
        }
    }
}

/// Queries whose sums with some keys fit in registers.
const fn most_queries<V: Vector>() -> usize {
    let most = V::ROWS * V::VECTORS / KEYS;
    if most < QUERIES { most } else { QUERIES }
}

/// `scores[g][t] = factor · queries[g] · keys[t]`
///
/// # Safety
/// There must be keys, [`CHUNK`] at most, as long as the queries; the CPU must have the vectors.
pub(super) unsafe fn scores<V: Vector>(
    scores: &mut [[f32; CHUNK]],
    queries: &[&[f32]],
    keys: Strip<impl Float>,
    factor: f32,
) {
    unsafe { V::run(Scores::<V, _> { scores, queries, keys, factor, kind: PhantomData }) }
}

struct Scores<'a, V, T> {
    scores: &'a mut [[f32; CHUNK]],
    queries: &'a [&'a [f32]],
    keys: Strip<T>,
    factor: f32,
    kind: PhantomData<V>,
}

impl<V: Vector, T: Float> Task for Scores<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { scores, queries, keys, factor, .. } = self;
        let most = most_queries::<V>();
        for (scores, queries) in scores.chunks_mut(most).zip(queries.chunks(most)) {
            // SAFETY: the caller's promise.
            unsafe {
                match queries {
                    [a] => scores_of::<V, T, 1>(scores, [a], keys, factor),
                    [a, b] => scores_of::<V, T, 2>(scores, [a, b], keys, factor),
                    [a, b, c] => scores_of::<V, T, 3>(scores, [a, b, c], keys, factor),
                    _ => scores_of::<V, T, 4>(scores, std::array::from_fn(|i| queries[i]), keys, factor),
                }
            }
        }
    }
}

/// [`scores`] of `N` queries.
#[inline(always)]
unsafe fn scores_of<V: Vector, T: Float, const N: usize>(
    scores: &mut [[f32; CHUNK]],
    queries: [&[f32]; N],
    keys: Strip<T>,
    factor: f32,
) {
    let width = queries[0].len();
    let vectors = width / V::LANES * V::LANES;
    for first in (0..keys.rows).step_by(KEYS) {
        let rows: [_; KEYS] = std::array::from_fn(|key| keys.row(first + key));
        // SAFETY: the caller's promise; fetching reads nothing.
        unsafe {
            let mut sums = [[V::splat(0.0); KEYS]; N];
            for at in (0..vectors).step_by(V::LANES) {
                let of_queries = queries.map(|query| V::load(query.as_ptr().add(at), V::LANES));
                for (key, row) in rows.into_iter().enumerate() {
                    keys.fetch::<V>(first + key, at);
                    let of_key: V = T::load(row.add(at));
                    for (sums, query) in sums.iter_mut().zip(of_queries) {
                        sums[key] = of_key.multiply_add(query, sums[key]);
                    }
                }
            }
            for ((scores, sums), query) in scores.iter_mut().zip(sums).zip(queries) {
                let mut totals = V::four_totals(sums);
                for (at, x) in query.iter().enumerate().skip(vectors) {
                    for (total, row) in totals.iter_mut().zip(rows) {
                        *total += x * (*row.add(at)).value();
                    }
                }
                scores[first..first + KEYS].copy_from_slice(&totals.map(|total| factor * total));
            }
        }
    }
}

/// `outs[g] = Σ weights[g][t] · values[t]`, where results follow one another; weights behind the last value are 0.
///
/// # Safety
/// There must be values, [`CHUNK`] at most, as long as a result; the CPU must have the vectors.
pub(super) unsafe fn mix<V: Vector>(outs: &mut [f32], weights: &[[f32; CHUNK]], values: Strip<impl Float>) {
    unsafe { V::run(Mix::<V, _> { outs, weights, values, kind: PhantomData }) }
}

struct Mix<'a, V, T> {
    outs: &'a mut [f32],
    weights: &'a [[f32; CHUNK]],
    values: Strip<T>,
    kind: PhantomData<V>,
}

impl<V: Vector, T: Float> Task for Mix<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { outs, weights, values, .. } = self;
        let most = most_queries::<V>();
        let width = outs.len() / weights.len();
        for (outs, weights) in outs.chunks_mut(most * width).zip(weights.chunks(most)) {
            // SAFETY: the caller's promise.
            unsafe {
                match weights {
                    // Two sums for each vector, so that none waits for the one before.
                    [a] => mix_of::<V, T, 1, 2>(outs, [a], values),
                    [a, b] => mix_of::<V, T, 2, 1>(outs, [a, b], values),
                    [a, b, c] => mix_of::<V, T, 3, 1>(outs, [a, b, c], values),
                    _ => mix_of::<V, T, 4, 1>(outs, std::array::from_fn(|i| &weights[i]), values),
                }
            }
        }
    }
}

/// [`mix`] for `N` queries, with `S` sums each.
#[inline(always)]
unsafe fn mix_of<V: Vector, T: Float, const N: usize, const S: usize>(
    outs: &mut [f32],
    weights: [&[f32; CHUNK]; N],
    values: Strip<T>,
) {
    let width = outs.len() / N;
    let mut at = 0;
    // SAFETY: the caller's promise; so many vectors are left.
    unsafe {
        while at + WIDTH * V::LANES <= width {
            mix_columns::<V, T, N, S, WIDTH>(outs, weights, values, at);
            at += WIDTH * V::LANES;
        }
        while at + V::LANES <= width {
            mix_columns::<V, T, N, S, 1>(outs, weights, values, at);
            at += V::LANES;
        }
        for (out, weights) in outs.chunks_exact_mut(width).zip(weights) {
            for (at, out) in out.iter_mut().enumerate().skip(at) {
                *out = (0..values.rows).map(|t| weights[t] * (*values.row(t).add(at)).value()).sum();
            }
        }
    }
}

/// `W` vectors of [`mix_of`], from `at` on.
#[inline(always)]
unsafe fn mix_columns<V: Vector, T: Float, const N: usize, const S: usize, const W: usize>(
    outs: &mut [f32],
    weights: [&[f32; CHUNK]; N],
    values: Strip<T>,
    at: usize,
) {
    let width = outs.len() / N;
    // SAFETY: the caller's promise; fetching reads nothing.
    unsafe {
        let mut sums = [[[V::splat(0.0); W]; N]; S];
        for first in (0..values.rows).step_by(S) {
            for (s, sums) in sums.iter_mut().enumerate() {
                let t = first + s;
                let row = values.row(t);
                let weights = weights.map(|weights| V::splat(weights[t]));
                for i in 0..W {
                    let at = at + i * V::LANES;
                    values.fetch::<V>(t, at);
                    let value: V = T::load(row.add(at));
                    for (sums, weight) in sums.iter_mut().zip(weights) {
                        sums[i] = value.multiply_add(weight, sums[i]);
                    }
                }
            }
        }
        let mut totals = sums[0];
        for sums in &sums[1..] {
            for (totals, sums) in totals.iter_mut().zip(sums) {
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = total.add(*sum);
                }
            }
        }
        for (out, totals) in outs.chunks_exact_mut(width).zip(totals) {
            for (i, total) in totals.into_iter().enumerate() {
                total.store(out.as_mut_ptr().add(at + i * V::LANES), V::LANES);
            }
        }
    }
}
