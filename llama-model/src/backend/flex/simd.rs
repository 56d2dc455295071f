//! Loops compiled for the widest vectors of the machine, and the functions in them.

use std::sync::OnceLock;

use super::vector::Float;

/// Defines a function that is compiled for every instruction set (AVX-512, AVX2 with FMA, NEON, none) and runs as the
/// best the CPU has. What its loops call must be `#[inline(always)]`: a call to code compiled for the baseline would
/// turn every fused multiply-add into a library call. Parameters for types follow the lifetimes behind a semicolon.
macro_rules! vectorized {
    (
        $(#[$meta:meta])*
        $visible:vis fn $name:ident<$($life:lifetime),* $(; $($param:ident: $bound:path),+)?>($($arg:ident: $type:ty),* $(,)?) -> $result:ty
            $body:block
    ) => {
        $(#[$meta])*
        $visible fn $name<$($life,)* $($($param: $bound),+)?>($($arg: $type),*) -> $result {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$($life,)* $($($param: $bound),+)?>($($arg: $type),*) -> $result $body
            struct Kernel<$($life,)* $($($param: $bound),+)?> {
                $($arg: $type),*
            }
            impl<$($life,)* $($($param: $bound),+)?> pulp::NullaryFnOnce for Kernel<$($life,)* $($($param),+)?> {
                type Output = $result;
                #[inline(always)]
                fn call(self) -> $result {
                    body($(self.$arg),*)
                }
            }
            crate::backend::flex::simd::arch().dispatch(Kernel { $($arg),* })
        }
    };
}
pub(super) use vectorized;

/// The instruction set that kernels use: the best the CPU has, or less if the environment variable `LLAMA_SIMD` is
/// `avx512` (without the matrix unit), `avx2` (with AVX-VNNI where it is) or `none`.
pub(super) fn arch() -> pulp::Arch {
    static ARCH: OnceLock<pulp::Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("LLAMA_SIMD").as_deref() {
        Ok("none") => pulp::Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Ok("avx2") => pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3),
        _ => pulp::Arch::new(),
    })
}

/// Whether kernels by hand may use vectors: AVX2, or NEON.
pub(super) fn has_vectors() -> bool {
    !matches!(arch(), pulp::Arch::Scalar)
}

/// Instructions that multiply words, faster than others multiply floats.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(super) enum WordUnit {
    Avx2,
    AvxVnni,
    Avx512Vnni,
}

#[cfg(target_arch = "x86_64")]
impl WordUnit {
    /// The fastest that kernels use.
    pub(super) fn fastest() -> Option<Self> {
        match arch() {
            pulp::Arch::V3(_) if is_x86_feature_detected!("avxvnni") => Some(Self::AvxVnni),
            pulp::Arch::V3(_) => Some(Self::Avx2),
            pulp::Arch::V4(_) if has_vnni() => Some(Self::Avx512Vnni),
            _ => None,
        }
    }

    /// All that this CPU has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let kinds = [
            (Self::Avx2, has_avx2 && is_x86_feature_detected!("f16c")),
            (Self::AvxVnni, has_avx2 && is_x86_feature_detected!("avxvnni")),
            (Self::Avx512Vnni, is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni")),
        ];
        kinds.into_iter().filter(|(_, has)| *has).map(|(kind, _)| kind).collect()
    }
}

/// Whether kernels use AVX-512.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx512() -> bool {
    matches!(arch(), pulp::Arch::V4(_))
}

/// Whether kernels may use the matrix unit, where there is one.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn has_amx() -> bool {
    has_avx512() && std::env::var("LLAMA_SIMD").as_deref() != Ok("avx512")
}

/// Whether kernels use AVX512-VNNI.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_vnni() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512vnni")
}

/// Lanes of the partial sums: enough for two AVX-512 registers. A fixed number, so that sums do not depend on the CPU.
pub(super) const LANES: usize = 32;

/// `Σ f(a[i], b[i])` in [`LANES`] partial sums, so that the compiler may vectorise it.
#[inline(always)]
pub(super) fn sum2<T: Float>(a: &[T], b: &[T], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane].value(), b[lane].value());
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| f(a.value(), b.value())).sum();
    tree_sum(lanes) + rest
}

/// `Σ f(a[i])`
#[inline(always)]
pub(super) fn sum1(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum2(a, a, |a, _| f(a))
}

/// The largest of all `f(a[i])`, those that are NaN left out.
#[inline(always)]
pub(super) fn max(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let larger = |max: f32, x: f32| if x > max { x } else { max };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], f(block[lane]));
        }
    }
    let max = halve(&mut std::hint::black_box(lanes), larger);
    rest.iter().fold(max, |max, x| larger(max, f(*x)))
}

/// Replaces each element by `f` of it. Returns their sum, by [`LANES`] partial sums.
#[inline(always)]
pub(super) fn replace(a: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, rest) = a.as_chunks_mut::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            block[lane] = f(block[lane]);
            lanes[lane] += block[lane];
        }
    }
    let mut sum = 0.0;
    for x in rest {
        *x = f(*x);
        sum += *x;
    }
    sum + tree_sum(lanes)
}

/// The sum of the lanes. Without the black box the compiler begins from here and makes pairs of what was vectors: attention
/// in decoding took a fifth longer.
#[inline(always)]
pub(super) fn tree_sum<const N: usize>(lanes: [f32; N]) -> f32 {
    sum_halves(&mut std::hint::black_box(lanes))
}

/// The sum of a power of two of numbers, half of them added to the other half until one is left.
#[inline(always)]
pub(super) fn sum_halves(lanes: &mut [f32]) -> f32 {
    halve(lanes, |a, b| a + b)
}

/// A power of two of numbers put together, half of them with the other half until one is left.
#[inline(always)]
fn halve(lanes: &mut [f32], put_together: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = lanes.len() / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = put_together(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Adding it rounds to a whole number, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` to about one unit in the last place, as arithmetic that vectorises: `2^n · p(r)` with `x = n ln 2 + r`.
///
/// Below -87.3 it is 0, above 88 it stays at `e^88`; NaN gives NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let rounded = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    let result = p * power;
    if x < -87.3 { 0.0 } else { result }
}

/// `2^x` to two units in the last place, for less than [`exp`] costs: there is nothing to reduce by `ln 2`.
///
/// Below -126 it is 0; for numbers from 127.5 on it is not made. NaN gives NaN.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let rounded = x + ROUND;
    let r = x - (rounded - ROUND);
    // The polynomial of the least relative error among those that begin as the series does.
    let p = 1.330_060_5e-3f32;
    let p = p.mul_add(r, 9.669_691e-3);
    let p = p.mul_add(r, 5.550_558_5e-2);
    let p = p.mul_add(r, 0.240_222_83);
    let p = p.mul_add(r, std::f32::consts::LN_2);
    let p = p.mul_add(r, 1.0);
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    let result = p * power;
    if x < -126.0 { 0.0 } else { result }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_everywhere() {
        let mut worst = 0.0f64;
        for i in -8730..=8800 {
            let x = i as f32 / 100.0;
            let error = (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
            worst = worst.max(error);
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(200.0).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn powers_of_two_are_accurate_everywhere() {
        let mut worst = 0.0f64;
        for i in -12_599..=12_700 {
            let x = i as f32 / 100.0;
            worst = worst.max((f64::from(exp2(x)) / f64::from(x).exp2() - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-200.0), 0.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for len in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum1(&a, |x| x), (0..len).sum::<i32>() as f32);
            assert_eq!(max(&a, |x| x), a.last().copied().unwrap_or(f32::NEG_INFINITY));
            assert_eq!(max(&a, |x| -x), a.first().copied().unwrap_or(f32::NEG_INFINITY));
            let mut replaced = a.clone();
            assert_eq!(replace(&mut replaced, |x| 2.0 * x), (0..len).map(|x| 2 * x).sum::<i32>() as f32);
            assert!(replaced.iter().zip(&a).all(|(replaced, x)| *replaced == 2.0 * x));
        }
    }
}
