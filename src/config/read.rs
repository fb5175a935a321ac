//! From a TOML text and environment variables to values with their places; every mistake is collected.
//!
//! A variable overrides the file. What a key means is the schema's to say: it takes its values out of the
//! [`Reader`] one by one, and what is left at the end is unknown. Pure: the caller has done the reading.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use toml::Value as Toml;
use toml::de::{DeTable, DeValue};

use super::limit::Limit;
use super::value::{REDACTED, Value, looks_secret, redact_url};

/// Prefix of the environment variables that are read.
pub const ENV_PREFIX: &str = "PALIMPSEST__";

/// The one key whose value is a free table: `[kafka.properties]`.
pub const FREE_TABLE: &str = "kafka.properties";

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The file's name and the line, counted from 1.
    File(String, usize),
    Variable(String),
    /// Nobody has set it.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name, line) => write!(f, "{name}:{line}"),
            Self::Variable(name) => f.write_str(name),
            Self::Default => f.write_str("default"),
        }
    }
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{place}: {key} = {found}, should be {allowed}")]
    Invalid { place: Place, key: String, found: String, allowed: String },
    #[error("{place}: unknown {what} {key}{}", suggestion(nearest))]
    Unknown { place: Place, what: &'static str, key: String, nearest: Option<String> },
    #[error("{place}: not TOML: {message}")]
    Syntax { place: Place, message: String },
    /// The configuration file, or one that a `*_file` key names.
    #[error("{path}: can't be read: {reason}")]
    Unreadable { path: String, reason: String },
}

fn suggestion(nearest: &Option<String>) -> String {
    match nearest {
        Some(name) => format!(", did you mean {name}?"),
        None => String::new(),
    }
}

struct Given {
    place: Place,
    value: Found,
}

/// What stands there: the type of a key says what an environment variable's text is.
enum Found {
    Toml(Toml),
    Text(String),
}

/// Values that nobody has taken yet, and the mistakes found so far.
pub struct Reader {
    given: BTreeMap<String, Given>,
    places: BTreeMap<String, Place>,
    bad: BTreeSet<String>,
    problems: Vec<Problem>,
}

impl Reader {
    /// `file`: name and text. `variables`: the whole environment.
    pub fn new(file: Option<(&str, &str)>, variables: &[(String, String)]) -> Self {
        let mut reader = Self {
            given: BTreeMap::new(),
            places: BTreeMap::new(),
            bad: BTreeSet::new(),
            problems: Vec::new(),
        };
        if let Some((name, text)) = file {
            reader.add_file(name, text);
        }
        for (name, text) in variables {
            reader.add_variable(name, text);
        }
        reader
    }

    fn add_file(&mut self, name: &str, text: &str) {
        let place = |at: usize| Place::File(name.to_owned(), line_of(text, at));
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            self.problems.push(Problem::Syntax {
                place: place(error.span().map_or(0, |span| span.start)),
                message: error.message().to_owned(),
            });
        }
        for (section, content) in table.get_ref() {
            let DeValue::Table(keys) = content.get_ref() else {
                self.give(section.get_ref(), place(section.span().start), toml_of(content.get_ref()));
                continue;
            };
            for (key, value) in keys {
                let path = format!("{}.{}", section.get_ref(), key.get_ref());
                let at = place(key.span().start);
                match value.get_ref() {
                    DeValue::Table(free) if path == FREE_TABLE => self.flatten(&path, &at, free),
                    other => self.give(&path, at, toml_of(other)),
                }
            }
        }
    }

    /// `security.protocol = "ssl"` is a table in a table to TOML, and one key to librdkafka.
    fn flatten(&mut self, prefix: &str, place: &Place, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = format!("{prefix}.{}", key.get_ref());
            match value.get_ref() {
                DeValue::Table(inner) => self.flatten(&path, place, inner),
                other => self.give(&path, place.clone(), toml_of(other)),
            }
        }
    }

    fn give(&mut self, path: &str, place: Place, value: Toml) {
        let value = Found::Toml(value);
        self.given.insert(path.to_owned(), Given { place, value });
    }

    fn add_variable(&mut self, name: &str, text: &str) {
        let Some(path) = name.strip_prefix(ENV_PREFIX) else {
            return;
        };
        let path = path.to_ascii_lowercase().replacen("__", ".", 1);
        let path = match path.split_once("__") {
            Some((table, rest)) if table == FREE_TABLE => format!("{table}.{}", rest.replace('_', ".")),
            _ => path,
        };
        let place = Place::Variable(name.to_owned());
        let value = Found::Text(text.to_owned());
        self.given.insert(path, Given { place, value });
    }

    /// The value of a key, or `default` where it is not set or wrong (then a problem is noted).
    pub fn take<T: Value>(&mut self, path: &str, default: T, limit: &Limit<T>) -> T {
        let Some(Given { place, value }) = self.given.remove(path) else {
            return default;
        };
        let found = match value {
            Found::Toml(value) => value,
            Found::Text(text) => T::from_text(&text),
        };
        self.places.insert(path.to_owned(), place);
        match T::read(&found).filter(|value| (limit.holds)(value)) {
            Some(value) => value,
            None => {
                let found = if T::SECRET { REDACTED.to_owned() } else { printable(path, &found) };
                self.reject(path, found, &limit.allowed);
                default
            }
        }
    }

    /// Everything below the free table, as texts.
    pub fn take_table(&mut self, path: &str) -> BTreeMap<String, String> {
        let prefix = format!("{path}.");
        let (below, rest) =
            std::mem::take(&mut self.given).into_iter().partition(|(key, _)| key.starts_with(&prefix));
        self.given = rest;
        let mut table = BTreeMap::new();
        for (key, Given { place, value }) in below {
            self.places.insert(key.clone(), place);
            let text = match value {
                Found::Text(text) | Found::Toml(Toml::String(text)) => text,
                Found::Toml(value @ (Toml::Integer(_) | Toml::Float(_) | Toml::Boolean(_))) => {
                    value.to_string()
                }
                Found::Toml(other) => {
                    self.reject(&key, printable(&key, &other), "a text, a number, true or false");
                    continue;
                }
            };
            table.insert(key[prefix.len()..].to_owned(), text);
        }
        table
    }

    /// Where a key was set.
    pub fn place(&self, path: &str) -> Place {
        self.places.get(path).cloned().unwrap_or(Place::Default)
    }

    /// Whether nothing wrong was found about a key: only then can a rule between keys be judged.
    pub fn is_good(&self, path: &str) -> bool {
        !self.bad.contains(path)
    }

    /// Notes that a key's value is wrong.
    pub fn reject(&mut self, path: &str, found: String, allowed: &str) {
        self.bad.insert(path.to_owned());
        self.problems.push(Problem::Invalid {
            place: self.place(path),
            key: path.to_owned(),
            found,
            allowed: allowed.to_owned(),
        });
    }

    /// Notes a mistake that is not about one value.
    pub fn note(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// All mistakes in the order of their places; what nobody has taken is unknown. `known`: all keys, `section.key`.
    pub fn finish(mut self, known: &[String]) -> Vec<Problem> {
        let sections: BTreeSet<&str> = known.iter().filter_map(|key| Some(key.split_once('.')?.0)).collect();
        let mut told = BTreeSet::new();
        for (path, given) in std::mem::take(&mut self.given) {
            let problem = unknown(&path, given, known, &sections);
            if let Problem::Unknown { what: "section", key, .. } = &problem
                && !told.insert(key.clone())
            {
                continue;
            }
            self.problems.push(problem);
        }
        self.problems.sort_by_key(|problem| match problem {
            Problem::Invalid { place, .. }
            | Problem::Unknown { place, .. }
            | Problem::Syntax { place, .. } => sort_key(place),
            Problem::Unreadable { .. } => (0, String::new(), 0),
        });
        self.problems
    }
}

fn sort_key(place: &Place) -> (u8, String, usize) {
    match place {
        Place::File(name, line) => (1, name.clone(), *line),
        Place::Variable(name) => (2, name.clone(), 0),
        Place::Default => (3, String::new(), 0),
    }
}

fn unknown(path: &str, given: Given, known: &[String], sections: &BTreeSet<&str>) -> Problem {
    let Given { place, value } = given;
    let section = path.split_once('.').map_or(path, |(section, _)| section);
    if sections.contains(path) {
        let (found, allowed) = match value {
            Found::Toml(value) => (printable(path, &value), format!("a table, [{path}]")),
            Found::Text(_) => ("a text".into(), format!("a variable of one key, {place}__KEY")),
        };
        return Problem::Invalid { place, key: path.to_owned(), found, allowed };
    }
    if path == FREE_TABLE {
        let (found, allowed) = ("no table".into(), format!("a table, [{FREE_TABLE}]"));
        return Problem::Invalid { place, key: path.to_owned(), found, allowed };
    }
    if path.contains('.') && !sections.contains(section) {
        return Problem::Unknown {
            place,
            what: "section",
            key: format!("[{section}]"),
            nearest: nearest(section, sections.iter().copied()).map(|name| format!("[{name}]")),
        };
    }
    let last = path.rsplit('.').next().unwrap_or(path);
    let of_section = known.iter().filter_map(|key| key.strip_prefix(section)?.strip_prefix('.'));
    let nearest = match nearest(last, of_section) {
        Some(key) => Some(format!("{section}.{key}")),
        None => known.iter().find(|key| key.ends_with(&format!(".{last}"))).cloned(),
    };
    Problem::Unknown { place, what: "key", key: path.to_owned(), nearest }
}

/// The nearest name, if it is near enough to be a slip of the finger.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance, in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A found value for a message: short, on one line, and without what may be a secret.
fn printable(path: &str, value: &Toml) -> String {
    if looks_secret(path) {
        return REDACTED.to_owned();
    }
    let text = match value {
        Toml::String(text) if text.contains('@') => Toml::String(redact_url(text)).to_string(),
        other => other.to_string(),
    };
    let one_line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match one_line.char_indices().nth(80) {
        Some((at, _)) => format!("{}...", &one_line[..at]),
        None => one_line,
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|b| *b == b'\n').count() + 1
}

/// Without the places. A number that does not fit becomes its text, which no number's type accepts.
fn toml_of(value: &DeValue<'_>) -> Toml {
    match value {
        DeValue::String(text) => Toml::String(text.to_string()),
        DeValue::Boolean(value) => Toml::Boolean(*value),
        DeValue::Datetime(instant) => Toml::Datetime(*instant),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) => Toml::Integer(value),
            Err(_) => Toml::String(number.to_string()),
        },
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(value) => Toml::Float(value),
            Err(_) => Toml::String(number.to_string()),
        },
        DeValue::Array(items) => Toml::Array(items.iter().map(|item| toml_of(item.get_ref())).collect()),
        DeValue::Table(table) => {
            let entries =
                table.iter().map(|(key, value)| (key.get_ref().to_string(), toml_of(value.get_ref())));
            Toml::Table(entries.collect())
        }
    }
}
