//! Keys and values as right operands, packed once for all queries and heads that read them.

use std::cell::RefCell;

use super::super::product::{Operand, Packing, Right, with_buffer};
use super::super::vector::LINE;
use super::super::{Buffer, Output, team};
use super::{Heads, K_TILE, Sizes};

/// Tiles of all heads, each an operand of its own.
pub(super) struct Tiles {
    packing: Packing,
    tiles: Buffer,
    /// Lanes of a tile.
    lanes: usize,
    sizes: Sizes,
    /// Whether rows are columns of the operand, or terms.
    columns: bool,
}

impl Tiles {
    /// Rows of heads as columns, for scores.
    pub fn columns<T: Operand>(packing: Packing, sizes: &Sizes, heads: &Heads<T>) -> Self {
        Self::new(packing, sizes, heads, true)
    }

    /// Rows of heads as terms, for sums of them.
    pub fn terms<T: Operand>(packing: Packing, sizes: &Sizes, heads: &Heads<T>) -> Self {
        Self::new(packing, sizes, heads, false)
    }

    fn new<T: Operand>(packing: Packing, sizes: &Sizes, heads: &Heads<T>, columns: bool) -> Self {
        let &Sizes { batch, kv_len, n_kv_heads, head_dim, .. } = sizes;
        let most = K_TILE.min(kv_len);
        let lanes = match columns {
            true => packing.right_lanes(most, head_dim),
            false => packing.right_lanes(head_dim, most),
        };
        let per_head = kv_len.div_ceil(K_TILE);
        // SAFETY: what is read of a tile is written below.
        let mut tiles = unsafe { Buffer::unwritten(batch * n_kv_heads * per_head * lanes) };
        let out = Output(tiles.as_mut_ptr());
        team::for_each(batch * n_kv_heads * per_head, |index| {
            let (head, start) = (index / per_head, index % per_head * K_TILE);
            let rows = heads.tile(head / n_kv_heads, head % n_kv_heads, start, K_TILE.min(kv_len - start));
            // SAFETY: there is room for a tile, which is this task's own.
            unsafe { packing.right(out.at(index * lanes), if columns { rows.transposed() } else { rows }) };
        });
        Self { packing, tiles, lanes, sizes: *sizes, columns }
    }

    /// The tile of a head from this key on.
    pub fn tile(&self, batch: usize, head: usize, start: usize) -> Right {
        let Sizes { kv_len, n_kv_heads, head_dim, .. } = self.sizes;
        let index = (batch * n_kv_heads + head) * kv_len.div_ceil(K_TILE) + start / K_TILE;
        let rows = K_TILE.min(kv_len - start);
        let tile = self.tiles[index * self.lanes..].as_ptr();
        self.packing.packed_right(tile, if self.columns { [head_dim, rows] } else { [rows, head_dim] })
    }
}

/// Lends a thread's room for operands and results, so many lanes for each, on the boundary of a cache line.
pub(super) fn with_scratch<const N: usize>(lens: [usize; N], each: impl FnOnce([*mut f32; N])) {
    thread_local! {
        static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let lens = lens.map(|len| len.next_multiple_of(LINE));
    with_buffer(&ROOM, lens.iter().sum(), |mut room| {
        each(lens.map(|len| {
            let part = room;
            room = room.wrapping_add(len);
            part
        }));
    });
}
