//! Operands that are packed once and multiplied often, on the calling thread: attention multiplies each tile of keys with all
//! queries, and packing a tile takes as long as multiplying it with some.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m512;

use super::super::vector::{Vector, by_vectors};
use super::blocks::{Kernel, Span, Target};
use super::matrix::{Matrix, Place};
#[cfg(target_arch = "x86_64")]
use super::stored::Bf16Unit;
use super::tile::{RoundedBf16, RoundedF16, Single, Tiles};
use crate::Precision;

/// A kernel that is chosen at run time, and the form it takes operands in.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) struct Packing {
    rows: usize,
    cols: usize,
    block: usize,
    lanes: fn(usize) -> usize,
    lanes_of_columns: fn(usize) -> usize,
    pack_a: unsafe fn(*mut f32, Matrix, Span, Span),
    pack_b: unsafe fn(*mut f32, Matrix, Span, Span),
    strip: unsafe fn(*const f32, *const f32, usize, Target),
    begin: unsafe fn(),
    end: unsafe fn(),
}

/// A left operand, packed: some rows of so many terms.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) struct Left {
    panels: *const f32,
    rows: usize,
    terms: usize,
}

/// A right operand, packed: some columns of so many terms.
#[derive(Clone, Copy)]
pub(in crate::backend::flex) struct Right {
    strips: *const f32,
    cols: usize,
    terms: usize,
    /// Lanes of a column, which may have more terms.
    lanes: usize,
}

impl Right {
    /// Its first columns.
    pub fn first_columns(self, cols: usize) -> Self {
        debug_assert!(cols <= self.cols);
        Self { cols, ..self }
    }

    /// Its first terms. Those behind them must be finite: they may be multiplied with zeros.
    pub fn first_terms(self, terms: usize) -> Self {
        debug_assert!(terms <= self.terms);
        Self { terms, ..self }
    }
}

impl Packing {
    /// Of the fastest kernel. In f32 a matrix unit is that if operands may be packed `in_parts`: of left ones that are few rows, or that lie in
    /// memory by columns, packing takes longer than it saves.
    #[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), expect(unused_variables))]
    pub fn fastest(precision: Precision, in_parts: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        match (precision, Bf16Unit::fastest()) {
            #[cfg(target_os = "linux")]
            (Precision::F32, Some(Bf16Unit::Matrix)) if in_parts => return Self::of::<super::split::ThreeParts>(),
            #[cfg(target_os = "linux")]
            (Precision::Bf16, Some(Bf16Unit::Matrix)) => return Self::of::<super::amx::MatrixUnit>(),
            (Precision::Bf16, Some(Bf16Unit::Vectors)) => return Self::of::<Tiles<__m512, super::avx512::Pairs>>(),
            _ => {}
        }
        // SAFETY: only functions of the CPU's vectors are named, none is called.
        unsafe { by_vectors!(of_vectors(precision)) }
    }

    /// Of the fastest kernel where right operands are numbers in bf16.
    pub fn by_bf16(precision: Precision) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if precision == Precision::F32 && super::amx::available() {
            return Self::of::<super::split::ByBf16>();
        }
        Self::fastest(precision, true)
    }

    const fn of<K: Kernel>() -> Self {
        Self {
            rows: K::ROWS,
            cols: K::COLS,
            block: K::BLOCK,
            lanes: K::lanes,
            lanes_of_columns: K::lanes_of_columns,
            pack_a: K::pack_a,
            pack_b: K::pack_b,
            strip: K::strip,
            begin: K::begin,
            end: K::end,
        }
    }

    /// Lanes that a left operand of so many rows and terms has room in, of four bytes.
    pub fn left_lanes(&self, rows: usize, terms: usize) -> usize {
        rows.next_multiple_of(self.rows) * (self.lanes)(terms)
    }

    /// The same of a right operand.
    pub fn right_lanes(&self, cols: usize, terms: usize) -> usize {
        cols.next_multiple_of(self.cols) * (self.lanes_of_columns)(terms)
    }

    /// Packs a left operand.
    ///
    /// # Safety
    /// The matrix must be there, and room at `panels`, on the boundary of a cache line.
    pub unsafe fn left(&self, panels: *mut f32, a: Matrix) -> Left {
        // SAFETY: the caller's promise; the CPU was asked for the kernel.
        unsafe { (self.pack_a)(panels, a, (0, a.rows), (0, a.cols)) };
        self.packed_left(panels, [a.rows, a.cols])
    }

    /// A left operand of so many rows and terms that was packed before.
    pub fn packed_left(&self, panels: *const f32, [rows, terms]: [usize; 2]) -> Left {
        Left { panels, rows, terms }
    }

    /// Packs a right operand.
    ///
    /// # Safety
    /// As of [`left`](Self::left).
    pub unsafe fn right(&self, strips: *mut f32, b: Matrix) -> Right {
        // SAFETY: as above.
        unsafe { (self.pack_b)(strips, b.transposed(), (0, b.cols), (0, b.rows)) };
        self.packed_right(strips, [b.rows, b.cols])
    }

    /// A right operand of so many terms and columns that was packed before.
    pub fn packed_right(&self, strips: *const f32, [terms, cols]: [usize; 2]) -> Right {
        Right { strips, cols, terms, lanes: (self.lanes_of_columns)(terms) }
    }

    /// `out = a b`, or `out += a b`.
    ///
    /// # Safety
    /// Both must be packed for this kernel and still be there; there must be room at `out`, which nobody else uses meanwhile.
    pub unsafe fn multiply(&self, out: *mut f32, row_stride: usize, a: Left, b: Right, add: bool) {
        debug_assert_eq!(a.terms, b.terms);
        let lanes = (self.lanes)(a.terms);
        // SAFETY: the caller's promise.
        unsafe {
            (self.begin)();
            for row in (0..a.rows).step_by(self.block) {
                for col in (0..b.cols).step_by(self.cols) {
                    let target = Target {
                        out: Place::F32(out.add(row * row_stride + col)),
                        row_stride: row_stride as isize,
                        rows: self.block.min(a.rows - row),
                        cols: self.cols.min(b.cols - col),
                        add,
                    };
                    (self.strip)(a.panels.add(row * lanes), b.strips.add(col * b.lanes), b.terms, target);
                }
            }
            (self.end)();
        }
    }
}

/// # Safety
/// The CPU must have the vectors.
unsafe fn of_vectors<V: Vector>(precision: Precision) -> Packing {
    match precision {
        Precision::F32 => Packing::of::<Tiles<V, Single>>(),
        Precision::Bf16 => Packing::of::<Tiles<V, RoundedBf16>>(),
        Precision::F16 => Packing::of::<Tiles<V, RoundedF16>>(),
    }
}
