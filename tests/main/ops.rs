//! Every operation of the backend trait: the backend's body against the default body, every explicit backward against
//! Burn's autodiff of the plain composition, and against finite differences in f64.

use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{AdamWStep, AttentionSaved, AttentionSpec, LlamaBackend, LossSpec, reference};
use llama::model::{Precision, TrainBackend};

use crate::support::{close, device_test, floats, noise, scale, tolerance};

mod cases;
mod low_precision;

use cases::{Adapters, Attention, Case, CrossEntropy, Project, RmsNorm, Rotary, Swiglu};

/// Added to the mean square of a norm.
const EPS: f64 = 1e-5;

fn random<B: Backend, const D: usize>(dims: [usize; D], seed: u64, dtype: DType, device: &B::Device) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(noise(dims.iter().product(), seed), dims), (device, dtype))
}

fn targets<B: Backend>(len: usize, vocab: usize, device: &B::Device) -> Tensor<B, 1, Int> {
    let ids: Vec<i32> = (0..len).map(|i| if i % 5 == 3 { -100 } else { (i * 7 % vocab) as i32 }).collect();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}

/// Value and gradients of `Σ f(inputs) · noise`.
fn run<B: TrainBackend>(
    inputs: &[Vec<f64>],
    dtype: DType,
    device: &B::Device,
    f: impl Fn(Vec<Tensor<B, 1>>) -> Tensor<B, 1>,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let leaf = |values: &Vec<f64>| {
        Tensor::<B, 1>::from_data(TensorData::new(values.clone(), [values.len()]), (device, dtype)).require_grad()
    };
    let leaves: Vec<_> = inputs.iter().map(leaf).collect();
    let out = f(leaves.clone());
    let weights = random::<B, 1>(out.dims(), 99, dtype, device);
    let values = floats(out.clone());
    let grads = (out * weights).sum().backward();
    (values, leaves.iter().map(|leaf| floats(leaf.grad(&grads).expect("every input has a gradient"))).collect())
}

/// Compares the operation on the device under test with Burn's autodiff of the plain composition, on the CPU.
fn check<B: TrainBackend>(name: &str, case: &impl Case, device: &B::Device) {
    let inputs: Vec<_> =
        case.inputs().iter().zip(1..).map(|(shape, seed)| noise(shape.iter().product(), seed)).collect();
    let (plain, plain_grads) = run::<Autodiff<Flex>>(&inputs, DType::F32, &Default::default(), |x| case.plain(x));
    let (ours, our_grads) = run::<B>(&inputs, DType::F32, device, |x| case.ours(x));
    let near = |expected: &[f64]| tolerance(2e-5 * scale(expected).max(1.0), scale(expected));
    close(&format!("{name}: result"), &ours, &plain, near(&plain));
    for (i, (ours, plain)) in our_grads.iter().zip(&plain_grads).enumerate() {
        close(&format!("{name}: gradient {i}"), ours, plain, near(plain));
    }
}

device_test! {
    fn bodies_and_backwards_equal_burns_autodiff_of_the_composition<B>(device) {
        check::<B>("project", &Project, &device);
        check::<B>("adapters", &Adapters, &device);
        check::<B>("rms_norm", &RmsNorm, &device);
        check::<B>("rotary", &Rotary, &device);
        check::<B>("swiglu", &Swiglu, &device);
        check::<B>("cross entropy", &CrossEntropy { tokens: 11, vocab: 23, z_loss: 0.0 }, &device);
        check::<B>("cross entropy in chunks", &CrossEntropy { tokens: 1100, vocab: 23, z_loss: 0.0 }, &device);
    }
}

device_test! {
    fn attention_equals_burns_autodiff_of_the_composition<B>(device) {
        for (q_len, kv_len) in [(1, 1), (17, 17), (128, 128), (1, 37), (5, 300), (130, 517)] {
            for (n_heads, n_kv_heads) in [(4, 2), (3, 3), (4, 1)] {
                let case = Attention { batch: 2, q_len, kv_len, n_heads, n_kv_heads, head_dim: 8, documents: 0 };
                check::<B>(&format!("attention {q_len}/{kv_len}, heads {n_heads}/{n_kv_heads}"), &case, &device);
            }
        }
        let long = Attention { batch: 2, q_len: 1000, kv_len: 1000, n_heads: 4, n_kv_heads: 2, head_dim: 8, documents: 0 };
        check::<B>("attention over 1000", &long, &device);
        for documents in [1, 7, 100, 300] {
            check::<B>(&format!("attention over documents of {documents}"), &Attention { documents, ..long }, &device);
        }
        check::<B>("few queries", &Attention { q_len: 3, kv_len: 50, documents: 11, ..long }, &device);
        for head_dim in [20, 64, 128] {
            let wide = Attention { batch: 1, q_len: 70, kv_len: 70, n_heads: 2, n_kv_heads: 1, head_dim, documents: 0 };
            check::<B>(&format!("attention, heads of {head_dim}"), &wide, &device);
        }
        let tiles = Attention { batch: 1, q_len: 300, kv_len: 300, n_heads: 2, n_kv_heads: 1, head_dim: 32, documents: 70 };
        check::<B>("attention over tiles of documents", &tiles, &device);
    }
}

device_test! {
    /// The default backward bodies, which a backend may override, on the inner backend.
    fn default_backward_bodies_equal_the_backends<B>(device) {
        type Inner<B> = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        let f32s = |dims, seed| primitive::<Inner<B>, 2>(random(dims, seed, DType::F32, &device));
        let heads = |dims, seed| primitive::<Inner<B>, 4>(random(dims, seed, DType::F32, &device));
        let same = |name: &str, ours: Vec<_>, default: Vec<_>| {
            for (ours, default) in ours.into_iter().zip(default) {
                let (ours, default) = (floats(tensor::<Inner<B>, 1>(ours)), floats(tensor::<Inner<B>, 1>(default)));
                close(name, &ours, &default, tolerance(2e-5 * scale(&default).max(1.0), scale(&default)));
            }
        };
        let one = |x| {
            let len = burn::tensor::TensorMetadata::shape(&x).num_elements();
            <Inner<B> as burn::tensor::ops::FloatTensorOps<Inner<B>>>::float_reshape(x, [len].into())
        };

        let weight = primitive(random::<Inner<B>, 1>([33], 3, DType::F32, &device));
        let (x, grad) = (f32s([7, 33], 1), f32s([7, 33], 2));
        let (_, inv_rms) = Inner::<B>::rms_norm(x.clone(), weight.clone(), EPS);
        for residual in [None, Some(f32s([7, 33], 10))] {
            let saved = (x.clone(), weight.clone(), inv_rms.clone(), grad.clone());
            let ours = Inner::<B>::rms_norm_backward(saved.0, saved.1, saved.2, saved.3, residual.clone());
            let saved = (x.clone(), weight.clone(), inv_rms.clone(), grad.clone());
            let default = reference::rms_norm_backward::<Inner<B>>(saved.0, saved.1, saved.2, saved.3, residual);
            same("rms_norm", vec![one(ours.0), one(ours.1)], vec![one(default.0), one(default.1)]);
        }

        let (gate, up, grad) = (f32s([7, 33], 4), f32s([7, 33], 5), f32s([7, 33], 6));
        let ours = Inner::<B>::swiglu_backward(gate.clone(), up.clone(), grad.clone());
        let default = reference::swiglu_backward::<Inner<B>>(gate, up, grad);
        same("swiglu", vec![one(ours.0), one(ours.1)], vec![one(default.0), one(default.1)]);

        let (x, weight, grad) = (f32s([7, 33], 7), f32s([5, 33], 8), f32s([7, 5], 9));
        let pairs = vec![(grad.clone(), weight), (f32s([7, 4], 11), f32s([4, 33], 12))];
        let ours = vec![
            one(Inner::<B>::project_backward_input(pairs.clone(), Precision::F32, DType::F32)),
            one(Inner::<B>::project_backward_weight(grad.clone(), x.clone(), Precision::F32)),
        ];
        let default = vec![
            one(reference::project_backward_input::<Inner<B>>(pairs, Precision::F32, DType::F32)),
            one(reference::project_backward_weight::<Inner<B>>(grad, x, Precision::F32)),
        ];
        same("project", ours, default);

        let (q, k, v) = (heads([2, 9, 4, 8], 1), heads([2, 20, 2, 8], 2), heads([2, 20, 2, 8], 3));
        let spec = AttentionSpec { scale: 0.3, precision: Precision::F32 };
        let starts = Tensor::<Inner<B>, 1, Int>::from_data(
            TensorData::new((0..18).map(|i| i % 9 / 4 * 5).collect::<Vec<i32>>(), [18]),
            &device,
        );
        let starts = Some(starts.reshape([2, 9]).into_primitive());
        let (out, lse) = Inner::<B>::causal_attention(q.clone(), k.clone(), v.clone(), starts.clone(), spec);
        let (_, default_lse) = reference::causal_attention::<Inner<B>>(q.clone(), k.clone(), v.clone(), starts.clone(), spec);
        same("attention: lse", vec![one(lse.clone())], vec![one(default_lse)]);
        let saved = AttentionSaved { q, k, v, starts, out, lse, spec };
        let ours = Inner::<B>::causal_attention_backward(saved.clone(), heads([2, 9, 4, 8], 4));
        let default = reference::causal_attention_backward::<Inner<B>>(saved, heads([2, 9, 4, 8], 4));
        same("attention", ours.map(one).into(), default.map(one).into());

        let (grad, ids) = (f32s([600, 12], 1), targets::<Inner<B>>(600, 40, &device).clamp_min(0).into_primitive());
        for sum in [None, Some(f32s([40, 12], 3))] {
            let ours = Inner::<B>::token_embedding_backward(grad.clone(), ids.clone(), 40, sum.clone());
            let default = reference::token_embedding_backward::<Inner<B>>(grad.clone(), ids.clone(), 40, sum);
            same("embedding", vec![one(ours)], vec![one(default)]);
        }
        for factor in [1.0, 0.3] {
            let factor = primitive(Tensor::<Inner<B>, 1>::full([1], factor, &device));
            let ours = Inner::<B>::scale(grad.clone(), factor.clone());
            same("scale", vec![one(ours)], vec![one(reference::scale::<Inner<B>>(grad.clone(), factor))]);
        }

        let (hidden, head) = (f32s([600, 12], 1), f32s([40, 12], 2));
        let ids = targets::<Inner<B>>(600, 40, &device).into_primitive();
        let spec = LossSpec { z_loss: 0.01, ..LossSpec::default() };
        let ours = Inner::<B>::linear_cross_entropy_with_grads(hidden.clone(), head.clone(), ids.clone(), spec);
        let default =
            reference::linear_cross_entropy_with_grads::<Inner<B>>(hidden.clone(), head.clone(), ids.clone(), spec);
        same("cross entropy", ours.map(one).into(), default.map(one).into());
        let ours = Inner::<B>::token_losses(hidden.clone(), head.clone(), ids.clone(), spec);
        same("token losses", vec![ours], vec![reference::token_losses::<Inner<B>>(hidden.clone(), head, ids, spec)]);
        let sums = Inner::<B>::log_sum_exp(hidden.clone());
        same("log sum exp", vec![sums], vec![reference::log_sum_exp::<Inner<B>>(hidden)]);

        let step = AdamWStep {
            lr: 0.1, beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 0.5,
        };
        // More than one launch takes, of several sizes, some of which are read by vectors.
        let sizes = (0..40).map(|index| [[9, 41], [1, 7], [64, 96], [3, 4]][index / 2 % 4]);
        let state = |dims: [usize; 2]| {
            let v = primitive(random::<Inner<B>, 2>(dims, 4, DType::F32, &device).square());
            [f32s(dims, 1), f32s(dims, 2), f32s(dims, 3), v]
        };
        let ours = Inner::<B>::adamw(sizes.clone().map(state).collect(), &step);
        assert_eq!(ours.len(), 40);
        for (ours, dims) in ours.into_iter().zip(sizes) {
            let default = reference::adamw::<Inner<B>>(state(dims), &step);
            same("adamw", ours.map(one).into(), default.map(one).into());
        }
        assert!(Inner::<B>::adamw(Vec::new(), &step).is_empty());

        let x = f32s([100, 41], 5);
        let expected: f64 = floats(tensor::<Inner<B>, 2>(x.clone())).iter().map(|x| x * x).sum();
        let found = floats(tensor::<Inner<B>, 1>(Inner::<B>::sums_of_squares(vec![x])));
        close("sum of squares", &found, &[expected], tolerance(1e-4 * expected, expected));
    }
}

mod finite_differences {
    use super::*;

    const STEP: f64 = 1e-5;
    const TOLERANCE: f64 = 1e-7;

    /// Every explicit backward against central differences in f64.
    fn check(name: &str, case: &impl Case) {
        type B = Autodiff<Flex>;
        let device = Default::default();
        let inputs: Vec<_> =
            case.inputs().iter().zip(1..).map(|(shape, seed)| noise(shape.iter().product(), seed)).collect();
        let (out, grads) = run::<B>(&inputs, DType::F64, &device, |x| case.ours(x));
        let weights = noise(out.len(), 99);
        let value = |inputs: &[Vec<f64>]| {
            let leaf = |x: &Vec<f64>| {
                Tensor::<Flex, 1>::from_data(TensorData::new(x.clone(), [x.len()]), (&device, DType::F64))
            };
            let out = floats(case.ours(inputs.iter().map(leaf).collect()));
            out.iter().zip(&weights).map(|(x, w)| x * w).sum::<f64>()
        };
        for (which, gradient) in grads.iter().enumerate() {
            for (at, found) in gradient.iter().enumerate() {
                let mut moved = inputs.clone();
                moved[which][at] += STEP;
                let above = value(&moved);
                moved[which][at] -= 2.0 * STEP;
                let slope = (above - value(&moved)) / (2.0 * STEP);
                let error = (slope - found).abs();
                assert!(
                    error < TOLERANCE * slope.abs().max(1.0),
                    "{name}: input {which}[{at}]: {found}, slope {slope}"
                );
            }
        }
    }

    #[test]
    fn of_every_backward() {
        check("project", &Project);
        check("adapters", &Adapters);
        check("rms_norm", &RmsNorm);
        check("rotary", &Rotary);
        check("swiglu", &Swiglu);
        check("cross entropy", &CrossEntropy { tokens: 11, vocab: 13, z_loss: 0.0 });
        check("cross entropy with z-loss", &CrossEntropy { tokens: 11, vocab: 13, z_loss: 0.1 });
        for (q_len, kv_len, n_kv_heads) in [(6, 6, 2), (2, 7, 1), (1, 5, 4)] {
            let documents = if kv_len == q_len { 0 } else { 2 };
            let case = Attention { batch: 2, q_len, kv_len, n_heads: 4, n_kv_heads, head_dim: 6, documents };
            check(&format!("attention {q_len}/{kv_len}"), &case);
        }
    }
}
