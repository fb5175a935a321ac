//! Which frames each step trains on, and the making of their views ahead of the training loop.
//!
//! An epoch is a keyed permutation of all training frames (never the order of arrival), its last partial batch is dropped, and a batch
//! is a pure function of (seed, step): nothing here has a state to save, and neither the number of worker threads
//! nor a resume changes a batch. Frames of one stream within one span of time, a scene, look alike and would be false negatives of
//! each other: they are dealt out to different batches, so that no batch has two where the epoch has batches enough. What is alike in a
//! batch all the same, by its [`Thumbnail`], is named. [`Picker::pick`] is the one place that chooses frames. What is done with
//! a batch is the job's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::model::preprocess::{MAX_PIXELS, PreprocessError, Preprocessing, RgbFrame, Scaler};

use super::augment::{Scratch, augmented_view};
use super::frames::{FrameMeta, FrameSet};
use super::likeness::{Thumbnail, alike};
use super::rng::{Domain, Draws, Place, permutation};
use super::spec::{Augmentation, Composition, Optimisation};

/// Finished batches that wait for the training loop. One hides a slow batch; more only cost memory
/// (a batch of 256 frames at 224 x 224 has 308 MB).
const BATCHES_AHEAD: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    #[error("{frames} training frames do not fill one batch of {batch}")]
    TooFewFrames { frames: usize, batch: usize },
    #[error("{what} is {value}, which is more than the {limit} that random numbers are keyed for")]
    TooMany { what: &'static str, value: u64, limit: u64 },
    #[error("frame {frame} could not be read: {source}")]
    Read { frame: usize, source: std::io::Error },
    #[error("frame {frame} has no view: {source}")]
    Image { frame: usize, source: PreprocessError },
    #[error("the worker threads could not be started: {0}")]
    Workers(String),
    #[error("the batch thread ended before its last batch")]
    Ended,
}

/// Which frames there are to train on and for how long.
#[derive(Debug, Clone)]
pub struct BatchPlan {
    seed: u64,
    /// Indices into the frame set.
    frames: Arc<[usize]>,
    /// The scene of each frame.
    scenes: Arc<[Scene]>,
    duplicate_distance: f64,
    batch: usize,
    steps: u64,
}

/// Number of a stream's span of time; `None` where a frame has it to itself.
type Scene = Option<u32>;

impl BatchPlan {
    /// `frames` are indices into a set with `metas`. Steps are the budget, or the whole batches of `max_epochs` epochs where those
    /// are fewer.
    pub fn new(
        seed: u64,
        (frames, metas): (&[usize], &[FrameMeta]),
        budget: &Optimisation,
        composition: &Composition,
    ) -> Result<Self, BatchError> {
        let batches_an_epoch = frames.len() / budget.batch.max(1);
        if batches_an_epoch == 0 || budget.batch == 0 {
            return Err(BatchError::TooFewFrames { frames: frames.len(), batch: budget.batch });
        }
        let largest = frames.iter().max().copied().unwrap_or(0);
        keyed("the number of frames", largest as u64)?;
        let steps = (budget.max_epochs.saturating_mul(batches_an_epoch as u64)).min(budget.steps);
        keyed("the number of steps", steps)?;
        Ok(Self {
            seed,
            scenes: scenes(frames.iter().map(|frame| &metas[*frame]), composition.spacing_ms).into(),
            frames: frames.into(),
            duplicate_distance: composition.duplicate_distance,
            batch: budget.batch,
            steps,
        })
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn picker(&self) -> Picker {
        Picker { plan: self.clone(), epoch: None }
    }

    /// Positions in `frames`, batch after batch. Frames of one scene are dealt out one by one to batches in turn, so that no batch has
    /// more of them than must be; those without a scene fill the batches up.
    fn order(&self, epoch: u32) -> Vec<u32> {
        let batches = self.frames.len() / self.batch;
        let mut kept = permutation(self.seed, Domain::Order, epoch, self.frames.len() as u32);
        kept.truncate(batches * self.batch);
        let (mut shared, single): (Vec<u32>, Vec<u32>) =
            kept.into_iter().partition(|position| self.scenes[*position as usize].is_some());
        if shared.is_empty() {
            return single;
        }
        // Scene after scene, each at the place of its first frame.
        let mut places: HashMap<Scene, usize> = HashMap::new();
        for (place, position) in shared.iter().enumerate() {
            places.entry(self.scenes[*position as usize]).or_insert(place);
        }
        shared.sort_by_key(|position| places[&self.scenes[*position as usize]]);
        let mut dealt: Vec<Vec<u32>> = vec![Vec::with_capacity(self.batch); batches];
        // In an order of their own, or a scene's frames would be met in steps that follow each other.
        let turns = permutation(self.seed, Domain::Turns, epoch, batches as u32);
        for (turn, position) in turns.iter().cycle().zip(shared) {
            dealt[*turn as usize].push(position);
        }
        let mut single = single.into_iter();
        for batch in &mut dealt {
            batch.extend(single.by_ref().take(self.batch - batch.len()));
        }
        dealt.concat()
    }
}

/// Scenes of `spacing_ms`; without a length every frame is one of its own.
fn scenes<'a>(metas: impl Iterator<Item = &'a FrameMeta> + Clone, spacing_ms: i64) -> Vec<Scene> {
    if spacing_ms <= 0 {
        return metas.map(|_| None).collect();
    }
    let scene = |meta: &'a FrameMeta| (&*meta.stream_id, meta.captured_at.as_ms().div_euclid(spacing_ms));
    // Number and frames of each, numbered as they are met.
    let mut known: HashMap<(&str, i64), (u32, usize)> = HashMap::new();
    for meta in metas.clone() {
        let number = known.len() as u32;
        known.entry(scene(meta)).or_insert((number, 0)).1 += 1;
    }
    metas
        .map(|meta| known.get(&scene(meta)).filter(|(_, frames)| *frames > 1).map(|(number, _)| *number))
        .collect()
}

fn keyed(what: &'static str, value: u64) -> Result<(), BatchError> {
    let limit = u64::from(u32::MAX);
    if value > limit {
        return Err(BatchError::TooMany { what, value, limit });
    }
    Ok(())
}

/// Picks the frames of any step; remembers the last epoch's order, so that steps in a row are cheap.
struct Picker {
    plan: BatchPlan,
    epoch: Option<(u64, Vec<u32>)>,
}

impl Picker {
    /// Indices into the frame set, `batch` of them.
    fn pick(&mut self, step: u64) -> Vec<usize> {
        let plan = &self.plan;
        let batches_an_epoch = (plan.frames.len() / plan.batch) as u64;
        let (epoch, within) = (step / batches_an_epoch, step % batches_an_epoch);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, plan.order(epoch as u32)));
        }
        let order = self.epoch.iter().flat_map(|(_, order)| order);
        order
            .skip(within as usize * plan.batch)
            .take(plan.batch)
            .map(|position| plan.frames[*position as usize])
            .collect()
    }
}

/// What one thread needs to make views; it goes with the batch, or one huge frame would be paid for to the end.
#[derive(Default)]
struct Memory {
    decoded: RgbFrame,
    scratch: Scratch,
    scaler: Scaler,
}

/// Makes pairs of augmented views of frames.
#[derive(Debug, Clone)]
pub struct ViewMaker {
    pub frames: Arc<FrameSet>,
    pub augmentation: Augmentation,
    pub preprocessing: Preprocessing,
    pub seed: u64,
}

impl ViewMaker {
    /// `[2 * indices.len(), 3, size, size]`: the first views of all frames, then the second ones; and the thumbnails of the frames
    /// themselves. Runs on the thread pool it is called in; the result does not depend on it.
    pub fn pairs(
        &self,
        domain: Domain,
        step: u64,
        indices: &[usize],
    ) -> Result<(Vec<f32>, Vec<Thumbnail>), BatchError> {
        let view_len = self.preprocessing.view_len();
        let mut views = vec![0f32; 2 * indices.len() * view_len];
        let (first, second) = views.split_at_mut(indices.len() * view_len);
        let thumbnails = first
            .par_chunks_exact_mut(view_len)
            .zip(second.par_chunks_exact_mut(view_len))
            .zip(indices)
            .map_init(Memory::default, |memory, ((first, second), frame)| {
                let place = Place { domain, step: step as u32, frame: *frame as u32, view: 0 };
                self.pair(place, memory, [first, second])
            })
            .collect::<Result<Vec<Thumbnail>, BatchError>>()?;
        Ok((views, thumbnails))
    }

    /// Both views of `place.frame`.
    fn pair(&self, place: Place, memory: &mut Memory, out: [&mut [f32]; 2]) -> Result<Thumbnail, BatchError> {
        let frame = place.frame as usize;
        let read = |source| BatchError::Read { frame, source };
        let image = |source| BatchError::Image { frame, source };
        let bytes = self.frames.bytes(frame).map_err(read)?;
        let Memory { decoded, scratch, scaler } = memory;
        decoded.decode(&bytes, MAX_PIXELS).map_err(image)?;
        for (view, out) in (0..).zip(out) {
            let mut draws = Draws::new(self.seed, Place { view, ..place });
            let (parameters, preprocessing) = (&self.augmentation, &self.preprocessing);
            augmented_view(decoded, parameters, preprocessing, &mut draws, scratch, out).map_err(image)?;
        }
        Thumbnail::of(decoded, scaler).map_err(image)
    }
}

/// The views of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub step: u64,
    /// `[2 * batch, 3, size, size]`: the first views of all frames, then the second ones.
    pub views: Vec<f32>,
    /// Positions of frames that are alike, each pair once.
    pub same: Vec<(usize, usize)>,
}

/// The batches of a plan from one step on, in order, made on other threads than the caller's.
pub struct Batches {
    /// `None` only while dropping.
    ready: Option<Receiver<Result<Batch, BatchError>>>,
    feeder: Option<JoinHandle<()>>,
}

impl Batches {
    /// Starts `workers` threads that decode and augment: as many as compute, with the same right to the cores. With
    /// fewer, or at a lower priority, steps were measured to wait for large frames and to be no shorter otherwise.
    pub fn start(
        plan: &BatchPlan,
        maker: ViewMaker,
        first_step: u64,
        workers: usize,
    ) -> Result<Self, BatchError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(workers.max(1))
            .thread_name(|i| format!("augment-{i}"))
            .build()
            .map_err(|e| BatchError::Workers(e.to_string()))?;
        let (sender, ready) = sync_channel(BATCHES_AHEAD);
        let picker = plan.picker();
        let feeder = std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || feed(&pool, picker, &maker, first_step, &sender))
            .map_err(|e| BatchError::Workers(e.to_string()))?;
        Ok(Self { ready: Some(ready), feeder: Some(feeder) })
    }

    /// The next batch; waits for it. After the plan's last one it is an error.
    pub fn next_batch(&mut self) -> Result<Batch, BatchError> {
        let ready = self.ready.as_ref().ok_or(BatchError::Ended)?;
        ready.recv().map_err(|_| BatchError::Ended)?
    }
}

/// Makes batch after batch until the plan's end, the first error, or nobody waits for them any more.
fn feed(
    pool: &rayon::ThreadPool,
    mut picker: Picker,
    maker: &ViewMaker,
    first_step: u64,
    sender: &SyncSender<Result<Batch, BatchError>>,
) {
    for step in first_step..picker.plan.steps {
        let frames = picker.pick(step);
        let made = pool.install(|| maker.pairs(Domain::Augmentation, step, &frames));
        let failed = made.is_err();
        let limit = picker.plan.duplicate_distance;
        let batch = |(views, thumbnails): (_, Vec<_>)| Batch { step, views, same: alike(&thumbnails, limit) };
        let sent = sender.send(made.map(batch));
        if failed || sent.is_err() {
            return;
        }
    }
}

impl Drop for Batches {
    /// Nobody waits any more: the feeder ends at its next batch, and is waited for.
    fn drop(&mut self) {
        drop(self.ready.take());
        if let Some(feeder) = self.feeder.take()
            && feeder.join().is_err()
        {
            tracing::error!("the batch thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::fixtures;
    use crate::train::frames::FrameSetWriter;
    use crate::types::EventTime;
    use proptest::prelude::*;

    fn budget(batch: usize, steps: u64, max_epochs: u64) -> Optimisation {
        Optimisation { batch, steps, max_epochs, ..fixtures::optimisation() }
    }

    fn maker(frames: usize) -> ViewMaker {
        ViewMaker {
            frames: Arc::new(fixtures::frames(frames)),
            augmentation: fixtures::augmentation(),
            preprocessing: fixtures::preprocessing(),
            seed: 5,
        }
    }

    /// Of all frames of a set.
    fn plan(
        seed: u64,
        frames: &FrameSet,
        budget: &Optimisation,
        composition: &Composition,
    ) -> Result<BatchPlan, BatchError> {
        let all: Vec<usize> = (0..frames.len()).collect();
        BatchPlan::new(seed, (&all, frames.metas()), budget, composition)
    }

    fn views(workers: usize, first_step: u64) -> Vec<Batch> {
        let maker = maker(16);
        let plan = plan(5, &maker.frames, &budget(6, 5, 9), &Composition::AS_THEY_COME).unwrap();
        let mut batches = Batches::start(&plan, maker, first_step, workers).unwrap();
        let all = (first_step..plan.steps()).map(|_| batches.next_batch().unwrap()).collect();
        assert!(matches!(batches.next_batch(), Err(BatchError::Ended)));
        all
    }

    #[test]
    fn a_batch_is_the_same_whatever_the_thread_count_and_the_first_step() {
        let one = views(1, 0);
        assert_eq!(one.len(), 5);
        assert_eq!(one, views(3, 0));
        assert_eq!(one[3..], views(2, 3));
        assert_ne!(one[0].views, one[1].views);
    }

    #[test]
    fn steps_are_the_budget_or_the_epochs_whichever_is_less() {
        let frames = fixtures::frames(100);
        let steps = |budget| plan(1, &frames, &budget, &Composition::AS_THEY_COME).map(|plan| plan.steps());
        assert_eq!(steps(budget(32, 1_000, 4)).unwrap(), 12);
        assert_eq!(steps(budget(32, 10, 4)).unwrap(), 10);
        assert!(matches!(
            steps(budget(101, 10, 4)),
            Err(BatchError::TooFewFrames { frames: 100, batch: 101 })
        ));
        assert!(matches!(steps(budget(1, 1 << 33, 1 << 40)), Err(BatchError::TooMany { .. })));
    }

    #[test]
    fn a_frame_that_cannot_be_decoded_is_named() {
        let mut maker = maker(4);
        maker.frames = Arc::new(fixtures::frames_with_a_broken_one(4, 2));
        let plan = plan(5, &maker.frames, &budget(4, 1, 1), &Composition::AS_THEY_COME).unwrap();
        let mut batches = Batches::start(&plan, maker, 0, 2).unwrap();
        let error = batches.next_batch().unwrap_err();
        assert!(matches!(error, BatchError::Image { frame: 2, .. }), "{error}");
    }

    #[test]
    fn batches_that_nobody_takes_end_their_thread() {
        let maker = maker(16);
        let plan = plan(5, &maker.frames, &budget(4, 1_000, 1_000), &Composition::AS_THEY_COME).unwrap();
        drop(Batches::start(&plan, maker, 0, 1).unwrap());
    }

    /// Frames of the given streams and times, with no pixels.
    fn metas(captured: &[(u8, i64)]) -> Vec<FrameMeta> {
        let meta = |(offset, (stream, at)): (usize, &(u8, i64))| FrameMeta {
            stream_id: format!("stream-{stream}").into(),
            captured_at: EventTime(*at),
            label: None,
            topic: "frames".into(),
            partition: 0,
            offset: offset as i64,
            row: 0,
        };
        captured.iter().enumerate().map(meta).collect()
    }

    const SPACED: Composition = Composition { spacing_ms: 30_000, ..Composition::AS_THEY_COME };

    /// Of each batch of an epoch, how many frames of one scene of 30 s it has at most.
    fn most_of_a_scene(metas: &[FrameMeta], batch: usize, composition: &Composition) -> Vec<usize> {
        let frames: Vec<usize> = (0..metas.len()).collect();
        let plan = BatchPlan::new(3, (&frames, metas), &budget(batch, 1_000, 1_000), composition).unwrap();
        let mut picker = plan.picker();
        let most = |step| {
            let mut scenes: HashMap<(&str, i64), usize> = HashMap::new();
            for frame in picker.pick(step) {
                let meta = &metas[frame];
                *scenes.entry((&meta.stream_id, meta.captured_at.as_ms() / 30_000)).or_default() += 1;
            }
            scenes.into_values().max().unwrap_or(0)
        };
        (0..(metas.len() / batch) as u64).map(most).collect()
    }

    #[test]
    fn a_batch_takes_one_frame_of_a_stream_in_30_s_where_there_are_streams_enough() {
        // Twenty streams, a frame each second for ten seconds: as they come, a batch of 16 would have several of one.
        let captured: Vec<(u8, i64)> =
            (0..20).flat_map(|stream| (0..10).map(move |s| (stream, s * 1000))).collect();
        let metas = metas(&captured);
        assert_eq!(most_of_a_scene(&metas, 16, &SPACED), [1; 12]);
        assert!(most_of_a_scene(&metas, 16, &Composition::AS_THEY_COME).iter().any(|most| *most > 1));
        // Of four streams a batch of 20 needs five frames each, and takes no more.
        assert_eq!(most_of_a_scene(&metas[..40], 20, &SPACED), [5; 2]);
    }

    #[test]
    fn frames_that_are_alike_are_named_in_their_batch() {
        let mut writer = FrameSetWriter::create(&std::env::temp_dir()).unwrap();
        for (index, picture) in [0, 1, 2, 1].into_iter().enumerate() {
            writer.push(metas(&[(index as u8, 0)]).remove(0), &fixtures::picture(picture)).unwrap();
        }
        let maker = ViewMaker { frames: Arc::new(writer.finish().unwrap()), ..maker(1) };
        let plan = plan(5, &maker.frames, &budget(4, 3, 9), &Composition::AS_THEY_COME).unwrap();
        let mut picker = plan.picker();
        let mut batches = Batches::start(&plan, maker, 0, 1).unwrap();
        for step in 0..3 {
            let frames = picker.pick(step);
            let place = |frame| frames.iter().position(|f| *f == frame).unwrap();
            let pair = (place(1).min(place(3)), place(1).max(place(3)));
            assert_eq!(batches.next_batch().unwrap().same, [pair]);
        }
    }

    proptest! {
        #[test]
        fn an_epoch_takes_each_frame_at_most_once_and_spreads_its_scenes(
            len in 1usize..80, batch in 1usize..20, streams in 1usize..20, seed: u64,
        ) {
            prop_assume!(batch <= len);
            let frames: Vec<usize> = (0..len).map(|i| 3 * i).collect();
            let captured: Vec<(u8, i64)> = (0..3 * len).map(|i| ((i % streams) as u8, i as i64 * 7_000)).collect();
            let (metas, budget) = (metas(&captured), budget(batch, 1_000, 1_000));
            let plan = BatchPlan::new(seed, (&frames, &metas), &budget, &SPACED).unwrap();
            let scenes = plan.scenes.clone();
            let mut picker = plan.picker();
            let an_epoch = len / batch;
            for epoch in [0, 2, 1] {
                let batches: Vec<Vec<usize>> =
                    (0..an_epoch).map(|within| picker.pick((epoch * an_epoch + within) as u64)).collect();
                let of_scene = |frames: &[usize], scene| {
                    frames.iter().filter(|frame| scenes[**frame / 3] == scene).count()
                };
                for scene in scenes.iter().filter(|scene| scene.is_some()) {
                    let all: usize = batches.iter().map(|frames| of_scene(frames, *scene)).sum();
                    let most = all.div_ceil(an_epoch);
                    prop_assert!(batches.iter().all(|frames| of_scene(frames, *scene) <= most));
                }
                prop_assert!(batches.iter().all(|frames| frames.len() == batch));
                let mut seen = batches.concat();
                prop_assert_eq!(seen.len(), an_epoch * batch);
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen.len(), an_epoch * batch);
                prop_assert!(seen.iter().all(|frame| frames.contains(frame)));
            }
        }
    }
}
