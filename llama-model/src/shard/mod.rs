//! A model divided among devices: tensor and sequence parallelism (paper, section 2.4; Korthikanti et al. 2022, section 4.2.2).
//!
//! Each member of a team has a share of every block's heads and inner features: rows of `wq`, `wk`, `wv`, `w1` and `w3`, columns of `wo` and
//! `w2`. What lies between those products is divided by tokens: a member adds to, normalises and scores rows of its own. So nothing
//! is computed twice, and every activation is divided.
//!
//! ```text
//! own rows ─ norm ─ gather ─ wq wk wv ─ attention ─ wo ─ scatter_sum ─ + ─ norm ─ gather ─ w1 w3 ─ swiglu ─ w2 ─ scatter_sum ─ +
//!                   all rows, own heads                  own rows               all rows, own features          own rows
//! ```
//!
//! `gather` and `scatter_sum` are each the other's backward. Embedding, head and gains of norms are whole on every member; each makes the
//! gradients of its own rows, and who drives the training sums them.
//!
//! Inference with a cache, whose new tokens are few, has all rows on every member and adds up products instead.

mod team;

use std::ops::Range;

use burn::tensor::TensorData;

pub(crate) use team::Pending;
pub use team::{Collective, Team};

use crate::copy::concat;

/// One part of what is divided, of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub index: usize,
    /// Parts in all.
    pub count: usize,
}

impl Shard {
    /// What is not divided.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// This part of `0..total`; parts differ by one in length where `total` is no multiple of their number.
    pub fn range(&self, total: usize) -> Range<usize> {
        total * self.index / self.count..total * (self.index + 1) / self.count
    }

    fn all(self) -> impl Iterator<Item = Self> {
        (0..self.count).map(move |index| Self { index, ..self })
    }

    fn others(self) -> impl Iterator<Item = Self> {
        self.all().filter(move |other| *other != self)
    }
}

/// How a parameter is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// It is not: every member has it.
    Whole,
    /// By outputs.
    Rows,
    /// By inputs.
    Columns,
}

impl Split {
    /// That of the parameter at a path.
    pub fn of(path: &str) -> Self {
        match path.strip_suffix(".weight").and_then(|path| path.rsplit('.').next()) {
            Some("wq" | "wk" | "wv" | "w1" | "w3") => Self::Rows,
            Some("wo" | "w2") => Self::Columns,
            _ => Self::Whole,
        }
    }

    /// The shape of each of `count` parts of a matrix.
    pub(crate) fn part_dims(self, [rows, columns]: [usize; 2], count: usize) -> [usize; 2] {
        match self {
            Self::Whole => [rows, columns],
            Self::Rows => [rows / count, columns],
            Self::Columns => [rows, columns / count],
        }
    }

    /// Numbers in each of `count` parts of what has `dims`.
    pub fn part_len(self, dims: &[usize], count: usize) -> usize {
        let whole: usize = dims.iter().product();
        if self == Self::Whole { whole } else { whole / count }
    }

    /// The shape of the whole, of which a part of `count` has `dims`.
    pub fn whole_dims(self, dims: &[usize], count: usize) -> Vec<usize> {
        let mut dims = dims.to_vec();
        match self {
            Self::Whole => {}
            Self::Rows => dims[0] *= count,
            Self::Columns => dims[1] *= count,
        }
        dims
    }

    /// A part of the whole.
    pub fn cut(self, whole: TensorData, shard: Shard) -> TensorData {
        if self == Self::Whole || shard.count == 1 {
            return whole;
        }
        let [rows, columns] = whole.shape.dims();
        let (size, bytes) = (whole.dtype.size(), whole.as_bytes());
        let row = columns * size;
        match self {
            Self::Columns => {
                let part = shard.range(columns);
                let rows_of_part = bytes.chunks_exact(row).map(|row| &row[part.start * size..part.end * size]);
                concat(whole.dtype, rows_of_part, &[rows, part.len()])
            }
            _ => {
                let part = shard.range(rows);
                concat(whole.dtype, [&bytes[part.start * row..part.end * row]], &[part.len(), columns])
            }
        }
    }

    /// The whole of all its parts, in their order.
    ///
    /// # Panics
    /// Without parts.
    pub fn join(self, mut parts: Vec<TensorData>) -> TensorData {
        if self == Self::Whole || parts.len() == 1 {
            return parts.swap_remove(0);
        }
        let dtype = parts[0].dtype;
        let dims = self.whole_dims(&parts[0].shape, parts.len());
        match self {
            Self::Columns => {
                let row = |part: &TensorData| part.shape[1] * dtype.size();
                let of_row = |index| parts.iter().map(move |part| &part.as_bytes()[index * row(part)..][..row(part)]);
                concat(dtype, (0..dims[0]).flat_map(of_row), &dims)
            }
            _ => concat(dtype, parts.iter().map(TensorData::as_bytes), &dims),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_whole() {
        for total in [0, 1, 5, 12] {
            for count in 1..=4 {
                let parts: Vec<_> = Shard { index: 0, count }.all().flat_map(|shard| shard.range(total)).collect();
                assert_eq!(parts, (0..total).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_cut_can_be_joined() {
        let whole = TensorData::new((0..24).map(|n| n as f32).collect(), [4, 6]);
        for (path, split, second) in [
            ("layers.0.attention.wk.weight", Split::Rows, vec![12.0, 13.0, 14.0, 15.0, 16.0, 17.0]),
            ("layers.11.feed_forward.w2.weight", Split::Columns, vec![3.0, 4.0, 5.0, 9.0, 10.0, 11.0]),
            ("layers.0.attention_norm.weight", Split::Whole, vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
            ("tok_embeddings.weight", Split::Whole, vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ] {
            assert_eq!(Split::of(path), split);
            for count in [1, 2] {
                let parts: Vec<_> =
                    Shard { index: 0, count }.all().map(|shard| split.cut(whole.clone(), shard)).collect();
                if count == 2 {
                    assert_eq!(parts[1].to_vec::<f32>().unwrap()[..6], second);
                }
                assert_eq!(split.whole_dims(&parts[0].shape, count), [4, 6]);
                assert_eq!(split.join(parts), whole);
            }
        }
    }
}
