//! Dots of one row with weights in blocks, for CPUs without vectors that multiply whole numbers: in floats, by what the compiler makes of it.

use half::f16;

use super::super::simd::{tree_sum, vectorized};
use super::super::stored::Symmetric;
use crate::backend::QUANT_BLOCK;

vectorized! {
    pub(super) fn q8_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [i8], scales: &'a [f16]) -> () {
        let rows = w.chunks_exact(x.len()).zip(scales.chunks_exact(x.len() / QUANT_BLOCK));
        for (out, (w, scales)) in out.iter_mut().zip(rows) {
            let mut lanes = [0.0f32; QUANT_BLOCK];
            let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(w.as_chunks::<QUANT_BLOCK>().0).zip(scales);
            for ((x, w), scale) in blocks {
                let scale = scale.to_f32();
                for lane in 0..QUANT_BLOCK {
                    lanes[lane] = (x[lane] * scale).mul_add(f32::from(w[lane]), lanes[lane]);
                }
            }
            *out = tree_sum(lanes);
        }
    }
}

vectorized! {
    pub(super) fn q4_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [u8], scales: &'a [f16]) -> () {
        dots_of_4::<2>(out, x, w, scales, |[scale, min]| [scale.to_f32(), min.to_f32()]);
    }
}

vectorized! {
    pub(super) fn q4_symmetric_dots<'a>(out: &'a mut [f32], x: &'a [f32], w: &'a [Symmetric], scales: &'a [f16]) -> () {
        dots_of_4::<1>(out, x, bytemuck::cast_slice(w), scales, |[scale]| [scale.to_f32(), -8.0 * scale.to_f32()]);
    }
}

/// `scales` are of a block's floats its scale and minimum.
#[inline(always)]
fn dots_of_4<const N: usize>(
    out: &mut [f32],
    x: &[f32],
    w: &[u8],
    floats: &[f16],
    scales: impl Fn(&[f16; N]) -> [f32; 2],
) {
    const HALF: usize = QUANT_BLOCK / 2;
    let rows = w.chunks_exact(x.len() / 2).zip(floats.chunks_exact(N * x.len() / QUANT_BLOCK));
    for (out, (w, floats)) in out.iter_mut().zip(rows) {
        let mut lanes = [0.0f32; QUANT_BLOCK];
        let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(w.as_chunks::<HALF>().0);
        for ((x, w), floats) in blocks.zip(floats.as_chunks::<N>().0) {
            let [scale, min] = scales(floats);
            for lane in 0..HALF {
                let (low, high) = (f32::from(w[lane] & 15), f32::from(w[lane] >> 4));
                lanes[lane] = x[lane].mul_add(scale.mul_add(low, min), lanes[lane]);
                lanes[HALF + lane] = x[HALF + lane].mul_add(scale.mul_add(high, min), lanes[HALF + lane]);
            }
        }
        *out = tree_sum(lanes);
    }
}
