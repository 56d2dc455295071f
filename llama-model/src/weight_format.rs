//! Weights in fewer bytes, for generation: decoding is limited by the memory they are read from.

use burn::module::{Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::backend::QUANT_BLOCK;
use crate::compute::names;
use crate::weights::{ParamMap, map_params};
use crate::{Block, Linear, Llama, LlamaBackend, ModelError};

/// How matrices are stored. Norm gains, activations and the key/value cache are f32 in every case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes.
    Bf16,
    /// 8 bits and an f32 scale for every 32 of them: 1.125 bytes. Token embeddings stay as they are.
    Q8,
}

names!(WeightFormat, "weights", F32 = "f32", Bf16 = "bf16", Q8 = "q8");

impl<B: LlamaBackend> Llama<B> {
    /// The model with its matrices in another format, for inference. Not reversible: the rounding stays.
    ///
    /// A tied model gets a head of its own in 8 bits.
    ///
    /// # Errors
    /// [`ModelError::Config`] for [`WeightFormat::Q8`] where a matrix has rows that are not a multiple of 32 long.
    pub fn with_weights(mut self, format: WeightFormat) -> Result<Self, ModelError> {
        match format {
            WeightFormat::F32 => Ok(map_params(self, &mut Cast(DType::F32))),
            WeightFormat::Bf16 => Ok(map_params(self, &mut Cast(DType::BF16))),
            WeightFormat::Q8 => {
                let head = self.head_weight();
                let output = self.output.take();
                self.output = Some(output.unwrap_or_else(|| Linear {
                    weight: Param::initialized(ParamId::new(), head.clone()),
                    quantized: None,
                }));
                for linear in self.linears_mut() {
                    let [_, d_in] = linear.weight.dims();
                    if !d_in.is_multiple_of(QUANT_BLOCK) {
                        return Err(ModelError::Config {
                            field: "d_model, d_ff",
                            reason: format!("must be multiples of {QUANT_BLOCK} for 8-bit weights, not {d_in}"),
                        });
                    }
                    *linear = linear.quantize();
                }
                Ok(self)
            }
        }
    }

    /// Every linear layer, the head last.
    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let blocks = self.layers.iter_mut().flat_map(|Block { attention, feed_forward, .. }| {
            let [wq, wk] = [&mut attention.wq, &mut attention.wk];
            let [wv, wo] = [&mut attention.wv, &mut attention.wo];
            [wq, wk, wv, wo, &mut feed_forward.w1, &mut feed_forward.w2, &mut feed_forward.w3]
        });
        blocks.chain(&mut self.output)
    }
}

/// Matrices to a dtype.
struct Cast(DType);

impl<B: Backend> ParamMap<B> for Cast {
    fn map<const D: usize>(&mut self, _: &str, value: Tensor<B, D>) -> Tensor<B, D> {
        if D > 1 { value.cast(self.0) } else { value }
    }
}
