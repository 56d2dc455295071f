//! What the members of a group exchange in a step.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use llama_model::weights::{self, ParamMap};
use llama_model::{LlamaBackend, TrainBackend};

use super::link::Frame;
use super::pieces::{Piece, pieces};
use super::{Group, out_of_step};
use crate::{GradientList, StepOutput, TrainError};

/// A group that trains a model together.
pub(crate) struct Parallel {
    pub group: Arc<Group>,
    pub(super) pieces: Vec<Piece>,
}

impl Parallel {
    pub fn new<B: Backend, M: Module<B>>(group: Arc<Group>, model: &M) -> Self {
        let pieces = pieces(model, &group);
        Self { group, pieces }
    }

    fn alone(&self) -> bool {
        self.group.rank.count == 1
    }

    pub(super) fn me(&self) -> usize {
        self.group.rank.index as usize
    }

    /// The pieces that this member has, in the model's order.
    fn mine(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|piece| piece.is_of(self.me(), self.group.parts))
    }

    /// Sums gradients and counts of all members. Returns the gradients that this member updates by, and the norm of all.
    pub fn reduce<B: LlamaBackend>(
        &self,
        grads: GradientList<B>,
        output: &mut StepOutput,
    ) -> Result<(GradientList<B>, f64), TrainError> {
        if self.alone() {
            let norm = grads.norm();
            return Ok((grads, norm));
        }
        self.group.check()?;
        let grads = self.sum(grads)?;
        let mut own = vec![output.loss_sum, output.tokens as f64, output.positions as f64];
        own.extend(grads.squares());
        let all = self.group.all_numbers(&own)?;
        (output.loss_sum, output.tokens, output.positions) = (0.0, 0, 0);
        let mut squares = Vec::new();
        for (rank, numbers) in all.iter().enumerate() {
            let [loss_sum, tokens, positions, rest @ ..] = numbers.as_slice() else { return Err(out_of_step(rank)) };
            output.loss_sum += loss_sum;
            output.tokens += *tokens as u64;
            output.positions += *positions as u64;
            squares.push(rest.iter());
        }
        // In the model's order, as one member alone would add them.
        let mut sum = 0.0;
        for Piece { owner, .. } in &self.pieces {
            sum += squares[*owner].next().ok_or_else(|| out_of_step(*owner))?;
        }
        Ok((grads, sum.sqrt()))
    }

    /// Sends gradients to their owners, who add them in the order of ranks. All go through the parameters in the same order, so that
    /// nobody waits for somebody who waits.
    fn sum<B: LlamaBackend>(&self, grads: GradientList<B>) -> Result<GradientList<B>, TrainError> {
        let device = grads.entries.first().map(|(_, gradient)| gradient.device()).unwrap_or_default();
        let mut grads: HashMap<String, Tensor<B, 1>> = grads.entries.into_iter().collect();
        let mut entries = Vec::new();
        for piece in self.mine() {
            let (Piece { path, owner, .. }, len) = (piece, piece.len());
            let mine = grads.remove(path).map_or_else(|| vec![0.0; len], floats);
            if *owner != self.me() {
                self.group.send(*owner, Frame::Floats(mine))?;
                continue;
            }
            let mut mine = Some(mine);
            let mut sum: Option<Vec<f32>> = None;
            for rank in (0..self.group.links.len()).filter(|rank| piece.is_of(*rank, self.group.parts)) {
                let part = match mine.take_if(|_| rank == self.me()) {
                    Some(mine) => mine,
                    None => self.group.receive_floats(rank, len)?,
                };
                match &mut sum {
                    Some(sum) => sum.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part),
                    None => sum = Some(part),
                }
            }
            let sum = TensorData::new(sum.unwrap_or_default(), [len]);
            entries.push((path.clone(), Tensor::from_data(sum, &device)));
        }
        Ok(GradientList { entries })
    }

    /// Gives every piece the value that its owner has. The module comes back whole, if not all current, with an error, too.
    pub fn share<B: TrainBackend, M: AutodiffModule<B>>(&self, module: M) -> (M, Result<(), TrainError>) {
        if self.alone() {
            return (module, Ok(()));
        }
        let mut share = Share { parallel: self, pieces: self.mine().collect(), result: Ok(()) };
        share.pieces.reverse();
        (weights::map_params(module, &mut share), share.result)
    }

    /// The losses or counts of batches: every replica has each `count`-th of them from its own on, and its members have parts of each. In the
    /// order of batches.
    pub fn interleave(&self, own: &[f64]) -> Result<Vec<f64>, TrainError> {
        self.group.check()?;
        let all = self.group.all_numbers(own)?;
        let replicas: Vec<_> = all.chunks(self.group.parts).collect();
        let longest = all.iter().map(Vec::len).max().unwrap_or(0);
        let batch = |index: usize| {
            let of_replica = move |members: &&[Vec<f64>]| {
                members.iter().map(|numbers| numbers.get(index).copied()).sum::<Option<f64>>()
            };
            replicas.iter().filter_map(of_replica).collect::<Vec<_>>()
        };
        Ok((0..longest).flat_map(batch).collect())
    }
}

struct Share<'a> {
    parallel: &'a Parallel,
    /// Those to come, the next one last.
    pieces: Vec<&'a Piece>,
    result: Result<(), TrainError>,
}

impl<B: TrainBackend> ParamMap<B> for Share<'_> {
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        let Self { parallel, pieces, result } = self;
        // Parameters that are not trained are not among those.
        let Some(piece) = pieces.pop_if(|piece| result.is_ok() && piece.path == path) else { return value };
        let (group, me) = (&parallel.group, parallel.me());
        if piece.owner == me {
            let floats = floats(value.clone().inner().flatten::<1>(0, D - 1));
            let mut others =
                group.others().map(|(rank, _)| rank).filter(|rank| piece.is_of(*rank, parallel.group.parts));
            *result = others.try_for_each(|rank| group.send(rank, Frame::Floats(floats.clone())));
            return value;
        }
        match group.receive_floats(piece.owner, piece.len()) {
            Ok(floats) => {
                let data = TensorData::new(floats, value.dims());
                Tensor::from_inner(Tensor::from_data(data, &value.device()))
            }
            Err(error) => {
                *result = Err(error);
                value
            }
        }
    }
}

fn floats<B: Backend>(tensor: Tensor<B, 1>) -> Vec<f32> {
    vec_of(tensor.into_data())
}

pub(super) fn vec_of(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("converted to f32")
}
