//! Products with frozen weights that have low-rank adapters (Hu et al. 2021, "LoRA"), each with a backward by hand:
//!
//! ```text
//! y  = x Wᵀ + d Bᵀ   with d = scale · x Aᵀ
//! dx = dy W + e A    with e = scale · dy B,   dA = eᵀ x,   dB = dyᵀ d
//! ```
//!
//! What an adapter gives is added where the product with the weight is, in no tensor of its own.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, TensorMetadata};

use super::{LlamaBackend, Matrix};
use crate::Precision;

/// An adapter of a weight `[d_out, d_in]`.
#[derive(Clone, Debug)]
pub struct LowRank<B: Backend> {
    /// `A`, `[rank, d_in]`.
    pub down: FloatTensor<B>,
    /// `B`, `[d_out, rank]`.
    pub up: FloatTensor<B>,
    /// Factor of the product, `alpha / rank`.
    pub scale: f64,
}

/// A frozen weight, perhaps with an adapter.
#[derive(Clone, Debug)]
pub struct Adapted<B: Backend> {
    /// `W`, `[d_out, d_in]`.
    pub weight: Matrix<B>,
    /// What is trained.
    pub adapter: Option<LowRank<B>>,
}

/// What the backward of one product needs.
#[derive(Clone, Debug)]
pub struct AdaptedSaved<B: Backend> {
    weight: Matrix<B>,
    /// With `x` and `d`.
    adapter: Option<(LowRank<B>, FloatTensor<B>, FloatTensor<B>)>,
    /// The input's, which its gradient has.
    dtype: DType,
}

/// The products of one input with several weights, and what their backwards need.
///
/// # Shapes
/// `x [tokens, d_in]`, results `[tokens, d_out]`.
pub fn forward_saving<B: LlamaBackend>(
    x: FloatTensor<B>,
    layers: Vec<Adapted<B>>,
    precision: Precision,
) -> Vec<(FloatTensor<B>, AdaptedSaved<B>)> {
    let weights = layers.iter().map(|layer| layer.weight.clone()).collect();
    let products = Matrix::project_each(x.clone(), weights, precision);
    let adapt = |(product, Adapted { weight, adapter }): (_, Adapted<B>)| {
        let dtype = x.dtype();
        let Some(adapter) = adapter else { return (product, AdaptedSaved { weight, adapter: None, dtype }) };
        let d = scaled::<B>(B::project(x.clone(), adapter.down.clone(), precision), adapter.scale);
        let out = B::add_projection(product, d.clone(), adapter.up.clone(), precision);
        (out, AdaptedSaved { weight, adapter: Some((adapter, x.clone(), d)), dtype })
    };
    products.into_iter().zip(layers).map(adapt).collect()
}

/// The same without a backward.
pub fn forward<B: LlamaBackend>(
    x: FloatTensor<B>,
    layers: Vec<Adapted<B>>,
    precision: Precision,
) -> Vec<FloatTensor<B>> {
    forward_saving(x, layers, precision).into_iter().map(|(out, _)| out).collect()
}

/// Gradients of one product for `x`, `A` and `B`, those that are `wanted`.
pub fn backward<B: LlamaBackend>(
    saved: AdaptedSaved<B>,
    grad: FloatTensor<B>,
    wanted: [bool; 3],
    precision: Precision,
) -> [Option<FloatTensor<B>>; 3] {
    let AdaptedSaved { weight, adapter, dtype } = saved;
    let Some((LowRank { down, up, scale }, x, d)) = adapter else {
        return [wanted[0].then(|| weight.backward_input(grad, precision, dtype)), None, None];
    };
    let e = scaled::<B>(B::project_backward_input(vec![(grad.clone(), up)], precision, dtype), scale);
    let d_down = wanted[1].then(|| B::project_backward_weight(e.clone(), x, precision));
    let d_up = wanted[2].then(|| B::project_backward_weight(grad.clone(), d, precision));
    let d_x = wanted[0].then(|| match weight {
        Matrix::Floats(weight) => B::project_backward_input(vec![(grad, weight), (e, down)], precision, dtype),
        weight => {
            let sum = weight.backward_input(grad, precision, dtype);
            B::add_projection(sum, e, B::float_transpose(down), precision)
        }
    });
    [d_x, d_down, d_up]
}

fn scaled<B: Backend>(x: FloatTensor<B>, factor: f64) -> FloatTensor<B> {
    if factor == 1.0 { x } else { B::float_mul_scalar(x, factor.into()) }
}
