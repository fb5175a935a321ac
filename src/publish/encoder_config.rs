//! `config.json` of a version: how to build the encoder and prepare an image for it, in timm's words.
//!
//! The form is that of a model on the Hugging Face hub (`architecture`, `num_classes`, `num_features`, `global_pool`,
//! `model_args`, `pretrained_cfg`), so that `timm.create_model(architecture, num_classes=0, **model_args)` followed by
//! a strict `load_state_dict` works as it stands. torchvision's `resnet18` has the same names. `resnet_small`
//! exists in neither: its `architecture` says so.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::model::{Architecture, EncoderSpec};

/// How pixels in 0..1 become the encoder's input.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// Per channel.
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// timm's word for the filter of the resize: `bilinear`, `bicubic`.
    pub interpolation: &'static str,
    /// The side of the square that is kept over the side of the resized image: 1 keeps all.
    pub crop_ratio: f64,
}

/// Pretty-printed, keys sorted: equal arguments give equal bytes.
pub fn encoder_config(spec: &EncoderSpec, preprocessing: &Preprocessing) -> String {
    let timm = Timm::of(spec);
    let size = spec.image_size;
    let config = json!({
        "architecture": timm.architecture,
        "num_classes": 0,
        "num_features": spec.feature_dim(),
        "global_pool": timm.global_pool,
        "model_args": timm.model_args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": timm.fixed_input_size,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_ratio,
            "crop_mode": "center",
            "mean": preprocessing.mean.map(decimal),
            "std": preprocessing.std.map(decimal),
            "num_classes": 0,
            "first_conv": timm.first_conv,
            "classifier": timm.classifier,
        },
    });
    format!("{config:#}\n")
}

struct Timm {
    architecture: &'static str,
    global_pool: &'static str,
    model_args: Map<String, Value>,
    fixed_input_size: bool,
    first_conv: &'static str,
    classifier: &'static str,
}

impl Timm {
    fn of(spec: &EncoderSpec) -> Self {
        let resnet = |architecture| Self {
            architecture,
            global_pool: "avg",
            model_args: Map::new(),
            fixed_input_size: false,
            first_conv: "conv1",
            classifier: "fc",
        };
        match spec.architecture {
            Architecture::VitTiny => Self {
                architecture: "vit_tiny_patch16_224",
                global_pool: "token",
                model_args: [("img_size", spec.image_size), ("patch_size", spec.patch_size)]
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), json!(value)))
                    .collect(),
                fixed_input_size: true,
                first_conv: "patch_embed.proj",
                classifier: "head",
            },
            Architecture::Resnet18 => resnet("resnet18"),
            Architecture::ResnetSmall => resnet("palimpsest_resnet_small"),
        }
    }
}

/// The shortest decimal that reads back as the same f32: 0.485, not 0.48500001430511475.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREPROCESSING: Preprocessing = Preprocessing {
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        interpolation: "bilinear",
        crop_ratio: 1.0,
    };

    fn config(architecture: Architecture) -> Value {
        let spec = EncoderSpec { architecture, image_size: 64, patch_size: 8 };
        serde_json::from_str(&encoder_config(&spec, &PREPROCESSING)).unwrap()
    }

    #[test]
    fn a_transformer_states_its_image_and_patch_size() {
        let config = config(Architecture::VitTiny);
        assert_eq!(config["architecture"], "vit_tiny_patch16_224");
        assert_eq!(config["model_args"], json!({"img_size": 64, "patch_size": 8}));
        assert_eq!(config["num_features"], 192);
        assert_eq!(config["pretrained_cfg"]["mean"], json!([0.485, 0.456, 0.406]));
        assert_eq!(config["pretrained_cfg"]["input_size"], json!([3, 64, 64]));
    }

    #[test]
    fn a_resnet_takes_any_image_size() {
        let config = config(Architecture::Resnet18);
        assert_eq!((&config["architecture"], &config["num_features"]), (&json!("resnet18"), &json!(512)));
        assert_eq!(config["model_args"], json!({}));
    }
}
