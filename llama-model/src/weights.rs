//! Parameters by name, and safetensors files of them.
//!
//! A module's parameters are visited in a fixed order under the names of the released checkpoints
//! (`layers.0.attention.wq.weight`). Files use the Hugging Face names (`model.layers.0.self_attn.q_proj.weight`), so
//! that a checkpoint's `model.safetensors` is one that other programs read.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, View};

use crate::formats::TensorInfo;
pub use crate::names::{file_name, model_path};
use crate::shard::{Shard, Split};
use crate::{LlamaBackend, ModelError};

/// Keeps the path of the parameter being visited.
#[derive(Default)]
struct PathStack(Vec<String>);

impl PathStack {
    fn path(&self) -> String {
        self.0.join(".")
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
            self.stack.0.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.0.pop();
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
            self.stack.0.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.0.pop();
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
            self.stack.0.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.stack.0.pop();
        }
    }
    module.map(&mut Mapper { stack: PathStack::default(), map })
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// A tensor on its way to a file.
struct HostTensor(TensorData);

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        file_dtype(self.0.dtype)
    }
    fn shape(&self) -> &[usize] {
        self.0.shape.as_slice()
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.0.as_bytes().into()
    }
    fn data_len(&self) -> usize {
        self.0.bytes.len()
    }
}

/// Writes named tensors as a safetensors file, beside its place and then renamed into it: a reader never sees half a
/// file, and a failed write leaves the old one.
///
/// # Errors
/// [`ModelError::Io`] if the file cannot be written, for example on a full disk.
pub fn save_tensors(path: &Path, tensors: BTreeMap<String, TensorData>) -> Result<(), ModelError> {
    let tensors: BTreeMap<String, HostTensor> = tensors.into_iter().map(|(n, t)| (n, HostTensor(t))).collect();
    replace(path, |file| {
        safetensors::serialize_to_file(tensors.iter(), None, file.path()).map_err(|error| match error {
            SafeTensorError::IoError(error) => ModelError::io(path, error),
            error => ModelError::format(path, error),
        })
    })
}

/// A tensor of a file, which is made when its turn to be written comes.
pub struct Streamed<'a, E = ModelError> {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Its type.
    pub dtype: DType,
    /// Makes it, once.
    pub read: Box<dyn Fn() -> Result<TensorData, E> + 'a>,
}

/// As [`save_tensors`], for tensors that are made one by one, in the order of their names where they have one type.
///
/// # Errors
/// As there, and those of making the tensors.
pub fn save_streamed<E: From<ModelError>>(path: &Path, tensors: Vec<Streamed<'_, E>>) -> Result<(), E> {
    struct Lazy<'a, E> {
        tensor: Streamed<'a, E>,
        path: &'a Path,
        error: &'a RefCell<Option<E>>,
    }
    impl<E: From<ModelError>> Lazy<'_, E> {
        fn make(&self) -> Result<TensorData, E> {
            let (data, Streamed { name, dims, .. }) = ((self.tensor.read)()?, &self.tensor);
            match data.shape[..] == dims[..] {
                true => Ok(data),
                false => Err(ModelError::TensorShape {
                    path: self.path.into(),
                    name: name.clone(),
                    expected: dims.clone(),
                    found: data.shape.to_vec(),
                }
                .into()),
            }
        }
    }
    impl<E: From<ModelError>> View for Lazy<'_, E> {
        fn dtype(&self) -> Dtype {
            file_dtype(self.tensor.dtype)
        }
        fn shape(&self) -> &[usize] {
            &self.tensor.dims
        }
        fn data(&self) -> std::borrow::Cow<'_, [u8]> {
            // After an error the file is given up.
            if self.error.borrow().is_some() {
                return Vec::new().into();
            }
            match self.make() {
                Ok(data) => data.as_bytes().to_vec().into(),
                Err(error) => {
                    *self.error.borrow_mut() = Some(error);
                    Vec::new().into()
                }
            }
        }
        fn data_len(&self) -> usize {
            self.tensor.dims.iter().product::<usize>() * self.tensor.dtype.size()
        }
    }
    let error = RefCell::new(None);
    let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), Lazy { tensor, path, error: &error }));
    let tensors: Vec<_> = named.collect();
    let written = replace(path, |file| {
        // What transformers asks of a file that PyTorch reads.
        let metadata = Some(HashMap::from([("format".to_string(), "pt".to_string())]));
        let written = safetensors::serialize_to_file(tensors, metadata, file.path());
        if error.borrow().is_some() {
            // Not to be put into place; the error that is told is the one above.
            return Err(ModelError::format(path, "incomplete"));
        }
        written.map_err(|error| match error {
            SafeTensorError::IoError(error) => ModelError::io(path, error),
            error => ModelError::format(path, error),
        })
    });
    match error.into_inner() {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}

/// Writes a file beside its place, flushes it to the disk and renames it into place.
///
/// # Errors
/// [`ModelError::Io`]; the old file, if any, is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    replace(path, |file| file.write_all(bytes).map_err(|error| ModelError::io(path, error)))
}

/// Lets `write` fill a new file beside `path`, flushes it and renames it into place.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut tempfile::NamedTempFile) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let io = |error| ModelError::io(path, error);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // Readable as any file is; a temporary one would be its owner's alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".tmp-").tempfile_in(folder).map_err(io)?;
    write(&mut file)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    Ok(())
}

/// A safetensors file mapped into memory. Tensors are read when asked for.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors begin, after the header and its length.
    start: usize,
}

impl TensorFile {
    /// Opens and checks a file: the header must be sound and agree with the file's length.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::Format`].
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|error| ModelError::io(path, error))?;
        // SAFETY: the map is read only. As with every memory-mapped reader, another process that truncates the file
        // while it is read can end this one; our own writers replace files instead of changing them.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| ModelError::io(path, error))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| ModelError::format(path, format!("not a whole safetensors file: {error}")))?;
        Ok(Self { path: path.into(), map, metadata, start: size_of::<u64>() + header })
    }

    /// All tensors' names, sorted.
    pub fn names(&self) -> BTreeSet<String> {
        self.metadata.tensors().into_keys().collect()
    }

    /// What the header says of each tensor.
    pub(crate) fn infos(&self) -> impl Iterator<Item = TensorInfo> {
        self.metadata.tensors().into_iter().map(|(name, info)| TensorInfo {
            name,
            dims: info.shape.clone(),
            dtype: format!("{:?}", info.dtype),
            bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
        })
    }

    /// A tensor with exactly this shape.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`], or [`ModelError::Format`] for a dtype that is not a
    /// float.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let missing = || ModelError::MissingTensor { path: self.path.clone(), name: name.into() };
        let info = self.metadata.info(name).ok_or_else(missing)?;
        if info.shape != dims {
            return Err(ModelError::TensorShape {
                path: self.path.clone(),
                name: name.into(),
                expected: dims.into(),
                found: info.shape.clone(),
            });
        }
        let shape = dims.to_vec();
        let (from, to) = info.data_offsets;
        let bytes = &self.map[self.start + from..self.start + to];
        Ok(match info.dtype {
            Dtype::F32 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f32>(bytes), shape),
            Dtype::F64 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f64>(bytes), shape),
            Dtype::F16 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f16>(bytes), shape),
            Dtype::BF16 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, bf16>(bytes), shape),
            other => {
                let reason = format!("tensor `{name}` has dtype {other:?}; F32, F64, F16 and BF16 are read");
                return Err(ModelError::format(&self.path, reason));
            }
        })
    }
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
