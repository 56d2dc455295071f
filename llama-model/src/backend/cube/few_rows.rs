//! Products of a few rows, as decoding makes them: a plane reads a row of the weight, once and in order, for all rows of the input.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::reduce::{lanes, planes};
use super::{contiguous, cubes, empty_like};

/// Units of a cube.
const UNITS: usize = 256;
/// Most rows: their sums stay in registers.
pub(super) const MAX_ROWS: usize = 8;

#[cube(launch_unchecked)]
fn few_rows_kernel<X: Float, W: Float, N: Size>(
    x: &Tensor<Vector<X, N>>,
    weight: &Tensor<Vector<W, N>>,
    out: &mut Tensor<X>,
    #[comptime] rows: usize,
    #[define(X, W)] _dtypes: [StorageType; 2],
) {
    let width = x.shape(1) / N::value();
    let d_out = weight.shape(0);
    let row = CUBE_POS * (UNITS / PLANE_DIM as usize) + UNIT_POS as usize / PLANE_DIM as usize;
    if row < d_out {
        let mut sums = Array::<Vector<f32, N>>::new(rows);
        #[unroll]
        for i in 0..rows {
            sums[i] = Vector::cast_from(0.0f32);
        }
        let mut at = UNIT_POS_PLANE as usize;
        while at < width {
            let weight = Vector::<f32, N>::cast_from(weight[row * width + at]);
            #[unroll]
            for i in 0..rows {
                sums[i] += Vector::<f32, N>::cast_from(x[i * width + at]) * weight;
            }
            at += PLANE_DIM as usize;
        }
        #[unroll]
        for i in 0..rows {
            let sum = plane_sum(lanes(sums[i]));
            if UNIT_POS_PLANE == 0 {
                out[i * d_out + row] = X::cast_from(sum);
            }
        }
    }
}

/// Whether [`project`] takes an input, of so few rows that it is better there.
pub(super) fn fits<R: CubeRuntime>(x: &CubeTensor<R>, weight: &CubeTensor<R>) -> bool {
    planes(&x.client) && x.shape()[0] <= MAX_ROWS && x.shape()[1].is_multiple_of(8) && weight.shape().num_dims() == 2
}

/// [`LlamaBackend::project`](crate::LlamaBackend::project) of at most [`MAX_ROWS`] rows, summed in f32.
pub(super) fn project<R: CubeRuntime>(x: CubeTensor<R>, weight: CubeTensor<R>) -> CubeTensor<R> {
    let [x, weight] = contiguous([x, weight]);
    let ([rows, _], [d_out, _]) = (x.shape().dims(), weight.shape().dims());
    let out = empty_like(&x, Shape::new([rows, d_out]), x.dtype);
    let hardware = &x.client.properties().hardware;
    // Planes of the smallest size have a row each; larger ones leave cubes without work.
    let planes = UNITS / hardware.plane_size_max as usize;
    let size = hardware.max_vector_size.min(8);
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), weight.dtype.into()]);
    // SAFETY: planes behind the last row of the weight do nothing, and units read what is within a row.
    unsafe {
        few_rows_kernel::launch_unchecked::<R>(
            &client,
            cubes(d_out.div_ceil(planes)),
            CubeDim::new_1d(UNITS as u32),
            size,
            x.into_tensor_arg(),
            weight.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            rows,
            dtypes,
        );
    }
    out
}
