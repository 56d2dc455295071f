//! How a model computes: what is neither architecture nor training recipe, and changes results in the last digits at most
//! ([`Recompute`]) or within a known rounding ([`Precision`]). Not saved with a model.

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// The names of a choice, for command lines.
macro_rules! names {
    ($type:ident, $what:literal, $($variant:ident = $name:literal),*) => {
        impl $type {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $name),* })
            }
        }

        impl std::str::FromStr for $type {
            type Err = crate::ModelError;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                match name {
                    $($name => Ok(Self::$variant),)*
                    _ => Err(crate::ModelError::Config {
                        field: $what,
                        reason: format!("cannot be `{name}`: choose one of {}", [$($name),*].join(", ")),
                    }),
                }
            }
        }
    };
}
pub(crate) use names;

/// Precision of the matrix products with weights, or of what a cache keeps. Weights, the residual stream, statistics, losses, gradients
/// of weights and optimizer state are f32 in every case; what lies between a block's products is kept in their precision where the
/// backend [`has_products`](crate::LlamaBackend::has_products) of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Operands as they are.
    #[default]
    F32,
    /// Operands rounded to bfloat16 (8 bits of mantissa), sums in f32: about twice the speed where the hardware has such
    /// products, never slower on the CPU.
    Bf16,
    /// Operands rounded to half precision (11 bits of mantissa, values up to 65,504), for devices without bfloat16. Training scales
    /// the loss so that gradients fit its range. On a CPU it takes longer than f32.
    F16,
}

names!(Precision, "precision", F32 = "f32", Bf16 = "bf16", F16 = "f16");

impl Precision {
    /// The type that operands are rounded to.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// Whether a device has the type at all, for the setting `field`.
    ///
    /// # Errors
    /// If not, with what to choose.
    pub fn check<B: Backend>(self, field: &'static str, device: &B::Device) -> Result<(), ModelError> {
        match B::dtype_usage(device, self.dtype()).is_empty() {
            false => Ok(()),
            true => Err(ModelError::Config {
                field,
                reason: format!("cannot be `{self}` on {device:?}, which has no such numbers: choose another or f32"),
            }),
        }
    }
}

/// What the forward of a block keeps for its backward (paper, section 2.4). Gradients are the same bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Everything: the fastest backward.
    None,
    /// What is expensive, the outputs of linear layers and of attention. Norms, the SwiGLU product and the attention
    /// probabilities are computed again: the paper's choice, for about a fiftieth of the time.
    #[default]
    Selective,
    /// The block's input alone. The backward runs the forward again, a third more arithmetic.
    Full,
}

names!(Recompute, "recompute", None = "none", Selective = "selective", Full = "full");

/// The settings of a model: [`Llama::with_compute`](crate::Llama::with_compute).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compute {
    /// Precision of products with weights.
    pub precision: Precision,
    /// What is kept for the backward.
    pub recompute: Recompute,
}
