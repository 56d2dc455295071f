//! Weights in floats, by vectors that read them in any width.

use std::marker::PhantomData;

use super::super::vector::{Float, Task, Vector};
use super::AHEAD;

/// Sums of a row at a time, so that none waits for the one before.
const SUMS: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;

/// `out[i] = Σ x · w[i]`
///
/// # Safety
/// `w` must have a row as long as `x` for each result; the CPU must have the vectors.
pub(super) unsafe fn dots<V: Vector>(out: &mut [f32], x: &[f32], w: &[impl Float]) {
    unsafe { V::run(Dots::<V, _> { out, x, w, kind: PhantomData }) }
}

struct Dots<'a, V, T> {
    out: &'a mut [f32],
    x: &'a [f32],
    w: &'a [T],
    kind: PhantomData<V>,
}

impl<V: Vector, T: Float> Task for Dots<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { out, x, w, .. } = self;
        let step = SUMS * V::LANES;
        let vectors = x.len() / step * step;
        for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
            let rest: f32 = x[vectors..].iter().zip(&w[vectors..]).map(|(x, w)| x * w.value()).sum();
            // SAFETY: there are so many numbers; fetching reads nothing.
            unsafe {
                let mut sums = [V::splat(0.0); SUMS];
                for at in (0..vectors).step_by(step) {
                    let ahead = w.as_ptr().add(at).cast::<u8>().wrapping_add(AHEAD);
                    for line in (0..step * size_of::<T>()).step_by(LINE) {
                        V::prefetch_far(ahead.wrapping_add(line).cast());
                    }
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let at = at + i * V::LANES;
                        let w: V = T::load(w.as_ptr().add(at));
                        *sum = w.multiply_add(V::load(x.as_ptr().add(at), V::LANES), *sum);
                    }
                }
                let [a, b, c, d] = sums;
                *out = a.add(b).add(c.add(d)).total() + rest;
            }
        }
    }
}
