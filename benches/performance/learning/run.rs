//! One run of the forgetting benchmark: learn the first period, then the second with lwf, and measure what became of
//! the first. All of it by the functions of the daemon's training process.
//!
//! The row's folder holds the stream, or a link to it, as `stream`. Both sides begin with the same weights; their views
//! are random, so only what they learnt can be compared, and only roughly. Before the first run they compare the
//! embeddings of one frame a period.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use palimpsest::bench::stream::{Period, Source, Stream};
use palimpsest::eval::{Embeddings, drift, knn, linear_probe};
use palimpsest::model::{Precision, Trainability};
use palimpsest::train::embed::embed_frames;
use palimpsest::train::network::{Compute, Network, NetworkBytes};
use palimpsest::train::spec::PrecisionChoice;
use serde::{Deserialize, Serialize};

use super::recipe::{Settings, Training, precision_text};
use crate::rows::{Comparison, OURS, Row, Work, files};

/// What a side reports after a run, in this order.
pub const SCORES: [&str; 10] = [
    "a after a, linear",
    "a after a, kNN",
    "a after a, 10-shot",
    "a after b, linear",
    "a after b, kNN",
    "a after b, 10-shot",
    "b after b, linear",
    "b after b, kNN",
    "b after b, 10-shot",
    "CKA of a",
];
/// The stream in the row's folder, or a link to it.
pub const STREAM: &str = "stream";
/// As the daemon's measurements.
const EMBED_BATCH: usize = 128;
/// Values of one frame's embedding that the sides compare.
const CHECKED_VALUES: usize = 8;
const SEED: u64 = 8;

const SAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/samples/freedoom");
/// Of a trial: labels a period, frames to train and to test on of each.
const SMALL: [usize; 3] = [3, 12, 6];

const CPU: Compute<'_> = Compute { device: &Device::Cpu, precision: Precision::F32 };

pub struct ForgettingRun;

#[derive(Serialize, Deserialize)]
struct Plan {
    #[serde(flatten)]
    settings: Settings,
    checked_values: usize,
    warm_up: usize,
}

impl Row for ForgettingRun {
    fn name(&self) -> &'static str {
        "forgetting_run"
    }

    fn title(&self) -> String {
        "one run of the forgetting benchmark".to_owned()
    }

    fn peer_kind(&self) -> &'static str {
        "forgetting_run"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        vec![Comparison {
            ours: OURS,
            against: "PyTorch f32",
            variants: &["eager", "compile"],
            targets: Some((1.2, 1.2)),
            tolerance: 1e-3,
            checked: OURS,
            needs_bf16: false,
        }]
    }

    fn prepare(&self, folder: &Path, small: bool) -> Result<()> {
        let mut settings = Settings::benchmark()?;
        if small {
            write_small_stream(&folder.join(STREAM))?;
            settings.period_steps = [4, 3];
            settings.optimisation.batch = 8;
        }
        let initial = Network::initialise(&settings.model(), SEED, None, CPU)?.to_bytes()?;
        std::fs::write(folder.join("encoder.safetensors"), initial.encoder)?;
        std::fs::write(folder.join("projector.safetensors"), initial.projector)?;
        files::write_plan(folder, &Plan { settings, checked_values: CHECKED_VALUES, warm_up: self.warm_up() })
    }

    fn start(&self, folder: &Path, _: &str) -> Result<Box<dyn Work>> {
        let Plan { settings, .. } = files::read_plan(folder)?;
        let periods = Stream::read(&Source::Folder(folder.join(STREAM)))?.periods;
        let [a, b] = <[Period; 2]>::try_from(periods)
            .ok()
            .context("the run needs a stream of two periods: `make streams` makes it")?;
        let initial = NetworkBytes {
            encoder: files::read(folder, "encoder.safetensors")?,
            projector: files::read(folder, "projector.safetensors")?,
        };
        let details = precision_text(PrecisionChoice::Auto)?;
        let mut run = Run { settings, a, b, details, check: Vec::new() };
        for period in [&run.a, &run.b] {
            let first = run.embed(period, &initial, &period.tested()[..1])?;
            run.check.extend(first.data.iter().take(CHECKED_VALUES).map(|value| f64::from(*value)));
        }
        Ok(Box::new(run))
    }

    fn verify(&self, embeddings: &[f64]) -> Result<()> {
        let holds =
            embeddings.len() == 2 * CHECKED_VALUES && embeddings.iter().all(|value| value.is_finite());
        ensure!(holds && embeddings.iter().any(|value| *value > 0.0), "embeddings {embeddings:?}");
        Ok(())
    }
}

/// Two periods of a few of the committed samples.
fn write_small_stream(folder: &Path) -> Result<()> {
    let [labels, train, test] = SMALL;
    for period in entries(Path::new(SAMPLES))?.iter().filter(|path| path.is_dir()).take(2) {
        for label in entries(period)?.iter().take(labels) {
            for (index, path) in entries(label)?.iter().take(train + test).enumerate() {
                let split = if index < train { "train" } else { "test" };
                let name = path.strip_prefix(SAMPLES)?;
                let period = folder.join(name.iter().next().context("a sample has a period")?);
                let target = period.join(split).join(name.iter().skip(1).collect::<PathBuf>());
                std::fs::create_dir_all(target.parent().context("a sample has a label")?)?;
                std::fs::copy(path, target)?;
            }
        }
    }
    Ok(())
}

/// What is in a folder, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = read.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

struct Run {
    settings: Settings,
    a: Period,
    b: Period,
    details: String,
    check: Vec<f64>,
}

impl Run {
    fn learn(&self, number: usize, teacher: Option<&NetworkBytes>) -> Result<NetworkBytes> {
        let period = if number == 0 { &self.a } else { &self.b };
        let precision = PrecisionChoice::Auto;
        let training = Training { settings: &self.settings, period, number, seed: SEED, precision, teacher };
        Ok(training.run()?.0)
    }

    fn embed(&self, period: &Period, bytes: &NetworkBytes, frames: &[usize]) -> Result<Embeddings> {
        let model = self.settings.model();
        let network = Network::load(&model, bytes, CPU, Trainability::Frozen)?;
        let encoder = network.encoder();
        let encoded = frames.iter().map(|frame| period.frames.bytes(*frame));
        let rows = embed_frames(encoder, encoded, &model.preprocessing(), EMBED_BATCH, &Device::Cpu)?;
        Ok(Embeddings::new(frames.len(), encoder.feature_dim(), rows))
    }

    /// The scores of linear probe, kNN and 10-shot, and the embeddings of the frames that were asked.
    fn measure(&self, period: &Period, bytes: &NetworkBytes) -> Result<([f64; 3], Embeddings)> {
        let all: Vec<usize> = (0..period.labels.len()).collect();
        let (embeddings, split) = (self.embed(period, bytes, &all)?, period.split());
        let scores = [
            linear_probe::linear(&embeddings, &period.labels, &split),
            knn::knn(&embeddings, &period.labels, &split, self.settings.k).accuracy,
            linear_probe::few_shot(&embeddings, &period.labels, &split),
        ];
        Ok((scores, embeddings.select(&split.queries)))
    }
}

impl Work for Run {
    fn repeat(&mut self) -> Result<()> {
        let first = self.learn(0, None)?;
        let (before, old) = self.measure(&self.a, &first)?;
        let second = self.learn(1, Some(&first))?;
        let (after, new) = self.measure(&self.a, &second)?;
        let (learnt, _) = self.measure(&self.b, &second)?;
        self.check = [before, after, learnt].concat();
        self.check.push(drift::linear_cka(&new, &old));
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        self.check.clone()
    }

    fn details(&self) -> String {
        self.details.clone()
    }
}
