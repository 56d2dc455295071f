//! Products of a few rows with weights, and what stands before and after them in a block.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::super::{cubes, empty_like};
use super::weight::{CUBE, Four, Product, Weight, products};

#[cube(launch_unchecked)]
fn project_kernel<X: Float, W: Numeric, S: Float, N: Size>(
    x: &Array<Vector<X, Four>>,
    gain: &ComptimeOption<Array<Vector<X, Four>>>,
    values: &Array<Vector<W, N>>,
    scales: &ComptimeOption<Array<S>>,
    residual: &ComptimeOption<Array<X>>,
    out: &mut Array<X>,
    d_out: usize,
    pitch: usize,
    scale_pitch: usize,
    eps: f32,
    #[comptime] product: Product,
    #[define(X, W, S)] _dtypes: [StorageType; 3],
) {
    let first = 2 * CUBE_POS;
    if first < d_out {
        // Of an odd number of rows the last is alone.
        let second = min(first + 1, d_out - 1);
        let pitches = (pitch, scale_pitch);
        let sums =
            products::<X, W, S, N>(x, gain, eps, values, scales, first, values, scales, second, pitches, product);
        if UNIT_POS == 0 {
            #[unroll]
            for row in 0..comptime!(product.rows) {
                #[unroll]
                for i in 0..2usize {
                    let at = row * d_out + select(comptime!(i == 0), first, second);
                    let mut sum = sums[comptime!(2 * row + i)];
                    #[comptime]
                    match residual {
                        ComptimeOption::Some(residual) => {
                            sum += f32::cast_from(residual[at]);
                        }
                        ComptimeOption::None => {}
                    }
                    out[at] = X::cast_from(sum);
                }
            }
        }
    }
}

/// `x · weightᵀ`, to which a residual is added.
pub(super) fn project<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: Weight<R>,
    residual: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let [rows, _] = x.shape().dims();
    let out = empty_like(&x, Shape::new([rows, weight.d_out]), x.dtype);
    let (client, dtypes) = (x.client.clone(), dtypes(&x, &weight));
    let ([pitch, scale_pitch], product) = (weight.pitches(), weight.product(rows));
    // SAFETY: cubes behind the last row of the weight do nothing, and units read what is within a row.
    unsafe {
        project_kernel::launch_unchecked::<R>(
            &client,
            cubes(weight.d_out.div_ceil(2)),
            CubeDim::new_1d(CUBE as u32),
            weight.format.vector_size(),
            x.into_array_arg(),
            None.into(),
            weight.values.into_array_arg(),
            weight.scales.map(CubeTensor::into_array_arg).into(),
            residual.map(CubeTensor::into_array_arg).into(),
            out.clone().into_array_arg(),
            weight.d_out,
            pitch,
            scale_pitch,
            0.0,
            product,
            dtypes,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn gated_kernel<X: Float, W: Numeric, S: Float, N: Size>(
    x: &Array<Vector<X, Four>>,
    gain: &ComptimeOption<Array<Vector<X, Four>>>,
    gate: &Array<Vector<W, N>>,
    gate_scales: &ComptimeOption<Array<S>>,
    up: &Array<Vector<W, N>>,
    up_scales: &ComptimeOption<Array<S>>,
    out: &mut Array<X>,
    d_ff: usize,
    pitch: usize,
    scale_pitch: usize,
    eps: f32,
    #[comptime] product: Product,
    #[define(X, W, S)] _dtypes: [StorageType; 3],
) {
    let row = CUBE_POS;
    if row < d_ff {
        let pitches = (pitch, scale_pitch);
        let sums = products::<X, W, S, N>(x, gain, eps, gate, gate_scales, row, up, up_scales, row, pitches, product);
        if UNIT_POS == 0 {
            #[unroll]
            for i in 0..comptime!(product.rows) {
                let gate = sums[comptime!(2 * i)];
                let silu = gate / (f32::new(1.0) + (-gate).exp());
                out[i * d_ff + row] = X::cast_from(silu * sums[comptime!(2 * i + 1)]);
            }
        }
    }
}

/// `silu(gate · n) · (up · n)` of `n = rms_norm(x)`.
pub(super) fn gated<R: CubeRuntime>(
    x: CubeTensor<R>,
    gain: CubeTensor<R>,
    [gate, up]: [Weight<R>; 2],
    eps: f64,
) -> CubeTensor<R> {
    let [rows, _] = x.shape().dims();
    let out = empty_like(&x, Shape::new([rows, gate.d_out]), x.dtype);
    let (client, dtypes) = (x.client.clone(), dtypes(&x, &gate));
    let ([pitch, scale_pitch], product) = (gate.pitches(), gate.product(rows));
    let (d_ff, size) = (gate.d_out, gate.format.vector_size());
    // SAFETY: as in `project`.
    unsafe {
        gated_kernel::launch_unchecked::<R>(
            &client,
            cubes(d_ff),
            CubeDim::new_1d(CUBE as u32),
            size,
            x.into_array_arg(),
            Some(gain.into_array_arg()).into(),
            gate.values.into_array_arg(),
            gate.scales.map(CubeTensor::into_array_arg).into(),
            up.values.into_array_arg(),
            up.scales.map(CubeTensor::into_array_arg).into(),
            out.clone().into_array_arg(),
            d_ff,
            pitch,
            scale_pitch,
            eps as f32,
            product,
            dtypes,
        );
    }
    out
}

/// Where new positions go in a cache.
#[derive(Clone, Copy)]
pub(super) struct Positions {
    /// The first of them.
    pub(super) start: usize,
    /// How many each sequence gets.
    pub(super) seq_len: usize,
    /// How many there is room for.
    pub(super) capacity: usize,
}

/// A row's pair of sums, turned by the angle of an entry of the tables.
#[cube]
fn turned<X: Float>(
    sums: &Array<f32>,
    #[comptime] row: usize,
    cos: &Array<X>,
    sin: &Array<X>,
    at: usize,
) -> (f32, f32) {
    let cos = f32::cast_from(cos[at]);
    let sin = f32::cast_from(sin[at]);
    let a = sums[comptime!(2 * row)];
    let b = sums[comptime!(2 * row + 1)];
    (a * cos - b * sin, b * cos + a * sin)
}

#[cube(launch_unchecked)]
fn qkv_kernel<X: Float, W: Numeric, S: Float, C: Float, N: Size>(
    x: &Array<Vector<X, Four>>,
    gain: &ComptimeOption<Array<Vector<X, Four>>>,
    wq: &Array<Vector<W, N>>,
    wq_scales: &ComptimeOption<Array<S>>,
    wk: &Array<Vector<W, N>>,
    wk_scales: &ComptimeOption<Array<S>>,
    wv: &Array<Vector<W, N>>,
    wv_scales: &ComptimeOption<Array<S>>,
    cos: &Array<X>,
    sin: &Array<X>,
    q: &mut Array<X>,
    keys: &mut Array<C>,
    values: &mut Array<C>,
    d_q: usize,
    d_kv: usize,
    start: usize,
    seq_len: usize,
    capacity: usize,
    pitch: usize,
    scale_pitch: usize,
    eps: f32,
    #[comptime] half: usize,
    #[comptime] product: Product,
    #[define(X, W, S, C)] _dtypes: [StorageType; 4],
) {
    let pitches = (pitch, scale_pitch);
    let of_q = d_q / 2;
    let of_kv = d_kv / 2;
    // The two rows of a cube are a pair that the rotary embedding turns.
    if CUBE_POS < of_q {
        let pair = CUBE_POS % half;
        let first = CUBE_POS / half * comptime!(2 * half) + pair;
        let second = first + half;
        let sums = products::<X, W, S, N>(x, gain, eps, wq, wq_scales, first, wq, wq_scales, second, pitches, product);
        if UNIT_POS == 0 {
            #[unroll]
            for row in 0..comptime!(product.rows) {
                let (a, b) = turned::<X>(&sums, row, cos, sin, row % seq_len * half + pair);
                q[row * d_q + first] = X::cast_from(a);
                q[row * d_q + second] = X::cast_from(b);
            }
        }
    } else if CUBE_POS < of_q + of_kv {
        let pair = (CUBE_POS - of_q) % half;
        let first = (CUBE_POS - of_q) / half * comptime!(2 * half) + pair;
        let second = first + half;
        let sums = products::<X, W, S, N>(x, gain, eps, wk, wk_scales, first, wk, wk_scales, second, pitches, product);
        if UNIT_POS == 0 {
            #[unroll]
            for row in 0..comptime!(product.rows) {
                let (a, b) = turned::<X>(&sums, row, cos, sin, row % seq_len * half + pair);
                let position = (row / seq_len * capacity + start + row % seq_len) * d_kv;
                keys[position + first] = C::cast_from(a);
                keys[position + second] = C::cast_from(b);
            }
        }
    } else if CUBE_POS < of_q + 2 * of_kv {
        let first = 2 * (CUBE_POS - of_q - of_kv);
        let second = first + 1;
        let sums = products::<X, W, S, N>(x, gain, eps, wv, wv_scales, first, wv, wv_scales, second, pitches, product);
        if UNIT_POS == 0 {
            #[unroll]
            for row in 0..comptime!(product.rows) {
                let position = (row / seq_len * capacity + start + row % seq_len) * d_kv;
                values[position + first] = C::cast_from(sums[comptime!(2 * row)]);
                values[position + second] = C::cast_from(sums[comptime!(2 * row + 1)]);
            }
        }
    }
}

/// Queries of `rms_norm(x)`, turned by their positions; keys, turned as well, and values go to the cache.
pub(super) fn qkv<R: CubeRuntime>(
    x: CubeTensor<R>,
    gain: CubeTensor<R>,
    [wq, wk, wv]: [Weight<R>; 3],
    [cos, sin]: [CubeTensor<R>; 2],
    [keys, values]: [&CubeTensor<R>; 2],
    positions: Positions,
    eps: f64,
) -> CubeTensor<R> {
    let [rows, _] = x.shape().dims();
    let q = empty_like(&x, Shape::new([rows, wq.d_out]), x.dtype);
    let (client, [x_type, values_type, scales_type]) = (x.client.clone(), dtypes(&x, &wq));
    let dtypes = [x_type, values_type, scales_type, keys.dtype.into()];
    let ([pitch, scale_pitch], product, half) = (wq.pitches(), wq.product(rows), cos.shape()[1]);
    let Positions { start, seq_len, capacity } = positions;
    // SAFETY: as in `project`; the caller's cache has room for these positions.
    unsafe {
        qkv_kernel::launch_unchecked::<R>(
            &client,
            cubes(wq.d_out / 2 + wk.d_out),
            CubeDim::new_1d(CUBE as u32),
            wq.format.vector_size(),
            x.into_array_arg(),
            Some(gain.into_array_arg()).into(),
            wq.values.into_array_arg(),
            wq.scales.map(CubeTensor::into_array_arg).into(),
            wk.values.into_array_arg(),
            wk.scales.map(CubeTensor::into_array_arg).into(),
            wv.values.into_array_arg(),
            wv.scales.map(CubeTensor::into_array_arg).into(),
            cos.into_array_arg(),
            sin.into_array_arg(),
            q.clone().into_array_arg(),
            keys.clone().into_array_arg(),
            values.clone().into_array_arg(),
            wq.d_out,
            wk.d_out,
            start,
            seq_len,
            capacity,
            pitch,
            scale_pitch,
            eps as f32,
            half,
            product,
            dtypes,
        );
    }
    q
}

fn dtypes<R: CubeRuntime>(x: &CubeTensor<R>, weight: &Weight<R>) -> [StorageType; 3] {
    let [values, scales] = weight.dtypes();
    [x.dtype.into(), values, scales]
}
