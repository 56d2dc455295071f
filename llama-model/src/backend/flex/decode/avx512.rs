//! The loops by hand: the compiler widens short integers half a register at a time.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::attention::avx512::four_totals;
use crate::backend::QUANT_BLOCK;

/// Sums at a time, so that none waits for the one before.
const SUMS: usize = 4;
/// Bytes between what is read and what is asked for. Rows are read one after the other, a single stream: several at a time
/// were half as fast where rows are short.
const AHEAD: usize = 8192;

/// A float that 16 of are widened at a time.
pub trait Widen: Copy {
    /// # Safety
    /// 16 values must follow `ptr`; the CPU must have AVX-512.
    unsafe fn widen(ptr: *const Self) -> __m512;
    fn value(self) -> f32;
}

impl Widen for f32 {
    #[inline(always)]
    unsafe fn widen(ptr: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(ptr) }
    }
    fn value(self) -> f32 {
        self
    }
}

impl Widen for bf16 {
    #[inline(always)]
    unsafe fn widen(ptr: *const bf16) -> __m512 {
        unsafe {
            let short = _mm512_cvtepu16_epi32(_mm256_loadu_si256(ptr.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(short))
        }
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

impl Widen for f16 {
    #[inline(always)]
    unsafe fn widen(ptr: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(ptr.cast())) }
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// The integer of a form in blocks, one or more to a byte.
pub trait Block: Copy {
    /// Bytes of a block.
    const BYTES: usize;
    /// Floats that describe a block.
    const SCALES: usize;
    /// The values of a block, by halves.
    ///
    /// # Safety
    /// A block must follow `bytes`, its floats `scales`; the CPU must have AVX-512.
    unsafe fn load(bytes: *const Self, scales: *const f32) -> [__m512; 2];
    /// Adds the products of a block with `x`.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    unsafe fn add(sums: &mut [__m512; 2], x: [__m512; 2], bytes: *const Self, scales: *const f32);
}

impl Block for i8 {
    const BYTES: usize = QUANT_BLOCK;
    const SCALES: usize = 1;

    #[inline(always)]
    unsafe fn load(bytes: *const i8, scales: *const f32) -> [__m512; 2] {
        unsafe {
            let scale = _mm512_set1_ps(*scales);
            let low = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.cast()));
            let high = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(16).cast()));
            [_mm512_mul_ps(_mm512_cvtepi32_ps(low), scale), _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale)]
        }
    }

    #[inline(always)]
    unsafe fn add(sums: &mut [__m512; 2], x: [__m512; 2], bytes: *const i8, scales: *const f32) {
        unsafe {
            // The scale once for both halves.
            let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.cast())));
            let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(16).cast())));
            let both = _mm512_fmadd_ps(x[1], high, _mm512_mul_ps(x[0], low));
            sums[0] = _mm512_fmadd_ps(both, _mm512_set1_ps(*scales), sums[0]);
        }
    }
}

impl Block for u8 {
    const BYTES: usize = QUANT_BLOCK / 2;
    const SCALES: usize = 2;

    #[inline(always)]
    unsafe fn load(bytes: *const u8, scales: *const f32) -> [__m512; 2] {
        unsafe {
            // A block has 16 different values: they are looked up.
            let counts = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
            let table = _mm512_fmadd_ps(counts, _mm512_set1_ps(*scales), _mm512_set1_ps(*scales.add(1)));
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
            // Only the last four bits of an index count.
            [_mm512_permutexvar_ps(bytes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table)]
        }
    }

    #[inline(always)]
    unsafe fn add(sums: &mut [__m512; 2], x: [__m512; 2], bytes: *const u8, scales: *const f32) {
        unsafe {
            let [low, high] = Self::load(bytes, scales);
            sums[0] = _mm512_fmadd_ps(x[0], low, sums[0]);
            sums[1] = _mm512_fmadd_ps(x[1], high, sums[1]);
        }
    }
}

/// `out[i] = Σ x · w[i]`
///
/// # Safety
/// `w` must have a row as long as `x` for each result; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn dots<T: Widen>(out: &mut [f32], x: &[f32], w: &[T]) {
    for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        let (x_blocks, x_rest) = x.as_chunks::<{ 16 * SUMS }>();
        let (w_blocks, w_rest) = w.as_chunks::<{ 16 * SUMS }>();
        for (x, w) in x_blocks.iter().zip(w_blocks) {
            // SAFETY: 16 elements follow each place; fetching reads nothing.
            unsafe {
                for (i, sum) in sums.iter_mut().enumerate() {
                    fetch_ahead(w.as_ptr().add(16 * i));
                    let x = _mm512_loadu_ps(x.as_ptr().add(16 * i));
                    *sum = _mm512_fmadd_ps(x, T::widen(w.as_ptr().add(16 * i)), *sum);
                }
            }
        }
        let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w.value()).sum();
        *out = total(sums) + rest;
    }
}

/// As [`dots`], for rows of whole blocks.
///
/// # Safety
/// As there; `scales` must have those of as many blocks.
#[target_feature(enable = "avx512f")]
pub unsafe fn block_dots<T: Block>(out: &mut [f32], x: &[f32], w: &[T], scales: &[f16]) {
    /// Rows at a time: they share what is read of `x`, and the last steps of their sums.
    const ROWS: usize = 4;
    let blocks = x.len() / QUANT_BLOCK;
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    let mut floats = vec![0.0f32; ROWS * per_row];
    let groups = out.chunks_mut(ROWS).zip(w.chunks(ROWS * width)).zip(scales.chunks(ROWS * per_row));
    for ((out, w), scales) in groups {
        to_floats(&mut floats, scales);
        // SAFETY: there are so many rows, and scales of their blocks.
        unsafe {
            if out.len() == ROWS {
                let [a, b, c, d] = block_sums::<T, ROWS>(x, w, &floats);
                _mm_storeu_ps(out.as_mut_ptr(), four_totals(a, b, c, d));
                continue;
            }
            let rows = w.chunks_exact(width).zip(floats.chunks_exact(per_row));
            for (out, (w, scales)) in out.iter_mut().zip(rows) {
                let [sum] = block_sums::<T, 1>(x, w, scales);
                *out = _mm512_reduce_add_ps(sum);
            }
        }
    }
}

/// The products with `N` rows, whose elements are still to be summed.
#[target_feature(enable = "avx512f")]
unsafe fn block_sums<T: Block, const N: usize>(x: &[f32], w: &[T], scales: &[f32]) -> [__m512; N] {
    let blocks = x.len() / QUANT_BLOCK;
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for block in 0..blocks {
        // SAFETY: the block is inside each row; fetching reads nothing.
        unsafe {
            let x = x.as_ptr().add(block * QUANT_BLOCK);
            let x = [_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let at = row * blocks + block;
                let w = w.as_ptr().add(at * T::BYTES);
                fetch_ahead(w);
                T::add(sums, x, w, scales.as_ptr().add(at * T::SCALES));
            }
        }
    }
    let mut totals = [_mm512_setzero_ps(); N];
    for (total, [low, high]) in totals.iter_mut().zip(sums) {
        *total = _mm512_add_ps(low, high);
    }
    totals
}

/// The values of whole blocks.
///
/// # Safety
/// `out` must have room for the blocks and `scales` have their floats; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn widen<T: Block>(out: &mut [f32], w: &[T], scales: &[f16]) {
    /// Blocks whose scales are widened together.
    const STEP: usize = 64;
    let mut floats = [0.0f32; 2 * STEP];
    let steps = out.chunks_mut(STEP * QUANT_BLOCK).zip(w.chunks(STEP * T::BYTES)).zip(scales.chunks(STEP * T::SCALES));
    for ((out, w), scales) in steps {
        to_floats(&mut floats, scales);
        let blocks = out.as_chunks_mut::<QUANT_BLOCK>().0.iter_mut().zip(w.chunks_exact(T::BYTES));
        for ((out, w), scales) in blocks.zip(floats.chunks_exact(T::SCALES)) {
            // SAFETY: a block follows each pointer.
            unsafe {
                let [low, high] = T::load(w.as_ptr(), scales.as_ptr());
                _mm512_storeu_ps(out.as_mut_ptr(), low);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), high);
            }
        }
    }
}

/// Widens half floats into the beginning of a buffer.
#[target_feature(enable = "avx512f")]
fn to_floats(out: &mut [f32], halfs: &[f16]) {
    let (blocks, rest) = halfs.as_chunks::<16>();
    let (out_blocks, out_rest) = out.split_at_mut(16 * blocks.len());
    for (out, block) in out_blocks.as_chunks_mut::<16>().0.iter_mut().zip(blocks) {
        // SAFETY: both have 16 elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), f16::widen(block.as_ptr())) };
    }
    for (out, half) in out_rest.iter_mut().zip(rest) {
        *out = half.to_f32();
    }
}

/// Asks for what will be read soon: rows follow one another, so it may belong to the next.
#[inline(always)]
unsafe fn fetch_ahead<T>(ptr: *const T) {
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast::<i8>().wrapping_add(AHEAD)) }
}

#[target_feature(enable = "avx512f")]
fn total(sums: [__m512; SUMS]) -> f32 {
    let [a, b, c, d] = sums;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
}
