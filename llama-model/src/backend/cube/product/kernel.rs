//! The kernels: copies, operands and sums of a tile.

use cubecl::cmma::MmaDefinition;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::barrier::{Barrier, copy_async_checked};
use cubecl::prelude::*;

use super::super::mma::{Eight, Fragment, Pair, Sums, WIDTH, fragment, half, zeros};

/// Values along the summed dimension that a step multiplies.
pub(super) const DEPTH: usize = 64;
/// Steps in shared memory.
const STAGES: usize = 3;
/// Side of a plane's square of the result.
pub(super) const SIDE: usize = 64;
pub(super) const TILE_ROWS: usize = 2 * SIDE;
/// Squares of an instruction along that side.
const ACROSS: usize = SIDE / 16;
/// The same along the sum.
const DEPTHS: usize = DEPTH / 16;
/// Blocks of a plane in a step: 64 × 16 of its result, 16 values along the sum.
const BLOCKS: usize = DEPTHS * ACROSS;
/// Row tiles whose columns are done together, so that what they read stays in the cache.
const GROUP: usize = 16;

/// An operand of a product and how it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Whether the summed dimension is the contiguous one.
    pub(super) summed_inner: bool,
    /// Rows or columns of the result in a tile.
    pub(super) side: usize,
}

impl Layout {
    /// Lines of a tile in shared memory, and vectors of each.
    fn tile(self) -> (usize, usize) {
        if self.summed_inner { (self.side, DEPTH / 8) } else { (DEPTH, self.side / 8) }
    }

    /// Vectors from a line to the next: one more than it has, so that eight lines lie in different banks.
    fn pitch(self) -> usize {
        self.tile().1 + 1
    }

    /// Copies that a unit makes of a tile, a vector each.
    fn pieces(self, units: usize) -> usize {
        self.tile().0 * self.tile().1 / units
    }

    /// Vectors of a step in shared memory.
    fn step(self) -> usize {
        self.tile().0 * self.pitch()
    }
}

/// The block of a step after which a piece of a later one is copied: they take turns with the products, from the first block on.
fn piece_block(piece: usize, pieces: usize) -> usize {
    piece * (BLOCKS - 3) / pieces
}

/// Lines of an operand as it is stored, and the vectors of each.
#[cube]
fn lines(side: usize, summed: usize, #[comptime] layout: Layout) -> (usize, usize) {
    if comptime!(layout.summed_inner) { (side, summed / 8) } else { (summed, side / 8) }
}

/// Begins to copy a piece of a tile, a vector for each unit; zeros behind the operand's end.
#[cube]
fn copy<E: Float>(
    from: &Array<Vector<E, Eight>>,
    to: &mut SharedMemory<Vector<E, Eight>>,
    shape: (usize, usize),
    side: usize,
    summed: usize,
    #[comptime] piece: usize,
    #[comptime] base: usize,
    #[comptime] units: usize,
    #[comptime] layout: Layout,
) {
    let (_, vectors) = comptime!(layout.tile());
    let (lines, line_length) = shape;
    let mut first_line = summed;
    let mut first_vector = side / 8;
    if comptime!(layout.summed_inner) {
        first_line = side;
        first_vector = summed / 8;
    }
    let tile_line = UNIT_POS as usize / vectors + comptime!(piece * units / vectors);
    let tile_vector = UNIT_POS as usize % vectors;
    let (line, vector) = (first_line + tile_line, first_vector + tile_vector);
    let inside = line < lines && vector < line_length;
    let start = select(inside, line * line_length + vector, 0);
    let source = from.slice(start, start + usize::cast_from(inside));
    let at = comptime!(base) + tile_line * comptime!(layout.pitch()) + tile_vector;
    copy_async_checked(&source, &mut to.slice_mut(at, at + 1), 8u32);
}

/// 16 × 16 values of a tile: from `side` on of the result's rows or columns, from `summed` on of the step. The first two of its squares
/// follow each other along the side if `side_first`, as a left operand has them, else along the sum, as two right operands have them.
#[cube]
fn square<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, Eight>>,
    side: usize,
    #[comptime] base: usize,
    #[comptime] summed: usize,
    #[comptime] side_first: bool,
    #[comptime] layout: Layout,
) -> Fragment<E> {
    let lane = UNIT_POS_PLANE as usize;
    let pitch = comptime!(layout.pitch());
    let mut at = comptime!(base + summed / 8) + side * pitch;
    if comptime!(!layout.summed_inner) {
        at = comptime!(base + summed * layout.pitch()) + side / 8;
    }
    // The first two squares are one below the other in lines, or side by side.
    if comptime!(layout.summed_inner == side_first) {
        at += lane % 16 * pitch + lane / 16;
    } else {
        at += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2;
    }
    fragment(definition, tile, at, comptime!(!layout.summed_inner))
}

/// A plane's operand for one side at one place of the sum, to where another was.
#[cube]
fn refill<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    fragments: &mut Sequence<Fragment<E>>,
    tile: &SharedMemory<Vector<E, Eight>>,
    side: usize,
    #[comptime] base: usize,
    #[comptime] summed: usize,
    #[comptime] side_first: bool,
    #[comptime] layout: Layout,
) {
    #[unroll]
    for i in 0..fragments.len() {
        let square = square(definition, tile, side + i * 16, base, summed, side_first, layout);
        let fragment = fragments.index_mut(i);
        #[unroll]
        for register in 0..4usize {
            fragment[register] = square[register];
        }
    }
}

/// Adds the products of a plane's rows with 16 columns, those of number `across`, to its results.
#[cube]
fn multiply<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    left: &Sequence<Fragment<E>>,
    right: &Fragment<E>,
    results: &mut Sequence<Sequence<Sums>>,
    #[comptime] across: usize,
) {
    let (first, second) = (half(right, 0usize, 1usize), half(right, 2usize, 3usize));
    #[unroll]
    for i in 0..ACROSS {
        let sums = results.index_mut(i);
        definition.execute_inplace(left.index(i), &first, sums.index_mut(comptime!(2 * across)));
        definition.execute_inplace(left.index(i), &second, sums.index_mut(comptime!(2 * across + 1)));
    }
}

/// Room for operands.
#[cube]
fn room<E: Float>(#[comptime] count: usize) -> Sequence<Fragment<E>> {
    let mut fragments = Sequence::<Fragment<E>>::new();
    #[unroll]
    for _ in 0..count {
        fragments.push(Array::<Vector<E, Pair>>::new(4usize));
    }
    fragments
}

#[cube(launch_unchecked)]
pub(super) fn product_kernel<E: Float, O: Float>(
    a: &Array<Vector<E, Eight>>,
    b: &Array<Vector<E, Eight>>,
    out: &mut Array<Vector<O, Pair>>,
    n_rows: usize,
    n_columns: usize,
    summed: usize,
    splits: usize,
    part: usize,
    #[comptime] rows: Layout,
    #[comptime] columns: Layout,
    #[comptime] add: bool,
    #[define(E, O)] _dtypes: [StorageType; 2],
) {
    let units = comptime!(rows.side / SIDE * (columns.side / SIDE) * 32);
    let row_tiles = n_rows.div_ceil(rows.side);
    let column_tiles = n_columns.div_ceil(columns.side);
    let split = CUBE_POS / (row_tiles * column_tiles);
    if split >= splits {
        terminate!();
    }
    let tile = CUBE_POS % (row_tiles * column_tiles);
    let group = tile / (GROUP * column_tiles);
    let group_rows = min(row_tiles - group * GROUP, GROUP);
    let first_row = (group * GROUP + tile % (GROUP * column_tiles) % group_rows) * rows.side;
    let first_column = tile % (GROUP * column_tiles) / group_rows * columns.side;
    let begin = split * part;
    let steps = (min(begin + part, summed) - begin).div_ceil(DEPTH);

    let plane = UNIT_POS as usize / 32;
    let planes_across = comptime!(columns.side / SIDE);
    let row = plane / planes_across * SIDE;
    let column = plane % planes_across * SIDE;

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut a_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(STAGES * rows.step()), 16usize);
    let mut b_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(STAGES * columns.step()), 16usize);
    let a_shape = lines(n_rows, summed, rows);
    let b_shape = lines(n_columns, summed, columns);
    let a_pieces = comptime!(rows.pieces(units));
    let b_pieces = comptime!(columns.pieces(units));
    let mut arrived = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for stage in 0..STAGES {
        arrived.push(Barrier::shared(CUBE_DIM, UNIT_POS == 0));
        if stage < comptime!(STAGES - 1) && stage < steps {
            let at = begin + stage * DEPTH;
            #[unroll]
            for piece in 0..a_pieces {
                copy(a, &mut a_tile, a_shape, first_row, at, piece, comptime!(stage * rows.step()), units, rows);
            }
            #[unroll]
            for piece in 0..b_pieces {
                copy(
                    b,
                    &mut b_tile,
                    b_shape,
                    first_column,
                    at,
                    piece,
                    comptime!(stage * columns.step()),
                    units,
                    columns,
                );
            }
            arrived.index(stage).commit_copy_async();
            arrived.index(stage).arrive();
        }
    }

    let mut results = Sequence::<Sequence<Sums>>::new();
    #[unroll]
    for _ in 0..ACROSS {
        results.push(zeros(SIDE));
    }
    // Operands of a block of 64 × 16 of the result, and of the next, which are read before the products of the first hide the wait.
    let (mut left, mut right) = (Sequence::<Sequence<Fragment<E>>>::new(), Sequence::<Sequence<Fragment<E>>>::new());
    #[unroll]
    for _ in 0..2usize {
        left.push(room(ACROSS));
        right.push(room(1usize));
    }
    arrived.index(0usize).wait_parity(0u32);
    refill(&definition, left.index_mut(0usize), &a_tile, row, 0usize, 0usize, true, rows);
    refill(&definition, right.index_mut(0usize), &b_tile, column, 0usize, 0usize, false, columns);
    for round in 0..steps.div_ceil(STAGES) {
        #[unroll]
        for stage in 0..STAGES {
            let step = round * STAGES + stage;
            if step < steps {
                // The step whose place this one's predecessor leaves.
                let coming = step + comptime!(STAGES - 1);
                let place = comptime!((stage + STAGES - 1) % STAGES);
                let coming_at = begin + coming * DEPTH;
                #[unroll]
                for block in 0..BLOCKS {
                    let (depth, across) = comptime!((block / ACROSS, block % ACROSS));
                    // The block that follows: of this step, or the first of the next.
                    let next = comptime!((block + 1) % BLOCKS);
                    let next_stage = comptime!(if next == 0 { (stage + 1) % STAGES } else { stage });
                    if comptime!(next > 0) || step + 1 < steps {
                        let (at, base) = comptime!((next / ACROSS * 16, next_stage * columns.step()));
                        let right = right.index_mut(comptime!(next % 2));
                        refill(&definition, right, &b_tile, column + next % ACROSS * 16, base, at, false, columns);
                    }
                    // A depth's rows are read two blocks before it begins, those of the next step when it has arrived.
                    if comptime!(across + 2 == ACROSS) {
                        let next = comptime!((depth + 1) % DEPTHS);
                        let next_stage = comptime!(if next == 0 { (stage + 1) % STAGES } else { stage });
                        let (at, base) = comptime!((next * 16, next_stage * rows.step()));
                        if comptime!(next > 0) || step + 1 < steps {
                            if comptime!(next == 0) {
                                let rounds = comptime!((stage + 1) / STAGES) + round;
                                arrived.index(next_stage).wait_parity(rounds as u32 % 2);
                            }
                            refill(
                                &definition,
                                left.index_mut(comptime!(next % 2)),
                                &a_tile,
                                row,
                                base,
                                at,
                                true,
                                rows,
                            );
                        }
                    }
                    let both = right.index(comptime!(block % 2)).index(0usize);
                    multiply(&definition, left.index(comptime!(depth % 2)), both, &mut results, across);
                    if comptime!(block == 0) {
                        // All have multiplied the step before, whose place is filled now.
                        sync_cube();
                    }
                    if coming < steps {
                        #[unroll]
                        for piece in 0..comptime!(a_pieces + b_pieces) {
                            if comptime!(block == piece_block(piece, a_pieces + b_pieces)) {
                                if comptime!(piece < a_pieces) {
                                    let base = comptime!(place * rows.step());
                                    copy(a, &mut a_tile, a_shape, first_row, coming_at, piece, base, units, rows);
                                } else {
                                    let (piece, base) = comptime!((piece - a_pieces, place * columns.step()));
                                    copy(b, &mut b_tile, b_shape, first_column, coming_at, piece, base, units, columns);
                                }
                            }
                        }
                        if comptime!(block + 3 == BLOCKS) {
                            arrived.index(place).commit_copy_async();
                            arrived.index(place).arrive();
                        }
                    }
                }
            }
        }
    }

    let row = first_row + row + UNIT_POS_PLANE as usize / 4;
    let column = first_column + column + UNIT_POS_PLANE as usize % 4 * 2;
    #[unroll]
    for i in 0..ACROSS {
        let sums = results.index(i);
        #[unroll]
        for which in 0..2usize {
            let row = row + i * 16 + which * 8;
            #[unroll]
            for j in 0..comptime!(SIDE / WIDTH) {
                let column = column + j * WIDTH;
                if row < n_rows && column < n_columns {
                    let at = ((split * n_rows + row) * n_columns + column) / 2;
                    let mut sum = sums.index(j)[which];
                    if comptime!(add) {
                        sum += Vector::cast_from(out[at]);
                    }
                    out[at] = Vector::cast_from(sum);
                }
            }
        }
    }
}

#[cube(launch_unchecked)]
pub(super) fn add_parts_kernel<O: Float, N: Size>(
    parts: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<O, N>>,
    #[comptime] count: usize,
    #[comptime] add: bool,
    #[define(O)] _dtype: StorageType,
) {
    let length = out.len();
    if ABSOLUTE_POS < length {
        let mut sum = parts[ABSOLUTE_POS];
        #[unroll]
        for part in 1..count {
            sum += parts[part * length + ABSOLUTE_POS];
        }
        if comptime!(add) {
            sum += Vector::cast_from(out[ABSOLUTE_POS]);
        }
        out[ABSOLUTE_POS] = Vector::cast_from(sum);
    }
}
