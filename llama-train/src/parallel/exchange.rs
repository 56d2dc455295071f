//! What the members of a group know of each other's part of a step.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::backend::Backend;
use llama_model::LlamaBackend;

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

    /// Those that this member has, with their places in the model's order.
    pub(super) fn mine(&self) -> impl Iterator<Item = (usize, &Piece)> {
        let has = |(_, piece): &(usize, &Piece)| piece.is_of(self.group.me(), self.group.parts);
        self.pieces.iter().enumerate().filter(has)
    }

    /// Sums the counts of all members, and returns the norm of all gradients, of which this member has those that it updates by.
    pub fn sum<B: LlamaBackend>(&self, grads: &GradientList<B>, output: &mut StepOutput) -> Result<f64, TrainError> {
        self.group.check()?;
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
        Ok(sum.sqrt())
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
