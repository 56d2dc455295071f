//! Whole numbers by AVX512-VNNI: one instruction multiplies bytes and adds groups of four, one operand without sign. A register holds the
//! same 32 weights twice, once for the high and once for the low bytes of the input; or half of four blocks of 4 bits.

use std::arch::x86_64::*;

use super::super::vector::compiled_for;
use super::rounded::{Bytes, Half};
use super::whole::Whole;

impl Whole for __m512 {
    compiled_for!(run_whole, "avx512f,avx512bw,avx512vl,avx512vnni");

    #[inline(always)]
    unsafe fn products_of_8(w: *const i8, x: &Bytes, [high, low]: &[i32; 2]) -> Self {
        unsafe {
            let twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(w.cast()));
            let twice = _mm512_xor_si512(twice, _mm512_set1_epi8(-128));
            // These weights count from -128: it is times the sum of the high bytes, and that of the low ones.
            let start = _mm512_setr_epi32(-128 * high, 0, 0, 0, 0, 0, 0, 0, -128 * low, 0, 0, 0, 0, 0, 0, 0);
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, twice, load(x)))
        }
    }

    #[inline(always)]
    unsafe fn products_of_4(w: *const u8, x: &Bytes) -> Self {
        unsafe {
            let four_times = _mm512_broadcast_i32x4(_mm_loadu_si128(w.cast()));
            let shifted = _mm512_srlv_epi64(four_times, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
            let twice = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), twice, load(x)))
        }
    }

    const TOGETHER: usize = 4;

    #[inline(always)]
    unsafe fn products_of_4s(w: *const u8, x: *const Half) -> Self {
        unsafe {
            let both = _mm512_loadu_si512(w.cast());
            let mask = _mm512_set1_epi8(15);
            let (first, second) = (_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask));
            let [high_first, high_second, low_first, low_second] =
                [0, 1, 2, 3].map(|i| _mm512_loadu_si512(x.add(4 * i).cast()));
            let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, high_first);
            let high = _mm512_slli_epi32::<7>(_mm512_dpbusd_epi32(high, second, high_second));
            let low = _mm512_dpbusd_epi32(high, first, low_first);
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(low, second, low_second))
        }
    }

    #[inline(always)]
    unsafe fn scales_of_4s(floats: *const f32, every: usize) -> Self {
        unsafe {
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
            if every == 2 {
                _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(floats)))
            } else {
                _mm512_permutexvar_ps(_mm512_srli_epi32::<1>(lanes), _mm512_castps128_ps512(_mm_loadu_ps(floats)))
            }
        }
    }

    #[inline(always)]
    unsafe fn weigh(self) -> Self {
        let weights = [128., 128., 128., 128., 128., 128., 128., 128., 1., 1., 1., 1., 1., 1., 1., 1.];
        unsafe { _mm512_mul_ps(self, _mm512_loadu_ps(weights.as_ptr())) }
    }
}

#[inline(always)]
unsafe fn load(x: &Bytes) -> __m512i {
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}
