//! What the learner does while it holds the lease: carries out what [`next_step`] decides, for every period.
//!
//! It looks at the registry, asks for each period's next step and carries it out, until every period waits; then
//! it sleeps until its training process says something or a second has passed. All that it knows it reads from
//! the registry and the store. A period that can't go on never stops the others: its failure is logged, counted
//! in its attempt, and tried again later, until it is given up.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::child::{ChildEvent, TrainingProcess};
use super::controller::{Controller, LearnError};
use super::decide::{Child, Gate, Observed, Step, next_step};
use super::{job, release, report, sweep};
use crate::eval::gate::Verdict;
use crate::failpoint;
use crate::registry::{AttemptRecord, LATEST, Lease, PeriodBounds, PeriodRecord, PeriodState, Published};
use crate::store::StoreError;
use crate::train::spec::{Outcome, Progress, SCHEMA, output};
use crate::types::{EventTime, PeriodId};

/// How often the learner looks when nothing happens. Longer: periods close later; shorter: more queries.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Looks between two sweeps of orphaned objects.
const SWEEP_EVERY_LOOKS: u64 = 300;
/// Wait after a period's first failure; each further one doubles it. Shorter: a passing trouble (a full disk, a
/// busy GPU) uses up all tries; longer: a period is late for a trouble that was over at once.
const FIRST_BACKOFF: Duration = Duration::from_secs(30);
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);

/// The time for which one lease is held. Dropping it kills the training process.
pub struct Session<'a> {
    controller: &'a Controller,
    lease: Lease,
    running: Option<Running>,
    looks: u64,
    /// When each period that failed may be tried again.
    retry_at: BTreeMap<PeriodId, Instant>,
    /// Of which version the measures were told.
    told: &'a mut report::Told,
}

/// The training process and what it is busy with.
struct Running {
    period: PeriodId,
    attempt: u32,
    process: TrainingProcess,
    phase: Child,
}

/// What one look at the registry saw.
struct World {
    periods: Vec<PeriodRecord>,
    watermark: Option<EventTime>,
}

impl<'a> Session<'a> {
    pub fn new(controller: &'a Controller, lease: Lease, told: &'a mut report::Told) -> Self {
        Self { controller, lease, running: None, looks: 0, retry_at: BTreeMap::new(), told }
    }

    /// Works until `cancel`, then lets the training process write a checkpoint.
    pub async fn work(mut self, cancel: &CancellationToken) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let done = tokio::select! {
                () = cancel.cancelled() => break,
                event = next_event(&mut self.running) => self.take(event).await,
                _ = look.tick() => self.look().await,
            };
            match done {
                Ok(()) => {}
                // The lease's renewal finds out too, and ends this session.
                Err(error) if error.is_fenced() => tracing::warn!(%error, "refused"),
                Err(error) if error.is_outage() => tracing::warn!(%error, "the learner waits"),
                Err(error) => tracing::error!(%error, "the learner could not go on; it looks again"),
            }
        }
        if let Some(running) = self.running {
            metrics::counter!(crate::metrics::TRAIN_ATTEMPTS, "outcome" => "interrupted").increment(1);
            running.process.stop(self.controller.settings.drain).await;
        }
    }

    /// Takes in what the training process said.
    async fn take(&mut self, event: std::io::Result<ChildEvent>) -> Result<(), LearnError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        match event {
            Ok(ChildEvent::Progress(progress)) => {
                report::progress(&progress, self.controller.settings.job.optimisation.batch);
                if let Some(listener) = &self.controller.listener {
                    listener(running.period, &progress);
                }
                match progress {
                    Progress::Resumed { step } => {
                        tracing::info!(period = %running.period, step, "resumed from a checkpoint");
                    }
                    Progress::Trained { .. } => {
                        running.phase = Child::Evaluating;
                        return self.look().await;
                    }
                    _ => {}
                }
                Ok(())
            }
            Ok(ChildEvent::Ended { failure }) => self.ended(failure).await,
            Err(error) => self.ended(Some(format!("the training process can't be read: {error}"))).await,
        }
    }

    async fn ended(&mut self, failure: Option<String>) -> Result<(), LearnError> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let outcome = if failure.is_some() { "failed" } else { "finished" };
        metrics::counter!(crate::metrics::TRAIN_ATTEMPTS, "outcome" => outcome).increment(1);
        if let Some(reason) = failure {
            let Running { period, attempt, .. } = running;
            tracing::error!(%period, attempt, %reason, "the training process failed");
            self.failed(period, attempt, &reason).await?;
        }
        self.look().await
    }

    /// Counts a failed try, and waits longer after each.
    async fn failed(&mut self, period: PeriodId, attempt: u32, reason: &str) -> Result<(), LearnError> {
        let registry = &self.controller.registry;
        let failures = registry.record_failure(&self.lease, period, attempt, reason).await?;
        let backoff = FIRST_BACKOFF * 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
        self.retry_at.insert(period, Instant::now() + backoff.min(LONGEST_BACKOFF));
        Ok(())
    }

    /// Carries out steps until every period waits.
    async fn look(&mut self) -> Result<(), LearnError> {
        while self.advance().await? {}
        let Controller { registry, store, paths, .. } = self.controller;
        if let Some(latest) = registry.aliases().await?.get(LATEST).copied() {
            self.told.latest(registry.as_ref(), latest).await?;
        }
        if self.looks.is_multiple_of(SWEEP_EVERY_LOOKS) {
            sweep::orphans(registry.as_ref(), store, paths).await?;
        }
        self.looks += 1;
        Ok(())
    }

    /// Carries out the first step that is not a wait, over all periods in order; false if there is none.
    async fn advance(&mut self) -> Result<bool, LearnError> {
        let registry = &self.controller.registry;
        let world = World { periods: registry.periods().await?, watermark: registry.watermark().await? };
        report::periods(&world.periods);
        for (index, record) in world.periods.iter().enumerate() {
            let is_done = matches!(record.state, PeriodState::Merged | PeriodState::Expired);
            if is_done || (!is_learning(record.state) && self.is_backing_off(record.id)) {
                continue;
            }
            let span = tracing::info_span!("period", period = %record.id);
            match self.step(&world, index).instrument(span.clone()).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) if error.is_fenced() || error.is_outage() => return Err(error),
                Err(error) => {
                    span.in_scope(|| tracing::error!(%error, "the period can't go on"));
                    self.count(record, &error).await?;
                }
            }
        }
        Ok(false)
    }

    /// A failure of the learner's own counts like one of the training process, where there is an attempt; in any
    /// case it isn't tried again at once.
    async fn count(&mut self, record: &PeriodRecord, error: &LearnError) -> Result<(), LearnError> {
        if is_learning(record.state) && record.attempt > 0 {
            return self.failed(record.id, record.attempt, &error.to_string()).await;
        }
        self.retry_at.insert(record.id, Instant::now() + FIRST_BACKOFF);
        Ok(())
    }

    fn is_backing_off(&self, period: PeriodId) -> bool {
        self.retry_at.get(&period).is_some_and(|at| Instant::now() < *at)
    }

    /// One period's next step; false if it is a wait.
    async fn step(&mut self, world: &World, index: usize) -> Result<bool, LearnError> {
        let record = &world.periods[index];
        let (observed, judged) = self.observe(world, index).await?;
        let step = next_step(record, &observed, &self.controller.settings.policy);
        if matches!(step, Step::Wait(_)) {
            return Ok(false);
        }
        self.carry_out(record, step, observed, judged).await?;
        Ok(true)
    }

    async fn observe(
        &self,
        world: &World,
        index: usize,
    ) -> Result<(Observed, Option<(Outcome, Verdict)>), LearnError> {
        let Controller { registry, settings, clock, .. } = self.controller;
        let record = &world.periods[index];
        let (earlier, later) = (&world.periods[..index], &world.periods[index + 1..]);
        let attempt = match record.attempt {
            number if number > 0 && is_learning(record.state) => {
                Some(registry.attempt(record.id, number).await?)
            }
            _ => None,
        };
        let child = match &self.running {
            Some(running) if running.period == record.id => running.phase,
            _ => Child::None,
        };
        let backing_off = self.is_backing_off(record.id);
        let judged = match &attempt {
            // A period that is to be given up must not stumble over the outcome that it is given up for.
            Some(attempt)
                if child == Child::None
                    && !backing_off
                    && attempt.failures < settings.policy.max_failures =>
            {
                let first = attempt.parent.is_none();
                self.outcome(attempt).await?.map(|outcome| {
                    let verdict = crate::eval::gate::decide(&outcome.evaluation, &settings.gate, first);
                    (outcome, verdict)
                })
            }
            _ => None,
        };
        let observed = Observed {
            now: clock(),
            watermark: world.watermark,
            later_close_requested: later.iter().any(|p| p.state == PeriodState::Open && p.close_requested),
            earlier_unsettled: earlier.iter().any(|p| is_unsettled(p.state)),
            published_after: later.iter().filter(|p| p.version.is_some()).count(),
            foreign_attempt: attempt.as_ref().is_some_and(|a| a.program_version != crate::VERSION),
            attempt,
            child,
            backing_off,
            verdict: judged.as_ref().map(|(_, verdict)| gate_of(verdict)),
        };
        Ok((observed, judged))
    }

    /// What the newest start of an attempt left, if it ran to its end.
    async fn outcome(&self, attempt: &AttemptRecord) -> Result<Option<Outcome>, LearnError> {
        if attempt.start == 0 {
            return Ok(None);
        }
        let prefix = self.controller.paths.start(attempt.period, attempt.number, attempt.start);
        let path = format!("{prefix}/{}", output::OUTCOME);
        let bytes = match self.controller.store.get(&path).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let outcome: Outcome = serde_json::from_slice(&bytes)
            .map_err(|source| LearnError::Outcome { path: path.clone(), source })?;
        if outcome.schema > SCHEMA {
            return Err(LearnError::Schema { path, found: outcome.schema });
        }
        Ok(Some(outcome))
    }

    async fn carry_out(
        &mut self,
        record: &PeriodRecord,
        step: Step,
        observed: Observed,
        outcome: Option<(Outcome, Verdict)>,
    ) -> Result<(), LearnError> {
        let registry = &self.controller.registry;
        match step {
            Step::Wait(_) => {}
            Step::Seal => self.seal(record, observed.watermark).await?,
            Step::BeginAttempt => {
                let lineage = job::lineage(registry.as_ref(), &self.controller.settings.job).await?;
                registry.begin_attempt(&self.lease, record.id, crate::VERSION, lineage).await?;
            }
            Step::StartChild => self.start_child(record, observed.attempt).await?,
            Step::MarkEvaluating => registry.set_evaluating(&self.lease, record.id).await?,
            Step::Publish => {
                let (Some(attempt), Some(judged)) = (observed.attempt, outcome) else { return Ok(()) };
                self.publish(record, &attempt, judged).await?;
            }
            Step::Reject { reason } => {
                tracing::warn!(%reason, "the candidate is rejected; `latest` stays");
                if let Some((_, verdict)) = &outcome {
                    report::verdict(verdict);
                }
                self.settle(record.id, PeriodState::Rejected, &reason).await?;
            }
            Step::Fail { reason } => {
                tracing::error!(%reason, "the period is given up; `periods retry` starts it again");
                self.settle(record.id, PeriodState::Failed, &reason).await?;
            }
            Step::Expire => self.expire(record.id).await?,
        }
        Ok(())
    }

    /// An operator's retry of it starts at once.
    async fn settle(&mut self, period: PeriodId, state: PeriodState, reason: &str) -> Result<(), LearnError> {
        let Controller { registry, clock, .. } = self.controller;
        registry.settle_unpublished(&self.lease, period, state, reason, clock()).await?;
        self.retry_at.remove(&period);
        Ok(())
    }

    async fn seal(&self, record: &PeriodRecord, watermark: Option<EventTime>) -> Result<(), LearnError> {
        let Controller { registry, settings, clock, .. } = self.controller;
        let next = following(record.end, settings.period_length_ms, watermark);
        let sealed = registry.seal(&self.lease, record.id, settings.min_frames, next, clock()).await?;
        for (period, outcome) in sealed {
            tracing::info!(%period, ?outcome, "closed");
        }
        Ok(())
    }

    async fn start_child(
        &mut self,
        record: &PeriodRecord,
        attempt: Option<AttemptRecord>,
    ) -> Result<(), LearnError> {
        let Some(mut attempt) = attempt else { return Ok(()) };
        let registry = &self.controller.registry;
        attempt.start = registry.begin_start(&self.lease, record.id, attempt.number).await?;
        let process = self.launch(record, &attempt).await?;
        tracing::info!(attempt = attempt.number, start = attempt.start, "training");
        let (period, attempt) = (record.id, attempt.number);
        self.running = Some(Running { period, attempt, process, phase: Child::Training });
        Ok(())
    }

    async fn launch(
        &self,
        record: &PeriodRecord,
        attempt: &AttemptRecord,
    ) -> Result<TrainingProcess, LearnError> {
        let Controller { registry, store, paths, settings, .. } = self.controller;
        let job = job::build(registry.as_ref(), paths, &settings.job, record, attempt).await?;
        let path = format!("{}/{}", job.output_prefix, output::JOB);
        let bytes = serde_json::to_vec_pretty(&job).map_err(std::io::Error::other)?;
        failpoint::reach("learn.job.before_put");
        store.put(&path, bytes.into()).await?;
        failpoint::reach("learn.job.after_put");
        Ok(TrainingProcess::start(&settings.program, &path)?)
    }

    async fn publish(
        &self,
        record: &PeriodRecord,
        attempt: &AttemptRecord,
        (outcome, verdict): (Outcome, Verdict),
    ) -> Result<(), LearnError> {
        let Controller { registry, store, paths, settings, clock, .. } = self.controller;
        let release = release::Release {
            registry: registry.as_ref(),
            store,
            paths,
            lease: &self.lease,
            period: record,
            attempt,
            outcome: &outcome,
            verdict: &verdict,
            limits: &settings.gate,
            job: &settings.job,
        };
        let (version, published) = release.publish(clock()).await?;
        match published {
            Published::LatestMoved => tracing::info!(%version, "published; `latest` names it"),
            Published::LatestStays { latest } => {
                tracing::warn!(%version, ?latest, "published; `latest` no longer named its parent and stays")
            }
        }
        report::verdict(&verdict);
        report::closed(record, clock());
        Ok(())
    }

    /// The attempts' files go while the record still says that there is something to be deleted; then the rows of
    /// the segments; an object without a row is an orphan, which the sweep finds after a crash.
    async fn expire(&self, period: PeriodId) -> Result<(), LearnError> {
        let Controller { registry, store, paths, clock, .. } = self.controller;
        sweep::attempts(store, paths, period).await?;
        failpoint::reach("learn.expire.after_attempts");
        let objects = registry.expire(&self.lease, period, clock()).await?;
        for object in &objects {
            failpoint::reach("learn.expire.before_delete");
            store.delete(&object.path).await?;
            failpoint::reach("learn.expire.after_delete");
        }
        tracing::info!(segments = objects.len(), "its frames are deleted");
        Ok(())
    }
}

/// Waits for ever while no training process runs.
async fn next_event(running: &mut Option<Running>) -> std::io::Result<ChildEvent> {
    match running {
        Some(running) => running.process.next().await,
        None => std::future::pending().await,
    }
}

fn is_learning(state: PeriodState) -> bool {
    matches!(state, PeriodState::Training | PeriodState::Evaluating)
}

fn is_unsettled(state: PeriodState) -> bool {
    state == PeriodState::Sealed || is_learning(state)
}

fn gate_of(verdict: &Verdict) -> Gate {
    match verdict {
        Verdict::Accepted => Gate::Accepted,
        Verdict::Rejected { reason } => Gate::Rejected { reason: reason.to_string() },
    }
}

/// The period that takes the frames of a merged one when no other is open: the one that the watermark is in,
/// counted in whole lengths from `end`, so that a long silence doesn't leave a row for each empty period.
fn following(end: EventTime, length_ms: i64, watermark: Option<EventTime>) -> PeriodBounds {
    let ahead_ms = watermark.map_or(0, |watermark| (watermark.as_ms() - end.as_ms()).max(0));
    let start = end.plus_ms(ahead_ms / length_ms * length_ms);
    PeriodBounds { id: PeriodId(start), end: start.plus_ms(length_ms) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_following_period_is_the_one_that_the_watermark_is_in() {
        let following = |watermark: Option<i64>| {
            let bounds = following(EventTime(1000), 100, watermark.map(EventTime));
            (bounds.id.start().as_ms(), bounds.end.as_ms())
        };
        assert_eq!(following(None), (1000, 1100));
        assert_eq!(following(Some(950)), (1000, 1100));
        assert_eq!(following(Some(1099)), (1000, 1100));
        assert_eq!(following(Some(1350)), (1300, 1400));
    }
}
