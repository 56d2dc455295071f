//! The block with a cache, as decoding runs it: every form of weights and of the cache, few new positions and many, short texts and long,
//! against the plain composition in f32 on the same weights.

use burn::backend::Flex;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData, TensorMetadata};
use llama::model::backend::block::cached;
use llama::model::backend::ops::{primitive, tensor};
use llama::model::backend::{Bits, BlockCache, BlockSpec, BlockWeights, Matrix, ops};
use llama::model::modules::Quantized;
use llama::model::shard::Team;
use llama::model::{Compute, LlamaBackend, Precision};

use crate::support::{close, device_test, floats, noise, scale, tolerance};

const EPS: f64 = 1e-5;

/// Shapes of a call.
#[derive(Clone, Copy, Debug)]
struct Case {
    d_model: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    d_ff: usize,
    batch: usize,
    seq_len: usize,
    /// Positions that are in the cache before.
    past: usize,
}

const CASES: [Case; 7] = [
    // Two sequences, three positions each; the first positions of all.
    Case { d_model: 64, heads: 4, kv_heads: 2, head_dim: 16, d_ff: 96, batch: 2, seq_len: 3, past: 5 },
    Case { d_model: 64, heads: 4, kv_heads: 2, head_dim: 16, d_ff: 96, batch: 1, seq_len: 1, past: 0 },
    // Rows that memory pads, three heads to one of keys.
    Case { d_model: 576, heads: 9, kv_heads: 3, head_dim: 64, d_ff: 160, batch: 1, seq_len: 1, past: 16 },
    // So many positions that their keys are shared out among cubes.
    Case { d_model: 96, heads: 3, kv_heads: 3, head_dim: 32, d_ff: 64, batch: 1, seq_len: 2, past: 1100 },
    Case { d_model: 64, heads: 8, kv_heads: 1, head_dim: 128, d_ff: 64, batch: 4, seq_len: 2, past: 700 },
    // More rows than decoding's kernels take.
    Case { d_model: 64, heads: 4, kv_heads: 2, head_dim: 16, d_ff: 96, batch: 1, seq_len: 40, past: 3 },
    // Heads of a width that they do not take.
    Case { d_model: 64, heads: 16, kv_heads: 1, head_dim: 6, d_ff: 32, batch: 1, seq_len: 1, past: 9 },
];

impl Case {
    fn capacity(&self) -> usize {
        self.past + self.seq_len + 2
    }

    /// Gains and matrices in the order of [`BlockWeights`].
    fn weights(&self) -> [(Vec<usize>, Vec<f64>); 9] {
        let (d, q, kv, ff) = (self.d_model, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.d_ff);
        let shapes =
            [vec![d], vec![q, d], vec![kv, d], vec![kv, d], vec![d, q], vec![d], vec![ff, d], vec![d, ff], vec![ff, d]];
        let mut seed = 10;
        shapes.map(|shape| {
            seed += 1;
            let mut values = noise(shape.iter().product(), seed);
            let factor = if shape.len() == 1 { 1.0 } else { (3.0 / shape[1] as f64).sqrt() };
            values.iter_mut().for_each(|x| *x *= factor);
            (shape, values)
        })
    }

    fn input<B: Backend>(&self, device: &B::Device) -> Tensor<B, 3> {
        random([self.batch, self.seq_len, self.d_model], 1, device)
    }

    /// A cache whose positions are rounded.
    fn cache<B: Backend>(&self, rounded: Precision, device: &B::Device) -> BlockCache<B> {
        let dims = [self.batch, self.capacity(), self.kv_heads, self.head_dim];
        let [keys, values] = [2, 3].map(|seed| primitive(random::<B, 4>(dims, seed, device).cast(rounded.dtype())));
        BlockCache { keys, values, len: self.past }
    }

    fn tables<B: Backend>(&self, device: &B::Device) -> [Tensor<B, 2>; 2] {
        let half = self.head_dim / 2;
        let table = |f: fn(f64) -> f64| {
            let angle = |i: usize| (self.past + i / half) as f64 * 1e4f64.powf(-((i % half) as f64) / half as f64);
            let values: Vec<f64> = (0..self.seq_len * half).map(|i| f(angle(i))).collect();
            Tensor::from_data(TensorData::new(values, [self.seq_len, half]), (device, DType::F32))
        };
        [table(f64::cos), table(f64::sin)]
    }

    fn spec<B: Backend>(&self, device: &B::Device) -> BlockSpec<B> {
        let [cos, sin] = self.tables::<B>(device).map(primitive);
        let Self { batch, seq_len, head_dim, .. } = *self;
        let (compute, team) = (Compute::default(), Team::default());
        BlockSpec { cos, sin, starts: None, batch, seq_len, head_dim, eps: EPS, compute, team }
    }
}

fn random<B: Backend, const D: usize>(dims: [usize; D], seed: u64, device: &B::Device) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(noise(dims.iter().product(), seed), dims), (device, DType::F32))
}

/// A form of weights.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Floats(Precision),
    Blocks(Bits),
}

/// A matrix in a form, and the values it then has.
fn stored<B: LlamaBackend>(shape: &[usize], values: &[f64], form: Form, device: &B::Device) -> (Matrix<B>, TensorData) {
    let data = TensorData::new(values.to_vec(), [shape[0], shape[1]]);
    match form {
        Form::Blocks(bits) => {
            let matrix = Quantized::<B>::new(data, bits, device);
            (Matrix::Blocks(matrix.weight()), matrix.dense().into_data())
        }
        Form::Floats(precision) => {
            let matrix = Tensor::<B, 2>::from_data(data, (device, precision.dtype()));
            (Matrix::Floats(primitive(matrix.clone())), matrix.into_data().convert::<f32>())
        }
    }
}

/// The block on the device, and the plain composition.
fn check<B: LlamaBackend>(case: Case, form: Form, kept: Precision, device: &B::Device) {
    let what = format!("{form:?}, cache {kept} {case:?}");
    let on_host = Default::default();
    let mut plain = Vec::new();
    let mut gains = Vec::new();
    let mut matrices = Vec::new();
    for (shape, values) in case.weights() {
        if shape.len() == 1 {
            let gain = TensorData::new(values, shape);
            gains.push(primitive(Tensor::<B, 1>::from_data(gain.clone(), (device, DType::F32))));
            plain.push(primitive(Tensor::<Flex, 1>::from_data(gain, (&on_host, DType::F32))));
        } else {
            let (matrix, values) = stored::<B>(&shape, &values, form, device);
            matrices.push(matrix);
            plain.push(primitive(Tensor::<Flex, 2>::from_data(values, (&on_host, DType::F32))));
        }
    }
    let (Ok([wq, wk, wv, wo, w1, w2, w3]), Ok([attention_norm, ffn_norm])) =
        (<[_; 7]>::try_from(matrices), <[_; 2]>::try_from(gains))
    else {
        unreachable!("nine weights")
    };
    let weights = BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 };
    let (found, cache) =
        ops::cached_block(case.input::<B>(device), weights, case.cache::<B>(kept, device), case.spec::<B>(device));
    assert_eq!([&cache.keys, &cache.values].map(|kept| kept.dtype()), [kept.dtype(); 2], "{what}");

    let Ok(plain) = <[_; 9]>::try_from(plain) else { unreachable!("nine weights") };
    let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = BlockWeights::from(plain);
    let [wq, wk, wv, wo, w1, w2, w3] = [wq, wk, wv, wo, w1, w2, w3].map(Matrix::Floats);
    let weights = BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 };
    let spec = case.spec::<Flex>(&on_host);
    let input = primitive(case.input::<Flex>(&on_host).flatten::<2>(0, 1));
    let BlockCache { keys, values, len } = case.cache::<Flex>(kept, &on_host);
    let [keys, values] = [keys, values].map(|cache| primitive(tensor::<Flex, 4>(cache).cast(DType::F32)));
    let (expected, expected_cache) = cached::<Flex>(input, weights, BlockCache { keys, values, len }, &spec);

    assert_eq!(cache.len, case.past + case.seq_len, "{what}");
    let pairs = [
        ("result", floats(found), floats(tensor::<Flex, 2>(expected))),
        ("keys", floats(tensor::<B, 4>(cache.keys)), floats(tensor::<Flex, 4>(expected_cache.keys))),
        ("values", floats(tensor::<B, 4>(cache.values)), floats(tensor::<Flex, 4>(expected_cache.values))),
    ];
    for (name, found, expected) in pairs {
        // Where weights are in fewer bytes, the CPU's kernels round the inputs as well.
        let of_weights = if form == Form::Floats(Precision::F32) { 2e-5 } else { 5e-3 };
        // Half a unit in the last place of the largest.
        let of_cache = match kept {
            Precision::F32 => 0.0,
            Precision::Bf16 => 4e-3,
            Precision::F16 => 5e-4,
        };
        let cpu = f64::max(of_weights, of_cache);
        let scale = scale(&expected);
        close(&format!("{what}: {name}"), &found, &expected, tolerance(cpu, 0.2) * scale);
    }
}

device_test! {
    fn is_the_plain_composition<B>(device) {
        let f32 = Form::Floats(Precision::F32);
        let blocks = [Bits::Eight, Bits::Four, Bits::FourSymmetric].map(Form::Blocks);
        let forms = Precision::ALL.iter().map(|precision| Form::Floats(*precision)).chain(blocks);
        let rounded = [(f32, Precision::Bf16), (f32, Precision::F16), (Form::Blocks(Bits::Eight), Precision::F16)];
        for (form, kept) in forms.map(|form| (form, Precision::F32)).chain(rounded) {
            let of_weights = if let Form::Floats(precision) = form { precision } else { Precision::F32 };
            let has = |field, precision: Precision| precision.check::<B::InnerBackend>(field, &device);
            if let Err(error) = has("weights", of_weights).and(has("cache", kept)) {
                eprintln!("skipped: {error}");
                continue;
            }
            for case in CASES {
                let whole = [case.d_model, case.heads * case.head_dim, case.d_ff].iter().all(|width| width % 32 == 0);
                if whole || matches!(form, Form::Floats(_)) {
                    check::<B::InnerBackend>(case, form, kept, &device);
                }
            }
        }
    }
}
