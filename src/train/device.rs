//! The device that a job's tensors live on, by the words of the configuration.
//!
//! `auto` takes the first CUDA device, and the CPU only where there is none or the program was built without
//! CUDA; it says which and why. A device that exists and does not work is an error, never a reason to train on
//! the CPU for a week.

use candle_core::Device;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("train.device {0:?} is none of auto, cpu, cuda:0, cuda:1, ...")]
    Unknown(String),
    #[error("train.device {0:?} needs a program built with the feature cuda")]
    NotBuilt(String),
    #[error("cuda device {ordinal} of {count} does not exist")]
    Missing { ordinal: usize, count: usize },
    #[error("cuda device {ordinal} does not work: {reason}")]
    Broken { ordinal: usize, reason: String },
}

/// A device with what a person is told of it.
#[derive(Debug, Clone)]
pub struct Selected {
    pub device: Device,
    pub description: String,
}

impl Selected {
    fn cpu(description: &str) -> Self {
        Self { device: Device::Cpu, description: description.to_owned() }
    }
}

/// `auto`, `cpu` or `cuda:N`.
pub fn select(name: &str) -> Result<Selected, DeviceError> {
    match name {
        "cpu" => Ok(Selected::cpu("cpu")),
        "auto" if !cfg!(feature = "cuda") => Ok(Selected::cpu("cpu (built without cuda)")),
        "auto" if cuda::count()? == 0 => Ok(Selected::cpu("cpu (no cuda device found)")),
        "auto" => cuda_device(0),
        _ => {
            let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
            let ordinal = ordinal.ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
            if !cfg!(feature = "cuda") {
                return Err(DeviceError::NotBuilt(name.to_owned()));
            }
            cuda_device(ordinal)
        }
    }
}

fn cuda_device(ordinal: usize) -> Result<Selected, DeviceError> {
    let count = cuda::count()?;
    if ordinal >= count {
        return Err(DeviceError::Missing { ordinal, count });
    }
    let broken = |e: candle_core::Error| DeviceError::Broken { ordinal, reason: e.to_string() };
    let device = Device::new_cuda(ordinal).map_err(broken)?;
    Ok(Selected { device, description: format!("cuda:{ordinal} ({})", cuda::name(ordinal)?) })
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};

    use super::DeviceError;

    /// CUDA devices of this machine; none where there is no driver for one.
    pub(super) fn count() -> Result<usize, DeviceError> {
        match CudaContext::device_count() {
            Ok(count) => Ok(count.max(0) as usize),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(error) => Err(broken(0, error)),
        }
    }

    pub(super) fn name(ordinal: usize) -> Result<String, DeviceError> {
        let context = CudaContext::new(ordinal).map_err(|error| broken(ordinal, error))?;
        context.name().map_err(|error| broken(ordinal, error))
    }

    fn broken(ordinal: usize, error: DriverError) -> DeviceError {
        DeviceError::Broken { ordinal, reason: error.to_string() }
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::DeviceError;

    pub(super) fn count() -> Result<usize, DeviceError> {
        Ok(0)
    }

    pub(super) fn name(ordinal: usize) -> Result<String, DeviceError> {
        Err(DeviceError::NotBuilt(format!("cuda:{ordinal}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        let selected = select("cpu").unwrap();
        assert!(selected.device.is_cpu());
        assert_eq!(selected.description, "cpu");
    }

    #[test]
    fn words_that_name_no_device_are_refused() {
        for name in ["gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            assert!(matches!(select(name), Err(DeviceError::Unknown(_))), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_auto_is_the_cpu_and_says_why_and_cuda_is_refused() {
        assert_eq!(select("auto").unwrap().description, "cpu (built without cuda)");
        assert!(matches!(select("cuda:0"), Err(DeviceError::NotBuilt(_))));
    }
}
