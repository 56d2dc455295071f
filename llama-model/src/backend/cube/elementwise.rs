//! Kernels with a unit for each element, or four neighbours: casts, rotary embeddings and AdamW.

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::reduce::vector_size;
use super::{batches, contiguous, cubes, empty_like, owned};
use crate::backend::AdamWStep;

/// Units of a cube.
const UNITS: usize = 256;
/// Cubes that go over a tensor of several, at most.
const MAX_CUBES: usize = 1024;

/// `count` cubes cast each tensor.
#[cube(launch)]
fn cast_kernel<F: Float, O: Float, N: Size>(
    tensors: &Sequence<Array<Vector<F, N>>>,
    results: &mut Sequence<Array<Vector<O, N>>>,
    count: usize,
    #[define(F, O)] _dtypes: [StorageType; 2],
) {
    #[unroll]
    for index in 0..tensors.len() {
        if CUBE_POS / count == index {
            let x = tensors.index(index);
            let out = results.index_mut(index);
            let mut at = CUBE_POS % count * UNITS + UNIT_POS as usize;
            while at < x.len() {
                out[at] = Vector::cast_from(x[at]);
                at += count * UNITS;
            }
        }
    }
}

/// In another dtype, or as it is.
pub(super) fn cast<R: CubeRuntime>(x: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    let mut cast = cast_all(vec![x], dtype);
    cast.remove(0)
}

/// [`cast`] of several tensors, in few launches.
pub(super) fn cast_all<R: CubeRuntime>(tensors: Vec<CubeTensor<R>>, dtype: DType) -> Vec<CubeTensor<R>> {
    let mut casts = Vec::with_capacity(tensors.len());
    for (alike, size) in batches(&tensors, std::slice::from_ref, 2) {
        let (client, from) = (alike[0].client.clone(), alike[0].dtype);
        if from == dtype {
            casts.extend_from_slice(alike);
            continue;
        }
        let longest = alike.iter().map(|x| x.shape().num_elements() / size).max().unwrap_or(0);
        let count = longest.div_ceil(UNITS).clamp(1, MAX_CUBES);
        let (mut inputs, mut results) = (SequenceArg::new(), SequenceArg::new());
        for x in alike {
            let [x] = contiguous([x.clone()]);
            let cast = empty_like(&x, x.shape(), dtype);
            inputs.push(x.into_array_arg());
            results.push(cast.clone().into_array_arg());
            casts.push(cast);
        }
        let (cubes, units) = (cubes(count * alike.len()), CubeDim::new_1d(UNITS as u32));
        let dtypes = [from.into(), dtype.into()];
        cast_kernel::launch::<R>(&client, cubes, units, size, inputs, results, count, dtypes);
    }
    casts
}

#[cube(launch)]
fn rotary_kernel<F: Float, T: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    cos: &Array<Vector<T, N>>,
    sin: &Array<Vector<T, N>>,
    out: &mut Array<Vector<F, N>>,
    seq_len: usize,
    heads: usize,
    half: usize,
    sign: f32,
    #[define(F, T)] _dtypes: [StorageType; 2],
) {
    let pair = CUBE_POS * UNITS + UNIT_POS as usize;
    if 2 * pair < x.len() {
        let (row, index) = (pair / half, pair % half);
        let position = row / heads % seq_len;
        let first = row * 2 * half + index;
        let cos = Vector::<f32, N>::cast_from(cos[position * half + index]);
        let sin = Vector::<f32, N>::cast_from(sin[position * half + index]) * Vector::cast_from(sign);
        let a = Vector::<f32, N>::cast_from(x[first]);
        let b = Vector::<f32, N>::cast_from(x[first + half]);
        out[first] = Vector::cast_from(a * cos - b * sin);
        out[first + half] = Vector::cast_from(b * cos + a * sin);
    }
}

/// [`LlamaBackend::rotary`](crate::LlamaBackend::rotary).
pub(super) fn rotary<R: CubeRuntime>(
    x: CubeTensor<R>,
    cos: CubeTensor<R>,
    sin: CubeTensor<R>,
    inverse: bool,
) -> CubeTensor<R> {
    let [x, cos, sin] = contiguous([x, cos, sin]);
    let out = empty_like(&x, x.shape(), x.dtype);
    let ([_, seq_len, heads, _], [_, half]) = (x.shape().dims(), cos.shape().dims());
    let size = vector_size(half);
    let pairs = x.shape().num_elements() / 2 / size;
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), cos.dtype.into()]);
    rotary_kernel::launch::<R>(
        &client,
        cubes(pairs.div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
        size,
        x.into_array_arg(),
        cos.into_array_arg(),
        sin.into_array_arg(),
        out.clone().into_array_arg(),
        seq_len,
        heads,
        half / size,
        if inverse { -1.0 } else { 1.0 },
        dtypes,
    );
    out
}

/// `count` cubes update each parameter.
#[cube(launch)]
fn adamw_kernel<F: Float, G: Float, N: Size>(
    params: &mut Sequence<Array<Vector<F, N>>>,
    grads: &Sequence<Array<Vector<G, N>>>,
    ms: &mut Sequence<Array<Vector<F, N>>>,
    vs: &mut Sequence<Array<Vector<F, N>>>,
    count: usize,
    grad_scale: f32,
    beta_1: f32,
    beta_2: f32,
    one_minus_beta_1: f32,
    one_minus_beta_2: f32,
    step_size: f32,
    inv_root_correction_2: f32,
    epsilon: f32,
    decay: f32,
    #[define(F, G)] _dtypes: [StorageType; 2],
) {
    #[unroll]
    for index in 0..grads.len() {
        if CUBE_POS / count == index {
            let (param, grad) = (params.index_mut(index), grads.index(index));
            let (m, v) = (ms.index_mut(index), vs.index_mut(index));
            let mut at = CUBE_POS % count * UNITS + UNIT_POS as usize;
            while at < param.len() {
                let grad = Vector::<f32, N>::cast_from(grad[at]) * Vector::cast_from(grad_scale);
                let mean = Vector::<f32, N>::cast_from(m[at]) * Vector::cast_from(beta_1)
                    + grad * Vector::cast_from(one_minus_beta_1);
                let square = Vector::<f32, N>::cast_from(v[at]) * Vector::cast_from(beta_2)
                    + grad * grad * Vector::cast_from(one_minus_beta_2);
                let root = square.sqrt() * Vector::cast_from(inv_root_correction_2) + Vector::cast_from(epsilon);
                let kept = Vector::<f32, N>::cast_from(param[at]) * Vector::cast_from(decay);
                param[at] = Vector::cast_from(kept - mean / root * Vector::cast_from(step_size));
                m[at] = Vector::cast_from(mean);
                v[at] = Vector::cast_from(square);
                at += count * UNITS;
            }
        }
    }
}

/// In parts of 16, 4 and 1: a kernel is compiled for each number of tensors, and this one for three alone.
fn by_powers<T>(mut all: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let power = 4usize.pow(all.len().checked_ilog(4)?);
        let (part, rest) = all.split_at(power.min(16));
        all = rest;
        Some(part)
    })
}

/// [`LlamaBackend::adamw`](crate::LlamaBackend::adamw), in place where nobody else holds the tensors, in few launches.
pub(super) fn adamw<R: CubeRuntime>(tensors: Vec<[CubeTensor<R>; 4]>, step: &AdamWStep) -> Vec<[CubeTensor<R>; 3]> {
    let ready = |[param, grad, m, v]: [CubeTensor<R>; 4]| {
        let ([param, m, v], [grad]) = (owned([param, m, v]), contiguous([grad]));
        [param, grad, m, v]
    };
    let tensors: Vec<_> = tensors.into_iter().map(ready).collect();
    let (correction_1, correction_2) = step.bias_corrections();
    let batches = batches(&tensors, |set| set, 4);
    for (alike, size) in batches.flat_map(|(alike, size)| by_powers(alike).map(move |alike| (alike, size))) {
        let [param, grad, ..] = &alike[0];
        let (client, dtypes) = (param.client.clone(), [param.dtype.into(), grad.dtype.into()]);
        let longest = alike.iter().map(|[param, ..]| param.shape().num_elements() / size).max().unwrap_or(0);
        let count = longest.div_ceil(UNITS).clamp(1, MAX_CUBES);
        let [mut params, mut ms, mut vs] = std::array::from_fn(|_| SequenceArg::new());
        let mut grads = SequenceArg::new();
        for [param, grad, m, v] in alike {
            params.push(param.clone().into_array_arg());
            grads.push(grad.clone().into_array_arg());
            ms.push(m.clone().into_array_arg());
            vs.push(v.clone().into_array_arg());
        }
        adamw_kernel::launch::<R>(
            &client,
            cubes(count * alike.len()),
            CubeDim::new_1d(UNITS as u32),
            size,
            params,
            grads,
            ms,
            vs,
            count,
            step.grad_scale as f32,
            step.beta_1 as f32,
            step.beta_2 as f32,
            (1.0 - step.beta_1) as f32,
            (1.0 - step.beta_2) as f32,
            (step.lr / correction_1) as f32,
            correction_2.sqrt().recip() as f32,
            step.epsilon as f32,
            (1.0 - step.lr * step.weight_decay) as f32,
            dtypes,
        );
    }
    tensors.into_iter().map(|[param, _, m, v]| [param, m, v]).collect()
}
