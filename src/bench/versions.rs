//! Trained versions on disk, each under the hash of all that it is a function of.
//!
//! A folder a version: `encoder.safetensors`, `projector.safetensors`, and last `done.json`, without which it is not finished;
//! until then `checkpoint.safetensors`, from which an interrupted training goes on, bit for bit. Every file appears whole or
//! not at all.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{BenchError, file_error};
use crate::failpoint;
use crate::train::TrainError;
use crate::train::checkpoint::Identity;
use crate::train::device::select;
use crate::train::frames::FrameSet;
use crate::train::job::{self, Inputs, JobIo};
use crate::train::network::NetworkBytes;
use crate::train::spec::{Progress, TrainJob};
use crate::train::split::Split;
use crate::types::Sha256;

const ENCODER: &str = "encoder.safetensors";
const PROJECTOR: &str = "projector.safetensors";
const CHECKPOINT: &str = "checkpoint.safetensors";
/// Seconds that were spent up to the checkpoint.
const SPENT: &str = "spent.json";
const DONE: &str = "done.json";
const LOCK: &str = ".lock";

/// One training, and what tells it from all others besides its job.
pub struct Task<'a> {
    pub job: &'a TrainJob,
    /// Of the stream.
    pub digest: &'a Sha256,
    /// Which of the stream's frames these are; for the same job and stream another text for other frames.
    pub frames_text: String,
    pub frames: Arc<FrameSet>,
    pub train: Vec<usize>,
    pub teacher: Option<&'a NetworkBytes>,
}

/// A training's connection to the outside.
pub trait Watch {
    /// So many steps of the task are done.
    fn steps(&mut self, done: u64);

    /// True ends the training with a checkpoint and [`TrainError::Interrupted`].
    fn should_stop(&self) -> bool;
}

#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    pub network: NetworkBytes,
    pub steps: u64,
    /// Of training alone, all starts together.
    pub seconds: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
}

#[derive(Serialize, Deserialize)]
struct Done {
    steps: u64,
    seconds: f64,
}

/// See the module's text.
pub struct Versions {
    folder: PathBuf,
    /// Of the program's file: a build of another day may compute otherwise.
    program: Sha256,
}

impl Versions {
    pub fn open(folder: PathBuf) -> Result<Self, BenchError> {
        std::fs::create_dir_all(&folder).map_err(file_error("creating", &folder))?;
        let program = Path::new("/proc/self/exe");
        let program = Sha256::of(&std::fs::read(program).map_err(file_error("reading", program))?);
        Ok(Self { folder, program })
    }

    /// The task's version: found, or trained from where an earlier start left off.
    pub fn get(&self, task: &Task<'_>, watch: &mut dyn Watch) -> Result<Trained, VersionError> {
        let key = key(task, &self.program)?;
        let folder = self.folder.join(&key.0[..32]);
        let files = Folder(&folder);
        std::fs::create_dir_all(&folder)
            .map_err(|source| VersionError::File { path: folder.clone(), source })?;
        // Who comes second, in this process or in another, waits and finds it trained.
        let _only_one = files.lock()?;
        if let Some(done) = files.json::<Done>(DONE)? {
            files.remove(CHECKPOINT)?;
            files.remove(SPENT)?;
            watch.steps(done.steps);
            let network = NetworkBytes { encoder: files.read(ENCODER)?, projector: files.read(PROJECTOR)? };
            return Ok(Trained { network, steps: done.steps, seconds: done.seconds });
        }
        train(task, files, watch)
    }
}

/// Whatever the result is a function of changes the key, but for the machine.
fn key(task: &Task<'_>, program: &Sha256) -> Result<Sha256, VersionError> {
    let job = task.job;
    let selected = select(&job.device, job.precision).map_err(TrainError::from)?;
    let identity = Identity::new(job, &selected).map_err(TrainError::from)?;
    let teacher = task.teacher.map(|bytes| [Sha256::of(&bytes.encoder), Sha256::of(&bytes.projector)]);
    let all = serde_json::to_vec(&(program, identity, task.digest, &task.frames_text, teacher));
    let all = all.map_err(|error| TrainError::from(candle_core::Error::wrap(error)))?;
    Ok(Sha256::of(&all))
}

fn train(task: &Task<'_>, files: Folder<'_>, watch: &mut dyn Watch) -> Result<Trained, VersionError> {
    let checkpoint = files.read_if_there(CHECKPOINT)?;
    let spent = if checkpoint.is_some() { files.json(SPENT)?.unwrap_or(0.0) } else { 0.0 };
    let inputs = Inputs {
        frames: Arc::clone(&task.frames),
        split: Split { train: task.train.clone(), probe: Vec::new() },
        teacher: task.teacher.cloned(),
        init: None,
        checkpoint,
        data_threads: task.job.threads,
    };
    let mut io = Io { files, watch, started: Instant::now(), spent };
    let trained = job::run(task.job, inputs, &mut io)?;
    let seconds = io.seconds();
    files.write(ENCODER, &trained.network.encoder)?;
    files.write(PROJECTOR, &trained.network.projector)?;
    files.write_json(DONE, &Done { steps: trained.steps, seconds })?;
    files.remove(CHECKPOINT)?;
    files.remove(SPENT)?;
    Ok(Trained { network: trained.network, steps: trained.steps, seconds })
}

struct Io<'a> {
    files: Folder<'a>,
    watch: &'a mut dyn Watch,
    started: Instant,
    spent: f64,
}

impl Io<'_> {
    fn seconds(&self) -> f64 {
        self.spent + self.started.elapsed().as_secs_f64()
    }
}

impl JobIo for Io<'_> {
    fn progress(&mut self, progress: Progress) {
        if let Progress::Step { step, .. } | Progress::Resumed { step } = progress {
            self.watch.steps(step);
        }
    }

    fn save_checkpoint(
        &mut self,
        _: u64,
        bytes: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.files.write_json(SPENT, &self.seconds())?;
        Ok(self.files.write(CHECKPOINT, &bytes)?)
    }

    fn should_stop(&self) -> bool {
        self.watch.should_stop()
    }
}

/// A folder's files, which appear whole or not at all.
#[derive(Clone, Copy)]
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn error(&self, name: &str) -> impl FnOnce(std::io::Error) -> VersionError {
        let path = self.0.join(name);
        |source| VersionError::File { path, source }
    }

    /// Held until the file is dropped.
    fn lock(&self) -> Result<File, VersionError> {
        let open = || {
            let file = File::options().create(true).write(true).truncate(false).open(self.0.join(LOCK))?;
            file.lock()?;
            Ok(file)
        };
        open().map_err(self.error(LOCK))
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, VersionError> {
        std::fs::read(self.0.join(name)).map_err(self.error(name))
    }

    fn read_if_there(&self, name: &str) -> Result<Option<Vec<u8>>, VersionError> {
        match std::fs::read(self.0.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(self.error(name)),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, VersionError> {
        let Some(bytes) = self.read_if_there(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(std::io::Error::from).map_err(self.error(name))
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), VersionError> {
        let bytes = serde_json::to_vec(value).map_err(std::io::Error::from).map_err(self.error(name))?;
        self.write(name, &bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), VersionError> {
        failpoint::reach(&format!("bench.{name}.before"));
        write_whole(&self.0.join(name), bytes).map_err(self.error(name))?;
        failpoint::reach(&format!("bench.{name}.after"));
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), VersionError> {
        match std::fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(self.error(name)(error)),
            _ => Ok(()),
        }
    }
}

/// Replaces the file in one step.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // As any file that a program makes: the umask has its say.
    let mode = std::fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    std::fs::File::open(folder)?.sync_all()
}
