//! Register kernels for AVX-512, in f32 and with operands rounded to bf16: 14 x 32 sums in registers.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::Matrix;
use super::blocks::{Kernel, Span, Target};

/// Rows of the register target.
const MR: usize = 14;
/// Columns of the register tile, two vectors.
const NR: usize = 32;
/// Rows of a packed block: 1 MB with all its terms.
const MC: usize = 36 * MR;
/// Steps that panels are fetched ahead of their use.
const AHEAD: usize = 16;

/// Rows that are fetched ahead of packing them: the hardware does not see where a short stretch of the next row begins.
pub(super) const ROWS_AHEAD: isize = 8;

/// How packed panels hold their operands: 4-byte lanes of one f32 or of two bf16, and what the kernel does with them.
pub(super) trait Format {
    /// Terms of the sum in a lane.
    const TERMS: usize;
    /// Lanes of `16 · TERMS` terms that are neighbours in memory, the first `count` of which exist.
    unsafe fn along(src: *const f32, count: usize) -> __m512;
    /// The lane of 16 neighbouring columns, where `mask` has them, from `count` terms that are `stride` apart.
    unsafe fn across(src: *const f32, stride: isize, mask: __mmask16, count: usize) -> __m512;
    /// `sum + a · b`
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512;
}

pub(super) fn mask(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// f32 as it is.
pub(super) struct Single;

impl Format for Single {
    const TERMS: usize = 1;
    #[inline(always)]
    unsafe fn along(src: *const f32, count: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask(count), src) }
    }
    #[inline(always)]
    unsafe fn across(src: *const f32, _: isize, mask: __mmask16, _: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask, src) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

/// bf16 values held as f32: exact products, at the speed of f32.
pub(super) struct Rounded;

impl Format for Rounded {
    const TERMS: usize = 1;
    #[inline(always)]
    unsafe fn along(src: *const f32, count: usize) -> __m512 {
        unsafe { round(Single::along(src, count)) }
    }
    #[inline(always)]
    unsafe fn across(src: *const f32, stride: isize, mask: __mmask16, count: usize) -> __m512 {
        unsafe { round(Single::across(src, stride, mask, count)) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

/// To the nearest bf16, ties to even, NaN to NaN.
#[inline(always)]
unsafe fn round(x: __m512) -> __m512 {
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let rounded = _mm512_mask_mov_epi32(up, nan, quiet);
        _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
    }
}

/// Pairs of bf16 for the hardware's dot product. It takes subnormal numbers for zero.
pub(super) struct Pairs;

impl Format for Pairs {
    const TERMS: usize = 2;
    #[inline(always)]
    unsafe fn along(src: *const f32, count: usize) -> __m512 {
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask(count), src);
            let high = _mm512_maskz_loadu_ps(mask(count.saturating_sub(16)), src.wrapping_add(16));
            std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
        }
    }
    #[inline(always)]
    unsafe fn across(src: *const f32, stride: isize, mask: __mmask16, count: usize) -> __m512 {
        unsafe {
            let first = to_bf16(_mm512_maskz_loadu_ps(mask, src));
            let mask = if count > 1 { mask } else { 0 };
            let second = to_bf16(_mm512_maskz_loadu_ps(mask, src.wrapping_offset(stride)));
            _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32::<16>(second)))
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        let pairs = |x| unsafe { std::mem::transmute::<__m512, __m512bh>(x) };
        unsafe { _mm512_dpbf16_ps(sum, pairs(a), pairs(b)) }
    }
}

/// The bf16 nearest to each number, in the low half of its lane.
#[inline(always)]
pub(super) unsafe fn to_bf16(x: __m512) -> __m512i {
    unsafe { _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
}

/// Columns become rows.
#[inline(always)]
pub(super) unsafe fn transpose(x: [__m512; 16]) -> [__m512; 16] {
    unsafe {
        let low = |a, b| _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        let high = |a, b| _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        let (mut pairs, mut quads, mut out) = (x, x, x);
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
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

/// Packs rows of `x` in panels of `W`: for each lane's worth of terms, `W` lanes, one for each row, those of rows that do
/// not exist zero.
///
/// # Safety
/// The rows and terms must be inside the matrix, the panels have room, and the CPU have the instructions.
#[inline(always)]
pub(super) unsafe fn pack<F: Format, const W: usize>(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
    let steps = terms.1.div_ceil(F::TERMS);
    let panel = |first: usize| panels.wrapping_add(first * steps);
    let firsts = || (0..rows.1).step_by(W);
    unsafe {
        if x.row_stride == 1 {
            // Rows are neighbours in memory, so all of them are read for a step before the next.
            for step in 0..steps {
                let term = step * F::TERMS;
                let src = x.at(rows.0, terms.0 + term);
                for first in firsts() {
                    let lanes = panel(first).wrapping_add(step * W);
                    for i in (0..W).step_by(16) {
                        let have = mask(rows.1.saturating_sub(first + i));
                        let from = src.wrapping_add(first + i);
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_offset(ROWS_AHEAD * x.col_stride).cast());
                        let values = F::across(from, x.col_stride, have, terms.1 - term);
                        _mm512_mask_storeu_ps(lanes.add(i), mask(W - i), values);
                    }
                }
            }
        } else if x.col_stride == 1 {
            for first in firsts() {
                let width = W.min(rows.1 - first);
                for step in (0..steps).step_by(16) {
                    let term = step * F::TERMS;
                    for i in (0..W).step_by(16) {
                        let mut values = [_mm512_setzero_ps(); 16];
                        for (r, values) in values.iter_mut().enumerate() {
                            if i + r < width {
                                let src = x.at(rows.0 + first + i + r, terms.0 + term);
                                *values = F::along(src, terms.1 - term);
                                _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(32 * F::TERMS).cast());
                            }
                        }
                        for (s, values) in transpose(values).into_iter().enumerate() {
                            if step + s < steps {
                                let lanes = panel(first).add((step + s) * W + i);
                                _mm512_mask_storeu_ps(lanes, mask(W - i), values);
                            }
                        }
                    }
                }
            }
        } else {
            // No view of a tensor that is a matrix gets here with strides of its own in both directions often.
            for first in firsts() {
                for (step, i) in (0..steps).flat_map(|step| (0..W).map(move |i| (step, i))) {
                    let mut values = [0.0f32; 16];
                    for (t, value) in values.iter_mut().enumerate().take(F::TERMS.min(terms.1 - step * F::TERMS)) {
                        if first + i < rows.1 {
                            *value = *x.at(rows.0 + first + i, terms.0 + step * F::TERMS + t);
                        }
                    }
                    _mm512_mask_storeu_ps(panel(first).add(step * W + i), 1, F::along(values.as_ptr(), F::TERMS));
                }
            }
        }
    }
}

type Body = unsafe fn(usize, *const f32, *const f32, Target);

/// `R` rows and `V` vectors of columns of the result, over `steps` lanes of both panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    target: Target,
) {
    unsafe { kernel::<F, R, V>(steps, a, b, target) }
}

#[target_feature(enable = "avx512f")]
unsafe fn plain_kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    target: Target,
) {
    unsafe { kernel::<F, R, V>(steps, a, b, target) }
}

#[inline(always)]
unsafe fn kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    mut a: *const f32,
    mut b: *const f32,
    target: Target,
) {
    unsafe {
        let row = |i: usize| target.out.wrapping_offset(i as isize * target.row_stride);
        for i in 0..R {
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(row(i).wrapping_add(16 * v).cast());
            }
        }
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for _ in 0..steps {
            _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(AHEAD * MR).cast());
            let mut columns = [_mm512_setzero_ps(); V];
            for (v, columns) in columns.iter_mut().enumerate() {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD / 2 * NR + 16 * v).cast());
                *columns = _mm512_loadu_ps(b.add(16 * v));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let row = _mm512_set1_ps(*a.add(i));
                for (sum, columns) in sums.iter_mut().zip(columns) {
                    *sum = F::multiply_add(row, columns, *sum);
                }
            }
            a = a.add(MR);
            b = b.add(NR);
        }
        let factor = _mm512_set1_ps(target.factor);
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let (out, mask) = (row(i).wrapping_add(16 * v), mask(target.cols.saturating_sub(16 * v)));
                let result = if target.add {
                    _mm512_fmadd_ps(*sum, factor, _mm512_maskz_loadu_ps(mask, out))
                } else {
                    _mm512_mul_ps(*sum, factor)
                };
                _mm512_mask_storeu_ps(out, mask, result);
            }
        }
    }
}

/// The kernels of a format by vectors of columns and by rows, so that no register is spent on rows that do not exist.
struct Kernels<F>(PhantomData<F>);

macro_rules! kernels {
    ($name:ident: $($rows:literal)*) => {
        [[$($name::<F, $rows, 1> as Body),*], [$($name::<F, $rows, 2> as Body),*]]
    };
}

impl<F: Format> Kernels<F> {
    const PLAIN: [[Body; MR]; 2] = kernels!(plain_kernel: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    const DOT: [[Body; MR]; 2] = kernels!(dot_kernel: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    const TABLE: &[[Body; MR]; 2] = if F::TERMS == 2 { &Self::DOT } else { &Self::PLAIN };
}

/// Whether the CPU has a bf16 dot product.
pub(super) fn has_dot() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// Whether the CPU's bf16 dot product is worth its while. AMD's (from Zen 4) has twice the rate of f32; Intel's, outside
/// its matrix unit, half of it.
pub(super) fn fast_dot() -> bool {
    // The vendor's name begins in `ebx`.
    has_dot() && __cpuid(0).ebx == u32::from_le_bytes(*b"Auth")
}

impl<F: Format> Kernel for F {
    const ROWS: usize = MR;
    const COLS: usize = NR;
    const TERMS: usize = F::TERMS;
    const BLOCK: usize = MC;

    fn lanes(terms: usize) -> usize {
        terms.div_ceil(F::TERMS)
    }

    unsafe fn pack_a(panels: *mut f32, a: Matrix, rows: Span, terms: Span) {
        unsafe { pack_for::<F, MR>(panels, a, rows, terms) }
    }

    unsafe fn pack_b(strips: *mut f32, b: Matrix, cols: Span, terms: Span) {
        unsafe { pack_for::<F, NR>(strips, b, cols, terms) }
    }

    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target) {
        let steps = Self::lanes(terms);
        for i in (0..target.rows).step_by(MR) {
            let rows = MR.min(target.rows - i);
            let out = target.out.wrapping_offset(i as isize * target.row_stride);
            let body = Kernels::<F>::TABLE[usize::from(target.cols > 16)][rows - 1];
            // SAFETY: the caller's promise.
            unsafe { body(steps, panels.add(i * steps), strip, Target { out, rows, ..target }) };
        }
    }
}

/// [`pack`] compiled for the format's instructions.
unsafe fn pack_for<F: Format, const W: usize>(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
    #[target_feature(enable = "avx512f")]
    unsafe fn plain<F: Format, const W: usize>(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
        unsafe { pack::<F, W>(panels, x, rows, terms) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn dot<F: Format, const W: usize>(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
        unsafe { pack::<F, W>(panels, x, rows, terms) }
    }
    // SAFETY: the caller's promise.
    unsafe { if F::TERMS == 2 { dot::<F, W>(panels, x, rows, terms) } else { plain::<F, W>(panels, x, rows, terms) } }
}
