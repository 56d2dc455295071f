//! What kernels need of a CPU's vectors, and vectors for any CPU.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::mask;

use std::marker::PhantomData;

use burn::tensor::Element;
use bytemuck::Pod;
use half::{bf16, f16};

use super::simd::sum_halves;

/// Lanes of the widest vector.
pub(super) const MAX_LANES: usize = 16;
/// Lanes of a cache line.
pub(super) const LINE: usize = 16;

/// A vector register of f32 lanes, and the sizes of the products' kernel that suit a CPU which has them.
///
/// # Safety
/// Of all functions: the CPU must have the instructions, and what is pointed to must exist.
pub(super) trait Vector: Copy {
    /// Numbers in it, [`MAX_LANES`] at most.
    const LANES: usize;
    /// Rows of the tile of sums that registers hold.
    const ROWS: usize;
    /// Vectors of columns of that tile.
    const VECTORS: usize;
    /// Rows of a packed block with all its terms, for the second-level cache: a multiple of [`ROWS`](Self::ROWS).
    const BLOCK: usize;

    /// Runs a task whose code is compiled for these vectors.
    unsafe fn run(task: impl Task);
    unsafe fn splat(x: f32) -> Self;
    /// The numbers at `src`, or the first `count` of them and zeros.
    unsafe fn load(src: *const f32, count: usize) -> Self;
    /// The numbers at `src`, as many as lanes.
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        unsafe { load_by(src, Float::value) }
    }
    /// The same of f16.
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        unsafe { load_by(src, f16::to_f32) }
    }
    /// Stores the first `count` numbers, all if it is more.
    unsafe fn store(self, out: *mut f32, count: usize);
    /// The same of the nearest bf16.
    #[inline(always)]
    unsafe fn store_bf16(self, out: *mut bf16, count: usize) {
        let mut lanes = [0.0; MAX_LANES];
        unsafe {
            self.store(lanes.as_mut_ptr(), Self::LANES);
            lanes.iter().take(count.min(Self::LANES)).enumerate().for_each(|(i, x)| *out.add(i) = Number::nearest(*x));
        }
    }
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn multiply(self, by: Self) -> Self;
    /// `self · by + sum`
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self;

    /// The sum of its numbers.
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let mut lanes = [0.0; MAX_LANES];
        unsafe { self.store(lanes.as_mut_ptr(), Self::LANES) };
        sum_halves(&mut lanes[..Self::LANES])
    }

    /// The sums of four vectors.
    #[inline(always)]
    unsafe fn four_totals([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        unsafe { [a.total(), b.total(), c.total(), d.total()] }
    }

    /// Columns become rows, of the first [`LANES`](Self::LANES) vectors.
    unsafe fn transpose(square: [Self; MAX_LANES]) -> [Self; MAX_LANES];
    /// Asks for the cache line that `ptr` is in; it may be outside of anything.
    fn prefetch(ptr: *const f32);
    /// The same for the second-level cache, which waits for more lines at a time than the first.
    #[inline(always)]
    fn prefetch_far(ptr: *const f32) {
        Self::prefetch(ptr);
    }

    /// Each number rounded to the nearest bf16, ties to even, NaN to NaN.
    #[inline(always)]
    unsafe fn round_to_bf16(self) -> Self {
        unsafe { self.map(nearest_bf16) }
    }

    /// Each number rounded to the nearest f16, ties to even.
    #[inline(always)]
    unsafe fn round_to_f16(self) -> Self {
        unsafe { self.map(|x| half::f16::from_f32(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn map(self, each: impl Fn(f32) -> f32) -> Self {
        let mut lanes = [0.0; MAX_LANES];
        unsafe {
            self.store(lanes.as_mut_ptr(), Self::LANES);
            lanes.iter_mut().take(Self::LANES).for_each(|x| *x = each(*x));
            Self::load(lanes.as_ptr(), Self::LANES)
        }
    }
}

/// The numbers at `src`, widened one by one.
///
/// # Safety
/// There must be as many as lanes.
#[inline(always)]
unsafe fn load_by<V: Vector, T: Copy>(src: *const T, wide: impl Fn(T) -> f32) -> V {
    let mut lanes = [0.0; MAX_LANES];
    unsafe {
        lanes.iter_mut().take(V::LANES).enumerate().for_each(|(i, lane)| *lane = wide(*src.add(i)));
        V::load(lanes.as_ptr(), V::LANES)
    }
}

/// A float that vectors read as f32.
pub(super) trait Float: Copy {
    /// # Safety
    /// There must be as many as lanes at `src`; the CPU must have the vectors.
    unsafe fn load<V: Vector>(src: *const Self) -> V;
    /// The first `count` and zeros.
    ///
    /// # Safety
    /// They must be there; the CPU must have the vectors.
    #[inline(always)]
    unsafe fn load_first<V: Vector>(src: *const Self, count: usize) -> V {
        if count >= V::LANES {
            return unsafe { Self::load(src) };
        }
        let mut lanes = [0.0; MAX_LANES];
        unsafe {
            lanes.iter_mut().take(count).enumerate().for_each(|(i, lane)| *lane = (*src.add(i)).value());
            V::load(lanes.as_ptr(), V::LANES)
        }
    }
    fn value(self) -> f32;
}

/// A float that tensors of kernels have.
pub(super) trait Number: Float + Element + Pod {
    fn nearest(x: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(src: *const f32) -> V {
        unsafe { V::load(src, V::LANES) }
    }
    #[inline(always)]
    unsafe fn load_first<V: Vector>(src: *const f32, count: usize) -> V {
        unsafe { V::load(src, count) }
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Number for f32 {
    #[inline(always)]
    fn nearest(x: f32) -> f32 {
        x
    }
}

impl Float for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(src: *const bf16) -> V {
        unsafe { V::load_bf16(src) }
    }
    /// Without `half`'s branch for NaN, so that it becomes vectors.
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn nearest(x: f32) -> bf16 {
        bf16::from_bits((nearest_bf16(x).to_bits() >> 16) as u16)
    }
}

impl Float for f16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(src: *const f16) -> V {
        unsafe { V::load_f16(src) }
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// Writes numbers as f32 to the beginning of a buffer.
///
/// # Safety
/// The CPU must have the vectors.
pub(super) unsafe fn widen<V: Vector>(out: &mut [f32], w: &[impl Float]) {
    unsafe { V::run(Widen::<V, _> { out, w, kind: PhantomData }) }
}

struct Widen<'a, V, T> {
    out: &'a mut [f32],
    w: &'a [T],
    kind: PhantomData<V>,
}

impl<V: Vector, T: Float> Task for Widen<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { out, w, .. } = self;
        let (blocks, rest) =
            (out.chunks_exact_mut(V::LANES).zip(w.chunks_exact(V::LANES)), w.len() / V::LANES * V::LANES);
        for (out, w) in blocks {
            // SAFETY: both have as many as lanes.
            unsafe { T::load::<V>(w.as_ptr()).store(out.as_mut_ptr(), V::LANES) };
        }
        for (out, w) in out[rest..].iter_mut().zip(&w[rest..]) {
            *out = w.value();
        }
    }
}

/// Defines the function of a trait that runs a task compiled for some instructions: `compiled_for!(run, "avx2,fma")`.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_for {
    ($run:ident, $features:literal) => {
        unsafe fn $run(task: impl crate::backend::flex::vector::Task) {
            #[target_feature(enable = $features)]
            unsafe fn compiled(task: impl crate::backend::flex::vector::Task) {
                unsafe { task.run() }
            }
            unsafe { compiled(task) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use compiled_for;

/// Calls a function with the CPU's vectors for its type: `by_vectors!(f(arguments))`.
macro_rules! by_vectors {
    ($($function:ident)::+($($argument:expr),* $(,)?)) => {
        match crate::backend::flex::simd::arch() {
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V4(_) => $($function)::+::<std::arch::x86_64::__m512>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V3(_) => $($function)::+::<std::arch::x86_64::__m256>($($argument),*),
            #[cfg(target_arch = "aarch64")]
            pulp::Arch::Neon(_) => $($function)::+::<std::arch::aarch64::float32x4_t>($($argument),*),
            _ => $($function)::+::<crate::backend::flex::vector::Plain>($($argument),*),
        }
    };
}
pub(super) use by_vectors;

/// Something to do; `run` must be inlined, or it is not compiled for the vectors that it uses.
pub(super) trait Task {
    /// # Safety
    /// The task's own.
    unsafe fn run(self);
}

/// A vector of the four numbers that every CPU can have in some way: what is left to the compiler is how.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 4]);

impl Vector for Plain {
    const LANES: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 2;
    const BLOCK: usize = 32 * Self::ROWS;

    unsafe fn run(task: impl Task) {
        unsafe { task.run() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(src: *const f32, count: usize) -> Self {
        Self(unsafe { load_lanes(src, count) })
    }
    #[inline(always)]
    unsafe fn store(self, out: *mut f32, count: usize) {
        unsafe { store_lanes(self.0, out, count) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self([0, 1, 2, 3].map(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn multiply(self, by: Self) -> Self {
        Self([0, 1, 2, 3].map(|i| self.0[i] * by.0[i]))
    }
    /// In two roundings: without the instruction a fused one is a call of the C library.
    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        Self([0, 1, 2, 3].map(|i| self.0[i] * by.0[i] + sum.0[i]))
    }
    #[inline(always)]
    unsafe fn transpose(mut square: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        for row in 0..4 {
            for col in 0..row {
                (square[row].0[col], square[col].0[row]) = (square[col].0[row], square[row].0[col]);
            }
        }
        square
    }
    fn prefetch(_: *const f32) {}
}

/// As `half` rounds, without a branch, so that it becomes vectors.
#[inline(always)]
fn nearest_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let rounded = if x.is_nan() { bits | 0x0040_0000 } else { up };
    f32::from_bits(rounded & 0xffff_0000)
}

/// The first `count` numbers at `src`, and zeros.
///
/// # Safety
/// They must exist.
#[inline(always)]
pub(super) unsafe fn load_lanes<const N: usize>(src: *const f32, count: usize) -> [f32; N] {
    let mut lanes = [0.0; N];
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(src, lanes.as_mut_ptr(), count.min(N)) };
    lanes
}

/// Writes the first `count` numbers.
///
/// # Safety
/// There must be room for them.
#[inline(always)]
pub(super) unsafe fn store_lanes<const N: usize>(lanes: [f32; N], out: *mut f32, count: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), out, count.min(N)) };
}
