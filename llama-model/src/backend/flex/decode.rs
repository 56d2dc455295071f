//! Products with weights as inference stores them. Those of few rows, as in decoding, are limited by the memory that the
//! weight is read from, so it is read once, in order, in the form it is stored in, and shared out among threads by its
//! rows. Many rows are multiplied by what the CPU is fastest at: bf16, where it has products of them, or whole numbers (`many`); or
//! threads widen a stretch of the weight at a time, as much as their cache holds.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod backward;
mod block;
mod floats;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
pub(super) mod rounded;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod whole;
#[cfg(target_arch = "x86_64")]
mod words;

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::float32x4_t as Own;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256 as Own, __m512 as Wide};
use std::cell::RefCell;

use burn::backend::Flex;
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_flex::FlexTensor;

pub(super) use self::backward::{input_gradient, input_gradients};
pub(super) use self::block::{block, takes as takes_block};
#[cfg(target_arch = "x86_64")]
use self::many::WordRows;
use self::portable::{q4_dots, q4_symmetric_dots, q8_dots};
use self::rounded::Rounded;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::product::TurnedRows;
use super::product::{self, Matrix, PRODUCT, Place, Product};
#[cfg(target_arch = "x86_64")]
use super::product::{Bf16Unit, PackedRows};
use super::simd;
use super::stored::{Stored, whole_blocks};
use super::vector::{Vector, by_vectors};
use super::{Buffer, Output, contiguous, stored, team, values, whole};
use crate::Precision;
use crate::backend::{Bits, QuantizedWeight};

/// Rows of the input up to which the product is one of dots.
const ROWS: usize = 8;
/// Rows from which the matrix unit is faster, if it takes the product. Below them a row has the same bits in any company, as speculation, which
/// reads a few guesses at a time, expects of a model.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const ROWS_OF_UNIT: usize = 8;
/// Weights a task has, at least: below it the hand-over costs more than it saves.
const TASK: usize = 1 << 14;
/// Weights that are widened at a time: a megabyte of floats.
const WIDENED: usize = 1 << 18;
/// Bytes between what is read of a weight and what is asked for, as a single stream: several rows at a time were half as fast where
/// rows are short.
const AHEAD: usize = 8192;
/// Rows of a weight that many rows are multiplied with together, in whatever way.
const PANEL: usize = 32;

/// Whether [`project`] takes this product.
pub(super) fn takes(x: &FlexTensor, weight: &FlexTensor) -> bool {
    let [rows, _] = x.shape().dims();
    let few = rows <= ROWS && weight.dtype() == DType::F32;
    x.dtype() == DType::F32 && (few || matches!(weight.dtype(), DType::BF16 | DType::F16))
}

/// Whether [`project_blocks`] takes this product.
pub(super) fn takes_blocks(x: &FlexTensor, weight: &QuantizedWeight<Flex>) -> bool {
    x.dtype() == DType::F32 && stored::reads(weight)
}

/// `x · weightᵀ` for weights in floats, in one go: sharing out work to threads costs as much as a small product.
pub(super) fn project(x: FlexTensor, weights: Vec<FlexTensor>, precision: Precision) -> Vec<FlexTensor> {
    let weights: Vec<_> = weights.into_iter().map(whole).collect();
    multiply(&contiguous(x), &weights.iter().map(Stored::floats).collect::<Vec<_>>(), precision)
}

/// `x · weightᵀ` for weights in blocks.
pub(super) fn project_blocks(
    x: FlexTensor,
    weights: Vec<QuantizedWeight<Flex>>,
    precision: Precision,
) -> Vec<FlexTensor> {
    let weights: Vec<_> = weights.into_iter().map(whole_blocks).collect();
    multiply(&contiguous(x), &weights.iter().map(Stored::blocks).collect::<Vec<_>>(), precision)
}

/// The products of `x` with all weights.
fn multiply(x: &FlexTensor, weights: &[Stored], precision: Precision) -> Vec<FlexTensor> {
    let [rows, d_in] = x.shape().dims();
    let widths: Vec<usize> = weights.iter().map(|weight| weight.len() / d_in).collect();
    // SAFETY: all of each is written.
    let mut outs: Vec<Buffer> = widths.iter().map(|d_out| unsafe { Buffer::unwritten(rows * d_out) }).collect();
    let mut targets: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut out[..]).collect();
    multiply_into(&mut targets, values(x), d_in, weights, precision);
    outs.into_iter().zip(widths).map(|(out, d_out)| out.into_tensor(Shape::new([rows, d_out]))).collect()
}

/// Writes the products of rows of `d_in` elements with all weights. Threads share the rows of all of them.
pub(super) fn multiply_into(
    outs: &mut [&mut [f32]],
    xs: &[f32],
    d_in: usize,
    weights: &[Stored],
    precision: Precision,
) {
    let rows = xs.len() / d_in;
    let widths: Vec<usize> = weights.iter().map(|weight| weight.len() / d_in).collect();
    for (out, d_out) in outs.iter().zip(&widths) {
        assert_eq!(out.len(), rows * d_out, "a product has another size than its result");
    }
    let targets: Vec<Output> = outs.iter_mut().map(|out| Output(out.as_mut_ptr())).collect();
    let input = Input::new(xs, d_in, weights, precision);
    let few = input.few;
    let panel = if few { 1 } else { PANEL };
    let total: usize = widths.iter().map(|d_out| d_out.div_ceil(panel)).sum();
    let tasks = if few {
        (total * d_in / TASK).clamp(1, 4 * team::threads())
    } else {
        // The same number for each thread.
        let tasks = (total * panel * d_in).div_ceil(WIDENED).clamp(1, total.max(1));
        tasks.next_multiple_of(team::threads())
    };
    let task = |task: usize| {
        let (start, end) = (task * total / tasks, (task + 1) * total / tasks);
        let mut first = 0;
        for ((weight, d_out), target) in weights.iter().zip(&widths).zip(&targets) {
            // The part of this weight that is the task's.
            let last = first + d_out.div_ceil(panel);
            let [from, to] = [start, end].map(|at| (panel * (at.clamp(first, last) - first)).min(*d_out));
            if from < to {
                let columns = Columns { out: *target, stride: *d_out, start: from };
                let weight = weight.rows(from, to, d_in);
                // SAFETY: every task has columns of its own, inside the weight's result.
                unsafe { if few { dots(columns, &input, weight) } else { products(columns, &input, weight) } };
            }
            first = last;
        }
    };
    team::for_each(tasks, task);
    if !input.rounded.is_empty() {
        SPARE.set(input.rounded);
    }
}

thread_local! {
    /// Memory of a product's rounded rows, for the next.
    static SPARE: RefCell<Vec<Rounded>> = const { RefCell::new(Vec::new()) };
}

/// The rows that are multiplied.
struct Input<'a> {
    xs: &'a [f32],
    d_in: usize,
    precision: Precision,
    /// Whether the product is one of dots.
    few: bool,
    /// Few rows in whole numbers, if weights are and the CPU multiplies them.
    rounded: Vec<Rounded>,
    /// Many rows as the CPU multiplies them faster than floats, if it does.
    #[cfg(target_arch = "x86_64")]
    many: Option<Many>,
}

impl<'a> Input<'a> {
    fn new(xs: &'a [f32], d_in: usize, weights: &[Stored], precision: Precision) -> Self {
        let rows = xs.len() / d_in;
        #[cfg(target_arch = "x86_64")]
        let unit = match precision {
            Precision::Bf16 if !weights.iter().any(|weight| matches!(weight, Stored::F32(_))) => Bf16Unit::fastest(),
            Precision::F32 if weights.iter().all(|weight| matches!(weight, Stored::Bf16(_))) => Bf16Unit::unrounded(),
            _ => None,
        }
        .filter(|_| d_in.is_multiple_of(crate::backend::QUANT_BLOCK));
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        let few = rows < if matches!(unit, Some(Bf16Unit::Matrix)) { ROWS_OF_UNIT } else { ROWS + 1 };
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        let few = rows <= ROWS;
        let bits = || weights.iter().filter_map(|weight| weight.bits());
        let blocks = bits().next().is_some();
        let mut rounded = Vec::new();
        if blocks && few && simd::has_vectors() {
            rounded = SPARE.take();
            rounded.resize_with(rows, Rounded::default);
            let group = if bits().any(|bits| bits != Bits::Eight) { together() } else { 1 };
            rounded.iter_mut().zip(xs.chunks_exact(d_in)).for_each(|(rounded, x)| {
                rounded.set(x);
                rounded.group(group);
            });
        }
        Self {
            xs,
            d_in,
            precision,
            few,
            rounded,
            #[cfg(target_arch = "x86_64")]
            many: if few { None } else { Many::new(xs, d_in, blocks, unit) },
        }
    }
}

/// Many rows in another form than floats.
#[cfg(target_arch = "x86_64")]
enum Many {
    #[cfg(target_os = "linux")]
    Turned(TurnedRows),
    Bf16(PackedRows),
    Words(WordRows),
}

#[cfg(target_arch = "x86_64")]
impl Many {
    /// As `unit` multiplies rows in bf16, if that may be, or else in whole numbers with weights in blocks.
    fn new(xs: &[f32], d_in: usize, blocks: bool, unit: Option<Bf16Unit>) -> Option<Self> {
        match unit {
            #[cfg(target_os = "linux")]
            Some(Bf16Unit::Matrix) if xs.len() <= TurnedRows::MAX * d_in => {
                Some(Self::Turned(TurnedRows::new(xs, d_in)))
            }
            Some(unit) => Some(Self::Bf16(PackedRows::new(xs, d_in, unit))),
            None => {
                // A matrix unit is faster in f32, too.
                let unit = simd::WordUnit::fastest().filter(|_| blocks && !product::has_matrix_unit())?;
                Some(Self::Words(WordRows::new(xs, d_in, unit)))
            }
        }
    }

    /// Fills the columns, if it can with this weight.
    ///
    /// # Safety
    /// As [`product`].
    unsafe fn multiply(&self, columns: Columns, weight: Stored) -> bool {
        // SAFETY: the caller's promise, and the CPU was asked.
        unsafe {
            match self {
                #[cfg(target_os = "linux")]
                Self::Turned(rows) => rows.multiply(columns.out.0.add(columns.start), columns.stride, weight),
                Self::Bf16(rows) => rows.multiply(columns.out.0.add(columns.start), columns.stride, weight),
                Self::Words(words) => return words.multiply(columns, weight),
            }
        }
        true
    }
}

/// Columns of a result with rows of `stride`, from `start` on.
#[derive(Clone, Copy)]
struct Columns {
    out: Output,
    stride: usize,
    start: usize,
}

impl Columns {
    /// The place of one of them in a row.
    fn at(self, row: usize, col: usize) -> *mut f32 {
        self.out.at(row * self.stride + self.start + col)
    }

    /// The same columns without the first rows.
    fn below(self, rows: usize) -> Self {
        Self { start: self.start + rows * self.stride, ..self }
    }
}

/// Fills the columns by the product with widened rows.
///
/// # Safety
/// The columns must be inside the result and nobody else's.
unsafe fn product(columns: Columns, xs: &[f32], d_in: usize, weight: Stored, precision: Precision) {
    thread_local! {
        static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let mut wide = WIDE.take();
    let len = weight.len();
    if wide.len() < len {
        wide.resize(len, 0.0);
    }
    weight.widen(&mut wide[..len]);
    let (a, b) = (Matrix::rows(xs, xs.len() / d_in, d_in), Matrix::rows(&wide, len / d_in, d_in));
    let out = columns.out.0.wrapping_add(columns.start);
    // SAFETY: the caller's promise; the operands are borrowed.
    unsafe {
        product::multiply(Place::F32(out), columns.stride as isize, a, b.transposed(), Product { precision, ..PRODUCT })
    };
    WIDE.set(wide);
}

/// Fills the columns, for many rows.
///
/// # Safety
/// As [`product`].
unsafe fn products(columns: Columns, input: &Input, weight: Stored) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    if input.many.as_ref().is_some_and(|many| unsafe { many.multiply(columns, weight) }) {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { product(columns, input.xs, input.d_in, weight, input.precision) };
}

/// Fills the columns, for few rows.
///
/// # Safety
/// As [`product`].
unsafe fn dots(columns: Columns, input: &Input, weight: Stored) {
    let Input { xs, d_in, ref rounded, .. } = *input;
    // SAFETY: the caller's promise.
    if !rounded.is_empty() && unsafe { in_whole_numbers(columns, rounded, weight) } {
        return;
    }
    // SAFETY: the CPU was asked, and the caller's promise.
    unsafe {
        match weight {
            Stored::F32(w) => by_vectors!(floats::dots(columns, xs, d_in, w)),
            Stored::Bf16(w) => by_vectors!(floats::dots(columns, xs, d_in, w)),
            Stored::F16(w) => by_vectors!(floats::dots(columns, xs, d_in, w)),
            Stored::Q8(w, scales) => by_row(columns, xs, d_in, weight, |out, x| q8_dots(out, x, w, scales)),
            Stored::Q4(w, scales) => by_row(columns, xs, d_in, weight, |out, x| q4_dots(out, x, w, scales)),
            Stored::Q4Symmetric(w, scales) => {
                by_row(columns, xs, d_in, weight, |out, x| q4_symmetric_dots(out, x, w, scales));
            }
        }
    }
}

/// Fills the columns row by row of the input.
///
/// # Safety
/// As [`product`].
unsafe fn by_row(columns: Columns, xs: &[f32], d_in: usize, weight: Stored, dots: impl Fn(&mut [f32], &[f32])) {
    for (row, x) in xs.chunks_exact(d_in).enumerate() {
        // SAFETY: the caller's promise.
        dots(unsafe { std::slice::from_raw_parts_mut(columns.at(row, 0), weight.len() / d_in) }, x);
    }
}

/// Rows of the input that are multiplied together: as many as there are registers for their sums.
const fn rows_together<V: Vector>() -> usize {
    if V::LANES == 8 { 2 } else { 4 }
}

/// Blocks of 4 bits that [`in_whole_numbers`] multiplies at a time.
fn together() -> usize {
    #[cfg(target_arch = "x86_64")]
    if simd::has_vnni() {
        return <Wide as whole::Whole>::TOGETHER;
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    return <Own as whole::Whole>::TOGETHER;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    1
}

/// Fills the columns with weights in blocks, if this CPU multiplies them in whole numbers.
///
/// # Safety
/// As [`product`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
unsafe fn in_whole_numbers(out: Columns, xs: &[Rounded], weight: Stored) -> bool {
    // SAFETY: the CPU was asked, and the caller's promise.
    unsafe {
        match weight {
            #[cfg(target_arch = "x86_64")]
            Stored::Q8(w, scales) if simd::has_vnni() => whole::dots::<Wide, _>(out, xs, w, scales),
            #[cfg(target_arch = "x86_64")]
            Stored::Q4(w, scales) if simd::has_vnni() => whole::dots::<Wide, _>(out, xs, w, scales),
            #[cfg(target_arch = "x86_64")]
            Stored::Q4Symmetric(w, scales) if simd::has_vnni() => whole::dots::<Wide, _>(out, xs, w, scales),
            Stored::Q8(w, scales) => whole::dots::<Own, _>(out, xs, w, scales),
            Stored::Q4(w, scales) => whole::dots::<Own, _>(out, xs, w, scales),
            Stored::Q4Symmetric(w, scales) => whole::dots::<Own, _>(out, xs, w, scales),
            _ => return false,
        }
    }
    true
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn in_whole_numbers(_: Columns, _: &[Rounded], _: Stored) -> bool {
    false
}

#[cfg(test)]
mod tests;
