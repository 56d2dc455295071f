//! Vectors of AVX-512: 14 x 32 sums in registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{MAX_LANES, Vector, compiled_for};

/// The first `count` lanes.
pub(in crate::backend::flex) fn mask(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

impl Vector for __m512 {
    const LANES: usize = 16;
    const ROWS: usize = 14;
    const VECTORS: usize = 2;
    /// 1 MB.
    const BLOCK: usize = 36 * Self::ROWS;

    compiled_for!(run, "avx512f");
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(src: *const f32, count: usize) -> Self {
        unsafe { _mm512_maskz_loadu_ps(mask(count), src) }
    }
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        unsafe {
            let short = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(short))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, out: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(out, mask(count), self) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, out: *mut bf16, count: usize) {
        unsafe {
            let short = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.round_to_bf16()));
            match count {
                0..16 => _mm512_mask_cvtepi32_storeu_epi16(out.cast(), mask(count), short),
                _ => _mm256_storeu_si256(out.cast(), _mm512_cvtepi32_epi16(short)),
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { _mm512_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn multiply(self, by: Self) -> Self {
        unsafe { _mm512_mul_ps(self, by) }
    }
    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        unsafe { _mm512_fmadd_ps(self, by, sum) }
    }
    #[inline(always)]
    unsafe fn four_totals([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        unsafe {
            // Two steps make each quarter hold a part of all four sums.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let [ab, cd] = [_mm512_castps_pd(ab), _mm512_castps_pd(cd)];
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let all = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
            let halves = _mm256_add_ps(
                _mm512_castps512_ps256(all),
                _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(all))),
            );
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn transpose(square: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        unsafe {
            let low = |a, b| _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
            let high = |a, b| _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
            let (mut pairs, mut quads, mut out) = (square, square, square);
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(square[2 * i], square[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(square[2 * i], square[2 * i + 1]);
            }
            for i in 0..4 {
                let [a, b, c, d] = [0, 1, 2, 3].map(|j| pairs[4 * i + j]);
                quads[4 * i] = low(a, c);
                quads[4 * i + 1] = high(a, c);
                quads[4 * i + 2] = low(b, d);
                quads[4 * i + 3] = high(b, d);
            }
            // Quarter `q` of `quads[4 i + j]` holds rows `4 i ..` of column `4 q + j`.
            for j in 0..4 {
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| quads[4 * i + j]);
                let (even_ab, odd_ab) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even_cd, odd_cd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                out[j] = _mm512_shuffle_f32x4::<0x88>(even_ab, even_cd);
                out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd);
                out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even_ab, even_cd);
                out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_cd);
            }
            out
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
    unsafe fn round_to_bf16(self) -> Self {
        unsafe {
            let bits = _mm512_castps_si512(self);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self, self);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let rounded = _mm512_mask_mov_epi32(up, nan, quiet);
            _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
        }
    }
    #[inline(always)]
    unsafe fn round_to_f16(self) -> Self {
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self)) }
    }
}
