//! Cost over time: periods of equal size, one after the other, and what each took.
//!
//! A period's frames are sent, a punctuation closes it, and it is waited for until its version is published and the
//! frames of the one before are deleted; then the daemon rests and everything is read off. So a period's figures
//! are its own: nothing of the next one is ingested meanwhile.
//!
//! The old daemon's last periods are compared with the same early ones of a second, young daemon, taken in turn, so
//! that both meet the same machine: over the minutes between a daemon's own ends a shared machine changes by more
//! than what is to be found.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use palimpsest::registry::{PeriodRecord, PeriodState, Registry};

use crate::Options;
use crate::broker::{Broker, Picture, Sender, pictures};
use crate::chart::{self, median};
use crate::page;
use crate::process::{Cpu, PeakWatch, bytes_below, cpu, resident_bytes};
use crate::site::{LATENESS_MS, PERIOD_MS, PIPELINE, Site, period};

const PERIODS: usize = 50;
const SMALL_PERIODS: usize = 6;
const FRAMES: usize = 256;
/// The base line is five periods after it: by then a candidate is measured on as many probe sets as ever.
const PROBE_KEEP: usize = 4;
const BASE: usize = PROBE_KEEP + 5;
/// So many last periods are compared with as many from the base line on.
const PAIRS: usize = 9;
/// What the last periods may cost more than those at the base line.
const TOLERANCE: f64 = 0.10;
const STREAMS: usize = 16;
const PARTITIONS: i32 = 2;
/// Every so many-th picture is a period's: the levels are mixed alike in all of them.
const STRIDE: usize = 16;
const MIB: f64 = 1_048_576.0;

/// Short, and the same work in every period.
const SETTINGS: &[(&str, &str)] = &[
    ("ingest.flush_age", "\"200ms\""),
    ("period.min_frames", "128"),
    ("model.architecture", "\"resnet_small\""),
    ("model.image_size", "32"),
    ("model.projector_hidden", "256"),
    ("model.projector_dim", "64"),
    ("train.batch", "32"),
    ("train.first_steps", "60"),
    ("train.steps", "40"),
    ("train.checkpoint_steps", "20"),
    ("train.device", "\"cpu\""),
    ("probe.block", "\"1h\""),
    ("probe.guard", "\"0s\""),
    ("probe.ratio", "0.3"),
    ("probe.keep", "4"),
    // Every candidate is published, whatever so few steps have made of it.
    ("gate.max_forgetting_parent", "1.0"),
    ("gate.max_forgetting_cumulative", "1.0"),
    ("gate.min_neighbour_retention", "0.0"),
    ("gate.min_effective_rank", "1.0"),
    ("gate.require_learning", "false"),
    ("retention.periods", "1"),
];

/// Bytes at rest by what they are.
#[derive(Debug, Clone, Copy)]
pub struct Storage {
    /// Frames, checkpoints, candidates: what retention bounds.
    pub passing: u64,
    /// Published versions and probe sets, kept on purpose.
    pub kept: u64,
    /// The database with its journal.
    pub registry: u64,
}

/// What one period took.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// From its sealing to its publication.
    pub close_seconds: f64,
    pub child_cpu_seconds: f64,
    /// Of the daemon's own process, from the first frame to the deletion of the former period's frames.
    pub daemon_cpu_seconds: f64,
    pub child_peak_bytes: u64,
    pub daemon_resident_bytes: u64,
    pub stored: Storage,
    /// What the period added to `stored.kept`.
    pub kept_bytes: u64,
}

pub async fn run(options: &Options) -> Result<bool> {
    let pictures = pictures(&options.frames)?;
    println!("periods of {FRAMES} frames, one after the other");
    println!(
        "        period  close s  child CPU s  child peak MiB  daemon MiB  passing MiB  kept MiB  registry MiB"
    );
    let mut old = Line::start("old", &pictures, options).await?;
    if options.small {
        old.go_on_to(SMALL_PERIODS).await?;
        println!("too few periods to compare: the base line is period {BASE}");
        return Ok(true);
    }
    old.go_on_to(PERIODS - PAIRS).await?;
    let mut young = Line::start("young", &pictures, options).await?;
    young.go_on_to(BASE - 1).await?;
    for pair in 0..PAIRS {
        // Who comes first changes, so that a drift of the machine favours neither.
        let in_turn = if pair % 2 == 0 { [&mut young, &mut old] } else { [&mut old, &mut young] };
        for line in in_turn {
            line.go_on_to(line.costs.len() + 1).await?;
        }
    }
    conclude(options, &old, &young).await
}

/// A daemon with its broker and the periods that it has been through.
struct Line<'a> {
    name: &'static str,
    pictures: &'a [Picture],
    broker: Broker,
    site: Site,
    watch: PeakWatch,
    costs: Vec<Cost>,
}

impl<'a> Line<'a> {
    async fn start(name: &'static str, pictures: &'a [Picture], options: &Options) -> Result<Self> {
        let broker = Broker::start(PARTITIONS)?;
        let site = Site::start(&broker.address(), SETTINGS, &options.set).await?;
        let watch = PeakWatch::start(site.daemon_id())?;
        Ok(Self { name, pictures, broker, site, watch, costs: vec![] })
    }

    /// Until so many periods are through.
    async fn go_on_to(&mut self, count: usize) -> Result<()> {
        while self.costs.len() < count {
            let index = self.costs.len();
            let before = cpu(self.site.daemon_id())?;
            let record = one_period(&mut self.broker.sender, &self.site, self.pictures, index).await?;
            let former = self.costs.last().map_or(0, |cost| cost.stored.kept);
            let cost = cost_of(&self.site, &self.watch, &record, before, former)?;
            print_row(self.name, index + 1, &cost);
            self.costs.push(cost);
        }
        Ok(())
    }
}

/// Sends a period's frames, closes it and waits until nothing is left to be done.
async fn one_period(
    sender: &mut Sender,
    site: &Site,
    pictures: &[Picture],
    index: usize,
) -> Result<PeriodRecord> {
    let id = period(index);
    let of_period = pictures.iter().skip(index % STRIDE).step_by(STRIDE).cycle().take(FRAMES);
    for (number, picture) in of_period.enumerate() {
        let at = id.start().plus_ms(number as i64 * PERIOD_MS / FRAMES as i64);
        let stream = number % STREAMS;
        let partition = stream as i32 % sender.partitions;
        sender.frame(partition, &format!("walk-{stream}"), picture, at)?;
    }
    sender.watermark(id.start().plus_ms(PERIOD_MS + LATENESS_MS))?;
    sender.flush()?;
    let is_out = |record: &PeriodRecord| record.state == PeriodState::Published;
    let record = site.until_period(id, "the publication", is_out).await?;
    if index > 0 {
        let is_gone = |record: &PeriodRecord| record.state == PeriodState::Expired;
        site.until_period(period(index - 1), "the expiry", is_gone).await?;
        site.until("the deletion of its frames", async |site| {
            let folder = format!("objects/{PIPELINE}/segments/{}", period(index - 1));
            Ok((bytes_below(&site.path(&folder)) == 0).then_some(()))
        })
        .await?;
    }
    Ok(record)
}

fn cost_of(site: &Site, watch: &PeakWatch, record: &PeriodRecord, before: Cpu, former: u64) -> Result<Cost> {
    let id = site.daemon_id();
    let after = cpu(id)?;
    let (sealed, settled) =
        (record.sealed_at.context("not sealed")?, record.settled_at.context("not settled")?);
    let stored = stored(site);
    Ok(Cost {
        close_seconds: (settled.as_ms() - sealed.as_ms()) as f64 / 1000.0,
        child_cpu_seconds: after.children - before.children,
        daemon_cpu_seconds: after.own - before.own,
        child_peak_bytes: watch.take(),
        daemon_resident_bytes: resident_bytes(id)?,
        stored,
        kept_bytes: stored.kept - former,
    })
}

fn stored(site: &Site) -> Storage {
    let below = |name: &str| bytes_below(&site.path(&format!("objects/{PIPELINE}/{name}")));
    let file = |name: &str| std::fs::metadata(site.path(name)).map_or(0, |metadata| metadata.len());
    Storage {
        passing: below("segments") + below("attempts"),
        kept: below("versions") + below("probes"),
        registry: file("registry.db") + file("registry.db-wal"),
    }
}

fn print_row(name: &str, number: usize, cost: &Cost) {
    println!(
        "{name:<6} {number:>6}  {:>7.2}  {:>11.2}  {:>14.1}  {:>10.1}  {:>11.2}  {:>8.2}  {:>12.2}",
        cost.close_seconds,
        cost.child_cpu_seconds,
        mib(cost.child_peak_bytes),
        mib(cost.daemon_resident_bytes),
        mib(cost.stored.passing),
        mib(cost.stored.kept),
        mib(cost.stored.registry),
    );
}

/// How one figure is made of a measure's at both ends.
#[derive(Clone, Copy)]
enum Summary {
    /// Medians, and the median of the pairs' ratios.
    Median,
    /// The largest, and their ratio: for a peak, which varies from period to period by a quarter, as threads happen to meet, so that
    /// a median says which of two sizes came up more often.
    Largest,
}

impl Summary {
    /// Of the base line, of the last periods, and the ratio.
    fn of(self, base: &[f64], last: &[f64]) -> [f64; 3] {
        match self {
            Summary::Median => {
                let ratios = base.iter().zip(last).map(|(base, last)| last / base);
                [median(base.to_vec()), median(last.to_vec()), median(ratios.collect())]
            }
            Summary::Largest => {
                let [base, last] = [base, last].map(|values| values.iter().copied().fold(0.0, f64::max));
                [base, last, last / base]
            }
        }
    }
}

/// One measure at both ends.
struct Comparison {
    name: &'static str,
    unit: &'static str,
    base: f64,
    last: f64,
    ratio: f64,
}

impl Comparison {
    fn is_kept(&self) -> bool {
        self.ratio <= 1.0 + TOLERANCE
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

/// Name, unit, summary, value.
type Measure = (&'static str, &'static str, Summary, fn(&Cost) -> f64);

/// `base` and `last`: the periods of the pairs, in order.
fn comparisons(base: &[Cost], last: &[Cost]) -> Vec<Comparison> {
    use Summary::{Largest, Median};
    let measures: [Measure; 7] = [
        ("close time (sealed to published)", "s", Median, |cost| cost.close_seconds),
        ("CPU time of the training process", "s", Median, |cost| cost.child_cpu_seconds),
        ("CPU time of the daemon and its training", "s", Median, |cost| {
            cost.child_cpu_seconds + cost.daemon_cpu_seconds
        }),
        ("peak memory of the training process, the largest", "MiB", Largest, |cost| {
            mib(cost.child_peak_bytes)
        }),
        ("resident memory of the daemon", "MiB", Median, |cost| mib(cost.daemon_resident_bytes)),
        ("stored frames, checkpoints, candidates", "MiB", Median, |cost| mib(cost.stored.passing)),
        ("kept for good by a period: its version, its probe set", "MiB", Median, |cost| mib(cost.kept_bytes)),
    ];
    let compare = |(name, unit, summary, of): Measure| {
        let values = |costs: &[Cost]| costs.iter().map(of).collect::<Vec<_>>();
        let [base, last, ratio] = summary.of(&values(base), &values(last));
        Comparison { name, unit, base, last, ratio }
    };
    measures.into_iter().map(compare).collect()
}

async fn conclude(options: &Options, old: &Line<'_>, young: &Line<'_>) -> Result<bool> {
    let comparisons = comparisons(&young.costs[BASE - 1..], &old.costs[PERIODS - PAIRS..]);
    let files = version_files(&old.site).await?;
    let text = text(&old.costs, &comparisons, &files)?;
    println!("\n{text}");
    if options.writes_page() {
        let drawn = chart::cost_over_time(&old.costs, BASE, TOLERANCE)?;
        std::fs::write(options.out.join("cost_over_time.svg"), drawn)?;
        page::replace(&options.out, "make bench-periods", &text)?;
    }
    Ok(comparisons.iter().all(Comparison::is_kept))
}

/// Bytes of the files of the versions of the base line and of the last period, by what they are.
async fn version_files(site: &Site) -> Result<BTreeMap<String, [u64; 2]>> {
    let mut files: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    let periods = site.registry.periods().await?;
    for (column, number) in [BASE, PERIODS].into_iter().enumerate() {
        let version = periods[number - 1].version.context("a period has no version")?;
        let record = site.registry.version(version).await?;
        for file in record.files {
            // Files of one folder are of one kind.
            let name = Path::new(&file.path).components().next().map_or(String::new(), |first| {
                let first = first.as_os_str().to_string_lossy();
                if file.path.contains('/') { format!("{first}/") } else { first.into_owned() }
            });
            files.entry(name).or_default()[column] += file.bytes;
        }
    }
    Ok(files)
}

fn text(costs: &[Cost], comparisons: &[Comparison], files: &BTreeMap<String, [u64; 2]>) -> Result<String> {
    let last = costs.len();
    let mut text = page::made_by("make bench-periods")?;
    text += &format!(
        "{last} periods of {FRAMES} frames (64x48 JPEG), `resnet_small` at 32x32, 40 steps of 32 frames, \
         `probe.keep` {PROBE_KEEP}, `retention.periods` 1. The base line is period `probe.keep` + 5 = {BASE}. The last \
         {PAIRS} periods in turn with {PAIRS} from the base line on of a second, young daemon: medians, and the median \
         of the pairs' ratios (of the training process's peak, which varies from period to period, the largest); at most {:.0} % more is allowed.\n\n",
        TOLERANCE * 100.0
    );
    text += &format!(
        "| per period | {BASE}-{} | {}-{last} | ratio | |\n|---|--:|--:|--:|---|\n",
        BASE + PAIRS - 1,
        last - PAIRS + 1
    );
    for comparison in comparisons {
        let Comparison { name, unit, base, last, ratio } = comparison;
        let verdict = if comparison.is_kept() { "kept" } else { "**broken**" };
        text += &format!("| {name} | {base:.2} {unit} | {last:.2} {unit} | {ratio:.2} | {verdict} |\n");
    }
    let (base, end) = (costs[BASE - 1].stored, costs[last - 1].stored);
    let growth = |of: fn(&Storage) -> u64| (of(&end) - of(&base)) as f64 / (last - BASE) as f64 / 1024.0;
    text += &format!(
        "\nWhat is kept for good grows by {:.0} KiB a period (versions and probe sets) and {:.1} KiB (registry), \
         from {:.1} and {:.1} MiB after period {BASE} to {:.1} and {:.1} MiB after period {last}. \
         Bytes of one version's files:\n\n",
        growth(|stored| stored.kept),
        growth(|stored| stored.registry),
        base.kept as f64 / MIB,
        base.registry as f64 / MIB,
        end.kept as f64 / MIB,
        end.registry as f64 / MIB,
    );
    text += &format!("| file | period {BASE} | period {last} |\n|---|--:|--:|\n");
    for (name, [base, last]) in files {
        text += &format!("| `{name}` | {base} | {last} |\n");
    }
    text += "\n![Close time, memory and storage by period](cost_over_time.svg)\n";
    Ok(text)
}
