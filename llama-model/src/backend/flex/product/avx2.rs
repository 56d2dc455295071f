//! Vectors of AVX2, with its fused multiply-add: 6 x 16 sums in registers.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::vector::{MAX_LANES, Task, Vector, load_lanes, store_lanes};

impl Vector for __m256 {
    const LANES: usize = 8;
    const ROWS: usize = 6;
    const VECTORS: usize = 2;
    const BLOCK: usize = 32 * Self::ROWS;

    unsafe fn run(task: impl Task) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn compiled(task: impl Task) {
            unsafe { task.run() }
        }
        unsafe { compiled(task) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm256_set1_ps(x) }
    }
    /// Masked loads and stores of this generation are slow.
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
    unsafe fn store(self, out: *mut f32, count: usize) {
        unsafe {
            if count >= Self::LANES {
                _mm256_storeu_ps(out, self);
            } else {
                store_lanes(transmute::<Self, [f32; 8]>(self), out, count);
            }
        }
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
    unsafe fn transpose(mut square: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        unsafe {
            let low = |a, b| _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
            let high = |a, b| _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
            // Of four rows: columns 0 and 4, 1 and 5, 2 and 6, 3 and 7.
            let quads = |[a, b, c, d]: [Self; 4]| {
                let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
                let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
                [low(ab, cd), high(ab, cd), low(ab_high, cd_high), high(ab_high, cd_high)]
            };
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
    unsafe fn round_to_f16(self) -> Self {
        unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self)) }
    }
}
