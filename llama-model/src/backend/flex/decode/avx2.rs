//! Whole numbers by AVX2: two steps multiply bytes and add groups of four, one operand without sign.

use std::arch::x86_64::*;

use super::rounded::{Bytes, Half};
use super::whole::Whole;
use crate::backend::QUANT_BLOCK;

impl Whole for __m256 {
    #[inline(always)]
    unsafe fn products_of_8(w: *const i8, x: &Bytes, _: &[i32; 2]) -> Self {
        unsafe {
            let w = _mm256_loadu_si256(w.cast());
            let [high, low] = halves(x);
            // The weight's sign goes to the other operand. 2 · 128 · 127 is still a number of 16 bits.
            products(_mm256_abs_epi8(w), _mm256_sign_epi8(high, w), _mm256_sign_epi8(low, w))
        }
    }

    #[inline(always)]
    unsafe fn products_of_4(w: *const u8, x: &Bytes) -> Self {
        unsafe {
            let w = _mm_loadu_si128(w.cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(w), w);
            let [high, low] = halves(x);
            products(_mm256_and_si256(both, _mm256_set1_epi8(15)), high, low)
        }
    }

    const TOGETHER: usize = 2;

    #[inline(always)]
    unsafe fn products_of_4s(w: *const u8, x: *const Half) -> Self {
        unsafe {
            let both = _mm256_loadu_si256(w.cast());
            let mask = _mm256_set1_epi8(15);
            let (first, second) = (_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask));
            let [high_first, high_second, low_first, low_second] =
                [0, 1, 2, 3].map(|i| _mm256_loadu_si256(x.add(2 * i).cast()));
            let add = |a, b| _mm256_add_epi16(a, b);
            let high = add(_mm256_maddubs_epi16(second, high_second), _mm256_maddubs_epi16(first, high_first));
            let low = add(_mm256_maddubs_epi16(second, low_second), _mm256_maddubs_epi16(first, low_first));
            total(high, low)
        }
    }

    #[inline(always)]
    unsafe fn scales_of_4s(floats: *const f32, every: usize) -> Self {
        unsafe {
            let second = every as i32;
            let lanes = _mm256_setr_epi32(0, 0, 0, 0, second, second, second, second);
            // Of single scales there are only two.
            let both = if every == 2 { _mm_loadu_ps(floats) } else { _mm_castsi128_ps(_mm_loadl_epi64(floats.cast())) };
            _mm256_permutevar_ps(_mm256_set_m128(both, both), lanes)
        }
    }
}

#[inline(always)]
unsafe fn halves(x: &Bytes) -> [__m256i; 2] {
    let (high, low) = x.split_at(QUANT_BLOCK);
    unsafe { [_mm256_loadu_si256(high.as_ptr().cast()), _mm256_loadu_si256(low.as_ptr().cast())] }
}

#[inline(always)]
unsafe fn products(w: __m256i, high: __m256i, low: __m256i) -> __m256 {
    unsafe { total(_mm256_maddubs_epi16(w, high), _mm256_maddubs_epi16(w, low)) }
}

/// `128 · high + low`, by pairs.
#[inline(always)]
unsafe fn total(high: __m256i, low: __m256i) -> __m256 {
    unsafe {
        let high = _mm256_madd_epi16(high, _mm256_set1_epi16(128));
        let low = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
        _mm256_cvtepi32_ps(_mm256_add_epi32(high, low))
    }
}
