//! What kernels on tensor cores share: operands and sums of the instruction `mma` of 16 × 8 × 16, in registers in a known order.

use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::cube;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind, StorageType};
use cubecl::prelude::*;

use crate::Precision;

/// Values that are read at once, and a row of what `ldmatrix` reads.
pub(super) type Eight = Const<8>;
/// Values in a register, and neighbours in an accumulator.
pub(super) type Pair = Const<2>;
/// A square of 16 × 16 values as an operand, or a part of one: pairs in registers.
pub(super) type Fragment<E> = Array<Vector<E, Pair>>;
/// 16 rows × 8 columns of sums: a unit has two neighbours in each of two rows, that of its number divided by 4 and the eighth after it.
pub(super) type Sums = Array<Vector<f32, Pair>>;
/// Columns of [`Sums`].
pub(super) const WIDTH: usize = 8;

/// The operands' type of a precision, if the device has the instruction for it and copies past the units.
pub(super) fn operand_type<R: CubeRuntime>(client: &ComputeClient<R>, precision: Precision) -> Option<StorageType> {
    let kind = match precision {
        Precision::F32 => return None,
        Precision::Bf16 => FloatKind::BF16,
        Precision::F16 => FloatKind::F16,
    };
    let operand: StorageType = ElemType::Float(kind).into();
    let sums: StorageType = ElemType::Float(FloatKind::F32).into();
    let features = &client.properties().features;
    let matmul = &features.matmul;
    let config = MmaConfig { a_type: operand, b_type: operand, cd_type: sums, m: 16, n: 8, k: 16 };
    (features.copy_async && matmul.mma.contains(&config) && matmul.ldmatrix.contains(&operand)).then_some(operand)
}

/// Four squares of 8 × 8 values, or their transposes: unit `i` of a plane gives with `at` the row `i % 8` of square `i / 8`.
#[cube]
pub(super) fn fragment<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, Eight>>,
    at: usize,
    #[comptime] transposed: bool,
) -> Fragment<E> {
    let slice = tile.slice(at, at + 1);
    definition.load_matrix::<Vector<E, Eight>, Pair>(&slice, MatrixIdent::A, 4usize, transposed)
}

/// Two of a fragment's squares: the right operand for eight columns.
#[cube]
pub(super) fn half<E: Float>(square: &Fragment<E>, #[comptime] first: usize, #[comptime] second: usize) -> Fragment<E> {
    let mut half = Array::<Vector<E, Pair>>::new(2usize);
    half[0] = square[first];
    half[1] = square[second];
    half
}

/// Sums of nothing, for `columns` columns.
#[cube]
pub(super) fn zeros(#[comptime] columns: usize) -> Sequence<Sums> {
    let mut sums = Sequence::<Sums>::new();
    #[unroll]
    for _ in 0..comptime!(columns / WIDTH) {
        let mut part = Array::<Vector<f32, Pair>>::new(2usize);
        part[0] = Vector::cast_from(0.0f32);
        part[1] = Vector::cast_from(0.0f32);
        sums.push(part);
    }
    sums
}
