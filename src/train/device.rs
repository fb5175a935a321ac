//! The device that a job's tensors live on and the arithmetic of its products, by the words of the configuration.
//!
//! `auto` takes the first CUDA device, and the CPU only where there is none or the program was built without
//! CUDA; it says which and why. A device that exists and does not work is an error, never a reason to train on
//! the CPU for a week.

use candle_core::Device;

use crate::model::{Precision, bf16_is_faster};

use super::spec::PrecisionChoice;

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

/// What a run computes on and in, with what a person is told of it.
#[derive(Debug, Clone)]
pub struct Selected {
    pub device: Device,
    /// Of the products in training.
    pub precision: Precision,
    pub description: String,
}

/// `name` is `auto`, `cpu` or `cuda:N`.
pub fn select(name: &str, precision: PrecisionChoice) -> Result<Selected, DeviceError> {
    let (device, found) = select_device(name)?;
    let precision = match precision {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::Bf16 => Precision::Bf16,
        PrecisionChoice::Auto if device.is_cpu() && bf16_is_faster() => Precision::Bf16,
        PrecisionChoice::Auto => Precision::F32,
    };
    let description = format!("{found}, products in {precision}");
    Ok(Selected { device, precision, description })
}

fn select_device(name: &str) -> Result<(Device, String), DeviceError> {
    match name {
        "cpu" => Ok((Device::Cpu, "cpu".into())),
        "auto" if !cfg!(feature = "cuda") => Ok((Device::Cpu, "cpu (built without cuda)".into())),
        "auto" if cuda::count()? == 0 => Ok((Device::Cpu, "cpu (no cuda device found)".into())),
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

fn cuda_device(ordinal: usize) -> Result<(Device, String), DeviceError> {
    let count = cuda::count()?;
    if ordinal >= count {
        return Err(DeviceError::Missing { ordinal, count });
    }
    let broken = |e: candle_core::Error| DeviceError::Broken { ordinal, reason: e.to_string() };
    let device = cuda::device(ordinal).map_err(broken)?;
    Ok((device, format!("cuda:{ordinal} ({})", cuda::name(ordinal)?)))
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};

    use super::DeviceError;
    pub(super) use crate::model::cuda_device as device;

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
    use candle_core::Device;

    use super::DeviceError;

    pub(super) fn count() -> Result<usize, DeviceError> {
        Ok(0)
    }

    pub(super) fn device(_: usize) -> candle_core::Result<Device> {
        candle_core::bail!("built without cuda")
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
        let selected = select("cpu", PrecisionChoice::F32).unwrap();
        assert!(selected.device.is_cpu());
        assert_eq!(selected.description, "cpu, products in f32");
    }

    #[test]
    fn bf16_is_chosen_by_itself_only_where_the_processor_has_its_instructions() {
        let precision = |choice| select("cpu", choice).unwrap().precision;
        assert_eq!(precision(PrecisionChoice::Auto) == Precision::Bf16, bf16_is_faster());
        assert_eq!(precision(PrecisionChoice::Bf16), Precision::Bf16);
        assert_eq!(precision(PrecisionChoice::F32), Precision::F32);
    }

    #[test]
    fn words_that_name_no_device_are_refused() {
        for name in ["gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            assert!(matches!(select(name, PrecisionChoice::Auto), Err(DeviceError::Unknown(_))), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_auto_is_the_cpu_and_says_why_and_cuda_is_refused() {
        let selected = select("auto", PrecisionChoice::F32).unwrap();
        assert_eq!(selected.description, "cpu (built without cuda), products in f32");
        assert!(matches!(select("cuda:0", PrecisionChoice::F32), Err(DeviceError::NotBuilt(_))));
    }
}
