//! The configuration: one TOML file, overridden by `PALIMPSEST__SECTION__KEY` variables.
//!
//! parse -> validate -> [`Config`]. Everything wrong is told at once, each with its place, key, value and what
//! would be right: unknown keys, wrong types, values out of range, and rules between keys. [`Config::parse`] is
//! pure; [`Config::load`] reads the file, the environment and the files that `*_file` keys name. Nothing here
//! builds anything: what a value makes is `app`'s to say.

mod choice;
mod limit;
mod read;
mod rules;
mod schema;
#[cfg(test)]
mod tests;
mod value;

use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

pub use choice::{Architecture, Device, IdleMode, KafkaStart, Late, LogFormat, Method, Precision, Priority};
pub use read::{ENV_PREFIX, Place, Problem};
pub use schema::{
    Augment, Config, Gate, Idle, Ingest, Kafka, Lease, Log, Model, Period, Pipeline, Probe, Properties,
    Registry, Retention, Serve, Shutdown, Store, Train,
};
pub use value::{ByteSize, REDACTED, Secret, SecretUrl, Span};

use read::Reader;

/// Everything that is wrong with a configuration; one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(Problem::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// What a configuration is made of.
pub struct Sources<'a> {
    /// Name (for messages) and text of the TOML file.
    pub file: Option<(&'a str, &'a str)>,
    /// The environment; variables without our prefix are passed over.
    pub variables: &'a [(String, String)],
    /// Reads a file that a `*_file` key names.
    pub read_secret: &'a dyn Fn(&Path) -> io::Result<String>,
}

impl Config {
    /// Reads `file` if one is given, the environment, and the secrets' files.
    pub fn load(file: Option<&Path>) -> Result<Self, Problems> {
        let text = match file.map(|path| (path, std::fs::read_to_string(path))) {
            Some((path, Err(error))) => {
                let (path, reason) = (path.display().to_string(), error.to_string());
                return Err(Problems(vec![Problem::Unreadable { path, reason }]));
            }
            Some((path, Ok(text))) => Some((path.display().to_string(), text)),
            None => None,
        };
        let variables: Vec<(String, String)> = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .collect();
        Self::parse(&Sources {
            file: text.as_ref().map(|(name, text)| (name.as_str(), text.as_str())),
            variables: &variables,
            read_secret: &|path| std::fs::read_to_string(path),
        })
    }

    /// The configuration that the sources make, or all that is wrong with them.
    pub fn parse(sources: &Sources<'_>) -> Result<Self, Problems> {
        let mut reader = Reader::new(sources.file, sources.variables);
        let mut config = Self::take(&mut reader);
        config.read_token(sources, &mut reader);
        config.read_property_files(sources, &mut reader);
        rules::check(&config, &mut reader);
        let problems = reader.finish(&Self::keys());
        match problems.is_empty() {
            true => Ok(config),
            false => Err(Problems(problems)),
        }
    }

    fn read_token(&mut self, sources: &Sources<'_>, reader: &mut Reader) {
        let Some(path) = &self.serve.token_file else {
            return;
        };
        let found = value::quoted(&path.to_string_lossy());
        if self.serve.token.is_some() {
            return reader.reject("serve.token_file", found, "not set where serve.token is");
        }
        let limit = limit::token();
        match (sources.read_secret)(path).map(|text| Secret::from_file(&text)) {
            Ok(token) if (limit.holds)(&token) => self.serve.token = Some(token),
            Ok(_) => {
                reader.reject("serve.token_file", found, &format!("a file that holds {}", limit.allowed))
            }
            Err(error) => reader.reject("serve.token_file", found, &readable(&error)),
        }
    }

    /// `"sasl.password_file" = PATH` stands for `"sasl.password" = what PATH holds`.
    fn read_property_files(&mut self, sources: &Sources<'_>, reader: &mut Reader) {
        let properties = &mut self.kafka.properties.0;
        let named: Vec<(String, String)> = (properties.iter())
            .filter_map(|(key, path)| {
                let property = key.strip_suffix(schema::FILE_SUFFIX)?;
                Some((property.to_owned(), path.expose().to_owned()))
            })
            .collect();
        for (property, path) in named {
            let key = format!("{}.{property}{}", read::FREE_TABLE, schema::FILE_SUFFIX);
            match (sources.read_secret)(Path::new(&path)) {
                _ if properties.contains_key(&property) => {
                    reader.reject(&key, value::quoted(&path), &format!("not set where {property} is"));
                }
                Ok(text) => {
                    properties.insert(property, Secret::from_file(&text));
                }
                Err(error) => reader.reject(&key, value::quoted(&path), &readable(&error)),
            }
        }
    }

    fn keys() -> Vec<String> {
        let entries = Self::default().entries();
        entries.iter().map(|entry| format!("{}.{}", entry.section, entry.key)).collect()
    }

    /// The whole configuration as TOML, secrets redacted. A key that is not set is missing.
    pub fn show(&self) -> String {
        let mut text = String::new();
        let entries = self.entries();
        for (section, _) in schema::SECTIONS {
            let blank = if text.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{blank}[{section}]");
            for entry in entries.iter().filter(|entry| entry.section == *section) {
                if let Some(value) = &entry.value {
                    let _ = writeln!(text, "{} = {value}", entry.key);
                }
            }
        }
        text
    }

    /// The manual: every key with what it does, its limit and its default. `config/default.toml` is this text.
    pub fn manual() -> String {
        let mut text = String::from(MANUAL_HEAD);
        let entries = Self::default().entries();
        for (section, about) in schema::SECTIONS {
            text.push('\n');
            push_comment(&mut text, about);
            let _ = writeln!(text, "[{section}]");
            for entry in entries.iter().filter(|entry| entry.section == *section) {
                push_comment(&mut text, entry.doc);
                let _ = writeln!(text, "# Allowed: {}.", entry.allowed);
                let _ = match &entry.value {
                    Some(value) => writeln!(text, "{} = {value}", entry.key),
                    None => writeln!(text, "# {} =", entry.key),
                };
            }
        }
        text
    }

    /// The consumer group: `kafka.group`, or one made of the pipeline's name.
    pub fn consumer_group(&self) -> String {
        let made = || format!("palimpsest-{}", self.pipeline.name);
        self.kafka.group.clone().unwrap_or_else(made)
    }

    /// The dead-letter topic: `kafka.dead_letter_topic`, or one made of the pipeline's name.
    pub fn dead_letter_topic(&self) -> String {
        let made = || format!("palimpsest-{}-dead-letters", self.pipeline.name);
        self.kafka.dead_letter_topic.clone().unwrap_or_else(made)
    }
}

const MANUAL_HEAD: &str = "\
# The configuration of palimpsest: every key with its default. A file need only hold what differs.
#
# Each key can also be set by a variable, PALIMPSEST__SECTION__KEY, which wins over the file:
# PALIMPSEST__TRAIN__BATCH=256. An empty variable takes an optional key's value away.
# `palimpsest config check` tells everything that is wrong at once; `palimpsest config show` prints what counts.
# This file is made from the declarations in src/config/schema.rs; a test holds the two together.
";

fn push_comment(text: &mut String, lines: &[&str]) {
    for line in lines {
        let _ = writeln!(text, "#{line}");
    }
}

fn readable(error: &io::Error) -> String {
    format!("a file that can be read ({error})")
}
