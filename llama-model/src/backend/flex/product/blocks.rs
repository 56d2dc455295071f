//! The levels above a register kernel (Goto and van de Geijn, 2008): a task packs a block of `a` for the second-level
//! cache and runs strips of `b` past it. How a product is cut depends on its shape and the number of threads, but never
//! changes the order of a sum.

use std::cell::RefCell;
use std::thread::LocalKey;

use super::super::{Buffer, Output, rows, team};
use super::{Matrix, Place, Product};

/// Start and length of a stretch of rows, columns or terms.
pub(super) type Span = (usize, usize);

/// Where the sums of one strip go.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub out: Place,
    pub row_stride: isize,
    pub rows: usize,
    pub cols: usize,
    /// To what is there, which must be f32.
    pub add: bool,
}

impl Target {
    pub fn at(&self, row: usize, col: usize) -> Place {
        self.out.at(row, self.row_stride, col)
    }
}

/// A register kernel and the form it takes its operands in: panels of [`ROWS`](Self::ROWS) rows of `a` and strips of
/// [`COLS`](Self::COLS) columns of `b`, in lanes of four bytes.
pub(super) trait Kernel {
    /// Rows of its register tile.
    const ROWS: usize;
    /// Columns of its register tile.
    const COLS: usize;
    /// Terms of a sum that it takes together.
    const TERMS: usize;
    /// Rows of `a` that are packed at a time, at most: a multiple of [`ROWS`](Self::ROWS).
    const BLOCK: usize;
    /// Terms of a sum that are packed at a time, at most.
    const PACKED_TERMS: usize = TERMS;
    /// Lanes of a block of `a`, at most, where that leaves rows enough.
    const BLOCK_LANES: usize = usize::MAX;
    /// Lanes of a packed row of so many terms.
    fn lanes(terms: usize) -> usize;
    /// Lanes of a packed column of so many terms.
    fn lanes_of_columns(terms: usize) -> usize {
        Self::lanes(terms)
    }

    /// Packs rows of `a`, in whole panels; what is missing of the last is zero.
    ///
    /// # Safety
    /// For this and the others: all that is named must exist, the panels have room, and the CPU have the instructions.
    unsafe fn pack_a(panels: *mut f32, a: Matrix, rows: Span, terms: Span);
    /// Packs columns of `b`, given as its transpose's rows, in whole strips; what is missing of the last is zero.
    unsafe fn pack_b(strips: *mut f32, b: Matrix, cols: Span, terms: Span);
    /// The products of all panels with one strip.
    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target);
    /// What a task does before its first strip and after its last.
    unsafe fn begin() {}
    unsafe fn end() {}
}

/// Terms of a sum that are packed at a time, at most, by most kernels.
pub(super) const TERMS: usize = 512;
/// Columns of `b` that a task packs for itself at a time, and their lanes, at most.
const OWN_COLS: usize = 256;
const OWN_LANES: usize = 1 << 17;
/// Lanes of `b`, at most, that are packed at a time for all tasks: few in tests, whose products are small.
const SHARED_LANES: usize = if cfg!(test) { 1 << 16 } else { 1 << 22 };
/// Times that the tasks may wait for a shared copy of the next terms.
const SHARED_CHUNKS: usize = 64;
/// Rows below which a shared copy is not worth the wait for it.
const SHARED_ROWS: usize = 512;
/// Rows for each thread below which several copies after one another are not: many threads with few rows each would wait
/// for the cache that they share.
const ROWS_OF_A_THREAD: usize = 256;

/// Rows or columns in blocks of whole units, whose numbers of units differ by one at most.
struct Blocks {
    len: usize,
    unit: usize,
    count: usize,
}

impl Blocks {
    /// As many as `count`, but no more than units.
    fn new(len: usize, unit: usize, count: usize) -> Self {
        Self { len, unit, count: count.min(len.div_ceil(unit)) }
    }

    /// Rows or columns of the longest.
    fn longest(&self) -> usize {
        self.len.div_ceil(self.unit).div_ceil(self.count) * self.unit
    }

    fn span(&self, index: usize) -> Span {
        let start = |index: usize| self.len.min(self.len.div_ceil(self.unit) * index / self.count * self.unit);
        (start(index), start(index + 1) - start(index))
    }
}

/// The cut of a product into tasks.
struct Cut {
    rows: Blocks,
    cols: Blocks,
    /// Columns that a task packs at a time where it packs its own.
    own_cols: usize,
    terms: usize,
    /// All tasks use the same packed `b`, each block of `cols` in turn.
    shared: bool,
}

impl Cut {
    fn new<K: Kernel>((m, n, k): (usize, usize, usize), threads: usize) -> Self {
        let terms = k.div_ceil(k.div_ceil(K::PACKED_TERMS)).next_multiple_of(K::TERMS);
        // As many whole units as there are lanes for, one at least.
        let fitting = |lanes: usize, each: usize, unit: usize| (lanes / each / unit).max(1) * unit;
        let block = fitting(K::BLOCK_LANES, K::lanes(terms), K::ROWS).min(K::BLOCK);
        let own_cols = fitting(OWN_LANES, K::lanes_of_columns(terms), K::COLS).min(OWN_COLS);
        let row_blocks = m.div_ceil(block);
        let copies = n.div_ceil(fitting(SHARED_LANES, K::lanes_of_columns(terms), K::COLS));
        // Several copies pay only where more than one block of rows would pack its own.
        let shared = threads > 1
            && m >= SHARED_ROWS
            && k.div_ceil(terms) <= SHARED_CHUNKS
            && (copies == 1 || row_blocks > 1 && m >= ROWS_OF_A_THREAD * threads);
        let (row_blocks, col_blocks) = if shared {
            // Two tasks for each thread or more, in a number that threads share evenly.
            (row_blocks.max(2 * threads).next_multiple_of(threads), copies)
        } else if threads > 1 {
            // As many rows as can be, since every task packs its columns.
            let wanted = (n / OWN_COLS).clamp(threads, 4 * threads).div_ceil(row_blocks);
            (row_blocks, wanted.next_multiple_of(threads))
        } else {
            (row_blocks, 1)
        };
        let (rows, cols) = (Blocks::new(m, K::ROWS, row_blocks), Blocks::new(n, K::COLS, col_blocks));
        Self { rows, cols, own_cols, terms, shared }
    }
}

/// [`multiply`](super::multiply) by a kernel.
///
/// # Safety
/// As there; the CPU must have the kernel's instructions.
pub(super) unsafe fn multiply<K: Kernel>(out: Place, out_row_stride: isize, a: Matrix, b: Matrix, product: Product) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let threads = if product.threads { team::threads() } else { 1 };
    let cut = Cut::new::<K>((m, n, k), threads);
    if let Place::Bf16(short) = out
        && k > cut.terms
    {
        // SAFETY: the caller's promise; the sums, which are rounded once, are written whole.
        unsafe {
            let mut sums = Buffer::<f32>::unwritten(m * n);
            multiply::<K>(Place::F32(sums.as_mut_ptr()), n as isize, a, b, product);
            return rows::narrow_rows(Output(short), out_row_stride, &sums, n);
        }
    }
    let columns = b.transposed();
    let own_lanes = cut.rows.longest() * K::lanes(cut.terms);
    let starts = || (0..k).step_by(cut.terms);
    let terms_from = |start: usize| (start, cut.terms.min(k - start));
    // A block of the result, over the terms from `start` on.
    let block = |(row, rows): Span, (col, cols): Span, start: usize, shared: Option<Output>| {
        let terms = terms_from(start);
        let lanes = K::lanes_of_columns(terms.1);
        let own_cols = if shared.is_some() { cols } else { cut.own_cols.min(cols) };
        let own_strips = if shared.is_some() { 0 } else { own_cols.next_multiple_of(K::COLS) * lanes };
        with_buffer(&OWN, own_lanes + own_strips, |panels| unsafe {
            // SAFETY: the caller's promise; the buffer has room for the panels and for own strips behind them.
            K::begin();
            K::pack_a(panels, a, (row, rows), terms);
            for first in (0..cols).step_by(own_cols) {
                let width = own_cols.min(cols - first);
                let strips = match shared {
                    Some(strips) => strips.0,
                    None => {
                        let strips = panels.add(own_lanes);
                        K::pack_b(strips, columns, (col + first, width), terms);
                        strips
                    }
                };
                for j in (0..width).step_by(K::COLS) {
                    let target = Target {
                        out: out.at(row, out_row_stride, col + first + j),
                        row_stride: out_row_stride,
                        rows,
                        cols: K::COLS.min(width - j),
                        add: product.add || start > 0,
                    };
                    K::strip(panels, strips.add(j * lanes), terms.1, target);
                }
            }
            K::end();
        });
    };
    if !cut.shared {
        let task = |index: usize| {
            let (rows, cols) = (cut.rows.span(index % cut.rows.count), cut.cols.span(index / cut.rows.count));
            starts().for_each(|start| block(rows, cols, start, None));
        };
        let count = cut.rows.count * cut.cols.count;
        if threads > 1 {
            team::for_each(count, task);
        } else {
            (0..count).for_each(task);
        }
        return;
    }
    for (col, cols) in (0..cut.cols.count).map(|index| cut.cols.span(index)) {
        let parts = Blocks::new(cols, K::COLS, 4 * threads);
        for start in starts() {
            let terms = terms_from(start);
            let lanes = K::lanes_of_columns(terms.1);
            with_buffer(&SHARED, cols.next_multiple_of(K::COLS) * lanes, |strips| {
                let strips = Output(strips);
                team::for_each(parts.count, |index| {
                    let (first, width) = parts.span(index);
                    // SAFETY: the columns are inside `b`, the part of the buffer is this task's own.
                    unsafe { K::pack_b(strips.at(first * lanes), columns, (col + first, width), terms) };
                });
                team::for_each(cut.rows.count, |index| {
                    block(cut.rows.span(index), (col, cols), start, Some(strips));
                });
            });
        }
    }
}

pub(super) type Lanes = RefCell<Vec<f32>>;

thread_local! {
    /// What a task packs for itself.
    pub(super) static OWN: Lanes = const { RefCell::new(Vec::new()) };
    /// What a product packs for all its tasks.
    static SHARED: Lanes = const { RefCell::new(Vec::new()) };
}

/// Lends one of the thread's buffers, of at least `len` lanes and aligned to 64 bytes.
pub(in crate::backend::flex) fn with_buffer(buffer: &'static LocalKey<Lanes>, len: usize, each: impl FnOnce(*mut f32)) {
    // Taken out: a thread that waits for tasks may take up another product's.
    let mut lanes = buffer.take();
    if lanes.len() < len + 16 {
        lanes = vec![0.0; len + 16];
    }
    let start = lanes.as_mut_ptr();
    each(start.wrapping_add(start.align_offset(64)));
    buffer.set(lanes);
}
