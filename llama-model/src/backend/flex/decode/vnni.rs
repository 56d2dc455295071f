//! Whole numbers by AVX512-VNNI: one instruction multiplies bytes and adds groups of four, one operand without sign. A register holds the
//! same 32 weights twice, once for the high and once for the low bytes of the input.

use std::arch::x86_64::*;

use super::super::vector::compiled_for;
use super::rounded::Bytes;
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
