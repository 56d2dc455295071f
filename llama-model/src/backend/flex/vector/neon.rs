//! Vectors of NEON, which every 64-bit ARM CPU has: 8 x 12 sums in registers.

use std::arch::aarch64::*;
use std::arch::asm;
use std::mem::transmute;

use half::{bf16, f16};

use super::{MAX_LANES, Task, Vector, load_lanes, store_lanes};

impl Vector for float32x4_t {
    const LANES: usize = 4;
    const ROWS: usize = 8;
    const VECTORS: usize = 3;
    const BLOCK: usize = 32 * Self::ROWS;

    unsafe fn run(task: impl Task) {
        unsafe { task.run() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(src: *const f32, count: usize) -> Self {
        unsafe {
            if count >= Self::LANES { vld1q_f32(src) } else { transmute::<[f32; 4], Self>(load_lanes(src, count)) }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(src.cast()))) }
    }
    /// Rust's intrinsic for it is not stable.
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        unsafe {
            let halfs = vld1_u16(src.cast());
            let floats: Self;
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) halfs, options(pure, nomem, nostack));
            floats
        }
    }
    #[inline(always)]
    unsafe fn store(self, out: *mut f32, count: usize) {
        unsafe {
            if count >= Self::LANES {
                vst1q_f32(out, self);
            } else {
                store_lanes(transmute::<Self, [f32; 4]>(self), out, count);
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { vaddq_f32(self, other) }
    }
    #[inline(always)]
    unsafe fn multiply(self, by: Self) -> Self {
        unsafe { vmulq_f32(self, by) }
    }
    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        unsafe { vfmaq_f32(sum, self, by) }
    }
    #[inline(always)]
    unsafe fn four_totals([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        unsafe { transmute::<Self, [f32; 4]>(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))) }
    }
    #[inline(always)]
    unsafe fn transpose(mut square: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        unsafe {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| vreinterpretq_f64_f32(square[i]));
            let [ac, bd] = [vzip1q_f64(a, c), vzip1q_f64(b, d)].map(|x| vreinterpretq_f32_f64(x));
            let [ac_high, bd_high] = [vzip2q_f64(a, c), vzip2q_f64(b, d)].map(|x| vreinterpretq_f32_f64(x));
            square[0] = vtrn1q_f32(ac, bd);
            square[1] = vtrn2q_f32(ac, bd);
            square[2] = vtrn1q_f32(ac_high, bd_high);
            square[3] = vtrn2q_f32(ac_high, bd_high);
            square
        }
    }
    /// The CPU sees the few streams there are by itself.
    #[inline(always)]
    fn prefetch(_: *const f32) {}
}
