//! The table of versions for terminals.
//!
//! Rows are plain values; the caller reads them from the registry. Widths follow the terminal; without one (a pipe)
//! lines are as wide as their content.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};

use crate::types::{PeriodId, Version};

/// A period's candidate and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionRow {
    /// `None`: it was refused and got no number.
    pub version: Option<Version>,
    pub is_latest: bool,
    pub period: PeriodId,
    pub frames: u64,
    /// kNN accuracy by the table's probe columns, 0..1; `None`: not measured on that set.
    pub accuracy: Vec<Option<f64>>,
    pub average_forgetting: Option<f64>,
    pub backward_transfer: Option<f64>,
    /// `accepted`, or `rejected` with its reason's name.
    pub verdict: String,
}

/// `probes`: the periods whose probe sets are the accuracy columns. Periods are numbered, so that the columns stay narrow.
/// Accuracies and forgetting in per cent.
pub fn versions_table(probes: &[PeriodId], rows: &[VersionRow]) -> String {
    let periods: BTreeSet<PeriodId> =
        probes.iter().copied().chain(rows.iter().map(|row| row.period)).collect();
    let numbers: BTreeMap<PeriodId, usize> = periods.into_iter().zip(1..).collect();
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    let mut head = vec!["version".to_owned(), "period".to_owned(), "frames".to_owned()];
    head.extend(probes.iter().map(|period| format!("kNN %\nperiod {}", numbers[period])));
    head.extend(["forgetting\naverage", "backward\ntransfer", "gate"].map(str::to_owned));
    table.set_header(head);
    for row in rows {
        table.add_row(cells(row, numbers[&row.period], probes.len()));
    }
    // Frames, accuracies, forgetting and transfer.
    for column in table.column_iter_mut().skip(2).take(probes.len() + 3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn cells(row: &VersionRow, number: usize, probes: usize) -> Vec<Cell> {
    let name = row.version.map_or("–".to_owned(), |version| version.to_string());
    let name = if row.is_latest { format!("{name} ← latest") } else { name };
    let mut cells =
        vec![Cell::new(name), Cell::new(format!("{number}: {}", row.period)), Cell::new(row.frames)];
    let accuracies = (0..probes).map(|column| row.accuracy.get(column).copied().flatten());
    cells.extend(accuracies.map(|accuracy| Cell::new(percent(accuracy))));
    cells.push(Cell::new(percent(row.average_forgetting)));
    cells.push(Cell::new(percent(row.backward_transfer)));
    cells.push(Cell::new(&row.verdict));
    cells
}

fn percent(value: Option<f64>) -> String {
    // Adding 0 turns the -0.0 that rounding leaves into 0.0.
    value.map_or("–".to_owned(), |value| format!("{:.1}", (value * 1000.0).round() / 10.0 + 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::EventTime;

    #[test]
    fn each_row_shows_scores_in_per_cent_and_marks_the_latest() {
        let period = |day: i64| PeriodId(EventTime(1_769_817_600_000 + day * 86_400_000));
        let row = |version, day, accuracy, verdict: &str| VersionRow {
            version,
            is_latest: version == Some(Version(2)),
            period: period(day),
            frames: 1200,
            accuracy,
            average_forgetting: (day > 0).then_some(if day == 2 { -0.0001 } else { 0.021 }),
            backward_transfer: (day > 0).then_some(-0.021),
            verdict: verdict.into(),
        };
        let table = versions_table(
            &[period(0), period(1)],
            &[
                row(Some(Version(1)), 0, vec![Some(0.91)], "accepted"),
                row(Some(Version(2)), 1, vec![Some(0.889), Some(0.934)], "accepted"),
                row(None, 2, vec![None, None], "rejected: forgot_parent"),
            ],
        );
        let line = |part: &str| table.lines().find(|line| line.contains(part)).unwrap().to_owned();
        let latest = line("v000002");
        for part in ["← latest", "20260201T000000Z", "88.9", "93.4", "2.1", "-2.1", "accepted"] {
            assert!(latest.contains(part), "{part} in\n{table}");
        }
        assert!(line("v000001").contains("91.0") && line("v000001").contains('–'));
        assert!(
            line("forgot_parent").contains(" 0.0 ") && line("forgot_parent").contains("3: 20260202T000000Z")
        );
        assert!(table.contains("period 2"));
        let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    }
}
