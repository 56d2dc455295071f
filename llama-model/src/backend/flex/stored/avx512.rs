//! Stored forms as floats by AVX-512: the compiler widens short integers half a register at a time.

use std::arch::x86_64::*;

use half::f16;

use super::super::decode::rounded::Block;
use super::super::vector;
use super::Symmetric;
use crate::backend::QUANT_BLOCK;

/// The integer of a form in blocks, one or more to a byte.
pub(in crate::backend::flex) trait Widened: Block {
    /// The values of a block, by halves.
    ///
    /// # Safety
    /// A block must follow `bytes`, its floats `scales`; the CPU must have AVX-512.
    unsafe fn load(bytes: *const Self, scales: *const f32) -> [__m512; 2];
}

impl Widened for i8 {
    #[inline(always)]
    unsafe fn load(bytes: *const i8, scales: *const f32) -> [__m512; 2] {
        unsafe {
            let scale = _mm512_set1_ps(*scales);
            let low = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.cast()));
            let high = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(16).cast()));
            [_mm512_mul_ps(_mm512_cvtepi32_ps(low), scale), _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale)]
        }
    }
}

impl Widened for u8 {
    #[inline(always)]
    unsafe fn load(bytes: *const u8, scales: *const f32) -> [__m512; 2] {
        unsafe { of_four_bits(bytes, *scales, *scales.add(1)) }
    }
}

impl Widened for Symmetric {
    #[inline(always)]
    unsafe fn load(bytes: *const Symmetric, scales: *const f32) -> [__m512; 2] {
        unsafe { of_four_bits(bytes.cast(), *scales, -8.0 * *scales) }
    }
}

#[inline(always)]
unsafe fn of_four_bits(bytes: *const u8, scale: f32, min: f32) -> [__m512; 2] {
    unsafe {
        // A block has 16 different values: they are looked up.
        let counts = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
        let table = _mm512_fmadd_ps(counts, _mm512_set1_ps(scale), _mm512_set1_ps(min));
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
        // Only the last four bits of an index count.
        [_mm512_permutexvar_ps(bytes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table)]
    }
}

/// The values of whole blocks.
///
/// # Safety
/// `out` must have room for the blocks and `scales` have their floats; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn widen<T: Widened>(out: &mut [f32], w: &[T], scales: &[f16]) {
    /// Blocks whose scales are widened together.
    const STEP: usize = 64;
    let mut floats = [0.0f32; 2 * STEP];
    let steps = out.chunks_mut(STEP * QUANT_BLOCK).zip(w.chunks(STEP * T::BYTES)).zip(scales.chunks(STEP * T::SCALES));
    for ((out, w), scales) in steps {
        // SAFETY: the caller's promise.
        unsafe { vector::widen::<__m512>(&mut floats, scales) };
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
