//! Which objects of the segments' prefix belong to nobody and may go. Pure: the caller lists the objects
//! **first** and reads the registry's rows and positions afterwards, in one snapshot.
//!
//! An object without a row is the work of a flush that was never committed, or not yet. Its name holds the offset
//! from which its flush started, and the flush commits only while the partition's position still is that offset;
//! so once the position is past it, nobody can commit it any more, however long its writer slept. Object names
//! and positions hold the topic's id: a topic made anew says nothing about the objects of the one before it.

use std::collections::{BTreeMap, BTreeSet};

use super::paths::SegmentName;
use crate::types::TopicId;

/// What the sweep does with one listed object, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// A row names it.
    KeepLive,
    /// No row names it, but its flush can still commit, or its partition's position is not known.
    KeepUncommitted,
    /// Its name is none that a flush gives: not the sweep's to judge.
    KeepForeign,
    /// No row names it, and none ever will.
    Delete,
}

/// Positions by (topic id, partition), of all incarnations of all topics.
pub type Positions = BTreeMap<(TopicId, i32), i64>;

/// `name` is what the object's path says, if it is a segment's; `live` whether a row names the path.
pub fn decide(name: Option<&SegmentName>, live: bool, positions: &Positions) -> Decision {
    if live {
        return Decision::KeepLive;
    }
    let Some(name) = name else {
        return Decision::KeepForeign;
    };
    match positions.get(&(name.topic_id.clone(), name.partition)) {
        Some(position) if *position > name.flush.start => Decision::Delete,
        _ => Decision::KeepUncommitted,
    }
}

/// Whether the listed object at `path` may be deleted; `name` is what its path says, `live` are all paths that
/// rows name.
pub fn is_orphan(
    path: &str,
    name: Option<&SegmentName>,
    live: &BTreeSet<String>,
    positions: &Positions,
) -> bool {
    decide(name, live.contains(path), positions) == Decision::Delete
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::paths::Paths;
    use crate::types::{EventTime, OffsetRange, PeriodId, Sha256};

    fn name(topic_id: &str, start: i64) -> SegmentName {
        SegmentName {
            period: PeriodId(EventTime(0)),
            topic_id: TopicId(topic_id.into()),
            partition: 0,
            flush: OffsetRange { start, end: start + 10 },
            sha256: Sha256::of(b""),
        }
    }

    fn positions(entries: &[(&str, i64)]) -> Positions {
        entries.iter().map(|(id, position)| ((TopicId((*id).into()), 0), *position)).collect()
    }

    #[test]
    fn an_object_goes_only_without_a_row_and_behind_its_partitions_position() {
        use Decision::*;
        // The topic's first incarnation g1 stopped at 100, its present one g2 stands at 50; g3 is unknown.
        let positions = positions(&[("g1", 100), ("g2", 50)]);
        let table = [
            // topic id, flush start, row, decision
            ("g1", 90, true, KeepLive),
            ("g1", 90, false, Delete),
            ("g1", 99, false, Delete),
            ("g1", 100, false, KeepUncommitted),
            ("g1", 101, false, KeepUncommitted),
            ("g2", 49, false, Delete),
            ("g2", 50, false, KeepUncommitted),
            ("g2", 90, false, KeepUncommitted),
            ("g2", 90, true, KeepLive),
            ("g3", 0, false, KeepUncommitted),
            ("g3", 0, true, KeepLive),
        ];
        for (id, start, row, decision) in table {
            let decided = decide(Some(&name(id, start)), row, &positions);
            assert_eq!(decided, decision, "{id} {start} row={row}");
        }
        assert_eq!(decide(None, false, &positions), KeepForeign);
        assert_eq!(decide(None, true, &positions), KeepLive);
    }

    #[test]
    fn orphans_are_told_by_their_names() {
        let paths = Paths::new("main");
        let live = paths.segment(&name("g1", 0));
        let orphan = paths.segment(&name("g1", 10));
        let pending = paths.segment(&name("g1", 20));
        let stray = "main/segments/README".to_owned();
        let rows = BTreeSet::from([live.clone()]);
        let positions = positions(&[("g1", 20)]);
        let is_orphan = |path: &str| is_orphan(path, paths.parse_segment(path).as_ref(), &rows, &positions);
        assert!(is_orphan(&orphan));
        assert!(!is_orphan(&live));
        assert!(!is_orphan(&pending));
        assert!(!is_orphan(&stray));
    }
}
