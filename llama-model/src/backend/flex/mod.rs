//! CPU kernels for Burn's Flex backend.
use super::LlamaBackend;
use burn::backend::Flex;
impl LlamaBackend for Flex {}
