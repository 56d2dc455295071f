//! Products of few rows with a weight, as in decoding: limited by the memory that the weight is read from, so it is read
//! once, in order, in the form it is stored in, and shared out among threads by its rows.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_flex::FlexTensor;
use half::bf16;

use super::product::Output;
use super::simd::{LANES, tree_sum, vectorized};
use super::{Buffer, contiguous, team, values};
use crate::backend::QUANT_BLOCK;

/// Rows of the input up to which this beats the product of blocks.
pub(super) const ROWS: usize = 8;
/// Weights a task has, at least: below it the hand-over costs more than it saves.
const TASK: usize = 1 << 14;

/// The rows of a weight in one of the forms it can be stored in.
#[derive(Clone, Copy)]
enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// Values, and one scale for each [`QUANT_BLOCK`] of them.
    Q8(&'a [i8], &'a [f32]),
}

impl<'a> Stored<'a> {
    /// Weights there are.
    fn len(self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
            Self::Q8(w, _) => w.len(),
        }
    }

    /// Rows `start..end`, each of `width` elements.
    fn rows(self, start: usize, end: usize, width: usize) -> Self {
        let range = start * width..end * width;
        match self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::Bf16(w) => Self::Bf16(&w[range]),
            Self::Q8(w, scales) => {
                let blocks = width / QUANT_BLOCK;
                Self::Q8(&w[range], &scales[start * blocks..end * blocks])
            }
        }
    }
}

/// Whether [`project`] takes this product.
pub(super) fn takes(x: &FlexTensor, weight: &FlexTensor) -> bool {
    let [rows, _] = x.shape().dims();
    rows <= ROWS && x.dtype() == DType::F32 && matches!(weight.dtype(), DType::F32 | DType::BF16)
}

/// Whether [`project_q8`] takes this product.
pub(super) fn takes_q8(x: &FlexTensor, values: &FlexTensor, scales: &FlexTensor) -> bool {
    let [rows, _] = x.shape().dims();
    let f32s = [x, scales].iter().all(|tensor| tensor.dtype() == DType::F32);
    rows <= ROWS && f32s && values.dtype() == DType::I8
}

/// `x · weightᵀ` for weights in f32 or bf16, in one go: sharing out work to threads costs as much as a small product.
pub(super) fn project(x: FlexTensor, weights: Vec<FlexTensor>) -> Vec<FlexTensor> {
    let (x, weights) = (contiguous(x), weights.into_iter().map(whole).collect::<Vec<_>>());
    let stored = weights.iter().map(|weight| match weight.dtype() {
        DType::BF16 => Stored::Bf16(weight.storage::<bf16>()),
        _ => Stored::F32(weight.storage::<f32>()),
    });
    multiply(&x, &stored.collect::<Vec<_>>())
}

/// `x · weightᵀ` for 8-bit weights in blocks of [`QUANT_BLOCK`] along their rows.
pub(super) fn project_q8(x: FlexTensor, weights: Vec<(FlexTensor, FlexTensor)>) -> Vec<FlexTensor> {
    let x = contiguous(x);
    let weights: Vec<_> = weights.into_iter().map(|(weight, scales)| (whole(weight), contiguous(scales))).collect();
    multiply(
        &x,
        &weights.iter().map(|(weight, scales)| Stored::Q8(weight.storage::<i8>(), values(scales))).collect::<Vec<_>>(),
    )
}

/// As `contiguous`, for any dtype.
fn whole(x: FlexTensor) -> FlexTensor {
    let len = x.layout().num_elements() * x.dtype().size();
    if x.is_contiguous() && x.layout().start_offset() == 0 && x.bytes().len() == len { x } else { x.to_contiguous() }
}

/// The products of `x` with all weights. Threads share the rows of all of them.
fn multiply(x: &FlexTensor, weights: &[Stored]) -> Vec<FlexTensor> {
    let [rows, d_in] = x.shape().dims();
    let xs = values(x);
    let widths: Vec<usize> = weights.iter().map(|weight| weight.len() / d_in).collect();
    let mut outs: Vec<Buffer> = widths.iter().map(|d_out| Buffer::zeros(rows * d_out)).collect();
    let targets: Vec<Output> = outs.iter_mut().map(|out| Output(out.as_mut_ptr())).collect();
    let total: usize = widths.iter().sum();
    let tasks = (total * d_in / TASK).clamp(1, 4 * rayon::current_num_threads());
    let task = |task: usize| {
        let (start, end) = (task * total / tasks, (task + 1) * total / tasks);
        let mut first = 0;
        for ((weight, d_out), target) in weights.iter().zip(&widths).zip(&targets) {
            // The part of this weight that is the task's.
            let (from, to) = (start.max(first) - first, end.clamp(first, first + d_out) - first);
            if from < to {
                // SAFETY: every task has columns of its own, inside the weight's result.
                unsafe { dots(*target, *d_out, from, xs, d_in, weight.rows(from, to, d_in)) };
            }
            first += d_out;
        }
    };
    team::for_each(tasks, task);
    outs.into_iter().zip(widths).map(|(out, d_out)| out.into_tensor(Shape::new([rows, d_out]))).collect()
}

/// Fills the columns from `start` on.
///
/// # Safety
/// The columns must be inside `out`, which has rows of `stride`, and nobody else's.
unsafe fn dots(out: Output, stride: usize, start: usize, xs: &[f32], d_in: usize, weight: Stored) {
    for (row, x) in xs.chunks_exact(d_in).enumerate() {
        let len = weight.len() / d_in;
        // SAFETY: the caller's promise.
        let out = unsafe { std::slice::from_raw_parts_mut(out.0.add(row * stride + start), len) };
        #[cfg(target_arch = "x86_64")]
        if super::simd::has_avx512() {
            // SAFETY: the CPU was asked; every slice has `len` rows.
            unsafe {
                match weight {
                    Stored::F32(w) => avx512::dots(out, x, w),
                    Stored::Bf16(w) => avx512::dots(out, x, w),
                    Stored::Q8(w, scales) => avx512::q8_dots(out, x, w, scales),
                }
            }
            continue;
        }
        match weight {
            Stored::F32(w) => f32_dots(out, x, w),
            Stored::Bf16(w) => bf16_dots(out, x, w),
            Stored::Q8(w, scales) => q8_dots(out, x, w, scales),
        }
    }
}

/// `Σ x[i] · value(w[i])` in [`LANES`] partial sums.
#[inline(always)]
fn dot<T: Copy>(x: &[f32], w: &[T], value: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (w_blocks, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in x_blocks.iter().zip(w_blocks) {
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(value(w[lane]), lanes[lane]);
        }
    }
    let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * value(*w)).sum();
    tree_sum(lanes) + rest
}

vectorized! {
    fn f32_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [f32]) -> () {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
            *out = dot(x, w, |w| w);
        }
    }
}

vectorized! {
    fn bf16_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [bf16]) -> () {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
            *out = dot(x, w, |w| f32::from_bits(u32::from(w.to_bits()) << 16));
        }
    }
}

vectorized! {
    fn q8_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [i8], scales: &'a [f32]) -> () {
        let rows = w.chunks_exact(x.len()).zip(scales.chunks_exact(x.len() / QUANT_BLOCK));
        for (out, (w, scales)) in out.iter_mut().zip(rows) {
            let mut lanes = [0.0f32; QUANT_BLOCK];
            let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(w.as_chunks::<QUANT_BLOCK>().0).zip(scales);
            for ((x, w), scale) in blocks {
                for lane in 0..QUANT_BLOCK {
                    lanes[lane] = (x[lane] * scale).mul_add(f32::from(w[lane]), lanes[lane]);
                }
            }
            *out = tree_sum(lanes);
        }
    }
}

/// The same by hand: the compiler widens short integers half a register at a time.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::QUANT_BLOCK;

    /// Sums at a time, so that none waits for the one before.
    const SUMS: usize = 4;
    /// Bytes between what is read and what is asked for. Rows are read one after the other, a single stream: several at
    /// a time were half as fast where rows are short.
    const AHEAD: usize = 4096;

    /// A stored value that 16 of are widened at a time.
    pub trait Widen: Copy {
        /// # Safety
        /// 16 values must follow `ptr`; the CPU must have AVX-512.
        unsafe fn widen(ptr: *const Self) -> __m512;
        fn value(self) -> f32;
    }

    impl Widen for f32 {
        #[inline(always)]
        unsafe fn widen(ptr: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(ptr) }
        }
        fn value(self) -> f32 {
            self
        }
    }

    impl Widen for bf16 {
        #[inline(always)]
        unsafe fn widen(ptr: *const bf16) -> __m512 {
            unsafe {
                let short = _mm512_cvtepu16_epi32(_mm256_loadu_si256(ptr.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(short))
            }
        }
        fn value(self) -> f32 {
            self.to_f32()
        }
    }

    /// # Safety
    /// `w` must have a row as long as `x` for each result; the CPU must have AVX-512.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn dots<T: Widen>(out: &mut [f32], x: &[f32], w: &[T]) {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(x.len())) {
            let mut sums = [_mm512_setzero_ps(); SUMS];
            let (x_blocks, x_rest) = x.as_chunks::<{ 16 * SUMS }>();
            let (w_blocks, w_rest) = w.as_chunks::<{ 16 * SUMS }>();
            for (x, w) in x_blocks.iter().zip(w_blocks) {
                // SAFETY: 16 elements follow each place; fetching reads nothing.
                unsafe {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        fetch_ahead(w.as_ptr().add(16 * i));
                        *sum = _mm512_fmadd_ps(
                            _mm512_loadu_ps(x.as_ptr().add(16 * i)),
                            T::widen(w.as_ptr().add(16 * i)),
                            *sum,
                        );
                    }
                }
            }
            let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w.value()).sum();
            *out = total(sums) + rest;
        }
    }

    /// # Safety
    /// As [`dots`]; rows are whole blocks, with a scale each.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn q8_dots(out: &mut [f32], x: &[f32], w: &[i8], scales: &[f32]) {
        let rows = w.chunks_exact(x.len()).zip(scales.chunks_exact(x.len() / QUANT_BLOCK));
        for (out, (w, scales)) in out.iter_mut().zip(rows) {
            let mut sums = [_mm512_setzero_ps(); SUMS];
            let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(w.as_chunks::<QUANT_BLOCK>().0).zip(scales);
            for (i, ((x, w), scale)) in blocks.enumerate() {
                // SAFETY: two halves of 16 follow each pointer; fetching reads nothing.
                unsafe {
                    fetch_ahead(w.as_ptr());
                    let widen = |half: usize| {
                        let bytes = _mm_loadu_si128(w.as_ptr().add(half).cast());
                        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
                    };
                    let low = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), widen(0));
                    let part = _mm512_fmadd_ps(_mm512_loadu_ps(x.as_ptr().add(16)), widen(16), low);
                    sums[i % SUMS] = _mm512_fmadd_ps(part, _mm512_set1_ps(*scale), sums[i % SUMS]);
                }
            }
            *out = total(sums);
        }
    }

    /// Asks for what will be read soon: rows follow one another, so it may belong to the next.
    #[inline(always)]
    unsafe fn fetch_ahead<T>(ptr: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast::<i8>().wrapping_add(AHEAD)) }
    }

    #[target_feature(enable = "avx512f")]
    fn total(sums: [__m512; SUMS]) -> f32 {
        let [a, b, c, d] = sums;
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form against sums in f64, for rows that do not divide evenly, with SIMD and without.
    #[test]
    fn dots_are_right_in_every_form() {
        let noise = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
        for (d_in, d_out) in [(32, 1), (64, 7), (96, 13)] {
            for tail in [0, 5] {
                let width = d_in + tail;
                let x: Vec<f32> = (0..width).map(noise).collect();
                let w: Vec<f32> = (0..width * d_out).map(|i| noise(i + 17)).collect();
                let short: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
                let bytes: Vec<i8> = w.iter().map(|w| (w * 127.0) as i8).collect();
                let scales: Vec<f32> = (0..width * d_out / QUANT_BLOCK).map(|i| 0.01 + noise(i).abs()).collect();
                let check = |name: &str, found: &[f32], value: &dyn Fn(usize) -> f32| {
                    for (row, found) in found.iter().enumerate() {
                        let sum: f64 = (0..width).map(|i| f64::from(x[i]) * f64::from(value(row * width + i))).sum();
                        assert!((sum - f64::from(*found)).abs() < 1e-3, "{name} {width}x{d_out}: {found} {sum}");
                    }
                };
                let mut out = vec![0.0; d_out];
                let target =
                    |out: &mut Vec<f32>, weight| unsafe { dots(Output(out.as_mut_ptr()), d_out, 0, &x, width, weight) };
                target(&mut out, Stored::F32(&w));
                check("f32", &out, &|i| w[i]);
                f32_dots(&mut out, &x, &w);
                check("f32, portable", &out, &|i| w[i]);
                target(&mut out, Stored::Bf16(&short));
                check("bf16", &out, &|i| short[i].to_f32());
                bf16_dots(&mut out, &x, &short);
                check("bf16, portable", &out, &|i| short[i].to_f32());
                if tail == 0 {
                    target(&mut out, Stored::Q8(&bytes, &scales));
                    check("q8", &out, &|i| f32::from(bytes[i]) * scales[i / QUANT_BLOCK]);
                    q8_dots(&mut out, &x, &bytes, &scales);
                    check("q8, portable", &out, &|i| f32::from(bytes[i]) * scales[i / QUANT_BLOCK]);
                }
            }
        }
    }
}
