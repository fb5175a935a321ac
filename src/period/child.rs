//! The training process seen from its parent.
//!
//! Training and evaluation run in a process of their own, so that a CUDA fault or an out-of-memory kill takes
//! neither ingest nor serving down. The child holds the read end of a pipe whose write end is here: when this
//! process is gone, however it went, the pipe closes and the child stops. It answers in JSON lines
//! ([`Progress`]) on its standard output; its log goes where ours goes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::train::spec::Progress;

/// How to start the training process.
#[derive(Debug, Clone)]
pub struct Program {
    pub executable: PathBuf,
    /// What comes before the name of the job file.
    pub arguments: Vec<OsString>,
    /// Added to our own environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Where its log is appended; `None`: where ours goes.
    pub log: Option<PathBuf>,
}

/// A started training process. Dropping it kills the process.
pub struct TrainingProcess {
    child: Child,
    /// Closing it asks the child to write a checkpoint and to end.
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    /// The reason that the child gave before it ended.
    reason: Option<String>,
}

/// What the training process did last.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildEvent {
    Progress(Progress),
    /// It ended, well or not; a reason where it did not.
    Ended {
        failure: Option<String>,
    },
}

impl TrainingProcess {
    /// Starts the program on one job file.
    pub fn start(program: &Program, job_path: &str) -> std::io::Result<Self> {
        let log = match &program.log {
            Some(path) => std::fs::OpenOptions::new().create(true).append(true).open(path)?.into(),
            None => Stdio::inherit(),
        };
        let mut child = Command::new(&program.executable)
            .envs(program.environment.iter().map(|(key, value)| (key, value)))
            .args(&program.arguments)
            .arg(job_path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // A Ctrl-C on the terminal is ours to answer: the child must not get it as well.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout =
            child.stdout.take().ok_or_else(|| std::io::Error::other("the child has no standard output"))?;
        Ok(Self { child, stdin, lines: BufReader::new(stdout).lines(), reason: None })
    }

    /// The next event. After [`ChildEvent::Ended`] it must not be called again. Safe to cancel.
    pub async fn next(&mut self) -> std::io::Result<ChildEvent> {
        while let Some(line) = self.lines.next_line().await? {
            match serde_json::from_str::<Progress>(&line) {
                Ok(Progress::Failed { reason }) => self.reason = Some(reason),
                Ok(progress) => return Ok(ChildEvent::Progress(progress)),
                Err(error) => {
                    tracing::warn!(%line, %error, "the training process wrote a line that is not progress")
                }
            }
        }
        let status = self.child.wait().await?;
        Ok(ChildEvent::Ended { failure: self.failure_of(status) })
    }

    fn failure_of(&mut self, status: ExitStatus) -> Option<String> {
        if status.success() {
            return None;
        }
        Some(self.reason.take().unwrap_or_else(|| format!("the training process ended with {status}")))
    }

    /// Asks it to write a checkpoint and end, waits for `patience`, then kills it.
    pub async fn stop(mut self, patience: Duration) {
        drop(self.stdin.take());
        let ended = tokio::time::timeout(patience, async {
            while let Ok(event) = self.next().await {
                if matches!(event, ChildEvent::Ended { .. }) {
                    break;
                }
            }
        });
        if ended.await.is_err() {
            tracing::warn!(
                ?patience,
                "the training process did not end in time and is killed: its last checkpoint counts"
            );
            if let Err(error) = self.child.kill().await {
                tracing::error!(%error, "the training process could not be killed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        Program {
            executable: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![],
            log: None,
        }
    }

    #[tokio::test]
    async fn progress_arrives_line_by_line_and_then_the_end() {
        let script = r#"echo '{"event":"trained","step":3}'; echo nonsense"#;
        let mut process = TrainingProcess::start(&shell(script), "job").unwrap();
        assert_eq!(process.next().await.unwrap(), ChildEvent::Progress(Progress::Trained { step: 3 }));
        assert_eq!(process.next().await.unwrap(), ChildEvent::Ended { failure: None });
    }

    #[tokio::test]
    async fn the_reason_of_a_failure_is_the_childs_own_where_it_gave_one() {
        let script = r#"echo '{"event":"failed","reason":"loss is NaN at step 7"}'; exit 1"#;
        let mut process = TrainingProcess::start(&shell(script), "job").unwrap();
        let Ok(ChildEvent::Ended { failure: Some(reason) }) = process.next().await else {
            panic!("no failure")
        };
        assert_eq!(reason, "loss is NaN at step 7");

        let mut killed = TrainingProcess::start(&shell("kill -9 $$"), "job").unwrap();
        let Ok(ChildEvent::Ended { failure: Some(reason) }) = killed.next().await else {
            panic!("no failure")
        };
        assert!(reason.contains("signal: 9"), "{reason}");
    }

    #[tokio::test]
    async fn a_stop_closes_the_childs_standard_input_and_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("ended");
        let script = format!("cat > /dev/null; touch {}", mark.display());
        let process = TrainingProcess::start(&shell(&script), "job").unwrap();
        process.stop(Duration::from_secs(20)).await;
        assert!(mark.exists());
    }
}
