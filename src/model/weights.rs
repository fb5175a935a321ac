//! The tensors of one model on one device, in the order of their names.
//!
//! Invariants: a `Weights` holds exactly the tensors of the specification it was made from, with its shapes and types.
//! Trainable weights are variables that an optimiser moves in place; frozen ones are plain tensors with storage of
//! their own, so that a teacher costs no graph and does not change when the student does.
//! Which names there are is the encoders' and heads' matter; where the bytes lie is the caller's.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var, WithDType};
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};

use super::ModelError;
use super::init::{ParameterKind, ParameterSpec};

/// Prefixes of classifier heads in timm's and torchvision's files. An embedding model has none: they are left out.
const CLASSIFIER_HEADS: [&str; 2] = ["head.", "fc."];

/// Whether loaded weights can be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trainability {
    Trainable,
    Frozen,
}

#[derive(Clone, Debug)]
enum Slot {
    Trainable(Var),
    /// Running statistics of trainable weights: the forward pass in training mode sets them.
    Buffer(Var),
    Frozen(Tensor),
}

impl Slot {
    fn new(kind: ParameterKind, trainability: Trainability, tensor: &Tensor) -> Result<Self, ModelError> {
        Ok(match (trainability, kind) {
            (Trainability::Frozen, _) => Slot::Frozen(tensor.copy()?.detach()),
            (Trainability::Trainable, ParameterKind::Trainable) => Slot::Trainable(Var::from_tensor(tensor)?),
            (Trainability::Trainable, ParameterKind::Buffer | ParameterKind::Counter) => {
                Slot::Buffer(Var::from_tensor(tensor)?)
            }
        })
    }

    fn tensor(&self) -> &Tensor {
        match self {
            Slot::Trainable(var) | Slot::Buffer(var) => var.as_tensor(),
            Slot::Frozen(tensor) => tensor,
        }
    }
}

/// A running statistic: can be set where the weights are trainable.
#[derive(Clone, Debug)]
pub(super) struct Buffer {
    name: String,
    slot: Slot,
}

impl Buffer {
    /// Its present value. Gradients end here.
    pub(super) fn tensor(&self) -> Tensor {
        self.slot.tensor().detach()
    }

    /// Its value for ever, where the weights are frozen.
    pub(super) fn frozen(&self) -> Option<&Tensor> {
        match &self.slot {
            Slot::Frozen(tensor) => Some(tensor),
            Slot::Trainable(_) | Slot::Buffer(_) => None,
        }
    }

    /// Replaces its content in place.
    ///
    /// # Errors
    /// `FrozenStatistics` where the weights are frozen.
    pub(super) fn set(&self, value: &Tensor) -> Result<(), ModelError> {
        match &self.slot {
            Slot::Buffer(var) => Ok(var.set(value)?),
            Slot::Trainable(_) | Slot::Frozen(_) => {
                Err(ModelError::FrozenStatistics { name: self.name.clone() })
            }
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Weights {
    slots: BTreeMap<String, Slot>,
}

impl Weights {
    /// Trainable weights with their initial values. The same seed gives the same bytes; each parameter has a stream of
    /// its own, so two models that share a name and shape under one seed begin with the same values there.
    pub fn initialise(specs: &[ParameterSpec], seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut slots = BTreeMap::new();
        for spec in specs {
            let values = spec.init.values(seed, &spec.name, spec.element_count());
            let tensor =
                Tensor::from_vec(values, spec.shape.as_slice(), &Device::Cpu)?.to_dtype(spec.kind.dtype())?;
            let slot = Slot::new(spec.kind, Trainability::Trainable, &tensor.to_device(device)?)?;
            slots.insert(spec.name.clone(), slot);
        }
        Ok(Weights { slots })
    }

    /// Reads a safetensors file's bytes. f16 and bf16 become f32; a classifier head (`head.*`, `fc.*`) is left out.
    ///
    /// # Errors
    /// Names the tensor that is missing, unknown, or of another shape or type than `specs` says.
    pub fn load(
        bytes: &[u8],
        specs: &[ParameterSpec],
        device: &Device,
        trainability: Trainability,
    ) -> Result<Self, ModelError> {
        let file = SafeTensors::deserialize(bytes)?;
        let mut slots = BTreeMap::new();
        for spec in specs {
            let view =
                file.tensor(&spec.name).map_err(|_| ModelError::MissingTensor { name: spec.name.clone() })?;
            let tensor = read_tensor(spec, &view)?.to_device(device)?;
            slots.insert(spec.name.clone(), Slot::new(spec.kind, trainability, &tensor)?);
        }
        let unknown = |name: &&&str| {
            !slots.contains_key(**name) && !CLASSIFIER_HEADS.iter().any(|h| name.starts_with(h))
        };
        let names = file.names();
        if let Some(name) = names.iter().filter(unknown).min() {
            return Err(ModelError::UnknownTensor { name: (*name).to_owned() });
        }
        Ok(Weights { slots })
    }

    /// The bytes of a safetensors file that timm and torchvision load with `strict=True`. Equal weights give equal
    /// bytes. Sync point: copies every tensor to the host.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, ModelError> {
        self.written(|_, tensor| Ok(tensor.clone()))
    }

    /// The same of weights and running statistics that lie `share` of the way from these to `other`'s, 0..1; counters stay these
    /// weights' own. Sync point.
    ///
    /// # Errors
    /// `Missing` for a tensor that `other` doesn't have, a tensor error for one of another shape.
    pub fn to_safetensors_towards(&self, other: &Weights, share: f64) -> Result<Vec<u8>, ModelError> {
        self.written(|name, tensor| match tensor.dtype().is_float() {
            true => Ok((tensor + ((other.get(name)? - tensor)? * share)?)?),
            false => Ok(tensor.clone()),
        })
    }

    fn written(
        &self,
        value: impl Fn(&str, &Tensor) -> Result<Tensor, ModelError>,
    ) -> Result<Vec<u8>, ModelError> {
        let mut tensors = Vec::with_capacity(self.slots.len());
        for (name, slot) in &self.slots {
            tensors.push((name.as_str(), HostTensor::copy_of(&value(name, slot.tensor())?)?));
        }
        // Readers of the transformers family refuse a file that doesn't say which library's layout it has.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        Ok(safetensors::serialize(tensors, Some(metadata))?)
    }

    /// What an optimiser moves, in the order of names; empty where the weights are frozen.
    pub fn trainable(&self) -> Vec<(String, Var)> {
        let trainable = |(name, slot): (&String, &Slot)| match slot {
            Slot::Trainable(var) => Some((name.clone(), var.clone())),
            Slot::Buffer(_) | Slot::Frozen(_) => None,
        };
        self.slots.iter().filter_map(trainable).collect()
    }

    /// The tensor of that name: the variable itself where it is trainable, so that later updates are seen.
    pub fn get(&self, name: &str) -> Result<Tensor, ModelError> {
        Ok(self.slot(name)?.tensor().clone())
    }

    /// Every tensor, in the order of names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots.iter().map(|(name, slot)| (name.as_str(), slot.tensor()))
    }

    pub(super) fn buffer(&self, name: &str) -> Result<Buffer, ModelError> {
        Ok(Buffer { name: name.to_owned(), slot: self.slot(name)?.clone() })
    }

    /// `get`, with the shape that the network needs.
    pub(super) fn get_shaped(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let tensor = self.get(name)?;
        if tensor.dims() != shape {
            return Err(ModelError::Shape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: tensor.dims().to_vec(),
            });
        }
        Ok(tensor)
    }

    fn slot(&self, name: &str) -> Result<&Slot, ModelError> {
        self.slots.get(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
    }

    /// The same weights in f64, for gradient checks.
    #[cfg(test)]
    pub(super) fn to_f64(&self) -> Self {
        let widen = |slot: &Slot| match slot {
            Slot::Trainable(var) => {
                Slot::Trainable(Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap())
            }
            Slot::Buffer(var) if var.dtype() == DType::F32 => {
                Slot::Buffer(Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap())
            }
            Slot::Buffer(_) => slot.clone(),
            Slot::Frozen(tensor) => Slot::Frozen(tensor.to_dtype(DType::F64).unwrap()),
        };
        Weights { slots: self.slots.iter().map(|(name, slot)| (name.clone(), widen(slot))).collect() }
    }
}

fn read_tensor(spec: &ParameterSpec, view: &TensorView<'_>) -> Result<Tensor, ModelError> {
    if view.shape() != spec.shape {
        return Err(ModelError::Shape {
            name: spec.name.clone(),
            expected: spec.shape.clone(),
            found: view.shape().to_vec(),
        });
    }
    let stored = match (view.dtype(), spec.kind.dtype()) {
        (Dtype::I64, DType::I64) => DType::I64,
        (Dtype::F32, DType::F32) => DType::F32,
        (Dtype::F16, DType::F32) => DType::F16,
        (Dtype::BF16, DType::F32) => DType::BF16,
        (found, expected) => {
            let name = spec.name.clone();
            return Err(ModelError::Type { name, expected: expected.as_str(), found: format!("{found:?}") });
        }
    };
    let tensor = Tensor::from_raw_buffer(view.data(), stored, &spec.shape, &Device::Cpu)?;
    Ok(tensor.to_dtype(spec.kind.dtype())?)
}

/// A tensor's bytes on the host, little-endian, as safetensors writes them.
struct HostTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl HostTensor {
    fn copy_of(tensor: &Tensor) -> Result<Self, ModelError> {
        let flat = tensor.flatten_all()?;
        let (dtype, data) = match tensor.dtype() {
            DType::I64 => (Dtype::I64, little_endian(flat.to_vec1::<i64>()?, i64::to_le_bytes)),
            DType::F32 => (Dtype::F32, little_endian(flat.to_vec1::<f32>()?, f32::to_le_bytes)),
            other => {
                return Err(candle_core::Error::UnsupportedDTypeForOp(other, "to-safetensors").bt().into());
            }
        };
        Ok(HostTensor { dtype, shape: tensor.dims().to_vec(), data })
    }
}

fn little_endian<T: WithDType, const N: usize>(values: Vec<T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.into_iter().flat_map(bytes).collect()
}

impl View for HostTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::init::Init;

    fn specs() -> Vec<ParameterSpec> {
        let mut specs = vec![ParameterSpec::trainable("conv.weight", &[2, 3], Init::kaiming_fan_out(2))];
        specs.extend(ParameterSpec::batch_norm("bn", 2));
        specs
    }

    fn initialised(seed: u64) -> Weights {
        Weights::initialise(&specs(), seed, &Device::Cpu).unwrap()
    }

    fn load(bytes: &[u8], specs: &[ParameterSpec]) -> Result<Weights, ModelError> {
        Weights::load(bytes, specs, &Device::Cpu, Trainability::Trainable)
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        let bytes = initialised(7).to_safetensors().unwrap();
        assert_eq!(bytes, initialised(7).to_safetensors().unwrap());
        assert_ne!(bytes, initialised(8).to_safetensors().unwrap());
    }

    #[test]
    fn what_is_written_is_read_back_bit_for_bit() {
        let bytes = initialised(7).to_safetensors().unwrap();
        let read = load(&bytes, &specs()).unwrap();
        assert_eq!(read.to_safetensors().unwrap(), bytes);
        assert_eq!(read.get("bn.num_batches_tracked").unwrap().dtype(), DType::I64);
        let names: Vec<String> = read.trainable().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["bn.bias", "bn.weight", "conv.weight"]);
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let mut more = specs();
        more.push(ParameterSpec::trainable("norm.bias", &[2], Init::Constant(0.0)));
        let error = load(&initialised(7).to_safetensors().unwrap(), &more).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"norm.bias\" is missing");
    }

    #[test]
    fn a_tensor_of_another_shape_is_named_with_both_shapes() {
        let mut other = specs();
        other[0].shape = vec![3, 2];
        let error = load(&initialised(7).to_safetensors().unwrap(), &other).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"conv.weight\" has shape [2, 3], expected [3, 2]");
    }

    #[test]
    fn an_unknown_tensor_is_refused_but_a_classifier_head_is_left_out() {
        let bytes = |name: &str| {
            let mut more = specs();
            more.push(ParameterSpec::trainable(name, &[2], Init::Constant(0.0)));
            Weights::initialise(&more, 7, &Device::Cpu).unwrap().to_safetensors().unwrap()
        };
        let error = load(&bytes("extra.bias"), &specs()).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"extra.bias\" is not part of the model");
        let read = load(&bytes("fc.bias"), &specs()).unwrap();
        assert!(read.get("fc.bias").is_err());
    }

    #[test]
    fn a_counter_stored_as_float_is_refused() {
        let mut floats = specs();
        floats[5].kind = ParameterKind::Buffer;
        let bytes = Weights::initialise(&floats, 7, &Device::Cpu).unwrap().to_safetensors().unwrap();
        let error = load(&bytes, &specs()).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"bn.num_batches_tracked\" is of type F32, expected i64");
    }

    #[test]
    fn bytes_that_are_no_safetensors_file_are_an_error() {
        assert!(matches!(load(b"not a file", &specs()), Err(ModelError::NotSafetensors(_))));
    }
}
