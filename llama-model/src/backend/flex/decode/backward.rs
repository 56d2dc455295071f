//! Gradients of inputs: products with the columns of a weight as it is stored. A piece of it is widened at a time, as much as a
//! core's cache holds; floats of the whole weight would go to memory and back.

use std::cell::RefCell;

use burn::backend::Flex;
use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;

use super::super::product::{self, Packing, Right, with_buffer};
use super::super::stored::Stored;
use super::super::{Buffer, Output, contiguous, team, values};
use crate::Precision;
use crate::backend::{Matrix, QUANT_BLOCK};

/// Rows of a weight in a piece.
const PIECE: usize = 256;
/// Columns of a piece, at most.
const COLUMNS: usize = 256;
/// Pieces, one below the other, for which gradients are packed at a time.
const PIECES: usize = 8;

/// `Σ grad · weight`, of one pair or more.
pub(in crate::backend::flex) fn input_gradients(
    pairs: Vec<(FlexTensor, Matrix<Flex>)>,
    precision: Precision,
) -> FlexTensor {
    let [tokens, _] = pairs[0].0.shape().dims();
    let [_, d_in] = pairs[0].1.dims();
    // SAFETY: the first product writes it whole.
    let mut out = unsafe { Buffer::unwritten(tokens * d_in) };
    for (index, (grad, weight)) in pairs.into_iter().enumerate() {
        let (grad, weight) = (contiguous(grad), weight.whole());
        input_gradient(&mut out, values(&grad), Stored::of(&weight), d_in, precision, index > 0);
    }
    out.into_tensor(Shape::new([tokens, d_in]))
}

/// `out = grads · weight`, or `out += grads · weight`, for rows of `d_in` numbers and a weight that has rows.
pub(in crate::backend::flex) fn input_gradient(
    out: &mut [f32],
    grads: &[f32],
    weight: Stored,
    d_in: usize,
    precision: Precision,
    add: bool,
) {
    let d_out = weight.len() / d_in;
    let rows = out.len() / d_in;
    assert_eq!(
        (out.len(), grads.len()),
        (rows * d_in, rows * d_out),
        "gradients do not fit a weight [{d_out}, {d_in}]"
    );
    if out.is_empty() {
        return;
    }
    let packing = match weight {
        Stored::Bf16(_) => Packing::by_bf16(precision),
        _ => Packing::fastest(precision, true),
    };
    let threads = team::threads();
    let tasks = d_in.div_ceil(COLUMNS).next_multiple_of(threads);
    let width = d_in.div_ceil(tasks).next_multiple_of(QUANT_BLOCK);
    let lanes = packing.left_lanes(rows, PIECE);
    // SAFETY: what is read is packed before.
    let mut panels = unsafe { Buffer::unwritten(PIECES.min(d_out.div_ceil(PIECE)) * lanes) };
    let (panels, out) = (Output(panels.as_mut_ptr()), Output(out.as_mut_ptr()));
    for above in (0..d_out).step_by(PIECES * PIECE) {
        let pieces = || (above..d_out.min(above + PIECES * PIECE)).step_by(PIECE).enumerate();
        team::each(pieces(), |(index, first)| {
            let terms = PIECE.min(d_out - first);
            let grads = product::Matrix { cols: terms, ..product::Matrix::rows(&grads[first..], rows, d_out) };
            // SAFETY: there is room for each piece's gradients, which are this task's own.
            unsafe { packing.left(panels.at(index * lanes), grads) };
        });
        team::each((0..d_in).step_by(width), |from| {
            let cols = width.min(d_in - from);
            for (index, first) in pieces() {
                let terms = PIECE.min(d_out - first);
                let left = packing.packed_left(panels.at(index * lanes), [rows, terms]);
                with_piece(packing, weight, d_in, [first, terms], [from, cols], |right| {
                    // SAFETY: the columns are this task's own, and inside the result.
                    unsafe { packing.multiply(out.at(from), d_in, left, right, add || first > 0) };
                });
            }
        });
    }
}

/// Lends a piece of a weight, packed: so many rows and columns, from the first on.
fn with_piece(
    packing: Packing,
    weight: Stored,
    d_in: usize,
    [first, rows]: [usize; 2],
    [from, cols]: [usize; 2],
    each: impl FnOnce(Right),
) {
    thread_local! {
        static PIECE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    // What can be cut out of a row: blocks stay whole.
    let unit = if weight.bits().is_some() { QUANT_BLOCK } else { 1 };
    let packed = packing.right_lanes(cols, rows);
    with_buffer(&PIECE, packed + rows * cols, |strips| {
        // SAFETY: there is room for the floats behind the strips.
        let wide = unsafe { std::slice::from_raw_parts_mut(strips.add(packed), rows * cols) };
        for (row, wide) in wide.chunks_exact_mut(cols).enumerate() {
            let at = ((first + row) * d_in + from) / unit;
            weight.rows(at, at + cols / unit, unit).widen(wide);
        }
        // SAFETY: there is room for the strips.
        each(unsafe { packing.right(strips, product::Matrix::rows(wide, rows, cols)) });
    });
}
