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
        let table = table(scale, min);
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
        // Only the last four bits of an index count.
        [_mm512_permutexvar_ps(bytes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table)]
    }
}

/// The values of two blocks in bf16: of their first halves, and of their second.
///
/// # Safety
/// Two blocks must follow `bytes`; the CPU must have AVX-512 with bf16.
#[inline(always)]
pub(in crate::backend::flex) unsafe fn two_of_four_bits(bytes: *const u8, tables: [__m512; 2]) -> [__m512; 2] {
    unsafe {
        let [first, second] = tables;
        let table = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
        // The second block's indices are of the upper half of the table.
        let upper = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
        let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.cast()));
        let low = _mm512_ternarylogic_epi32::<0xea>(bytes, _mm512_set1_epi16(15), upper);
        let high = _mm512_or_si512(_mm512_srli_epi16::<4>(bytes), upper);
        let (low, high) = (_mm512_permutexvar_epi16(low, table), _mm512_permutexvar_epi16(high, table));
        [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
    }
}

/// The 16 values of a block of 4 bits that count from -8.
#[inline(always)]
pub(in crate::backend::flex) unsafe fn symmetric_table(scale: f32) -> __m512 {
    unsafe {
        let counts = _mm512_set_ps(7., 6., 5., 4., 3., 2., 1., 0., -1., -2., -3., -4., -5., -6., -7., -8.);
        _mm512_mul_ps(counts, _mm512_set1_ps(scale))
    }
}

/// The 16 values of a block of 4 bits.
#[inline(always)]
pub(in crate::backend::flex) unsafe fn table(scale: f32, min: f32) -> __m512 {
    unsafe {
        let counts = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
        _mm512_fmadd_ps(counts, _mm512_set1_ps(scale), _mm512_set1_ps(min))
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
