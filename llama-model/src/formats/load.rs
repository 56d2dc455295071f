//! From a checkpoint to a model, tensor by tensor.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use super::{Checkpoint, Weights};
use crate::backend::Bits;
use crate::backend::rounding::BlockData;
use crate::copy::convert;
use crate::shard::{Shard, Split, Team};
use crate::weights::{ParamMap, map_params};
use crate::{Llama, LlamaBackend, ModelError, WeightFormat};

/// Matrices that are multiplied with the same input, for which kernels want them alike.
const TOGETHER: [&[&str]; 2] = [&["wq", "wk", "wv"], &["w1", "w3"]];

impl Checkpoint {
    /// The model, with its matrices in a format; without one, as they are stored. Peak memory is the model and one tensor; `each` is
    /// called with the number of parameters that were read, for a progress bar.
    ///
    /// Stored are 4 bits in blocks of 32 and 8 bits where the file has no more than them (of GGUF's types `Q4_0`, `Q4_1` and `Q4_K`, and
    /// the other types of blocks), and bf16 and f16 where the device has them; f32 otherwise. Of matrices with one input all are as the
    /// longest is.
    ///
    /// # Errors
    /// As [`Weights::weight`], and [`Llama::with_weights`].
    pub fn load<B: LlamaBackend>(
        &self,
        format: impl Into<Option<WeightFormat>>,
        device: &B::Device,
        each: impl FnMut(u64),
    ) -> Result<Llama<B>, ModelError> {
        self.load_in(&Team::default(), format, device, each)
    }

    /// The part of the model that a member of a team has; as [`load`](Self::load).
    ///
    /// # Errors
    /// As there, and [`ModelError::Config`] if the model cannot be divided among as many.
    pub fn load_in<B: LlamaBackend>(
        &self,
        team: &Team,
        format: impl Into<Option<WeightFormat>>,
        device: &B::Device,
        mut each: impl FnMut(u64),
    ) -> Result<Llama<B>, ModelError> {
        let format = format.into();
        if let Some(format) = format {
            format.check::<B>(device)?;
        }
        let format_of = |path: &str, dims: [usize; 2]| {
            let of_file = || {
                let stored = self.stored_together(path).on::<B>(device);
                if stored.fits(dims) { stored } else { WeightFormat::F32 }
            };
            format.map_or_else(of_file, |format| format.of_matrix(path))
        };
        let mut model = self.config().init_empty::<B>(team, device)?;
        let weights = Parts { whole: self, shard: team.shard() };
        // Matrices go from the file to their blocks one by one.
        model.quantize(format_of, |path, weight, bits| {
            let blocks = weights.blocks(path, weight.dims(), bits)?;
            each(weight.dims().iter().product::<usize>() as u64);
            Ok(blocks)
        })?;
        let mut load = Load { weights: &weights, format_of, each, error: None };
        let model = map_params(model, &mut load);
        load.error.map_or(Ok(model), Err)
    }

    /// The format that most of its weights are stored in; see [`load`](Self::load).
    pub fn stored_format(&self) -> WeightFormat {
        let parameters = self.config().parameters();
        let count = |format: &WeightFormat| -> usize {
            let alike = parameters.iter().filter(|(path, dims)| dims.len() > 1 && self.reader.stored(path) == *format);
            alike.map(|(_, dims)| dims.iter().product::<usize>()).sum()
        };
        WeightFormat::ALL.iter().copied().max_by_key(count).unwrap_or_default()
    }

    /// The shortest format that takes a weight, and those that have its input, as they are stored.
    fn stored_together(&self, path: &str) -> WeightFormat {
        let group = TOGETHER.iter().find_map(|names| {
            let name = names.iter().find(|name| path.contains(&format!(".{name}.")))?;
            Some(names.iter().map(|other| path.replace(&format!(".{name}."), &format!(".{other}."))).collect())
        });
        let group: Vec<String> = group.unwrap_or_else(|| vec![path.into()]);
        let formats = group.iter().map(|path| self.reader.stored(path));
        formats.reduce(WeightFormat::or_longer).unwrap_or_default()
    }
}

/// Weights as a member of a team has them.
struct Parts<'a> {
    whole: &'a Checkpoint,
    shard: Shard,
}

impl Parts<'_> {
    /// A matrix whose rows are whole blocks in every part.
    fn blocks(&self, path: &str, dims: [usize; 2], bits: Bits) -> Result<BlockData, ModelError> {
        let split = Split::of(path);
        let whole = split.whole_dims(&dims, self.shard.count);
        let BlockData { bits, words, scales } = self.whole.reader.blocks(path, [whole[0], whole[1]], bits)?;
        Ok(BlockData { bits, words: split.cut(words, self.shard), scales: split.cut(scales, self.shard) })
    }
}

impl Weights for Parts<'_> {
    fn weight(&self, path: &str, dims: &[usize]) -> Result<TensorData, ModelError> {
        let split = Split::of(path);
        Ok(split.cut(self.whole.weight(path, &split.whole_dims(dims, self.shard.count))?, self.shard))
    }
}

/// Replaces every parameter by its weight, but for matrices that are in blocks.
struct Load<'a, F, E> {
    weights: &'a dyn Weights,
    format_of: F,
    each: E,
    error: Option<ModelError>,
}

impl<B: Backend, F: Fn(&str, [usize; 2]) -> WeightFormat, E: FnMut(u64)> ParamMap<B> for Load<'_, F, E> {
    fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        let dims = value.dims();
        let dtype = match *dims.as_slice() {
            [rows, cols] => (self.format_of)(path, [rows, cols]).dtype(),
            _ => Some(DType::F32),
        };
        let (Some(dtype), None) = (dtype, &self.error) else { return value };
        match self.weights.weight(path, &dims) {
            Ok(data) => {
                (self.each)(data.num_elements() as u64);
                Tensor::from_data(convert(data, dtype), (&value.device(), dtype))
            }
            Err(error) => {
                self.error = Some(error);
                value
            }
        }
    }
}
