//! The same product on Hopper, whose tensor cores have twice the speed for instructions of a whole warp group (`wgmma`).
//!
//! CubeCL 0.10 has no such instruction, so this one kernel is written in CUDA C++ (`wgmma.cu`) and compiled like CubeCL's own, at run time.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::ir::features::Tma;
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding};
use cubecl::{CompilationError, Compiler, CubeTask};

use super::kernel::DEPTH;
use super::{Plan, Product, multiprocessors};

/// Rows of a tile that a pair of cubes makes.
pub(super) const PAIR_ROWS: usize = 256;
/// Columns of a tile: the wider reads less, of the narrower there are more to share.
pub(super) const TILE_COLUMNS: [usize; 2] = [256, 128];
/// Most products that a launch makes.
pub(super) const MOST: usize = 3;
/// Two warp groups that multiply, and a plane of which a unit copies.
const UNITS: u32 = 288;
/// Shared memory: operands, and what their beginning at a whole pattern may lose.
const ROOM: usize = 193 * 1024;

/// A kernel of `wgmma.cu`: its definitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Wgmma {
    products: usize,
    sum: bool,
    operand: DType,
    columns: usize,
    /// Whether the summed dimension is the contiguous one, of the left operand and of the right.
    summed_inner: [bool; 2],
    out: DType,
    add: bool,
}

impl Wgmma {
    fn source(self) -> String {
        let Self { products, sum, operand, columns, summed_inner: [a_inner, b_inner], out, add } = self;
        let operand = if operand == DType::F16 { "f16" } else { "bf16" };
        let out = match out {
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            _ => "F32",
        };
        let flag = u8::from;
        let list = |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
        // As CubeCL passes them: tensor maps, what they map, other tensors, constants.
        let results = if sum { 1 } else { products };
        let map = |name: &'static str| move |i| format!("const __grid_constant__ TensorMap {name}_{i}");
        let parameters = [
            list(products, &map("a")),
            list(products, &map("b")),
            list(2 * products, &|_| "const void*".into()),
            list(results, &|i| format!("Out* out_{i}")),
        ]
        .join(", ");
        let sums = columns / 2;
        let registers = list(sums, &|i| format!("%{i}"));
        let variables = list(sums, &|i| format!("\"+f\"(sums[{i}])"));
        let (a, b, scale) = (sums, sums + 1, sums + 2);
        let (a_outer, b_outer) = (flag(!a_inner), flag(!b_inner));
        let wgmma = format!(
            "asm volatile(\"{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{scale}, 0;\\n\
             wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{operand}.{operand} {{{registers}}}, %{a}, %{b}, add, 1, 1, {a_outer}, \
             {b_outer};\\n}}\\n\" : {variables} : \"l\"(a), \"l\"(b), \"r\"((u32)(add)))"
        );
        let definitions = [
            ("MEMBERS", products.to_string()),
            ("SUM", flag(sum).to_string()),
            ("COLUMNS", columns.to_string()),
            ("A_SUMMED_INNER", flag(a_inner).to_string()),
            ("B_SUMMED_INNER", flag(b_inner).to_string()),
            ("ADD", flag(add).to_string()),
            (&format!("OUT_{out}"), String::new()),
            ("PARAMETERS", parameters),
            ("A_MAPS", list(products, &|i| format!("&a_{i}"))),
            ("B_MAPS", list(products, &|i| format!("&b_{i}"))),
            ("OUTS", list(results, &|i| format!("out_{i}"))),
            ("WGMMA(sums, a, b, add)", wgmma),
        ];
        let definitions = definitions.map(|(name, value)| format!("#define {name} {value}\n"));
        definitions.concat() + include_str!("wgmma.cu")
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

/// Launches products whose parts are to lie in as many `parts`, `[splits, rows, columns]`, or their sum's in one.
pub(super) fn launch<R: CubeRuntime>(products: Vec<Product<R>>, parts: Vec<CubeTensor<R>>, plan: &Plan, add: bool) {
    let &Plan { tile_columns, splits, part, .. } = plan;
    let (client, summed_inner) = (parts[0].client.clone(), products[0].summed_inner);
    let kernel = Wgmma {
        products: products.len(),
        sum: parts.len() < products.len(),
        operand: products[0].operands[0].dtype,
        columns: tile_columns,
        summed_inner,
        out: parts[0].dtype,
        add,
    };
    // A box of the left operand has the rows of a cube, of the right one the half of a tile's columns; both 64 values along the sum, which
    // are the lines of a box of 64 values where the summed dimension is the outer one.
    let lines = [PAIR_ROWS / 2, tile_columns / 2];
    let map = |i: usize, operand: &CubeTensor<R>| {
        let lines = if summed_inner[i] { lines[i] } else { DEPTH };
        let args = TiledArgs { tile_size: Shape::new([lines, DEPTH]) };
        let map =
            TensorMapArg::<R, Tiled>::new(args, operand.clone().into_tensor_arg(), StorageType::from(operand.dtype))
                .with_swizzle(TensorMapSwizzle::B128)
                .with_prefetch(TensorMapPrefetch::B256);
        TensorMapBinding { binding: operand.clone().binding().handle, map: map.metadata }
    };
    let maps = [0, 1].into_iter().flat_map(|i| products.iter().map(move |product| (i, product)));
    let maps = maps.map(|(i, product)| map(i, &product.operands[i])).collect();
    let sizes = (0..3).flat_map(|i| products.iter().map(move |product| product.size[i]));
    // A sum of several is whole, whatever their lengths.
    let constants: Vec<u64> = sizes.chain([part, splits]).map(|size| size as u64).collect();
    let constant = constants.len();
    let arguments = KernelArguments::new()
        .with_tensor_maps(maps)
        .with_buffers(parts.iter().map(|parts| parts.clone().binding().handle).collect())
        .with_info(MetadataBindingInfo::new(constants, constant));
    let pairs = |product: &Product<R>| product.size[0].div_ceil(PAIR_ROWS) * product.size[1].div_ceil(tile_columns);
    let pairs: usize = products[..parts.len()].iter().map(pairs).sum::<usize>() * splits;
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
            let kernel = Wgmma {
                products: 2,
                sum: true,
                operand: DType::BF16,
                columns,
                summed_inner: [true, false],
                out: DType::F32,
                add: true,
            };
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
