//! Kernels with a unit for each element: rotary embeddings and AdamW.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{contiguous, cubes, empty_like};
use crate::backend::AdamWStep;

/// Units of a cube.
const UNITS: usize = 256;

#[cube(launch)]
fn rotary_kernel<F: Float, T: Float>(
    x: &Tensor<F>,
    cos: &Tensor<T>,
    sin: &Tensor<T>,
    out: &mut Tensor<F>,
    sign: f32,
    #[define(F, T)] _dtypes: [StorageType; 2],
) {
    let half = cos.shape(1);
    let pair = CUBE_POS * UNITS + UNIT_POS as usize;
    if pair < x.len() / 2 {
        let index = pair % half;
        let row = pair / half;
        let position = row / x.shape(2) % x.shape(1);
        let first = row * 2 * half + index;
        let cos = f32::cast_from(cos[position * half + index]);
        let sin = f32::cast_from(sin[position * half + index]) * sign;
        let a = f32::cast_from(x[first]);
        let b = f32::cast_from(x[first + half]);
        out[first] = F::cast_from(a * cos - b * sin);
        out[first + half] = F::cast_from(b * cos + a * sin);
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
    let pairs = x.shape().num_elements() / 2;
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), cos.dtype.into()]);
    rotary_kernel::launch::<R>(
        &client,
        cubes(pairs.div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
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
fn adamw_kernel<F: Float, G: Float>(
    param: &mut Tensor<F>,
    grad: &Tensor<G>,
    m: &mut Tensor<F>,
    v: &mut Tensor<F>,
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
        let grad = f32::cast_from(grad[at]) * grad_scale;
        let mean = beta_1 * f32::cast_from(m[at]) + one_minus_beta_1 * grad;
        let square = beta_2 * f32::cast_from(v[at]) + one_minus_beta_2 * grad * grad;
        let update = mean / (square.sqrt() * inv_root_correction_2 + epsilon);
        param[at] = F::cast_from(f32::cast_from(param[at]) * decay - step_size * update);
        m[at] = F::cast_from(mean);
        v[at] = F::cast_from(square);
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
    adamw_kernel::launch::<R>(
        &param.client.clone(),
        cubes(param.shape().num_elements().div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
        param.clone().into_tensor_arg(),
        grad.into_tensor_arg(),
        m.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
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
