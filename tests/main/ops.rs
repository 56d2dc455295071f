//! Every operation of the backend trait: the backend's body against the default body, every explicit backward against
//! Burn's autodiff of the plain composition, and against finite differences in f64.

use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Int, Tensor, TensorData};
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{AdamWStep, AttentionSaved, AttentionSpec, LlamaBackend, LossSpec, ops, reference};
use llama::model::{Precision, TrainBackend};

use crate::support::{close, device_test, floats, noise, scale, tolerance};

const EPS: f64 = 1e-5;

fn random<B: Backend, const D: usize>(dims: [usize; D], seed: u64, dtype: DType, device: &B::Device) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(noise(dims.iter().product(), seed), dims), (device, dtype))
}

fn targets<B: Backend>(len: usize, vocab: usize, device: &B::Device) -> Tensor<B, 1, Int> {
    let ids: Vec<i32> = (0..len).map(|i| if i % 5 == 3 { -100 } else { (i * 7 % vocab) as i32 }).collect();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}

/// An operation as a function of its flat float inputs, on the backend `B`.
trait Case {
    /// Shapes of the inputs, flat.
    fn inputs(&self) -> Vec<Vec<usize>>;
    /// The operation through the trait.
    fn ours<B: LlamaBackend>(&self, inputs: Vec<Tensor<B, 1>>) -> Tensor<B, 1>;
    /// The plain composition.
    fn plain<B: LlamaBackend>(&self, inputs: Vec<Tensor<B, 1>>) -> Tensor<B, 1>;
}

fn flat<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    x.flatten(0, D - 1)
}

struct Project;
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

struct RmsNorm;
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

struct Rotary;
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

struct Swiglu;
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
struct Attention {
    batch: usize,
    q_len: usize,
    kv_len: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    /// Tokens of a document; 0 is one document.
    documents: usize,
}
impl Attention {
    fn starts<B: Backend>(&self, device: &B::Device) -> Option<Tensor<B, 2, Int>> {
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

struct CrossEntropy {
    tokens: usize,
    vocab: usize,
    z_loss: f64,
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
    }
}

/// Largest allowed error of what products in this precision make, to the scale of the result.
fn rounding(precision: Precision) -> f64 {
    if precision == Precision::Bf16 { 0.02 } else { 0.003 }
}

device_test! {
    fn products_in_bf16<B>(device) {
        products_in::<B>(Precision::Bf16, &device);
    }
}

device_test! {
    fn products_in_f16<B>(device) {
        products_in::<B>(Precision::F16, &device);
    }
}

/// Products in a lower precision, whose operands may be stored so, against f32 on the CPU: whole and broken tiles, long and short sums.
fn products_in<B: TrainBackend>(precision: Precision, device: &B::Device) {
    type Inner<B> = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
    if let Err(error) = precision.check::<B>(device) {
        return eprintln!("skipped: {error}");
    }
    let can_store = Inner::<B>::has_products(device, precision);
    for [tokens, d_in, d_out] in [[24, 16, 24], [40, 72, 136], [130, 264, 520], [1000, 96, 48], [2056, 136, 264]] {
        for stored in [false, true] {
            let store =
                |x: Tensor<Inner<B>, 2>| primitive(if stored && can_store { x.cast(precision.dtype()) } else { x });
            let check = |name: &str,
                         dims: [[usize; 2]; 2],
                         ours: &dyn Fn([Tensor<Inner<B>, 2>; 2]) -> FloatTensor<Inner<B>>,
                         plain: &dyn Fn([Tensor<Flex, 2>; 2]) -> Tensor<Flex, 2>| {
                let ours = ours([0, 1].map(|i| random(dims[i], i as u64 + 1, DType::F32, device)));
                let plain = plain([0, 1].map(|i| random(dims[i], i as u64 + 1, DType::F32, &Default::default())));
                let (ours, plain) = (floats(tensor::<Inner<B>, 2>(ours).cast(DType::F32)), floats(plain));
                let name = format!("{precision}: {name}, {tokens} tokens, {d_in} to {d_out}");
                close(&name, &ours, &plain, rounding(precision) * scale(&plain));
            };
            check(
                "project",
                [[tokens, d_in], [d_out, d_in]],
                &|[x, weight]| Inner::<B>::project(store(x), primitive(weight), precision),
                &|[x, weight]| x.matmul(weight.transpose()),
            );
            check(
                "gradient of the input of two",
                [[tokens, d_out], [d_out, d_in]],
                &|[grad, weight]| {
                    let pair = (store(grad), primitive(weight));
                    Inner::<B>::project_backward_input(vec![pair.clone(), pair], precision, DType::F32)
                },
                &|[grad, weight]| grad.matmul(weight) * 2.0,
            );
            check(
                "gradient of the weight",
                [[tokens, d_out], [tokens, d_in]],
                &|[grad, x]| Inner::<B>::project_backward_weight(store(grad), store(x), precision),
                &|[grad, x]| grad.transpose().matmul(x),
            );
            // Several weights of one input, beside each other: of different sizes, and more than are made in one go.
            let parts =
                |x: Tensor<Inner<B>, 2>| [0..d_out, 0..8, 8..d_out, 0..d_out].map(|rows| x.clone().slice([rows]));
            let beside = |results: Vec<FloatTensor<Inner<B>>>, dim| {
                primitive(Tensor::cat(results.into_iter().map(tensor::<Inner<B>, 2>).collect(), dim))
            };
            check(
                "project with several weights",
                [[tokens, d_in], [d_out, d_in]],
                &|[x, weight]| {
                    let weights = parts(weight).map(primitive).into();
                    beside(Inner::<B>::project_all(store(x), weights, precision), 1)
                },
                &|[x, weight]| {
                    let whole = x.matmul(weight.transpose());
                    Tensor::cat(vec![whole.clone(), whole.clone(), whole], 1)
                },
            );
            check(
                "gradients of several weights",
                [[tokens, d_out], [tokens, d_in]],
                &|[grad, x]| {
                    let grads = parts(grad.transpose()).map(|grad| store(grad.transpose())).into();
                    beside(Inner::<B>::project_backward_weights(grads, store(x), precision), 0)
                },
                &|[grad, x]| {
                    let whole = grad.transpose().matmul(x);
                    Tensor::cat(vec![whole.clone(), whole.clone(), whole], 0)
                },
            );
        }
    }
}

device_test! {
    fn attention_in_bf16<B>(device) {
        attention_in::<B>(Precision::Bf16, &device);
    }
}

device_test! {
    fn attention_in_f16<B>(device) {
        attention_in::<B>(Precision::F16, &device);
    }
}

fn attention_in<B: TrainBackend>(precision: Precision, device: &B::Device) {
    type Inner<B> = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
    if let Err(error) = precision.check::<B>(device) {
        return eprintln!("skipped: {error}");
    }
    for stored in [false, true] {
        if stored && !Inner::<B>::has_products(device, precision) {
            continue;
        }
        for (q_len, kv_len, head_dim, documents) in
            [(1, 1, 64, 0), (1, 70, 64, 0), (130, 200, 64, 0), (200, 200, 128, 0), (150, 150, 64, 40), (17, 17, 16, 0)]
        {
            let case = Attention { batch: 2, q_len, kv_len, n_heads: 4, n_kv_heads: 2, head_dim, documents };
            let name =
                format!("{precision}: attention {q_len}/{kv_len}, heads of {head_dim}, documents of {documents}");
            let ours = attention_and_gradients::<Inner<B>>(&case, precision, stored, device);
            let plain = attention_and_gradients::<Flex>(&case, Precision::F32, false, &Default::default());
            for (part, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
                close(&format!("{name}: {part}"), ours, plain, rounding(precision) * scale(plain).max(0.5));
            }
        }
    }
}

/// The result, the log-sum-exp and the three gradients.
fn attention_and_gradients<B: LlamaBackend>(
    case: &Attention,
    precision: Precision,
    stored: bool,
    device: &B::Device,
) -> Vec<Vec<f64>> {
    let shapes = case.inputs();
    let input = |shape: &Vec<usize>, seed| {
        let x = random::<B, 4>(<[usize; 4]>::try_from(shape.clone()).unwrap(), seed, DType::F32, device);
        primitive(if stored { x.cast(precision.dtype()) } else { x })
    };
    let [q, k, v] = [0, 1, 2].map(|i| input(&shapes[i], i as u64 + 1));
    let starts = case.starts::<B>(device).map(|starts| starts.into_primitive());
    let spec = AttentionSpec::new(case.head_dim, precision);
    let (out, lse) = B::causal_attention(q.clone(), k.clone(), v.clone(), starts.clone(), spec);
    let grad = input(&shapes[0], 4);
    let saved = AttentionSaved { q, k, v, starts, out: out.clone(), lse: lse.clone(), spec };
    let [d_q, d_k, d_v] = B::causal_attention_backward(saved, grad);
    let whole = |x| floats(tensor::<B, 4>(x).cast(DType::F32));
    vec![whole(out), floats(tensor::<B, 3>(lse)), whole(d_q), whole(d_k), whole(d_v)]
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
        same("token losses", vec![ours], vec![reference::token_losses::<Inner<B>>(hidden, head, ids, spec)]);

        let step = AdamWStep {
            lr: 0.1, beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 0.5,
        };
        let state = || (f32s([9, 41], 1), f32s([9, 41], 2), f32s([9, 41], 3));
        let v = || primitive(random::<Inner<B>, 2>([9, 41], 4, DType::F32, &device).square());
        let (param, grad, m) = state();
        let ours = Inner::<B>::adamw(param, grad, m, v(), &step);
        let (param, grad, m) = state();
        let default = reference::adamw::<Inner<B>>(param, grad, m, v(), &step);
        same("adamw", ours.map(one).into(), default.map(one).into());

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
