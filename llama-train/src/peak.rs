//! The peak a machine really reaches, for the model FLOPs utilisation.

use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use llama_model::backend::ops::{primitive, tensor};
use llama_model::{LlamaBackend, Precision};

/// Multiply-adds per second, twice, from which a product of 2,048 is too small to show a device's peak.
const LARGE: f64 = 2e13;

/// Floating-point operations per second of the best of several products of two square matrices, made as the model makes its own in
/// this precision: what they could reach at most on this backend. Takes about a second.
pub fn measure_peak_flops<B: LlamaBackend>(device: &B::Device, precision: Precision) -> f64 {
    let peak = best_of::<B>(2048, device, precision);
    let kernels = B::has_products(device, precision);
    if kernels && peak > LARGE { best_of::<B>(8192, device, precision) } else { peak }
}

/// [`measure_peak_flops`] with products of `[n, n]`.
fn best_of<B: LlamaBackend>(n: usize, device: &B::Device, precision: Precision) -> f64 {
    let stored = B::has_products(device, precision);
    let matrix = || {
        let matrix = Tensor::<B, 2>::random([n, n], Distribution::Uniform(-1.0, 1.0), device);
        if stored { matrix.cast(precision.dtype()) } else { matrix }
    };
    let (a, b) = (matrix(), matrix());
    let product = || {
        let start = Instant::now();
        let (a, b) = (a.clone(), b.clone());
        let product: Tensor<B, 2> = tensor(B::project(primitive(a), primitive(b), precision));
        // Reading one number waits for the product without moving it.
        product.narrow(0, 0, 1).narrow(1, 0, 1).into_data();
        start.elapsed().as_secs_f64()
    };
    product();
    let best = (0..8).map(|_| product()).fold(f64::INFINITY, f64::min);
    2.0 * (n as f64).powi(3) / best
}
