//! What the members of a group exchange in a step and for a checkpoint.

use std::cmp::Reverse;
use std::collections::HashMap;

use burn::module::{AutodiffModule, Module};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use llama_data::loader::Rank;
use llama_model::weights::{self, ParamMap, TrainedParam};
use llama_model::{LlamaBackend, TrainBackend};

use super::link::Frame;
use super::{Group, out_of_step};
use crate::optimizer::OptimizerState;
use crate::{GradientList, StepOutput, TrainError};

/// The rank that owns each parameter: the largest first, each to the rank that has least.
fn owners(lens: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lens.len()).collect();
    // Stable: equal ones stay in the model's order.
    order.sort_by_key(|index| Reverse(lens[*index]));
    let (mut owners, mut loads) = (vec![0; lens.len()], vec![0; ranks]);
    for index in order {
        owners[index] = (0..ranks).min_by_key(|rank| loads[*rank]).unwrap_or(0);
        loads[owners[index]] += lens[index];
    }
    owners
}

/// A parameter that is trained, flat.
pub(crate) struct Param {
    pub path: String,
    pub len: usize,
    owner: usize,
}

/// The parameters of a model that are trained, in its order, with their owners.
fn params<B: Backend, M: Module<B>>(model: &M, ranks: usize) -> Vec<Param> {
    let params = weights::trained_params(model);
    let lens: Vec<usize> = params.iter().map(TrainedParam::num_elements).collect();
    let owners = owners(&lens, ranks);
    let param = |((param, len), owner): ((TrainedParam, usize), usize)| Param { path: param.path, len, owner };
    params.into_iter().zip(lens).zip(owners).map(param).collect()
}

/// Those that a rank owns.
pub(crate) fn owned<B: Backend, M: Module<B>>(model: &M, rank: Rank) -> Vec<Param> {
    let mut params = params(model, rank.count as usize);
    params.retain(|param| param.owner as u64 == rank.index);
    params
}

/// A group that trains a model together.
pub(crate) struct Parallel {
    pub group: Group,
    params: Vec<Param>,
}

impl Parallel {
    pub fn new<B: Backend, M: Module<B>>(group: Group, model: &M) -> Self {
        let params = params(model, group.rank.count as usize);
        Self { group, params }
    }

    fn alone(&self) -> bool {
        self.group.rank.count == 1
    }

    fn me(&self) -> usize {
        self.group.rank.index as usize
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
        for Param { owner, .. } in &self.params {
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
        for Param { path, len, owner } in &self.params {
            let mine = grads.remove(path).map_or_else(|| vec![0.0; *len], floats);
            if *owner != self.me() {
                self.group.send(*owner, Frame::Floats(mine))?;
                continue;
            }
            let mut mine = Some(mine);
            let mut sum: Option<Vec<f32>> = None;
            for rank in 0..self.group.links.len() {
                let part = match mine.take_if(|_| rank == self.me()) {
                    Some(mine) => mine,
                    None => self.group.receive_floats(rank, *len)?,
                };
                match &mut sum {
                    Some(sum) => sum.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part),
                    None => sum = Some(part),
                }
            }
            let sum = TensorData::new(sum.unwrap_or_default(), [*len]);
            entries.push((path.clone(), Tensor::from_data(sum, &device)));
        }
        Ok(GradientList { entries })
    }

    /// Gives every parameter the value that its owner has. The module comes back whole, if not all current, with an error, too.
    pub fn share<B: TrainBackend, M: AutodiffModule<B>>(&self, module: M) -> (M, Result<(), TrainError>) {
        if self.alone() {
            return (module, Ok(()));
        }
        let mut share = Share { parallel: self, next: self.params.iter(), result: Ok(()) };
        (weights::map_params(module, &mut share), share.result)
    }

    /// The numbers of all members, of whom each has every `count`-th from its rank on, in their order.
    pub fn interleave(&self, own: &[f64]) -> Result<Vec<f64>, TrainError> {
        let all = self.group.all_numbers(own)?;
        let longest = all.iter().map(Vec::len).max().unwrap_or(0);
        Ok((0..longest).flat_map(|index| all.iter().filter_map(move |numbers| numbers.get(index).copied())).collect())
    }

    /// The moments of all members, at the first; the others give theirs away.
    pub fn gather(&self, mut state: OptimizerState) -> Result<OptimizerState, TrainError> {
        if !self.group.leads() {
            let moments = std::mem::take(&mut state.moments);
            let lens: Vec<(&String, usize)> = moments.iter().map(|(name, data)| (name, data.num_elements())).collect();
            let lens = serde_json::to_vec(&lens).expect("names and numbers have a JSON form");
            self.group.send(0, Frame::Bytes(lens))?;
            for data in moments.into_values() {
                self.group.send(0, Frame::Floats(vec_of(data)))?;
            }
            return Ok(state);
        }
        for (rank, _) in self.group.others() {
            let lens: Vec<(String, usize)> =
                serde_json::from_slice(&self.group.receive_bytes(rank)?).map_err(|_| out_of_step(rank))?;
            for (name, len) in lens {
                state.moments.insert(name, TensorData::new(self.group.receive_floats(rank, len)?, [len]));
            }
        }
        Ok(state)
    }
}

struct Share<'a> {
    parallel: &'a Parallel,
    next: std::slice::Iter<'a, Param>,
    result: Result<(), TrainError>,
}

impl<B: TrainBackend> ParamMap<B> for Share<'_> {
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        let Self { parallel, next, result } = self;
        // Parameters that are not trained are not among those.
        if result.is_err() || next.as_slice().first().is_none_or(|param| param.path != path) {
            return value;
        }
        let Some(Param { len, owner, .. }) = next.next() else { return value };
        if *owner == parallel.me() {
            let floats = floats(value.clone().inner().flatten::<1>(0, D - 1));
            let mut others = parallel.group.others().map(|(rank, _)| rank);
            *result = others.try_for_each(|rank| parallel.group.send(rank, Frame::Floats(floats.clone())));
            return value;
        }
        match parallel.group.receive_floats(*owner, *len) {
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

fn vec_of(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("converted to f32")
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_model::LlamaConfig;

    #[test]
    fn every_parameter_has_one_owner_and_loads_are_alike() {
        let model = LlamaConfig::preset("7b").unwrap();
        let (d, v) = (model.d_model, model.vocab_size);
        let mut lens = vec![v * d];
        for _ in 0..model.n_layers {
            lens.extend([d, d * d, d * d, d * d, d * d, d, d * model.d_ff, d * model.d_ff, d * model.d_ff]);
        }
        lens.extend([d, v * d]);
        for count in [1, 2, 3, 8, 16] {
            let mut loads = vec![0; count];
            owners(&lens, count).iter().zip(&lens).for_each(|(owner, len)| loads[*owner] += *len as u64);
            assert_eq!(loads.iter().sum::<u64>(), model.num_params());
            let even = model.num_params() / count as u64;
            assert!(*loads.iter().max().unwrap() < even + even / 10, "{count}: {loads:?}");
        }
    }
}
