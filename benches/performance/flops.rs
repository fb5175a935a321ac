//! Floating-point operations of a training step, counted from the networks' shapes.
//!
//! Matrix products and convolutions only, two operations for a multiplication with its addition: what the rest costs
//! is time that a step spends below the peak.

use palimpsest::model::{Architecture, EncoderSpec};

/// Forward once, backward twice that, the teacher's forward: in units of the student's forward pass.
const PASSES: f64 = 1.0 + 2.0 + 1.0;

/// Of one training step on `views` images.
pub fn training_step(encoder: &EncoderSpec, projector: [usize; 2], views: usize) -> f64 {
    let [hidden, output] = projector;
    let head = encoder.feature_dim() * hidden + hidden * output;
    2.0 * PASSES * views as f64 * (encoder_multiplications(encoder) + head) as f64
}

/// Of the forward pass of one image.
fn encoder_multiplications(encoder: &EncoderSpec) -> usize {
    let size = encoder.image_size;
    match encoder.architecture {
        Architecture::VitTiny => vision_transformer(size / encoder.patch_size, encoder.patch_size),
        Architecture::Resnet18 => {
            // The stem halves the image, and so does the pooling after it.
            let stem = convolution(size / 2, 7, 3, 64);
            let stages = [(2, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 2)];
            stem + residual_stages(size / 4, 64, &stages)
        }
        Architecture::ResnetSmall => {
            let stages = [(1, 24, 1), (1, 48, 2), (1, 96, 2)];
            convolution(size / 2, 3, 3, 24) + residual_stages(size / 2, 24, &stages)
        }
    }
}

fn vision_transformer(patches_per_side: usize, patch_size: usize) -> usize {
    const WIDTH: usize = 192;
    const DEPTH: usize = 12;
    let patches = patches_per_side * patches_per_side;
    let tokens = patches + 1;
    // qkv 3, projection 1, the two layers of the MLP 4 each.
    let linear = tokens * 12 * WIDTH * WIDTH;
    let attention = 2 * tokens * tokens * WIDTH;
    patches * 3 * patch_size * patch_size * WIDTH + DEPTH * (linear + attention)
}

fn convolution(output_size: usize, kernel: usize, inputs: usize, outputs: usize) -> usize {
    output_size * output_size * kernel * kernel * inputs * outputs
}

/// `stages` are (blocks, channels, stride of the first block).
fn residual_stages(mut size: usize, mut inputs: usize, stages: &[(usize, usize, usize)]) -> usize {
    let mut sum = 0;
    for &(blocks, channels, first_stride) in stages {
        for block in 0..blocks {
            let stride = if block == 0 { first_stride } else { 1 };
            size /= stride;
            sum += convolution(size, 3, inputs, channels) + convolution(size, 3, channels, channels);
            if stride != 1 || inputs != channels {
                sum += convolution(size, 1, inputs, channels);
            }
            inputs = channels;
        }
    }
    sum
}
