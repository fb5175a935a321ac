//! Event time: which period a frame belongs to, what a partition vouches for, where the stream stands.
//!
//! Owns the rules of windows and watermarks as pure functions of (records, reports, clock). Invariants: a frame
//! is never placed into a period that is known to be closed; periods that this file makes never overlap a known
//! one; a partition that nobody reads holds the stream back. Leaves to others: that a period was sealed
//! meanwhile (the registry refuses the flush), when a period closes (`period`).

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::registry::{CaughtUp, PeriodBounds, PeriodRecord, PeriodState, PositionRecord};
use crate::types::{EventTime, PeriodId};

/// What becomes of a frame whose period is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LatePolicy {
    /// It joins the oldest open period.
    Join,
    /// It is counted and dropped.
    Drop,
}

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The period of its own time.
    Period(PeriodBounds),
    /// Its period is closed: it joins this one, the oldest open.
    LateInto(PeriodBounds),
    DroppedLate,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    end: EventTime,
    open: bool,
}

/// The periods that exist, and the grid for those that don't yet: spans of a fixed length, aligned to 1970.
/// A cell that would overlap an existing period is clipped, so another length takes effect after the last
/// existing period.
#[derive(Debug, Clone)]
pub struct Windows {
    length_ms: i64,
    known: BTreeMap<PeriodId, Known>,
}

impl Windows {
    /// `length_ms` > 0.
    pub fn new(length_ms: i64, periods: &[PeriodRecord]) -> Self {
        let known = periods.iter().map(|period| {
            let open = period.state == PeriodState::Open;
            (period.id, Known { end: period.end, open })
        });
        Self { length_ms: length_ms.max(1), known: known.collect() }
    }

    pub fn place(&self, captured_at: EventTime, late: LatePolicy) -> Placement {
        match self.own_period(captured_at) {
            Some(period) => Placement::Period(period),
            None if late == LatePolicy::Drop => Placement::DroppedLate,
            None => Placement::LateInto(self.oldest_open()),
        }
    }

    /// The open period of an instant, existing or to be made; `None` if it is closed.
    fn own_period(&self, at: EventTime) -> Option<PeriodBounds> {
        if let Some((&id, known)) = self.known.range(..=PeriodId(at)).next_back()
            && at < known.end
        {
            return known.open.then_some(PeriodBounds { id, end: known.end });
        }
        // Closing a period closes every earlier one, those that never had a frame included.
        match self.closed_until() {
            Some(closed_until) if at < closed_until => None,
            _ => Some(self.cell(at)),
        }
    }

    /// The end of the last closed period.
    fn closed_until(&self) -> Option<EventTime> {
        let closed = self.known.values().filter(|known| !known.open);
        closed.map(|known| known.end).max()
    }

    fn oldest_open(&self) -> PeriodBounds {
        let open = self.known.iter().find(|(_, known)| known.open);
        match open {
            Some((&id, known)) => PeriodBounds { id, end: known.end },
            // Something is closed, or no frame would be late: the next period is the one after it.
            None => self.cell(self.closed_until().unwrap_or(EventTime(0))),
        }
    }

    /// The grid's cell around an instant that no known period covers.
    fn cell(&self, at: EventTime) -> PeriodBounds {
        let start = EventTime(at.0.div_euclid(self.length_ms) * self.length_ms);
        let end = start.plus_ms(self.length_ms);
        let before = self.known.range(..=PeriodId(at)).next_back();
        let after = self.known.range(PeriodId(at)..).next();
        PeriodBounds {
            id: PeriodId(before.map_or(start, |(_, known)| start.max(known.end))),
            end: after.map_or(end, |(id, _)| end.min(id.start())),
        }
    }
}

/// What a partition vouches for after one more frame: a frame from the future counts as now.
pub fn raise_by_frame(
    watermark: Option<EventTime>,
    captured_at: EventTime,
    now: EventTime,
) -> Option<EventTime> {
    watermark.max(Some(captured_at.min(now)))
}

/// What a partition vouches for after a punctuation, which is taken at its word.
pub fn raise_by_punctuation(watermark: Option<EventTime>, stated: EventTime) -> Option<EventTime> {
    watermark.max(Some(stated))
}

/// What the wall clock may do when nothing comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleMode {
    /// When all partitions are idle, time passes as the wall clock does.
    WallClock,
    /// Only frames and punctuations move the watermark: for replays.
    Hold,
}

/// When a partition counts as idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdlePolicy {
    pub mode: IdleMode,
    /// A partition is idle when it was at its end and nothing had come for this long.
    pub timeout_ms: i64,
    /// An older report counts for nothing: its owner may be gone. Several times the interval of the reports.
    pub report_ttl_ms: i64,
}

/// The stream's watermark: everything before it has come. `None`: nothing can be said.
///
/// * A partition that nobody has read holds everything back.
/// * Else the smallest watermark among the partitions that are not idle; one without a watermark holds back.
/// * When all are idle, each stands at the larger of its watermark and (when its end was answered - timeout);
///   with [`IdleMode::Hold`] at its watermark.
pub fn stream_watermark(positions: &[PositionRecord], now: EventTime, idle: IdlePolicy) -> Option<EventTime> {
    if positions.iter().any(|record| record.position.is_none()) {
        return None;
    }
    let mut busy = positions
        .iter()
        .filter(|record| idle_report(record, now, idle).is_none())
        .map(|record| record.watermark)
        .peekable();
    if busy.peek().is_some() {
        return busy.min().flatten();
    }
    let stands = positions.iter().map(|record| {
        let report = idle_report(record, now, idle)?;
        match idle.mode {
            IdleMode::Hold => record.watermark,
            IdleMode::WallClock => {
                let by_clock = report.answered_at.min(now).minus_ms(idle.timeout_ms);
                record.watermark.max(Some(by_clock))
            }
        }
    });
    stands.min().flatten()
}

/// The report that makes a partition idle: at its end, quiet for the timeout, and fresh.
fn idle_report(record: &PositionRecord, now: EventTime, idle: IdlePolicy) -> Option<CaughtUp> {
    let report = record.caught_up?;
    let quiet_ms = report.answered_at.0 - report.quiet_since.0;
    let age_ms = now.0 - report.answered_at.0;
    (quiet_ms >= idle.timeout_ms && age_ms <= idle.report_ttl_ms).then_some(report)
}
