//! The log: text for people on a terminal, JSON lines for machines, always on standard error.
//!
//! Standard output belongs to what a command answers. Events carry their subject as fields (`period`, `version`,
//! `partition`), so that both forms can be searched by it. What is logged is the configuration's to say.

use std::fs::File;
use std::io::IsTerminal;
use std::sync::Mutex;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::config::{Log, LogFormat};

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("log.filter = {filter:?} is not a filter: {source}")]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error("the log was set up already: {0}")]
    AlreadySet(#[from] TryInitError),
}

/// Sets up the log of the whole process, on standard error or appended to `file`. Call it once.
pub fn install(log: &Log, file: Option<File>) -> Result<(), LoggingError> {
    if let Some(file) = file {
        let form = match log.format {
            LogFormat::Text => Form::Text { colours: false },
            LogFormat::Auto | LogFormat::Json => Form::Json,
        };
        subscriber(log, form, Mutex::new(file))?.try_init()?;
        return Ok(());
    }
    let form = match log.format {
        LogFormat::Auto if std::io::stderr().is_terminal() => Form::Text { colours: true },
        LogFormat::Auto | LogFormat::Json => Form::Json,
        LogFormat::Text => Form::Text { colours: std::io::stderr().is_terminal() },
    };
    subscriber(log, form, std::io::stderr)?.try_init()?;
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text { colours: bool },
    Json,
}

/// The fields of the spans around an event stand in its line, in both forms.
fn subscriber<W>(log: &Log, form: Form, writer: W) -> Result<Box<dyn Subscriber + Send + Sync>, LoggingError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&log.filter)
        .map_err(|source| LoggingError::Filter { filter: log.filter.clone(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    Ok(match form {
        Form::Text { colours } => Box::new(builder.with_ansi(colours).with_target(false).finish()),
        Form::Json => Box::new(builder.json().flatten_event(true).with_current_span(true).finish()),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(form: Form, filter: &str) -> String {
        let log = Log { filter: filter.into(), ..Log::default() };
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = subscriber(&log, form, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("close", period = "20260131T000000Z").entered();
            tracing::info!(version = "v000042", "published");
            tracing::debug!("not for everybody");
        });
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_json_line_carries_the_fields_of_event_and_span() {
        let text = written(Form::Json, "info");
        let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!((&line["message"], &line["version"]), (&"published".into(), &"v000042".into()));
        assert_eq!(line["span"]["period"], "20260131T000000Z");
        assert_eq!(line["level"], "INFO");
    }

    #[test]
    fn text_is_readable_and_has_no_colours_off_a_terminal() {
        let text = written(Form::Text { colours: false }, "info");
        assert!(text.contains("close{period=\"20260131T000000Z\"}: published version=\"v000042\""), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn the_filter_decides_what_is_logged() {
        assert_eq!(written(Form::Json, "debug").lines().count(), 2);
        assert_eq!(written(Form::Json, "off"), "");
        let log = Log { filter: "palimpsest=loud".into(), ..Log::default() };
        assert!(matches!(subscriber(&log, Form::Json, std::io::sink), Err(LoggingError::Filter { .. })));
    }
}
