//! The tasks of a process: each has a name, all stop together.
//!
//! The first that ends unasked, by an error or by a panic, or a signal, cancels the token that all share; then each has
//! until the drain deadline to come to its end, and what is left is aborted. Nothing restarts here: a process that
//! lost a part exits, and whatever started it starts it anew. What a task does when cancelled is its own affair.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// How a task came to its end.
type TaskResult = anyhow::Result<()>;

/// Why the process stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// SIGTERM or SIGINT, or whoever holds the token.
    Asked,
    /// Every task came to its end by itself.
    Finished,
    /// One task failed: the first one that did.
    Failed { task: String, reason: String },
}

/// How the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub cause: Cause,
    /// Tasks that had not come to their end at the drain deadline and were aborted.
    pub abandoned: Vec<String>,
}

impl Outcome {
    /// Whether everything ended as it should: exit code 0, otherwise 1.
    pub fn is_orderly(&self) -> bool {
        !matches!(self.cause, Cause::Failed { .. }) && self.abandoned.is_empty()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Asked => f.write_str("stopped as asked")?,
            Cause::Finished => f.write_str("finished")?,
            Cause::Failed { task, reason } => write!(f, "task {task} failed: {reason}")?,
        }
        match self.abandoned.as_slice() {
            [] => Ok(()),
            names => write!(f, "; not stopped within the drain deadline: {}", names.join(", ")),
        }
    }
}

/// Starts tasks and waits for them.
pub struct Supervisor {
    token: CancellationToken,
    drain: Duration,
    tasks: JoinSet<TaskResult>,
    names: BTreeMap<Id, String>,
}

impl Supervisor {
    /// `drain`: time between the wish to stop and the abortion of what still runs.
    pub fn new(drain: Duration) -> Self {
        Self { token: CancellationToken::new(), drain, tasks: JoinSet::new(), names: BTreeMap::new() }
    }

    /// Cancelled when the process is to stop; whoever cancels it asks for that.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Runs a task. Its `Ok` before it was asked to stop means that it has nothing more to do; the others go on.
    pub fn spawn(&mut self, name: &str, task: impl Future<Output = TaskResult> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name.to_owned());
    }

    /// Waits until all tasks have come to their end, or were abandoned.
    pub async fn run(mut self) -> Outcome {
        let mut failure = None;
        while !self.tasks.is_empty() && failure.is_none() {
            tokio::select! {
                biased;
                ended = self.tasks.join_next_with_id() => failure = self.ended(ended),
                () = self.token.cancelled() => break,
            }
        }
        let cause = match failure {
            Some(failed) => failed,
            None if self.token.is_cancelled() => Cause::Asked,
            None => Cause::Finished,
        };
        self.token.cancel();
        self.drain(cause).await
    }

    /// The first failure stays the cause; one that comes during the drain counts if there was none.
    async fn drain(mut self, mut cause: Cause) -> Outcome {
        let deadline = tokio::time::sleep(self.drain);
        tokio::pin!(deadline);
        while !self.tasks.is_empty() {
            tokio::select! {
                biased;
                ended = self.tasks.join_next_with_id() => {
                    if let (Some(failed), false) = (self.ended(ended), matches!(cause, Cause::Failed { .. })) {
                        cause = failed;
                    }
                }
                () = &mut deadline => break,
            }
        }
        self.tasks.abort_all();
        Outcome { cause, abandoned: self.names.into_values().collect() }
    }

    fn ended(&mut self, ended: Option<Result<(Id, TaskResult), JoinError>>) -> Option<Cause> {
        let (id, reason) = match ended? {
            Ok((id, Ok(()))) => (id, None),
            Ok((id, Err(error))) => (id, Some(format!("{error:#}"))),
            Err(error) => (error.id(), Some(panic_message(error))),
        };
        let task = self.names.remove(&id).unwrap_or_else(|| id.to_string());
        match reason {
            None => {
                tracing::debug!(%task, "task ended");
                None
            }
            Some(reason) => {
                tracing::error!(%task, %reason, "task failed; stopping all others");
                Some(Cause::Failed { task, reason })
            }
        }
    }
}

fn panic_message(error: JoinError) -> String {
    let Ok(payload) = error.try_into_panic() else {
        return "it was aborted".into();
    };
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// Exit code of a process that two signals have ended, as a shell reports SIGINT.
const FORCED_EXIT: i32 = 130;

/// The first SIGTERM or SIGINT cancels `token`, the second ends the process at once. Never ends by itself:
/// spawn it beside the supervisor.
pub async fn cancel_on_signals(token: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let signal = next_signal(&mut terminate, &mut interrupt).await;
    tracing::info!(signal, "stopping; a second signal ends the process at once");
    token.cancel();
    let signal = next_signal(&mut terminate, &mut interrupt).await;
    tracing::error!(signal, "ending at once; the next start goes on from what is durable");
    std::process::exit(FORCED_EXIT)
}

async fn next_signal(
    terminate: &mut tokio::signal::unix::Signal,
    interrupt: &mut tokio::signal::unix::Signal,
) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    /// Ends orderly once it is cancelled, and says that it did.
    fn patient(supervisor: &mut Supervisor, name: &str) -> Arc<AtomicBool> {
        let (token, stopped) = (supervisor.token(), Arc::new(AtomicBool::new(false)));
        let flag = stopped.clone();
        supervisor.spawn(name, async move {
            token.cancelled().await;
            flag.store(true, Ordering::SeqCst);
            Ok(())
        });
        stopped
    }

    #[tokio::test]
    async fn a_panic_stops_the_others_orderly_and_is_the_cause() {
        let mut supervisor = Supervisor::new(LONG);
        let stopped = patient(&mut supervisor, "serve");
        supervisor.spawn("ingest", async { panic!("out of {}", "luck") });
        let outcome = supervisor.run().await;
        assert_eq!(outcome.to_string(), "task ingest failed: panicked: out of luck");
        assert!(stopped.load(Ordering::SeqCst) && !outcome.is_orderly() && outcome.abandoned.is_empty());
    }

    #[tokio::test]
    async fn an_error_stops_the_others_and_keeps_its_whole_story() {
        let mut supervisor = Supervisor::new(LONG);
        let stopped = patient(&mut supervisor, "serve");
        supervisor.spawn("learn", async { Err(anyhow::anyhow!("disk full").context("writing the job")) });
        let outcome = supervisor.run().await;
        let reason = "writing the job: disk full".to_owned();
        assert_eq!(outcome.cause, Cause::Failed { task: "learn".into(), reason });
        assert!(stopped.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn who_was_asked_to_stop_and_does_so_is_orderly() {
        let mut supervisor = Supervisor::new(LONG);
        patient(&mut supervisor, "ingest");
        supervisor.token().cancel();
        let outcome = supervisor.run().await;
        assert_eq!(outcome, Outcome { cause: Cause::Asked, abandoned: vec![] });
        assert!(outcome.is_orderly());
    }

    #[tokio::test]
    async fn a_task_that_has_nothing_more_to_do_stops_nobody() {
        let mut supervisor = Supervisor::new(LONG);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        supervisor.spawn("first", async move {
            let _ = sender.send(());
            Ok(())
        });
        let token = supervisor.token();
        supervisor.spawn("second", async move {
            receiver.await?;
            assert!(!token.is_cancelled());
            Ok(())
        });
        assert_eq!(supervisor.run().await.cause, Cause::Finished);
    }

    #[tokio::test]
    async fn what_does_not_stop_in_time_is_abandoned_by_name() {
        let mut supervisor = Supervisor::new(Duration::ZERO);
        supervisor.spawn("stuck", std::future::pending());
        supervisor.token().cancel();
        let outcome = supervisor.run().await;
        assert_eq!(outcome.abandoned, ["stuck"]);
        assert!(!outcome.is_orderly());
    }

    #[tokio::test]
    async fn a_failure_during_the_drain_is_told() {
        let mut supervisor = Supervisor::new(LONG);
        let token = supervisor.token();
        supervisor.spawn("ingest", async move {
            token.cancelled().await;
            Err(anyhow::anyhow!("the last flush failed"))
        });
        supervisor.token().cancel();
        assert_eq!(supervisor.run().await.to_string(), "task ingest failed: the last flush failed");
    }
}
