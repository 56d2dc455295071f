//! Choosing a backend by name at run time.
//!
//! Code is written once, generic over the backend, as a [`BackendTask`]; [`Device::run`] runs it on the chosen one.

use std::fmt;
use std::str::FromStr;

use crate::{ModelError, TrainBackend};

/// A backend compiled into this build, and which of its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The CPU.
    #[cfg(feature = "flex")]
    Flex,
    /// A GPU through WebGPU shaders; `None` lets the system choose the adapter.
    ///
    /// On Linux this drives Vulkan too, and a build with the feature `vulkan` compiles its kernels to SPIR-V.
    #[cfg(feature = "wgpu")]
    Wgpu(Option<usize>),
    /// A GPU through Vulkan and SPIR-V.
    #[cfg(feature = "vulkan")]
    Vulkan(Option<usize>),
    /// A GPU through Metal.
    #[cfg(feature = "metal")]
    Metal(Option<usize>),
    /// A CUDA GPU.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// Work to be done on a backend that is chosen at run time.
pub trait BackendTask {
    /// What the work gives.
    type Output;

    /// Does the work.
    fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output;
}

impl Device {
    /// The names this build accepts, the default first.
    pub fn choices() -> Vec<String> {
        [
            (cfg!(feature = "flex"), "flex"),
            (cfg!(feature = "cuda"), "cuda[:n]"),
            (cfg!(feature = "vulkan"), "vulkan[:n]"),
            (cfg!(feature = "metal"), "metal[:n]"),
            (cfg!(feature = "wgpu"), "wgpu[:n]"),
        ]
        .into_iter()
        .filter(|(compiled, _)| *compiled)
        .map(|(_, name)| name.to_string())
        .collect()
    }

    /// Runs `task` on this device.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not answer: no driver, no adapter, no such index.
    #[allow(unused_variables, reason = "a build without any backend has nothing to run on")]
    pub fn run<T: BackendTask>(self, task: T) -> Result<T::Output, ModelError> {
        #[cfg(any(feature = "flex", feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda"))]
        use burn::backend::Autodiff;
        match self {
            #[cfg(feature = "flex")]
            Device::Flex => self.run_on::<Autodiff<burn::backend::Flex>, T>(Default::default(), task),
            #[cfg(feature = "wgpu")]
            Device::Wgpu(index) => self.run_on::<Autodiff<burn::backend::Wgpu>, T>(wgpu_device(index), task),
            #[cfg(feature = "vulkan")]
            Device::Vulkan(index) => self.run_on::<Autodiff<burn::backend::Wgpu>, T>(wgpu_device(index), task),
            #[cfg(feature = "metal")]
            Device::Metal(index) => self.run_on::<Autodiff<burn::backend::Wgpu>, T>(wgpu_device(index), task),
            #[cfg(feature = "cuda")]
            Device::Cuda(index) => {
                self.run_on::<Autodiff<burn::backend::Cuda>, T>(burn::backend::cuda::CudaDevice::new(index), task)
            }
        }
    }

    #[allow(dead_code, reason = "a build without any backend has no use for it")]
    fn run_on<B: TrainBackend, T: BackendTask>(self, device: B::Device, task: T) -> Result<T::Output, ModelError> {
        self.probe::<B>(&device)?;
        Ok(task.run::<B>(device))
    }

    /// A missing driver shows as a panic inside the GPU libraries; here it becomes an error.
    fn probe<B: TrainBackend>(self, device: &B::Device) -> Result<(), ModelError> {
        let device = device.clone();
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            burn::tensor::Tensor::<B, 1>::ones([4], &device).sum().into_data();
        }));
        answer.map_err(|panic| {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            ModelError::Device {
                name: self.to_string(),
                reason: format!("did not answer ({})", message.unwrap_or_else(|| "no message".into())),
                choices: Self::choices(),
            }
        })
    }
}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
fn wgpu_device(index: Option<usize>) -> burn::backend::wgpu::WgpuDevice {
    use burn::backend::wgpu::WgpuDevice;
    index.map_or(WgpuDevice::DefaultDevice, WgpuDevice::DiscreteGpu)
}

/// Every kind of device there is, compiled in or not.
const KNOWN: [&str; 5] = ["flex", "cuda", "vulkan", "metal", "wgpu"];

impl FromStr for Device {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let error =
            |reason: &str| ModelError::Device { name: name.into(), reason: reason.into(), choices: Device::choices() };
        let (kind, index) = match name.split_once(':') {
            None => (name, None),
            Some((kind, index)) => {
                let index: usize = index.parse().map_err(|_| error("the part after `:` is not a device number"))?;
                (kind, Some(index))
            }
        };
        match kind {
            #[cfg(feature = "flex")]
            "flex" if index.is_none() => Ok(Device::Flex),
            "flex" if index.is_some() => Err(error("the CPU is one device and takes no number")),
            #[cfg(feature = "wgpu")]
            "wgpu" => Ok(Device::Wgpu(index)),
            #[cfg(feature = "vulkan")]
            "vulkan" => Ok(Device::Vulkan(index)),
            #[cfg(feature = "metal")]
            "metal" => Ok(Device::Metal(index)),
            #[cfg(feature = "cuda")]
            "cuda" => Ok(Device::Cuda(index.unwrap_or(0))),
            known if KNOWN.contains(&known) => {
                Err(error(&format!("not compiled in; rebuild with `--features {kind}`")))
            }
            _ => Err(error("unknown")),
        }
    }
}

impl fmt::Display for Device {
    #[allow(unused_variables, reason = "a build without any backend has no device to show")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[allow(unused, reason = "a build with the CPU alone has no numbered device")]
        fn numbered(f: &mut fmt::Formatter<'_>, name: &str, index: Option<usize>) -> fmt::Result {
            match index {
                Some(index) => write!(f, "{name}:{index}"),
                None => f.write_str(name),
            }
        }
        match *self {
            #[cfg(feature = "flex")]
            Device::Flex => f.write_str("flex"),
            #[cfg(feature = "wgpu")]
            Device::Wgpu(index) => numbered(f, "wgpu", index),
            #[cfg(feature = "vulkan")]
            Device::Vulkan(index) => numbered(f, "vulkan", index),
            #[cfg(feature = "metal")]
            Device::Metal(index) => numbered(f, "metal", index),
            #[cfg(feature = "cuda")]
            Device::Cuda(index) => numbered(f, "cuda", Some(index)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_devices_list_the_choices() {
        for name in ["tpu", "flex:1", "cuda:x", ""] {
            let error = name.parse::<Device>().unwrap_err().to_string();
            for choice in Device::choices() {
                assert!(error.contains(&choice), "{error}");
            }
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_is_not_compiled_in_says_how_to_get_it() {
        let error = "cuda:1".parse::<Device>().unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }

    #[cfg(feature = "flex")]
    #[test]
    fn names_round_trip() {
        assert_eq!("flex".parse::<Device>().unwrap().to_string(), "flex");
    }
}
