//! Vectors of words, which an instruction multiplies and adds up by pairs.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::vector::{Task, compiled_for};
use super::whole::Whole;

/// A vector of sums of 32 bits, or of twice as many words.
///
/// # Safety
/// Of all functions: the CPU must have the instructions, and what is pointed to must exist.
pub(super) trait Words: Copy {
    /// As many floats as sums.
    type Floats: Whole;
    /// Rows of the input at a time: their sums and those of the block they are in take most registers.
    const ROWS: usize;

    /// Runs a task whose code is compiled for these vectors.
    unsafe fn run(task: impl Task);
    unsafe fn zeros() -> Self;
    /// A pair of words for each sum.
    unsafe fn splat(pair: i32) -> Self;
    /// `self + a · b`, where a sum is one of two products.
    unsafe fn add_products(self, a: Self, b: Self) -> Self;
    /// The sums.
    unsafe fn floats(self) -> Self::Floats;

    /// Part `part` of the 32 values of a block of 8 bits.
    unsafe fn of_8(w: *const i8, part: usize) -> Self;
    /// Part `part` of the 32 values of a block of 4 bits.
    unsafe fn of_4(w: *const u8, part: usize) -> Self;
    /// Each word less a number.
    unsafe fn less(self, by: i16) -> Self;
    /// Pairs of words as the bits of floats, and back.
    unsafe fn to_bits(self) -> Self::Floats;
    unsafe fn from_bits(bits: Self::Floats) -> Self;
}

/// Words in registers of 256 bits: with `$features`, `$add_products(sums, a, b)`.
macro_rules! words_of_256_bits {
    ($(#[$meta:meta])* $name:ident, $rows:literal, $features:literal, $add_products:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub(super) struct $name(__m256i);

        impl Words for $name {
            type Floats = __m256;
            const ROWS: usize = $rows;

            compiled_for!(run, $features);
            #[inline(always)]
            unsafe fn zeros() -> Self {
                unsafe { Self(_mm256_setzero_si256()) }
            }
            #[inline(always)]
            unsafe fn splat(pair: i32) -> Self {
                unsafe { Self(_mm256_set1_epi32(pair)) }
            }
            #[inline(always)]
            unsafe fn add_products(self, a: Self, b: Self) -> Self {
                unsafe { Self($add_products(self.0, a.0, b.0)) }
            }
            #[inline(always)]
            unsafe fn floats(self) -> __m256 {
                unsafe { _mm256_cvtepi32_ps(self.0) }
            }
            #[inline(always)]
            unsafe fn of_8(w: *const i8, part: usize) -> Self {
                unsafe { Self(_mm256_cvtepi8_epi16(_mm_loadu_si128(w.add(16 * part).cast()))) }
            }
            #[inline(always)]
            unsafe fn of_4(w: *const u8, part: usize) -> Self {
                unsafe {
                    let both = _mm256_cvtepu8_epi16(_mm_loadu_si128(w.cast()));
                    let value = if part == 0 { both } else { _mm256_srli_epi16::<4>(both) };
                    Self(_mm256_and_si256(value, _mm256_set1_epi16(15)))
                }
            }
            #[inline(always)]
            unsafe fn less(self, by: i16) -> Self {
                unsafe { Self(_mm256_sub_epi16(self.0, _mm256_set1_epi16(by))) }
            }
            #[inline(always)]
            unsafe fn to_bits(self) -> __m256 {
                unsafe { _mm256_castsi256_ps(self.0) }
            }
            #[inline(always)]
            unsafe fn from_bits(bits: __m256) -> Self {
                unsafe { Self(_mm256_castps_si256(bits)) }
            }
        }
    };
}

#[inline(always)]
unsafe fn multiply_then_add(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)) }
}

words_of_256_bits!(
    /// AVX2.
    Avx2,
    3,
    "avx2,fma,f16c",
    multiply_then_add
);
words_of_256_bits!(
    /// AVX-VNNI, which multiplies and adds in one instruction: Intel's since Alder Lake, AMD's since Zen 5.
    AvxVnni,
    6,
    "avx2,fma,f16c,avxvnni",
    multiply_add_256
);

// The compiler makes two instructions of the intrinsics for these.

#[inline]
#[target_feature(enable = "avxvnni")]
fn multiply_add_256(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: it changes a register.
    unsafe {
        asm!("{{vex}} vpdpwssd {}, {}, {}", inout(ymm_reg) sums, in(ymm_reg) a, in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_add_512(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: it changes a register.
    unsafe {
        asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sums, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// AVX512-VNNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni(__m512i);

impl Words for Avx512Vnni {
    type Floats = __m512;
    const ROWS: usize = 8;

    compiled_for!(run, "avx512f,avx512bw,avx512vl,avx512vnni");
    #[inline(always)]
    unsafe fn zeros() -> Self {
        unsafe { Self(_mm512_setzero_si512()) }
    }
    #[inline(always)]
    unsafe fn splat(pair: i32) -> Self {
        unsafe { Self(_mm512_set1_epi32(pair)) }
    }
    #[inline(always)]
    unsafe fn add_products(self, a: Self, b: Self) -> Self {
        unsafe { Self(multiply_add_512(self.0, a.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn floats(self) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn of_8(w: *const i8, _: usize) -> Self {
        unsafe { Self(_mm512_cvtepi8_epi16(_mm256_loadu_si256(w.cast()))) }
    }
    #[inline(always)]
    unsafe fn of_4(w: *const u8, _: usize) -> Self {
        unsafe {
            let w = _mm_loadu_si128(w.cast());
            let both = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_srli_epi16::<4>(w), w));
            Self(_mm512_and_si512(both, _mm512_set1_epi16(15)))
        }
    }
    #[inline(always)]
    unsafe fn less(self, by: i16) -> Self {
        unsafe { Self(_mm512_sub_epi16(self.0, _mm512_set1_epi16(by))) }
    }
    #[inline(always)]
    unsafe fn to_bits(self) -> __m512 {
        unsafe { _mm512_castsi512_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn from_bits(bits: __m512) -> Self {
        unsafe { Self(_mm512_castps_si512(bits)) }
    }
}
