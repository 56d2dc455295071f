//! Kernels with a unit for each element, or four neighbours: rotary embeddings and AdamW.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::reduce::vector_size;
use super::{contiguous, cubes, empty_like};
use crate::backend::AdamWStep;

/// Units of a cube.
const UNITS: usize = 256;

#[cube(launch)]
fn rotary_kernel<F: Float, T: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    cos: &Tensor<Vector<T, N>>,
    sin: &Tensor<Vector<T, N>>,
    out: &mut Tensor<Vector<F, N>>,
    sign: f32,
    #[define(F, T)] _dtypes: [StorageType; 2],
) {
    let half = cos.shape(1) / N::value();
    let pair = CUBE_POS * UNITS + UNIT_POS as usize;
    let row = pair / half;
    let rows = x.shape(0) * x.shape(1) * x.shape(2);
    if row < rows {
        let index = pair % half;
        let position = row / x.shape(2) % x.shape(1);
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
    let size = vector_size(cos.shape()[1]);
    let pairs = x.shape().num_elements() / 2 / size;
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), cos.dtype.into()]);
    rotary_kernel::launch::<R>(
        &client,
        cubes(pairs.div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
        size,
        x.into_tensor_arg(),
        cos.into_tensor_arg(),
        sin.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        if inverse { -1.0 } else { 1.0 },
        dtypes,
    );
    out
}

#[cube(launch)]
fn adamw_kernel<F: Float, G: Float, N: Size>(
    param: &mut Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<G, N>>,
    m: &mut Tensor<Vector<F, N>>,
    v: &mut Tensor<Vector<F, N>>,
    vectors: usize,
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
    if at < vectors {
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
    let [param, m, v] = contiguous([param, m, v]).map(|x| if x.can_mut() { x } else { x.copy() });
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
        param.clone().into_tensor_arg(),
        grad.into_tensor_arg(),
        m.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        vectors,
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
