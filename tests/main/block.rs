//! The block as one operation: against the composition of its parts, against finite differences, and the same bit for
//! bit whatever it keeps.

use std::sync::Arc;

use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use llama::model::backend::ops::primitive;
use llama::model::backend::{BlockSpec, BlockWeights, ops};
use llama::model::shard::Team;
use llama::model::{Compute, Llama, LlamaBackend, LlamaConfig, ParamHook, Precision, Recompute, TrainBackend};
use llama::train::GradientList;

use crate::support::{close, device_test, floats, ints, noise, scale, tolerance};

const EPS: f64 = 1e-5;
const BATCH: usize = 2;
const HEAD_DIM: usize = 4;
const D_MODEL: usize = 8;

/// Shapes of the block's input and its nine weights: 2 heads on 1 key head, and an inner width of 12.
fn shapes(seq_len: usize) -> Vec<Vec<usize>> {
    let d = D_MODEL;
    let weights =
        [vec![d], vec![8, d], vec![4, d], vec![4, d], vec![d, 8], vec![d], vec![12, d], vec![d, 12], vec![12, d]];
    std::iter::once(vec![BATCH, seq_len, d]).chain(weights).collect()
}

fn tables<B: Backend>(seq_len: usize, dtype: DType, device: &B::Device) -> [Tensor<B, 2>; 2] {
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f64> = (0..seq_len * HEAD_DIM / 2).map(|i| f(i as f64 * 0.7)).collect();
        Tensor::from_data(TensorData::new(values, [seq_len, HEAD_DIM / 2]), (device, dtype))
    };
    [table(f64::cos), table(f64::sin)]
}

fn matrix<B: Backend>(x: &Tensor<B, 1>, shape: &[usize]) -> Tensor<B, 2> {
    x.clone().reshape([shape[0], shape[1]])
}

/// The block from flat tensors.
fn block<B: LlamaBackend>(x: &[Tensor<B, 1>], seq_len: usize, compute: Compute) -> Tensor<B, 1> {
    let shapes = shapes(seq_len);
    let tables = tables::<B>(seq_len, x[0].dtype(), &x[0].device());
    let weights: Vec<_> = x[1..]
        .iter()
        .zip(&shapes[1..])
        .map(|(weight, shape)| match shape.len() {
            1 => primitive(weight.clone()),
            _ => primitive(matrix(weight, shape)),
        })
        .collect();
    let Ok(weights) = <[_; 9]>::try_from(weights) else { unreachable!("nine weights") };
    let input: Tensor<B, 3> = x[0].clone().reshape([BATCH, seq_len, D_MODEL]);
    let [cos, sin] = tables.map(primitive);
    let (batch, head_dim, team) = (BATCH, HEAD_DIM, Team::default());
    let spec = BlockSpec { cos, sin, starts: None, batch, seq_len, head_dim, eps: EPS, compute, team };
    ops::block(input, BlockWeights::from(weights), spec).flatten(0, 2)
}

/// The same from the single operations.
fn composed<B: LlamaBackend>(x: &[Tensor<B, 1>], seq_len: usize) -> Tensor<B, 1> {
    let shapes = shapes(seq_len);
    let [cos, sin] = tables::<B>(seq_len, x[0].dtype(), &x[0].device());
    let linear = |input: Tensor<B, 3>, i: usize| ops::linear(input, matrix(&x[i], &shapes[i]), Precision::F32);
    let heads = |x: Tensor<B, 3>| {
        let width = x.dims()[2];
        x.reshape([BATCH, seq_len, width / HEAD_DIM, HEAD_DIM])
    };
    let rotary = |x| ops::rotary(x, cos.clone(), sin.clone());
    let input = x[0].clone().reshape([BATCH, seq_len, D_MODEL]);
    let n = ops::rms_norm(input.clone(), x[1].clone(), EPS);
    let (q, k, v) = (rotary(heads(linear(n.clone(), 2))), rotary(heads(linear(n.clone(), 3))), heads(linear(n, 4)));
    let h = input + linear(ops::causal_attention(q, k, v, None, Precision::F32).flatten::<3>(2, 3), 5);
    let m = ops::rms_norm(h.clone(), x[6].clone(), EPS);
    (h + linear(ops::swiglu(linear(m.clone(), 7), linear(m, 9)), 8)).flatten(0, 2)
}

fn inputs(seq_len: usize) -> Vec<Vec<f64>> {
    shapes(seq_len).iter().zip(1..).map(|(shape, seed)| noise(shape.iter().product(), seed)).collect()
}

/// Value and gradients of `Σ f(inputs) · noise`.
fn gradients<B: TrainBackend>(
    inputs: &[Vec<f64>],
    dtype: DType,
    device: &B::Device,
    f: impl Fn(&[Tensor<B, 1>]) -> Tensor<B, 1>,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let leaf = |values: &Vec<f64>| {
        Tensor::<B, 1>::from_data(TensorData::new(values.clone(), [values.len()]), (device, dtype)).require_grad()
    };
    let leaves: Vec<_> = inputs.iter().map(leaf).collect();
    let out = f(&leaves);
    let factors = Tensor::from_data(TensorData::new(noise(out.dims()[0], 99), out.dims()), (device, dtype));
    let values = floats(out.clone());
    let grads = (out * factors).sum().backward();
    (values, leaves.iter().map(|leaf| floats(leaf.grad(&grads).expect("every input has a gradient"))).collect())
}

device_test! {
    fn a_block_equals_the_composition_of_its_parts<B>(device) {
        let seq_len = 37;
        let inputs = inputs(seq_len);
        let (plain, plain_grads) =
            gradients::<Autodiff<Flex>>(&inputs, DType::F32, &Default::default(), |x| composed(x, seq_len));
        let near = |expected: &[f64]| tolerance(5e-5 * scale(expected).max(1.0), scale(expected));
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            let compute = Compute { recompute, ..Compute::default() };
            let (ours, our_grads) = gradients::<B>(&inputs, DType::F32, &device, |x| block(x, seq_len, compute));
            close("result", &ours, &plain, near(&plain));
            for (i, (ours, plain)) in our_grads.iter().zip(&plain_grads).enumerate() {
                close(&format!("{recompute:?}: gradient {i}"), ours, plain, near(plain));
            }
        }
    }
}

#[test]
fn a_blocks_backward_has_the_slopes_of_its_forward() {
    const STEP: f64 = 1e-5;
    let (seq_len, device) = (5, Default::default());
    let inputs = inputs(seq_len);
    let compute = Compute::default();
    let (out, grads) = gradients::<Autodiff<Flex>>(&inputs, DType::F64, &device, |x| block(x, seq_len, compute));
    let factors = noise(out.len(), 99);
    let value = |inputs: &[Vec<f64>]| {
        let leaf =
            |x: &Vec<f64>| Tensor::<Flex, 1>::from_data(TensorData::new(x.clone(), [x.len()]), (&device, DType::F64));
        let out = floats(block(&inputs.iter().map(leaf).collect::<Vec<_>>(), seq_len, compute));
        out.iter().zip(&factors).map(|(x, factor)| x * factor).sum::<f64>()
    };
    for (which, gradient) in grads.iter().enumerate() {
        for (at, found) in gradient.iter().enumerate() {
            let mut moved = inputs.clone();
            moved[which][at] += STEP;
            let above = value(&moved);
            moved[which][at] -= 2.0 * STEP;
            let slope = (above - value(&moved)) / (2.0 * STEP);
            assert!((slope - found).abs() < 1e-6 * slope.abs().max(1.0), "input {which}[{at}]: {found}, slope {slope}");
        }
    }
}

pub fn small() -> LlamaConfig {
    LlamaConfig { n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, head_dim: 8, d_ff: 88, ..LlamaConfig::tiny(64) }
}

/// The loss of a whole model and its gradients as bits, by parameter; those that a hook did not take.
pub fn hooked_gradients<B: TrainBackend>(
    model: &Llama<B>,
    hook: Option<&Arc<dyn ParamHook<B>>>,
) -> (Vec<f64>, Vec<(String, Vec<f64>)>) {
    let upload = |ids: &[i64]| ints::<B>(ids, [2, 33], &model.device());
    let ids: Vec<i64> = (0..66).map(|i| i * 13 % 64).collect();
    let targets: Vec<i64> = ids.iter().map(|i| (i + 7) % 64).collect();
    let loss = model.hooked_loss(upload(&ids), upload(&targets), None, 0.0, hook).unwrap();
    let value = floats(loss.clone());
    let mut grads = GradientList::<B::InnerBackend>::default();
    let parameters = burn::optim::GradientsParams::from_grads(loss.backward(), model);
    grads.accumulate::<B, _>(model, parameters);
    (value, grads.entries.into_iter().map(|(path, gradient)| (path, floats(gradient))).collect())
}

fn model_gradients<B: TrainBackend>(compute: Compute, device: &B::Device) -> (Vec<f64>, Vec<(String, Vec<f64>)>) {
    hooked_gradients(&small().init::<B>(1, device).unwrap().with_compute(compute), None)
}

#[test]
fn what_is_kept_changes_no_bit() {
    type B = Autodiff<Flex>;
    for precision in [Precision::F32, Precision::Bf16] {
        let of = |recompute| model_gradients::<B>(Compute { precision, recompute }, &Default::default());
        let expected = of(Recompute::None);
        assert_eq!(expected.1.len(), 1 + 9 * 2 + 1, "every parameter has a gradient");
        for recompute in [Recompute::Selective, Recompute::Full] {
            assert!(of(recompute) == expected, "{precision:?} {recompute:?}");
        }
    }
}

device_test! {
    fn lower_precisions_are_f32_within_their_rounding<B>(device) {
        let of = |precision| model_gradients::<B>(Compute { precision, ..Compute::default() }, &device);
        let exact = of(Precision::F32);
        for (precision, rounding) in [(Precision::Bf16, 0.03), (Precision::F16, 0.01)] {
            if let Err(error) = precision.check::<B>("precision", &device) {
                eprintln!("skipped: {error}");
                continue;
            }
            let rounded = of(precision);
            assert_ne!(exact, rounded, "{precision} rounds");
            close("loss", &rounded.0, &exact.0, 0.1 * rounding * exact.0[0]);
            for ((path, exact), (_, rounded)) in exact.1.iter().zip(&rounded.1) {
                close(&format!("{precision}: {path}"), rounded, exact, rounding * scale(exact));
            }
        }
    }
}

device_test! {
    /// A block whose weights are frozen still passes the gradient on.
    fn frozen_weights_take_no_gradient<B>(device) {
        let seq_len = 3;
        let inputs = inputs(seq_len);
        let flat = |x: &Vec<f64>| Tensor::<B, 1>::from_data(TensorData::new(x.clone(), [x.len()]), (&device, DType::F32));
        let mut leaves: Vec<_> = inputs.iter().map(flat).collect();
        leaves[0] = leaves[0].clone().require_grad();
        leaves[7] = leaves[7].clone().require_grad();
        let grads = block(&leaves, seq_len, Compute::default()).sum().backward();
        let present: Vec<_> = leaves.iter().map(|leaf| leaf.grad(&grads).is_some()).collect();
        let expected: Vec<_> = (0..leaves.len()).map(|i| i == 0 || i == 7).collect();
        assert_eq!(present, expected);
    }
}
