//! Which partitions the client reads, and under which epoch.
//!
//! Owns what lies between the loop's decisions and what the library is told: the open rebalance and the restarts
//! that wait for its end. Pure. Invariant: a partition has an epoch only while the library reads it from the
//! start that the epoch was drawn for; from the decision to restart it until the library is told it has none, and
//! what is polled meanwhile belongs to nobody. Leaves to others: telling the library, at once (`kafka`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::Place;

/// A rebalance as the library told it.
#[derive(Debug)]
pub struct Told {
    pub assign: bool,
    pub places: Vec<Place>,
    pub lost: bool,
}

/// Where a partition is read from, and the epoch of what is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    pub offset: i64,
    pub epoch: u64,
}

/// What the library is to be told now.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// The answer to an assignment: the offsets of what is read; the rest is held.
    Assign(BTreeMap<Place, i64>),
    /// The answer to a revocation.
    Unassign(Vec<Place>),
    /// Give these up and take them again at their offsets; those without one are held.
    Restart { places: Vec<Place>, starts: BTreeMap<Place, i64> },
}

/// A rebalance that waits for the loop.
#[derive(Debug)]
struct Rebalance {
    told: Told,
    /// Partitions that the loop has decided on; `None`: hold.
    decided: BTreeMap<Place, Option<Start>>,
    released: bool,
    since: Instant,
}

#[derive(Debug, Default)]
pub struct Membership {
    /// One at a time: the library tells the next one after the answer.
    rebalance: Option<Rebalance>,
    /// Read or held.
    owned: BTreeSet<Place>,
    epochs: HashMap<Place, u64>,
    /// Partitions to be read from another offset, once no rebalance is open.
    restarts: BTreeMap<Place, Option<Start>>,
}

impl Membership {
    pub fn is_rebalancing(&self) -> bool {
        self.rebalance.is_some()
    }

    /// The epoch of a record polled now; `None`: it was read before a revocation, a hold or a restart.
    pub fn epoch(&self, place: &Place) -> Option<u64> {
        self.epochs.get(place).copied()
    }

    /// A rebalance begins; none may be open.
    pub fn open(&mut self, told: Told, now: Instant) {
        self.rebalance = Some(Rebalance { told, decided: BTreeMap::new(), released: false, since: now });
    }

    /// The loop has decided on a partition; `None`: hold it.
    pub fn decide(&mut self, place: Place, start: Option<Start>) {
        match &mut self.rebalance {
            Some(open) if open.told.assign && open.told.places.contains(&place) => {
                open.decided.insert(place, start);
            }
            // Given back since the loop decided.
            _ if !self.owned.contains(&place) => {}
            _ => {
                self.epochs.remove(&place);
                self.restarts.insert(place, start);
            }
        }
    }

    /// The loop has nothing of the revoked partitions in memory any more.
    pub fn released(&mut self) {
        if let Some(open) = &mut self.rebalance {
            open.released = true;
        }
    }

    /// What is complete: the answer to the open rebalance, or with none open the restarts. It counts as told, so
    /// tell the library before the next poll.
    pub fn next_change(&mut self, now: Instant, revoke_timeout: Duration) -> Option<Change> {
        let Some(open) = &self.rebalance else { return self.restart() };
        let complete = if open.told.assign {
            open.decided.len() == open.told.places.len()
        } else {
            open.released || now.duration_since(open.since) >= revoke_timeout
        };
        let open = if complete { self.rebalance.take()? } else { return None };
        if open.told.assign {
            self.owned.extend(open.told.places);
            return Some(Change::Assign(self.begin(open.decided)));
        }
        for place in &open.told.places {
            self.owned.remove(place);
            self.epochs.remove(place);
            self.restarts.remove(place);
        }
        Some(Change::Unassign(open.told.places))
    }

    fn restart(&mut self) -> Option<Change> {
        if self.restarts.is_empty() {
            return None;
        }
        let restarts = std::mem::take(&mut self.restarts);
        let places = restarts.keys().cloned().collect();
        Some(Change::Restart { places, starts: self.begin(restarts) })
    }

    /// Their epochs are valid from here on.
    fn begin(&mut self, decided: BTreeMap<Place, Option<Start>>) -> BTreeMap<Place, i64> {
        let mut offsets = BTreeMap::new();
        for (place, start) in decided {
            match start {
                Some(Start { offset, epoch }) => {
                    self.epochs.insert(place.clone(), epoch);
                    offsets.insert(place, offset);
                }
                None => drop(self.epochs.remove(&place)),
            }
        }
        offsets
    }

    /// What was never answered.
    pub fn unanswered(self) -> Option<Told> {
        self.rebalance.map(|open| open.told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn place(partition: i32) -> Place {
        Place { topic: "frames".into(), partition }
    }

    fn told(assign: bool, partitions: &[i32]) -> Told {
        Told { assign, places: partitions.iter().copied().map(place).collect(), lost: false }
    }

    fn start(offset: i64, epoch: u64) -> Option<Start> {
        Some(Start { offset, epoch })
    }

    /// Two partitions, read from 0 under epochs 1 and 2.
    fn two_read(now: Instant) -> Membership {
        let mut membership = Membership::default();
        membership.open(told(true, &[0, 1]), now);
        membership.decide(place(0), start(0, 1));
        assert_eq!(membership.next_change(now, TIMEOUT), None, "one is undecided");
        assert_eq!(membership.epoch(&place(0)), None, "not read yet");
        membership.decide(place(1), start(0, 2));
        let starts = BTreeMap::from([(place(0), 0), (place(1), 0)]);
        assert_eq!(membership.next_change(now, TIMEOUT), Some(Change::Assign(starts)));
        assert_eq!([0, 1].map(|p| membership.epoch(&place(p))), [Some(1), Some(2)]);
        membership
    }

    #[test]
    fn what_is_polled_between_a_decision_to_restart_and_the_restart_has_no_epoch() {
        let now = Instant::now();
        let mut membership = two_read(now);
        membership.open(told(false, &[1]), now);
        membership.decide(place(0), start(100, 3));
        assert_eq!(membership.next_change(now, TIMEOUT), None, "the revocation waits for the loop");
        assert_eq!(membership.epoch(&place(0)), None, "still polled at the old offset");
        membership.released();
        assert_eq!(membership.next_change(now, TIMEOUT), Some(Change::Unassign(vec![place(1)])));
        assert_eq!([0, 1].map(|p| membership.epoch(&place(p))), [None, None]);
        let restart = Change::Restart { places: vec![place(0)], starts: BTreeMap::from([(place(0), 100)]) };
        assert_eq!(membership.next_change(now, TIMEOUT), Some(restart));
        assert_eq!(membership.epoch(&place(0)), Some(3));
        assert_eq!(membership.next_change(now, TIMEOUT), None);
    }

    #[test]
    fn a_revoked_partition_is_not_restarted() {
        let now = Instant::now();
        let mut membership = two_read(now);
        membership.open(told(false, &[0]), now);
        membership.decide(place(0), start(100, 3));
        let late = now + TIMEOUT;
        assert_eq!(membership.next_change(late, TIMEOUT), Some(Change::Unassign(vec![place(0)])));
        membership.decide(place(0), start(100, 4));
        assert_eq!(membership.next_change(late, TIMEOUT), None);
        assert_eq!(membership.epoch(&place(0)), None);
    }

    #[test]
    fn a_held_partition_has_no_epoch_until_it_is_restarted() {
        let now = Instant::now();
        let mut membership = two_read(now);
        membership.decide(place(0), None);
        let hold = Change::Restart { places: vec![place(0)], starts: BTreeMap::new() };
        assert_eq!(membership.next_change(now, TIMEOUT), Some(hold));
        assert_eq!(membership.epoch(&place(0)), None);
        membership.decide(place(0), start(7, 3));
        let again = Change::Restart { places: vec![place(0)], starts: BTreeMap::from([(place(0), 7)]) };
        assert_eq!(membership.next_change(now, TIMEOUT), Some(again));
        assert_eq!(membership.epoch(&place(0)), Some(3));
    }
}
