//! `results.json`: every run that ended, with what it was a run of.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::measure::Scores;
use super::stream::Stream;
use super::versions::write_whole;
use super::{BenchError, file_error};
use crate::eval::forgetting::History;
use crate::failpoint;
use crate::types::{EventTime, PeriodId, Sha256, Version};

/// The method whose second version is no successor of its first.
pub const JOINT: &str = "joint";

/// Major number of the file's form.
pub const SCHEMA: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub schema: u32,
    pub program_version: String,
    pub stream: StreamFacts,
    /// Everything besides methods and seeds that the numbers depend on.
    pub settings: serde_json::Value,
    /// By method as they were asked for, then by seed.
    pub runs: Vec<RunResult>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamFacts {
    pub name: String,
    pub digest: Sha256,
    pub periods: Vec<PeriodFacts>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeriodFacts {
    pub name: String,
    pub labels: usize,
    pub train: usize,
    pub test: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    pub method: String,
    pub seed: u64,
    /// In the order in which they were learned. Each began with the one before, but for `joint`'s second one, which began anew.
    pub versions: Vec<VersionResult>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionResult {
    pub steps: u64,
    /// Of training.
    pub seconds: f64,
    /// On the periods that it or an earlier version learned (all for `random`), in order.
    pub scores: Vec<Scores>,
}

/// A probe with labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Linear,
    Knn,
    FewShot,
}

impl Probe {
    pub const ALL: [Probe; 3] = [Probe::Linear, Probe::Knn, Probe::FewShot];

    pub fn name(self) -> &'static str {
        match self {
            Probe::Linear => "linear",
            Probe::Knn => "kNN",
            Probe::FewShot => "10-shot",
        }
    }

    pub fn of(self, scores: &Scores) -> f64 {
        match self {
            Probe::Linear => scores.linear,
            Probe::Knn => scores.knn,
            Probe::FewShot => scores.few_shot,
        }
    }
}

impl StreamFacts {
    pub fn of(stream: &Stream, name: String) -> Self {
        let facts = |period: &super::stream::Period| PeriodFacts {
            name: period.name.clone(),
            labels: period.label_names.len(),
            train: period.train,
            test: period.frames.len() - period.train,
        };
        Self { name, digest: stream.digest.clone(), periods: stream.periods.iter().map(facts).collect() }
    }
}

impl Results {
    pub fn new(stream: StreamFacts, settings: serde_json::Value) -> Self {
        let program_version = crate::VERSION.to_owned();
        Self { schema: SCHEMA, program_version, stream, settings, runs: Vec::new() }
    }

    /// The runs that `path` holds already, if they are runs of the same stream and settings.
    ///
    /// # Errors
    /// `OtherResults` if they are not, `Results` for a file that can't be understood.
    pub fn resume(self, path: &Path) -> Result<Self, BenchError> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(self),
            read => read.map_err(file_error("reading", path))?,
        };
        let found = Self::parse(path, &bytes)?;
        let what = if found.stream.digest != self.stream.digest {
            "stream"
        } else if found.settings != self.settings {
            "configuration or budget"
        } else if found.program_version != self.program_version {
            "version of this program"
        } else {
            return Ok(Self { runs: found.runs, ..self });
        };
        Err(BenchError::OtherResults { path: path.to_owned(), what })
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BenchError> {
        let wrong = |reason: String| BenchError::Results { path: path.to_owned(), reason };
        let found: Self = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if found.schema != SCHEMA {
            return Err(wrong(format!("schema {} instead of {SCHEMA}", found.schema)));
        }
        Ok(found)
    }

    /// Replaces the file in one step.
    pub fn write(&self, path: &Path) -> Result<(), BenchError> {
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|error| BenchError::Results { path: path.to_owned(), reason: error.to_string() })?;
        json.push(b'\n');
        failpoint::reach("bench.results.before");
        write_whole(path, &json).map_err(file_error("writing", path))?;
        failpoint::reach("bench.results.after");
        Ok(())
    }

    pub fn find(&self, method: &str, seed: u64) -> Option<&RunResult> {
        self.runs.iter().find(|run| run.method == method && run.seed == seed)
    }

    /// The names of the methods that have runs, in their order.
    pub fn methods(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for run in &self.runs {
            if !names.contains(&run.method.as_str()) {
                names.push(&run.method);
            }
        }
        names
    }

    /// One method's runs, by seed.
    pub fn of(&self, method: &str) -> Vec<&RunResult> {
        let mut runs: Vec<_> = self.runs.iter().filter(|run| run.method == method).collect();
        runs.sort_by_key(|run| run.seed);
        runs
    }
}

impl RunResult {
    /// The matrix R of one probe: versions in a line, numbered from 1, periods from 0.
    pub fn history(&self, probe: Probe) -> History {
        let number = |index: usize| Version(index as u64 + 1);
        let parents = (0..self.versions.len())
            .map(|index| (number(index), index.checked_sub(1).map(number)))
            .collect::<BTreeMap<_, _>>();
        let cells = self.versions.iter().enumerate().flat_map(|(index, version)| {
            version
                .scores
                .iter()
                .map(move |scores| ((number(index), period_id(scores.period)), probe.of(scores)))
        });
        let scores = cells.collect();
        History::new(parents, scores).expect("each version's parent is the one before it")
    }

    /// The newest version's mean forgetting of what it or an earlier one learned; `None` without an earlier period.
    pub fn forgetting(&self, probe: Probe) -> Option<f64> {
        self.history(probe).average_forgetting(Version(self.versions.len() as u64))
    }

    /// Whether each version began with the one before, period by period.
    pub fn is_sequence(&self) -> bool {
        self.versions.len() > 1 && self.method != JOINT
    }

    pub fn last(&self) -> Option<&VersionResult> {
        self.versions.last()
    }

    /// The newest version's scores on one period.
    pub fn last_on(&self, period: usize) -> Option<&Scores> {
        self.last()?.scores.iter().find(|scores| scores.period == period)
    }

    pub fn seconds(&self) -> f64 {
        self.versions.iter().map(|version| version.seconds).sum()
    }
}

pub fn period_id(index: usize) -> PeriodId {
    PeriodId(EventTime(index as i64))
}
