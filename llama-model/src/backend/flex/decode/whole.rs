//! Dots with weights in blocks by vectors that multiply whole numbers: of AVX512-VNNI, AVX2 and NEON.

use std::marker::PhantomData;

use half::f16;

use super::super::stored::Symmetric;
use super::super::vector::{MAX_LANES, Task, Vector};
use super::rounded::{Block, Bytes, HALVES, Half, Rounded};
use super::{AHEAD, Columns, rows_together};
use crate::backend::QUANT_BLOCK;

/// Scales in a cache line.
const LINE: usize = 32;
/// Rows of blocks at a time: they share what is read of the input, and the last steps of their sums.
const ROWS: usize = 4;

/// Vectors with what these dots need.
///
/// # Safety
/// Of all functions: as of [`Vector`]'s.
pub(super) trait Whole: Vector {
    /// Runs a task whose code is compiled for these products.
    unsafe fn run_whole(task: impl Task) {
        unsafe { Self::run(task) }
    }

    /// Σ w · (128 · high + low) over a block of 8-bit weights, in lanes. `sums` are of the high bytes and of the low.
    unsafe fn products_of_8(w: *const i8, x: &Bytes, sums: &[i32; 2]) -> Self;
    /// The same for weights of 4 bits, the first half of a block in the low bits of its bytes.
    unsafe fn products_of_4(w: *const u8, x: &Bytes) -> Self;
    /// What is left to be done to sums of such products, once for all of a row.
    #[inline(always)]
    unsafe fn weigh(self) -> Self {
        self
    }

    /// Blocks of 4 bits that these vectors multiply at a time, each in as many lanes.
    const TOGETHER: usize = 1;
    /// The same for [`TOGETHER`](Self::TOGETHER) blocks, with the input as [`Rounded::halves`] has it.
    unsafe fn products_of_4s(_w: *const u8, _x: *const Half) -> Self {
        unreachable!("these vectors multiply one block at a time")
    }
    /// The scales of as many blocks, each in the lanes of its block. They are every one of the floats there, or every second.
    unsafe fn scales_of_4s(_floats: *const f32, _every: usize) -> Self {
        unreachable!("these vectors multiply one block at a time")
    }
}

/// Integers that these vectors multiply.
pub(super) trait Multiplied: Block {
    /// # Safety
    /// As of [`Whole`]'s.
    unsafe fn products<V: Whole>(w: *const Self, x: &Bytes, sums: &[i32; 2]) -> V;
}

impl Multiplied for i8 {
    #[inline(always)]
    unsafe fn products<V: Whole>(w: *const i8, x: &Bytes, sums: &[i32; 2]) -> V {
        unsafe { V::products_of_8(w, x, sums) }
    }
}

impl Multiplied for u8 {
    #[inline(always)]
    unsafe fn products<V: Whole>(w: *const u8, x: &Bytes, _: &[i32; 2]) -> V {
        unsafe { V::products_of_4(w, x) }
    }
}

impl Multiplied for Symmetric {
    #[inline(always)]
    unsafe fn products<V: Whole>(w: *const Symmetric, x: &Bytes, _: &[i32; 2]) -> V {
        unsafe { V::products_of_4(w.cast(), x) }
    }
}

/// Fills the columns with `x · wᵀ` of weights in blocks. A row's sums do not depend on the others.
///
/// # Safety
/// The columns must be nobody else's; `w` must have a row of as many blocks as each `x` for each of them, and `scales` their floats; the CPU must
/// have the vectors.
pub(super) unsafe fn dots<V: Whole, T: Multiplied>(out: Columns, xs: &[Rounded], w: &[T], scales: &[f16]) {
    unsafe { V::run_whole(Blocks::<V, T> { out, xs, w, scales, kind: PhantomData }) }
}

struct Blocks<'a, V, T> {
    out: Columns,
    xs: &'a [Rounded],
    w: &'a [T],
    scales: &'a [f16],
    kind: PhantomData<V>,
}

impl<V: Whole, T: Multiplied> Task for Blocks<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { mut out, xs, w, scales, .. } = self;
        // What blocks in groups are multiplied with takes more registers.
        let grouped = V::TOGETHER > 1 && T::BYTES == QUANT_BLOCK / 2;
        for xs in xs.chunks(if grouped { 2 } else { rows_together::<V>() }) {
            // SAFETY: the caller's promise.
            unsafe {
                match *xs {
                    [ref a] => products::<V, T, 1>(out, [a], w, scales),
                    [ref a, ref b] => products::<V, T, 2>(out, [a, b], w, scales),
                    [ref a, ref b, ref c] => products::<V, T, 3>(out, [a, b, c], w, scales),
                    [ref a, ref b, ref c, ref d, ..] => products::<V, T, 4>(out, [a, b, c, d], w, scales),
                    [] => {}
                }
            }
            out = out.below(xs.len());
        }
    }
}

/// The products of some rows, for which a weight is read once.
#[inline(always)]
unsafe fn products<V: Whole, T: Multiplied, const M: usize>(out: Columns, xs: [&Rounded; M], w: &[T], scales: &[f16]) {
    let blocks = xs[0].blocks();
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    let cols = w.len() / width;
    let mut floats = vec![0.0f32; M * ROWS * T::factors(xs[0]).len()];
    for first in (0..cols).step_by(ROWS) {
        let (w, scales) = (&w[first * width..], &scales[first * per_row..]);
        // SAFETY: there are so many rows, and scales of their blocks.
        unsafe {
            if cols - first >= ROWS {
                let sums: [[V; ROWS]; M] = sums(xs, w, scales, &mut floats);
                for (row, sums) in sums.into_iter().enumerate() {
                    out.at(row, first).cast::<[f32; ROWS]>().write_unaligned(V::four_totals(sums));
                }
                continue;
            }
            for col in 0..cols - first {
                let sums: [[V; 1]; M] = sums(xs, &w[col * width..], &scales[col * per_row..], &mut floats);
                for (row, [sum]) in sums.into_iter().enumerate() {
                    *out.at(row, first + col) = sum.total();
                }
            }
        }
    }
}

/// The products of `M` rows with the first `N` of a weight, whose elements are still to be summed. `floats` has room for the factors of as many
/// pairs.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "with iterators the sums do not stay in registers: half as fast")]
unsafe fn sums<V: Whole, T: Multiplied, const N: usize, const M: usize>(
    xs: [&Rounded; M],
    w: &[T],
    scales: &[f16],
    floats: &mut [f32],
) -> [[V; N]; M] {
    let blocks = xs[0].blocks();
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    let stride = T::factors(xs[0]).len();
    // SAFETY: the caller's promise; factors and floats are whole registers, and fetching reads nothing.
    unsafe {
        let mut minima = [[V::splat(0.0); N]; M];
        for ((minima, x), floats) in minima.iter_mut().zip(xs).zip(floats.chunks_exact_mut(N * stride)) {
            *minima = multiply_scales::<V, T, N>(floats, x, scales, per_row);
        }
        let factor =
            |row: usize, col: usize, block: usize| floats.as_ptr().add((row * N + col) * stride + block * T::SCALES);
        let together = if T::BYTES == QUANT_BLOCK / 2 { V::TOGETHER } else { 1 };
        let groups = if together > 1 { blocks / together } else { 0 };
        let grouped = groups * together * HALVES;
        assert!(groups == 0 || xs.iter().all(|x| x.halves.len() == grouped), "the input is in other groups");
        let mut sums = [[V::splat(0.0); N]; M];
        for block in groups * together..blocks {
            fetch::<V, T, N>(w, block, 1);
            for col in 0..N {
                let w = w.as_ptr().add(col * width + block * T::BYTES);
                for row in 0..M {
                    let (bytes, of_bytes) = (xs[row].bytes.get_unchecked(block), xs[row].sums.get_unchecked(block));
                    let products: V = T::products(w, bytes, of_bytes);
                    sums[row][col] = products.multiply_add(V::splat(*factor(row, col, block)), sums[row][col]);
                }
            }
        }
        for (sums, minima) in sums.iter_mut().zip(minima) {
            for (sum, minima) in sums.iter_mut().zip(minima) {
                *sum = sum.weigh().add(minima);
            }
        }
        for block in (0..groups).map(|group| group * together) {
            fetch::<V, T, N>(w, block, together);
            for col in 0..N {
                let w = w.as_ptr().add(col * width + block * T::BYTES);
                for row in 0..M {
                    let products = V::products_of_4s(w.cast(), xs[row].halves.as_ptr().add(block * HALVES));
                    let scales = V::scales_of_4s(factor(row, col, block), T::SCALES);
                    sums[row][col] = products.multiply_add(scales, sums[row][col]);
                }
            }
        }
        sums
    }
}

/// Asks for what comes after some blocks of `N` rows: they are fetched one after the other, though they are read side by side.
#[inline(always)]
fn fetch<V: Whole, T: Multiplied, const N: usize>(w: &[T], block: usize, count: usize) {
    for line in (0..count * N * T::BYTES).step_by(64) {
        V::prefetch_far(w.as_ptr().wrapping_add(block * N * T::BYTES + line + AHEAD).cast());
    }
}

/// The floats of each row's blocks times what they are multiplied with, one row as long as the factors behind the other. Returns the sums of the
/// minima among them, in lanes. The rows go side by side, for their sums to wait for each other as little as possible.
#[inline(always)]
unsafe fn multiply_scales<V: Whole, T: Multiplied, const N: usize>(
    floats: &mut [f32],
    x: &Rounded,
    scales: &[f16],
    per_row: usize,
) -> [V; N] {
    let (factors, offsets) = (T::factors(x), T::offsets(x));
    let ones: [f32; MAX_LANES] = std::array::from_fn(|i| (i % T::SCALES) as f32);
    let (whole, stride) = (per_row / V::LANES * V::LANES, factors.len());
    // As many blocks ahead as their values.
    let scales_ahead = AHEAD / T::BYTES * T::SCALES * size_of::<f16>();
    // SAFETY: the caller's promise; of the scales only what is left is read.
    unsafe {
        let (ones, mut minima) = (V::load(ones.as_ptr(), V::LANES), [V::splat(0.0); N]);
        for at in (0..whole).step_by(V::LANES) {
            let factors = V::load(factors.as_ptr().add(at), V::LANES);
            for (row, minima) in minima.iter_mut().enumerate() {
                let scales = scales.as_ptr().add(row * per_row + at);
                if at % LINE == 0 {
                    V::prefetch_far(scales.cast::<u8>().wrapping_add(scales_ahead).cast());
                }
                let product = V::load_f16(scales).multiply(factors);
                product.store(floats.as_mut_ptr().add(row * stride + at), V::LANES);
                if let Some(offsets) = offsets {
                    *minima = product.multiply_add(V::load(offsets.as_ptr().add(at), V::LANES), *minima);
                } else if T::SCALES == 2 {
                    *minima = product.multiply_add(ones, *minima);
                }
            }
        }
        if whole < per_row {
            let factors = V::load(factors.as_ptr().add(whole), V::LANES);
            for (row, minima) in minima.iter_mut().enumerate() {
                let (from, floats) = (row * per_row + whole, floats.as_mut_ptr().add(row * stride + whole));
                // What is behind a row's scales are the next row's, but for the last.
                let mut last = [f16::ZERO; MAX_LANES];
                let mut from = &scales[from..];
                if from.len() < V::LANES {
                    last[..from.len()].copy_from_slice(from);
                    from = &last;
                }
                let product = V::load_f16(from.as_ptr()).multiply(factors);
                product.store(floats, V::LANES);
                if let Some(offsets) = offsets {
                    // Those of the next row are times zero.
                    *minima = product.multiply_add(V::load(offsets.as_ptr().add(whole), V::LANES), *minima);
                } else if T::SCALES == 2 {
                    for i in (1..per_row - whole).step_by(2) {
                        *minima = minima.add(V::load(floats.add(i), 1));
                    }
                }
            }
        }
        minima
    }
}
