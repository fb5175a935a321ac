//! Labelled streams on disk: DIR in a layout of ours ([`folder`]), ImageNet ([`imagenet`]) and CelebA ([`celeba`]) in theirs.
//!
//! Frames to train on teach the probes too; frames to test on are asked, and never trained on. Images stay where they lie and are
//! decoded when they are needed; grey ones become three equal channels then.

mod celeba;
mod folder;
mod imagenet;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256 as Hasher};

use crate::eval;
use crate::train::frames::{FrameMeta, FrameSet};
use crate::types::{EventTime, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{path} can't be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no {what}; {layout}")]
    Empty { path: PathBuf, what: &'static str, layout: &'static str },
    #[error("{path} is neither .png nor .jpg")]
    Ending { path: PathBuf },
    #[error("{path}, line {line}: {problem}")]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{period} has the label {label:?} in its {has} frames alone")]
    Label { period: String, label: String, has: &'static str },
    #[error("{period} has the one label {label:?}: nothing can be told apart")]
    OneLabel { period: String, label: String },
    #[error("{classes} classes are too few for {periods} periods of two or more")]
    Periods { classes: usize, periods: usize },
}

/// What `--stream` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Folder(PathBuf),
    /// Its classes are dealt out to so many periods.
    ImageNet {
        folder: PathBuf,
        periods: usize,
    },
    CelebA(PathBuf),
}

impl Source {
    /// `DIR`, `imagenet:DIR` or `celeba:DIR`.
    pub fn parse(text: &str, imagenet_periods: usize) -> Self {
        match text.split_once(':') {
            Some(("imagenet", folder)) => {
                Source::ImageNet { folder: folder.into(), periods: imagenet_periods }
            }
            Some(("celeba", folder)) => Source::CelebA(folder.into()),
            _ => Source::Folder(text.into()),
        }
    }

    /// What a reader is told of it.
    pub fn name(&self) -> String {
        match self {
            Source::Folder(folder) => name(folder),
            Source::ImageNet { .. } => "ImageNet".to_owned(),
            Source::CelebA(_) => "CelebA".to_owned(),
        }
    }
}

/// One period: the frames to train on come first, by label and then by path.
pub struct Period {
    pub name: String,
    /// A frame's stream is its path below the stream's folder, so that each has one of its own; or, of a path `STREAM@MILLISECONDS.png`,
    /// what stands before the time.
    pub frames: Arc<FrameSet>,
    /// Of each frame, an index into `label_names`.
    pub labels: Vec<u32>,
    pub label_names: Vec<String>,
    /// Frames to train on.
    pub train: usize,
}

impl Period {
    pub fn trained(&self) -> Vec<usize> {
        (0..self.train).collect()
    }

    pub fn tested(&self) -> Vec<usize> {
        (self.train..self.frames.len()).collect()
    }

    /// What probes are fitted on, and what they are asked.
    pub fn split(&self) -> eval::split::Split {
        eval::split::Split { bank: self.trained(), queries: self.tested() }
    }
}

pub struct Stream {
    pub periods: Vec<Period>,
    /// Of every file's path, length and (in a layout of ours) bytes, by path.
    pub digest: Sha256,
}

impl Stream {
    pub fn read(source: &Source) -> Result<Self, StreamError> {
        let (root, found) = match source {
            Source::Folder(root) => (root, folder::find(root)?),
            Source::ImageNet { folder, periods } => (folder, imagenet::find(folder, *periods)?),
            Source::CelebA(root) => (root, celeba::find(root)?),
        };
        let is_ours = matches!(source, Source::Folder(_));
        let digest = digest(root, &found, is_ours)?;
        let periods =
            found.into_iter().map(|period| period.check(root, is_ours)).collect::<Result<_, _>>()?;
        Ok(Self { periods, digest })
    }
}

/// A labelled file.
struct Found {
    label: String,
    path: PathBuf,
}

/// A period as a layout gives it.
struct FoundPeriod {
    name: String,
    train: Vec<Found>,
    test: Vec<Found>,
}

impl FoundPeriod {
    /// `is_ours`: names may tell when a frame was taken.
    fn check(mut self, root: &Path, is_ours: bool) -> Result<Period, StreamError> {
        let labels_of =
            |frames: &[Found]| frames.iter().map(|frame| frame.label.clone()).collect::<BTreeSet<_>>();
        let (trained, tested) = (labels_of(&self.train), labels_of(&self.test));
        for (these, those, has) in [(&trained, &tested, "train"), (&tested, &trained, "test")] {
            if let Some(label) = these.difference(those).next() {
                return Err(StreamError::Label { period: self.name, label: label.clone(), has });
            }
        }
        let label_names: Vec<String> = trained.into_iter().collect();
        if let [label] = &label_names[..] {
            return Err(StreamError::OneLabel { period: self.name, label: label.clone() });
        }
        for half in [&mut self.train, &mut self.test] {
            half.sort_by(|a, b| (&a.label, &a.path).cmp(&(&b.label, &b.path)));
        }
        let all = || self.train.iter().chain(&self.test);
        let number = |frame: &Found| label_names.binary_search(&frame.label).map_or(u32::MAX, |at| at as u32);
        let labels = all().map(number).collect();
        let frames =
            all().enumerate().map(|(index, frame)| (meta((root, is_ours), frame, index), frame.path.clone()));
        let frames = Arc::new(FrameSet::of_files(frames));
        Ok(Period { name: self.name, frames, labels, label_names, train: self.train.len() })
    }
}

fn meta((root, is_ours): (&Path, bool), frame: &Found, index: usize) -> FrameMeta {
    let path = below(root, &frame.path);
    let captured = is_ours.then(|| capture(&path)).flatten();
    let (stream_id, captured_at) = captured.unwrap_or((&path, index as i64));
    FrameMeta {
        stream_id: stream_id.into(),
        captured_at: EventTime(captured_at),
        label: Some(frame.label.as_str().into()),
        topic: "benchmark".into(),
        partition: 0,
        offset: index as i64,
        row: 0,
    }
}

/// Stream and time in milliseconds of a file named `STREAM@MILLISECONDS.png`.
fn capture(path: &str) -> Option<(&str, i64)> {
    let (stream, time) = path.rsplit_once('.')?.0.rsplit_once('@')?;
    Some((stream, time.parse().ok()?))
}

/// Where a frame lies below the stream's folder: its path, or `STREAM@MILLISECONDS`.
pub fn path_of(frame: &FrameMeta) -> String {
    match frame.captured_at.as_ms() == frame.offset {
        true => frame.stream_id.to_string(),
        false => format!("{}@{}", frame.stream_id, frame.captured_at.as_ms()),
    }
}

/// As tools/streams prints it when it makes a stream: of each file's path, length and bytes, in the order of paths. The bytes of
/// a published set, which nobody changes, are left out: reading them all takes an hour.
fn digest(root: &Path, periods: &[FoundPeriod], with_bytes: bool) -> Result<Sha256, StreamError> {
    let files = periods.iter().flat_map(|period| period.train.iter().chain(&period.test));
    let mut files: Vec<(String, &Path)> =
        files.map(|frame| (below(root, &frame.path), frame.path.as_path())).collect();
    files.sort();
    let mut hasher = Hasher::new();
    for (below, path) in files {
        let error = |source| StreamError::Read { path: path.to_owned(), source };
        if with_bytes {
            let bytes = std::fs::read(path).map_err(error)?;
            hasher.update(format!("{below}\0{}\0", bytes.len()));
            hasher.update(&bytes);
        } else {
            hasher.update(format!("{below}\0{}\0", std::fs::metadata(path).map_err(error)?.len()));
        }
    }
    Ok(Sha256(hex::encode(hasher.finalize())))
}

fn below(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

/// What a folder holds, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, StreamError> {
    let error = |source| StreamError::Read { path: folder.to_owned(), source };
    let read = std::fs::read_dir(folder).map_err(error)?;
    let mut paths =
        read.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>, _>>().map_err(error)?;
    paths.sort();
    Ok(paths)
}

/// By name; other files beside folders (a licence, a description) are passed over.
fn folders(folder: &Path) -> Result<Vec<PathBuf>, StreamError> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_dir()).collect())
}

/// Every image of `folder`, an error for another file.
fn images(folder: &Path, label: &str) -> Result<Vec<Found>, StreamError> {
    let found = |path: PathBuf| {
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        match ["png", "jpg", "jpeg"].iter().any(|known| ending == *known) {
            true => Ok(Found { label: label.to_owned(), path }),
            false => Err(StreamError::Ending { path }),
        }
    };
    entries(folder)?.into_iter().map(found).collect()
}

fn read_text(path: &Path) -> Result<String, StreamError> {
    std::fs::read_to_string(path).map_err(|source| StreamError::Read { path: path.to_owned(), source })
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A stream of small images: `periods[p]` labels of period p, `train` and `test` frames of each. Frames of one label have one
    /// colour of their own, so that they can be told apart, and noise that differs.
    pub fn write_stream(folder: &Path, periods: &[usize], (train, test): (usize, usize)) {
        for (period, &labels) in periods.iter().enumerate() {
            for label in 0..labels {
                for (half, count) in [("train", train), ("test", test)] {
                    let target = folder.join(format!("{:02}-part/{half}/label{label}", period + 1));
                    std::fs::create_dir_all(&target).unwrap();
                    for frame in 0..count {
                        let salt = period * 97 + label * 31 + frame * 7 + half.len();
                        let image = image::RgbImage::from_fn(24, 24, |x, y| {
                            let base = [200 - 60 * label as u32, 40 + 50 * label as u32, 90 * period as u32];
                            let noise = (x * 13 + y * 29 + salt as u32 * 17) % 32;
                            image::Rgb(base.map(|value| (value + noise).min(255) as u8))
                        });
                        image.save(target.join(format!("f{frame:02}.png"))).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn a_name_may_tell_when_a_frame_was_taken() {
        assert_eq!(capture("01-a/train/x/walk03@583.png"), Some(("01-a/train/x/walk03", 583)));
        assert_eq!(capture("01-a/train/x/f07.png"), None);
        assert_eq!(capture("01-a/train/x/home@night.png"), None);
        let folder = tempfile::tempdir().unwrap();
        write_stream(folder.path(), &[2], (2, 1));
        let label = folder.path().join("01-part/train/label0");
        std::fs::rename(label.join("f01.png"), label.join("walk1@1250.png")).unwrap();
        let stream = read(folder.path(), Source::Folder(folder.path().into())).unwrap();
        let metas = stream.periods[0].frames.metas();
        assert_eq!(
            (&*metas[1].stream_id, metas[1].captured_at),
            ("01-part/train/label0/walk1", EventTime(1250))
        );
        assert_eq!(path_of(&metas[0]), "01-part/train/label0/f00.png");
        assert_eq!(path_of(&metas[1]), "01-part/train/label0/walk1@1250");
    }

    /// Writes files with their contents below `folder`.
    pub(super) fn write_files(folder: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
    }

    /// The stream, or the error's text with the folder's name left out.
    pub(super) fn read(folder: &Path, source: Source) -> Result<Stream, String> {
        let without_folder = |text: String| text.replace(&*folder.to_string_lossy(), "DIR");
        Stream::read(&source).map_err(|error| without_folder(error.to_string()))
    }

    /// Name, frames to train on, frames and labels of each period.
    pub(super) fn summary(stream: &Stream) -> Vec<(String, usize, usize, Vec<String>)> {
        let one = |period: &Period| {
            (period.name.clone(), period.train, period.frames.len(), period.label_names.clone())
        };
        stream.periods.iter().map(one).collect()
    }

    #[test]
    fn the_source_is_named_by_its_prefix() {
        assert_eq!(Source::parse("a/b", 10), Source::Folder("a/b".into()));
        assert_eq!(
            Source::parse("imagenet:/data", 4),
            Source::ImageNet { folder: "/data".into(), periods: 4 }
        );
        assert_eq!(Source::parse("celeba:x", 10), Source::CelebA("x".into()));
    }

    #[test]
    fn the_digest_is_that_of_the_script_that_makes_streams() {
        let folder = tempfile::tempdir().unwrap();
        write_files(
            folder.path(),
            &[
                ("1/train/a/x.png", "A"),
                ("1/train/b/x.png", "BB"),
                ("1/test/a/y.png", "C"),
                ("1/test/b/y.png", ""),
            ],
        );
        let joined =
            "1/test/a/y.png\x001\0C1/test/b/y.png\x000\x001/train/a/x.png\x001\0A1/train/b/x.png\x002\0BB";
        let stream = read(folder.path(), Source::Folder(folder.path().into())).unwrap();
        assert_eq!(stream.digest, Sha256::of(joined.as_bytes()));
    }
}
