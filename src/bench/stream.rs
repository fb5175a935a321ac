//! A benchmark stream on disk: `DIR/NN-name/{train,test}/LABEL/*.{png,jpg,jpeg}`, a folder a period, in the order of names.
//!
//! Frames to train on teach the probes too; frames to test on are asked, and never trained on. Grey images become three
//! equal channels when they are decoded, which is not done here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256 as Hasher};

use crate::eval;
use crate::train::frames::{FrameMeta, FrameSet, FrameSetWriter};
use crate::types::{EventTime, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{path} can't be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no {what}: a stream is DIR/NN-name/{{train,test}}/LABEL/*.png or *.jpg")]
    Empty { path: PathBuf, what: &'static str },
    #[error("{path} is neither .png nor .jpg")]
    Ending { path: PathBuf },
    #[error("{path} has the label {label:?} in its {has} frames alone")]
    Label { path: PathBuf, label: String, has: &'static str },
    #[error("{path} has the one label {label:?}: nothing can be told apart")]
    OneLabel { path: PathBuf, label: String },
    #[error("a scratch file in {path}: {source}")]
    Scratch { path: PathBuf, source: std::io::Error },
}

/// One period: the frames to train on come first.
pub struct Period {
    pub name: String,
    /// A frame's stream is its path below the stream's folder.
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
    /// Of every file's path and bytes, in order.
    pub digest: Sha256,
}

impl Stream {
    /// Copies every frame's bytes to scratch files without a name, in the system's temporary folder.
    pub fn read(folder: &Path) -> Result<Self, StreamError> {
        let period = |path: &PathBuf| read_period(folder, path);
        let periods = folders(folder)?.iter().map(period).collect::<Result<Vec<_>, _>>()?;
        if periods.is_empty() {
            return Err(StreamError::Empty { path: folder.to_owned(), what: "period" });
        }
        let digest = digest(&periods).map_err(scratch_error)?;
        Ok(Self { periods, digest })
    }
}

/// As tools/streams prints it when it makes a stream: of each file's path, length and bytes, in the order of paths.
fn digest(periods: &[Period]) -> std::io::Result<Sha256> {
    let mut files: Vec<(&str, &Period, usize)> = Vec::new();
    for period in periods {
        files.extend(
            (0..period.frames.len()).map(|frame| (&*period.frames.meta(frame).stream_id, period, frame)),
        );
    }
    files.sort_by_key(|(path, ..)| *path);
    let mut hasher = Hasher::new();
    for (path, period, frame) in files {
        let bytes = period.frames.bytes(frame)?;
        hasher.update(format!("{path}\0{}\0", bytes.len()));
        hasher.update(&bytes);
    }
    Ok(Sha256(hex::encode(hasher.finalize())))
}

fn scratch_error(source: std::io::Error) -> StreamError {
    StreamError::Scratch { path: std::env::temp_dir(), source }
}

/// Frames of a period's two halves, as they are read.
struct Reader<'a> {
    root: &'a Path,
    writer: FrameSetWriter,
    labels: Vec<u32>,
}

fn read_period(root: &Path, folder: &Path) -> Result<Period, StreamError> {
    let writer = FrameSetWriter::create(&std::env::temp_dir()).map_err(scratch_error)?;
    let mut reader = Reader { root, writer, labels: Vec::new() };
    let trained = reader.read_half(&folder.join("train"))?;
    let train = reader.labels.len();
    let tested = reader.read_half(&folder.join("test"))?;
    for (these, those, has) in [(&trained, &tested, "train"), (&tested, &trained, "test")] {
        if let Some(label) = these.iter().find(|label| !those.contains(label)) {
            return Err(StreamError::Label { path: folder.to_owned(), label: label.clone(), has });
        }
    }
    if let [label] = &trained[..] {
        return Err(StreamError::OneLabel { path: folder.to_owned(), label: label.clone() });
    }
    let frames = Arc::new(reader.writer.finish().map_err(scratch_error)?);
    Ok(Period { name: name(folder), frames, labels: reader.labels, label_names: trained, train })
}

impl Reader<'_> {
    /// All frames below `folder`; the names of its labels, by which they are numbered.
    fn read_half(&mut self, folder: &Path) -> Result<Vec<String>, StreamError> {
        let labels = folders(folder)?;
        for (number, label) in (0..).zip(&labels) {
            let files = entries(label)?;
            if files.is_empty() {
                return Err(StreamError::Empty { path: label.clone(), what: "frame" });
            }
            for path in files {
                self.push(&path, number, &name(label))?;
            }
        }
        if labels.is_empty() {
            return Err(StreamError::Empty { path: folder.to_owned(), what: "label" });
        }
        Ok(labels.iter().map(|label| name(label)).collect())
    }

    fn push(&mut self, path: &Path, number: u32, label: &str) -> Result<(), StreamError> {
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        if !["png", "jpg", "jpeg"].iter().any(|known| ending == *known) {
            return Err(StreamError::Ending { path: path.to_owned() });
        }
        let read = |source| StreamError::Read { path: path.to_owned(), source };
        let bytes = std::fs::read(path).map_err(read)?;
        let below = path.strip_prefix(self.root).unwrap_or(path).to_string_lossy().into_owned();
        let index = self.labels.len() as i64;
        let meta = FrameMeta {
            stream_id: below.into(),
            captured_at: EventTime(index),
            label: Some(label.into()),
            topic: "benchmark".into(),
            partition: 0,
            offset: index,
            row: 0,
        };
        self.writer.push(meta, &bytes).map_err(read)?;
        self.labels.push(number);
        Ok(())
    }
}

/// By name; other files beside folders (a licence, a description) are passed over.
fn folders(folder: &Path) -> Result<Vec<PathBuf>, StreamError> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_dir()).collect())
}

/// By name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, StreamError> {
    let error = |source| StreamError::Read { path: folder.to_owned(), source };
    let read = std::fs::read_dir(folder).map_err(error)?;
    let mut paths =
        read.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>, _>>().map_err(error)?;
    paths.sort();
    Ok(paths)
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

    fn read(folder: &Path) -> Result<Stream, String> {
        Stream::read(folder).map_err(|error| error.to_string())
    }

    #[test]
    fn a_stream_is_read_by_period_half_and_label() {
        let folder = tempfile::tempdir().unwrap();
        write_stream(folder.path(), &[2, 3], (3, 2));
        std::fs::write(folder.path().join("LICENCE"), "free").unwrap();
        let stream = read(folder.path()).unwrap();
        let [a, b] = &stream.periods[..] else { panic!("{} periods", stream.periods.len()) };
        assert_eq!((a.name.as_str(), b.name.as_str()), ("01-part", "02-part"));
        assert_eq!((a.train, a.frames.len(), b.train, b.frames.len()), (6, 10, 9, 15));
        assert_eq!(a.labels, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]);
        assert_eq!(a.label_names, ["label0", "label1"]);
        assert_eq!(&*a.frames.meta(7).stream_id, "01-part/test/label0/f01.png");
        assert_eq!(a.split().queries, [6, 7, 8, 9]);
    }

    #[test]
    fn the_digest_is_that_of_the_script_that_makes_streams() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("1/train/a/x.png", "A"),
            ("1/train/b/x.png", "BB"),
            ("1/test/a/y.png", "C"),
            ("1/test/b/y.png", ""),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let joined =
            "1/test/a/y.png\x001\0C1/test/b/y.png\x000\x001/train/a/x.png\x001\0A1/train/b/x.png\x002\0BB";
        assert_eq!(read(folder.path()).unwrap().digest, Sha256::of(joined.as_bytes()));
    }

    #[test]
    fn the_digest_is_that_of_every_byte_and_name() {
        let digest = |change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write_stream(folder.path(), &[2], (2, 1));
            change(folder.path());
            read(folder.path()).unwrap().digest
        };
        let same = digest(&|_| ());
        assert_eq!(same, digest(&|_| ()));
        let frame = "01-part/train/label0/f00.png";
        assert_ne!(same, digest(&|folder| std::fs::write(folder.join(frame), "other").unwrap()));
        let renamed = "01-part/train/label0/f000.png";
        assert_ne!(
            same,
            digest(&|folder| std::fs::rename(folder.join(frame), folder.join(renamed)).unwrap())
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let message = |change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write_stream(folder.path(), &[2], (2, 1));
            change(folder.path());
            read(folder.path()).err().expect("an error").replace(&*folder.path().to_string_lossy(), "DIR")
        };
        let remove =
            |name: &'static str| move |folder: &Path| std::fs::remove_dir_all(folder.join(name)).unwrap();
        type Change<'a> = &'a dyn Fn(&Path);
        let cases: [(Change<'_>, &str); 6] = [
            (&remove("01-part"), "DIR holds no period"),
            (&remove("01-part/test"), "DIR/01-part/test can't be read"),
            (
                &remove("01-part/test/label1"),
                "DIR/01-part has the label \"label1\" in its train frames alone",
            ),
            (
                &|folder| std::fs::write(folder.join("01-part/train/label0/x.gif"), "").unwrap(),
                "DIR/01-part/train/label0/x.gif is neither .png nor .jpg",
            ),
            (
                &|folder| {
                    for half in ["train", "test"] {
                        std::fs::remove_dir_all(folder.join("01-part").join(half).join("label1")).unwrap();
                    }
                },
                "DIR/01-part has the one label \"label0\"",
            ),
            (
                &|folder| {
                    let label = folder.join("01-part/test/label0");
                    std::fs::remove_dir_all(&label).unwrap();
                    std::fs::create_dir(label).unwrap();
                },
                "DIR/01-part/test/label0 holds no frame",
            ),
        ];
        for (change, expected) in cases {
            let found = message(change);
            assert!(found.starts_with(expected), "{found}");
        }
    }
}
