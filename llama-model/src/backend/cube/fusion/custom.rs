//! Operations of ours in the stream of Burn's fusion.

use std::fmt;
use std::sync::Arc;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

use crate::LlamaBackend;

/// What a custom operation does on the inner backend.
type Run<B> = Arc<dyn Fn(Vec<FloatTensor<B>>, Vec<IntTensor<B>>) -> Vec<FloatTensor<B>> + Send + Sync>;

/// A custom operation in the stream.
struct Custom<B: LlamaBackend> {
    desc: CustomOpIr,
    /// Its inputs that are floats; those of integers follow.
    floats: usize,
    run: Run<B>,
}

impl<B: LlamaBackend> fmt::Debug for Custom<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.desc.fmt(f)
    }
}

impl<B: FusionBackend + LlamaBackend> Operation<B::FusionRuntime> for Custom<B> {
    fn execute(&self, handles: &mut HandleContainer<<B::FusionRuntime as FusionRuntime>::FusionHandle>) {
        let (floats, ints) = self.desc.inputs.split_at(self.floats);
        let floats = floats.iter().map(|float| handles.get_float_tensor::<B>(float)).collect();
        let ints = ints.iter().map(|ints| handles.get_int_tensor::<B>(ints)).collect();
        for (output, tensor) in self.desc.outputs.iter().zip((self.run)(floats, ints)) {
            handles.register_float_tensor::<B>(&output.id, tensor);
        }
    }
}

/// Registers an operation on tensors of floats and of integers, whose results have these shapes and types.
pub(super) fn custom_list<B: FusionBackend + LlamaBackend>(
    name: &'static str,
    inputs: Vec<FloatTensor<Fusion<B>>>,
    ints: Vec<IntTensor<Fusion<B>>>,
    outputs: Vec<(Shape, DType)>,
    run: impl Fn(Vec<FloatTensor<B>>, Vec<IntTensor<B>>) -> Vec<FloatTensor<B>> + Send + Sync + 'static,
) -> Vec<FloatTensor<Fusion<B>>> {
    let client = inputs[0].client.clone();
    let floats = inputs.len();
    let streams = OperationStreams::with_inputs(inputs.iter().chain(&ints));
    let output = |(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype);
    let outputs: Vec<TensorIr> = outputs.into_iter().map(output).collect();
    let inputs: Vec<TensorIr> = inputs.into_iter().chain(ints).map(|input| input.into_ir()).collect();
    let desc = CustomOpIr::new(name, &inputs, &outputs);
    let operation = Custom::<B> { desc: desc.clone(), floats, run: Arc::new(run) };
    client.register(streams, OperationIr::Custom(desc), operation)
}

/// [`custom_list`] with at most one tensor of integers, for a number of results that the operation knows.
pub(super) fn custom_all<B: FusionBackend + LlamaBackend, const M: usize>(
    name: &'static str,
    inputs: Vec<FloatTensor<Fusion<B>>>,
    ints: Option<IntTensor<Fusion<B>>>,
    outputs: [(Shape, DType); M],
    run: impl Fn(Vec<FloatTensor<B>>, Option<IntTensor<B>>) -> [FloatTensor<B>; M] + Send + Sync + 'static,
) -> [FloatTensor<Fusion<B>>; M] {
    let ints = ints.into_iter().collect();
    let results = custom_list::<B>(name, inputs, ints, outputs.into(), move |inputs, ints| {
        run(inputs, ints.into_iter().next()).into()
    });
    results.try_into().unwrap_or_else(|_| unreachable!("an operation returns the outputs it was registered with"))
}

/// [`custom_all`] for a number of inputs that the operation knows.
pub(super) fn custom<B: FusionBackend + LlamaBackend, const N: usize, const M: usize>(
    name: &'static str,
    inputs: [FloatTensor<Fusion<B>>; N],
    ints: Option<IntTensor<Fusion<B>>>,
    outputs: [(Shape, DType); M],
    run: impl Fn([FloatTensor<B>; N], Option<IntTensor<B>>) -> [FloatTensor<B>; M] + Send + Sync + 'static,
) -> [FloatTensor<Fusion<B>>; M] {
    custom_all::<B, M>(name, inputs.into(), ints, outputs, move |inputs, ints| {
        let inputs =
            inputs.try_into().unwrap_or_else(|_| unreachable!("an operation has the inputs it was registered with"));
        run(inputs, ints)
    })
}
