//! The gradient of the embeddings: a cube has some rows of the vocabulary and adds to them, in order, what their tokens have.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::ops::numeric::zeros;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{contiguous, cubes, owned};

/// Units of a cube, and tokens that are looked at together.
const UNITS: usize = 256;
/// Tokens of which it is noted together whether any has a row of the cube.
const GROUP: usize = 32;
/// Rows of the vocabulary that a cube has: few, because frequent tokens are neighbours.
const ROWS: usize = 8;

#[cube(launch)]
fn backward_kernel<F: Float, I: Int>(
    grad: &Array<F>,
    tokens: &Array<I>,
    sum: &mut Array<F>,
    #[define(F, I)] _dtypes: [StorageType; 2],
) {
    let first = CUBE_POS * ROWS;
    let count = tokens.len();
    let width = grad.len() / count;
    let unit = UNIT_POS as usize;
    let mut rows = SharedMemory::<u32>::new(UNITS);
    let mut any = SharedMemory::<u32>::new(comptime!(UNITS / GROUP));
    if first * width < sum.len() {
        for tile in 0..count.div_ceil(UNITS) {
            let start = tile * UNITS;
            // The row, counted from this cube's first; others are not below `ROWS`.
            let mut row = u32::new(ROWS as i64);
            if start + unit < count {
                let token = u32::cast_from(tokens[start + unit]);
                if token >= first as u32 {
                    row = token - first as u32;
                }
            }
            rows[unit] = row;
            if unit < comptime!(UNITS / GROUP) {
                any[unit] = 0;
            }
            sync_cube();
            if row < comptime!(ROWS as u32) {
                any[unit / GROUP] = 1;
            }
            sync_cube();
            for group in 0..comptime!(UNITS / GROUP) {
                if any[group] == 1 {
                    for index in group * GROUP..group * GROUP + GROUP {
                        let row = rows[index];
                        if row < comptime!(ROWS as u32) {
                            let mut column = unit;
                            while column < width {
                                let at = (first + row as usize) * width + column;
                                sum[at] = F::cast_from(
                                    f32::cast_from(sum[at]) + f32::cast_from(grad[(start + index) * width + column]),
                                );
                                column += UNITS;
                            }
                        }
                    }
                }
            }
            sync_cube();
        }
    }
}

/// [`LlamaBackend::token_embedding_backward`](crate::LlamaBackend::token_embedding_backward), in place where nobody else holds the sum.
pub(super) fn backward<R: CubeRuntime>(
    grad: CubeTensor<R>,
    tokens: CubeTensor<R>,
    vocab_size: usize,
    sum: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let [grad, tokens] = contiguous([grad, tokens]);
    let (client, device) = (grad.client.clone(), grad.device.clone());
    let sum = sum.unwrap_or_else(|| zeros(device, Shape::new([vocab_size, grad.shape()[1]]), grad.dtype));
    let [sum] = owned([sum]);
    let dtypes = [grad.dtype.into(), tokens.dtype.into()];
    backward_kernel::launch::<R>(
        &client,
        cubes(vocab_size.div_ceil(ROWS)),
        CubeDim::new_1d(UNITS as u32),
        grad.into_array_arg(),
        tokens.into_array_arg(),
        sum.clone().into_array_arg(),
        dtypes,
    );
    sum
}
