//! Tests across crates, one binary. The device is chosen by `LLAMA_TEST_DEVICE` (default `flex`):
//!
//! ```sh
//! LLAMA_TEST_DEVICE=vulkan cargo test --profile quick --features vulkan --test main parity ops
//! ```
//!
//! Tests with files that are not this project's to ship look for them in the folder of `LLAMA_TEST_DATA` and are skipped,
//! with a word, where there is none.
#![recursion_limit = "256"]

mod behaviour;
mod block;
mod cached_block;
mod continued;
mod data;
mod engine;
mod eval;
mod formats;
mod generation;
mod hook;
mod inputs;
mod lora;
mod ops;
mod parallel;
mod parity;
mod programs;
mod stored_weights;
mod support;
mod tensor_parallel;
mod tokenizers;
