//! Attention of the few newest positions to a cache: the keys of a head are shared among cubes, those of a cube among its planes.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::super::attention::MASKED;
use super::super::mma::Pair;
use super::super::reduce::{UNITS, lanes};
use super::super::{cubes, empty_like};
use super::projection::Positions;

/// Keys that a plane has on their way at once.
const KEYS: usize = 4;
/// Keys of a plane before a cube shares them with another, and cubes that suffice for any device.
const KEYS_OF_PLANE: usize = 32;
const MAX_CUBES: usize = 512;
/// Most heads that share keys: their results stay in registers.
const MAX_GROUP: usize = 8;
/// Shared memory of a cube, at most: several have room on a multiprocessor.
const MAX_SHARED: usize = 48 << 10;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Heads {
    /// Heads that share keys and values.
    group: usize,
    /// Pairs of values of a head.
    pairs: usize,
    /// Pairs of a unit, where planes are smallest.
    per_unit: usize,
    /// Most planes of a cube.
    planes: usize,
}

/// A cube for each row, head of keys and part of the keys. Queries and results `[rows, heads, pairs]`, the latter of parts
/// `[rows, heads, parts, pairs]` with `[rows, heads, parts, 2]` of greatest score and sum of weights.
#[cube(launch_unchecked)]
fn attend_kernel<C: Float>(
    q: &Array<Vector<f32, Pair>>,
    keys: &Array<Vector<C, Pair>>,
    values: &Array<Vector<C, Pair>>,
    out: &mut Array<Vector<f32, Pair>>,
    statistics: &mut ComptimeOption<Array<f32>>,
    rows: usize,
    kv_heads: usize,
    parts: usize,
    chunk: usize,
    start: usize,
    seq_len: usize,
    capacity: usize,
    scale: f32,
    #[comptime] heads: Heads,
    #[define(C)] _cache: StorageType,
) {
    let group = comptime!(heads.group);
    let pairs = comptime!(heads.pairs);
    let per_unit = comptime!(heads.per_unit);
    let part = CUBE_POS % parts;
    let kv_head = CUBE_POS / parts % kv_heads;
    let row = CUBE_POS / parts / kv_heads;
    let plane = UNIT_POS as usize / PLANE_DIM as usize;
    let planes = CUBE_DIM as usize / PLANE_DIM as usize;
    let unit = UNIT_POS_PLANE as usize;

    let mut highest_of = SharedMemory::<f32>::new(comptime!(heads.planes * group));
    let mut sum_of = SharedMemory::<f32>::new(comptime!(heads.planes * group));
    let mut result_of = SharedMemory::<Vector<f32, Pair>>::new(comptime!(heads.planes * group * pairs));

    if row < rows {
        let mut query = Array::<Vector<f32, Pair>>::new(comptime!(group * per_unit));
        let mut result = Array::<Vector<f32, Pair>>::new(comptime!(group * per_unit));
        let mut highest = Array::<f32>::new(group);
        let mut sum = Array::<f32>::new(group);
        #[unroll]
        for head in 0..group {
            highest[head] = f32::new(MASKED);
            sum[head] = f32::new(0.0);
            #[unroll]
            for i in 0..per_unit {
                let pair = unit + i * PLANE_DIM as usize;
                let mut value = Vector::<f32, Pair>::cast_from(0.0f32);
                if pair < pairs {
                    let at = ((row * kv_heads + kv_head) * group + head) * pairs + pair;
                    value = q[at] * Vector::cast_from(scale);
                }
                query[comptime!(head * per_unit + i)] = value;
                result[comptime!(head * per_unit + i)] = Vector::cast_from(0.0f32);
            }
        }

        let seen = start + row % seq_len + 1;
        let end = min((part + 1) * chunk, seen);
        let base = row / seq_len * capacity;
        let mut key = part * chunk + plane;
        while key < end {
            let mut score = Array::<f32>::new(comptime!(KEYS * group));
            let mut value = Array::<Vector<f32, Pair>>::new(comptime!(KEYS * per_unit));
            #[unroll]
            for k in 0..KEYS {
                // A key behind the last one is read as the last, and its score not used.
                let position = min(key + k * planes, end - 1);
                let at = ((base + position) * kv_heads + kv_head) * pairs;
                let mut products = Array::<Vector<f32, Pair>>::new(group);
                #[unroll]
                for head in 0..group {
                    products[head] = Vector::cast_from(0.0f32);
                }
                #[unroll]
                for i in 0..per_unit {
                    let pair = unit + i * PLANE_DIM as usize;
                    let mut read = Vector::<f32, Pair>::cast_from(0.0f32);
                    if pair < pairs {
                        let of_key = Vector::<f32, Pair>::cast_from(keys[at + pair]);
                        read = Vector::cast_from(values[at + pair]);
                        #[unroll]
                        for head in 0..group {
                            products[head] += of_key * query[comptime!(head * per_unit + i)];
                        }
                    }
                    value[comptime!(k * per_unit + i)] = read;
                }
                #[unroll]
                for head in 0..group {
                    let product = plane_sum(lanes(products[head]));
                    score[comptime!(k * group + head)] = select(key + k * planes < end, product, f32::new(MASKED));
                }
            }
            #[unroll]
            for head in 0..group {
                let mut best = highest[head];
                #[unroll]
                for k in 0..KEYS {
                    best = max(best, score[comptime!(k * group + head)]);
                }
                let correction = (highest[head] - best).exp();
                highest[head] = best;
                sum[head] *= correction;
                #[unroll]
                for i in 0..per_unit {
                    result[comptime!(head * per_unit + i)] *= Vector::cast_from(correction);
                }
                #[unroll]
                for k in 0..KEYS {
                    let weight = (score[comptime!(k * group + head)] - best).exp();
                    sum[head] += weight;
                    #[unroll]
                    for i in 0..per_unit {
                        result[comptime!(head * per_unit + i)] +=
                            value[comptime!(k * per_unit + i)] * Vector::cast_from(weight);
                    }
                }
            }
            key += KEYS * planes;
        }

        #[unroll]
        for head in 0..group {
            let at = plane * group + head;
            if unit == 0 {
                highest_of[at] = highest[head];
                sum_of[at] = sum[head];
            }
            #[unroll]
            for i in 0..per_unit {
                let pair = unit + i * PLANE_DIM as usize;
                if pair < pairs {
                    result_of[at * pairs + pair] = result[comptime!(head * per_unit + i)];
                }
            }
        }
    }
    sync_cube();
    if row < rows {
        let mut at = UNIT_POS as usize;
        while at < comptime!(group * pairs) {
            let head = at / pairs;
            let mut best = f32::new(MASKED);
            for plane in 0..planes {
                best = max(best, highest_of[plane * group + head]);
            }
            let mut total = f32::new(0.0);
            let mut result = Vector::<f32, Pair>::cast_from(0.0f32);
            for plane in 0..planes {
                let weight = (highest_of[plane * group + head] - best).exp();
                total += weight * sum_of[plane * group + head];
                result += result_of[plane * comptime!(group * pairs) + at] * Vector::cast_from(weight);
            }
            let to = (row * kv_heads + kv_head) * group + head;
            let pair = at % pairs;
            #[comptime]
            match statistics {
                ComptimeOption::None => {
                    out[to * pairs + pair] = result / Vector::cast_from(total);
                }
                ComptimeOption::Some(statistics) => {
                    let to = to * parts + part;
                    out[to * pairs + pair] = result;
                    if pair == 0 {
                        statistics[2 * to] = best;
                        statistics[2 * to + 1] = total;
                    }
                }
            }
            at += CUBE_DIM as usize;
        }
    }
}

/// The results of parts to one.
#[cube(launch_unchecked)]
fn combine_kernel(
    results: &Array<Vector<f32, Pair>>,
    statistics: &Array<f32>,
    out: &mut Array<Vector<f32, Pair>>,
    count: usize,
    parts: usize,
    #[comptime] pairs: usize,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let first = at / pairs * parts;
        let mut best = f32::new(MASKED);
        for part in first..first + parts {
            best = max(best, statistics[2 * part]);
        }
        let mut total = f32::new(0.0);
        let mut result = Vector::<f32, Pair>::cast_from(0.0f32);
        for part in first..first + parts {
            let weight = (statistics[2 * part] - best).exp();
            total += weight * statistics[2 * part + 1];
            result += results[part * pairs + at % pairs] * Vector::cast_from(weight);
        }
        out[at] = result / Vector::cast_from(total);
    }
}

/// What the kernel is compiled for, if it takes heads of this shape.
fn heads<R: CubeRuntime>(
    client: &ComputeClient<R>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
) -> Option<Heads> {
    let group = n_heads / n_kv_heads;
    let pairs = head_dim / 2;
    let hardware = &client.properties().hardware;
    let plane = hardware.plane_size_min as usize;
    let per_unit = pairs.div_ceil(plane);
    let (room, units) = (hardware.max_shared_memory_size.min(MAX_SHARED), hardware.max_units_per_cube as usize);
    let bytes = |planes: usize| planes * group * (8 * pairs + 8);
    let planes = [16, 8, 4, 2, 1].into_iter().find(|planes| bytes(*planes) <= room && planes * plane <= units)?;
    (group <= MAX_GROUP && group * per_unit <= MAX_GROUP * 4).then_some(Heads { group, pairs, per_unit, planes })
}

/// Whether [`attend`] takes heads of this shape.
pub(super) fn fits<R: CubeRuntime>(
    client: &ComputeClient<R>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
) -> bool {
    heads(client, n_heads, n_kv_heads, head_dim).is_some()
}

/// Whether [`attend`] reads a cache of these.
pub(super) fn reads<R: CubeRuntime>([keys, values]: [&CubeTensor<R>; 2]) -> bool {
    keys.dtype == values.dtype && matches!(keys.dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Attention of queries `[rows, n_heads · head_dim]` to the cache's positions up to their own; the result as they.
pub(super) fn attend<R: CubeRuntime>(
    q: CubeTensor<R>,
    [keys, values]: [&CubeTensor<R>; 2],
    positions: Positions,
    scale: f64,
) -> CubeTensor<R> {
    let client = q.client.clone();
    let Positions { start, seq_len, capacity } = positions;
    let [rows, d_q] = q.shape().dims();
    let [_, _, kv_heads, head_dim] = keys.shape().dims();
    let n_heads = d_q / head_dim;
    let heads = heads(&client, n_heads, kv_heads, head_dim).expect("the caller asked whether it fits");
    let seen = start + seq_len;
    let parts = seen.div_ceil(KEYS_OF_PLANE * heads.planes).min((MAX_CUBES / (rows * kv_heads)).max(1));
    let out = empty_like(&q, q.shape(), q.dtype);
    let partial = (parts > 1).then(|| {
        let results = empty_like(&q, Shape::new([rows, n_heads, parts, head_dim]), DType::F32);
        (results, empty_like(&q, Shape::new([rows, n_heads, parts, 2]), DType::F32))
    });
    let (results, statistics) = partial.clone().map_or((out.clone(), None), |(results, of)| (results, Some(of)));
    // SAFETY: cubes behind the last row do nothing; positions up to a row's own are in the cache.
    unsafe {
        attend_kernel::launch_unchecked::<R>(
            &client,
            cubes(rows * kv_heads * parts),
            CubeDim::new_1d((heads.planes * client.properties().hardware.plane_size_min as usize) as u32),
            q.into_array_arg(),
            keys.clone().into_array_arg(),
            values.clone().into_array_arg(),
            results.into_array_arg(),
            statistics.map(CubeTensor::into_array_arg).into(),
            rows,
            kv_heads,
            parts,
            seen.div_ceil(parts),
            start,
            seq_len,
            capacity,
            scale as f32,
            heads,
            keys.dtype.into(),
        );
        if let Some((results, statistics)) = partial {
            let count = rows * n_heads * heads.pairs;
            combine_kernel::launch_unchecked::<R>(
                &client,
                cubes(count.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                results.into_array_arg(),
                statistics.into_array_arg(),
                out.clone().into_array_arg(),
                count,
                parts,
                heads.pairs,
            );
        }
    }
    out
}
