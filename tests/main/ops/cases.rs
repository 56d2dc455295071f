//! The operations as cases: each through the backend trait, and as a plain composition.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use llama::model::Precision;
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{Adapted, AttentionSpec, LlamaBackend, LossSpec, LowRank, Matrix, ops, reference};

use super::{EPS, random, targets};

/// An operation as a function of its flat float inputs, on the backend `B`.
pub trait Case {
    /// Shapes of the inputs, flat.
    fn inputs(&self) -> Vec<Vec<usize>>;
    /// The operation through the trait.
    fn ours<B: LlamaBackend>(&self, inputs: Vec<Tensor<B, 1>>) -> Tensor<B, 1>;
    /// The plain composition.
    fn plain<B: LlamaBackend>(&self, inputs: Vec<Tensor<B, 1>>) -> Tensor<B, 1>;
}

pub fn flat<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    x.flatten(0, D - 1)
}

pub struct Project;
impl Case for Project {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![6, 10], vec![7, 10]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        flat(ops::linear(x[0].clone().reshape([2, 3, 10]), x[1].clone().reshape([7, 10]), Precision::F32))
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        flat(x[0].clone().reshape([6, 10]).matmul(x[1].clone().reshape([7, 10]).transpose()))
    }
}

/// A frozen weight with an adapter beside one without.
pub struct Adapters;
impl Adapters {
    const SCALE: f64 = 1.7;

    fn weights<B: Backend>(x: &Tensor<B, 1>) -> [Tensor<B, 2>; 2] {
        [random([7, 10], 22, x.dtype(), &x.device()), random([4, 10], 23, x.dtype(), &x.device())]
    }
}
impl Case for Adapters {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![6, 10], vec![2, 10], vec![7, 2]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [with, without] = Self::weights(&x[0]).map(|weight| Matrix::Floats(primitive(weight)));
        let (down, up) = (primitive(x[1].clone().reshape([2, 10])), primitive(x[2].clone().reshape([7, 2])));
        let layers = [
            Adapted { weight: with, adapter: Some(LowRank { down, up, scale: Self::SCALE }) },
            Adapted { weight: without, adapter: None },
        ];
        let [with, without] = ops::adapted_all(x[0].clone().reshape([2, 3, 10]), layers, Precision::F32);
        Tensor::cat(vec![flat(with), flat(without)], 0)
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [with, without] = Self::weights(&x[0]);
        let delta = x[2].clone().reshape([7, 2]).matmul(x[1].clone().reshape([2, 10])) * Self::SCALE;
        let x = x[0].clone().reshape([6, 10]);
        let with = x.clone().matmul((with + delta).transpose());
        Tensor::cat(vec![flat(with), flat(x.matmul(without.transpose()))], 0)
    }
}

pub struct RmsNorm;
impl Case for RmsNorm {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![5, 37], vec![37]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        flat(ops::rms_norm(x[0].clone().reshape([5, 37]), x[1].clone(), EPS))
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let rows = primitive(x[0].clone().reshape([5, 37]));
        flat(tensor::<B, 2>(reference::rms_norm::<B>(rows, primitive(x[1].clone()), EPS).0))
    }
}

pub struct Rotary;
impl Rotary {
    fn tables<B: Backend>(x: &Tensor<B, 1>) -> [Tensor<B, 2>; 2] {
        [20, 21].map(|seed| random([3, 4], seed, x.dtype(), &x.device()))
    }
}
impl Case for Rotary {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![2, 3, 5, 8]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [cos, sin] = Self::tables(&x[0]);
        flat(ops::rotary(x[0].clone().reshape([2, 3, 5, 8]), cos, sin))
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [cos, sin] = Self::tables(&x[0]).map(primitive);
        let rows = primitive(x[0].clone().reshape([2, 3, 5, 8]));
        flat(tensor::<B, 4>(reference::rotary::<B>(rows, cos, sin, false)))
    }
}

pub struct Swiglu;
impl Case for Swiglu {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![3, 21], vec![3, 21]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [gate, up] = [0, 1].map(|i| x[i].clone().mul_scalar(6.0).reshape([3, 21]));
        flat(ops::swiglu(gate, up))
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [gate, up] = [0, 1].map(|i| x[i].clone().mul_scalar(6.0).reshape([3, 21]));
        flat(gate.clone() * burn::tensor::activation::sigmoid(gate) * up)
    }
}

#[derive(Clone, Copy)]
pub struct Attention {
    pub batch: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Tokens of a document; 0 is one document.
    pub documents: usize,
}
impl Attention {
    pub fn starts<B: Backend>(&self, device: &B::Device) -> Option<Tensor<B, 2, Int>> {
        let &Self { batch, q_len, kv_len, documents, .. } = self;
        let start = |index: usize| {
            // Documents of a sequence begin elsewhere than those of the one before.
            let (skew, key) = (index / q_len * 3, kv_len - q_len + index % q_len);
            ((key + skew) / documents * documents).saturating_sub(skew) as i32
        };
        (documents > 0).then(|| {
            let starts: Vec<i32> = (0..batch * q_len).map(start).collect();
            Tensor::from_data(TensorData::new(starts, [batch, q_len]), device)
        })
    }

    fn shapes<B: Backend>(&self, x: Vec<Tensor<B, 1>>) -> [Tensor<B, 4>; 3] {
        let shapes = self.inputs();
        [0, 1, 2].map(|i| x[i].clone().mul_scalar(2.0).reshape(<[usize; 4]>::try_from(shapes[i].clone()).unwrap()))
    }
}
impl Case for Attention {
    fn inputs(&self) -> Vec<Vec<usize>> {
        let kv = vec![self.batch, self.kv_len, self.n_kv_heads, self.head_dim];
        vec![vec![self.batch, self.q_len, self.n_heads, self.head_dim], kv.clone(), kv]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let [q, k, v] = self.shapes(x);
        let starts = self.starts(&q.device());
        flat(ops::causal_attention(q, k, v, starts, Precision::F32))
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let spec = AttentionSpec::new(self.head_dim, Precision::F32);
        let starts = self.starts::<B>(&x[0].device()).map(|starts| starts.into_primitive());
        let [q, k, v] = self.shapes(x).map(primitive);
        flat(tensor::<B, 4>(reference::causal_attention::<B>(q, k, v, starts, spec).0))
    }
}

pub struct CrossEntropy {
    pub tokens: usize,
    pub vocab: usize,
    pub z_loss: f64,
}
impl CrossEntropy {
    fn spec(&self) -> LossSpec {
        LossSpec { z_loss: self.z_loss, ..LossSpec::default() }
    }
    fn shapes<B: Backend>(&self, x: Vec<Tensor<B, 1>>) -> (Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 1, Int>) {
        let hidden = x[0].clone().mul_scalar(3.0).reshape([self.tokens, 9]);
        let targets = targets::<B>(self.tokens, self.vocab, &hidden.device());
        (hidden, x[1].clone().reshape([self.vocab, 9]), targets)
    }
}
impl Case for CrossEntropy {
    fn inputs(&self) -> Vec<Vec<usize>> {
        vec![vec![self.tokens, 9], vec![self.vocab, 9]]
    }
    fn ours<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let (hidden, head, targets) = self.shapes(x);
        ops::linear_cross_entropy(hidden, head, targets, self.spec())
    }
    fn plain<B: LlamaBackend>(&self, x: Vec<Tensor<B, 1>>) -> Tensor<B, 1> {
        let (hidden, head, targets) = self.shapes(x);
        tensor::<B, 1>(reference::token_losses::<B>(
            primitive(hidden),
            primitive(head),
            targets.into_primitive(),
            self.spec(),
        ))
        .sum()
    }
}
