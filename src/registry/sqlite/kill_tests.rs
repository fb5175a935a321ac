//! Kills a process just before and just after each commit and looks at what is left: all of the transaction or
//! nothing of it, and from there the work goes on to the same end.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use super::tests::in_file;
use super::*;
use crate::registry::suite::*;

/// Names the directory of the database to the process that is to be killed.
const DIRECTORY: &str = "PALIMPSEST_TEST_VICTIM";
/// SIGABRT.
const ABORTED: i32 = 6;

/// The writing methods in the order in which [`work`] first calls them, as failpoints count them.
const ORDER: [(&str, &str); 14] = [
    ("migrate", ""),
    ("open_topic", ""),
    ("register_partitions", ""),
    ("start_position", ""),
    ("commit_flush", ""),
    ("commit_flush", "#2"),
    ("acquire_lease", ""),
    ("seal", ""),
    ("begin_attempt", ""),
    ("begin_start", ""),
    ("set_evaluating", ""),
    ("reserve_version", ""),
    ("publish", ""),
    ("expire", ""),
];

/// One period from its first frame to its expiry, going on from whatever an earlier process has left.
async fn work(directory: &Path) {
    let registry = in_file(directory, "main").await;
    let partition = partition(&registry).await;
    for n in 0..2 {
        let next = flush(&partition, n * 10..n * 10 + 10, &[(n, 10)]);
        match registry.commit_flush(&next).await {
            Ok(()) | Err(RegistryError::PositionMoved { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let lease = lease(&registry).await;
    loop {
        match state(&registry, 0).await {
            PeriodState::Open => drop(registry.seal(&lease, id(0), 1, period(1), NOW).await.unwrap()),
            PeriodState::Sealed => {
                drop(registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap())
            }
            PeriodState::Training => {
                registry.begin_start(&lease, id(0), 1).await.unwrap();
                registry.set_evaluating(&lease, id(0)).await.unwrap();
            }
            PeriodState::Evaluating => {
                let version =
                    registry.reserve_version(&lease, id(0), 1, &[file("a")], NOW).await.unwrap().version;
                registry.publish(&lease, &publication(version), NOW).await.unwrap();
            }
            PeriodState::Published => drop(registry.expire(&lease, id(0), NOW).await.unwrap()),
            PeriodState::Expired => break,
            other => panic!("{other:?}"),
        }
    }
}

/// Does nothing unless it is the child process of the test below.
#[tokio::test]
async fn victim() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        work(Path::new(&directory)).await;
    }
}

/// Everything that can be read, as text.
async fn snapshot(directory: &Path) -> String {
    let registry = in_file(directory, "main").await;
    let attempt = registry.attempt(id(0), 1).await.ok();
    let mut versions = vec![];
    for listed in registry.versions().await.unwrap() {
        // With its manifest.
        versions.push(registry.version(listed.version).await.unwrap());
    }
    let world = (
        registry.positions().await.unwrap(),
        registry.periods().await.unwrap(),
        registry.live_objects().await.unwrap(),
        versions,
        registry.aliases().await.unwrap(),
        attempt,
    );
    registry.close().await;
    format!("{world:#?}")
}

/// What is left when a process is killed at `point`, once it and everything that a second process does is checked.
async fn killed_at(point: &str, finished: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["registry::sqlite::kill_tests::victim", "--exact"])
        .env(DIRECTORY, directory.path())
        .env("PALIMPSEST_ABORT_AT", point)
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(ABORTED), "{point} was not reached: {output:?}");
    let left = snapshot(directory.path()).await;
    work(directory.path()).await;
    // A start that was drawn before the kill is not drawn again.
    let end = snapshot(directory.path()).await.replace("start: 2", "start: 1");
    assert_eq!(end, finished, "after {point}");
    left
}

#[tokio::test]
async fn a_killed_process_leaves_all_of_a_transaction_or_nothing() {
    let undisturbed = tempfile::tempdir().unwrap();
    let mut expected = snapshot(undisturbed.path()).await;
    work(undisturbed.path()).await;
    let finished = snapshot(undisturbed.path()).await;
    for (method, times) in ORDER {
        let before = killed_at(&format!("registry.{method}.before_commit{times}"), &finished).await;
        assert_eq!(before, expected, "{method}{times} left something behind without its commit");
        expected = killed_at(&format!("registry.{method}.after_commit{times}"), &finished).await;
        // Neither the schema, a topic without partitions, nor a lease can be seen.
        let unseen = ["migrate", "open_topic", "acquire_lease"].contains(&method);
        assert_eq!(before == expected, unseen, "what {method}{times} committed is not what is there");
    }
    assert_eq!(expected, finished);
}
