//! Dots with weights in blocks and in f16 by the vectors of AVX2 and NEON.

use std::marker::PhantomData;

use half::f16;

use super::super::vector::{MAX_LANES, Task, Vector};
use super::rounded::{Block, Bytes, Rounded};

/// Bytes between what is read and what is asked for; rows are read one after the other.
const AHEAD: usize = 4096;
/// Sums at a time, so that none waits for the one before.
const SUMS: usize = 4;

/// Vectors with what these dots need.
///
/// # Safety
/// Of all functions: as of [`Vector`]'s.
pub(super) trait Whole: Vector {
    /// The numbers at `src`, of which there must be as many as lanes.
    unsafe fn widen(src: *const f16) -> Self;
    /// Σ w · (128 · high + low) over a block of 8-bit weights, in lanes.
    unsafe fn products_of_8(w: *const i8, x: &Bytes) -> Self;
    /// The same for weights of 4 bits, the first half of a block in the low bits of its bytes.
    unsafe fn products_of_4(w: *const u8, x: &Bytes) -> Self;
}

/// Integers that these vectors multiply.
pub(super) trait Multiplied: Block {
    /// # Safety
    /// As of [`Whole`]'s.
    unsafe fn products<V: Whole>(w: *const Self, x: &Bytes) -> V;
}

impl Multiplied for i8 {
    #[inline(always)]
    unsafe fn products<V: Whole>(w: *const i8, x: &Bytes) -> V {
        unsafe { V::products_of_8(w, x) }
    }
}

impl Multiplied for u8 {
    #[inline(always)]
    unsafe fn products<V: Whole>(w: *const u8, x: &Bytes) -> V {
        unsafe { V::products_of_4(w, x) }
    }
}

/// `out[i] = Σ x · w[i]` of weights in blocks.
///
/// # Safety
/// `w` must have a row of as many blocks as `x` for each result, and `scales` their floats; the CPU must have the vectors.
pub(super) unsafe fn dots<V: Whole, T: Multiplied>(out: &mut [f32], x: &Rounded, w: &[T], scales: &[f16]) {
    unsafe { V::run(Blocks::<V, T> { out, x, w, scales, kind: PhantomData }) }
}

struct Blocks<'a, V, T> {
    out: &'a mut [f32],
    x: &'a Rounded,
    w: &'a [T],
    scales: &'a [f16],
    kind: PhantomData<V>,
}

impl<V: Whole, T: Multiplied> Task for Blocks<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { out, x, w, scales, .. } = self;
        let per_row = x.blocks() * T::SCALES;
        let factors = T::factors(x);
        // Whole registers, as the factors.
        let mut floats = vec![0.0f32; factors.len()];
        let rows = w.chunks_exact(x.blocks() * T::BYTES).enumerate();
        for (out, (row, w)) in out.iter_mut().zip(rows) {
            let scales = &scales[row * per_row..];
            // SAFETY: there are so many numbers and blocks; fetching reads nothing.
            unsafe {
                for at in (0..per_row).step_by(V::LANES) {
                    // What is behind a row's scales are the next row's, but for the last.
                    let widened = if at + V::LANES <= scales.len() {
                        V::widen(scales.as_ptr().add(at))
                    } else {
                        let mut rest = [f16::ZERO; MAX_LANES];
                        rest[..scales.len() - at].copy_from_slice(&scales[at..]);
                        V::widen(rest.as_ptr())
                    };
                    let product = widened.multiply(V::load(factors.as_ptr().add(at), V::LANES));
                    product.store(floats.as_mut_ptr().add(at), V::LANES);
                }
                let mut sums = [V::splat(0.0); SUMS];
                // The minima times the sums of the blocks' values.
                let mut minima = 0.0;
                let (fours, rest) = x.bytes.as_chunks::<SUMS>();
                let mut add = Add { place: w.as_ptr(), floats: floats.as_ptr() };
                for four in fours {
                    for (bytes, sum) in four.iter().zip(&mut sums) {
                        (*sum, minima) = add.block(bytes, *sum, minima);
                    }
                }
                for bytes in rest {
                    (sums[0], minima) = add.block(bytes, sums[0], minima);
                }
                *out = total(sums) + minima;
            }
        }
    }
}

/// Where the next block of a row and its floats are.
struct Add<T> {
    place: *const T,
    floats: *const f32,
}

impl<T: Multiplied> Add<T> {
    #[inline(always)]
    unsafe fn block<V: Whole>(&mut self, bytes: &Bytes, sum: V, minima: f32) -> (V, f32) {
        unsafe {
            let Self { place, floats } = *self;
            (self.place, self.floats) = (place.add(T::BYTES), floats.add(T::SCALES));
            V::prefetch(place.wrapping_add(AHEAD).cast());
            let minima = if T::SCALES == 2 { minima + *floats.add(1) } else { minima };
            (T::products::<V>(place, bytes).multiply_add(V::splat(*floats), sum), minima)
        }
    }
}

/// `out[i] = Σ x · w[i]` of weights in f16.
///
/// # Safety
/// `w` must have a row as long as `x` for each result; the CPU must have the vectors.
pub(super) unsafe fn half_dots<V: Whole>(out: &mut [f32], x: &[f32], w: &[f16]) {
    unsafe { V::run(Halves::<V> { out, x, w, kind: PhantomData }) }
}

struct Halves<'a, V> {
    out: &'a mut [f32],
    x: &'a [f32],
    w: &'a [f16],
    kind: PhantomData<V>,
}

impl<V: Whole> Task for Halves<'_, V> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { out, x, w, .. } = self;
        let step = SUMS * V::LANES;
        let vectors = x.len() / step * step;
        for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
            let rest: f32 = x[vectors..].iter().zip(&w[vectors..]).map(|(x, w)| x * w.to_f32()).sum();
            // SAFETY: there are so many numbers; fetching reads nothing.
            unsafe {
                let mut sums = [V::splat(0.0); SUMS];
                for at in (0..vectors).step_by(step) {
                    V::prefetch(w.as_ptr().add(at).wrapping_add(AHEAD / 2).cast());
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let at = at + i * V::LANES;
                        *sum = V::widen(w.as_ptr().add(at)).multiply_add(V::load(x.as_ptr().add(at), V::LANES), *sum);
                    }
                }
                *out = total(sums) + rest;
            }
        }
    }
}

#[inline(always)]
unsafe fn total<V: Vector>([a, b, c, d]: [V; SUMS]) -> f32 {
    unsafe { a.add(b).add(c.add(d)).total() }
}
