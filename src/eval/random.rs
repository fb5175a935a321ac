//! Deterministic draws: SplitMix64 (Steele, Lea, Flood 2014) and a hash keyed by a seed.
//!
//! Evaluation repeats bit for bit, so nothing here reads the clock or the operating system's entropy. Neither
//! generator is fit for secrets.

/// A stream of 64-bit numbers that its seed alone determines.
pub(super) struct SplitMix64(u64);

impl SplitMix64 {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Uniform in `0..bound` by the high half of a product; its bias is below `bound / 2^64`.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

/// A hash of `bytes` keyed by `seed`: FNV-1a, then SplitMix64's finaliser, which spreads similar names.
pub(super) fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xCBF2_9CE4_8422_2325 ^ mix(seed), |state, &byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    mix(fnv)
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs for seed 1234567 as in the generator's published test vector.
    #[test]
    fn the_generator_gives_its_published_sequence() {
        let mut random = SplitMix64::new(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn bounded_draws_fill_their_range_evenly() {
        let mut random = SplitMix64::new(7);
        let mut counts = [0_u32; 5];
        (0..50_000).for_each(|_| counts[random.below(5)] += 1);
        assert!(counts.iter().all(|&count| (9_700..10_300).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_hash_depends_on_seed_and_bytes() {
        assert_eq!(hash(1, b"stream"), hash(1, b"stream"));
        assert_ne!(hash(1, b"stream"), hash(2, b"stream"));
        assert_ne!(hash(1, b"stream"), hash(1, b"streams"));
    }
}
