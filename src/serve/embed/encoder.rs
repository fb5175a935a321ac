//! A published encoder, read back from the two files that say what it is: `config.json` and `encoder.safetensors`.

use candle_core::Device;
use serde::Deserialize;
use tokio::task::JoinError;

use crate::model::preprocess::{PreprocessError, Preprocessing, embed_views};
use crate::model::{
    Architecture, Encoder, EncoderSpec, Mode, ModelError, Precision, Trainability, Weights, build,
};
use crate::registry::VersionRecord;
use crate::store::paths::Paths;
use crate::store::{Store, StoreError};
use crate::types::{FileRef, Version};

const CONFIG: &str = "config.json";
const ENCODER: &str = "encoder.safetensors";

/// Why a published version can't embed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{version} has no file {name}")]
    MissingFile { version: Version, name: &'static str },
    #[error("{version}: config.json can't be read: {source}")]
    Config { version: Version, source: serde_json::Error },
    #[error("{version}: config.json names the architecture {name:?}, which this program does not know")]
    UnknownArchitecture { version: Version, name: String },
    #[error("{version}: config.json names the interpolation {name:?}, which this program does not know")]
    UnknownInterpolation { version: Version, name: String },
    #[error("building an encoder did not come to its end: {0}")]
    Unfinished(#[from] JoinError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// What `config.json` says, as far as embedding needs it.
#[derive(Deserialize)]
struct Config {
    architecture: String,
    #[serde(default)]
    model_args: ModelArguments,
    pretrained_cfg: PretrainedConfig,
}

#[derive(Deserialize, Default)]
struct ModelArguments {
    patch_size: Option<usize>,
}

#[derive(Deserialize)]
struct PretrainedConfig {
    input_size: [usize; 3],
    interpolation: String,
    mean: [f32; 3],
    std: [f32; 3],
}

/// timm's patch size for an architecture that states none.
const TIMM_PATCH_SIZE: usize = 16;

impl Config {
    fn spec(&self, version: Version) -> Result<EncoderSpec, LoadError> {
        let architecture = match self.architecture.as_str() {
            "vit_tiny_patch16_224" => Architecture::VitTiny,
            "resnet18" => Architecture::Resnet18,
            "palimpsest_resnet_small" => Architecture::ResnetSmall,
            name => return Err(LoadError::UnknownArchitecture { version, name: name.to_owned() }),
        };
        if self.pretrained_cfg.interpolation != "bilinear" {
            let name = self.pretrained_cfg.interpolation.clone();
            return Err(LoadError::UnknownInterpolation { version, name });
        }
        let image_size = self.pretrained_cfg.input_size[1];
        let patch_size = self.model_args.patch_size.unwrap_or(TIMM_PATCH_SIZE);
        Ok(EncoderSpec { architecture, image_size, patch_size })
    }
}

/// A version that is ready to embed.
pub struct PublishedEncoder {
    pub version: Version,
    pub preprocessing: Preprocessing,
    encoder: Box<dyn Encoder>,
    device: Device,
}

impl PublishedEncoder {
    /// Reads and verifies both files, builds the encoder (on the blocking pool) and runs it once, so that a request does
    /// not pay for the first run.
    pub async fn load(
        record: &VersionRecord,
        store: &Store,
        paths: &Paths,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let version = record.version;
        let config = store.get_verified(&object(record, paths, CONFIG)?).await?;
        let weights = store.get_verified(&object(record, paths, ENCODER)?).await?;
        let config: Config =
            serde_json::from_slice(&config).map_err(|source| LoadError::Config { version, source })?;
        let device = device.clone();
        tokio::task::spawn_blocking(move || Self::build(version, config, &weights, device)).await?
    }

    fn build(version: Version, config: Config, weights: &[u8], device: Device) -> Result<Self, LoadError> {
        let spec = config.spec(version)?;
        spec.validate()?;
        let weights = Weights::load(weights, &spec.parameters(), &device, Trainability::Frozen)?;
        let PretrainedConfig { mean, std, .. } = config.pretrained_cfg;
        let preprocessing = Preprocessing { size: spec.image_size, mean, std };
        let encoder = build(&spec, &weights, Precision::F32)?;
        let built = Self { version, preprocessing, encoder, device };
        built.warm_up()?;
        Ok(built)
    }

    fn warm_up(&self) -> Result<(), ModelError> {
        let size = self.preprocessing.size;
        let images = candle_core::Tensor::zeros((1, 3, size, size), candle_core::DType::F32, &self.device)?;
        self.encoder.forward(&images, Mode::Eval)?;
        Ok(())
    }

    pub fn dimension(&self) -> usize {
        self.encoder.feature_dim()
    }

    /// `views`: `[images, 3, size, size]` -> row-major `[images, dimension]`. Sync point.
    pub fn embed(&self, views: Vec<f32>) -> Result<Vec<f32>, PreprocessError> {
        embed_views(self.encoder.as_ref(), views, &self.preprocessing, &self.device)
    }
}

fn object(record: &VersionRecord, paths: &Paths, name: &'static str) -> Result<FileRef, LoadError> {
    let version = record.version;
    let file = record.files.iter().find(|file| file.path == name);
    let file = file.ok_or(LoadError::MissingFile { version, name })?;
    Ok(FileRef { path: format!("{}/{name}", paths.version(version)), ..file.clone() })
}
