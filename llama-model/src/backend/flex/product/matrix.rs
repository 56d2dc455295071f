//! Matrices as products read and write them: somewhere in memory, in f32 or bf16.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512, __m512i};

use burn::tensor::{DType, TensorMetadata};
use burn_flex::FlexTensor;
use half::bf16;

use super::super::Strided;
use super::super::vector::Number;
#[cfg(target_arch = "x86_64")]
use super::avx512;

/// A number that products read and write.
pub(in crate::backend::flex) trait Operand: Number {
    fn elements(first: *const Self) -> Elements;
    fn place(first: *mut Self) -> Place;
    /// 32 neighbours in bf16, zeros behind the first `count`.
    ///
    /// # Safety
    /// For this and the next: so many must be there; the CPU must have AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn pairs(src: *const Self, count: usize) -> __m512;
    /// 16 neighbours in bf16, each in the low half of its lane, zeros behind the first `count`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn halves(src: *const Self, count: usize) -> __m512i;
}

impl Operand for f32 {
    fn elements(first: *const f32) -> Elements {
        Elements::F32(first)
    }
    fn place(first: *mut f32) -> Place {
        Place::F32(first)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pairs(src: *const f32, count: usize) -> __m512 {
        unsafe { avx512::pairs(src, count) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn halves(src: *const f32, count: usize) -> __m512i {
        unsafe { avx512::halves(src, count) }
    }
}

impl Operand for bf16 {
    fn elements(first: *const bf16) -> Elements {
        Elements::Bf16(first)
    }
    fn place(first: *mut bf16) -> Place {
        Place::Bf16(first)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pairs(src: *const bf16, count: usize) -> __m512 {
        unsafe { avx512::stored_pairs(src, count) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn halves(src: *const bf16, count: usize) -> __m512i {
        unsafe { avx512::stored_halves(src, count) }
    }
}

/// The first element of a matrix that is read.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) enum Elements {
    F32(*const f32),
    Bf16(*const bf16),
}

/// A matrix somewhere in memory.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) struct Matrix {
    pub elements: Elements,
    pub rows: usize,
    pub cols: usize,
    pub row_stride: isize,
    pub col_stride: isize,
}

// SAFETY: the elements are only read, and whoever makes a matrix keeps them alive.
unsafe impl Send for Matrix {}
unsafe impl Sync for Matrix {}

impl Matrix {
    pub(super) fn of(x: &FlexTensor) -> Self {
        let elements = match x.dtype() {
            DType::BF16 => Elements::Bf16(Strided::new(x).ptr()),
            _ => Elements::F32(Strided::new(x).ptr()),
        };
        let ([rows, cols], strides) = (x.shape().dims(), x.layout().strides());
        Self { elements, rows, cols, row_stride: strides[0], col_stride: strides[1] }
    }

    /// Rows one after the other.
    pub(in crate::backend::flex) fn rows<T: Operand>(data: &[T], rows: usize, cols: usize) -> Self {
        debug_assert!(data.len() >= rows * cols);
        Self { elements: T::elements(data.as_ptr()), rows, cols, row_stride: cols as isize, col_stride: 1 }
    }

    pub(in crate::backend::flex) fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Its elements from the first on.
    pub(super) fn view<T>(self, first: *const T) -> View<T> {
        View { first, row_stride: self.row_stride, col_stride: self.col_stride }
    }
}

/// The elements of a matrix.
#[derive(Clone, Copy)]
pub(super) struct View<T> {
    first: *const T,
    pub row_stride: isize,
    pub col_stride: isize,
}

impl<T> View<T> {
    pub(super) fn at(&self, row: usize, col: usize) -> *const T {
        self.first.wrapping_offset(row as isize * self.row_stride + col as isize * self.col_stride)
    }
}

/// Calls a function with the elements of a matrix for its argument `x`, in whatever type they are: `by_elements!(x => f(panels, x, rows))`.
macro_rules! by_elements {
    ($x:ident => $call:expr) => {
        match $x.elements {
            crate::backend::flex::product::matrix::Elements::F32(first) => {
                let $x = $x.view(first);
                $call
            }
            crate::backend::flex::product::matrix::Elements::Bf16(first) => {
                let $x = $x.view(first);
                $call
            }
        }
    };
}
pub(super) use by_elements;

/// Where a product writes its first element.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) enum Place {
    F32(*mut f32),
    /// Rounded when they are summed.
    Bf16(*mut bf16),
}

// SAFETY: every task writes elements of its own only.
unsafe impl Send for Place {}
unsafe impl Sync for Place {}

impl Place {
    pub(super) fn at(self, row: usize, row_stride: isize, col: usize) -> Self {
        let offset = row as isize * row_stride + col as isize;
        match self {
            Self::F32(first) => Self::F32(first.wrapping_offset(offset)),
            Self::Bf16(first) => Self::Bf16(first.wrapping_offset(offset)),
        }
    }

    /// As something to fetch.
    pub(super) fn address(self) -> *const f32 {
        match self {
            Self::F32(first) => first,
            Self::Bf16(first) => first.cast(),
        }
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn f32(self) -> Option<*mut f32> {
        match self {
            Self::F32(first) => Some(first),
            Self::Bf16(_) => None,
        }
    }
}
