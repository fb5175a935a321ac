//! The types that a configuration key can have: how each is read from TOML or from the environment, and shown.
//!
//! Reading never guesses: `30` is no duration and `"64"` is no size. What `show` gives reads back as the same
//! value, except for a secret, which is never shown. Which values are allowed is `limit`'s to say.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value as Toml;

use crate::types::EventTime;

/// Stands in the place of a secret wherever one would be printed.
pub const REDACTED: &str = "<redacted>";

/// A type that a key can have.
pub trait Value: Sized {
    /// Its values are never printed, not even wrong ones.
    const SECRET: bool = false;
    /// What a value is, as it stands in messages and in the manual: "an integer".
    fn kind() -> String;
    /// `None`: not a value of this type.
    fn read(found: &Toml) -> Option<Self>;
    /// What the text of an environment variable is in TOML.
    fn from_text(text: &str) -> Toml {
        toml_or_string(text)
    }
    /// As TOML; `None`: not set.
    fn show(&self) -> Option<String>;
}

/// `64`, `true` and `[0.1, 1]` as what they are in TOML, anything else as a string.
fn toml_or_string(text: &str) -> Toml {
    toml::from_str::<toml::Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Toml::String(text.to_owned()))
}

/// A string in TOML's quotes.
pub fn quoted(text: &str) -> String {
    Toml::String(text.to_owned()).to_string()
}

impl Value for bool {
    fn kind() -> String {
        "true or false".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_bool()
    }
    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn kind() -> String {
                "an integer".into()
            }
            fn read(found: &Toml) -> Option<Self> {
                found.as_integer().and_then(|value| value.try_into().ok())
            }
            fn show(&self) -> Option<String> {
                Some(self.to_string())
            }
        }
    )*};
}
integers!(u32, u64, usize);

impl Value for f64 {
    fn kind() -> String {
        "a number".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        let value = match found {
            Toml::Integer(value) => *value as f64,
            Toml::Float(value) => *value,
            _ => return None,
        };
        value.is_finite().then_some(value)
    }
    fn show(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }
}

impl<const N: usize> Value for [f64; N] {
    fn kind() -> String {
        format!("{N} numbers in brackets")
    }
    fn read(found: &Toml) -> Option<Self> {
        let values: Option<Vec<f64>> = found.as_array()?.iter().map(f64::read).collect();
        values?.try_into().ok()
    }
    fn show(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }
}

impl Value for String {
    fn kind() -> String {
        "a text".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_str().map(str::to_owned)
    }
    fn from_text(text: &str) -> Toml {
        Toml::String(text.to_owned())
    }
    fn show(&self) -> Option<String> {
        Some(quoted(self))
    }
}

impl Value for Vec<String> {
    fn kind() -> String {
        "a list of texts".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_array()?.iter().map(String::read).collect()
    }
    /// A list in brackets, or texts with commas between them.
    fn from_text(text: &str) -> Toml {
        match toml_or_string(text) {
            list @ Toml::Array(_) => list,
            _ => {
                let parts = text.split(',').map(|part| part.trim().to_owned());
                Toml::Array(parts.map(Toml::String).collect())
            }
        }
    }
    fn show(&self) -> Option<String> {
        let parts: Vec<String> = self.iter().map(|part| quoted(part)).collect();
        Some(format!("[{}]", parts.join(", ")))
    }
}

impl Value for PathBuf {
    fn kind() -> String {
        "a path".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_str().map(PathBuf::from)
    }
    fn from_text(text: &str) -> Toml {
        Toml::String(text.to_owned())
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string_lossy()))
    }
}

impl Value for EventTime {
    fn kind() -> String {
        "an instant such as \"2000-01-01T00:00:00Z\"".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        match found {
            Toml::Datetime(instant) => instant.to_string().parse().ok(),
            _ => found.as_str()?.parse().ok(),
        }
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}

/// An empty text means "not set", so that a variable can take away what the file sets.
impl<T: Value> Value for Option<T> {
    const SECRET: bool = T::SECRET;
    fn kind() -> String {
        T::kind()
    }
    fn read(found: &Toml) -> Option<Self> {
        match found.as_str() {
            Some("") => Some(None),
            _ => T::read(found).map(Some),
        }
    }
    fn from_text(text: &str) -> Toml {
        T::from_text(text)
    }
    fn show(&self) -> Option<String> {
        self.as_ref().and_then(T::show)
    }
}

/// A length of time in whole milliseconds, written `"500ms"`, `"30s"`, `"10m"`, `"6h"` or `"1d"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(u64);

const SPAN_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl Span {
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms)
    }
    pub const fn from_seconds(seconds: u64) -> Self {
        Self(seconds * 1000)
    }
    pub const fn from_minutes(minutes: u64) -> Self {
        Self(minutes * 60_000)
    }
    pub const fn from_hours(hours: u64) -> Self {
        Self(hours * 3_600_000)
    }
    pub const fn from_days(days: u64) -> Self {
        Self(days * 86_400_000)
    }
    /// Milliseconds. The limits of every key lie far below `i64::MAX`.
    pub const fn as_ms(self) -> i64 {
        self.0 as i64
    }
    pub const fn as_duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl fmt::Display for Span {
    /// In the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_units(f, self.0, &SPAN_UNITS, "0s")
    }
}

impl Value for Span {
    fn kind() -> String {
        "a duration (\"500ms\", \"30s\", \"10m\", \"6h\", \"1d\")".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        read_in_units(found.as_str()?, &SPAN_UNITS).map(Self)
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}

/// A number of bytes, written `"512B"`, `"64MiB"` or, in powers of ten, `"10MB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

const SIZE_UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

impl ByteSize {
    pub const fn from_kib(kib: u64) -> Self {
        Self(kib << 10)
    }
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }
    pub const fn from_gib(gib: u64) -> Self {
        Self(gib << 30)
    }
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_units(f, self.0, &SIZE_UNITS, "0B")
    }
}

impl Value for ByteSize {
    fn kind() -> String {
        "a size (\"512B\", \"64KiB\", \"64MiB\", \"1GiB\", \"10MB\")".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        read_in_units(found.as_str()?, &SIZE_UNITS).map(Self)
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}

/// `None` also where the number does not fit; a space before the unit is allowed.
fn read_in_units(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn write_in_units(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)], zero: &str) -> fmt::Result {
    match units.iter().find(|(_, factor)| value.is_multiple_of(*factor)) {
        Some((unit, factor)) if value > 0 => write!(f, "{}{unit}", value / factor),
        _ => f.write_str(zero),
    }
}

/// A text that no log, message or page shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    text: String,
    from_file: bool,
}

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), from_file: false }
    }

    /// One that stands in a file of its own: the configuration shows the file's name only.
    pub(super) fn from_file(text: &str) -> Self {
        Self { text: text.trim_end_matches(['\r', '\n']).to_owned(), from_file: true }
    }

    /// The text itself, for the one place that compares or sends it.
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl Value for Secret {
    const SECRET: bool = true;
    fn kind() -> String {
        "a secret text".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_str().map(Self::new)
    }
    fn from_text(text: &str) -> Toml {
        Toml::String(text.to_owned())
    }
    fn show(&self) -> Option<String> {
        (!self.from_file).then(|| quoted(REDACTED))
    }
}

/// A URL that may carry a password. Printed without it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// The whole URL, password included.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_url(&self.0))
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Value for SecretUrl {
    fn kind() -> String {
        "a URL".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        found.as_str().map(Self::new)
    }
    fn from_text(text: &str) -> Toml {
        Toml::String(text.to_owned())
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}

/// Takes the password before `@` and every value of the query out of a URL (or of what was meant as one).
pub fn redact_url(url: &str) -> String {
    let (base, query) = match url.split_once('?') {
        Some((base, query)) => (base, Some(query)),
        None => (url, None),
    };
    let mut shown = match base.rsplit_once('@') {
        Some((user, host)) => {
            let start = user.find("://").map_or(0, |at| at + 3);
            let name_end = user[start..].find(':').map_or(user.len(), |at| start + at);
            match name_end == user.len() {
                true => base.to_owned(),
                false => format!("{}:{REDACTED}@{host}", &user[..name_end]),
            }
        }
        None => base.to_owned(),
    };
    if let Some(query) = query {
        let names = query.split('&').map(|pair| match pair.split_once('=') {
            Some((name, _)) if looks_secret(name) => format!("{name}={REDACTED}"),
            _ => pair.to_owned(),
        });
        shown = format!("{shown}?{}", names.collect::<Vec<_>>().join("&"));
    }
    shown
}

/// Whether a key of this name usually holds something that must not be printed.
pub fn looks_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let hints =
        ["password", "passwd", "secret", "token", "credential", "jaas", "private", "oauthbearer.config"];
    hints.iter().any(|hint| name.contains(hint)) || name.ends_with(".pem")
}
