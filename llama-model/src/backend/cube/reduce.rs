//! What kernels share that reduce with all units of a cube.

use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use cubecl::cube;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

/// Units of a cube.
pub(super) const UNITS: usize = 256;

/// Values of a row that a unit reads at once.
pub(super) fn vector_size(width: usize) -> usize {
    if width.is_multiple_of(4) { 4 } else { 1 }
}

/// Whether units of a plane can add their values without shared memory.
pub(super) fn planes<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    client.properties().features.plane.contains(Plane::Ops)
}

#[cube]
fn combine(a: f32, b: f32, #[comptime] greatest: bool) -> f32 {
    if comptime!(greatest) { max(a, b) } else { a + b }
}

/// The sum of all units' values, or the greatest, in every unit.
#[cube]
fn reduce(value: f32, shared: &mut SharedMemory<f32>, #[comptime] greatest: bool, #[comptime] planes: bool) -> f32 {
    let unit = UNIT_POS as usize;
    let mut parts = 1usize;
    if comptime!(planes) {
        let of_plane = if comptime!(greatest) { plane_max(value) } else { plane_sum(value) };
        if UNIT_POS_PLANE == 0 {
            shared[unit / PLANE_DIM as usize] = of_plane;
        }
        parts = UNITS / PLANE_DIM as usize;
        sync_cube();
    } else {
        shared[unit] = value;
        sync_cube();
        #[unroll]
        for level in 0..comptime!(UNITS.ilog2()) {
            let step = comptime!(UNITS >> (level + 1));
            if unit < step {
                shared[unit] = combine(shared[unit], shared[unit + step], greatest);
            }
            sync_cube();
        }
    }
    let mut result = shared[0];
    for part in 1..parts {
        result = combine(result, shared[part], greatest);
    }
    // Nobody writes the next value before all have read this one.
    sync_cube();
    result
}

/// The sum of all units' values, in every unit.
#[cube]
pub(super) fn cube_sum(value: f32, shared: &mut SharedMemory<f32>, #[comptime] planes: bool) -> f32 {
    reduce(value, shared, false, planes)
}

/// The greatest of all units' values, in every unit.
#[cube]
pub(super) fn cube_max(value: f32, shared: &mut SharedMemory<f32>, #[comptime] planes: bool) -> f32 {
    reduce(value, shared, true, planes)
}

/// The sum of a vector's values.
#[cube]
pub(super) fn lanes<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = vector[0];
    #[unroll]
    for lane in 1..N::value() {
        sum += vector[lane];
    }
    sum
}
