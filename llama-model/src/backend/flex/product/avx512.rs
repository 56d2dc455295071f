//! Matrix products for AVX-512, in f32 and with operands rounded to bf16.
//!
//! The usual three levels (Goto and van de Geijn, 2008): a task owns a block of the result; it packs a block of `a` for
//! the second-level cache, then, strip by strip, 32 columns of `b`, and runs over both with a kernel that holds 14 x 32
//! sums in registers. Tasks share nothing, so they need no barrier, and how they are cut depends on shapes and the number
//! of threads but never changes the order of a sum.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::marker::PhantomData;

use rayon::prelude::*;

use super::{Matrix, Output, Product};

/// Rows of the register tile.
const MR: usize = 14;
/// Columns of the register tile, two vectors.
const NR: usize = 32;
/// Rows of a task's block, at most: with [`KC`] a packed block of 1 MB.
const MC: usize = 36 * MR;
/// Columns of a task's block, at most.
const NC: usize = 1024;
/// Terms of a sum that are packed at a time.
const KC: usize = 512;
/// Steps that panels are fetched ahead of their use.
const AHEAD: usize = 16;

/// How packed panels hold their operands: 4-byte lanes of one f32 or of two bf16, and what the kernel does with them.
trait Format {
    /// Terms of the sum in a lane.
    const TERMS: usize;
    /// Lanes of `16 · TERMS` terms that are neighbours in memory, the first `count` of which exist.
    unsafe fn along(src: *const f32, count: usize) -> __m512;
    /// The lane of 16 neighbouring columns, where `mask` has them, from `count` terms that are `stride` apart.
    unsafe fn across(src: *const f32, stride: isize, mask: __mmask16, count: usize) -> __m512;
    /// `sum + a · b`
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512;
}

fn mask(count: usize) -> __mmask16 {
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
            let bf16 = |x| _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
            let first = bf16(_mm512_maskz_loadu_ps(mask, src));
            let mask = if count > 1 { mask } else { 0 };
            let second = bf16(_mm512_maskz_loadu_ps(mask, src.wrapping_offset(stride)));
            _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32::<16>(second)))
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        let pairs = |x| unsafe { std::mem::transmute::<__m512, __m512bh>(x) };
        unsafe { _mm512_dpbf16_ps(sum, pairs(a), pairs(b)) }
    }
}

/// Columns become rows.
#[inline(always)]
unsafe fn transpose(x: [__m512; 16]) -> [__m512; 16] {
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

/// Packs `width` rows of `x` from column `terms.0` to `terms.1` as a panel: for each lane's worth of terms, `W` lanes, one
/// for each row, those past `width` zero.
///
/// # Safety
/// The rows and columns must be inside the matrix, the panel have room, and the CPU have the instructions.
#[inline(always)]
unsafe fn pack<F: Format, const W: usize>(panel: *mut f32, x: Matrix, row: usize, width: usize, terms: (usize, usize)) {
    let count = terms.1 - terms.0;
    let steps = count.div_ceil(F::TERMS);
    unsafe {
        if x.row_stride == 1 {
            for step in 0..steps {
                let term = step * F::TERMS;
                let src = x.at(row, terms.0 + term);
                for i in (0..W).step_by(16) {
                    let have = mask(width.saturating_sub(i));
                    let lanes = F::across(src.wrapping_add(i), x.col_stride, have, count - term);
                    _mm512_mask_storeu_ps(panel.add(step * W + i), mask(W - i), lanes);
                }
            }
        } else if x.col_stride == 1 {
            for step in (0..steps).step_by(16) {
                let term = step * F::TERMS;
                for i in (0..W).step_by(16) {
                    let mut rows = [_mm512_setzero_ps(); 16];
                    for (r, lanes) in rows.iter_mut().enumerate() {
                        if i + r < width {
                            let src = x.at(row + i + r, terms.0 + term);
                            *lanes = F::along(src, count - term);
                            _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(32 * F::TERMS).cast());
                        }
                    }
                    for (s, lanes) in transpose(rows).into_iter().enumerate() {
                        if step + s < steps {
                            _mm512_mask_storeu_ps(panel.add((step + s) * W + i), mask(W - i), lanes);
                        }
                    }
                }
            }
        } else {
            // No view of a tensor that is a matrix gets here with strides of its own in both directions often.
            for step in 0..steps {
                for i in 0..W {
                    let mut pair = [0.0f32; 16];
                    for (t, value) in pair.iter_mut().enumerate().take(F::TERMS.min(count - step * F::TERMS)) {
                        if i < width {
                            *value = *x.at(row + i, terms.0 + step * F::TERMS + t);
                        }
                    }
                    _mm512_mask_storeu_ps(panel.add(step * W + i), 1, F::along(pair.as_ptr(), F::TERMS));
                }
            }
        }
    }
}

/// Where a kernel's sums go.
#[derive(Clone, Copy)]
struct Tile {
    out: *mut f32,
    row_stride: isize,
    cols: usize,
    factor: f32,
    add: bool,
}

type Kernel = unsafe fn(usize, *const f32, *const f32, Tile);

/// `R` rows and `V` vectors of columns of the result, over `steps` lanes of both panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    tile: Tile,
) {
    unsafe { kernel::<F, R, V>(steps, a, b, tile) }
}

#[target_feature(enable = "avx512f")]
unsafe fn plain_kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    tile: Tile,
) {
    unsafe { kernel::<F, R, V>(steps, a, b, tile) }
}

#[inline(always)]
unsafe fn kernel<F: Format, const R: usize, const V: usize>(
    steps: usize,
    mut a: *const f32,
    mut b: *const f32,
    tile: Tile,
) {
    unsafe {
        let row = |i: usize| tile.out.wrapping_offset(i as isize * tile.row_stride);
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
        let factor = _mm512_set1_ps(tile.factor);
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let (out, mask) = (row(i).wrapping_add(16 * v), mask(tile.cols.saturating_sub(16 * v)));
                let result = if tile.add {
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
        [[$($name::<F, $rows, 1> as Kernel),*], [$($name::<F, $rows, 2> as Kernel),*]]
    };
}

impl<F: Format> Kernels<F> {
    const PLAIN: [[Kernel; MR]; 2] = kernels!(plain_kernel: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    const DOT: [[Kernel; MR]; 2] = kernels!(dot_kernel: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    const TABLE: &[[Kernel; MR]; 2] = if F::TERMS == 2 { &Self::DOT } else { &Self::PLAIN };
}

#[target_feature(enable = "avx512f")]
unsafe fn plain_block<F: Format>(block: &Block, packed: *mut f32) {
    unsafe { block.compute::<F>(packed) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_block<F: Format>(block: &Block, packed: *mut f32) {
    unsafe { block.compute::<F>(packed) }
}

/// A task: rows `row..row + rows` and columns `col..col + cols` of the result.
struct Block {
    product: Product,
    out: Output,
    out_row_stride: isize,
    a: Matrix,
    b: Matrix,
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
    terms: usize,
}

impl Block {
    #[inline(always)]
    unsafe fn compute<F: Format>(&self, packed_a: *mut f32) {
        let packed_b = packed_a.wrapping_add(MC * KC);
        let columns = self.b.transposed();
        for start in (0..self.a.cols).step_by(self.terms) {
            let terms = (start, self.a.cols.min(start + self.terms));
            let steps = (terms.1 - terms.0).div_ceil(F::TERMS);
            for i in (0..self.rows).step_by(MR) {
                // SAFETY: rows and terms are inside `a`, the buffer holds MC · KC terms.
                unsafe {
                    pack::<F, MR>(packed_a.add(i * steps), self.a, self.row + i, MR.min(self.rows - i), terms);
                }
            }
            for j in (0..self.cols).step_by(NR) {
                let cols = NR.min(self.cols - j);
                // SAFETY: columns and terms are inside `b`.
                unsafe { pack::<F, NR>(packed_b, columns, self.col + j, cols, terms) };
                for i in (0..self.rows).step_by(MR) {
                    let tile = Tile {
                        out: self.out.at(self.row + i, self.out_row_stride, self.col + j),
                        row_stride: self.out_row_stride,
                        cols,
                        factor: self.product.factor,
                        add: self.product.add || start > 0,
                    };
                    let kernel = Kernels::<F>::TABLE[usize::from(cols > 16)][MR.min(self.rows - i) - 1];
                    // SAFETY: both panels were just packed; the tile is this task's own.
                    unsafe { kernel(steps, packed_a.add(i * steps), packed_b, tile) };
                }
            }
        }
    }
}

thread_local! {
    /// A thread's packed block and strip.
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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

/// [`multiply`](super::multiply) in a format.
///
/// # Safety
/// As there; the CPU must have the format's instructions.
#[allow(private_bounds)]
pub(super) unsafe fn multiply<F: Format>(out: Output, out_row_stride: isize, a: Matrix, b: Matrix, product: Product) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let threads = if product.threads { rayon::current_num_threads() } else { 1 };
    let even = |len: usize, blocks: usize, unit: usize| len.div_ceil(blocks).next_multiple_of(unit);
    let nc = even(n, n.div_ceil(NC), NR);
    let col_blocks = n.div_ceil(nc);
    // Two tasks or more for each thread where there are rows enough, and a number that threads share evenly.
    let wanted = if threads > 1 { (2 * threads).div_ceil(col_blocks).min(m.div_ceil(4 * MR)) } else { 1 };
    let mut row_blocks = m.div_ceil(MC).max(wanted);
    if !col_blocks.is_multiple_of(threads) {
        row_blocks = row_blocks.next_multiple_of(threads);
    }
    let mc = even(m, row_blocks, MR);
    let row_blocks = m.div_ceil(mc);
    let terms = even(k, k.div_ceil(KC), F::TERMS);
    let task = |task: usize| {
        let (row, col) = (task % row_blocks * mc, task / row_blocks * nc);
        let (rows, cols) = (mc.min(m - row), nc.min(n - col));
        let block = Block { product, out, out_row_stride, a, b, row, rows, col, cols, terms };
        // Taken out, so that a nested call, which there is none, would only allocate.
        let mut buffer = PACKED.take();
        buffer.resize((MC + NR) * KC + 16, 0.0);
        let packed = buffer.as_mut_ptr();
        let packed = packed.wrapping_add(packed.align_offset(64));
        // SAFETY: the caller's promise; the buffer has room for both panels after its aligned start.
        unsafe { if F::TERMS == 2 { dot_block::<F>(&block, packed) } else { plain_block::<F>(&block, packed) } }
        PACKED.set(buffer);
    };
    if threads > 1 {
        (0..row_blocks * col_blocks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..row_blocks * col_blocks).for_each(task);
    }
}
