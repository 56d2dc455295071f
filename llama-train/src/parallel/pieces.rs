//! What of a model each member has, and who updates it.

use std::cmp::Reverse;

use burn::module::Module;
use burn::tensor::backend::Backend;
use llama_model::shard::{Shard, Split};
use llama_model::weights::{self, TrainedParam};

use super::Group;

/// A parameter that is trained, or a part of one that is divided: what some members have alike and one of them updates.
pub(crate) struct Piece {
    /// The parameter's.
    pub path: String,
    /// Shape of the piece.
    pub dims: Vec<usize>,
    /// Which part of a parameter that is divided.
    part: Option<usize>,
    /// Rank of who updates it.
    pub owner: usize,
}

impl Piece {
    /// Numbers it has.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether a member has it, where so many divide a model.
    pub fn is_of(&self, rank: usize, parts: usize) -> bool {
        self.part.is_none_or(|part| rank % parts == part)
    }

    /// What part it is of its parameter.
    pub fn shard(&self, parts: usize) -> Shard {
        self.part.map_or(Shard::WHOLE, |index| Shard { index, count: parts })
    }
}

/// Gives each piece an owner among those who have it: the largest first, each to the rank that has least.
fn assign(pieces: &mut [Piece], ranks: usize, parts: usize) {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    // Stable: equal ones stay in the model's order.
    order.sort_by_key(|index| Reverse(pieces[*index].len()));
    let mut loads = vec![0; ranks];
    for index in order {
        let piece = &mut pieces[index];
        let owner = (0..ranks).filter(|rank| piece.is_of(*rank, parts)).min_by_key(|rank| loads[*rank]);
        piece.owner = owner.unwrap_or(0);
        loads[piece.owner] += piece.len();
    }
}

/// All pieces of a model, of which this member has the parameters or a part of each, in the same order for all members.
pub(super) fn pieces<B: Backend, M: Module<B>>(model: &M, group: &Group) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for TrainedParam { path, dims, .. } in weights::trained_params(model) {
        let is_whole = group.parts == 1 || Split::of(&path) == Split::Whole;
        let parts = if is_whole { vec![None] } else { (0..group.parts).map(Some).collect() };
        pieces.extend(parts.into_iter().map(|part| Piece { path: path.clone(), dims: dims.clone(), part, owner: 0 }));
    }
    assign(&mut pieces, group.rank.count as usize, group.parts);
    pieces
}

/// Those that a member updates.
pub(crate) fn owned<B: Backend, M: Module<B>>(model: &M, group: &Group) -> Vec<Piece> {
    let mut pieces = pieces(model, group);
    pieces.retain(|piece| piece.owner as u64 == group.rank.index);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_model::LlamaConfig;

    #[test]
    fn pieces_are_owned_alike() {
        let model = LlamaConfig::preset("7b").unwrap();
        for (ranks, parts) in [(1, 1), (2, 1), (3, 1), (8, 1), (16, 1), (2, 2), (8, 2), (16, 8)] {
            let mut pieces = Vec::new();
            for (path, dims) in model.parameters() {
                let split = Split::of(&path);
                let count = if split == Split::Whole { 1 } else { parts };
                for part in 0..count {
                    let mut dims = dims.clone();
                    match split {
                        Split::Columns => dims[1] /= count,
                        _ => dims[0] /= count,
                    }
                    let part = (count > 1).then_some(part);
                    pieces.push(Piece { path: path.clone(), dims, part, owner: usize::MAX });
                }
            }
            assign(&mut pieces, ranks, parts);
            let mut loads = vec![0; ranks];
            for piece in &pieces {
                assert!(piece.is_of(piece.owner, parts));
                loads[piece.owner] += piece.len() as u64;
            }
            assert_eq!(loads.iter().sum::<u64>(), model.num_params());
            let even = model.num_params() / ranks as u64;
            // An embedding is large, and two members share what it lets them lack.
            assert!(*loads.iter().max().unwrap() < even + even / 8, "{ranks} by {parts}: {loads:?}");
        }
    }
}
