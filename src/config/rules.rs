//! Rules that concern several keys. Pure; a rule is judged only where each of its keys is good by itself.

use super::choice::Architecture;
use super::read::{Place, Problem, Reader};
use super::schema::Config;
use super::value::quoted;

/// Settings of librdkafka that the program's guarantees rest on, and what to use in their place.
const RESERVED_PROPERTIES: [(&str, &str); 11] = [
    ("bootstrap.servers", "kafka.brokers in its place"),
    ("metadata.broker.list", "kafka.brokers in its place"),
    ("group.id", "kafka.group in its place"),
    ("auto.offset.reset", "kafka.start in its place"),
    ("enable.auto.commit", "absent: positions live in the registry"),
    ("enable.auto.offset.store", "absent: positions live in the registry"),
    ("enable.idempotence", "absent: dead letters are always sent with it"),
    ("enable.partition.eof", "absent: the idle timeout needs it on"),
    ("isolation.level", "absent: only committed records are read"),
    ("partition.assignment.strategy", "absent: it is cooperative-sticky"),
    ("topic.metadata.refresh.interval.ms", "absent: new partitions are looked for every 30 s"),
];

/// What a rule says when it is broken.
struct Broken {
    key: &'static str,
    allowed: String,
}

type Check = fn(&Config) -> Option<Broken>;

/// Each with all keys it looks at.
const RULES: [(&[&str], Check); 11] = [
    (&["period.min_frames", "train.batch"], enough_frames_for_four_batches),
    (&["period.max_frames", "period.min_frames"], most_frames_above_fewest),
    (&["model.image_size", "model.patch_size", "model.architecture"], whole_patches),
    (&["probe.k", "probe.max_frames"], fewer_neighbours_than_frames),
    (&["probe.guard", "probe.block"], guard_within_block),
    (&["ingest.max_frame_bytes", "ingest.max_record_bytes"], frame_within_record),
    (&["ingest.max_record_bytes", "ingest.max_buffered_bytes"], record_within_buffer),
    (&["ingest.segment_bytes", "ingest.max_buffered_bytes"], segment_within_buffer),
    (&["kafka.dead_letter_topic", "kafka.topics", "pipeline.name"], dead_letters_apart),
    (&["train.micro_batch", "model.architecture"], parts_of_a_batch_for_a_vit_only),
    (&["gate.max_forgetting_cumulative", "gate.max_forgetting_parent"], cumulative_not_tighter),
];

/// Notes every rule that the configuration breaks.
pub fn check(config: &Config, reader: &mut Reader) {
    for (keys, rule) in RULES {
        if !keys.iter().all(|key| reader.is_good(key)) {
            continue;
        }
        let Some(Broken { key, allowed }) = rule(config) else {
            continue;
        };
        // The key that somebody has set is the one to look at, not the default beside it.
        let mut places = std::iter::once(&key).chain(keys).map(|key| reader.place(key));
        let place = places.find(|place| *place != Place::Default);
        reader.note(Problem::Invalid {
            place: place.unwrap_or(Place::Default),
            key: key.to_owned(),
            found: shown(config, key),
            allowed,
        });
    }
    for (property, value) in config.kafka.properties.settings() {
        let reserved = RESERVED_PROPERTIES.iter().find(|(name, _)| *name == property);
        if let Some((_, instead)) = reserved {
            reader.reject(&format!("kafka.properties.{property}"), quoted(value), instead);
        }
    }
}

fn shown(config: &Config, path: &str) -> String {
    let entry = config.entries().into_iter().find(|entry| path == format!("{}.{}", entry.section, entry.key));
    entry.and_then(|entry| entry.value).unwrap_or_else(|| "not set".into())
}

fn broken(is_broken: bool, key: &'static str, allowed: impl FnOnce() -> String) -> Option<Broken> {
    is_broken.then(|| Broken { key, allowed: allowed() })
}

/// After the split into training and probe set, and its guard, a batch must be left.
fn enough_frames_for_four_batches(config: &Config) -> Option<Broken> {
    let fewest = 4 * config.train.batch as u64;
    broken(config.period.min_frames < fewest, "period.min_frames", || {
        format!("at least {fewest}, 4 x train.batch ({})", config.train.batch)
    })
}

fn most_frames_above_fewest(config: &Config) -> Option<Broken> {
    let period = &config.period;
    broken(period.max_frames < period.min_frames, "period.max_frames", || {
        format!("at least period.min_frames ({})", period.min_frames)
    })
}

fn whole_patches(config: &Config) -> Option<Broken> {
    let model = &config.model;
    let is_vit = model.architecture == Architecture::VitTiny;
    broken(is_vit && !model.image_size.is_multiple_of(model.patch_size), "model.image_size", || {
        format!("a multiple of model.patch_size ({})", model.patch_size)
    })
}

fn parts_of_a_batch_for_a_vit_only(config: &Config) -> Option<Broken> {
    let architecture = config.model.architecture.as_str();
    let has_parts = config.train.micro_batch > 0;
    broken(has_parts && config.model.architecture != Architecture::VitTiny, "train.micro_batch", || {
        format!("0 with {architecture}, which normalises by the whole batch")
    })
}

fn fewer_neighbours_than_frames(config: &Config) -> Option<Broken> {
    let probe = &config.probe;
    broken(probe.k as u64 >= probe.max_frames, "probe.k", || {
        format!("below probe.max_frames ({})", probe.max_frames)
    })
}

/// Otherwise no frame of a block between two blocks of the other side would be left.
fn guard_within_block(config: &Config) -> Option<Broken> {
    let probe = &config.probe;
    broken(2 * probe.guard.as_ms() >= probe.block.as_ms(), "probe.guard", || {
        format!("less than half of probe.block ({})", probe.block)
    })
}

fn frame_within_record(config: &Config) -> Option<Broken> {
    let ingest = &config.ingest;
    broken(ingest.max_frame_bytes > ingest.max_record_bytes, "ingest.max_frame_bytes", || {
        format!("at most ingest.max_record_bytes ({})", ingest.max_record_bytes)
    })
}

fn record_within_buffer(config: &Config) -> Option<Broken> {
    let ingest = &config.ingest;
    broken(ingest.max_record_bytes > ingest.max_buffered_bytes, "ingest.max_record_bytes", || {
        format!("at most ingest.max_buffered_bytes ({})", ingest.max_buffered_bytes)
    })
}

fn segment_within_buffer(config: &Config) -> Option<Broken> {
    let ingest = &config.ingest;
    broken(ingest.segment_bytes > ingest.max_buffered_bytes, "ingest.segment_bytes", || {
        format!("at most ingest.max_buffered_bytes ({})", ingest.max_buffered_bytes)
    })
}

/// A dead letter that is read as a frame is a dead letter again, for ever.
fn dead_letters_apart(config: &Config) -> Option<Broken> {
    let topic = config.dead_letter_topic();
    broken(config.kafka.topics.contains(&topic), "kafka.dead_letter_topic", || {
        format!("a topic that is not in kafka.topics ({topic:?} is)")
    })
}

fn cumulative_not_tighter(config: &Config) -> Option<Broken> {
    let gate = &config.gate;
    let tighter = gate.max_forgetting_cumulative < gate.max_forgetting_parent;
    broken(tighter, "gate.max_forgetting_cumulative", || {
        format!("at least gate.max_forgetting_parent ({})", gate.max_forgetting_parent)
    })
}
