//! What a parameter is (name, shape, kind, initial values) and the seeded streams from which initial values are drawn.
//!
//! Invariant: a value is a pure function of (seed, parameter name, index): neither the order of drawing nor other
//! parameters change it.

use std::f64::consts::TAU;

use candle_core::DType;
use sha2::{Digest, Sha256};

/// Whether the optimiser moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// Moved by gradients; f32.
    Trainable,
    /// Moved by the forward pass in training mode: running statistics (f32).
    Buffer,
    /// Counts training passes, by torch's name `num_batches_tracked` (i64, a scalar).
    Counter,
}

impl ParameterKind {
    /// The type in which a parameter of this kind is stored.
    pub fn dtype(self) -> DType {
        match self {
            ParameterKind::Trainable | ParameterKind::Buffer => DType::F32,
            ParameterKind::Counter => DType::I64,
        }
    }
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Constant(f64),
    /// Mean 0. timm truncates at +-2, a hundred of its standard deviations: the same distribution.
    Normal {
        deviation: f64,
    },
    /// Between -bound and +bound.
    Uniform {
        bound: f64,
    },
}

impl Init {
    /// torch's default for linear and convolution layers, weight and bias alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    pub fn torch_default(fan_in: usize) -> Self {
        Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() }
    }

    /// He et al. for a ReLU network, by outgoing connections: what torchvision's ResNets begin with.
    pub fn kaiming_fan_out(fan_out: usize) -> Self {
        Init::Normal { deviation: (2.0 / fan_out as f64).sqrt() }
    }

    /// The first `count` values of the stream that belongs to `name`.
    pub fn values(self, seed: u64, name: &str, count: usize) -> Vec<f32> {
        let stream = Stream::named(seed, name);
        let draw = |index: u64| match self {
            Init::Constant(value) => value,
            Init::Normal { deviation } => deviation * stream.normal(index),
            Init::Uniform { bound } => bound * (2.0 * stream.uniform(index) - 1.0),
        };
        (0..count as u64).map(|index| draw(index) as f32).collect()
    }
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// timm's or torchvision's name.
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: ParameterKind,
    pub init: Init,
}

impl ParameterSpec {
    pub fn trainable(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        ParameterSpec { name: name.into(), shape: shape.to_vec(), kind: ParameterKind::Trainable, init }
    }

    /// The five tensors of a batch normalisation, as torch names and initialises them.
    pub fn batch_norm(prefix: &str, channels: usize) -> [ParameterSpec; 5] {
        let tensor = |name: &str, kind, value| {
            let shape = if kind == ParameterKind::Counter { vec![] } else { vec![channels] };
            ParameterSpec { name: format!("{prefix}.{name}"), shape, kind, init: Init::Constant(value) }
        };
        [
            tensor("weight", ParameterKind::Trainable, 1.0),
            tensor("bias", ParameterKind::Trainable, 0.0),
            tensor("running_mean", ParameterKind::Buffer, 0.0),
            tensor("running_var", ParameterKind::Buffer, 1.0),
            tensor("num_batches_tracked", ParameterKind::Counter, 0.0),
        ]
    }

    pub fn element_count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A stream of numbers that is read at any index: SplitMix64's output function over a keyed counter (Steele, Lea,
/// Flood: *Fast splittable pseudorandom number generators*, 2014).
pub(crate) struct Stream {
    key: u64,
}

impl Stream {
    /// The key is SHA-256 of seed and name, so that names that differ in one letter share nothing.
    pub(crate) fn named(seed: u64, name: &str) -> Self {
        let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
        let key = digest.iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte));
        Stream { key }
    }

    fn bits(&self, index: u64) -> u64 {
        let mut z = self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1), a multiple of 2^-53.
    pub(crate) fn uniform(&self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller from the two uniform numbers at 2 `index` and 2 `index` + 1.
    pub(crate) fn normal(&self, index: u64) -> f64 {
        // 1 - u lies in (0, 1]: its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform(2 * index)).ln()).sqrt();
        radius * (TAU * self.uniform(2 * index + 1)).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs for state 1234567 that the generator's published reference program prints.
        let stream = Stream { key: 1_234_567 };
        let outputs: Vec<u64> = (0..3).map(|i| stream.bits(i)).collect();
        assert_eq!(
            outputs,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn normal_values_have_mean_zero_and_the_given_deviation() {
        let values = Init::Normal { deviation: 0.02 }.values(1, "w", 100_000);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 4.0 * 0.02 / 1e5f64.sqrt(), "{mean}");
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.01, "{variance}");
    }

    #[test]
    fn uniform_values_fill_the_interval_and_stay_inside() {
        let values = Init::torch_default(25).values(1, "w", 10_000);
        let largest = values.iter().fold(0f32, |a, b| a.max(b.abs()));
        assert!(largest <= 0.2 && largest > 0.199, "{largest}");
    }

    #[test]
    fn a_stream_depends_on_seed_and_name_alone() {
        let init = Init::Normal { deviation: 1.0 };
        assert_eq!(init.values(1, "a", 5), init.values(1, "a", 9)[..5]);
        assert_ne!(init.values(1, "a", 5), init.values(2, "a", 5));
        assert_ne!(init.values(1, "a", 5), init.values(1, "b", 5));
    }
}
