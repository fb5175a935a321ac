//! Every key: its type, default, limit and what it does, declared once.
//!
//! The structs, their defaults, reading, `config show` and `config/default.toml` all come out of the
//! declarations below, so none of them can say something else than the others. The comment of a key is its
//! entry in the manual. To add a key, add it here; rules that concern several keys are `rules`' to hold.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::choice::{
    Architecture, Device, IdleMode, KafkaStart, Late, LogFormat, Method, Precision, Priority,
};
use super::limit::{
    Limit, above, any, below, each_within, host_port, kafka_name, listen_address, log_filter, name,
    range_within, registry_url, some_of, store_url, token, unset_or, within,
};
use super::read::Reader;
use super::value::{ByteSize, Secret, SecretUrl, Span, Value, looks_secret, quoted};
use crate::types::EventTime;

/// Settings of librdkafka by their own names. Every value is handled as a secret, because a password may be one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties(pub(super) BTreeMap<String, Secret>);

/// Behind a property's name it says that the value is the name of a file that holds the property's value.
pub(super) const FILE_SUFFIX: &str = "_file";

impl Properties {
    /// Names and values for librdkafka, those out of files included.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        (self.0.iter())
            .filter(|(key, _)| !key.ends_with(FILE_SUFFIX))
            .map(|(key, value)| (key.as_str(), value.expose()))
    }

    /// As an inline table, without what may be a secret.
    fn show(&self) -> String {
        let pairs = self.0.iter().filter_map(|(key, value)| {
            let is_hidden = looks_secret(key) && !key.ends_with(FILE_SUFFIX);
            let hidden = value.show()?;
            let value = if is_hidden { hidden } else { quoted(value.expose()) };
            Some(format!("{} = {value}", quoted(key)))
        });
        match pairs.collect::<Vec<_>>() {
            pairs if pairs.is_empty() => "{}".into(),
            pairs => format!("{{ {} }}", pairs.join(", ")),
        }
    }
}

/// One key with its present value.
pub struct Entry {
    pub section: &'static str,
    pub key: &'static str,
    /// The manual's lines.
    pub doc: &'static [&'static str],
    pub allowed: String,
    /// As TOML; `None`: not set.
    pub value: Option<String>,
}

/// A key's type, as the schema handles it: a [`Value`], or the free table.
trait Field: Sized {
    /// What its limit is about.
    type Limited;
    fn take(reader: &mut Reader, path: &str, default: Self, limit: &Limit<Self::Limited>) -> Self;
    fn show_field(&self) -> Option<String>;
}

impl<T: Value> Field for T {
    type Limited = T;
    fn take(reader: &mut Reader, path: &str, default: Self, limit: &Limit<T>) -> Self {
        reader.take(path, default, limit)
    }
    fn show_field(&self) -> Option<String> {
        self.show()
    }
}

/// The limit is that of one value. There is no default entry.
impl Field for Properties {
    type Limited = String;
    fn take(reader: &mut Reader, path: &str, _: Self, _: &Limit<String>) -> Self {
        let texts = reader.take_table(path).into_iter();
        Self(texts.map(|(key, text)| (key, Secret::new(text))).collect())
    }
    fn show_field(&self) -> Option<String> {
        Some(self.show())
    }
}

/// Tells the compiler what kind of limit is meant.
fn allowed<T: Field>(limit: Limit<T::Limited>) -> String {
    limit.allowed
}

macro_rules! schema {
    ($(
        $(#[doc = $about:literal])*
        [$section:ident] $name:ident {
            $( $(#[doc = $doc:literal])* $key:ident: $type:ty = $default:expr, $limit:expr; )*
        }
    )*) => {
        $(
            $(#[doc = $about])*
            #[derive(Debug, Clone, PartialEq)]
            pub struct $name { $( $(#[doc = $doc])* pub $key: $type, )* }

            impl Default for $name {
                fn default() -> Self {
                    Self { $( $key: $default, )* }
                }
            }
        )*

        /// The whole configuration: every value is allowed, and so is every combination.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct Config { $( $(#[doc = $about])* pub $section: $name, )* }

        impl Config {
            /// Takes every key out of the reader, which notes what is wrong.
            pub(super) fn take(reader: &mut Reader) -> Self {
                Self { $( $section: $name { $(
                    $key: <$type as Field>::take(
                        reader,
                        concat!(stringify!($section), ".", stringify!($key)),
                        $default,
                        &$limit,
                    ),
                )* }, )* }
            }

            /// Every key in the order of the manual.
            pub(super) fn entries(&self) -> Vec<Entry> {
                vec![ $( $( Entry {
                    section: stringify!($section),
                    key: stringify!($key),
                    doc: &[ $( $doc, )* ],
                    allowed: allowed::<$type>($limit),
                    value: self.$section.$key.show_field(),
                }, )* )* ]
            }
        }

        /// Every section with the manual's lines about it.
        pub(super) const SECTIONS: &[(&str, &[&str])] = &[
            $( (stringify!($section), &[ $( $about, )* ]), )*
        ];
    };
}

schema! {
    /// The pipeline that this deployment serves.
    [pipeline] Pipeline {
        /// Stands in every object name, registry key, lease, metric label and consumer group, so that several
        /// pipelines can share one Kafka, database and bucket. Renaming it starts an empty pipeline.
        name: String = "main".into(), name();
    }

    /// Object storage: segments, probe sets, checkpoints, published versions.
    [store] Store {
        /// Credentials and endpoints of the clouds come from their usual variables (AWS_*, GOOGLE_*, AZURE_*).
        url: SecretUrl = SecretUrl::new("palimpsest-data/objects"), store_url();
    }

    /// The database that says what was read, sealed and published.
    [registry] Registry {
        /// SQLite for one machine. Back it up: without it the objects mean nothing.
        url: SecretUrl = SecretUrl::new("sqlite://palimpsest-data/registry.db"), registry_url();
    }

    /// Where frames come from.
    [kafka] Kafka {
        /// First contacts; the other brokers are found through them.
        brokers: Vec<String> = vec!["127.0.0.1:9092".into()], some_of(64, host_port());
        /// Topics with frame records. The stream's watermark is the smallest over all their partitions.
        topics: Vec<String> = vec!["frames".into()], some_of(64, kafka_name());
        /// Consumer group; not set: "palimpsest-" and the pipeline's name. Positions live in the registry, the
        /// group only shares out the partitions and shows the lag.
        group: Option<String> = None, unset_or(kafka_name());
        /// Where a partition starts that was never read. Later changes don't move partitions known by then.
        start: KafkaStart = KafkaStart::Earliest, any();
        /// Takes records that can't be decoded; not set: "palimpsest-", the pipeline's name and "-dead-letters".
        dead_letter_topic: Option<String> = None, unset_or(kafka_name());
        /// Tells incarnations of the topics apart; not set: the cluster's id. Another text starts a new generation of
        /// every topic, read from kafka.start: set it only for a broker whose id does not last.
        identity: Option<String> = None, unset_or(kafka_name());
        /// Any librdkafka setting by its own name, "security.protocol" = "ssl" for instance. As a variable:
        /// PALIMPSEST__KAFKA__PROPERTIES__SECURITY_PROTOCOL. A name with "_file" behind it names a file that holds
        /// the value: "sasl.password_file" = "/run/secrets/kafka".
        properties: Properties = Properties::default(), Limit::that("a table of texts, numbers, true and false", |_| true);
    }

    /// From records to segments.
    [ingest] Ingest {
        /// A partition's open segments are written when they hold so much. Larger: fewer and larger objects, more
        /// memory, more to read again after a crash.
        segment_bytes: ByteSize = ByteSize::from_mib(64), within(ByteSize::from_kib(64), ByteSize::from_gib(4));
        /// They are written after so long in any case: the age of what a crash makes the consumer read again.
        flush_age: Span = Span::from_seconds(60), within(Span::from_ms(100), Span::from_days(1));
        /// Frames in memory over all partitions. Above it partitions are paused until segments are written.
        max_buffered_bytes: ByteSize = ByteSize::from_mib(512), within(ByteSize::from_mib(1), ByteSize::from_gib(256));
        /// A larger record goes to the dead-letter topic.
        max_record_bytes: ByteSize = ByteSize::from_mib(32), within(ByteSize::from_kib(1), ByteSize::from_gib(1));
        /// A larger encoded frame goes to the dead-letter topic.
        max_frame_bytes: ByteSize = ByteSize::from_mib(8), within(ByteSize::from_kib(1), ByteSize::from_gib(1));
        /// Width x height that an image's header may claim; judged before a pixel is decoded. No more than training
        /// and publication decode: an image that only ingest took would fail its period.
        max_pixels: u64 = 50_000_000, within(1024, 1 << 26);
        /// Rows in one Arrow record.
        max_rows: u64 = 10_000, within(1, 1_000_000);
        /// A frame of a sealed period joins the oldest open one, or is dropped. Both are counted.
        late: Late = Late::Join, any();
        /// A frame further ahead of the clock goes to the dead-letter topic.
        max_ahead: Span = Span::from_hours(1), within(Span::from_ms(0), Span::from_days(3660));
        /// A frame captured earlier goes to the dead-letter topic: a clock that was never set.
        earliest_captured_at: EventTime = EventTime::from_ms(946_684_800_000), any();
    }

    /// What closes a period when nothing comes any more.
    [idle] Idle {
        /// "clock": once every partition is idle, the watermark follows the wall clock. "hold": it waits for frames or
        /// punctuation, as replays of old frames need.
        mode: IdleMode = IdleMode::Clock, any();
        /// A partition that was read to its end is idle after so long without a record.
        timeout: Span = Span::from_minutes(5), within(Span::from_ms(100), Span::from_days(7));
    }

    /// The windows of event time that are trained on one by one.
    [period] Period {
        /// Length; periods start at multiples of it since 1970-01-01T00:00:00Z.
        length: Span = Span::from_days(1), within(Span::from_seconds(1), Span::from_days(366));
        /// A period closes when the watermark is so far past its end: disorder up to here costs no frame its period.
        lateness: Span = Span::from_minutes(10), within(Span::from_ms(0), Span::from_days(30));
        /// A period with fewer frames gives them to the next one. At least 4 x train.batch.
        min_frames: u64 = 1024, within(8, 1_000_000_000);
        /// Above it a deterministic sample is trained on.
        max_frames: u64 = 1_000_000, within(8, 1_000_000_000);
        /// Frames of closed periods that wait for their training. Above it ingest pauses until the learner has caught up.
        max_waiting_bytes: ByteSize = ByteSize::from_gib(256), within(ByteSize::from_mib(1), ByteSize::from_gib(1 << 20));
    }

    /// The encoder. A change that alters its weights' shapes or its input needs model.new_lineage.
    [model] Model {
        /// vit_tiny and resnet18 bear the names of timm and torchvision; resnet_small has about 160k parameters.
        architecture: Architecture = Architecture::VitTiny, any();
        /// Frames are resized to a square of so many pixels a side. Cost grows with its square.
        image_size: usize = 64, within(16, 1024);
        /// Side of a ViT's patch in pixels; divides image_size. ResNets ignore it.
        patch_size: usize = 8, within(2, 64);
        /// Width of the projector's hidden layer. The projector serves training; the embedding is what enters it.
        projector_hidden: usize = 512, within(8, 16_384);
        /// Dimensions in which projections are compared.
        projector_dim: usize = 128, within(8, 4096);
        /// Subtracted from each channel of pixels in 0..1.
        mean: [f64; 3] = [0.485, 0.456, 0.406], each_within(0.0, 1.0);
        /// Each channel is divided by it.
        std: [f64; 3] = [0.229, 0.224, 0.225], each_within(0.001, 1.0);
        /// Weights that the first period starts from: a safetensors file in timm's or torchvision's names. Not set:
        /// from scratch.
        init: Option<PathBuf> = None, any();
        /// Start anew with another architecture, size or preprocessing. `latest` then stays where it is until an
        /// operator moves it.
        new_lineage: bool = false, any();
    }

    /// Training of one period.
    [train] Train {
        /// "lwf": NT-Xent between the projections of student and frozen teacher. "cassle": the same through a
        /// predictor. "finetune": nothing, the baseline that forgets.
        method: Method = Method::Lwf, any();
        /// Weight of the distillation against the contrastive loss. Larger forgets less and learns less. finetune ignores it.
        lambda: f64 = 4.0, above(0.0, 1000.0);
        /// Share of the teacher's weights in the published ones: after training, student and teacher are averaged. Larger forgets
        /// less and learns less. finetune ignores it. With lambda the row `lwf` of docs/forgetting.md, 0 its row `lwf:share=0`.
        teacher_share: f64 = 0.5, within(0.0, 0.9);
        /// Temperature of the contrastive loss.
        tau: f64 = 0.2, within(0.01, 10.0);
        /// Temperature of the distillation.
        tau_d: f64 = 0.2, within(0.01, 10.0);
        /// Width of cassle's predictor.
        predictor_hidden: usize = 512, within(8, 16_384);
        /// Frames a step; each gives two views. Larger: more negatives, more memory.
        batch: usize = 128, within(2, 65_536);
        /// A batch takes at most one frame of a stream in each such span of time, where there are streams enough: neighbours look
        /// alike and would be pushed apart. "0s": frames meet as they come.
        spacing: Span = Span::from_seconds(30), within(Span::from_ms(0), Span::from_days(1));
        /// Of frames with the same bytes so many are trained on.
        max_copies: u64 = 1, within(1, 1_000_000_000);
        /// Frames whose thumbnails (8 x 8 pixels) differ by at most this share of their contrast count as the same: in a batch they
        /// are not pushed apart, and one that is like a frame of a probe set is not trained on. 0: only with equal thumbnails.
        duplicate_distance: f64 = 0.1, within(0.0, 1.0);
        /// Steps of a period that has a teacher: a period costs the same whatever came before it.
        steps: u64 = 1000, within(1, 100_000_000);
        /// Steps of the first period, which starts from nothing.
        first_steps: u64 = 4000, within(1, 100_000_000);
        /// Ends earlier when every frame was seen so often.
        max_epochs: u64 = 100, within(1, 100_000);
        /// AdamW's peak learning rate, reached after the warm-up, then a cosine down to 0.
        learning_rate: f64 = 0.001, above(0.0, 10.0);
        /// Share of the steps in which the learning rate rises.
        warmup_ratio: f64 = 0.1, below(0.0, 1.0);
        /// AdamW's decay of weights with two dimensions or more.
        weight_decay: f64 = 0.0001, within(0.0, 1.0);
        /// AdamW's decay of the mean gradient.
        beta1: f64 = 0.9, below(0.0, 1.0);
        /// AdamW's decay of the mean squared gradient.
        beta2: f64 = 0.999, below(0.0, 1.0);
        /// Gradients with a larger global L2 norm are scaled down to it.
        clip_norm: f64 = 1.0, above(0.0, 1_000_000.0);
        /// Weights, batches and augmentations are functions of it and of the period.
        seed: u64 = 0, within(0, i64::MAX as u64);
        /// "auto": the first CUDA device if the program was built for it and there is one, else the CPU.
        device: Device = Device::Auto, any();
        /// Matrix products of training: "f32", "bf16" (operands rounded to it, on a GPU results too; sums, norms, losses and weights f32),
        /// or "auto": bf16 on an AMD CPU with AVX512-BF16, where a step takes about 0.6 of the time, else f32. Evaluation and
        /// serving are f32 always.
        precision: Precision = Precision::Auto, any();
        /// Frames whose activations are in memory at once: the same gradients as those of a whole batch, for one more forward pass.
        /// For `vit_tiny`: the other encoders normalise by the batch. 0: the whole batch.
        micro_batch: usize = 0, within(0, 1_000_000);
        /// Threads of the training process; 0: one for each core. A resume is exact only with the same number. A container's
        /// CPU limit counts training and the daemon together: leave the daemon something of it.
        threads: usize = 0, within(0, 1024);
        /// "idle": the training process gets the core time that nothing else wants, so ingest and embed keep their speed
        /// while a period is trained on; it stands still while others in its container keep all cores
        /// busy. "normal": it competes as an equal; for hosts that are never idle.
        priority: Priority = Priority::Idle, any();
        /// A checkpoint every so many steps: what a crash costs at most.
        checkpoint_steps: u64 = 200, within(1, 1_000_000);
        /// A period whose training process fails so often is given up as failed.
        max_failures: u32 = 3, within(1, 100);
    }

    /// SimCLR's augmentation, with the published parameters. Two views of a frame differ by it alone.
    [augment] Augment {
        /// Share of the frame's area that a crop keeps, [smallest, largest].
        crop_scale: [f64; 2] = [0.08, 1.0], range_within(0.0, 1.0);
        /// Probability of a horizontal flip. 0 where left and right mean something (text).
        flip_probability: f64 = 0.5, within(0.0, 1.0);
        /// Probability of a change of colours.
        jitter_probability: f64 = 0.8, within(0.0, 1.0);
        /// Strengths of brightness, contrast, saturation (0..1) and hue (0..0.5).
        jitter: [f64; 4] = [0.8, 0.8, 0.8, 0.2], jitter();
        /// Probability of a grey view.
        grey_probability: f64 = 0.2, within(0.0, 1.0);
        /// Probability of a blur.
        blur_probability: f64 = 0.5, within(0.0, 1.0);
        /// Standard deviation of the blur in pixels of the view, [smallest, largest].
        blur_sigma: [f64; 2] = [0.1, 2.0], range_within(0.0, 100.0);
    }

    /// Frames of each period that are never trained on and stay, to measure what was forgotten.
    [probe] Probe {
        /// Frames of one stream within one block of this length stay on one side of the split.
        block: Span = Span::from_minutes(10), within(Span::from_ms(1), Span::from_days(30));
        /// Frames nearer than this to a block of the other side are on neither. Less than half of probe.block.
        guard: Span = Span::from_seconds(30), within(Span::from_ms(0), Span::from_days(1));
        /// Share of the blocks that goes to the probe set.
        ratio: f64 = 0.1, within(0.01, 0.5);
        /// Frames of one probe set at most: bounds what evaluation costs and what is kept for ever.
        max_frames: u64 = 2000, within(8, 1_000_000);
        /// Probe sets that a candidate is measured on: the newest so many and the first.
        keep: usize = 16, within(1, 1000);
        /// Neighbours of the kNN probe, and of those whose nearness gate.min_neighbour_retention asks about.
        k: usize = 20, within(1, 1000);
        /// Resamples behind a confidence interval.
        bootstrap: usize = 1000, within(100, 100_000);
    }

    /// When a candidate is refused.
    [gate] Gate {
        /// Accuracy (kNN, 0..1) lost on an earlier period against the parent version. Broken only when the 95 % bound
        /// of the loss lies beyond it.
        max_forgetting_parent: f64 = 0.05, within(0.0, 1.0);
        /// The same against the best ancestor, so that small losses can't add up unseen.
        max_forgetting_cumulative: f64 = 0.1, within(0.0, 1.0);
        /// Neighbour retention from the parent (docs/operations.md, *Without labels*) required of an earlier period whose labels don't show
        /// that no more than max_forgetting_parent was lost: 1 where neighbours are as near as before, 0 by chance; 0 also: not asked.
        /// Broken as above. Below 0.9 lay only steps that lost 3 points of kNN or more (docs/forgetting.md, *Without labels*).
        min_neighbour_retention: f64 = 0.9, within(0.0, 1.0);
        /// RankMe on the new probe set below which an embedding counts as collapsed.
        min_effective_rank: f64 = 4.0, within(1.0, 4096.0);
        /// Refuse a candidate whose contrastive loss on the new probe set is not below its teacher's.
        require_learning: bool = true, any();
    }

    /// How long frames and candidates are kept.
    [retention] Retention {
        /// So many newest published periods keep their frames; older frames are deleted.
        periods: usize = 1, within(0, 10_000);
        /// Frames and candidate of a rejected or failed period stay so long.
        inspect_for: Span = Span::from_days(7), within(Span::from_ms(0), Span::from_days(3660));
    }

    /// The HTTP interface.
    [serve] Serve {
        /// Address to listen on; port 0 lets the system choose. TLS is a proxy's work.
        bind: String = "127.0.0.1:8080".into(), listen_address();
        /// Bearer token of `PUT /v1/aliases`. Without it, aliases can't be moved over HTTP. Better from
        /// PALIMPSEST__SERVE__TOKEN or serve.token_file than from this file.
        token: Option<Secret> = None, unset_or(token());
        /// File that holds the token (a mounted secret). Instead of serve.token.
        token_file: Option<PathBuf> = None, any();
        /// Images in one request to `/v1/embed`.
        max_embed_images: usize = 64, within(1, 4096);
        /// Body of a request.
        max_body_bytes: ByteSize = ByteSize::from_mib(32), within(ByteSize::from_kib(1), ByteSize::from_gib(1));
    }

    /// The log, on standard error.
    [log] Log {
        /// "auto": text on a terminal, JSON lines otherwise.
        format: LogFormat = LogFormat::Auto, any();
        /// What is logged.
        filter: String = "info".into(), log_filter();
    }

    /// The right to be the one learner.
    [lease] Lease {
        /// It falls to another process after so long without renewal (a third of it): the gap after a crash.
        ttl: Span = Span::from_seconds(30), within(Span::from_seconds(3), Span::from_hours(1));
    }

    /// The orderly stop.
    [shutdown] Shutdown {
        /// After SIGTERM, time for flush, checkpoint and open requests. Below the supervisor's own patience
        /// (Kubernetes: terminationGracePeriodSeconds).
        drain: Span = Span::from_seconds(25), within(Span::from_seconds(1), Span::from_hours(1));
    }
}

/// Strengths of brightness, contrast and saturation, and of the hue, whose whole circle is 1.
fn jitter() -> Limit<[f64; 4]> {
    let allowed = "4 numbers in brackets, the first three from 0 to 1, the last (hue) from 0 to 0.5";
    Limit::that(allowed, |[brightness, contrast, saturation, hue]: &[f64; 4]| {
        [brightness, contrast, saturation].iter().all(|value| (0.0..=1.0).contains(*value))
            && (0.0..=0.5).contains(hue)
    })
}
