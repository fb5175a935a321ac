//! The learner: carries out what [`next_step`] decides, for every period, under one lease.
//!
//! One process of a deployment is the learner. It looks at the registry, asks for each period's next step and
//! carries it out, until every period waits; then it sleeps until its training process says something or a
//! second has passed. All that it knows it reads from the registry and the store: it can be killed anywhere
//! and another one goes on. What it writes carries its lease; when the lease is lost, everything it had
//! begun is dropped.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::child::{ChildEvent, Program, TrainingProcess};
use super::decide::{Child, Gate, Observed, Policy, Step, next_step};
use super::job::{self, JobError, JobSettings};
use super::{release, report, sweep};
use crate::eval::forgetting::HistoryError;
use crate::eval::gate::{GateLimits, Verdict};
use crate::failpoint;
use crate::registry::{
    AttemptRecord, Lease, PeriodBounds, PeriodRecord, PeriodState, Published, Registry, RegistryError,
};
use crate::store::paths::Paths;
use crate::store::{Store, StoreError};
use crate::train::spec::{Outcome, Progress, SCHEMA, output};
use crate::types::{EventTime, PeriodId};

/// The lease that makes a process the learner.
pub const LEASE: &str = "learner";

/// How often the learner looks when nothing happens. Longer: periods close later; shorter: more queries.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Looks between two sweeps of orphaned objects.
const SWEEP_EVERY_LOOKS: u64 = 300;

pub type Clock = Arc<dyn Fn() -> EventTime + Send + Sync>;
/// Told of every line of progress of the training process.
pub type Listener = Arc<dyn Fn(PeriodId, &Progress) + Send + Sync>;

#[derive(Clone)]
pub struct LearnSettings {
    /// Names this process among those that want the lease.
    pub holder: String,
    pub lease_ttl_ms: i64,
    pub policy: Policy,
    /// A period with fewer frames is merged into a later one.
    pub min_frames: u64,
    pub period_length_ms: i64,
    pub gate: GateLimits,
    pub job: JobSettings,
    pub program: Program,
    /// How long the training process may take to write its last checkpoint at a stop.
    pub drain: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Release(#[from] release::ReleaseError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error("{path} can't be read: {source}")]
    Outcome { path: String, source: serde_json::Error },
    #[error("{path} has schema {found}, this program reads {SCHEMA}")]
    Schema { path: String, found: u32 },
    #[error("the training process can't be reached: {0}")]
    Process(#[from] std::io::Error),
}

pub struct Controller {
    pub registry: Arc<dyn Registry>,
    pub store: Arc<Store>,
    pub paths: Paths,
    pub settings: LearnSettings,
    pub clock: Clock,
    pub listener: Option<Listener>,
}

/// The training process and what it is busy with.
struct Running {
    period: PeriodId,
    attempt: u32,
    process: TrainingProcess,
    phase: Child,
}

impl Controller {
    /// Waits for the lease, learns while it is held, until `cancel`; then lets the training process write a
    /// checkpoint, frees the lease and returns.
    pub async fn run(&self, cancel: CancellationToken) -> Result<(), LearnError> {
        while !cancel.is_cancelled() {
            match self.acquire().await {
                Ok(Some(lease)) => {
                    tracing::info!(token = lease.token, "this process is the learner");
                    metrics::gauge!(crate::metrics::LEASE_HELD).set(1.0);
                    Session { controller: self, lease, running: None, looks: 0 }.hold(&cancel).await;
                    metrics::gauge!(crate::metrics::LEASE_HELD).set(0.0);
                }
                Ok(None) => tracing::debug!("another process is the learner"),
                Err(error) => tracing::warn!(%error, "the learner's lease can't be asked for; trying again"),
            }
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        Ok(())
    }

    async fn acquire(&self) -> Result<Option<Lease>, RegistryError> {
        let LearnSettings { holder, lease_ttl_ms, .. } = &self.settings;
        self.registry.acquire_lease(LEASE, holder, *lease_ttl_ms, (self.clock)()).await
    }
}

/// The time for which one lease is held.
struct Session<'a> {
    controller: &'a Controller,
    lease: Lease,
    running: Option<Running>,
    looks: u64,
}

impl Session<'_> {
    async fn hold(mut self, cancel: &CancellationToken) {
        let renew_every = Duration::from_millis((self.controller.settings.lease_ttl_ms / 3).max(1) as u64);
        let mut renewal = tokio::time::interval(renew_every);
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let fenced = loop {
            let done = tokio::select! {
                () = cancel.cancelled() => break false,
                _ = renewal.tick() => self.renew().await,
                event = next_event(&mut self.running) => self.take(event).await,
                _ = look.tick() => self.look().await,
            };
            match done {
                Ok(()) => {}
                Err(LearnError::Registry(error @ RegistryError::Fenced { .. })) => {
                    tracing::warn!(%error, "another process is the learner now: what this one had begun is dropped");
                    break true;
                }
                Err(error) => tracing::warn!(%error, "the learner could not go on; it looks again"),
            }
        };
        self.end(fenced).await;
    }

    /// A learner that was fenced kills its process at once; otherwise the process may write a checkpoint.
    async fn end(self, fenced: bool) {
        let Self { controller, lease, running, .. } = self;
        if let Some(running) = running {
            let patience = if fenced { Duration::ZERO } else { controller.settings.drain };
            metrics::counter!(crate::metrics::TRAIN_ATTEMPTS, "outcome" => "interrupted").increment(1);
            running.process.stop(patience).await;
        }
        if let Err(error) = controller.registry.release_lease(&lease).await {
            tracing::warn!(%error, "the learner's lease could not be freed; it runs out by itself");
        }
    }

    async fn renew(&mut self) -> Result<(), LearnError> {
        let Controller { registry, settings, clock, .. } = self.controller;
        self.lease = registry.renew_lease(&self.lease, settings.lease_ttl_ms, clock()).await?;
        Ok(())
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
            self.controller.registry.record_failure(&self.lease, period, attempt, &reason).await?;
        }
        self.look().await
    }

    /// Carries out steps until every period waits.
    async fn look(&mut self) -> Result<(), LearnError> {
        while self.advance().await? {}
        if self.looks.is_multiple_of(SWEEP_EVERY_LOOKS) {
            let Controller { registry, store, paths, .. } = self.controller;
            sweep::orphans(registry.as_ref(), store, paths).await?;
        }
        self.looks += 1;
        Ok(())
    }

    /// The first step that is not a wait, over all periods in order; false if there is none.
    async fn advance(&mut self) -> Result<bool, LearnError> {
        let registry = self.controller.registry.as_ref();
        let periods = registry.periods().await?;
        report::periods(&periods);
        for (index, record) in periods.iter().enumerate() {
            let span = tracing::info_span!("period", period = %record.id);
            let (observed, outcome) = self.observe(&periods, index).await?;
            let step = next_step(record, &observed, &self.controller.settings.policy);
            if matches!(step, Step::Wait(_)) {
                continue;
            }
            self.carry_out(record, step, observed, outcome).instrument(span).await?;
            return Ok(true);
        }
        Ok(false)
    }

    async fn observe(
        &self,
        periods: &[PeriodRecord],
        index: usize,
    ) -> Result<(Observed, Option<(Outcome, Verdict)>), LearnError> {
        let Controller { registry, settings, clock, .. } = self.controller;
        let record = &periods[index];
        let (earlier, later) = (&periods[..index], &periods[index + 1..]);
        let learning = matches!(record.state, PeriodState::Training | PeriodState::Evaluating);
        let attempt = match record.attempt {
            number if number > 0 && learning => Some(registry.attempt(record.id, number).await?),
            _ => None,
        };
        let child = match &self.running {
            Some(running) if running.period == record.id => running.phase,
            _ => Child::None,
        };
        let outcome = match &attempt {
            Some(attempt) if child == Child::None => self.outcome(attempt).await?,
            _ => None,
        };
        let judged = outcome.map(|outcome| {
            let first = attempt.as_ref().is_none_or(|attempt| attempt.parent.is_none());
            let verdict = crate::eval::gate::decide(&outcome.evaluation, &settings.gate, first);
            (outcome, verdict)
        });
        let observed = Observed {
            now: clock(),
            watermark: registry.watermark().await?,
            later_close_requested: later.iter().any(|p| p.state == PeriodState::Open && p.close_requested),
            earlier_unsettled: earlier.iter().any(|p| is_unsettled(p.state)),
            published_after: later.iter().filter(|p| p.version.is_some()).count(),
            foreign_attempt: attempt.as_ref().is_some_and(|a| a.program_version != crate::VERSION),
            attempt,
            child,
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

    async fn settle(&self, period: PeriodId, state: PeriodState, reason: &str) -> Result<(), LearnError> {
        let Controller { registry, clock, .. } = self.controller;
        Ok(registry.settle_unpublished(&self.lease, period, state, reason, clock()).await?)
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

    /// A start that can't even begin counts as one that failed, so that a broken job doesn't try for ever.
    async fn start_child(
        &mut self,
        record: &PeriodRecord,
        attempt: Option<AttemptRecord>,
    ) -> Result<(), LearnError> {
        let Some(mut attempt) = attempt else { return Ok(()) };
        let Controller { registry, .. } = self.controller;
        attempt.start = registry.begin_start(&self.lease, record.id, attempt.number).await?;
        match self.launch(record, &attempt).await {
            Ok(process) => {
                tracing::info!(attempt = attempt.number, start = attempt.start, "training");
                let Running { period, attempt, .. } = self.running.insert(Running {
                    period: record.id,
                    attempt: attempt.number,
                    process,
                    phase: Child::Training,
                });
                tracing::debug!(%period, attempt, "the training process runs");
                Ok(())
            }
            Err(error @ (LearnError::Job(JobError::MissingFile { .. }) | LearnError::Process(_))) => {
                registry.record_failure(&self.lease, record.id, attempt.number, &error.to_string()).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
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
        report::versions(registry.as_ref()).await?;
        Ok(())
    }

    /// The rows go first: an object without a row is an orphan, which the sweep finds again after a crash.
    async fn expire(&self, period: PeriodId) -> Result<(), LearnError> {
        let Controller { registry, store, paths, clock, .. } = self.controller;
        let objects = registry.expire(&self.lease, period, clock()).await?;
        failpoint::reach("learn.expire.before_delete");
        for object in &objects {
            store.delete(&object.path).await?;
        }
        sweep::attempts(store, paths, period).await?;
        failpoint::reach("learn.expire.after_delete");
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

fn is_unsettled(state: PeriodState) -> bool {
    matches!(state, PeriodState::Sealed | PeriodState::Training | PeriodState::Evaluating)
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
