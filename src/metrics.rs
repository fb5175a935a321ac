//! Every metric: its name, kind, help text and, for a histogram, its buckets.
//!
//! All of them exist from the first scrape: `install` describes each and gives it a first value, a counter 0
//! and a gauge NaN, because a gauge that was not measured yet is not 0. Who measures says so through the
//! `metrics` crate's macros with the constants below; label values come from the lists here, so they are bounded.

use std::time::Duration;

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

/// Frames by what became of them: `stored`, `late`, `dropped_late`, `dead_lettered`.
pub const INGEST_FRAMES: &str = "palimpsest_ingest_frames_total";
pub const INGEST_BYTES: &str = "palimpsest_ingest_bytes_total";
/// Labels `topic`, `partition`.
pub const INGEST_LAG: &str = "palimpsest_ingest_lag_records";
pub const INGEST_WATERMARK: &str = "palimpsest_ingest_watermark_timestamp_seconds";
/// Records that retention removed before they were read.
pub const INGEST_LOST: &str = "palimpsest_ingest_lost_records_total";
/// Partitions by `state`: `assigned`, `paused`, `stopped`.
pub const INGEST_PARTITIONS: &str = "palimpsest_ingest_partitions";
/// Flushes by `outcome`: `committed`, `superseded` (another consumer moved the position); and each try of a durable
/// step that `failed`, of which one flush may have many.
pub const INGEST_FLUSHES: &str = "palimpsest_ingest_flushes_total";
/// Bytes of frames in memory, not yet in the store.
pub const INGEST_BUFFERED: &str = "palimpsest_ingest_buffered_bytes";

/// Frames by the `state` of their period.
pub const PERIOD_FRAMES: &str = "palimpsest_period_frames";
/// Periods by `state`.
pub const PERIODS: &str = "palimpsest_periods";
pub const PERIOD_CLOSE_SECONDS: &str = "palimpsest_period_close_seconds";

pub const TRAIN_STEP: &str = "palimpsest_train_step";
pub const TRAIN_STEPS: &str = "palimpsest_train_steps";
/// Label `term`: `total`, `ntxent`, `distillation`.
pub const TRAIN_LOSS: &str = "palimpsest_train_loss";
pub const TRAIN_IMAGES: &str = "palimpsest_train_images_total";
pub const TRAIN_IMAGES_PER_SECOND: &str = "palimpsest_train_images_per_second";
/// Starts of the training process by `outcome`: `finished`, `failed`, `interrupted`.
pub const TRAIN_ATTEMPTS: &str = "palimpsest_train_attempts_total";

/// Labels `probe` (`knn`, `linear`, `few_shot`), `period`.
pub const EVAL_ACCURACY: &str = "palimpsest_eval_accuracy_ratio";
pub const FORGETTING: &str = "palimpsest_forgetting_ratio";
pub const FORGETTING_AVERAGE: &str = "palimpsest_forgetting_average_ratio";
pub const BACKWARD_TRANSFER: &str = "palimpsest_backward_transfer_ratio";
pub const CKA: &str = "palimpsest_cka_ratio";
/// Labels `period`, `against` (`learned`, `parent`).
pub const NEIGHBOUR_RETENTION: &str = "palimpsest_neighbour_retention_ratio";
pub const EFFECTIVE_RANK: &str = "palimpsest_effective_rank";
pub const LATEST_VERSION: &str = "palimpsest_latest_version";
pub const LATEST_PUBLISHED: &str = "palimpsest_latest_published_timestamp_seconds";
/// Labels `verdict` (`accepted`, `rejected`), `reason`.
pub const GATE_VERDICTS: &str = "palimpsest_gate_verdicts_total";

/// Labels `op` (`put`, `get`, `list`, `delete`), `outcome` (`ok`, `error`).
pub const STORE_REQUESTS: &str = "palimpsest_store_requests_seconds";
/// Label `outcome` (`ok`, `conflict`, `error`).
pub const REGISTRY_TRANSACTIONS: &str = "palimpsest_registry_transactions_total";
/// 1 while this process holds the learner's lease.
pub const LEASE_HELD: &str = "palimpsest_registry_lease_held";
/// Labels `route`, `method`, `status`.
pub const HTTP_REQUESTS: &str = "palimpsest_http_requests_seconds";
/// Label `version`; always 1.
pub const BUILD_INFO: &str = "palimpsest_build_info";

/// Seconds from the end of a period to its publication: minutes to days.
const CLOSE_BUCKETS: &[f64] =
    &[10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0, 86_400.0, 259_200.0];
/// Seconds of one request: a local file to a large upload.
const REQUEST_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Between two sweeps of the histograms. Longer keeps more values in memory, 8 bytes each; shorter gains nothing.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

/// Labels with all their values: a series exists from the start for every combination.
type Labels = &'static [(&'static str, &'static [&'static str])];

struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Option<Unit>,
    help: &'static str,
    /// `None`: the values (topics, periods) are known only when something is measured.
    labels: Option<Labels>,
}

const STATES: Labels = &[(
    "state",
    &["open", "sealed", "merged", "training", "evaluating", "published", "rejected", "failed", "expired"],
)];
const PROBES: Labels = &[("probe", &["knn", "linear", "few_shot"])];
const REQUESTS: Labels = &[("op", &["put", "get", "list", "delete"]), ("outcome", &["ok", "error"])];
/// What a gate can hold against a candidate.
pub const GATE_REASONS: &[&str] =
    &["not_finite", "collapsed", "learned_nothing", "forgot_parent", "forgot_cumulative", "drifted"];
const ACCEPTED: Labels = &[("verdict", &["accepted"]), ("reason", &["none"])];
const REJECTED: Labels = &[("verdict", &["rejected"]), ("reason", GATE_REASONS)];

/// `route` of [`HTTP_REQUESTS`]: the router's own patterns, so that no client can make up a label.
pub const ROUTES: &[&str] = &[
    "/v1/versions",
    "/v1/versions/{version}",
    "/v1/versions/{version}/files/{*path}",
    "/v1/periods",
    "/v1/aliases/{alias}",
    "/v1/embed",
    "/healthz",
    "/readyz",
    "/metrics",
    UNMATCHED_ROUTE,
];
/// `route` of a request that no route takes.
pub const UNMATCHED_ROUTE: &str = "none";

const fn counter(name: &'static str, help: &'static str, labels: Labels) -> Metric {
    Metric { name, kind: Kind::Counter, unit: None, help, labels: Some(labels) }
}

const fn gauge(name: &'static str, help: &'static str, labels: Option<Labels>) -> Metric {
    Metric { name, kind: Kind::Gauge, unit: None, help, labels }
}

const fn seconds(name: &'static str, buckets: &'static [f64], help: &'static str, labels: Labels) -> Metric {
    let kind = Kind::Histogram(buckets);
    Metric { name, kind, unit: Some(Unit::Seconds), help, labels: Some(labels) }
}

/// Every metric but `BUILD_INFO`, whose label is this program's version.
static CATALOG: &[Metric] = &[
    counter(
        INGEST_FRAMES,
        "Frames by what became of them.",
        &[("outcome", &["stored", "late", "dropped_late", "dead_lettered"])],
    ),
    counter(INGEST_BYTES, "Bytes of encoded frames written to segments.", &[]),
    gauge(INGEST_LAG, "Records between a partition's position and its end.", None),
    gauge(INGEST_WATERMARK, "Event time up to which the stream is complete.", Some(&[])),
    counter(INGEST_LOST, "Records that retention removed before they were read.", &[]),
    gauge(
        INGEST_PARTITIONS,
        "Partitions of this process by state.",
        Some(&[("state", &["assigned", "paused", "stopped"])]),
    ),
    counter(
        INGEST_FLUSHES,
        "Flushes by outcome; failed counts tries.",
        &[("outcome", &["committed", "superseded", "failed"])],
    ),
    gauge(INGEST_BUFFERED, "Bytes of frames in memory and not yet in the store.", Some(&[])),
    gauge(PERIOD_FRAMES, "Frames by the state of their period.", Some(STATES)),
    gauge(PERIODS, "Periods by state.", Some(STATES)),
    seconds(PERIOD_CLOSE_SECONDS, CLOSE_BUCKETS, "From the end of a period to its publication.", &[]),
    gauge(TRAIN_STEP, "Step of the running or last training.", Some(&[])),
    gauge(TRAIN_STEPS, "Steps that the running or last training has.", Some(&[])),
    gauge(
        TRAIN_LOSS,
        "Loss of the last step by term.",
        Some(&[("term", &["total", "ntxent", "distillation"])]),
    ),
    counter(TRAIN_IMAGES, "Frames that training steps have used.", &[]),
    gauge(TRAIN_IMAGES_PER_SECOND, "Frames a second that training uses.", Some(&[])),
    counter(
        TRAIN_ATTEMPTS,
        "Starts of the training process by outcome.",
        &[("outcome", &["finished", "failed", "interrupted"])],
    ),
    gauge(EVAL_ACCURACY, "Accuracy of the latest version on a period's probe set.", None),
    gauge(
        FORGETTING,
        "Accuracy that the latest version lost on a period's probe set, against its best ancestor.",
        None,
    ),
    gauge(FORGETTING_AVERAGE, "Mean forgetting of the latest version over all probe sets.", Some(PROBES)),
    gauge(
        BACKWARD_TRANSFER,
        "Mean accuracy that the latest version won on earlier periods since they were learned.",
        Some(PROBES),
    ),
    gauge(CKA, "Similarity of the latest version to the one that learned the period.", None),
    gauge(
        NEIGHBOUR_RETENTION,
        "How much of the neighbourhoods under the version that learned the period, or under the parent, the latest one retains.",
        None,
    ),
    gauge(EFFECTIVE_RANK, "RankMe of the latest version; low: collapsed.", Some(&[])),
    gauge(LATEST_VERSION, "Number of the version that latest names.", Some(&[])),
    gauge(LATEST_PUBLISHED, "When that version was published.", Some(&[])),
    counter(GATE_VERDICTS, "Verdicts on candidates.", ACCEPTED),
    counter(GATE_VERDICTS, "Verdicts on candidates.", REJECTED),
    seconds(STORE_REQUESTS, REQUEST_BUCKETS, "Requests to the object store.", REQUESTS),
    counter(
        REGISTRY_TRANSACTIONS,
        "Transactions by outcome; conflict: somebody else was first.",
        &[("outcome", &["ok", "conflict", "error"])],
    ),
    gauge(LEASE_HELD, "1 while this process is the learner.", Some(&[])),
    seconds(
        HTTP_REQUESTS,
        REQUEST_BUCKETS,
        "Requests over HTTP.",
        &[("route", ROUTES), ("method", &["GET"]), ("status", &["200"])],
    ),
];

/// Makes the process's recorder. `pipeline` becomes a label of every series. Call it once, before any measuring.
/// The handle renders the text; [`upkeep`] must run beside it.
///
/// # Errors
/// If a recorder is installed already.
pub fn install(pipeline: &str) -> Result<PrometheusHandle, BuildError> {
    let handle = builder(pipeline)?.install_recorder()?;
    describe();
    Ok(handle)
}

/// Sorts the values of histograms into their buckets now and then until `token` is cancelled. Without it every value is
/// kept until the next scrape, which may never come.
pub async fn upkeep(handle: PrometheusHandle, token: CancellationToken) {
    let mut due = tokio::time::interval(UPKEEP_INTERVAL);
    while token.run_until_cancelled(due.tick()).await.is_some() {
        handle.run_upkeep();
    }
}

fn builder(pipeline: &str) -> Result<PrometheusBuilder, BuildError> {
    let mut builder = PrometheusBuilder::new().add_global_label("pipeline", pipeline);
    for metric in CATALOG {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
        }
    }
    Ok(builder)
}

/// Describes every metric to the current recorder and gives each known series its first value.
fn describe() {
    for metric in CATALOG {
        let Metric { name, kind, unit, help, labels } = metric;
        let unit = unit.unwrap_or(Unit::Count);
        match kind {
            Kind::Counter => metrics::describe_counter!(*name, unit, *help),
            Kind::Gauge => metrics::describe_gauge!(*name, unit, *help),
            Kind::Histogram(_) => metrics::describe_histogram!(*name, unit, *help),
        }
        for labels in labels.map(combinations).unwrap_or_default() {
            match kind {
                Kind::Counter => metrics::counter!(*name, &labels).absolute(0),
                Kind::Gauge => metrics::gauge!(*name, &labels).set(f64::NAN),
                Kind::Histogram(_) => drop(metrics::histogram!(*name, &labels)),
            }
        }
    }
    metrics::describe_gauge!(BUILD_INFO, "1, with this program's version.");
    metrics::gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

fn combinations(labels: Labels) -> Vec<Vec<(&'static str, &'static str)>> {
    labels.iter().fold(vec![Vec::new()], |combinations, (label, values)| {
        let extend = |base: &Vec<_>, value| base.iter().copied().chain([(*label, value)]).collect();
        combinations.iter().flat_map(|base| values.iter().map(move |value| extend(base, *value))).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_scrape() -> String {
        let recorder = builder("main").unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, describe);
        recorder.handle().render()
    }

    #[tokio::test]
    async fn upkeep_ends_when_it_is_cancelled() {
        let handle = builder("main").unwrap().build_recorder().handle();
        let token = CancellationToken::new();
        let running = tokio::spawn(upkeep(handle, token.clone()));
        tokio::task::yield_now().await;
        assert!(!running.is_finished());
        token.cancel();
        running.await.unwrap();
    }

    /// With `PALIMPSEST_METRICS_FILE=path` the text is kept there, for `promtool check metrics`.
    #[test]
    fn every_metric_whose_labels_are_known_is_in_the_first_scrape() {
        let text = first_scrape();
        if let Some(path) = std::env::var_os("PALIMPSEST_METRICS_FILE") {
            std::fs::write(path, &text).unwrap();
        }
        for metric in CATALOG.iter().filter(|metric| metric.labels.is_some()) {
            assert!(text.contains(&format!("# HELP {} ", metric.name)), "{}", metric.name);
            let is_series = |line: &str| line.starts_with(metric.name) && line.contains("pipeline=\"main\"");
            assert!(text.lines().any(is_series), "{}", metric.name);
        }
    }

    #[test]
    fn a_counter_starts_at_zero_and_a_gauge_at_nothing() {
        let text = first_scrape();
        let has = |line: &str| text.lines().any(|found| found == line);
        assert!(has("palimpsest_ingest_frames_total{pipeline=\"main\",outcome=\"stored\"} 0"), "{text}");
        assert!(has("palimpsest_train_loss{pipeline=\"main\",term=\"ntxent\"} NaN"), "{text}");
        assert!(has(
            "palimpsest_gate_verdicts_total{pipeline=\"main\",verdict=\"rejected\",reason=\"collapsed\"} 0"
        ));
        assert!(!text.contains("verdict=\"accepted\",reason=\"collapsed\""));
    }

    #[test]
    fn a_histogram_has_buckets_before_anything_is_measured() {
        let text = first_scrape();
        assert!(
            text.contains("palimpsest_period_close_seconds_bucket{pipeline=\"main\",le=\"3600\"} 0"),
            "{text}"
        );
        assert!(!text.contains("quantile="));
    }
}
