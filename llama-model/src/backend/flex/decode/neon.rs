//! Whole numbers by NEON: bytes are multiplied into 16 bits and added by pairs.

use std::arch::aarch64::*;

use super::rounded::Bytes;
use super::whole::Whole;
use crate::backend::QUANT_BLOCK;

impl Whole for float32x4_t {
    #[inline(always)]
    unsafe fn products_of_8(w: *const i8, x: &Bytes, _: &[i32; 2]) -> Self {
        unsafe { products([vld1q_s8(w), vld1q_s8(w.add(16))], x) }
    }

    #[inline(always)]
    unsafe fn products_of_4(w: *const u8, x: &Bytes) -> Self {
        unsafe {
            let w = vld1q_u8(w);
            let halves = [vandq_u8(w, vdupq_n_u8(15)), vshrq_n_u8::<4>(w)];
            products(halves.map(|half| vreinterpretq_s8_u8(half)), x)
        }
    }
}

#[inline(always)]
unsafe fn products(w: [int8x16_t; 2], x: &Bytes) -> float32x4_t {
    unsafe {
        let (high, low) = x.split_at(QUANT_BLOCK);
        vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<7>(sums(w, high.as_ptr())), sums(w, low.as_ptr())))
    }
}

/// 2 · 128 · 127 is still a number of 16 bits.
#[inline(always)]
unsafe fn sums(w: [int8x16_t; 2], x: *const i8) -> int32x4_t {
    unsafe {
        let x = [vld1q_s8(x), vld1q_s8(x.add(16))];
        let first = vmlal_s8(vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0])), vget_low_s8(w[1]), vget_low_s8(x[1]));
        let second = vmlal_high_s8(vmull_high_s8(w[0], x[0]), w[1], x[1]);
        vpadalq_s16(vpaddlq_s16(first), second)
    }
}
