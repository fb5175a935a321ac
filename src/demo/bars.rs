//! The demo's progress: a bar for a period's frames and one for its training; plain lines where there is no terminal.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::registry::{PeriodRecord, PeriodState};
use crate::train::spec::Progress;
use crate::types::PeriodId;

pub struct Bars {
    all: MultiProgress,
    rows: Mutex<BTreeMap<PeriodId, Row>>,
}

struct Row {
    name: String,
    frames: ProgressBar,
    training: Option<ProgressBar>,
    state: Option<PeriodState>,
}

impl Bars {
    pub fn new() -> Self {
        Self { all: MultiProgress::new(), rows: Mutex::new(BTreeMap::new()) }
    }

    /// A period of so many frames is going to come.
    pub fn expect(&self, period: PeriodId, name: &str, frames: u64) {
        let bar = self.all.add(ProgressBar::new(frames));
        bar.set_style(style("{prefix:<12} frames    [{bar:32.cyan}] {pos:>5}/{len:<5} {msg}"));
        bar.set_prefix(name.to_owned());
        bar.set_message("waiting");
        let row = Row { name: name.to_owned(), frames: bar, training: None, state: None };
        self.rows().insert(period, row);
    }

    /// What the registry says of a period.
    pub fn period(&self, record: &PeriodRecord) {
        let mut rows = self.rows();
        let Some(row) = rows.get_mut(&record.id) else { return };
        row.frames.set_position(record.frames);
        if row.state == Some(record.state) {
            return;
        }
        row.state = Some(record.state);
        let told = match record.state {
            PeriodState::Open => "open".to_owned(),
            PeriodState::Sealed => "closed by watermark".to_owned(),
            PeriodState::Published | PeriodState::Expired => match record.version {
                Some(version) => format!("{} as {version}", record.state.as_str()),
                None => record.state.as_str().to_owned(),
            },
            state => record.reason.clone().unwrap_or_else(|| state.as_str().to_owned()),
        };
        row.frames.set_message(told.clone());
        self.say(&format!("{:<12} {} frames, {told}", row.name, record.frames));
    }

    /// What the training process says.
    pub fn training(&self, period: PeriodId, progress: &Progress) {
        let mut rows = self.rows();
        let Some(row) = rows.get_mut(&period) else { return };
        match progress {
            Progress::Step { step, steps, total, ntxent, distillation, images_per_second, .. } => {
                let bar = self.training_bar(row, *steps);
                bar.set_position(*step);
                bar.set_message(format!(
                    "loss {total:.3} (NT-Xent {ntxent:.3}, distillation {distillation:.3}), {images_per_second:.0} frames/s"
                ));
                if step % 100 == 0 || step == steps {
                    self.say(&format!("{:<12} step {step}/{steps}, loss {total:.3}", row.name));
                }
            }
            Progress::Evaluating { period } => {
                if let Some(bar) = &row.training {
                    bar.set_message(format!("measuring on the probe set of {period}"));
                }
            }
            Progress::Finished => {
                if let Some(bar) = &row.training {
                    bar.finish_with_message("trained and measured");
                }
            }
            _ => {}
        }
    }

    /// The bar below the period's frames; made at the first step.
    fn training_bar<'a>(&self, row: &'a mut Row, steps: u64) -> &'a ProgressBar {
        row.training.get_or_insert_with(|| {
            let bar = self.all.insert_after(&row.frames, ProgressBar::new(steps));
            bar.set_style(style("{prefix:<12} training  [{bar:32.green}] {pos:>5}/{len:<5} {msg}"));
            bar.set_prefix(row.name.clone());
            bar
        })
    }

    /// A line for a log file; on a terminal the bars say it.
    fn say(&self, line: &str) {
        if self.all.is_hidden() {
            println!("{line}");
        }
    }

    /// Leaves the bars as they are and the cursor below them.
    pub fn finish(&self) {
        for row in self.rows().values() {
            row.frames.abandon();
            if let Some(bar) = &row.training {
                bar.abandon();
            }
        }
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<PeriodId, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
