//! Matrix products by the `gemm` crate, which reads any strides: a transposed matrix costs no copy.

use burn::tensor::Shape;
use burn_flex::FlexTensor;
use gemm::Parallelism;

use super::{Strided, from_values};

/// Below this many multiply-adds one thread is faster.
const PARALLEL: usize = 1 << 18;

/// A matrix somewhere in memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub ptr: *const f32,
    pub rows: usize,
    pub cols: usize,
    pub row_stride: isize,
    pub col_stride: isize,
}

impl Matrix {
    fn of(x: &Strided) -> Self {
        Self { ptr: x.ptr(), rows: x.dim(0), cols: x.dim(1), row_stride: x.stride(0), col_stride: x.stride(1) }
    }

    /// Rows one after the other.
    pub(super) fn rows(data: &[f32], rows: usize, cols: usize) -> Self {
        debug_assert!(data.len() >= rows * cols);
        Self { ptr: data.as_ptr(), rows, cols, row_stride: cols as isize, col_stride: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `out = factor · a b`, or `out += factor · a b` if `add`, on the calling thread or all.
///
/// # Safety
/// All elements that the matrices reach must be valid, those of `out` writable and not otherwise accessed meanwhile.
pub(super) unsafe fn multiply(
    out: *mut f32,
    out_row_stride: isize,
    a: Matrix,
    b: Matrix,
    factor: f32,
    add: bool,
    threads: bool,
) {
    debug_assert_eq!(a.cols, b.rows);
    let parallel = threads && a.rows * a.cols * b.cols >= PARALLEL;
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the caller's promise. gemm computes `alpha · out + beta · a b`.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            out_row_stride,
            add,
            a.ptr,
            a.col_stride,
            a.row_stride,
            b.ptr,
            b.col_stride,
            b.row_stride,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The product of two matrices, either transposed first.
pub(super) fn product(a: &FlexTensor, transpose_a: bool, b: &FlexTensor, transpose_b: bool) -> FlexTensor {
    let (a, b) = (Strided::new(a), Strided::new(b));
    let a = if transpose_a { Matrix::of(&a).transposed() } else { Matrix::of(&a) };
    let b = if transpose_b { Matrix::of(&b).transposed() } else { Matrix::of(&b) };
    assert_eq!(a.cols, b.rows, "product of [{}, {}] and [{}, {}]", a.rows, a.cols, b.rows, b.cols);
    let mut out = vec![0.0; a.rows * b.cols];
    // SAFETY: both matrices are views of tensors that live through the call; `out` is new and of the product's size.
    unsafe { multiply(out.as_mut_ptr(), b.cols as isize, a, b, 1.0, false, true) };
    from_values(out, Shape::new([a.rows, b.cols]))
}
