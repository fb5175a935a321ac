//! Which frames each step trains on, and the making of their views ahead of the training loop.
//!
//! An epoch is a keyed permutation of all training frames, its last partial batch is dropped, and a batch is a
//! pure function of (seed, step): nothing here has a state to save, and neither the number of worker threads
//! nor a resume changes a batch. [`Picker::pick`] is the one place that chooses frames. What is done with a
//! batch is the job's.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::model::preprocess::{MAX_PIXELS, PreprocessError, Preprocessing, RgbFrame};

use super::augment::{Scratch, augmented_view};
use super::frames::FrameSet;
use super::rng::{Domain, Draws, Place, permutation};
use super::spec::{Augmentation, Optimisation};

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
    batch: usize,
    steps: u64,
}

impl BatchPlan {
    /// Steps are the budget, or the whole batches of `max_epochs` epochs where those are fewer.
    pub fn new(seed: u64, frames: &[usize], budget: &Optimisation) -> Result<Self, BatchError> {
        let batches_an_epoch = frames.len() / budget.batch.max(1);
        if batches_an_epoch == 0 || budget.batch == 0 {
            return Err(BatchError::TooFewFrames { frames: frames.len(), batch: budget.batch });
        }
        let largest = frames.iter().max().copied().unwrap_or(0);
        keyed("the number of frames", largest as u64)?;
        let steps = (budget.max_epochs.saturating_mul(batches_an_epoch as u64)).min(budget.steps);
        keyed("the number of steps", steps)?;
        Ok(Self { seed, frames: frames.into(), batch: budget.batch, steps })
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn picker(&self) -> Picker {
        Picker { plan: self.clone(), epoch: None }
    }
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
            let order = permutation(plan.seed, epoch as u32, plan.frames.len() as u32);
            self.epoch = Some((epoch, order));
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
    /// `[2 * indices.len(), 3, size, size]`: the first views of all frames, then the second ones. Runs on the
    /// thread pool it is called in; the result does not depend on it.
    pub fn pairs(&self, domain: Domain, step: u64, indices: &[usize]) -> Result<Vec<f32>, BatchError> {
        let view_len = self.preprocessing.view_len();
        let mut views = vec![0f32; 2 * indices.len() * view_len];
        let (first, second) = views.split_at_mut(indices.len() * view_len);
        first
            .par_chunks_exact_mut(view_len)
            .zip(second.par_chunks_exact_mut(view_len))
            .zip(indices)
            .try_for_each_init(Memory::default, |memory, ((first, second), frame)| {
                let place = Place { domain, step: step as u32, frame: *frame as u32, view: 0 };
                self.pair(place, memory, [first, second])
            })?;
        Ok(views)
    }

    /// Both views of `place.frame`.
    fn pair(&self, place: Place, memory: &mut Memory, out: [&mut [f32]; 2]) -> Result<(), BatchError> {
        let frame = place.frame as usize;
        let read = |source| BatchError::Read { frame, source };
        let image = |source| BatchError::Image { frame, source };
        let bytes = self.frames.bytes(frame).map_err(read)?;
        let Memory { decoded, scratch } = memory;
        decoded.decode(&bytes, MAX_PIXELS).map_err(image)?;
        for (view, out) in (0..).zip(out) {
            let mut draws = Draws::new(self.seed, Place { view, ..place });
            let (parameters, preprocessing) = (&self.augmentation, &self.preprocessing);
            augmented_view(decoded, parameters, preprocessing, &mut draws, scratch, out).map_err(image)?;
        }
        Ok(())
    }
}

/// The views of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub step: u64,
    /// `[2 * batch, 3, size, size]`: the first views of all frames, then the second ones.
    pub views: Vec<f32>,
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
        let views = pool.install(|| maker.pairs(Domain::Augmentation, step, &frames));
        let failed = views.is_err();
        let sent = sender.send(views.map(|views| Batch { step, views }));
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

    fn views(workers: usize, first_step: u64) -> Vec<Batch> {
        let plan = BatchPlan::new(5, &(0..16).collect::<Vec<_>>(), &budget(6, 5, 9)).unwrap();
        let mut batches = Batches::start(&plan, maker(16), first_step, workers).unwrap();
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
        let frames: Vec<usize> = (0..100).collect();
        let steps = |budget| BatchPlan::new(1, &frames, &budget).map(|plan| plan.steps());
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
        let plan = BatchPlan::new(5, &[0, 1, 2, 3], &budget(4, 1, 1)).unwrap();
        let mut batches = Batches::start(&plan, maker, 0, 2).unwrap();
        let error = batches.next_batch().unwrap_err();
        assert!(matches!(error, BatchError::Image { frame: 2, .. }), "{error}");
    }

    #[test]
    fn batches_that_nobody_takes_end_their_thread() {
        let plan = BatchPlan::new(5, &(0..16).collect::<Vec<_>>(), &budget(4, 1_000, 1_000)).unwrap();
        drop(Batches::start(&plan, maker(16), 0, 1).unwrap());
    }

    proptest! {
        #[test]
        fn an_epoch_takes_each_frame_at_most_once(len in 1usize..80, batch in 1usize..20, seed: u64) {
            prop_assume!(batch <= len);
            let frames: Vec<usize> = (0..len).map(|i| 3 * i).collect();
            let mut picker = BatchPlan::new(seed, &frames, &budget(batch, 1_000, 1_000)).unwrap().picker();
            let an_epoch = len / batch;
            for epoch in [0, 2, 1] {
                let steps = (0..an_epoch).map(|within| epoch * an_epoch + within);
                let mut seen: Vec<usize> = steps.flat_map(|step| picker.pick(step as u64)).collect();
                prop_assert_eq!(seen.len(), an_epoch * batch);
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen.len(), an_epoch * batch);
                prop_assert!(seen.iter().all(|frame| frames.contains(frame)));
            }
        }
    }
}
