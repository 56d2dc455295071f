//! Weights in floats, by vectors that read them in any width.

use std::marker::PhantomData;

use super::super::vector::{Float, Task, Vector};
use super::{AHEAD, Columns, rows_together};

/// Sums of a product at a time, so that none waits for the one before.
const SUMS: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Fills the columns with `x · wᵀ`, for rows of `width`. A row's sums do not depend on the others.
///
/// # Safety
/// The columns must be nobody else's, one for each row of `w`; the CPU must have the vectors.
pub(super) unsafe fn dots<V: Vector>(out: Columns, xs: &[f32], width: usize, w: &[impl Float]) {
    unsafe { V::run(Dots::<V, _> { out, xs, width, w, kind: PhantomData }) }
}

struct Dots<'a, V, T> {
    out: Columns,
    xs: &'a [f32],
    width: usize,
    w: &'a [T],
    kind: PhantomData<V>,
}

impl<V: Vector, T: Float> Task for Dots<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { mut out, xs, width, w, .. } = self;
        for xs in xs.chunks(rows_together::<V>() * width) {
            let rows = xs.len() / width;
            // SAFETY: the caller's promise; there are so many rows.
            unsafe {
                match rows {
                    1 => together::<V, T, 1>(out, xs, width, w),
                    2 => together::<V, T, 2>(out, xs, width, w),
                    3 => together::<V, T, 3>(out, xs, width, w),
                    _ => together::<V, T, 4>(out, xs, width, w),
                }
            }
            out = out.below(rows);
        }
    }
}

/// The products of some rows, for which a weight is read once.
#[inline(always)]
unsafe fn together<V: Vector, T: Float, const ROWS: usize>(out: Columns, xs: &[f32], width: usize, w: &[T]) {
    let step = SUMS * V::LANES;
    let vectors = width / step * step;
    for (col, w) in w.chunks_exact(width).enumerate() {
        // SAFETY: there are so many numbers; fetching reads nothing.
        unsafe {
            let mut sums = [[V::splat(0.0); SUMS]; ROWS];
            for at in (0..vectors).step_by(step) {
                let ahead = w.as_ptr().add(at).cast::<u8>().wrapping_add(AHEAD);
                for line in (0..step * size_of::<T>()).step_by(LINE) {
                    V::prefetch_far(ahead.wrapping_add(line).cast());
                }
                for i in 0..SUMS {
                    let at = at + i * V::LANES;
                    let w: V = T::load(w.as_ptr().add(at));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        sums[i] = w.multiply_add(V::load(xs.as_ptr().add(row * width + at), V::LANES), sums[i]);
                    }
                }
            }
            for (row, [a, b, c, d]) in sums.into_iter().enumerate() {
                let x = &xs[row * width..][..width];
                let rest: f32 = x[vectors..].iter().zip(&w[vectors..]).map(|(x, w)| x * w.value()).sum();
                *out.at(row, col) = a.add(b).add(c.add(d)).total() + rest;
            }
        }
    }
}
