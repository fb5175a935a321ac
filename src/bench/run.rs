//! The runs themselves: every method with every seed, several at a time.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::measure::{COMPUTE, Earlier, Measure, Scores, frame_of};
use super::method::{BenchMethod, Defaults, Kind};
use super::results::{Results, RunResult, VersionResult, period_id};
use super::stream::{Period, Stream, path_of};
use super::versions::{Task, Trained, VersionError, Versions, Watch};
use super::{BenchError, file_error};
use crate::train::TrainError;
use crate::train::frames::{FrameSet, FrameSetWriter};
use crate::train::network::{Network, NetworkBytes};
use crate::train::rng::{Domain, permutation};
use crate::train::spec::{
    Augmentation, Composition, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeSpec, Recipe, SCHEMA,
    Teacher, TrainJob,
};
use crate::types::{EventTime, FileRef, Sha256, Version};

/// What every run has in common, and numbers depend on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    pub model: ModelSpec,
    /// `steps`: of every period but the first.
    pub optimisation: Optimisation,
    pub first_steps: u64,
    pub augmentation: Augmentation,
    /// How batches are put together, unless a method says otherwise. Every frame of a stream on disk is trained on.
    pub composition: Composition,
    /// Neighbours of the kNN probe.
    pub k: usize,
    /// What methods take unless they say otherwise.
    pub defaults: Defaults,
    /// `cpu` or `cuda:N`; `auto` is resolved by who makes the settings, and so is the precision.
    pub device: String,
    pub precision: PrecisionChoice,
    /// As a job's; left out where there is none, as before there was such a thing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<std::num::NonZeroUsize>,
}

/// How the runs are carried out; changes no number.
#[derive(Debug, Clone, PartialEq)]
pub struct Execution {
    /// Of each run.
    pub threads: usize,
    /// Runs at a time.
    pub jobs: usize,
    pub checkpoint_steps: u64,
    /// Where trained versions are kept.
    pub work: PathBuf,
    /// Where the results are written after each run.
    pub results: PathBuf,
}

/// What is told while the runs go on.
pub trait Progress: Sync {
    /// So many more steps are done, of all that [`total_steps`] counts.
    fn steps(&self, more: u64);

    fn finished(&self, run: &RunResult);
}

/// Everything that a benchmark does.
pub struct Bench<'a> {
    pub stream: &'a Stream,
    pub settings: &'a Settings,
    pub methods: &'a [BenchMethod],
    pub seeds: &'a [u64],
    pub execution: &'a Execution,
}

impl Bench<'_> {
    /// Steps of all runs, those that are done already included.
    pub fn total_steps(&self) -> u64 {
        self.seeds.len() as u64 * self.methods.iter().map(|method| self.steps_of(method)).sum::<u64>()
    }

    fn steps_of(&self, method: &BenchMethod) -> u64 {
        match method.kind {
            Kind::Random => 0,
            Kind::Sequential(_) | Kind::Replay { .. } => self.all_periods_steps(),
            Kind::Joint => self.settings.first_steps + self.all_periods_steps(),
        }
    }

    fn all_periods_steps(&self) -> u64 {
        let later = self.stream.periods.len() as u64 - 1;
        self.settings.first_steps + later * self.settings.optimisation.steps
    }

    /// Carries out every run that `results` does not hold. Results are written after each; `stop` ends all runs with
    /// checkpoints and [`BenchError::Stopped`].
    pub fn run(
        &self,
        mut results: Results,
        progress: &dyn Progress,
        stop: &AtomicBool,
    ) -> Result<Results, BenchError> {
        let mut waiting = VecDeque::new();
        for method in self.methods {
            for &seed in self.seeds {
                match results.find(&method.name, seed) {
                    Some(_) => progress.steps(self.steps_of(method)),
                    None => waiting.push_back((method, seed)),
                }
            }
        }
        let versions = Versions::open(self.execution.work.clone())?;
        let (waiting, shared) = (Mutex::new(waiting), Mutex::new((&mut results, None)));
        std::thread::scope(|scope| {
            for number in 0..self.execution.jobs.max(1) {
                let worker = || self.work(&waiting, &shared, &versions, (progress, stop));
                let thread = std::thread::Builder::new().name(format!("run-{number}"));
                if let Err(source) = thread.spawn_scoped(scope, worker) {
                    stop.store(true, Ordering::Relaxed);
                    record(&shared, file_error("starting a thread for", &self.execution.work)(source));
                }
            }
        });
        match shared.into_inner().unwrap_or_else(PoisonError::into_inner).1 {
            Some(error) => Err(error),
            None if self.is_done(&results) => Ok(results),
            None => Err(BenchError::Stopped),
        }
    }

    fn is_done(&self, results: &Results) -> bool {
        let done =
            |method: &BenchMethod| self.seeds.iter().all(|seed| results.find(&method.name, *seed).is_some());
        self.methods.iter().all(done)
    }

    /// Takes runs until there are none, on a pool of its own.
    fn work(
        &self,
        waiting: &Mutex<VecDeque<(&BenchMethod, u64)>>,
        shared: &Mutex<(&mut Results, Option<BenchError>)>,
        versions: &Versions,
        (progress, stop): (&dyn Progress, &AtomicBool),
    ) {
        let pool = match rayon::ThreadPoolBuilder::new().num_threads(self.execution.threads).build() {
            Ok(pool) => pool,
            Err(error) => return record(shared, error.into()),
        };
        while !stop.load(Ordering::Relaxed) {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((method, seed)) = next else { return };
            let one = OneRun { bench: self, method, seed, versions, progress, stop };
            let ended = pool.install(|| one.run()).and_then(|run| {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.0.runs.push(run.clone());
                shared.0.runs.sort_by_key(|run| (self.place(&run.method), run.seed));
                shared.0.write(&self.execution.results)?;
                Ok(run)
            });
            match ended {
                Ok(run) => progress.finished(&run),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    return record(shared, error);
                }
            }
        }
    }

    /// Methods that were not asked for this time come last.
    fn place(&self, method: &str) -> usize {
        self.methods.iter().position(|asked| asked.name == method).unwrap_or(usize::MAX)
    }
}

/// Keeps the first error that is one: the others stopped because of it.
fn record(shared: &Mutex<(&mut Results, Option<BenchError>)>, error: BenchError) {
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if !matches!(error, BenchError::Stopped) && shared.1.is_none() {
        shared.1 = Some(error);
    }
}

struct OneRun<'a> {
    bench: &'a Bench<'a>,
    method: &'a BenchMethod,
    seed: u64,
    versions: &'a Versions,
    progress: &'a dyn Progress,
    stop: &'a AtomicBool,
}

/// Frames that a version learns from.
struct Learned {
    /// Tells them from all others of the stream.
    text: String,
    frames: Arc<FrameSet>,
    train: Vec<usize>,
}

/// What the earlier versions made of each period that one of them learned.
type Seen = Vec<Earlier>;

impl OneRun<'_> {
    fn run(&self) -> Result<RunResult, BenchError> {
        let versions = match self.method.kind {
            Kind::Random => vec![self.random()?],
            Kind::Joint => self.joint()?,
            Kind::Sequential(distil) => self.in_turn(distil, 0)?,
            Kind::Replay { frames } => self.in_turn(Method::Finetune, frames)?,
        };
        Ok(RunResult { method: self.method.name.clone(), seed: self.seed, versions })
    }

    fn periods(&self) -> &[Period] {
        &self.bench.stream.periods
    }

    /// What the first period's training starts from, on every period.
    fn random(&self) -> Result<VersionResult, BenchError> {
        let initial = Network::initialise(&self.bench.settings.model, self.period_seed(0), None, COMPUTE);
        let initial = initial.and_then(|network| network.to_bytes());
        let network = initial.map_err(|source| self.train_error(0, None)(source.into()))?;
        let untrained = Trained { network, steps: 0, seconds: 0.0 };
        self.measured(&untrained, self.periods().len(), &mut Seen::new())
    }

    /// The periods one after the other; `replayed` frames of the earlier ones are learned again.
    fn in_turn(&self, distil: Method, replayed: usize) -> Result<Vec<VersionResult>, BenchError> {
        let (mut results, mut seen, mut teacher) = (Vec::new(), Seen::new(), None::<NetworkBytes>);
        for index in 0..self.periods().len() {
            let learned = self.learned(index, replayed)?;
            let steps = self.steps(index);
            let trained = self.trained(index, learned, (teacher.as_ref(), distil), steps)?;
            results.push(self.measured(&trained, index + 1, &mut seen)?);
            teacher = Some(trained.network);
        }
        Ok(results)
    }

    /// The first period as the other methods learn it, so that there is something to compare with, then all together.
    fn joint(&self) -> Result<Vec<VersionResult>, BenchError> {
        let mut seen = Seen::new();
        let first = self.trained(0, self.learned(0, 0)?, (None, Method::Finetune), self.steps(0))?;
        let first = self.measured(&first, 1, &mut seen)?;
        let parts: Vec<(usize, Vec<usize>)> =
            self.periods().iter().map(Period::trained).enumerate().collect();
        let learned = self.union("all periods".to_owned(), &parts)?;
        let steps = self.bench.all_periods_steps();
        let all = self.trained(0, learned, (None, Method::Finetune), steps)?;
        Ok(vec![first, self.measured(&all, self.periods().len(), &mut seen)?])
    }

    fn steps(&self, index: usize) -> u64 {
        if index == 0 { self.bench.settings.first_steps } else { self.bench.settings.optimisation.steps }
    }

    /// The period's own frames, and `replayed` of the earlier ones, equally many of each.
    fn learned(&self, index: usize, replayed: usize) -> Result<Learned, BenchError> {
        let period = &self.periods()[index];
        if index == 0 || replayed == 0 {
            let frames = Arc::clone(&period.frames);
            return Ok(Learned { text: format!("period {index}"), frames, train: period.trained() });
        }
        let mut parts = vec![(index, period.trained())];
        for earlier in 0..index {
            let all = self.periods()[earlier].train;
            let kept = permutation(self.period_seed(earlier), Domain::Order, 0, all as u32);
            let share = (replayed / index).min(all);
            parts.push((earlier, kept.iter().take(share).map(|frame| *frame as usize).collect()));
        }
        self.union(format!("period {index} and {replayed} frames of the earlier ones"), &parts)
    }

    /// The named frames of the named periods.
    fn union(&self, text: String, parts: &[(usize, Vec<usize>)]) -> Result<Learned, BenchError> {
        let temporary = std::env::temp_dir();
        let error = |source| file_error("a scratch file in", &temporary)(source);
        let mut writer = FrameSetWriter::create(&temporary).map_err(error)?;
        for (index, frames) in parts {
            let period = &self.periods()[*index].frames;
            for &frame in frames {
                let bytes = period.bytes(frame).map_err(error)?;
                writer.push(period.meta(frame).clone(), &bytes).map_err(error)?;
            }
        }
        let frames = Arc::new(writer.finish().map_err(error)?);
        Ok(Learned { text, train: (0..frames.len()).collect(), frames })
    }

    fn trained(
        &self,
        index: usize,
        learned: Learned,
        (teacher, distil): (Option<&NetworkBytes>, Method),
        steps: u64,
    ) -> Result<Trained, BenchError> {
        let job = self.job(index, (teacher, distil), steps);
        let frames = Arc::clone(&learned.frames);
        let task = Task {
            job: &job,
            digest: &self.bench.stream.digest,
            frames_text: learned.text,
            frames: learned.frames,
            train: learned.train,
            teacher,
        };
        let mut watch = RunWatch { run: self, done: 0 };
        self.versions.get(&task, &mut watch).map_err(|error| match error {
            VersionError::Train(TrainError::Interrupted { .. }) => BenchError::Stopped,
            VersionError::Train(source) => self.train_error(index, Some(&frames))(source),
            VersionError::File { path, source } => {
                BenchError::File { what: "a version's file", path, source }
            }
        })
    }

    /// The scores on the first `known` periods; the last of them joins what was `seen`.
    fn measured(
        &self,
        trained: &Trained,
        known: usize,
        seen: &mut Seen,
    ) -> Result<VersionResult, BenchError> {
        let Settings { model, optimisation, augmentation, composition, k, .. } = self.bench.settings;
        // The settings', whatever a method trains by: all are measured alike.
        let duplicate_distance = composition.duplicate_distance;
        let measure = Measure { model, optimisation, augmentation, duplicate_distance, k: *k };
        let network =
            measure.network(&trained.network).map_err(|source| self.train_error(known - 1, None)(source))?;
        let mut scores: Vec<Scores> = Vec::new();
        for (index, period) in self.periods().iter().enumerate().take(known) {
            let measured = measure.measure(&network, (index, period), seen.get(index));
            let (of_period, embeddings) =
                measured.map_err(|source| self.train_error(index, Some(&period.frames))(source))?;
            scores.push(of_period);
            match seen.get_mut(index) {
                Some(earlier) => earlier.parent = Some(embeddings),
                None => seen.push(Earlier { learned: embeddings, parent: None }),
            }
        }
        Ok(VersionResult { steps: trained.steps, seconds: trained.seconds, scores })
    }

    /// As the daemon's: the first period has no teacher and nothing to hold to.
    fn job(&self, index: usize, (teacher, distil): (Option<&NetworkBytes>, Method), steps: u64) -> TrainJob {
        let Settings { model, optimisation, augmentation, k, device, precision, micro_batch, .. } =
            self.bench.settings;
        let mut optimisation = Optimisation { steps, ..optimisation.clone() };
        if let (Some(_), Some(own)) = (teacher, self.method.learning_rate) {
            optimisation.learning_rate = own;
        }
        let file = |bytes: &[u8]| FileRef {
            path: String::new(),
            sha256: Sha256::of(bytes),
            bytes: bytes.len() as u64,
        };
        let recipe = Recipe {
            period: period_id(index),
            period_end: EventTime(index as i64 + 1),
            seed: self.period_seed(index),
            segments: Vec::new(),
            max_frames: u64::MAX,
            model: model.clone(),
            teacher: teacher.map(|bytes| Teacher {
                version: Version(index as u64),
                encoder: file(&bytes.encoder),
                projector: file(&bytes.projector),
            }),
            method: if teacher.is_some() { distil } else { Method::Finetune },
            teacher_share: if teacher.is_some() { self.method.teacher_share } else { 0.0 },
            optimisation,
            augmentation: augmentation.clone(),
            composition: self.composition(),
            probe: ProbeSpec { block_ms: 1, guard_ms: 0, ratio: 0.5, max_frames: 0, k: *k, bootstrap: 0 },
            probe_sets: Vec::new(),
        };
        let Execution { threads, checkpoint_steps, .. } = self.bench.execution;
        TrainJob {
            schema: SCHEMA,
            pipeline: "benchmark".into(),
            attempt: 1,
            start: 1,
            output_prefix: String::new(),
            earlier_prefixes: Vec::new(),
            device: device.clone(),
            precision: *precision,
            micro_batch: *micro_batch,
            threads: *threads,
            checkpoint_steps: *checkpoint_steps,
            recipe,
        }
    }

    fn composition(&self) -> Composition {
        let Composition { spacing_ms, max_copies, duplicate_distance } = self.bench.settings.composition;
        Composition {
            spacing_ms: self.method.spacing_ms.unwrap_or(spacing_ms),
            max_copies,
            duplicate_distance: self.method.duplicate_distance.unwrap_or(duplicate_distance),
        }
    }

    /// Another one for each period of each seed; the same for all methods.
    fn period_seed(&self, index: usize) -> u64 {
        (self.seed << 16) + index as u64
    }

    fn train_error<'b>(
        &'b self,
        index: usize,
        frames: Option<&'b Arc<FrameSet>>,
    ) -> impl FnOnce(TrainError) -> BenchError + 'b {
        move |source| {
            let path = frame_of(&source).zip(frames).map(|(frame, frames)| path_of(frames.meta(frame)));
            BenchError::Train {
                method: self.method.name.clone(),
                seed: self.seed,
                period: self.periods()[index].name.clone(),
                frame: path.map_or_else(String::new, |path| format!("{path}: ")),
                source: Box::new(source),
            }
        }
    }
}

struct RunWatch<'a> {
    run: &'a OneRun<'a>,
    done: u64,
}

impl Watch for RunWatch<'_> {
    fn steps(&mut self, done: u64) {
        self.run.progress.steps(done.saturating_sub(self.done));
        self.done = done;
    }

    fn should_stop(&self) -> bool {
        self.run.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
