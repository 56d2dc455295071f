//! The peak a machine really reaches, for the model FLOPs utilisation.

use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor};

/// Floating-point operations per second of the best of several f32 products of two `2048 × 2048` matrices: what a
/// model's products could reach at most on this backend. Takes about a second.
pub fn measure_peak_flops<B: Backend>(device: &B::Device) -> f64 {
    const N: usize = 2048;
    let matrix = || Tensor::<B, 2>::random([N, N], Distribution::Uniform(-1.0, 1.0), device);
    let (a, b) = (matrix(), matrix());
    let product = || {
        let start = Instant::now();
        // Reading one number waits for the product without moving it.
        a.clone().matmul(b.clone()).narrow(0, 0, 1).narrow(1, 0, 1).into_data();
        start.elapsed().as_secs_f64()
    };
    product();
    let best = (0..8).map(|_| product()).fold(f64::INFINITY, f64::min);
    2.0 * (N as f64).powi(3) / best
}
