//! What to do next with a period: a pure function of its record and of what was observed.
//!
//! The controller reads the world, asks [`next_step`], carries the answer out and looks again. Every step can
//! be repeated: a crash between carrying it out and seeing its effect asks for the same step again, or for the
//! one after it. Nothing here does I/O or reads the clock.

use crate::types::{AttemptRecord, EventTime, PeriodRecord, PeriodState};

/// The limits that an operator sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// A period closes when the watermark is past its end by this much.
    pub lateness_ms: i64,
    /// Tries (starts of the training process, publications) that may fail before the period is given up.
    pub max_failures: u32,
    /// Published periods, the newest first, that keep their frames.
    pub keep_published: usize,
    /// A rejected or failed period keeps its frames and its candidate for this long.
    pub inspect_for_ms: i64,
}

/// What the controller saw before it asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    pub now: EventTime,
    /// The stream's watermark; `None`: no partition has vouched for anything yet.
    pub watermark: Option<EventTime>,
    /// A later open period is to be closed by an operator's order, and with it this one.
    pub later_close_requested: bool,
    /// An earlier period is sealed, in training or in evaluation: this one waits for its turn.
    pub earlier_unsettled: bool,
    /// Published periods that started later.
    pub published_after: usize,
    /// The newest attempt at the period.
    pub attempt: Option<AttemptRecord>,
    /// The attempt was begun by another version of the program: its checkpoints can't be continued.
    pub foreign_attempt: bool,
    pub child: Child,
    /// The last failure is too recent for another try.
    pub backing_off: bool,
    /// A start of the attempt has left its outcome, and this is what the gate says of it.
    pub verdict: Option<Gate>,
}

/// The training process as the controller knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Child {
    None,
    /// Runs, and is still at the frames or at the weights.
    Training,
    /// Runs, and has said that the weights are final.
    Evaluating,
}

/// The gate's answer about a finished candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    Accepted,
    Rejected { reason: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// For the watermark to pass the end and the lateness.
    Watermark,
    /// For an earlier period to be settled.
    EarlierPeriod,
    /// For the training process.
    Child,
    /// For whatever made the last try fail to pass by.
    Backoff,
    /// For newer publications, or for the inspection time to be over.
    Retention,
    /// Nothing is left to be done with it.
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Wait(Wait),
    /// Seal it and every earlier open one.
    Seal,
    /// Draw an attempt: fixes the teacher.
    BeginAttempt,
    /// Draw a start, write its job file, start the training process.
    StartChild,
    /// The weights are final: say so in the registry.
    MarkEvaluating,
    /// Draw a version number, copy the files, make the version visible.
    Publish,
    Reject {
        reason: String,
    },
    Fail {
        reason: String,
    },
    /// Delete its frames and its attempts' files.
    Expire,
}

/// The one next step for a period.
pub fn next_step(record: &PeriodRecord, observed: &Observed, policy: &Policy) -> Step {
    match record.state {
        PeriodState::Open => while_open(record, observed, policy),
        PeriodState::Sealed if observed.earlier_unsettled => Step::Wait(Wait::EarlierPeriod),
        PeriodState::Sealed => Step::BeginAttempt,
        PeriodState::Training | PeriodState::Evaluating => while_learning(record, observed, policy),
        PeriodState::Published if observed.published_after >= policy.keep_published => Step::Expire,
        PeriodState::Published => Step::Wait(Wait::Retention),
        PeriodState::Rejected | PeriodState::Failed => while_inspected(record, observed, policy),
        PeriodState::Merged | PeriodState::Expired => Step::Wait(Wait::Done),
    }
}

fn while_open(record: &PeriodRecord, observed: &Observed, policy: &Policy) -> Step {
    let closes_at = record.end.plus_ms(policy.lateness_ms);
    let passed = observed.watermark.is_some_and(|watermark| watermark >= closes_at);
    if passed || record.close_requested || observed.later_close_requested {
        return Step::Seal;
    }
    Step::Wait(Wait::Watermark)
}

/// A finished candidate counts before a process: its own may be gone, its program replaced. Failures count before
/// both, so that a candidate that can't be published is given up like one that can't be trained.
fn while_learning(record: &PeriodRecord, observed: &Observed, policy: &Policy) -> Step {
    let Some(attempt) = &observed.attempt else { return Step::BeginAttempt };
    match observed.child {
        Child::Evaluating if record.state == PeriodState::Training => return Step::MarkEvaluating,
        Child::Training | Child::Evaluating => return Step::Wait(Wait::Child),
        Child::None if attempt.failures >= policy.max_failures => {
            return Step::Fail { reason: failure_of(attempt) };
        }
        Child::None if observed.backing_off => return Step::Wait(Wait::Backoff),
        Child::None => {}
    }
    match &observed.verdict {
        Some(_) if record.state == PeriodState::Training => Step::MarkEvaluating,
        Some(Gate::Accepted) => Step::Publish,
        Some(Gate::Rejected { reason }) => Step::Reject { reason: reason.clone() },
        None if observed.foreign_attempt => Step::BeginAttempt,
        None => Step::StartChild,
    }
}

fn failure_of(attempt: &AttemptRecord) -> String {
    let last = attempt.last_failure.as_deref().unwrap_or("no reason was recorded");
    format!("{} tries failed, the last one because {last}", attempt.failures)
}

fn while_inspected(record: &PeriodRecord, observed: &Observed, policy: &Policy) -> Step {
    let settled_at = record.settled_at.unwrap_or(record.end);
    if observed.now >= settled_at.plus_ms(policy.inspect_for_ms) {
        return Step::Expire;
    }
    Step::Wait(Wait::Retention)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PeriodId;

    const POLICY: Policy =
        Policy { lateness_ms: 10, max_failures: 3, keep_published: 1, inspect_for_ms: 1000 };

    fn record(state: PeriodState) -> PeriodRecord {
        PeriodRecord {
            id: PeriodId(EventTime(0)),
            end: EventTime(100),
            state,
            frames: 500,
            bytes: 1,
            close_requested: false,
            sealed_at: None,
            settled_at: Some(EventTime(200)),
            merged_into: None,
            version: None,
            reason: None,
            retries: 0,
            attempt: 1,
        }
    }

    fn attempt(failures: u32) -> AttemptRecord {
        AttemptRecord {
            period: PeriodId(EventTime(0)),
            number: 1,
            program_version: "1".into(),
            parent: None,
            start: 1,
            failures,
            last_failure: (failures > 0).then(|| "out of memory".to_owned()),
        }
    }

    fn observed() -> Observed {
        Observed {
            now: EventTime(300),
            watermark: None,
            later_close_requested: false,
            earlier_unsettled: false,
            published_after: 0,
            attempt: Some(attempt(0)),
            foreign_attempt: false,
            child: Child::None,
            backing_off: false,
            verdict: None,
        }
    }

    fn step(state: PeriodState, observed: Observed) -> Step {
        next_step(&record(state), &observed, &POLICY)
    }

    #[test]
    fn an_open_period_closes_when_the_watermark_is_past_its_end_and_the_lateness() {
        let at = |ms| Observed { watermark: Some(EventTime(ms)), ..observed() };
        assert_eq!(step(PeriodState::Open, observed()), Step::Wait(Wait::Watermark));
        assert_eq!(step(PeriodState::Open, at(109)), Step::Wait(Wait::Watermark));
        assert_eq!(step(PeriodState::Open, at(110)), Step::Seal);
    }

    #[test]
    fn an_operators_order_closes_a_period_and_the_ones_before_it() {
        let mut ordered = record(PeriodState::Open);
        ordered.close_requested = true;
        assert_eq!(next_step(&ordered, &observed(), &POLICY), Step::Seal);
        let later = Observed { later_close_requested: true, ..observed() };
        assert_eq!(step(PeriodState::Open, later), Step::Seal);
    }

    #[test]
    fn periods_train_in_order() {
        let behind = Observed { earlier_unsettled: true, ..observed() };
        assert_eq!(step(PeriodState::Sealed, behind), Step::Wait(Wait::EarlierPeriod));
        assert_eq!(step(PeriodState::Sealed, observed()), Step::BeginAttempt);
    }

    #[test]
    fn a_crash_at_any_point_of_training_finds_its_next_step() {
        let training = |o| step(PeriodState::Training, o);
        assert_eq!(training(observed()), Step::StartChild);
        assert_eq!(training(Observed { foreign_attempt: true, ..observed() }), Step::BeginAttempt);
        assert_eq!(training(Observed { child: Child::Training, ..observed() }), Step::Wait(Wait::Child));
        assert_eq!(training(Observed { child: Child::Evaluating, ..observed() }), Step::MarkEvaluating);
        let done = Observed { verdict: Some(Gate::Accepted), foreign_attempt: true, ..observed() };
        assert_eq!(training(done.clone()), Step::MarkEvaluating);
        assert_eq!(step(PeriodState::Evaluating, done), Step::Publish);
        assert_eq!(step(PeriodState::Evaluating, observed()), Step::StartChild);
    }

    #[test]
    fn a_refused_candidate_is_rejected_with_the_gates_reason() {
        let refused = Observed { verdict: Some(Gate::Rejected { reason: "collapsed".into() }), ..observed() };
        assert_eq!(step(PeriodState::Evaluating, refused), Step::Reject { reason: "collapsed".into() });
    }

    #[test]
    fn a_period_is_given_up_after_so_many_failed_starts() {
        let failed = |n| Observed { attempt: Some(attempt(n)), ..observed() };
        assert_eq!(step(PeriodState::Training, failed(2)), Step::StartChild);
        let Step::Fail { reason } = step(PeriodState::Training, failed(3)) else { panic!("not given up") };
        assert_eq!(reason, "3 tries failed, the last one because out of memory");
    }

    #[test]
    fn a_candidate_that_cannot_be_published_is_given_up_too_and_a_failure_is_not_tried_again_at_once() {
        let accepted = |failures| Observed {
            attempt: Some(attempt(failures)),
            verdict: Some(Gate::Accepted),
            ..observed()
        };
        assert_eq!(step(PeriodState::Evaluating, accepted(2)), Step::Publish);
        assert!(matches!(step(PeriodState::Evaluating, accepted(3)), Step::Fail { .. }));
        let waiting = |o| step(PeriodState::Evaluating, Observed { backing_off: true, ..o });
        assert_eq!(waiting(accepted(1)), Step::Wait(Wait::Backoff));
        assert_eq!(waiting(observed()), Step::Wait(Wait::Backoff));
    }

    #[test]
    fn frames_go_when_newer_periods_are_published_or_the_inspection_is_over() {
        let published = |n| step(PeriodState::Published, Observed { published_after: n, ..observed() });
        assert_eq!(published(0), Step::Wait(Wait::Retention));
        assert_eq!(published(1), Step::Expire);
        let at = |ms| step(PeriodState::Rejected, Observed { now: EventTime(ms), ..observed() });
        assert_eq!(at(1199), Step::Wait(Wait::Retention));
        assert_eq!(at(1200), Step::Expire);
        assert_eq!(step(PeriodState::Expired, observed()), Step::Wait(Wait::Done));
    }
}
