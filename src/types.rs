//! The words that every part of the program shares: instants, periods, versions, places in a topic.
//!
//! Each is a newtype whose text form is the one used in object names, URLs, logs and JSON, so that a value
//! can be read back from wherever it was written. Nothing here does I/O or reads the clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the form of the type it was parsed as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct ParseError {
    pub value: String,
    pub expected: &'static str,
}

impl ParseError {
    fn new(value: &str, expected: &'static str) -> Self {
        Self { value: value.to_owned(), expected }
    }
}

/// An instant in milliseconds since 1970-01-01T00:00:00Z. Event time and wall-clock time alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventTime(pub i64);

impl EventTime {
    pub const fn from_ms(ms: i64) -> Self {
        Self(ms)
    }

    pub const fn as_ms(self) -> i64 {
        self.0
    }

    /// Seconds since the epoch, for metrics.
    pub fn as_seconds(self) -> f64 {
        self.0 as f64 / 1000.0
    }

    pub const fn plus_ms(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    pub const fn minus_ms(self, ms: i64) -> Self {
        Self(self.0.saturating_sub(ms))
    }
}

impl fmt::Display for EventTime {
    /// RFC 3339 in UTC with milliseconds, `2026-01-31T23:59:59.000Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(instant) => write!(f, "{instant:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl FromStr for EventTime {
    type Err = ParseError;

    /// RFC 3339, with any offset.
    fn from_str(value: &str) -> Result<Self, ParseError> {
        value
            .parse::<jiff::Timestamp>()
            .map(|instant| Self(instant.as_millisecond()))
            .map_err(|_| ParseError::new(value, "an RFC 3339 instant such as 2026-01-31T00:00:00Z"))
    }
}

/// A period, named by the instant at which it starts. Text form `20260131T000000Z`
/// (`20260131T000000.250Z` where it does not start on a whole second): sorts as the instants do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeriodId(pub EventTime);

impl PeriodId {
    pub const fn start(self) -> EventTime {
        self.0
    }
}

impl fmt::Display for PeriodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(instant) = jiff::Timestamp::from_millisecond(self.0.0) else {
            return write!(f, "{}ms", self.0.0);
        };
        let seconds = instant.strftime("%Y%m%dT%H%M%S");
        match self.0.0.rem_euclid(1000) {
            0 => write!(f, "{seconds}Z"),
            ms => write!(f, "{seconds}.{ms:03}Z"),
        }
    }
}

impl FromStr for PeriodId {
    type Err = ParseError;

    /// Its own text form, or RFC 3339.
    fn from_str(value: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new(value, "a period id such as 20260131T000000Z");
        if value.contains('-') {
            return value.parse::<EventTime>().map(Self).map_err(|_| error());
        }
        let digits = value.strip_suffix('Z').ok_or_else(error)?;
        let (seconds, ms) = match digits.split_once('.') {
            Some((seconds, ms)) if ms.len() == 3 => (seconds, ms.parse::<i64>().map_err(|_| error())?),
            Some(_) => return Err(error()),
            None => (digits, 0),
        };
        let civil = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%S", seconds).map_err(|_| error())?;
        let instant = jiff::tz::TimeZone::UTC.to_timestamp(civil).map_err(|_| error())?;
        Ok(Self(EventTime(instant.as_millisecond() + ms)))
    }
}

/// A published embedding version. Text form `v000042`; a number once given is never given again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{:06}", self.0)
    }
}

impl FromStr for Version {
    type Err = ParseError;

    /// `v000042`, `v42` or `42`.
    fn from_str(value: &str) -> Result<Self, ParseError> {
        let digits = value.strip_prefix('v').unwrap_or(value);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseError::new(value, "a version such as v000042"));
        }
        digits.parse().map(Self).map_err(|_| ParseError::new(value, "a version such as v000042"))
    }
}

/// Whether an alias of a version may have this name: 1 to 63 of `a-z`, `0-9` and `-`, beginning with a letter, and
/// nothing that reads as a version, which would always be taken for that version and never for the alias.
pub fn is_alias_name(name: &str) -> bool {
    let is_legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(is_legal)
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.parse::<Version>().is_err()
}

/// Serialises a type by its text form.
macro_rules! text_serde {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
text_serde!(PeriodId, Version);

/// One incarnation of a topic: a topic deleted and made anew has the same name and another id.
/// Letters, digits, `-` and `_` only, because it is a part of object names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TopicId(pub String);

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A partition of one incarnation of a topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicPartition {
    pub topic: String,
    pub topic_id: TopicId,
    pub partition: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.topic_id, self.partition)
    }
}

/// Offsets of one partition, half open: `start` is the first one inside, `end` the first one after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OffsetRange {
    pub start: i64,
    pub end: i64,
}

impl fmt::Display for OffsetRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.end)
    }
}

/// SHA-256 of an object's bytes, as lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sha256(pub String);

impl Sha256 {
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest;
        Self(hex::encode(sha2::Sha256::digest(bytes)))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object and the bytes that it must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Object name relative to the store's root.
    pub path: String,
    pub sha256: Sha256,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeriodState {
    /// Takes frames.
    Open,
    /// Its segment list is final; it waits for its turn to be trained on.
    Sealed,
    /// Had too few frames: they were given to `merged_into`.
    Merged,
    Training,
    Evaluating,
    Published,
    /// The gate refused its candidate.
    Rejected,
    /// Training failed for good.
    Failed,
    /// Its frames were deleted.
    Expired,
}

impl PeriodState {
    pub const ALL: [Self; 9] = [
        Self::Open,
        Self::Sealed,
        Self::Merged,
        Self::Training,
        Self::Evaluating,
        Self::Published,
        Self::Rejected,
        Self::Failed,
        Self::Expired,
    ];

    /// The text in the registry, in JSON and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Sealed => "sealed",
            Self::Merged => "merged",
            Self::Training => "training",
            Self::Evaluating => "evaluating",
            Self::Published => "published",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
            Self::Expired => "expired",
        }
    }

    /// Reads [`PeriodState::as_str`] back.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeriodRecord {
    pub id: PeriodId,
    pub end: EventTime,
    pub state: PeriodState,
    /// Frames and bytes of its live segments; after a merge or expiry what they were.
    pub frames: u64,
    pub bytes: u64,
    /// An operator has asked for it to be closed whatever the watermark.
    pub close_requested: bool,
    pub sealed_at: Option<EventTime>,
    /// When it became published, rejected or failed.
    pub settled_at: Option<EventTime>,
    pub merged_into: Option<PeriodId>,
    /// The version that it brought.
    pub version: Option<Version>,
    /// Why it was rejected or failed.
    pub reason: Option<String>,
    /// Operator's retries so far: each draws a new attempt seed.
    pub retries: u32,
    /// Number of the newest attempt; 0: none yet.
    pub attempt: u32,
}

/// One try at training a period. A crash goes on with the same attempt in a new start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptRecord {
    pub period: PeriodId,
    /// 1, 2, ...
    pub number: u32,
    pub program_version: String,
    /// What `latest` named when the attempt began: the teacher.
    pub parent: Option<Version>,
    /// The newest start; 0: none yet. Each start owns one prefix in the store.
    pub start: u64,
    /// Starts that ended in a failure of the training process.
    pub failures: u32,
    pub last_failure: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn period_ids_read_back_and_sort_as_their_instants() {
        for ms in [0, 1_769_817_600_000, 1_769_817_600_250] {
            let id = PeriodId(EventTime(ms));
            assert_eq!(id.to_string().parse::<PeriodId>(), Ok(id));
        }
        assert_eq!(PeriodId(EventTime(1_769_817_600_000)).to_string(), "20260131T000000Z");
        assert_eq!("2026-01-31T00:00:00Z".parse::<PeriodId>().unwrap().0.0, 1_769_817_600_000);
        assert!("20260131".parse::<PeriodId>().is_err());
    }

    #[test]
    fn versions_read_back_in_long_and_short_form() {
        assert_eq!(Version(42).to_string(), "v000042");
        assert_eq!("v000042".parse(), Ok(Version(42)));
        assert_eq!("42".parse(), Ok(Version(42)));
        assert!("latest".parse::<Version>().is_err());
    }

    #[test]
    fn an_alias_can_not_be_taken_for_a_version() {
        for name in ["latest", "stable-2", "v", "v42-old", &"a".repeat(63)] {
            assert!(is_alias_name(name), "{name}");
        }
        for name in ["", "v42", "v000042", "42", "Latest", "a/b", "-a", &"a".repeat(64)] {
            assert!(!is_alias_name(name), "{name}");
        }
    }

    #[test]
    fn an_instant_reads_back() {
        let instant: EventTime = "2026-01-31T00:00:00.500Z".parse().unwrap();
        assert_eq!(instant.to_string(), "2026-01-31T00:00:00.500Z");
    }
}
