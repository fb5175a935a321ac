//! One safetensors file that holds all that a training run cannot compute again.
//!
//! Sections of tensors (`encoder/...`, `projector/...`, `predictor/...`, `optimiser/...`) and a header in the
//! file's metadata: the cursor, what the run was made of, and a SHA-256 over everything, so that a torn or
//! changed file is refused. A run may only go on from a checkpoint of the same [`Identity`]: then it ends bit
//! for bit as it would have without the interruption. Where checkpoints lie is the caller's.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;

use candle_core::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sha2::Digest;

use crate::model::Precision;
use crate::types::Sha256;

use super::device::Selected;
use super::spec::TrainJob;

const SCHEMA: u32 = 1;
/// The metadata's only key: a map of several would be written in another order each time.
const HEADER: &str = "palimpsest-checkpoint";

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the checkpoint is damaged: {0}")]
    Damaged(String),
    #[error("the checkpoint's {what} is {found}, this run's is {expected}: it belongs to another run")]
    Other { what: &'static str, expected: String, found: String },
    #[error("the checkpoint could not be written: {0}")]
    Write(String),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// What the weights are a function of, besides the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub recipe: Sha256,
    pub program_version: String,
    pub threads: usize,
    /// `cpu` or `cuda`.
    pub device: String,
    /// Of the products.
    pub precision: Precision,
    /// Sums over a batch are taken in another order with another one.
    #[serde(default)]
    pub micro_batch: Option<NonZeroUsize>,
}

impl Identity {
    pub fn new(job: &TrainJob, selected: &Selected) -> Result<Self, CheckpointError> {
        let json = serde_json::to_vec(&job.recipe).map_err(|e| CheckpointError::Write(e.to_string()))?;
        Ok(Self {
            recipe: Sha256::of(&json),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            threads: job.threads,
            device: if selected.device.is_cpu() { "cpu" } else { "cuda" }.to_owned(),
            precision: selected.precision,
            micro_batch: job.micro_batch,
        })
    }

    fn check(&self, found: &Self) -> Result<(), CheckpointError> {
        let shown =
            |frames: Option<NonZeroUsize>| frames.map_or("the batch".to_owned(), |frames| frames.to_string());
        let pairs = [
            ("recipe", self.recipe.0.clone(), found.recipe.0.clone()),
            ("program version", self.program_version.clone(), found.program_version.clone()),
            ("thread count", self.threads.to_string(), found.threads.to_string()),
            ("device", self.device.clone(), found.device.clone()),
            ("precision", self.precision.to_string(), found.precision.to_string()),
            ("micro-batch", shown(self.micro_batch), shown(found.micro_batch)),
        ];
        match pairs.into_iter().find(|(_, expected, found)| expected != found) {
            Some((what, expected, found)) => Err(CheckpointError::Other { what, expected, found }),
            None => Ok(()),
        }
    }
}

/// The state after `step` updates. Each section is itself a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub step: u64,
    pub sections: BTreeMap<String, Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
    step: u64,
    identity: Identity,
    sha256: Sha256,
}

impl Checkpoint {
    /// Equal states give equal bytes.
    pub fn encode(&self, identity: &Identity) -> Result<Vec<u8>, CheckpointError> {
        let write = |e: &dyn std::fmt::Display| CheckpointError::Write(e.to_string());
        let mut tensors = Vec::new();
        for (section, bytes) in &self.sections {
            let file = SafeTensors::deserialize(bytes).map_err(|e| write(&e))?;
            tensors
                .extend(file.tensors().into_iter().map(|(name, view)| (format!("{section}/{name}"), view)));
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let sha256 = digest(self.step, identity, &tensors);
        let header = Header { schema: SCHEMA, step: self.step, identity: identity.clone(), sha256 };
        let header = serde_json::to_string(&header).map_err(|e| write(&e))?;
        let metadata = HashMap::from([(HEADER.to_owned(), header)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|e| write(&e))
    }

    /// # Errors
    /// `Damaged` where the bytes are not as they were written; `Other` where they are another run's.
    pub fn decode(bytes: &[u8], identity: &Identity) -> Result<Self, CheckpointError> {
        let damaged = |e: &dyn std::fmt::Display| CheckpointError::Damaged(e.to_string());
        let header = read_header(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        if digest(header.step, &header.identity, &tensors) != header.sha256 {
            return Err(damaged(&"its content does not have the SHA-256 in its header"));
        }
        identity.check(&header.identity)?;
        let mut parts: BTreeMap<String, Vec<(String, TensorView)>> = BTreeMap::new();
        for (name, view) in tensors {
            let (section, name) =
                name.split_once('/').ok_or_else(|| damaged(&"a tensor is in no section"))?;
            parts.entry(section.to_owned()).or_default().push((name.to_owned(), view));
        }
        let serialise = |(section, tensors)| {
            let bytes = safetensors::serialize::<String, TensorView, Vec<_>>(tensors, None)
                .map_err(|e| damaged(&e))?;
            Ok((section, bytes))
        };
        let sections = parts.into_iter().map(serialise).collect::<Result<_, CheckpointError>>()?;
        Ok(Self { step: header.step, sections })
    }

    /// The bytes of a section.
    pub fn section(&self, name: &str) -> Result<&[u8], CheckpointError> {
        let missing = || CheckpointError::Damaged(format!("section {name} is missing"));
        self.sections.get(name).map(Vec::as_slice).ok_or_else(missing)
    }
}

fn read_header(bytes: &[u8]) -> Result<Header, CheckpointError> {
    let damaged = |e: &dyn std::fmt::Display| CheckpointError::Damaged(e.to_string());
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
    let header = metadata.metadata().as_ref().and_then(|map| map.get(HEADER));
    let header = header.ok_or_else(|| damaged(&"it has no header"))?;
    let header: Header = serde_json::from_str(header).map_err(|e| damaged(&e))?;
    if header.schema != SCHEMA {
        let (expected, found) = (SCHEMA.to_string(), header.schema.to_string());
        return Err(CheckpointError::Other { what: "schema", expected, found });
    }
    Ok(header)
}

/// Over the cursor, the identity, and each tensor's name, type, shape and bytes.
fn digest(step: u64, identity: &Identity, tensors: &[(String, TensorView<'_>)]) -> Sha256 {
    let mut hash = sha2::Sha256::new();
    let Identity { recipe, program_version, threads, device, precision, micro_batch } = identity;
    hash.update(format!("{step} {recipe} {program_version:?} {threads} {device:?} {precision}\n"));
    if let Some(frames) = micro_batch {
        hash.update(format!("{frames} at a time\n"));
    }
    for (name, view) in tensors {
        hash.update(format!("{name:?} {:?} {:?} ", view.dtype(), view.shape()));
        hash.update(view.data());
    }
    Sha256(hex::encode(hash.finalize()))
}

/// A safetensors file of f32 tensors. Sync point: copies each to the host.
pub fn tensors_to_bytes(tensors: &[(String, Tensor)]) -> Result<Vec<u8>, CheckpointError> {
    let mut host = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        host.push((name, tensor.dims().to_vec(), bytes));
    }
    let write = |e: safetensors::SafeTensorError| CheckpointError::Write(e.to_string());
    let views = host
        .iter()
        .map(|(name, shape, bytes)| {
            Ok((*name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(write)?;
    safetensors::serialize(views, None).map_err(write)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use proptest::prelude::*;

    fn identity() -> Identity {
        Identity {
            recipe: Sha256::of(b"recipe"),
            program_version: "1.2.3".into(),
            micro_batch: None,
            threads: 2,
            device: "cpu".into(),
            precision: Precision::F32,
        }
    }

    fn checkpoint() -> Checkpoint {
        let tensor = |data: &[f32]| Tensor::new(data, &Device::Cpu).unwrap();
        let weights =
            [("0.weight".to_owned(), tensor(&[1.0, f32::MIN_POSITIVE])), ("b".to_owned(), tensor(&[-0.0]))];
        let moments = [("encoder.0.weight.first".to_owned(), tensor(&[0.5, 7.25]))];
        let sections = BTreeMap::from([
            ("encoder".to_owned(), tensors_to_bytes(&weights).unwrap()),
            ("optimiser".to_owned(), tensors_to_bytes(&moments).unwrap()),
        ]);
        Checkpoint { step: 17, sections }
    }

    #[test]
    fn a_checkpoint_reads_back_bit_for_bit() {
        let bytes = checkpoint().encode(&identity()).unwrap();
        assert_eq!(Checkpoint::decode(&bytes, &identity()).unwrap(), checkpoint());
        assert_eq!(bytes, checkpoint().encode(&identity()).unwrap());
        assert!(checkpoint().section("predictor").is_err());
    }

    #[test]
    fn another_runs_checkpoint_is_refused_by_what_differs() {
        let bytes = checkpoint().encode(&identity()).unwrap();
        let others = [
            ("recipe", Identity { recipe: Sha256::of(b"other"), ..identity() }),
            ("program version", Identity { program_version: "1.2.4".into(), ..identity() }),
            ("thread count", Identity { threads: 3, ..identity() }),
            ("device", Identity { device: "cuda".into(), ..identity() }),
            ("precision", Identity { precision: Precision::Bf16, ..identity() }),
            ("micro-batch", Identity { micro_batch: NonZeroUsize::new(4), ..identity() }),
        ];
        for (expected, other) in others {
            let error = Checkpoint::decode(&bytes, &other).unwrap_err();
            assert!(matches!(error, CheckpointError::Other { what, .. } if what == expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_torn_checkpoint_is_refused(share in 0.0f64..1.0) {
            let bytes = checkpoint().encode(&identity()).unwrap();
            let cut = (bytes.len() as f64 * share) as usize;
            let error = Checkpoint::decode(&bytes[..cut], &identity()).unwrap_err();
            prop_assert!(matches!(error, CheckpointError::Damaged(_)), "{}", error);
        }

        #[test]
        fn a_changed_byte_never_gives_another_state(share in 0.0f64..1.0, flip in 1u8..) {
            let mut bytes = checkpoint().encode(&identity()).unwrap();
            let at = (bytes.len() as f64 * share) as usize;
            bytes[at] ^= flip;
            let other = Checkpoint::decode(&bytes, &identity()).is_ok_and(|read| read != checkpoint());
            prop_assert!(!other);
        }
    }
}
