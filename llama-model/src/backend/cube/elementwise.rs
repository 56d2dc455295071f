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
/// Cubes that cast a tensor, at most.
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
    for (alike, size) in batches(&tensors, 2) {
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

#[cube(launch)]
fn adamw_kernel<F: Float, G: Float, N: Size>(
    param: &mut Array<Vector<F, N>>,
    grad: &Array<Vector<G, N>>,
    m: &mut Array<Vector<F, N>>,
    v: &mut Array<Vector<F, N>>,
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
    let at = CUBE_POS * UNITS + UNIT_POS as usize;
    if at < param.len() {
        let grad = Vector::<f32, N>::cast_from(grad[at]) * Vector::cast_from(grad_scale);
        let mean =
            Vector::<f32, N>::cast_from(m[at]) * Vector::cast_from(beta_1) + grad * Vector::cast_from(one_minus_beta_1);
        let square = Vector::<f32, N>::cast_from(v[at]) * Vector::cast_from(beta_2)
            + grad * grad * Vector::cast_from(one_minus_beta_2);
        let root = square.sqrt() * Vector::cast_from(inv_root_correction_2) + Vector::cast_from(epsilon);
        let kept = Vector::<f32, N>::cast_from(param[at]) * Vector::cast_from(decay);
        param[at] = Vector::cast_from(kept - mean / root * Vector::cast_from(step_size));
        m[at] = Vector::cast_from(mean);
        v[at] = Vector::cast_from(square);
    }
}

/// [`LlamaBackend::adamw`](crate::LlamaBackend::adamw), in place where nobody else holds the tensors.
pub(super) fn adamw<R: CubeRuntime>(
    param: CubeTensor<R>,
    grad: CubeTensor<R>,
    m: CubeTensor<R>,
    v: CubeTensor<R>,
    step: &AdamWStep,
) -> [CubeTensor<R>; 3] {
    let [param, m, v] = owned([param, m, v]);
    let [grad] = contiguous([grad]);
    let (correction_1, correction_2) = step.bias_corrections();
    let dtypes = [param.dtype.into(), grad.dtype.into()];
    let size = vector_size(param.shape().num_elements());
    let vectors = param.shape().num_elements() / size;
    adamw_kernel::launch::<R>(
        &param.client.clone(),
        cubes(vectors.div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
        size,
        param.clone().into_array_arg(),
        grad.into_array_arg(),
        m.clone().into_array_arg(),
        v.clone().into_array_arg(),
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
    [param, m, v]
}
