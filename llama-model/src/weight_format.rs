//! Weights in fewer bytes, for generation: decoding is limited by the memory they are read from.

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::backend::rounding::BlockData;
use crate::backend::{Bits, QUANT_BLOCK};
use crate::compute::names;
use crate::modules::Quantized;
use crate::weights::{ParamMap, map_params};
use crate::{Llama, LlamaBackend, ModelError, Precision};

/// The matrices that have a row for each token.
const EMBEDDINGS: &str = "tok_embeddings.weight";
const HEAD: &str = "output.weight";

/// How matrices are stored. Norm gains, activations and the key/value cache are f32 in every case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes, 8 bits of mantissa.
    Bf16,
    /// 2 bytes, 11 bits of mantissa, values up to 65,504.
    F16,
    /// 8 bits and a scale for every 32 weights: 1.0625 bytes.
    Q8,
    /// 4 bits, a scale and a smallest value for every 32 weights: 0.625 bytes, or 0.5625 where a file has no smallest values (GGUF's
    /// `Q4_0`). Token embeddings and the head are as in [`Q8`](Self::Q8).
    Q4,
}

names!(WeightFormat, "weights", F32 = "f32", Bf16 = "bf16", F16 = "f16", Q8 = "q8", Q4 = "q4");

impl WeightFormat {
    /// The dtype of whole matrices, or none where they are in blocks.
    pub(crate) fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
            Self::Q8 | Self::Q4 => None,
        }
    }

    /// The format of one of the matrices.
    pub(crate) fn of_matrix(self, path: &str) -> Self {
        let vocabulary = path == EMBEDDINGS || path == HEAD;
        if self == Self::Q4 && vocabulary { Self::Q8 } else { self }
    }

    /// That of a float.
    pub(crate) fn of_float(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        }
    }

    /// The shorter of those that lose next to nothing of both.
    pub(crate) fn or_longer(self, other: Self) -> Self {
        match (self, other) {
            // One has the range, the other the digits.
            (Self::Bf16, Self::F16) | (Self::F16, Self::Bf16) => Self::F32,
            _ if self.bytes_per_weight() < other.bytes_per_weight() => other,
            _ => self,
        }
    }

    /// Whether a matrix can be stored so: rows in blocks must be whole blocks.
    pub(crate) fn fits(self, [_, d_in]: [usize; 2]) -> bool {
        self.dtype().is_some() || d_in.is_multiple_of(QUANT_BLOCK)
    }

    /// Whether a device has the type of whole matrices. It always has that of blocks.
    ///
    /// # Errors
    /// [`ModelError::Config`] if not, with what to choose.
    pub fn check<B: Backend>(self, device: &B::Device) -> Result<(), ModelError> {
        match self.dtype() {
            Some(dtype) if B::dtype_usage(device, dtype).is_empty() => Err(ModelError::Config {
                field: "weights",
                reason: format!("cannot be `{self}` on {device:?}, which has no such numbers: choose another or f32"),
            }),
            _ => Ok(()),
        }
    }

    /// This format if the device has it, f32 if not.
    pub fn on<B: Backend>(self, device: &B::Device) -> Self {
        if self.check::<B>(device).is_ok() { self } else { Self::F32 }
    }

    /// Bytes that a weight of a linear layer takes, at most.
    pub fn bytes_per_weight(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 | Self::F16 => 2.0,
            Self::Q8 => 1.0625,
            Self::Q4 => 0.625,
        }
    }
}

impl WeightFormat {
    /// The precision of products that suits such weights on a device: rounding activations as well adds little to the
    /// rounding of the weights, and makes reading a prompt several times as fast. bfloat16 where the device has it, for its
    /// range, then half precision.
    pub fn precision<B: Backend>(self, device: &B::Device) -> Precision {
        self.shortest::<B>([Precision::Bf16, Precision::F16], device)
    }

    /// What a cache of keys and values keeps, to suit such weights on a device: half precision where the device has it, which
    /// rounds to an eighth of what bfloat16 does and takes half the memory of f32.
    pub fn cache<B: Backend>(self, device: &B::Device) -> Precision {
        self.shortest::<B>([Precision::F16], device)
    }

    /// The first that the device has, but f32 for weights in f32.
    fn shortest<B: Backend>(self, short: impl IntoIterator<Item = Precision>, device: &B::Device) -> Precision {
        let has = |short: &Precision| short.check::<B>("precision", device).is_ok();
        if self == Self::F32 { Precision::F32 } else { short.into_iter().find(has).unwrap_or_default() }
    }
}

/// A matrix of the model, in whichever form.
struct Slot<'a, B: LlamaBackend> {
    path: String,
    weight: &'a mut Param<Tensor<B, 2>>,
    quantized: &'a mut Option<Quantized<B>>,
}

impl<B: LlamaBackend> Llama<B> {
    /// The model with its matrices in another format, for inference. The rounding stays.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a format that the device does not have, and for blocks where a matrix has rows that are not a
    /// multiple of 32 long.
    pub fn with_weights(mut self, format: WeightFormat) -> Result<Self, ModelError> {
        format.check::<B>(&self.device())?;
        for Slot { weight, quantized, .. } in self.slots() {
            if let Some(matrix) = quantized.take() {
                *weight = Param::initialized(weight.id, matrix.dense());
            }
        }
        match format.dtype() {
            Some(dtype) => Ok(map_params(self, &mut Cast(dtype))),
            None => {
                let round =
                    |_: &str, weight: &Param<Tensor<B, 2>>, bits| Ok(BlockData::round(&weight.val().into_data(), bits));
                self.quantize(|path, _| format.of_matrix(path), round)?;
                Ok(self)
            }
        }
    }

    /// Replaces each matrix whose format is one of blocks by the one that `read` gives for its path.
    pub(crate) fn quantize(
        &mut self,
        format_of: impl Fn(&str, [usize; 2]) -> WeightFormat,
        mut read: impl FnMut(&str, &Param<Tensor<B, 2>>, Bits) -> Result<BlockData, ModelError>,
    ) -> Result<(), ModelError> {
        for Slot { path, weight, quantized } in self.slots() {
            let dims @ [_, d_in] = weight.dims();
            let format = format_of(&path, dims);
            if !format.fits(dims) {
                return Err(ModelError::Config {
                    field: "d_model, d_ff",
                    reason: format!("must be multiples of {QUANT_BLOCK} for {format} weights, not {d_in}"),
                });
            }
            if format.dtype().is_some() {
                continue;
            }
            let bits = if format == WeightFormat::Q4 { Bits::Four } else { Bits::Eight };
            let matrix = Quantized::from_blocks(read(&path, weight, bits)?, &weight.device());
            *weight = matrix.placeholder(weight);
            *quantized = Some(matrix);
        }
        Ok(())
    }

    /// Every matrix of the model.
    fn slots(&mut self) -> Vec<Slot<'_, B>> {
        let embedding = &mut self.tok_embeddings;
        let mut slots =
            vec![Slot { path: EMBEDDINGS.into(), weight: &mut embedding.weight, quantized: &mut embedding.quantized }];
        for (layer, block) in self.layers.iter_mut().enumerate() {
            slots.extend(block.linears_mut().map(|(name, linear)| Slot {
                path: format!("layers.{layer}.{name}.weight"),
                weight: &mut linear.weight,
                quantized: &mut linear.quantized,
            }));
        }
        slots.extend(self.output.as_mut().map(|output| Slot {
            path: HEAD.into(),
            weight: &mut output.weight,
            quantized: &mut output.quantized,
        }));
        slots
    }
}

/// Matrices to a dtype.
struct Cast(DType);

impl<B: Backend> ParamMap<B> for Cast {
    fn map<const D: usize>(&mut self, _: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        if D > 1 { value.set_require_grad(false).cast(self.0) } else { value }
    }
}
