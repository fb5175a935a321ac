//! Every metric: its name, kind, help text and, for a histogram, its buckets.
//!
//! All of them exist from the first scrape: `install` describes each and gives it a first value, a counter 0
//! and a gauge NaN, because a gauge that was not measured yet is not 0. Who measures says so through the
//! `metrics` crate's macros with the constants below; label values come from the lists here, so they are bounded.

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

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
/// Flushes by `outcome`: `committed`, `superseded` (another consumer moved the position), `failed`.
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
pub const EFFECTIVE_RANK: &str = "palimpsest_effective_rank";
pub const LATEST_VERSION: &str = "palimpsest_latest_version";
pub const LATEST_PUBLISHED: &str = "palimpsest_latest_published_timestamp_seconds";
/// Labels `verdict` (`accepted`, `rejected`), `reason`.
pub const GATE_VERDICTS: &str = "palimpsest_gate_verdicts_total";

/// Labels `op` (`put`, `get`, `head`, `list`, `copy`, `delete`), `outcome` (`ok`, `error`).
pub const STORE_REQUESTS: &str = "palimpsest_store_requests_seconds";
/// Label `outcome` (`ok`, `conflict`, `error`).
pub const REGISTRY_TRANSACTIONS: &str = "palimpsest_registry_transactions_total";
/// 1 while this process holds the learner's lease.
pub const LEASE_HELD: &str = "palimpsest_registry_lease_held";
/// Labels `route`, `method`, `status`.
pub const HTTP_REQUESTS: &str = "palimpsest_http_requests_seconds";
/// Label `version`; always 1.
pub const BUILD_INFO: &str = "palimpsest_build_info";
