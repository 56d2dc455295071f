//! Parameters by name, and safetensors files of them.
//!
//! A module's parameters are visited in a fixed order under the names of the released checkpoints
//! (`layers.0.attention.wq.weight`). Files use the Hugging Face names (`model.layers.0.self_attn.q_proj.weight`), so
//! that a checkpoint's `model.safetensors` is one that other programs read.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

pub use crate::names::{file_name, model_path};
use crate::shard::{Shard, Split};
pub(crate) use crate::tensor_file::replace;
pub use crate::tensor_file::{Streamed, TensorFile, save_streamed, write_atomic};
use crate::{LlamaBackend, ModelError};

/// Keeps the path of the parameter being visited.
#[derive(Default)]
pub(crate) struct PathStack(Vec<String>);

impl PathStack {
    /// Inside the module at `path`.
    pub fn at(path: &str) -> Self {
        Self(vec![path.into()])
    }

    pub fn path(&self) -> String {
        self.0.join(".")
    }

    pub fn enter(&mut self, name: &str) {
        self.0.push(name.into());
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }
}

/// The value of a parameter, whatever its rank.
pub struct ParamValue {
    /// Its shape.
    pub dims: Vec<usize>,
    /// Its type.
    pub dtype: DType,
    read: Box<dyn Fn() -> TensorData>,
}

impl ParamValue {
    /// A copy on the host.
    pub fn to_data(&self) -> TensorData {
        (self.read)()
    }
}

/// Calls a function for every float parameter, in the module's fixed order, with its path and its value.
pub fn visit_params<B: Backend, M: Module<B>>(module: &M, visit: impl FnMut(&str, ParamValue)) {
    struct Visitor<F> {
        stack: PathStack,
        visit: F,
    }
    impl<B: Backend, F: FnMut(&str, ParamValue)> ModuleVisitor<B> for Visitor<F> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let value = param.val();
            let (dims, dtype) = (value.dims().to_vec(), value.dtype());
            let read = Box::new(move || value.to_data());
            (self.visit)(&self.stack.path(), ParamValue { dims, dtype, read });
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.stack.enter(name);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.exit();
        }
    }
    module.visit(&mut Visitor { stack: PathStack::default(), visit });
}

/// A change of one parameter, whatever its rank.
pub trait ParamMap<B: Backend> {
    /// The new value of the parameter at `path`. The tensor is the only handle of its buffer if the module's was.
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D>;
}

/// A parameter that has a gradient.
#[derive(Clone, Debug)]
pub struct TrainedParam {
    /// Its place in the module.
    pub path: String,
    /// What its gradient is found by.
    pub id: ParamId,
    /// Its shape.
    pub dims: Vec<usize>,
}

impl TrainedParam {
    /// Numbers it has.
    pub fn num_elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// The parameters of a module on a backend with autodiff that have gradients, in the module's fixed order.
pub fn trained_params<B: Backend, M: Module<B>>(module: &M) -> Vec<TrainedParam> {
    struct Visitor {
        stack: PathStack,
        params: Vec<TrainedParam>,
    }
    impl<B: Backend> ModuleVisitor<B> for Visitor {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let (path, dims) = (self.stack.path(), param.dims().to_vec());
                self.params.push(TrainedParam { path, id: param.id, dims });
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.stack.enter(name);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.exit();
        }
    }
    let mut visitor = Visitor { stack: PathStack::default(), params: Vec::new() };
    module.visit(&mut visitor);
    visitor.params
}

/// Replaces every float parameter, in the module's fixed order. Ids and gradient requirements stay.
pub fn map_params<B: Backend, M: Module<B>>(module: M, map: &mut impl ParamMap<B>) -> M {
    struct Mapper<'a, F> {
        stack: PathStack,
        map: &'a mut F,
    }
    impl<B: Backend, F: ParamMap<B>> ModuleMapper<B> for Mapper<'_, F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let (id, value, mapper) = param.consume();
            let require_grad = value.is_require_grad();
            let value = self.map.map(&self.stack.path(), value).set_require_grad(require_grad);
            Param::from_mapped_value(id, value, mapper)
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.stack.enter(name);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.exit();
        }
    }
    module.map(&mut Mapper { stack: PathStack::default(), map })
}

/// Writes a module's parameters under their file names, in the dtype they have, one by one.
///
/// # Errors
/// [`ModelError::Io`].
pub fn save_model<B: LlamaBackend, M: Module<B>>(module: &M, path: &Path) -> Result<(), ModelError> {
    save_whole(module, Shard::WHOLE, path, |_, part| Ok(part))
}

/// As [`save_model`], for a module that is a part of the one in the file: `whole` makes the whole of a parameter of a part, in the order
/// of [`file_name`]s.
///
/// # Errors
/// As there, and those of `whole`.
pub fn save_whole<B: LlamaBackend, M: Module<B>, E: From<ModelError>>(
    module: &M,
    shard: Shard,
    path: &Path,
    whole: impl Fn(&str, TensorData) -> Result<TensorData, E>,
) -> Result<(), E> {
    let mut tensors = Vec::new();
    let whole = &whole;
    visit_params(module, |param, value| {
        let param = param.to_string();
        tensors.push(Streamed {
            name: file_name(&param).unwrap_or_else(|| param.clone()),
            dims: Split::of(&param).whole_dims(&value.dims, shard.count),
            dtype: value.dtype,
            read: Box::new(move || whole(&param, value.to_data())),
        });
    });
    save_streamed(path, tensors)
}

/// Reads a module's parameters, all of them and no others, converted to the backend's default float.
///
/// # Errors
/// [`ModelError::MissingTensor`], [`ModelError::UnexpectedTensor`], [`ModelError::TensorShape`], and those of
/// [`TensorFile::open`].
pub fn load_model<B: LlamaBackend, M: Module<B>>(module: M, path: &Path) -> Result<M, ModelError> {
    load_part(module, Shard::WHOLE, path)
}

/// As [`load_model`], for a module that is a part of the one in the file.
///
/// # Errors
/// As there.
pub fn load_part<B: LlamaBackend, M: Module<B>>(module: M, shard: Shard, path: &Path) -> Result<M, ModelError> {
    struct Load {
        file: TensorFile,
        shard: Shard,
        unused: BTreeSet<String>,
        error: Option<ModelError>,
    }
    impl<B: Backend> ParamMap<B> for Load {
        fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
            let name = file_name(path).unwrap_or_else(|| path.to_string());
            self.unused.remove(&name);
            let split = Split::of(path);
            match self.file.tensor(&name, &split.whole_dims(&value.dims(), self.shard.count)) {
                Ok(data) => Tensor::from_data(split.cut(data, self.shard), &value.device()),
                Err(error) => {
                    self.error.get_or_insert(error);
                    value
                }
            }
        }
    }
    let file = TensorFile::open(path)?;
    // Some exporters write the rotary frequencies, which follow from the configuration.
    let unused = file.names().into_iter().filter(|name| !name.ends_with("rotary_emb.inv_freq")).collect();
    let mut load = Load { file, shard, unused, error: None };
    let module = map_params(module, &mut load);
    match (load.error, load.unused.pop_first()) {
        (Some(error), _) => Err(error),
        (None, Some(name)) => Err(ModelError::UnexpectedTensor { path: path.into(), name }),
        (None, None) => Ok(module),
    }
}
