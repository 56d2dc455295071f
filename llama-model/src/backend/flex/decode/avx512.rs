//! Dots with weights in floats by AVX-512: the compiler widens short numbers half a register at a time.

use std::arch::x86_64::*;

use super::super::stored::avx512::Widen;

/// Sums at a time, so that none waits for the one before.
const SUMS: usize = 4;
/// Bytes between what is read and what is asked for. Rows are read one after the other, a single stream: several at a time
/// were half as fast where rows are short.
pub(super) const AHEAD: usize = 8192;

/// `out[i] = Σ x · w[i]`
///
/// # Safety
/// `w` must have a row as long as `x` for each result; the CPU must have AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn dots<T: Widen>(out: &mut [f32], x: &[f32], w: &[T]) {
    for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        let (x_blocks, x_rest) = x.as_chunks::<{ 16 * SUMS }>();
        let (w_blocks, w_rest) = w.as_chunks::<{ 16 * SUMS }>();
        for (x, w) in x_blocks.iter().zip(w_blocks) {
            // SAFETY: 16 elements follow each place; fetching reads nothing.
            unsafe {
                for (i, sum) in sums.iter_mut().enumerate() {
                    fetch_ahead(w.as_ptr().add(16 * i), AHEAD);
                    let x = _mm512_loadu_ps(x.as_ptr().add(16 * i));
                    *sum = _mm512_fmadd_ps(x, T::widen(w.as_ptr().add(16 * i)), *sum);
                }
            }
        }
        let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w.value()).sum();
        *out = total(sums) + rest;
    }
}

/// Asks for what will be read soon, so many bytes further on: rows follow one another, so it may belong to the next.
#[inline(always)]
unsafe fn fetch_ahead<T>(ptr: *const T, bytes: usize) {
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast::<i8>().wrapping_add(bytes)) }
}

#[target_feature(enable = "avx512f")]
fn total(sums: [__m512; SUMS]) -> f32 {
    let [a, b, c, d] = sums;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
}
