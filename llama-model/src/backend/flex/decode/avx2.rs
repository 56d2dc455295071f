//! Whole numbers by AVX2: two steps multiply bytes and add groups of four, one operand without sign.

use std::arch::x86_64::*;

use super::rounded::Bytes;
use super::whole::Whole;
use crate::backend::QUANT_BLOCK;

impl Whole for __m256 {
    const TWO: bool = true;

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

    #[inline(always)]
    unsafe fn products_of_two_4(w: *const u8, x: &[Bytes; 2]) -> Self {
        unsafe {
            let both = _mm256_loadu_si256(w.cast());
            let mask = _mm256_set1_epi8(15);
            let (first, second) = (_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask));
            let high = _mm256_maddubs_epi16(second, of_two(x, HALF));
            let high = _mm256_add_epi16(high, _mm256_maddubs_epi16(first, of_two(x, 0)));
            let low = _mm256_maddubs_epi16(second, of_two(x, QUANT_BLOCK + HALF));
            let low = _mm256_add_epi16(low, _mm256_maddubs_epi16(first, of_two(x, QUANT_BLOCK)));
            total(high, low)
        }
    }

    #[inline(always)]
    unsafe fn two(numbers: *const f32) -> Self {
        unsafe {
            let both = _mm256_broadcast_ps(&*numbers.cast());
            _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2))
        }
    }
}

const HALF: usize = QUANT_BLOCK / 2;

/// Half of the high or low bytes of one block and of another.
#[inline(always)]
unsafe fn of_two([first, second]: &[Bytes; 2], at: usize) -> __m256i {
    unsafe { _mm256_loadu2_m128i(second.as_ptr().add(at).cast(), first.as_ptr().add(at).cast()) }
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
