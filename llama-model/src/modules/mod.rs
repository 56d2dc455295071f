//! The architecture, one module a file, each in the same order: maths, initialisation, struct, `forward`, tests.

mod adapter;
mod attention;
mod block;
mod cache;
mod embedding;
mod feed_forward;
mod follow;
mod linear;
mod llama;
mod quantized;
mod rms_norm;
mod rotary;

pub use adapter::Adapter;
pub use attention::Attention;
pub use block::Block;
pub use cache::{KvCache, LayerCache};
pub use embedding::Embedding;
pub use feed_forward::FeedForward;
pub use linear::Linear;
pub use llama::Llama;
pub use quantized::Quantized;
pub use rms_norm::RmsNorm;
pub use rotary::RotaryEmbedding;
pub(crate) use rotary::rotary_frequencies;
