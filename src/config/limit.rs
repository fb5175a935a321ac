//! Which values of its type a key allows, and the words that say so.
//!
//! The same words stand in the error message and in the manual, so a limit can't be told in one and checked in
//! another way.

use super::value::{Secret, SecretUrl, Value};

/// A set of allowed values.
pub struct Limit<T> {
    /// What would be right, as in "an integer from 2 to 65536".
    pub allowed: String,
    pub holds: Box<dyn Fn(&T) -> bool>,
}

impl<T: Value + 'static> Limit<T> {
    /// One that is told by `allowed` and checked by `holds`.
    pub fn that(allowed: impl Into<String>, holds: impl Fn(&T) -> bool + 'static) -> Self {
        Self { allowed: allowed.into(), holds: Box::new(holds) }
    }
}

/// Every value of the type.
pub fn any<T: Value + 'static>() -> Limit<T> {
    Limit::that(T::kind(), |_| true)
}

/// From `low` to `high`, both included.
pub fn within<T: Value + PartialOrd + 'static>(low: T, high: T) -> Limit<T> {
    let bounds = (low.show().unwrap_or_default(), high.show().unwrap_or_default());
    let allowed = format!("{} from {} to {}", T::kind(), bounds.0, bounds.1);
    Limit::that(allowed, move |value| *value >= low && *value <= high)
}

/// Larger than `low`, up to and including `high`.
pub fn above(low: f64, high: f64) -> Limit<f64> {
    let allowed = format!("a number above {low:?} and up to {high:?}");
    Limit::that(allowed, move |value| *value > low && *value <= high)
}

/// From `low` on, smaller than `high`.
pub fn below(low: f64, high: f64) -> Limit<f64> {
    let allowed = format!("a number from {low:?} and below {high:?}");
    Limit::that(allowed, move |value| *value >= low && *value < high)
}

/// Every one of the numbers from `low` to `high`.
pub fn each_within<const N: usize>(low: f64, high: f64) -> Limit<[f64; N]> {
    let allowed = format!("{} from {low:?} to {high:?}", <[f64; N]>::kind());
    Limit::that(allowed, move |values: &[f64; N]| values.iter().all(|value| *value >= low && *value <= high))
}

/// A smallest and a largest value, both above `low` and up to `high`.
pub fn range_within(low: f64, high: f64) -> Limit<[f64; 2]> {
    let allowed = format!("[smallest, largest], above {low:?} and up to {high:?}");
    Limit::that(allowed, move |[first, last]: &[f64; 2]| *first > low && first <= last && *last <= high)
}

/// Not set, or a value that `limit` allows.
pub fn unset_or<T: Value + 'static>(limit: Limit<T>) -> Limit<Option<T>> {
    let holds = limit.holds;
    Limit::that(limit.allowed, move |value: &Option<T>| value.as_ref().is_none_or(&holds))
}

/// A list of `most` texts at most, not empty, none twice, each allowed by `limit`.
pub fn some_of(most: usize, limit: Limit<String>) -> Limit<Vec<String>> {
    let allowed = format!("a list of 1 to {most} different texts, each {}", limit.allowed);
    Limit::that(allowed, move |values: &Vec<String>| {
        let different: std::collections::BTreeSet<&String> = values.iter().collect();
        (1..=most).contains(&values.len())
            && different.len() == values.len()
            && values.iter().all(&limit.holds)
    })
}

/// A name that can stand in object names, consumer groups and labels.
pub fn name() -> Limit<String> {
    Limit::that("1 to 63 of the characters a-z, 0-9 and -", |name: &String| {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        (1..=63).contains(&name.len()) && name.bytes().all(legal)
    })
}

/// What Kafka allows as the name of a topic or a group.
pub fn kafka_name() -> Limit<String> {
    Limit::that("1 to 249 of the characters a-z, A-Z, 0-9, '.', '_' and '-'", |name: &String| {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        (1..=249).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != ".."
    })
}

/// `host:port`, with brackets around an IPv6 address.
pub fn host_port() -> Limit<String> {
    Limit::that("host:port", |text: &String| is_host_port(text))
}

fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_good = match bare {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && !host.contains([':', '/', ' ', '[', ']']),
    };
    host_is_good && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// An address to listen on, port 0 included (the system chooses one).
pub fn listen_address() -> Limit<String> {
    Limit::that("an IP address and a port such as \"0.0.0.0:8080\"", |text: &String| {
        text.parse::<std::net::SocketAddr>().is_ok()
    })
}

/// Directives of tracing's filter.
pub fn log_filter() -> Limit<String> {
    Limit::that("a level or directives such as \"info,palimpsest=debug\"", |text: &String| {
        !text.trim().is_empty() && tracing_subscriber::EnvFilter::try_new(text).is_ok()
    })
}

/// A local directory, or a bucket of an object store.
pub fn store_url() -> Limit<SecretUrl> {
    let allowed =
        "a directory, file:///DIRECTORY, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX";
    Limit::that(allowed, |url: &SecretUrl| match url.expose().split_once("://") {
        Some(("file", path)) => path.starts_with('/') && path.len() > 1,
        Some(("s3" | "gs" | "az", bucket)) => {
            !bucket.is_empty() && !bucket.starts_with('/') && !bucket.contains(char::is_whitespace)
        }
        Some(_) => false,
        None => !url.expose().is_empty() && !url.expose().contains(':'),
    })
}

/// A database.
pub fn registry_url() -> Limit<SecretUrl> {
    Limit::that("sqlite://PATH (sqlite:///PATH from the root)", |url: &SecretUrl| {
        url.expose()
            .strip_prefix("sqlite://")
            .is_some_and(|path| !path.is_empty() && !path.starts_with('?') && !path.ends_with('/'))
    })
}

/// A token that can't be guessed and fits into a header.
pub fn token() -> Limit<Secret> {
    Limit::that("16 to 512 visible ASCII characters", |token: &Secret| {
        (16..=512).contains(&token.expose().len()) && token.expose().bytes().all(|b| b.is_ascii_graphic())
    })
}
