//! What the tests share: the device, fixtures, comparisons.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use llama::model::Device;
use safetensors::SafeTensors;

/// The device under test.
pub fn device() -> Device {
    let name = std::env::var("LLAMA_TEST_DEVICE").unwrap_or_else(|_| "flex".into());
    name.parse().unwrap_or_else(|error| panic!("LLAMA_TEST_DEVICE: {error}"))
}

/// The tolerance of a comparison: `cpu` in f32 on the CPU, 1e-3 of the expected values' scale elsewhere, where products
/// may run in lower precision.
pub fn tolerance(cpu: f64, scale: f64) -> f64 {
    if device().to_string() == "flex" { cpu } else { cpu.max(1e-3 * scale) }
}

/// A test that runs on the device under test, generic over its backend.
macro_rules! device_test {
    ($(#[$meta:meta])* fn $name:ident<$backend:ident>($device:ident) $body:block) => {
        $(#[$meta])*
        #[test]
        fn $name() {
            struct Task;
            impl llama::model::BackendTask for Task {
                type Output = ();
                fn run<$backend: llama::model::TrainBackend>(self, $device: $backend::Device) $body
            }
            crate::support::device().run(Task).unwrap();
        }
    };
}
pub(crate) use device_test;

/// Deterministic numbers in -1..1.
pub fn noise(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

pub fn fixture(path: &str) -> PathBuf {
    // A program that was carried to another machine finds them elsewhere.
    let folder = std::env::var_os("LLAMA_TEST_FIXTURES").map(PathBuf::from);
    folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")).join(path)
}

/// Floats of a tensor.
pub fn floats<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().unwrap()
}

/// Floats of a tensor in a fixture.
pub fn stored(path: &str, name: &str) -> Vec<f64> {
    let bytes = std::fs::read(fixture(path)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor(name).unwrap_or_else(|error| panic!("{path}: {name}: {error}"));
    assert_eq!(view.dtype(), safetensors::Dtype::F32, "{path}: {name}");
    f32s(view.data())
}

/// Floats in a file.
pub fn f32s(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
}

/// Integers of a tensor in a fixture, with its shape.
pub fn stored_ints(path: &str, name: &str) -> (Vec<i64>, Vec<usize>) {
    let bytes = std::fs::read(fixture(path)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor(name).unwrap();
    let values = match view.dtype() {
        safetensors::Dtype::I64 => {
            view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::I32 => {
            view.data().chunks_exact(4).map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        other => panic!("{path}: {name} is {other:?}"),
    };
    (values, view.shape().to_vec())
}

pub fn json(path: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(path)).unwrap()).unwrap()
}

pub fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

pub fn ints<B: Backend>(values: &[i64], dims: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    let values: Vec<i32> = values.iter().map(|&x| x as i32).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}

/// Asserts that all elements are within `tolerance` of those expected.
#[track_caller]
pub fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths differ");
    let worst = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "{what}: off by {worst:e}, tolerance {tolerance:e}");
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
}

/// Largest absolute value.
pub fn scale(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max: f64, x| max.max(x.abs()))
}

/// A file that this project does not ship, in the folder of `LLAMA_TEST_DATA`. None, with a word, if it is not there.
pub fn data(path: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LLAMA_TEST_DATA").map(PathBuf::from);
    let file = folder.map(|folder| folder.join(path)).filter(|file| file.exists());
    if file.is_none() {
        eprintln!("skipped: {path} is not in the folder of LLAMA_TEST_DATA");
    }
    file
}
