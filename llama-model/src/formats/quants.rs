//! llama.cpp's blocks of quantised values (its `ggml-quants.c` is their definition), to floats and back.
//!
//! A block holds 32 values, or 256 in the `K` types, and begins or ends with its scales in half precision.

use half::f16;
use rayon::prelude::*;

use crate::WeightFormat;
use crate::backend::rounding::{largest, nearest, round, round_symmetric};
use crate::backend::{Bits, QUANT_BLOCK};
use crate::copy::fill;

/// Values of a block in the simple types.
pub(super) const BLOCK: usize = 32;
/// Values of a block in the `K` types.
const K_BLOCK: usize = 256;
pub(super) const Q8_0_BYTES: usize = 34;
pub(super) const Q4_0_BYTES: usize = 18;

/// Blocks that a thread reads or writes at a time.
pub(super) const PIECE: usize = 1024;

/// A type of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quant {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Quant {
    /// Values and bytes of a block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (BLOCK, Q4_0_BYTES),
            Self::Q4_1 => (BLOCK, 20),
            Self::Q5_0 => (BLOCK, 22),
            Self::Q5_1 => (BLOCK, 24),
            Self::Q8_0 => (BLOCK, Q8_0_BYTES),
            Self::Q2K => (K_BLOCK, 84),
            Self::Q3K => (K_BLOCK, 110),
            Self::Q4K => (K_BLOCK, 144),
            Self::Q5K => (K_BLOCK, 176),
            Self::Q6K => (K_BLOCK, 210),
        }
    }

    /// The shortest format that loses next to nothing of it.
    pub(super) fn stored(self) -> WeightFormat {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => WeightFormat::Q4,
            _ => WeightFormat::Q8,
        }
    }

    /// The shortest of our blocks of so many bits that take it.
    pub(super) fn bits(self, bits: Bits) -> Bits {
        if self == Self::Q4_0 && bits == Bits::Four { Bits::FourSymmetric } else { bits }
    }

    /// The values of whole blocks, by all threads.
    pub(super) fn decode_all(self, bytes: &[u8]) -> Vec<f32> {
        let (values, size) = self.block();
        let (len, pieces) = (bytes.len() / size * values, bytes.par_chunks(PIECE * size));
        fill(len, PIECE * values, pieces, |out, bytes| out.copy_from_slice(&self.decode(bytes)))
    }

    /// Writes our blocks of as many values: with the file's own integers where it has no more bits, else rounded.
    pub(super) fn write_blocks(self, bits: Bits, bytes: &[u8], values: &mut [u8], scales: &mut [f16]) {
        let (count, size) = self.block();
        let ours = count / QUANT_BLOCK;
        let values = values.chunks_exact_mut(ours * 4 * bits.words());
        let scales = scales.chunks_exact_mut(ours * bits.scales());
        for ((block, values), scales) in bytes.chunks_exact(size).zip(values).zip(scales) {
            match (self, bits) {
                (Self::Q4_0, Bits::FourSymmetric) => {
                    values.copy_from_slice(&block[2..]);
                    scales[0] = stored(block, 0);
                }
                (Self::Q4_1, Bits::Four) => {
                    values.copy_from_slice(&block[4..]);
                    scales.copy_from_slice(&[stored(block, 0), stored(block, 2)]);
                }
                (Self::Q4K, Bits::Four) => q4_k_blocks(block, values, scales),
                // Ours has no -128.
                (Self::Q8_0, Bits::Eight) if !block[2..].iter().fold(false, |any, q| any | (*q == 128)) => {
                    values.copy_from_slice(&block[2..]);
                    scales[0] = stored(block, 0);
                }
                _ => round(bits, &self.decode(block), values, scales),
            }
        }
    }

    /// The values of whole blocks.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let (values, size) = self.block();
        let mut out = Vec::with_capacity(bytes.len() / size * values);
        for block in bytes.chunks_exact(size) {
            // The scale, and the smallest value of the types that have one.
            let (d, m) = (half(block, 0), half(block, 2));
            match self {
                Self::Q4_0 => nibbles(&block[2..], |q, _| d * (q as i32 - 8) as f32, &mut out),
                Self::Q4_1 => nibbles(&block[4..], |q, _| d * q as f32 + m, &mut out),
                Self::Q5_0 => {
                    let high = bits(&block[2..6]);
                    let value = |q: u32, i: usize| (q | (high >> i & 1) << 4) as i32 - 16;
                    nibbles(&block[6..], |q, i| d * value(q, i) as f32, &mut out);
                }
                Self::Q5_1 => {
                    let high = bits(&block[4..8]);
                    let value = |q: u32, i: usize| q | (high >> i & 1) << 4;
                    nibbles(&block[8..], |q, i| d * value(q, i) as f32 + m, &mut out);
                }
                Self::Q8_0 => out.extend(block[2..].iter().map(|q| d * f32::from(*q as i8))),
                Self::Q2K => q2_k(block, &mut out),
                Self::Q3K => q3_k(block, &mut out),
                Self::Q4K => q4_k(block, &mut out),
                Self::Q5K => q5_k(block, &mut out),
                Self::Q6K => q6_k(block, &mut out),
            }
        }
        out
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    stored(block, at).to_f32()
}

fn stored(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// In half precision, which has no larger numbers than these.
fn to_half(x: f32) -> f16 {
    let max = f16::MAX.to_f32();
    f16::from_f32(x.clamp(-max, max))
}

fn bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// 16 bytes as 32 values: the low halves, then the high ones.
fn nibbles(packed: &[u8], value: impl Fn(u32, usize) -> f32, out: &mut Vec<f32>) {
    out.extend(packed.iter().enumerate().map(|(i, byte)| value(u32::from(byte & 15), i)));
    out.extend(packed.iter().enumerate().map(|(i, byte)| value(u32::from(byte >> 4), i + 16)));
}

/// Scales and minima in 4 bits, values in 2.
fn q2_k(block: &[u8], out: &mut Vec<f32>) {
    let (scales, packed) = (&block[..16], &block[16..80]);
    let (d, min) = (half(block, 80), half(block, 82));
    for (i, scale) in scales.iter().enumerate() {
        let (part, shift) = (&packed[i / 8 * 32 + i % 2 * 16..][..16], i % 8 / 2 * 2);
        let (scale, low) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
        out.extend(part.iter().map(|q| scale * f32::from(q >> shift & 3) - low));
    }
}

/// Scales in 6 bits, values in 2 with a third apart.
fn q3_k(block: &[u8], out: &mut Vec<f32>) {
    let (high, packed, scales, d) = (&block[..32], &block[32..96], &block[96..108], half(block, 108));
    for i in 0..16 {
        let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
        let scale = (low | (scales[8 + i % 4] >> (i / 4 * 2) & 3) << 4) as i32 - 32;
        let (part, shift) = (&packed[i / 8 * 32 + i % 2 * 16..][..16], i % 8 / 2 * 2);
        let high = &high[i % 2 * 16..][..16];
        out.extend(part.iter().zip(high).map(|(q, high)| {
            let value = i32::from(q >> shift & 3) - if high >> (i / 2) & 1 == 1 { 0 } else { 4 };
            d * scale as f32 * value as f32
        }));
    }
}

/// Scale and minimum number `i` of eight, in 6 bits each.
fn scale_and_min(scales: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (scales[i] & 63, scales[i + 4] & 63)
    } else {
        let both = scales[i + 4];
        (both & 15 | scales[i - 4] >> 6 << 4, both >> 4 | scales[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut Vec<f32>) {
    let (d, min, scales, packed) = (half(block, 0), half(block, 2), &block[4..16], &block[16..144]);
    for i in 0..8 {
        let (scale, low) = scale_and_min(scales, i);
        let part = &packed[i / 2 * 32..][..32];
        out.extend(part.iter().map(|q| d * scale * f32::from(q >> (i % 2 * 4) & 15) - min * low));
    }
}

/// The same integers as blocks of 32.
fn q4_k_blocks(block: &[u8], values: &mut [u8], scales: &mut [f16]) {
    let (d, min, packed) = (half(block, 0), half(block, 2), &block[16..144]);
    let blocks = values.chunks_exact_mut(QUANT_BLOCK / 2).zip(scales.chunks_exact_mut(2));
    for (i, (values, scales)) in blocks.enumerate() {
        let (scale, low) = scale_and_min(&block[4..16], i);
        scales.copy_from_slice(&[d * scale, -min * low].map(to_half));
        let (first, second) = packed[i / 2 * 32..][..32].split_at(QUANT_BLOCK / 2);
        let value = |q: u8| q >> (i % 2 * 4) & 15;
        values.iter_mut().zip(first.iter().zip(second)).for_each(|(q, (a, b))| *q = value(*a) | value(*b) << 4);
    }
}

fn q5_k(block: &[u8], out: &mut Vec<f32>) {
    let (d, min, scales) = (half(block, 0), half(block, 2), &block[4..16]);
    let (high, packed) = (&block[16..48], &block[48..176]);
    for i in 0..8 {
        let (scale, low) = scale_and_min(scales, i);
        let part = packed[i / 2 * 32..][..32].iter().zip(high);
        out.extend(part.map(|(q, high)| {
            let value = q >> (i % 2 * 4) & 15 | (high >> i & 1) << 4;
            d * scale * f32::from(value) - min * low
        }));
    }
}

fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(block, 208));
    for i in 0..8 {
        let (section, quarter) = (i / 4, i % 4);
        let low = &low[section * 64 + quarter % 2 * 32..][..32];
        let high = &high[section * 32..][..32];
        out.extend(low.iter().zip(high).enumerate().map(|(l, (low, high))| {
            let value = i32::from(low >> (quarter / 2 * 4) & 15 | (high >> (2 * quarter) & 3) << 4) - 32;
            let scale = scales[section * 8 + quarter * 2 + l / 16] as i8;
            d * f32::from(scale) * value as f32
        }));
    }
}

/// Each block's largest value becomes 127.
pub(super) fn encode_q8_0(values: &[f32], out: &mut [u8]) {
    for (block, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<Q8_0_BYTES>().0) {
        let d = largest(block, f32::abs) / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        // Half a step is rounded away from zero, as there.
        let rounded = |x: f32| {
            let (even, off) = (nearest(x), x - nearest(x) as f32);
            even + i32::from(off == 0.5 && x > 0.0) - i32::from(off == -0.5 && x < 0.0)
        };
        out[2..].iter_mut().zip(block).for_each(|(q, x)| *q = rounded(x * inverse) as u8);
    }
}

pub(super) fn encode_q4_0(values: &[f32], out: &mut [u8]) {
    for (block, out) in values.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<Q4_0_BYTES>().0) {
        let d = round_symmetric(block, &mut out[2..]);
        out[..2].copy_from_slice(&d.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_and_four_bits_are_near_what_they_encode() {
        let values: Vec<f32> = (0..320).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect();
        let encoded = |quant: Quant, values: &[f32]| {
            let mut bytes = vec![0; values.len() / BLOCK * quant.block().1];
            if quant == Quant::Q8_0 {
                encode_q8_0(values, &mut bytes)
            } else {
                encode_q4_0(values, &mut bytes)
            }
            quant.decode(&bytes)
        };
        for (quant, tolerance) in [(Quant::Q8_0, 0.005), (Quant::Q4_0, 0.13)] {
            let decoded = encoded(quant, &values);
            assert_eq!(decoded.len(), values.len());
            let worst = decoded.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "{quant:?}: {worst}");
            assert!(encoded(quant, &[0.0; 32]).iter().all(|x| *x == 0.0));
        }
        // Halves go away from zero.
        let halves: Vec<f32> = (0..32).map(|i| if i == 0 { 127.0 } else { i as f32 * 3.5 - 55.5 }).collect();
        let found = encoded(Quant::Q8_0, &halves);
        assert!(found.iter().zip(&halves).all(|(found, exact)| *found == exact.round()), "{found:?}");
    }

    /// Every type's blocks as ours have the file's values: the same where ours have as many bits, else those next to them.
    #[test]
    fn blocks_of_files_become_ours() {
        use Quant::*;
        for quant in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
            let (count, size) = quant.block();
            // Any bytes, with sound scales of both signs, and one that is -128.
            let mut bytes: Vec<u8> = (0..6 * size).map(|i| (i * 7919 % 251 + i / size * 16 % 251) as u8).collect();
            for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
                let scale = |x: f32| f16::from_f32(if i % 2 == 0 { x } else { -x }).to_le_bytes();
                for at in match quant {
                    Q2K => 80..84,
                    Q3K => 108..110,
                    Q6K => 208..210,
                    Q4_1 | Q5_1 | Q4K | Q5K => 0..4,
                    _ => 0..2,
                }
                .step_by(2)
                {
                    block[at..at + 2].copy_from_slice(&scale(0.0123 + at as f32 * 1e-4));
                }
            }
            if quant == Q8_0 {
                // Only the last block has -128.
                bytes.iter_mut().filter(|byte| **byte == 128).for_each(|byte| *byte = 1);
                bytes[5 * size + 9] = 128;
            }
            let exact = quant.decode(&bytes);
            assert_eq!(quant.decode_all(&bytes), exact);
            for (bits, steps) in [(Bits::Four, 15.0), (Bits::FourSymmetric, 8.0), (Bits::Eight, 254.0)] {
                let ours = exact.len() / QUANT_BLOCK;
                let mut values = vec![0; ours * 4 * bits.words()];
                let mut scales = vec![f16::ZERO; ours * bits.scales()];
                quant.write_blocks(bits, &bytes, &mut values, &mut scales);
                let blocks = values.chunks(4 * bits.words()).zip(scales.chunks(bits.scales()));
                let found: Vec<f32> = blocks
                    .flat_map(|(values, scales)| match bits {
                        Bits::Eight => values.iter().map(|q| f32::from(*q as i8) * scales[0].to_f32()).collect(),
                        Bits::Four | Bits::FourSymmetric => {
                            let halves = values.iter().map(|q| q & 15).chain(values.iter().map(|q| q >> 4));
                            let min = scales.get(1).map_or(-8.0 * scales[0].to_f32(), |min| min.to_f32());
                            halves.map(|q| f32::from(q) * scales[0].to_f32() + min).collect::<Vec<f32>>()
                        }
                    })
                    .collect();
                let same =
                    matches!((quant, bits), (Q4_0, Bits::FourSymmetric) | (Q4_1, Bits::Four) | (Q8_0, Bits::Eight));
                for (block, (found, exact)) in found.chunks(32).zip(exact.chunks(32)).enumerate() {
                    let largest = exact.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let half_precision = 1.5e-3 * largest;
                    let tolerance = match (quant, bits) {
                        _ if same && block < 5 => 1e-6,
                        (Q4K, Bits::Four) => half_precision,
                        _ => 1.02 * largest / steps + half_precision,
                    };
                    let worst = found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(
                        worst <= tolerance,
                        "{quant:?} to {bits:?}, block {block} of {count}: off by {worst}, {tolerance}"
                    );
                }
            }
        }
    }
}
