//! AdamW (Loshchilov and Hutter 2019; hyper-parameters of the paper's section 2.3), with weight decay by group.

use std::collections::{BTreeMap, HashMap};

use burn::module::AutodiffModule;
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::record::Record;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorData};
use llama_model::backend::AdamWStep;
use llama_model::backend::ops::{primitive, tensor};
use llama_model::weights::{self, ParamMap};
use llama_model::{LlamaBackend, TrainBackend};

use crate::{GradientList, OptimizerConfig};

/// AdamW with its state: one pair of moments for each parameter, by path.
#[derive(Clone)]
pub struct AdamW<B: TrainBackend> {
    config: OptimizerConfig,
    /// Updates made.
    step: u64,
    moments: BTreeMap<String, Moments<B::InnerBackend>>,
}

/// Which moment of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The mean.
    First,
    /// The mean of squares.
    Second,
}

impl Moment {
    /// Its name in a file: `<path>.m` or `<path>.v`.
    pub fn name(self, path: &str) -> String {
        match self {
            Self::First => format!("{path}.m"),
            Self::Second => format!("{path}.v"),
        }
    }
}

/// First and second moment of a parameter, flat.
#[derive(Clone)]
struct Moments<B: Backend> {
    m: Tensor<B, 1>,
    v: Tensor<B, 1>,
}

impl<B: TrainBackend> AdamW<B> {
    /// An optimizer before its first update.
    pub fn new(config: OptimizerConfig) -> Self {
        Self { config, step: 0, moments: BTreeMap::new() }
    }

    /// Its hyper-parameters.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Updates made so far.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Updates every parameter that has a gradient. Gradients are multiplied by `grad_scale` first: the loss
    /// normalisation and the clip.
    ///
    /// In place where the module and `grads` are the only owners of their buffers.
    pub fn update<M: AutodiffModule<B>>(
        &mut self,
        lr: f64,
        module: M,
        grads: GradientList<B::InnerBackend>,
        grad_scale: f64,
    ) -> M {
        self.step += 1;
        let grads = grads.entries.into_iter().collect();
        let mut taken = Take { moments: &mut self.moments, grads, groups: Default::default() };
        let module = weights::map_params(module, &mut taken);
        let groups = taken.groups;
        // Decay groups: matrices, and the norm gains (the only vectors) if asked for.
        let decays = [self.config.decay_norms, true].map(|decays| if decays { self.config.weight_decay } else { 0.0 });
        let mut updated = HashMap::new();
        for (DecayGroup { paths, tensors }, weight_decay) in groups.into_iter().zip(decays) {
            let OptimizerConfig { beta_1, beta_2, epsilon, .. } = self.config;
            let step = AdamWStep { lr, beta_1, beta_2, epsilon, weight_decay, step: self.step, grad_scale };
            for (path, [param, m, v]) in paths.into_iter().zip(B::InnerBackend::adamw(tensors, &step)) {
                self.moments.insert(path.clone(), Moments { m: tensor(m), v: tensor(v) });
                updated.insert(path, param);
            }
        }
        weights::map_params(module, &mut Put(updated))
    }

    /// Factor that brings a gradient of global norm `norm` to at most the configured clip.
    pub fn clip_factor(&self, norm: f64) -> f64 {
        (self.config.clip / (norm + 1e-6)).min(1.0)
    }

    /// A moment of a parameter, flat, on the host. None before its first update.
    pub fn moment(&self, moment: Moment, path: &str) -> Option<TensorData> {
        let Moments { m, v } = self.moments.get(path)?;
        Some(match moment {
            Moment::First => m.to_data(),
            Moment::Second => v.to_data(),
        })
    }

    /// The optimizer of a checkpoint, after `step` updates: both moments, flat, of parameters by path.
    ///
    /// # Errors
    /// Those of reading the moments.
    pub fn from_moments<E>(
        config: OptimizerConfig,
        step: u64,
        moments: impl IntoIterator<Item = Result<(String, [TensorData; 2]), E>>,
        device: &B::Device,
    ) -> Result<Self, E> {
        let place = |(path, both): (String, [TensorData; 2])| {
            let [m, v] = both.map(|data| Tensor::from_data(data, device));
            (path, Moments { m, v })
        };
        let moments = moments.into_iter().map(|read| read.map(place)).collect::<Result<_, E>>()?;
        Ok(Self { config, step, moments })
    }
}

/// Parameters that are updated alike: their paths, and of each parameter, gradient and moments.
struct DecayGroup<B: Backend> {
    paths: Vec<String>,
    tensors: Vec<[FloatTensor<B>; 4]>,
}

impl<B: Backend> Default for DecayGroup<B> {
    fn default() -> Self {
        Self { paths: Vec::new(), tensors: Vec::new() }
    }
}

/// Takes the parameters that have a gradient out of a module: then nobody else holds them, and the update is in place.
struct Take<'a, B: TrainBackend> {
    moments: &'a mut BTreeMap<String, Moments<B::InnerBackend>>,
    grads: HashMap<String, Tensor<B::InnerBackend, 1>>,
    /// Vectors and matrices.
    groups: [DecayGroup<B::InnerBackend>; 2],
}

impl<B: TrainBackend> ParamMap<B> for Take<'_, B> {
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        let Some(grad) = self.grads.remove(path) else { return value };
        let new = || Moments { m: Tensor::zeros_like(&grad), v: Tensor::zeros_like(&grad) };
        let Moments { m, v } = self.moments.remove(path).unwrap_or_else(new);
        let place = Tensor::empty([1; D], &value.device());
        let DecayGroup { paths, tensors } = &mut self.groups[usize::from(D > 1)];
        paths.push(path.into());
        tensors.push([primitive(value.inner()), primitive(grad), primitive(m), primitive(v)]);
        place
    }
}

/// Puts parameters into their places.
struct Put<B: TrainBackend>(HashMap<String, FloatTensor<B::InnerBackend>>);

impl<B: TrainBackend> ParamMap<B> for Put<B> {
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        match self.0.remove(path) {
            Some(param) => Tensor::from_inner(tensor::<B::InnerBackend, D>(param)),
            None => value,
        }
    }
}

/// Record of [`AdamW`] for burn-train's own checkpointer; this crate's checkpoints do not go through it.
#[derive(Record)]
pub struct AdamWRecord<B: Backend> {
    step: usize,
    paths: Vec<String>,
    m: Vec<Tensor<B, 1>>,
    v: Vec<Tensor<B, 1>>,
}

impl<B: TrainBackend, M: AutodiffModule<B>> Optimizer<M, B> for AdamW<B> {
    type Record = AdamWRecord<B>;

    /// One update with the global clip, for learners other than ours.
    fn step(&mut self, lr: f64, module: M, grads: GradientsParams) -> M {
        let mut list = GradientList::default();
        list.accumulate::<B, M>(&module, grads);
        let clip = self.clip_factor(list.norm());
        self.update(lr, module, list, clip)
    }

    fn step_multi(&mut self, lr: f64, module: M, grads: MultiGradientsParams) -> M {
        let mut list = GradientList::default();
        for (grads, _) in grads.grads {
            list.accumulate::<B, M>(&module, grads);
        }
        let clip = self.clip_factor(list.norm());
        self.update(lr, module, list, clip)
    }

    fn to_record(&self) -> AdamWRecord<B> {
        let all = |f: fn(&Moments<B::InnerBackend>) -> &Tensor<B::InnerBackend, 1>| {
            self.moments.values().map(|moments| Tensor::from_inner(f(moments).clone())).collect()
        };
        AdamWRecord {
            step: self.step as usize,
            paths: self.moments.keys().cloned().collect(),
            m: all(|moments| &moments.m),
            v: all(|moments| &moments.v),
        }
    }

    fn load_record(self, record: AdamWRecord<B>) -> Self {
        let AdamWRecord { step, paths, m, v } = record;
        let moments = m.into_iter().zip(v).map(|(m, v)| Moments { m: m.inner(), v: v.inner() });
        Self { step: step as u64, moments: paths.into_iter().zip(moments).collect(), ..self }
    }
}
