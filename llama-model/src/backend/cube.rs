//! CubeCL backends (CUDA, Vulkan, Metal, WebGPU), plain and with fusion.
//!
//! They run the default bodies. With fusion these are better than unfused kernels would be: Burn joins the
//! elementwise parts of a composition into few kernels, which a custom operation would interrupt.

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::{Fusion, FusionBackend};

use super::LlamaBackend;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> LlamaBackend for CubeBackend<R, F, I, BT> {}

impl<B: FusionBackend + LlamaBackend> LlamaBackend for Fusion<B> {}
