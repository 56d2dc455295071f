//! The gradients of a step as one flat list in the model's fixed order of parameters.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;
use llama_model::backend::ops::{primitive, tensor};
use llama_model::weights::{self, TrainedParam};
use llama_model::{LlamaBackend, TrainBackend};

/// One flat gradient for each parameter, by path. A fixed order makes sums reproducible, also those of several
/// devices.
pub struct GradientList<B: LlamaBackend> {
    /// Path in the model, and gradient.
    pub entries: Vec<(String, Tensor<B, 1>)>,
}

impl<B: LlamaBackend> Default for GradientList<B> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<B: LlamaBackend> GradientList<B> {
    /// Adds the gradients of a backward pass. A parameter that took no part counts as zero.
    pub fn accumulate<A, M>(&mut self, module: &M, mut grads: GradientsParams)
    where
        A: TrainBackend + AutodiffBackend<InnerBackend = B>,
        M: Module<A>,
    {
        let mut fresh = Vec::new();
        for TrainedParam { path, id, dims } in weights::trained_params(module) {
            fresh.push((path, take_gradient::<B>(&mut grads, id, &dims)));
        }
        if self.entries.is_empty() {
            self.entries = fresh.into_iter().filter_map(|(path, gradient)| Some((path, gradient?))).collect();
            return;
        }
        let mut sum = Vec::with_capacity(fresh.len());
        let mut old = std::mem::take(&mut self.entries).into_iter().peekable();
        for (path, gradient) in fresh {
            let before = old.next_if(|(old_path, _)| *old_path == path).map(|(_, gradient)| gradient);
            sum.extend(match (before, gradient) {
                (Some(a), Some(b)) => Some((path, a + b)),
                (a, b) => a.or(b).map(|gradient| (path, gradient)),
            });
        }
        self.entries = sum;
    }

    /// Global L2 norm over all parameters.
    pub fn norm(&self) -> f64 {
        self.squares().iter().sum::<f64>().sqrt()
    }

    /// Squared L2 norm of each.
    pub(crate) fn squares(&self) -> Vec<f64> {
        if self.entries.is_empty() {
            return Vec::new();
        }
        let gradients = self.entries.iter().map(|(_, g)| primitive(g.clone())).collect();
        // One transfer from the device for all of them.
        let squares = tensor::<B, 1>(B::sums_of_squares(gradients)).into_data().convert::<f64>();
        squares.iter::<f64>().collect()
    }
}

/// Takes a parameter's gradient, of whatever rank, as a flat tensor.
fn take_gradient<B: LlamaBackend>(
    grads: &mut GradientsParams,
    id: burn::module::ParamId,
    dims: &[usize],
) -> Option<Tensor<B, 1>> {
    let len = dims.iter().product::<usize>();
    match dims.len() {
        1 => grads.remove::<B, 1>(id),
        2 => grads.remove::<B, 2>(id).map(|g| g.reshape([len])),
        rank => unreachable!("LLaMA has no parameter of rank {rank}"),
    }
}
