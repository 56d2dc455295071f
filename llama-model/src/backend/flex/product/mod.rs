//! Matrix products of strided views: a transposed matrix costs no copy.
//!
//! A product is cut into blocks that caches hold (`blocks`), and those into tiles that registers hold (`tile`), for the vectors of
//! the CPU: AVX-512, AVX2, NEON or none in particular (`vector`). Matrix units have kernels of their own (`amx`, `split`).

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod matrix;
mod packed;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod split;
#[cfg(target_arch = "x86_64")]
mod stored;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod strip;
mod tile;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod turned;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m512;

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;

use self::blocks::multiply as by;
pub(super) use self::blocks::with_buffer;
pub(super) use self::matrix::{Matrix, Operand, Place};
pub(super) use self::packed::{Packing, Right};
#[cfg(target_arch = "x86_64")]
pub(super) use self::stored::{Bf16Unit, PackedRows};
use self::tile::{RoundedBf16, RoundedF16, Single, Tiles};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use self::turned::TurnedRows;
#[cfg(target_arch = "x86_64")]
use super::simd;
use super::vector::{Vector, by_vectors};
use super::{Buffer, whole};
use crate::Precision;

/// Below this many multiply-adds one thread is faster.
const PARALLEL: usize = 1 << 18;

/// Whether products run on a matrix unit, in f32 too.
pub(super) fn has_matrix_unit() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return amx::available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// What to compute from `a` and `b`, and how.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Adds to what is there.
    pub add: bool,
    /// On all threads.
    pub threads: bool,
    /// Rounding of the operands.
    pub precision: Precision,
}

/// The plain product, on all threads.
const ON_ALL_THREADS: Product = Product { threads: true, ..PRODUCT };

/// The plain product, on the calling thread.
pub(super) const PRODUCT: Product = Product { add: false, threads: false, precision: Precision::F32 };

/// `out = a b`, or `out += a b`.
///
/// # Safety
/// All elements that the matrices reach must be valid, those of `out` writable and not otherwise accessed meanwhile.
pub(super) unsafe fn multiply(out: Place, out_row_stride: isize, a: Matrix, b: Matrix, product: Product) {
    debug_assert_eq!(a.cols, b.rows);
    let product = Product { threads: product.threads && a.rows * a.cols * b.cols >= PARALLEL, ..product };
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    if a.cols == 0 {
        // A sum of nothing is zero.
        for row in 0..if product.add { 0 } else { a.rows } {
            // SAFETY: the caller's promise.
            match out.at(row, out_row_stride, 0) {
                Place::F32(row) => unsafe { row.write_bytes(0, b.cols) },
                Place::Bf16(row) => unsafe { row.write_bytes(0, b.cols) },
            }
        }
        return;
    }
    // SAFETY: the caller's promise, and the CPU was asked.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        match (product.precision, Bf16Unit::fastest()) {
            #[cfg(target_os = "linux")]
            (Precision::F32, Some(Bf16Unit::Matrix)) if split::worthwhile((a.rows, b.cols, a.cols)) => {
                return by::<split::ThreeParts>(out, out_row_stride, a, b, product);
            }
            #[cfg(target_os = "linux")]
            (Precision::Bf16, Some(Bf16Unit::Matrix)) => {
                return by::<amx::MatrixUnit>(out, out_row_stride, a, b, product);
            }
            (Precision::Bf16, Some(Bf16Unit::Vectors)) => {
                return by::<Tiles<__m512, avx512::Pairs>>(out, out_row_stride, a, b, product);
            }
            _ => {}
        }
        by_vectors!(by_tiles(out, out_row_stride, a, b, product))
    }
}

/// [`multiply`] by vectors, whose numbers are rounded as the precision says while they are packed.
///
/// # Safety
/// As there; the CPU must have the vectors.
unsafe fn by_tiles<V: Vector>(out: Place, out_row_stride: isize, a: Matrix, b: Matrix, product: Product) {
    // SAFETY: the caller's promise.
    unsafe {
        match product.precision {
            Precision::F32 => by::<Tiles<V, Single>>(out, out_row_stride, a, b, product),
            Precision::Bf16 => by::<Tiles<V, RoundedBf16>>(out, out_row_stride, a, b, product),
            Precision::F16 => by::<Tiles<V, RoundedF16>>(out, out_row_stride, a, b, product),
        }
    }
}

/// `Σ a b` of one pair of matrices or more, in f32.
pub(super) fn sum_of_products(pairs: &[(FlexTensor, FlexTensor)], precision: Precision) -> FlexTensor {
    let (rows, cols) = (pairs[0].0.shape()[0], pairs[0].1.shape()[1]);
    let mut out = Buffer::<f32>::zeros(0);
    for (index, (a, b)) in pairs.iter().enumerate() {
        fill(&mut out, Matrix::of(a), Matrix::of(b), Product { add: index > 0, precision, ..ON_ALL_THREADS });
    }
    out.into_tensor(Shape::new([rows, cols]))
}

/// The product of two matrices, either transposed first.
pub(super) fn product<T: Operand>(
    a: &FlexTensor,
    transpose_a: bool,
    b: &FlexTensor,
    transpose_b: bool,
    precision: Precision,
) -> FlexTensor {
    let a = if transpose_a { Matrix::of(a).transposed() } else { Matrix::of(a) };
    let b = if transpose_b { Matrix::of(b).transposed() } else { Matrix::of(b) };
    let mut out = Buffer::<T>::zeros(0);
    fill(&mut out, a, b, Product { precision, ..ON_ALL_THREADS });
    out.into_tensor(Shape::new([a.rows, b.cols]))
}

/// `sum + a bᵀ`, in place where nobody else holds the sum.
pub(super) fn add_product(sum: FlexTensor, a: &FlexTensor, b: &FlexTensor, precision: Precision) -> FlexTensor {
    let (mut sum, a, b) = (whole(sum), Matrix::of(a), Matrix::of(b).transposed());
    assert_eq!(a.cols, b.rows, "product of [{}, {}] and [{}, {}]", a.rows, a.cols, b.rows, b.cols);
    assert_eq!(sum.shape().dims(), [a.rows, b.cols], "a product is added to one of another size");
    let out = Place::F32(sum.storage_mut::<f32>().as_mut_ptr());
    // SAFETY: both matrices are views of tensors that live through the call, and the sum has their product's size.
    unsafe { multiply(out, b.cols as isize, a, b, Product { add: true, precision, ..ON_ALL_THREADS }) };
    sum
}

/// Writes a product into a new buffer, or adds it to what is there.
fn fill<T: Operand>(out: &mut Buffer<T>, a: Matrix, b: Matrix, how: Product) {
    assert_eq!(a.cols, b.rows, "product of [{}, {}] and [{}, {}]", a.rows, a.cols, b.rows, b.cols);
    let len = a.rows * b.cols;
    if !how.add {
        // SAFETY: the product writes it whole, unless there is nothing to sum.
        *out = if a.cols > 0 { unsafe { Buffer::unwritten(len) } } else { Buffer::zeros(len) };
    }
    assert_eq!(out.len(), len, "a product is added to one of another size");
    // SAFETY: both matrices are views of tensors that live through the call, and `out` has room for the product.
    unsafe { multiply(T::place(out.as_mut_ptr()), b.cols as isize, a, b, how) };
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::vector::{Float, Number, Plain};
    use super::matrix::by_elements;
    use super::*;
    #[cfg(target_arch = "aarch64")]
    use std::arch::aarch64::float32x4_t;
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::__m256;

    fn noise(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
    }

    /// In f64, of operands that went through `round`.
    fn expected(a: Matrix, b: Matrix, round: fn(f32) -> f32) -> Vec<f64> {
        let get = |x: Matrix, row, col| {
            let value = by_elements!(x => unsafe { (*x.at(row, col)).value() });
            f64::from(round(value))
        };
        let cell = |i, j| (0..a.cols).map(|t| get(a, i, t) * get(b, t, j)).sum();
        (0..a.rows).flat_map(|i| (0..b.cols).map(move |j| (i, j))).map(|(i, j)| cell(i, j)).collect()
    }

    type Body = unsafe fn(Place, isize, Matrix, Matrix, Product);

    /// Every layout of both operands, in f32 and in bf16, sizes around the tiles' and the blocks' edges, one thread and several.
    fn check(name: &str, body: Body, round: fn(f32) -> f32) {
        let sizes = [
            (1, 1, 1),
            (14, 32, 3),
            (15, 33, 17),
            (13, 16, 31),
            (29, 70, 513),
            (300, 41, 20),
            (61, 1100, 9),
            (64, 64, 600),
            (33, 40, 900),
            (1100, 33, 40),
        ];
        for (index, (m, n, k)) in sizes.into_iter().enumerate() {
            // Room for a stride of two in both directions.
            let (a_data, b_data) = (noise(4 * m * k, 1), noise(4 * k * n, 2));
            let [a_short, b_short] =
                [&a_data, &b_data].map(|x| x.iter().map(|x| bf16::nearest(*x)).collect::<Vec<_>>());
            fn layouts<T: Operand>(data: &[T], rows: usize, cols: usize) -> [Matrix; 3] {
                let plain = Matrix::rows(data, rows, cols);
                let transposed = Matrix::rows(data, cols, rows).transposed();
                let strided = Matrix { row_stride: 2 * cols as isize, col_stride: 2, ..plain };
                [plain, transposed, strided]
            }
            let (a_forms, b_forms) =
                ([layouts(&a_data, m, k), layouts(&a_short, m, k)], [layouts(&b_data, k, n), layouts(&b_short, k, n)]);
            for (i, j) in (0..3).flat_map(|i| (0..3).map(move |j| (i, j))) {
                // Both in f32, and another pair of types.
                let types = [(0, 0), [(1, 0), (0, 1), (1, 1)][(index + i + j) % 3]];
                for (a, b) in types.map(|(of_a, of_b)| (a_forms[of_a][i], b_forms[of_b][j])) {
                    let expected = expected(a, b, round);
                    for (threads, add) in [(false, false), (true, true)] {
                        let mut out = vec![1.0f32; m * n];
                        let how = Product { add, threads, ..PRODUCT };
                        unsafe { body(Place::F32(out.as_mut_ptr()), n as isize, a, b, how) };
                        let worst = out.iter().zip(&expected).map(|(found, expected)| {
                            let expected = expected + if add { 1.0 } else { 0.0 };
                            (f64::from(*found) - expected).abs()
                        });
                        let worst = worst.fold(0.0, f64::max);
                        assert!(worst < 1e-5 * (k as f64).sqrt(), "{name} {m}x{n}x{k}: {worst:e}");
                        if !add {
                            // The same sums, rounded once; nothing between the rows.
                            let mut short = vec![bf16::ONE; m * (n + 1)];
                            unsafe { body(Place::Bf16(short.as_mut_ptr()), n as isize + 1, a, b, how) };
                            for (short, out) in short.chunks_exact(n + 1).zip(out.chunks_exact(n)) {
                                assert!(out.iter().zip(short).all(|(out, short)| bf16::nearest(*out) == *short));
                                assert_eq!(short[n], bf16::ONE, "{name} {m}x{n}x{k}");
                            }
                        }
                    }
                }
            }
        }
    }

    fn to_bf16(x: f32) -> f32 {
        bf16::from_f32(x).to_f32()
    }

    fn to_f16(x: f32) -> f32 {
        half::f16::from_f32(x).to_f32()
    }

    /// All formats of some vectors.
    fn check_vectors<V: Vector>(name: &str) {
        check(name, by::<Tiles<V, Single>>, |x| x);
        check(name, by::<Tiles<V, RoundedBf16>>, to_bf16);
        check(name, by::<Tiles<V, RoundedF16>>, to_f16);
    }

    #[test]
    fn products_are_right_in_every_layout() {
        check("chosen", |out, stride, a, b, how| unsafe { multiply(out, stride, a, b, how) }, |x| x);
        let bf16: Body = |out, stride, a, b, how| unsafe {
            multiply(out, stride, a, b, Product { precision: Precision::Bf16, ..how });
        };
        check("chosen, bf16", bf16, to_bf16);
        let f16: Body = |out, stride, a, b, how| unsafe {
            multiply(out, stride, a, b, Product { precision: Precision::F16, ..how });
        };
        check("chosen, f16", f16, to_f16);
        check_vectors::<Plain>("plain");
        #[cfg(target_arch = "aarch64")]
        check_vectors::<float32x4_t>("neon");
        #[cfg(target_arch = "x86_64")]
        {
            if simd::has_vectors() {
                check_vectors::<__m256>("avx2");
            }
            if simd::has_avx512() {
                check_vectors::<__m512>("avx512");
            }
            if avx512::has_dot() {
                check("avx512, pairs", by::<Tiles<__m512, avx512::Pairs>>, to_bf16);
            }
            #[cfg(target_os = "linux")]
            if amx::available() {
                check("amx", by::<amx::MatrixUnit>, to_bf16);
                check("amx, three parts", by::<split::ThreeParts>, |x| x);
            }
        }
    }

    /// Neither between threads nor, of many columns, one block after the other.
    #[test]
    fn a_cut_changes_no_sum() {
        for (m, n, k) in [(520, 900, 640), (1100, 300, 600), (70, 3000, 520)] {
            let (a_data, b_data) = (noise(m * k, 1), noise(n * k, 2));
            let (a, b) = (Matrix::rows(&a_data, m, k), Matrix::rows(&b_data, n, k).transposed());
            for precision in [Precision::F32, Precision::Bf16] {
                let [one, several] = [false, true].map(|threads| {
                    let mut out = vec![f32::NAN; m * n];
                    let how = Product { precision, threads, ..PRODUCT };
                    unsafe { multiply(Place::F32(out.as_mut_ptr()), n as isize, a, b, how) };
                    out
                });
                assert!(one == several, "{m}x{n}x{k} in {precision}");
            }
        }
    }

    /// The sum of nothing is zero, or what was there; of no rows or columns there is no result.
    #[test]
    fn products_of_nothing_are_zero_or_none() {
        for (rows, cols) in [(0, 3), (2, 0), (0, 0)] {
            let mut out = [1.0f32; 6];
            let (a, b) = (Matrix::rows(&[1.0; 8], rows, 4), Matrix::rows(&[1.0; 12], 4, cols));
            unsafe { multiply(Place::F32(out.as_mut_ptr()), 3, a, b, ON_ALL_THREADS) };
            assert_eq!(out, [1.0; 6]);
        }
        for (add, expected) in [(false, 0.0), (true, 1.0)] {
            let mut out = [1.0f32; 6];
            let (a, b) = (Matrix::rows::<f32>(&[], 2, 0), Matrix::rows::<f32>(&[], 0, 3));
            unsafe { multiply(Place::F32(out.as_mut_ptr()), 3, a, b, Product { add, ..PRODUCT }) };
            assert_eq!(out, [expected; 6]);
        }
    }

    /// Three bf16 parts on the matrix unit are no further from the exact sums than fused multiply-adds in f32.
    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn three_parts_are_as_exact_as_f32() {
        if !amx::available() {
            return;
        }
        let (n, k) = (64, 1024);
        // All 24 bits of a mantissa, in sizes from 2^-8 to 2^7.
        let random = |seed: u64| -> Vec<f32> {
            let mut state = seed;
            let value = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let size = 2f64.powi((state >> 60) as i32 - 8);
                (size * ((state >> 20 & 0xff_ffff) as f64 / f64::from(1 << 23) - 1.0)) as f32
            };
            (0..n * k).map(value).collect()
        };
        let (a_data, b_data) = (random(1), random(2));
        let (a, b) = (Matrix::rows(&a_data, n, k), Matrix::rows(&b_data, k, n));
        let expected = expected(a, b, |x| x);
        let error = |body: Body| -> f64 {
            let mut out = vec![0.0f32; n * n];
            unsafe { body(Place::F32(out.as_mut_ptr()), n as isize, a, b, PRODUCT) };
            let squares = out.iter().zip(&expected).map(|(found, exact)| (f64::from(*found) - exact).powi(2));
            (squares.sum::<f64>() / expected.iter().map(|exact| exact * exact).sum::<f64>()).sqrt()
        };
        let (parts, fused) = (error(by::<split::ThreeParts>), error(by::<Tiles<__m512, Single>>));
        println!("relative error {parts:.2e}, by fused multiply-adds {fused:.2e}");
        assert!(parts < fused && parts < 3e-7, "{parts:e} {fused:e}");
    }

    #[test]
    fn infinities_and_nans_stay() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let a = [f32::NAN, f32::INFINITY, 1.0, f32::MAX];
            let a = Matrix::rows(&a, 4, 1);
            let mut out = [0.0f32; 4];
            let how = Product { precision, ..PRODUCT };
            unsafe { multiply(Place::F32(out.as_mut_ptr()), 1, a, Matrix::rows(&[1.0], 1, 1), how) };
            assert!(out[0].is_nan() && out[1] == f32::INFINITY && out[2] == 1.0, "{out:?}");
            assert!(out[3] >= f32::MAX, "{out:?}");
        }
    }
}
