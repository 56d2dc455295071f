//! The same product on Hopper, whose tensor cores have twice the speed for instructions of a whole warp group (`wgmma`).
//!
//! CubeCL 0.10 has no such instruction, so this one kernel is written in CUDA C++ (`wgmma.cu`) and compiled like CubeCL's own, at run time.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use cubecl::ir::features::Tma;
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding};
use cubecl::{CompilationError, Compiler, CubeTask};

use super::kernel::DEPTH;
use super::{Product, multiprocessors};

/// Rows of a tile that a pair of cubes makes.
pub(super) const PAIR_ROWS: usize = 256;
/// Columns of a tile: the wider reads less, of the narrower there are more to share.
pub(super) const TILE_COLUMNS: [usize; 2] = [256, 128];
/// Two warp groups that multiply, and a plane of which a unit copies.
const UNITS: u32 = 288;
/// Shared memory: operands, and what their beginning at a whole pattern may lose.
const ROOM: usize = 193 * 1024;

/// A kernel of `wgmma.cu`: its definitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Wgmma {
    operand: DType,
    columns: usize,
    /// Whether the summed dimension is the contiguous one, of the left operand and of the right.
    summed_inner: [bool; 2],
    out: DType,
    add: bool,
}

impl Wgmma {
    fn source(self) -> String {
        let Self { operand, columns, summed_inner: [a_inner, b_inner], out, add } = self;
        let operand = if operand == DType::F16 { "f16" } else { "bf16" };
        let out = match out {
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            _ => "F32",
        };
        let flag = u8::from;
        let sums = columns / 2;
        let list = |item: fn(usize) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
        let registers = list(|i| format!("%{i}"));
        let variables = list(|i| format!("\"+f\"(sums[{i}])"));
        let (a, b, scale) = (sums, sums + 1, sums + 2);
        let (a_outer, b_outer) = (flag(!a_inner), flag(!b_inner));
        format!(
            "#define COLUMNS {columns}\n#define A_SUMMED_INNER {}\n#define B_SUMMED_INNER {}\n#define OUT_{out}\n#define ADD {}\n\
             #define WGMMA(sums, a, b, add) asm volatile(\"{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{scale}, 0;\\n\
             wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{operand}.{operand} {{{registers}}}, %{a}, %{b}, add, 1, 1, {a_outer}, \
             {b_outer};\\n}}\\n\" : {variables} : \"l\"(a), \"l\"(b), \"r\"((u32)(add)))\n{}",
            flag(a_inner),
            flag(b_inner),
            flag(add),
            include_str!("wgmma.cu"),
        )
    }
}

impl KernelMetadata for Wgmma {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(*self).cube_dim(CubeDim::new_1d(UNITS))
    }

    fn address_type(&self) -> StorageType {
        AddressType::U32.unsigned_type()
    }
}

impl<C: Compiler> CubeTask<C> for Wgmma {
    fn compile(
        &self,
        compiler: &mut C,
        options: &C::CompilationOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<CompiledKernel<C>, CompilationError> {
        // The runtime asks CubeCL's form of a kernel how much shared memory it has.
        let mut builder = KernelBuilder::default();
        AddressType::U32.register(&mut builder.scope);
        room::expand(&mut builder.scope, ROOM);
        let cube_dim = CubeDim::new_1d(UNITS);
        let definition = builder.build(KernelSettings::default().cube_dim(cube_dim).kernel_name("product"));
        Ok(CompiledKernel {
            entrypoint_name: "product".into(),
            debug_name: Some(core::any::type_name::<Self>()),
            source: self.source(),
            repr: Some(compiler.compile(definition, options, mode, address_type)?),
            cube_dim,
            debug_info: None,
        })
    }
}

#[cube]
fn room(#[comptime] bytes: usize) {
    let mut room = SharedMemory::<u32>::new(comptime!(bytes / 4));
    room[UNIT_POS as usize] = UNIT_POS;
}

/// Whether the device is of the one generation that has the instruction: tensor maps came with it, and wide ones after it.
pub(super) fn supported<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    let properties = client.properties();
    let tma = &properties.features.tma;
    tma.contains(Tma::Base) && !tma.contains(Tma::Im2colWide) && properties.hardware.max_shared_memory_size > ROOM
}

/// Launches a product whose parts are to lie in `parts`, `[splits, rows, columns]`.
pub(super) fn launch<R: CubeRuntime>(product: Product<R>, tile_columns: usize, add: bool) {
    let Product { operands, summed_inner, parts, summed, part } = product;
    let [splits, rows, columns] = parts.shape().dims();
    let kernel = Wgmma { operand: operands[0].dtype, columns: tile_columns, summed_inner, out: parts.dtype, add };
    let client = parts.client.clone();
    // A box of the left operand has the rows of a cube, of the right one the half of a tile's columns; both 64 values along the sum, which
    // are the lines of a box of 64 values where the summed dimension is the outer one.
    let lines = [PAIR_ROWS / 2, tile_columns / 2];
    let tensor_maps = [0, 1].map(|i| {
        let lines = if summed_inner[i] { lines[i] } else { DEPTH };
        let operand = &operands[i];
        let args = TiledArgs { tile_size: Shape::new([lines, DEPTH]) };
        let map =
            TensorMapArg::<R, Tiled>::new(args, operand.clone().into_tensor_arg(), StorageType::from(operand.dtype))
                .with_swizzle(TensorMapSwizzle::B128)
                .with_prefetch(TensorMapPrefetch::B256);
        TensorMapBinding { binding: operand.clone().binding().handle, map: map.metadata }
    });
    let shape: Vec<u64> = [rows, columns, summed, part, splits].map(|size| size as u64).into();
    let constant = shape.len();
    let arguments = KernelArguments::new()
        .with_tensor_maps(tensor_maps.into())
        .with_buffer(parts.binding().handle)
        .with_info(MetadataBindingInfo::new(shape, constant));
    let pairs = rows.div_ceil(PAIR_ROWS) * columns.div_ceil(tile_columns) * splits;
    let count = CubeCount::new_1d(2 * pairs.min(multiprocessors(&client) / 2).max(1) as u32);
    // SAFETY: copies of what lies behind an operand's end are zeros, and nothing is written behind the result's.
    unsafe { client.launch_unchecked(Box::new(kernel), count, arguments) }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use cubecl::cuda::CudaRuntime;

    use super::*;

    /// The form that CubeCL has of the kernel tells its shared memory; the source has all registers of the instruction.
    #[test]
    fn compiles_to_a_source_and_its_room() {
        type Compiler = <CudaRuntime as Runtime>::Compiler;
        for columns in TILE_COLUMNS {
            let kernel =
                Wgmma { operand: DType::BF16, columns, summed_inner: [true, false], out: DType::F32, add: true };
            let address_type = kernel.address_type();
            let compiled: CompiledKernel<Compiler> = kernel
                .compile(&mut Default::default(), &Default::default(), ExecutionMode::Unchecked, address_type)
                .expect("it compiles");
            assert_eq!(compiled.repr.expect("it has one").shared_memory_size(), ROOM);
            assert!(compiled.source.contains(&format!("m64n{columns}k16.f32.bf16.bf16 {{%0, %1")));
            assert!(compiled.source.contains(&format!(
                "%{}}}, %{}, %{}, add, 1, 1, 0, 1;",
                columns / 2 - 1,
                columns / 2,
                columns / 2 + 1
            )));
        }
    }
}
