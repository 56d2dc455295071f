//! Where the parameters and gradients of a step are, while they go between members and the model computes (paper, section 2.4).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::AutodiffModule;
use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{Tensor, TensorData};
use llama_model::backend::ops::tensor;
use llama_model::weights::{self, ParamMap};
use llama_model::{Llama, ParamHook, TrainBackend};

use super::background::{Background, Job, Read, Task};
use super::{Parallel, Piece};
use crate::{GradientList, TrainError};

/// Gradients go to their owners while the backward makes those of the layers before; new values go to everyone while the next forward computes
/// the layers before. All members have the same pieces on their way in the same order, so that nobody waits for somebody who waits.
pub(crate) struct Flow<B: TrainBackend> {
    parallel: Arc<Parallel>,
    /// The places, in the model's order, of the pieces that this member has, by path.
    mine: HashMap<String, usize>,
    device: B::Device,
    background: Background,
    state: Mutex<State<B>>,
}

struct State<B: TrainBackend> {
    /// Sums over the micro-batches so far.
    gradients: HashMap<usize, Tensor<B::InnerBackend, 1>>,
    /// Whether a step's last micro-batch is computed.
    last: bool,
    /// Pieces whose gradients are on their way.
    sent: HashSet<usize>,
    /// Pieces whose values are on their way to this member.
    awaited: HashSet<usize>,
    /// Values that the forward already has and the model not yet.
    arrived: HashMap<usize, FloatTensor<B::InnerBackend>>,
    /// What came before it was asked for.
    came: HashMap<usize, Vec<f32>>,
}

impl<B: TrainBackend> Flow<B> {
    /// For the members of a group; a device that trains alone has none.
    pub fn new(parallel: &Arc<Parallel>, model: &Llama<B>) -> Result<Option<Self>, TrainError> {
        if parallel.group.rank.count == 1 {
            return Ok(None);
        }
        let no_thread = |error| TrainError::Member {
            rank: parallel.group.me(),
            reason: format!("the system gives no thread to exchange with: {error}"),
        };
        let background = Background::new(parallel.clone()).map_err(no_thread)?;
        let state = State {
            gradients: HashMap::new(),
            last: false,
            sent: HashSet::new(),
            awaited: HashSet::new(),
            arrived: HashMap::new(),
            came: HashMap::new(),
        };
        Ok(Some(Self {
            parallel: parallel.clone(),
            mine: parallel.mine().map(|(place, piece)| (piece.path.clone(), place)).collect(),
            device: model.device(),
            background,
            state: Mutex::new(state),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this member updates a piece.
    fn owns(&self, piece: &Piece) -> bool {
        piece.owner == self.parallel.group.me()
    }

    /// From the next backward on, gradients go to their owners.
    pub fn send_gradients(&self) {
        self.state().last = true;
    }

    /// The gradients that this member updates by, summed over all members, after the last backward of a step.
    pub fn gradients(&self) -> Result<GradientList<B::InnerBackend>, TrainError> {
        let mut state = self.state();
        state.last = false;
        let sent = std::mem::take(&mut state.sent);
        // What took no part in the last micro-batch.
        for (place, piece) in self.parallel.mine().filter(|(place, _)| !sent.contains(place)) {
            let gradient = state.gradients.remove(&place);
            self.send(place, gradient.unwrap_or_else(|| Tensor::zeros([piece.len()], &self.device)));
        }
        let owned = self.parallel.mine().filter(|(_, piece)| self.owns(piece));
        let entries = owned.map(|(place, piece)| {
            let sum = TensorData::new(self.wait(place, &mut state)?, [piece.len()]);
            Ok((piece.path.clone(), Tensor::from_data(sum, &self.device)))
        });
        Ok(GradientList { entries: entries.collect::<Result<_, TrainError>>()? })
    }

    fn send(&self, place: usize, gradient: Tensor<B::InnerBackend, 1>) {
        self.background.push(Job { piece: place, task: Task::Sum(Read::begin(gradient)) });
    }

    /// What has come, or comes, of a piece.
    fn wait(&self, place: usize, state: &mut State<B>) -> Result<Vec<f32>, TrainError> {
        loop {
            if let Some(floats) = state.came.remove(&place) {
                return Ok(floats);
            }
            let (other, floats) = self.background.came()?;
            state.came.insert(other, floats);
        }
    }

    /// Sends everyone the values that this member has updated. The model comes back without those that others send it: a forward with this as its
    /// hook has them, and the model after [`settle`](Self::settle).
    pub fn share<M: AutodiffModule<B>>(&self, model: M) -> M {
        struct Share<'a, B: TrainBackend>(&'a Flow<B>);
        impl<B: TrainBackend> ParamMap<B> for Share<'_, B> {
            fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
                let flow = self.0;
                let Some(&place) = flow.mine.get(path) else { return value };
                if flow.owns(&flow.parallel.pieces[place]) {
                    let read = Read::begin(value.clone().inner());
                    flow.background.push(Job { piece: place, task: Task::Give(read) });
                    return value;
                }
                flow.background.push(Job { piece: place, task: Task::Get });
                flow.state().awaited.insert(place);
                Tensor::empty([1; D], &value.device())
            }
        }
        weights::map_params(model, &mut Share(self))
    }

    /// The model with all values that others send it.
    pub fn settle<M: AutodiffModule<B>>(&self, model: M) -> M {
        struct Settle<'a, B: TrainBackend>(&'a Flow<B>);
        impl<B: TrainBackend> ParamMap<B> for Settle<'_, B> {
            fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
                let flow = self.0;
                let Some(&place) = flow.mine.get(path) else { return value };
                let mut state = flow.state();
                let arrived = state.arrived.remove(&place).or_else(|| flow.value(place, &mut state));
                arrived.map_or(value, |value| Tensor::from_inner(tensor(value)))
            }
        }
        let settled = {
            let state = self.state();
            state.awaited.is_empty() && state.arrived.is_empty()
        };
        // As after all but the first micro-batch of a step.
        if settled { model } else { weights::map_params(model, &mut Settle(self)) }
    }

    /// The value of a piece, if it is on its way to this member.
    fn value(&self, place: usize, state: &mut State<B>) -> Option<FloatTensor<B::InnerBackend>> {
        if !state.awaited.remove(&place) {
            return None;
        }
        let piece = &self.parallel.pieces[place];
        let floats = self.wait(place, state).unwrap_or_else(|error| {
            self.parallel.group.lose(error);
            vec![f32::NAN; piece.len()]
        });
        let data = TensorData::new(floats, piece.dims.clone());
        Some(B::InnerBackend::float_from_data(data, &self.device))
    }
}

impl<B: TrainBackend> ParamHook<B> for Flow<B> {
    fn before_forward(&self, path: &str, value: FloatTensor<B>) -> FloatTensor<B> {
        let Some(&place) = self.mine.get(path) else { return value };
        let mut state = self.state();
        match self.value(place, &mut state) {
            Some(value) => {
                state.arrived.insert(place, value.clone());
                B::from_inner(value)
            }
            None => value,
        }
    }

    fn after_backward(&self, path: &str, gradient: FloatTensor<B>) {
        let Some(&place) = self.mine.get(path) else { return };
        let mut state = self.state();
        let flat = [self.parallel.pieces[place].len()].into();
        let mut gradient: Tensor<_, 1> = tensor(B::InnerBackend::float_reshape(B::inner(gradient), flat));
        if let Some(before) = state.gradients.remove(&place) {
            gradient = before + gradient;
        }
        if state.last {
            state.sent.insert(place);
            self.send(place, gradient);
        } else {
            state.gradients.insert(place, gradient);
        }
    }
}
