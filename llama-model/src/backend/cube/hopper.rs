//! Kernels for Hopper, whose tensor cores have twice the speed for instructions of a whole warp group (`wgmma`).
//!
//! CubeCL 0.10 has no such instruction, so these few kernels are written in CUDA C++ (`hopper.cuh` and the `wgmma.cu` beside their callers)
//! and compiled like CubeCL's own, at run time.

use std::fmt::Debug;
use std::hash::Hash;

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::ir::features::Tma;
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding};
use cubecl::{CompilationError, Compiler, CubeTask};

/// Most shared memory that a kernel asks for: what the device has, less what barriers and statistics take.
const MOST_ROOM: usize = 224 * 1024;

/// Whether the device is of this one generation: tensor maps came with it, and wide ones after it.
pub(super) fn supported<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    let properties = client.properties();
    let tma = &properties.features.tma;
    tma.contains(Tma::Base) && !tma.contains(Tma::Im2colWide) && properties.hardware.max_shared_memory_size >= MOST_ROOM
}

/// A variant of a kernel.
pub(super) trait Kernel: Copy + Debug + Eq + Hash + Send + Sync + 'static {
    /// Its name in the source.
    const NAME: &'static str;
    /// Units of a cube.
    const UNITS: u32;

    /// What it defines before its text, and the text.
    fn source(&self) -> (Vec<(&'static str, String)>, &'static str);

    /// Bytes of shared memory that it sizes itself, and what their beginning at a whole pattern of the copies may lose.
    fn room(&self) -> usize;
}

/// A kernel as CubeCL compiles and launches it.
struct Task<K>(K);

impl<K: Kernel> KernelMetadata for Task<K> {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(self.0).cube_dim(CubeDim::new_1d(K::UNITS))
    }

    fn address_type(&self) -> StorageType {
        AddressType::U32.unsigned_type()
    }
}

impl<C: Compiler, K: Kernel> CubeTask<C> for Task<K> {
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
        room::expand(&mut builder.scope, self.0.room());
        let cube_dim = CubeDim::new_1d(K::UNITS);
        let definition = builder.build(KernelSettings::default().cube_dim(cube_dim).kernel_name(K::NAME));
        let (definitions, text) = self.0.source();
        let definitions: String =
            definitions.into_iter().map(|(name, value)| format!("#define {name} {value}\n")).collect();
        Ok(CompiledKernel {
            entrypoint_name: K::NAME.into(),
            debug_name: Some(core::any::type_name::<K>()),
            source: [&definitions, include_str!("hopper.cuh"), text].concat(),
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

/// Launches a kernel, whose parameters are the tensor maps, a pointer to what each maps, the tensors and a structure of the constants.
///
/// # Safety
/// The kernel must stay within the tensors.
pub(super) unsafe fn launch<R: CubeRuntime, K: Kernel>(
    client: &ComputeClient<R>,
    kernel: K,
    cubes: usize,
    maps: Vec<TensorMapBinding>,
    tensors: Vec<CubeTensor<R>>,
    constants: Vec<u64>,
) {
    let constant = constants.len();
    let arguments = KernelArguments::new()
        .with_tensor_maps(maps)
        .with_buffers(tensors.into_iter().map(|tensor| tensor.binding().handle).collect())
        .with_info(MetadataBindingInfo::new(constants, constant));
    // SAFETY: as this function's.
    unsafe { client.launch_unchecked(Box::new(Task(kernel)), CubeCount::new_1d(cubes as u32), arguments) }
}

/// A matrix as it is copied: boxes of so many lines of 64 values.
pub(super) fn tensor_map<R: CubeRuntime>(matrix: &CubeTensor<R>, lines: usize) -> TensorMapBinding {
    let args = TiledArgs { tile_size: Shape::new([lines, 64]) };
    let map = TensorMapArg::<R, Tiled>::new(args, matrix.clone().into_tensor_arg(), StorageType::from(matrix.dtype))
        .with_swizzle(TensorMapSwizzle::B128)
        .with_prefetch(TensorMapPrefetch::B256);
    TensorMapBinding { binding: matrix.clone().binding().handle, map: map.metadata }
}

/// Where the left operand of an instruction lies.
#[derive(Clone, Copy)]
pub(super) enum Left {
    /// In shared memory, with its 64 rows contiguous or with the summed values.
    Shared { summed_inner: bool },
    /// In registers, four of each unit.
    Registers,
}

/// The instruction for 64 rows, 16 values along the sum and so many columns, as a macro's body: of `(sums, a, b, add)`, or of `(sums, a, b)`
/// with the left operand in registers, which always adds.
pub(super) fn wgmma(columns: usize, operand: DType, left: Left, right_summed_inner: bool) -> String {
    let operand = if operand == DType::F16 { "f16" } else { "bf16" };
    let sums = columns / 2;
    let list = |from: usize, count: usize| (from..from + count).map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let outputs = (0..sums).map(|i| format!("\"+f\"((sums)[{i}])")).collect::<Vec<_>>().join(", ");
    let outer = |summed_inner: bool| u8::from(!summed_inner);
    let (a, inputs, add, transposed) = match left {
        Left::Shared { summed_inner } => {
            let inputs = "\"l\"(a), \"l\"(b), \"r\"((u32)(add))";
            (format!("%{sums}"), inputs, format!("%{}", sums + 2), format!("{}, ", outer(summed_inner)))
        }
        Left::Registers => {
            let inputs = "\"r\"((a)[0]), \"r\"((a)[1]), \"r\"((a)[2]), \"r\"((a)[3]), \"l\"(b)";
            (format!("{{{}}}", list(sums, 4)), inputs, "1".into(), String::new())
        }
    };
    let b = sums + if matches!(left, Left::Registers) { 4 } else { 1 };
    format!(
        "asm volatile(\"{{\\n.reg .pred add;\\nsetp.ne.b32 add, {add}, 0;\\n\
         wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{operand}.{operand} {{{}}}, {a}, %{b}, add, 1, 1, {transposed}{};\\n}}\\n\" \
         : {outputs} : {inputs})",
        list(0, sums),
        outer(right_summed_inner),
    )
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use cubecl::cuda::CudaRuntime;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    struct Nothing;

    impl Kernel for Nothing {
        const NAME: &'static str = "nothing";
        const UNITS: u32 = 32;

        fn source(&self) -> (Vec<(&'static str, String)>, &'static str) {
            (vec![("N", "3".into())], "extern \"C\" __global__ void nothing() {}")
        }

        fn room(&self) -> usize {
            64 * 1024
        }
    }

    /// CubeCL's form of a kernel tells its shared memory; the source has its definitions before its text.
    #[test]
    fn compiles_to_a_source_and_its_room() {
        type Compiler = <CudaRuntime as Runtime>::Compiler;
        let task = Task(Nothing);
        let address_type = task.address_type();
        let compiled: CompiledKernel<Compiler> = task
            .compile(&mut Default::default(), &Default::default(), ExecutionMode::Unchecked, address_type)
            .expect("it compiles");
        assert_eq!(compiled.repr.expect("it has one").shared_memory_size(), 64 * 1024);
        assert!(compiled.source.starts_with("#define N 3\n") && compiled.source.contains("void nothing()"));
    }

    #[test]
    fn instructions_number_their_registers() {
        let shared = wgmma(64, DType::BF16, Left::Shared { summed_inner: true }, false);
        assert!(shared.contains("setp.ne.b32 add, %34, 0;"));
        assert!(shared.contains("m64n64k16.f32.bf16.bf16 {%0, %1, "));
        assert!(shared.contains(", %31}, %32, %33, add, 1, 1, 0, 1;"));
        let registers = wgmma(128, DType::F16, Left::Registers, false);
        assert!(registers.contains("setp.ne.b32 add, 1, 0;"));
        assert!(registers.contains(", %63}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;"));
    }
}
