//! Dots of weights in blocks as sums of whole numbers (AVX512-VNNI). One instruction multiplies bytes and adds groups of four, and a
//! register holds the same 32 weights twice, once for the high and once for the low bytes of the input.

use std::arch::x86_64::*;

use half::f16;

use super::super::vector::Vector;
use super::avx512::{AHEAD, fetch_ahead};
use super::rounded::{Block, Rounded};

/// Rows at a time: they share what is read of the input, and the last steps of their sums.
const ROWS: usize = 4;

/// A form in blocks of whole numbers.
pub(super) trait Integers: Block {
    /// What a block's sum starts with.
    ///
    /// # Safety
    /// The CPU must have AVX-512.
    unsafe fn start(x: &Rounded, block: usize) -> __m512i;
    /// The values of a block, twice, as bytes without sign.
    ///
    /// # Safety
    /// A block must follow; the CPU must have AVX-512.
    unsafe fn twice(bytes: *const Self) -> __m512i;
}

impl Integers for i8 {
    #[inline(always)]
    unsafe fn start(x: &Rounded, block: usize) -> __m512i {
        // The weights count from -128, so it is -128 times the sum of the high bytes and that of the low ones.
        unsafe {
            let [high, low] = *x.sums.get_unchecked(block);
            _mm512_setr_epi32(-128 * high, 0, 0, 0, 0, 0, 0, 0, -128 * low, 0, 0, 0, 0, 0, 0, 0)
        }
    }

    #[inline(always)]
    unsafe fn twice(bytes: *const i8) -> __m512i {
        unsafe {
            let twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(bytes.cast()));
            _mm512_xor_si512(twice, _mm512_set1_epi8(-128))
        }
    }
}

impl Integers for u8 {
    #[inline(always)]
    unsafe fn start(_: &Rounded, _: usize) -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn twice(bytes: *const u8) -> __m512i {
        unsafe {
            let four_times = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.cast()));
            let shifted = _mm512_srlv_epi64(four_times, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
            _mm512_and_si512(shifted, _mm512_set1_epi8(15))
        }
    }
}

/// `out[i] = Σ x · w[i]`
///
/// # Safety
/// `w` must have a row of as many blocks as `x` for each result, and `scales` their floats; the CPU must have AVX512-VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn dots<T: Integers>(out: &mut [f32], x: &Rounded, w: &[T], scales: &[f16]) {
    let (width, per_row) = (x.blocks() * T::BYTES, x.blocks() * T::SCALES);
    let mut floats = vec![0.0f32; ROWS * per_row.next_multiple_of(16)];
    let groups = out.chunks_mut(ROWS).zip(w.chunks(ROWS * width)).zip(scales.chunks(ROWS * per_row));
    for ((out, w), scales) in groups {
        // SAFETY: there are so many rows, and scales of their blocks.
        unsafe {
            if out.len() == ROWS {
                out.copy_from_slice(&__m512::four_totals(sums::<T, ROWS>(x, w, scales, &mut floats)));
                continue;
            }
            let rows = w.chunks_exact(width).zip(scales.chunks_exact(per_row));
            for (out, (w, scales)) in out.iter_mut().zip(rows) {
                let [sum] = sums::<T, 1>(x, w, scales, &mut floats);
                *out = _mm512_reduce_add_ps(sum);
            }
        }
    }
}

/// The products with `N` rows, whose elements are still to be summed. `floats` has room for a row's factors, whole registers
/// of them, `N` times.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums<T: Integers, const N: usize>(x: &Rounded, w: &[T], scales: &[f16], floats: &mut [f32]) -> [__m512; N] {
    let blocks = x.blocks();
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    let stride = per_row.next_multiple_of(16);
    // As many blocks ahead as their values.
    let scales_ahead = AHEAD / T::BYTES * T::SCALES * size_of::<f16>();
    let mut totals = [_mm512_setzero_ps(); N];
    for ((scales, floats), total) in scales.chunks_exact(per_row).zip(floats.chunks_exact_mut(stride)).zip(&mut totals)
    {
        // SAFETY: factors and floats are whole registers, and of the scales only what is left is read.
        unsafe {
            for at in (0..per_row).step_by(16) {
                let left = ((1u32 << (per_row - at).min(16)) - 1) as u16;
                fetch_ahead(scales.as_ptr().add(at), scales_ahead);
                let halfs = _mm256_maskz_loadu_epi16(left, scales.as_ptr().add(at).cast());
                let factors = _mm512_loadu_ps(T::factors(x).as_ptr().add(at));
                let products = _mm512_mul_ps(_mm512_cvtph_ps(halfs), factors);
                _mm512_storeu_ps(floats.as_mut_ptr().add(at), products);
                if T::SCALES == 2 {
                    // The minimum times the sum of the block's values.
                    *total = _mm512_mask_add_ps(*total, 0xaaaa, *total, products);
                }
            }
        }
    }
    let mut sums = [_mm512_setzero_ps(); N];
    for block in 0..blocks {
        // SAFETY: the block is inside each row; fetching reads nothing.
        unsafe {
            let bytes = _mm512_loadu_si512(x.bytes.as_ptr().add(block).cast());
            let start = T::start(x, block);
            // The rows are fetched one after the other, though they are read side by side.
            for line in (0..N * T::BYTES).step_by(64) {
                fetch_ahead(w.as_ptr().wrapping_add(block * N * T::BYTES + line), AHEAD);
            }
            for (row, sum) in sums.iter_mut().enumerate() {
                let w = w.as_ptr().add(row * width + block * T::BYTES);
                let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, T::twice(w), bytes));
                let scale = _mm512_set1_ps(*floats.get_unchecked(row * stride + block * T::SCALES));
                *sum = _mm512_fmadd_ps(products, scale, *sum);
            }
        }
    }
    let weights = _mm512_setr_ps(128., 128., 128., 128., 128., 128., 128., 128., 1., 1., 1., 1., 1., 1., 1., 1.);
    for (total, sum) in totals.iter_mut().zip(sums) {
        *total = _mm512_fmadd_ps(sum, weights, *total);
    }
    totals
}
