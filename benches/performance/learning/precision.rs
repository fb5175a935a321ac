//! The loss over the steps with products in bf16 and in f32, from equal seeds: equal weights, frames and views.
//!
//! Rounding makes two runs part within tens of steps, as another seed would; so single steps can't be compared. What
//! is: whether losses, smoothed, differ more between precisions than between seeds.

use anyhow::{Result, ensure};
use palimpsest::bench::stream::Period;
use palimpsest::model::Architecture;
use palimpsest::train::spec::PrecisionChoice;

use super::recipe::{Settings, Training};
use super::spread::{WINDOW, smoothed};

/// The small networks of both kinds, with the frames of a batch.
const NETWORKS: [(Architecture, usize); 2] = [(Architecture::ResnetSmall, 128), (Architecture::VitTiny, 32)];

/// One network's losses, of equal seeds at equal places, smoothed.
pub struct Curves {
    pub architecture: Architecture,
    pub batch: usize,
    pub bf16: Vec<Vec<f64>>,
    pub f32: Vec<Vec<f64>>,
}

/// The networks (all if none is named) in both precisions from every seed.
pub fn curves(period: &Period, networks: &[Architecture], seeds: u64, steps: u64) -> Result<Vec<Curves>> {
    ensure!(seeds > 1, "--seeds must be at least 2: one has no deviation");
    ensure!(steps as usize > WINDOW, "--steps must be more than the {WINDOW} of a mean");
    let of_network = |(architecture, batch)| {
        let mut curves = Curves { architecture, batch, bf16: Vec::new(), f32: Vec::new() };
        for seed in 0..seeds {
            curves.bf16.push(curve(period, &curves, seed, (PrecisionChoice::Bf16, steps))?);
            curves.f32.push(curve(period, &curves, seed, (PrecisionChoice::F32, steps))?);
        }
        Ok(curves)
    };
    let wanted =
        |(architecture, _): &(Architecture, usize)| networks.is_empty() || networks.contains(architecture);
    NETWORKS.into_iter().filter(wanted).map(of_network).collect()
}

fn curve(
    period: &Period,
    network: &Curves,
    seed: u64,
    (precision, steps): (PrecisionChoice, u64),
) -> Result<Vec<f64>> {
    let mut settings = Settings::benchmark()?;
    settings.architecture = network.architecture;
    settings.optimisation.batch = network.batch;
    settings.period_steps[0] = steps;
    if network.architecture == Architecture::VitTiny {
        // A transformer needs smaller steps than the benchmark's network: it gets the defaults'.
        settings.optimisation.learning_rate = Settings::default_learning_rate()?;
    }
    let training = Training { settings: &settings, period, number: 0, seed, precision, teacher: None };
    let (_, losses) = training.run()?;
    let text = network.architecture.name();
    eprintln!("  {text}, {precision:?}, seed {seed}: loss {:.3} at last", losses[losses.len() - 1]);
    Ok(smoothed(&losses))
}
