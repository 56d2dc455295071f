//! Products and attention in bf16 and f16, on operands in f32 and stored in that precision, against f32 on the CPU.

use burn::backend::Flex;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor};
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{AttentionSaved, AttentionSpec, LlamaBackend};
use llama::model::{Precision, TrainBackend};

use super::{Attention, Case, random};
use crate::support::{close, device_test, floats, scale};

type Inner<B> = <B as AutodiffBackend>::InnerBackend;

/// Whether operands are stored in the precision: as f32 where the device has the type, and stored too where it multiplies
/// them so.
fn forms<B: LlamaBackend>(precision: Precision, device: &B::Device) -> Vec<bool> {
    if let Err(error) = precision.check::<B>("precision", device) {
        eprintln!("skipped: {error}");
        return Vec::new();
    }
    if B::has_products(device, precision) { vec![false, true] } else { vec![false] }
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
    let forms = forms::<Inner<B>>(precision, device);
    for [tokens, d_in, d_out] in [[24, 16, 24], [40, 72, 136], [130, 264, 520], [1000, 96, 48], [2056, 136, 264]] {
        for &stored in &forms {
            let store = |x: Tensor<Inner<B>, 2>| primitive(if stored { x.cast(precision.dtype()) } else { x });
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
    for stored in forms::<Inner<B>>(precision, device) {
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
