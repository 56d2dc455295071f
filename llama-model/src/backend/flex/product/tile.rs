//! The register kernel: a tile of sums in registers, to which each step adds the products of a column of `a` and a row of `b`.
//! For the vectors of any CPU, in f32 and with operands rounded to fewer bits.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::super::vector::{LINE, MAX_LANES, Task, Vector};
use super::blocks::{Kernel, Span, Target};
use super::matrix::{Matrix, Operand, Place, View, by_elements};

/// Steps that panels are fetched ahead of their use.
const AHEAD: usize = 16;

/// Steps of a round of the loop, whose own instructions take turns with the products.
const UNROLLED: usize = 4;

/// Rows that are fetched ahead of packing them: the hardware does not see where a short stretch of the next row begins.
pub(super) const ROWS_AHEAD: isize = 8;

/// Sums that registers hold, at most: 14 x 32 of AVX-512.
const MOST_SUMS: usize = 14 * 32;

/// How packed panels hold operands, and what the kernel does with them.
///
/// # Safety
/// Of all functions: as of [`Vector`]'s.
pub(super) trait Format<V: Vector> {
    /// Terms of the sum in a lane.
    const TERMS: usize;
    /// Lanes of `LANES · TERMS` terms that are neighbours in memory, the first `count` of which exist.
    unsafe fn along<T: Operand>(src: *const T, count: usize) -> V;
    /// The lanes of `have` neighbouring columns, from `count` terms that are `stride` apart.
    unsafe fn across<T: Operand>(src: *const T, stride: isize, have: usize, count: usize) -> V;
    /// `sum + a · b`
    unsafe fn multiply_add(a: V, b: V, sum: V) -> V;
    /// Runs a task whose code is compiled for what the format needs.
    unsafe fn run(task: impl Task);
}

/// Defines a format of one f32 a lane.
macro_rules! single {
    ($(#[$meta:meta])* $name:ident, $round:expr) => {
        $(#[$meta])*
        pub(super) struct $name;

        impl<V: Vector> Format<V> for $name {
            const TERMS: usize = 1;
            #[inline(always)]
            unsafe fn along<T: Operand>(src: *const T, count: usize) -> V {
                unsafe { $round(T::load_first(src, count)) }
            }
            #[inline(always)]
            unsafe fn across<T: Operand>(src: *const T, _: isize, have: usize, _: usize) -> V {
                unsafe { $round(T::load_first(src, have)) }
            }
            #[inline(always)]
            unsafe fn multiply_add(a: V, b: V, sum: V) -> V {
                unsafe { a.multiply_add(b, sum) }
            }
            unsafe fn run(task: impl Task) {
                unsafe { V::run(task) }
            }
        }
    };
}

single!(
    /// f32 as it is.
    Single,
    |x| x
);
single!(
    /// bf16 values held as f32: exact products, at the speed of f32.
    RoundedBf16,
    |x: V| x.round_to_bf16()
);
single!(
    /// f16 values held as f32, alike.
    RoundedF16,
    |x: V| x.round_to_f16()
);

/// Packs rows of `x` in panels of `width`: for each lane's worth of terms, `width` lanes, one for each row, those of rows that do
/// not exist zero.
///
/// # Safety
/// The rows and terms must be inside the matrix, the panels have room, and the CPU have the instructions.
#[inline(always)]
pub(super) unsafe fn pack<V: Vector, F: Format<V>, T: Operand>(
    panels: *mut f32,
    x: View<T>,
    rows: Span,
    terms: Span,
    width: usize,
) {
    let steps = terms.1.div_ceil(F::TERMS);
    let panel = |first: usize| panels.wrapping_add(first * steps);
    let firsts = || (0..rows.1).step_by(width);
    unsafe {
        if x.row_stride == 1 {
            // Rows are neighbours in memory, so all of them are read for a step before the next.
            for step in 0..steps {
                let term = step * F::TERMS;
                let src = x.at(rows.0, terms.0 + term);
                for first in firsts() {
                    let lanes = panel(first).wrapping_add(step * width);
                    for i in (0..width).step_by(V::LANES) {
                        let have = rows.1.saturating_sub(first + i);
                        let from = src.wrapping_add(first + i);
                        V::prefetch(from.wrapping_offset(ROWS_AHEAD * x.col_stride).cast());
                        F::across(from, x.col_stride, have, terms.1 - term).store(lanes.add(i), width - i);
                    }
                }
            }
        } else if x.col_stride == 1 {
            for first in firsts() {
                let count = width.min(rows.1 - first);
                for step in (0..steps).step_by(V::LANES) {
                    let term = step * F::TERMS;
                    for i in (0..width).step_by(V::LANES) {
                        let mut values = [V::splat(0.0); MAX_LANES];
                        for (r, values) in values.iter_mut().enumerate().take(V::LANES) {
                            if i + r < count {
                                let src = x.at(rows.0 + first + i + r, terms.0 + term);
                                *values = F::along(src, terms.1 - term);
                                V::prefetch(src.wrapping_add(32 * F::TERMS).cast());
                            }
                        }
                        for (s, values) in V::transpose(values).into_iter().enumerate().take(V::LANES) {
                            if step + s < steps {
                                values.store(panel(first).add((step + s) * width + i), width - i);
                            }
                        }
                    }
                }
            }
        } else {
            // No view of a tensor that is a matrix gets here with strides of its own in both directions often.
            for first in firsts() {
                for (step, i) in (0..steps).flat_map(|step| (0..width).map(move |i| (step, i))) {
                    let mut values = [0.0f32; MAX_LANES];
                    for (t, value) in values.iter_mut().enumerate().take(F::TERMS.min(terms.1 - step * F::TERMS)) {
                        if first + i < rows.1 {
                            *value = (*x.at(rows.0 + first + i, terms.0 + step * F::TERMS + t)).value();
                        }
                    }
                    F::along(values.as_ptr(), F::TERMS).store(panel(first).add(step * width + i), 1);
                }
            }
        }
    }
}

/// [`pack`] of `a`, in panels of rows of a tile, or of `b`, in strips of its columns.
struct Pack<V, F, T, const COLUMNS: bool> {
    panels: *mut f32,
    x: View<T>,
    rows: Span,
    terms: Span,
    kind: PhantomData<(V, F)>,
}

impl<V: Vector, F: Format<V>, T: Operand, const COLUMNS: bool> Task for Pack<V, F, T, COLUMNS> {
    #[inline(always)]
    unsafe fn run(self) {
        let width = if COLUMNS { V::VECTORS * V::LANES } else { V::ROWS };
        // SAFETY: the caller's promise.
        unsafe { pack::<V, F, T>(self.panels, self.x, self.rows, self.terms, width) }
    }
}

/// `ROWS` rows and `VECTORS` vectors of columns of the result, over `steps` lanes of both panels.
struct Tile<V, F, const ROWS: usize, const VECTORS: usize> {
    steps: usize,
    a: *const f32,
    b: *const f32,
    /// What is fetched meanwhile, a line for every [`UNROLLED`] steps.
    following: *const f32,
    target: Target,
    kind: PhantomData<(V, F)>,
}

impl<V: Vector, F: Format<V>, const ROWS: usize, const VECTORS: usize> Tile<V, F, ROWS, VECTORS> {
    /// Adds the products of one lane of the rows and one of the columns.
    #[inline(always)]
    unsafe fn step(a: *const f32, b: *const f32, sums: &mut [[V; VECTORS]; ROWS]) {
        unsafe {
            V::prefetch(a.wrapping_add(AHEAD * V::ROWS));
            let mut columns = [V::splat(0.0); VECTORS];
            for (v, columns) in columns.iter_mut().enumerate() {
                V::prefetch(b.wrapping_add(AHEAD / 2 * V::VECTORS * V::LANES + V::LANES * v));
                *columns = V::load(b.add(V::LANES * v), V::LANES);
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let row = V::splat(*a.add(i));
                for (sum, columns) in sums.iter_mut().zip(columns) {
                    *sum = F::multiply_add(row, columns, *sum);
                }
            }
        }
    }
}

impl<V: Vector, F: Format<V>, const ROWS: usize, const VECTORS: usize> Task for Tile<V, F, ROWS, VECTORS> {
    #[inline(always)]
    unsafe fn run(self) {
        const { assert!(V::ROWS * V::VECTORS * V::LANES <= MOST_SUMS) };
        let Self { steps, a, b, mut following, target, .. } = self;
        unsafe {
            for i in 0..ROWS {
                for v in 0..VECTORS {
                    V::prefetch(target.at(i, V::LANES * v).address());
                }
            }
            let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
            let (a, b) = (|step: usize| a.add(step * V::ROWS), |step: usize| b.add(step * V::VECTORS * V::LANES));
            let unrolled = steps / UNROLLED * UNROLLED;
            for first in (0..unrolled).step_by(UNROLLED) {
                V::prefetch_far(following);
                following = following.wrapping_add(LINE);
                for step in first..first + UNROLLED {
                    Self::step(a(step), b(step), &mut sums);
                }
            }
            for step in unrolled..steps {
                Self::step(a(step), b(step), &mut sums);
            }
            // Sums that are rounded go through a place of their own. With a choice among types inside this loop the compiler
            // does not unroll it, and keeps all sums in memory.
            let mut kept = [MaybeUninit::<f32>::uninit(); MOST_SUMS];
            let (first, stride) = match target.out {
                Place::F32(first) => (first, target.row_stride),
                Place::Bf16(_) => (kept.as_mut_ptr().cast(), (V::VECTORS * V::LANES) as isize),
            };
            for (i, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    let out = first.wrapping_offset(i as isize * stride).wrapping_add(V::LANES * v);
                    let count = target.cols.saturating_sub(V::LANES * v);
                    let result = if target.add { sum.add(V::load(out, count)) } else { *sum };
                    result.store(out, count);
                }
            }
            if let Place::Bf16(out) = target.out {
                for (i, v) in (0..ROWS).flat_map(|i| (0..VECTORS).map(move |v| (i, V::LANES * v))) {
                    let count = target.cols.saturating_sub(v);
                    let sum = V::load(first.wrapping_offset(i as isize * stride).wrapping_add(v), count);
                    sum.store_bf16(out.wrapping_offset(i as isize * target.row_stride).wrapping_add(v), count);
                }
            }
        }
    }
}

/// The kernel by vectors and format.
pub(super) struct Tiles<V, F>(PhantomData<(V, F)>);

impl<V: Vector, F: Format<V>> Tiles<V, F> {
    /// A tile of so many columns, compiled for its rows, so that no register is spent on rows that do not exist.
    unsafe fn tile<const VECTORS: usize>(
        rows: usize,
        steps: usize,
        a: *const f32,
        b: *const f32,
        following: *const f32,
        target: Target,
    ) {
        macro_rules! by_rows {
            ($($count:literal)*) => {
                match rows {
                    // Nothing is compiled for rows that there are not.
                    $($count if const { $count <= V::ROWS } => {
                        let tile = Tile::<V, F, $count, VECTORS> { steps, a, b, following, target, kind: PhantomData };
                        // SAFETY: the caller's promise.
                        unsafe { F::run(tile) }
                    })*
                    _ => unreachable!("a tile has as many rows as its vectors' at most"),
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }
}

impl<V: Vector, F: Format<V>> Kernel for Tiles<V, F> {
    const ROWS: usize = V::ROWS;
    const COLS: usize = V::VECTORS * V::LANES;
    const TERMS: usize = F::TERMS;
    const BLOCK: usize = V::BLOCK;

    fn lanes(terms: usize) -> usize {
        terms.div_ceil(F::TERMS)
    }

    unsafe fn pack_a(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
        unsafe { by_elements!(x => F::run(Pack::<V, F, _, false> { panels, x, rows, terms, kind: PhantomData })) }
    }

    unsafe fn pack_b(panels: *mut f32, x: Matrix, rows: Span, terms: Span) {
        unsafe { by_elements!(x => F::run(Pack::<V, F, _, true> { panels, x, rows, terms, kind: PhantomData })) }
    }

    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target) {
        let steps = Self::lanes(terms);
        for i in (0..target.rows).step_by(V::ROWS) {
            let rows = V::ROWS.min(target.rows - i);
            let out = target.at(i, 0);
            let (a, target) = (panels.wrapping_add(i * steps), Target { out, rows, ..target });
            // Each panel fetches the part of the next strip that those before have not: strips that all tasks share are
            // too many for the second-level cache.
            let following = strip.wrapping_add(Self::COLS * steps + i / V::ROWS * (steps / UNROLLED) * LINE);
            // SAFETY: the caller's promise.
            unsafe {
                match target.cols.div_ceil(V::LANES) {
                    1 => Self::tile::<1>(rows, steps, a, strip, following, target),
                    2 => Self::tile::<2>(rows, steps, a, strip, following, target),
                    3 if const { V::VECTORS >= 3 } => Self::tile::<3>(rows, steps, a, strip, following, target),
                    _ => unreachable!("a strip has as many columns as a tile at most"),
                }
            }
        }
    }
}
