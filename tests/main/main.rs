//! Tests across crates, one binary. The device is chosen by `LLAMA_TEST_DEVICE` (default `flex`):
//!
//! ```sh
//! LLAMA_TEST_DEVICE=vulkan cargo test --release --features vulkan --test main parity ops
//! ```
#![recursion_limit = "256"]

mod behaviour;
mod block;
mod inputs;
mod ops;
mod parity;
mod programs;
mod support;
