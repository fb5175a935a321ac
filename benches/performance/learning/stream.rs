//! A benchmark stream on disk: `DIR/NN-name/{train,test}/LABEL/*`, a folder a period.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use palimpsest::eval;
use palimpsest::train::frames::{FrameMeta, FrameSet, FrameSetWriter};
use palimpsest::train::split::Split;
use palimpsest::types::EventTime;

/// The frames of one period: those to train on, which are also what probes are fitted on, then those to test on.
pub struct Period {
    pub frames: Arc<FrameSet>,
    /// Of each frame, numbered by the labels' order.
    pub labels: Vec<u32>,
    train: usize,
}

impl Period {
    /// What a training job calls the split.
    pub fn job_split(&self) -> Split {
        Split { train: (0..self.train).collect(), probe: (self.train..self.labels.len()).collect() }
    }

    /// What a probe calls it.
    pub fn probe_split(&self) -> eval::split::Split {
        let Split { train, probe } = self.job_split();
        eval::split::Split { bank: train, queries: probe }
    }
}

/// All periods, in order. Frames come by label, then by name.
pub fn read(folder: &Path) -> Result<Vec<Period>> {
    let periods = entries(folder)?.iter().map(|path| read_period(path)).collect::<Result<Vec<_>>>()?;
    ensure!(!periods.is_empty(), "{} has no period", folder.display());
    Ok(periods)
}

fn read_period(folder: &Path) -> Result<Period> {
    let mut writer = FrameSetWriter::create(&std::env::temp_dir())?;
    let mut labels = Vec::new();
    let names = push_split(&folder.join("train"), &mut writer, &mut labels)?;
    let train = labels.len();
    let tested = push_split(&folder.join("test"), &mut writer, &mut labels)?;
    ensure!(names == tested, "{} is tested on other labels than it is trained on", folder.display());
    Ok(Period { frames: Arc::new(writer.finish()?), labels, train })
}

/// The names of the labels, by which their numbers go.
fn push_split(folder: &Path, writer: &mut FrameSetWriter, labels: &mut Vec<u32>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (number, label) in (0..).zip(entries(folder)?) {
        let name = label.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for path in entries(&label)? {
            writer.push(meta(&name, labels.len()), &std::fs::read(&path)?)?;
            labels.push(number);
        }
        names.push(name);
    }
    Ok(names)
}

fn meta(label: &str, index: usize) -> FrameMeta {
    FrameMeta {
        stream_id: label.into(),
        captured_at: EventTime(index as i64),
        label: Some(label.into()),
        topic: "frames".into(),
        partition: 0,
        offset: index as i64,
        row: 0,
    }
}

/// By name.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = read.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
