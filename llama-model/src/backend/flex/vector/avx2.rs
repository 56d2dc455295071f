//! Vectors of AVX2, with its fused multiply-add: 6 x 16 sums in registers.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::{bf16, f16};

use super::{MAX_LANES, Vector, compiled_for, load_lanes};

impl Vector for __m256 {
    const LANES: usize = 8;
    const ROWS: usize = 6;
    const VECTORS: usize = 2;
    const BLOCK: usize = 32 * Self::ROWS;

    compiled_for!(run, "avx2,fma,f16c");
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm256_set1_ps(x) }
    }
    /// Masked loads and stores are slow on many CPUs that have no more than this.
    #[inline(always)]
    unsafe fn load(src: *const f32, count: usize) -> Self {
        unsafe {
            if count >= Self::LANES {
                _mm256_loadu_ps(src)
            } else {
                transmute::<[f32; 8], Self>(load_lanes(src, count))
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        unsafe {
            let short = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(short))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, out: *mut f32, count: usize) {
        unsafe {
            if count >= Self::LANES {
                return _mm256_storeu_ps(out, self);
            }
            let (mut lanes, mut out) = (_mm256_castps256_ps128(self), out);
            if count & 4 != 0 {
                _mm_storeu_ps(out, lanes);
                (lanes, out) = (_mm256_extractf128_ps::<1>(self), out.add(4));
            }
            if count & 2 != 0 {
                _mm_storel_pd(out.cast(), _mm_castps_pd(lanes));
                (lanes, out) = (_mm_movehl_ps(lanes, lanes), out.add(2));
            }
            if count & 1 != 0 {
                _mm_store_ss(out, lanes);
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { _mm256_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn multiply(self, by: Self) -> Self {
        unsafe { _mm256_mul_ps(self, by) }
    }
    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        unsafe { _mm256_fmadd_ps(self, by, sum) }
    }
    #[inline(always)]
    unsafe fn four_totals([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        unsafe {
            let all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
            transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn transpose(mut square: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        unsafe {
            let upper = quads([0, 1, 2, 3].map(|i| square[i]));
            let lower = quads([4, 5, 6, 7].map(|i| square[i]));
            for i in 0..4 {
                square[i] = _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
                square[4 + i] = _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
            }
            square
        }
    }
    #[inline(always)]
    fn prefetch(ptr: *const f32) {
        // SAFETY: it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(ptr: *const f32) {
        // SAFETY: it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn round_to_f16(self) -> Self {
        unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self)) }
    }
}

/// Of four rows the columns 0 and 4, 1 and 5, 2 and 6, 3 and 7.
#[inline(always)]
unsafe fn quads([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    unsafe {
        let [ab, cd] = [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)];
        let [ab_high, cd_high] = [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)];
        [
            _mm256_shuffle_ps::<0x44>(ab, cd),
            _mm256_shuffle_ps::<0xee>(ab, cd),
            _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
            _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
        ]
    }
}
