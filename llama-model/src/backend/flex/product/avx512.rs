//! The dot product of pairs of bf16 that CPUs with AVX-512 may have.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use half::bf16;

use super::super::vector::{compiled_for, mask};
use super::matrix::Operand;
use super::tile::Format;

/// Pairs of bf16 for the hardware's dot product. It takes subnormal numbers for zero.
pub(super) struct Pairs;

impl Format<__m512> for Pairs {
    const TERMS: usize = 2;
    #[inline(always)]
    unsafe fn along<T: Operand>(src: *const T, count: usize) -> __m512 {
        unsafe { T::pairs(src, count) }
    }
    #[inline(always)]
    unsafe fn across<T: Operand>(src: *const T, stride: isize, have: usize, count: usize) -> __m512 {
        unsafe {
            let first = T::halves(src, have);
            let second = T::halves(src.wrapping_offset(stride), if count > 1 { have } else { 0 });
            _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32::<16>(second)))
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        let pairs = |x| unsafe { std::mem::transmute::<__m512, __m512bh>(x) };
        unsafe { _mm512_dpbf16_ps(sum, pairs(a), pairs(b)) }
    }
    compiled_for!(run, "avx512f,avx512bw,avx512vl,avx512bf16");
}

/// [`Operand::pairs`] of f32.
#[inline(always)]
pub(super) unsafe fn pairs(src: *const f32, count: usize) -> __m512 {
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask(count), src);
        let high = _mm512_maskz_loadu_ps(mask(count.saturating_sub(16)), src.wrapping_add(16));
        std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// [`Operand::halves`] of f32.
#[inline(always)]
pub(super) unsafe fn halves(src: *const f32, count: usize) -> __m512i {
    unsafe { to_bf16(_mm512_maskz_loadu_ps(mask(count), src)) }
}

/// [`Operand::pairs`] of bf16.
#[inline(always)]
pub(super) unsafe fn stored_pairs(src: *const bf16, count: usize) -> __m512 {
    let mask = if count >= 32 { !0 } else { (1 << count) - 1 };
    unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, src.cast())) }
}

/// [`Operand::halves`] of bf16.
#[inline(always)]
pub(super) unsafe fn stored_halves(src: *const bf16, count: usize) -> __m512i {
    unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(count), src.cast())) }
}

/// The bf16 nearest to each number, in the low half of its lane.
#[inline(always)]
pub(super) unsafe fn to_bf16(x: __m512) -> __m512i {
    unsafe { _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
}

/// Whether the CPU has a bf16 dot product.
pub(super) fn has_dot() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// Whether the CPU's bf16 dot product is worth its while. AMD's (from Zen 4) has twice the rate of f32; Intel's, outside
/// its matrix unit, half of it.
pub(super) fn fast_dot() -> bool {
    // In a virtual machine the question takes microseconds. The vendor's name begins in `ebx`.
    static FAST: OnceLock<bool> = OnceLock::new();
    *FAST.get_or_init(|| has_dot() && __cpuid(0).ebx == u32::from_le_bytes(*b"Auth"))
}
