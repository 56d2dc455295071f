//! Safetensors files, read in place and written one tensor at a time.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, View};

use crate::copy::concat;
use crate::file_map::FileMap;
use crate::formats::TensorInfo;
use crate::{ModelError, WeightFormat};

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
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

/// Writes tensors as a safetensors file, beside its place and then renamed into it: a reader never sees half a file, and a failed write leaves the old
/// one. They are made one by one, in the order of their names where they have one type.
///
/// # Errors
/// [`ModelError::Io`] if the file cannot be written, for example on a full disk, [`ModelError::TensorShape`] for a tensor that is made in another
/// shape, and those of making the tensors.
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
    map: FileMap,
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
        let map = FileMap::open(path)?;
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

    /// The format that a tensor is stored in, f32 if it is of another type or missing.
    pub(crate) fn stored(&self, name: &str) -> WeightFormat {
        match self.metadata.info(name).map(|info| info.dtype) {
            Some(Dtype::BF16) => WeightFormat::Bf16,
            Some(Dtype::F16) => WeightFormat::F16,
            _ => WeightFormat::F32,
        }
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
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let reason = format!("tensor `{name}` has dtype {other:?}; F32, F64, F16 and BF16 are read");
                return Err(ModelError::format(&self.path, reason));
            }
        };
        let (from, to) = info.data_offsets;
        Ok(self.map.read(self.start + from..self.start + to, |bytes| concat(dtype, [bytes], dims)))
    }
}
