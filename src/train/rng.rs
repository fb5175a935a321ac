//! The counter-based random numbers that everything drawn in training comes from.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011) turns a
//! 64-bit key and a 128-bit counter into four 32-bit words. There is no state to save: what is drawn for a
//! [`Place`] depends on the attempt's seed and that place alone, whatever threads, restarts or batches do.
//!
//! Layout, fixed because a device kernel must draw the same numbers:
//!
//! | word | holds |
//! |---|---|
//! | key 0, key 1 | low and high half of the attempt's seed (a function of the configured seed, the period and its retries) |
//! | counter 0 | number of the block of four words within the place, from 0 |
//! | counter 1 | frame: its index in the period's set of frames |
//! | counter 2 | step (augmentation) or epoch (order) |
//! | counter 3 | domain << 8, plus the view |

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four words of Philox4x32-10.
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut key, mut c) = (key, counter);
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

/// What the numbers are for: two uses never draw the same ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Views of a training step.
    Augmentation = 1,
    /// The order of frames in an epoch.
    Order = 2,
    /// Views on which candidate and teacher are compared.
    ProbeViews = 3,
    /// Seeds of the initial weights; the "frame" numbers the network.
    Weights = 4,
    /// In which batches of an epoch the frames of a scene lie.
    Turns = 5,
}

/// Where a sequence of draws belongs. `step` is below 2^32: a job's budget is checked against that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub domain: Domain,
    pub step: u32,
    pub frame: u32,
    pub view: u8,
}

/// The sequence of draws of one place.
#[derive(Debug, Clone)]
pub struct Draws {
    key: [u32; 2],
    counter: [u32; 4],
    words: [u32; 4],
    used: usize,
}

impl Draws {
    pub fn new(seed: u64, place: Place) -> Self {
        let tag = ((place.domain as u32) << 8) | u32::from(place.view);
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, place.frame, place.step, tag],
            words: [0; 4],
            used: 4,
        }
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox4x32(self.key, self.counter);
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        u64::from(self.next_u32()) << 32 | low
    }

    /// In [0, 1), one word: a multiple of 2^-32.
    pub fn uniform(&mut self) -> f64 {
        f64::from(self.next_u32()) / 4_294_967_296.0
    }

    /// In [low, high), one word; `low` itself if both are equal.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Standard normal by Box-Muller, two words; the second normal of the pair is not used.
    pub fn normal(&mut self) -> f64 {
        let radius = (1.0 - self.uniform()).ln();
        let angle = std::f64::consts::TAU * self.uniform();
        (-2.0 * radius).sqrt() * angle.cos()
    }

    /// One of 0..n, one word. Values differ in probability by at most n / 2^32.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }
}

/// The seed of one network's initial weights.
pub fn weights_seed(seed: u64, network: u32) -> u64 {
    let place = Place { domain: Domain::Weights, step: 0, frame: network, view: 0 };
    Draws::new(seed, place).next_u64()
}

/// A permutation of `0..len`, another one for each use and epoch: sorted by a drawn key, ties by index.
pub fn permutation(seed: u64, domain: Domain, epoch: u32, len: u32) -> Vec<u32> {
    let key = |frame| {
        let place = Place { domain, step: epoch, frame, view: 0 };
        Draws::new(seed, place).next_u64()
    };
    let mut keyed: Vec<(u64, u32)> = (0..len).map(|frame| (key(frame), frame)).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, frame)| frame).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(step: u32, frame: u32, view: u8) -> Place {
        Place { domain: Domain::Augmentation, step, frame, view }
    }

    /// The vectors for philox4x32-10 that the authors publish with Random123 (kat_vectors).
    #[test]
    fn philox_gives_the_published_known_answers() {
        let ones = u32::MAX;
        let vectors = [
            ([0, 0], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 2], [ones; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, counter, expected) in vectors {
            assert_eq!(philox4x32(key, counter), expected);
        }
    }

    #[test]
    fn every_part_of_a_place_changes_what_is_drawn() {
        let first = |seed, place| Draws::new(seed, place).next_u64();
        let base = first(7, place(1, 2, 0));
        let order = Place { domain: Domain::Order, ..place(1, 2, 0) };
        let others = [
            first(8, place(1, 2, 0)),
            first(7 | 1 << 40, place(1, 2, 0)),
            first(7, place(2, 2, 0)),
            first(7, place(1, 3, 0)),
            first(7, place(1, 2, 1)),
            first(7, order),
        ];
        assert!(others.iter().all(|other| *other != base));
        assert_eq!(first(7, place(1, 2, 0)), base);
    }

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let n = 20_000;
        let mut draws = Draws::new(3, place(0, 0, 0));
        let uniform: f64 = (0..n).map(|_| draws.uniform()).sum::<f64>() / f64::from(n);
        assert!((uniform - 0.5).abs() < 0.01, "{uniform}");
        let normals: Vec<f64> = (0..n).map(|_| draws.normal()).collect();
        let mean = normals.iter().sum::<f64>() / f64::from(n);
        let square = normals.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03, "{mean}");
        assert!((square - 1.0).abs() < 0.05, "{square}");
        let mut counts = [0; 3];
        (0..n).for_each(|_| counts[draws.below(3) as usize] += 1);
        assert!(counts.iter().all(|count| (6_300..7_030).contains(count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn an_epoch_holds_every_frame_once(seed: u64, epoch in 0u32..9, len in 0u32..300) {
            let mut order = permutation(seed, Domain::Order, epoch, len);
            if len > 20 {
                prop_assert_ne!(&order, &permutation(seed, Domain::Order, epoch + 1, len));
            }
            order.sort_unstable();
            prop_assert_eq!(order, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn below_and_between_stay_inside(seed: u64, n in 1u32.., low in -5.0..5.0, span in 0.0..9.0) {
            let mut draws = Draws::new(seed, place(0, 0, 0));
            prop_assert!(draws.below(n) < n);
            let value = draws.between(low, low + span);
            prop_assert!(value >= low && value <= low + span);
        }
    }
}
