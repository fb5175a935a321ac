//! Ingest and `embed` beside a training process, against the same daemon without one.
//!
//! One training process of the default model is started and never ends; for the idle windows it is stopped by a
//! signal, for the others continued. So both kinds of windows see the same daemon, the same registry and the same
//! memory, and they can alternate as often as a shared machine demands. A window is either a producer that
//! saturates ingest or a client that asks `embed` at a fixed modest rate, never both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palimpsest::registry::{PeriodRecord, PeriodState, Registry};
use tokio::time::{Instant, MissedTickBehavior};

use crate::Options;
use crate::broker::{Broker, Picture, Positions, Sender, pictures, saturate};
use crate::chart::median;
use crate::page;
use crate::process::{busy_seconds, children, cpu, signal};
use crate::site::{LATENESS_MS, PERIOD_MS, Site, period};

const PARTITIONS: i32 = 4;
/// Enough for `period.min_frames`.
const FRAMES: usize = 512;
/// Stopped or continued, the machine settles before anything is timed.
const SETTLE: Duration = Duration::from_millis(500);
/// The producer fills the broker before a window is timed.
const RUN_UP: Duration = Duration::from_millis(1500);
const POSITIONS_EVERY: Duration = Duration::from_millis(10);
/// Requests to `embed`: far below what one core answers.
const REQUESTS_PER_SECOND: u32 = 20;
/// The last period's ingest must be over before `embed` is timed.
const QUIET: Duration = Duration::from_secs(1);

/// Medians over so many.
const ROUNDS: usize = 6;
const INGEST_BOUND: f64 = 0.90;
const EMBED_BOUND: f64 = 2.0;

/// The default model and threads; a training that doesn't end by itself; flushes small enough for a broker that keeps
/// 5 MiB a partition.
const SETTINGS: &[(&str, &str)] = &[
    ("ingest.flush_age", "\"1s\""),
    ("ingest.segment_bytes", "\"1MiB\""),
    ("period.min_frames", "512"),
    ("train.first_steps", "4"),
    ("train.steps", "1000000"),
    ("train.max_epochs", "100000"),
    ("train.checkpoint_steps", "1000000"),
    ("train.device", "\"cpu\""),
    ("gate.min_effective_rank", "1.0"),
    ("gate.require_learning", "false"),
];

/// How long a window is and how often both kinds come.
struct Plan {
    window: Duration,
    rounds: usize,
}

/// One round's figures, idle first, training second.
#[derive(Default)]
struct Round {
    ingest: [Ingested; 2],
    /// Milliseconds of each request; infinity: it was refused.
    embed_ms: [Vec<f64>; 2],
    /// Cores that the training process gets while ingest is saturated, and while only `embed` is asked.
    training_cores: [f64; 2],
}

#[derive(Default, Clone, Copy)]
struct Ingested {
    frames_per_second: f64,
    /// Cores that the daemon's own process used.
    cores: f64,
    /// Cores that neither it nor its training nor this program used.
    others_cores: f64,
    /// Share of the producer's looks at which it could send nothing more.
    saturated: f64,
}

pub async fn run(options: &Options) -> Result<bool> {
    let plan = match options.small {
        true => Plan { window: Duration::from_secs(3), rounds: options.rounds.unwrap_or(1) },
        false => Plan { window: Duration::from_secs(10), rounds: options.rounds.unwrap_or(ROUNDS) },
    };
    let pictures = pictures(&options.frames)?;
    let mut broker = Broker::start(PARTITIONS)?;
    let site = Site::start(&broker.address(), SETTINGS, &options.set).await?;
    println!("a first version, then a training that goes on and on");
    let child = train(&mut broker.sender, &site, &pictures).await?;
    let mut bench = Bench { broker, site, pictures: Arc::new(pictures), child, window: plan.window };
    println!(
        "round            frames/s  daemon cores  others  full   embed p50 ms  p99 ms  training's cores"
    );
    let mut rounds = vec![];
    for number in 0..plan.rounds {
        let mut round = Round::default();
        // What comes first changes, so that a drift of the machine favours neither.
        let order = if number % 2 == 0 { [0, 1] } else { [1, 0] };
        for kind in order {
            bench.windows(kind, &mut round).await?;
            print_half(number, kind, &round);
        }
        rounds.push(round);
    }
    let summary = Summary::of(&rounds);
    let text = text(&plan, &summary)?;
    println!("\n{text}");
    if options.writes_page() {
        page::replace(&options.out, "make bench-daemon", &text)?;
    }
    Ok(options.small || summary.is_kept())
}

/// Publishes a version out of period 0 and starts the training of period 1; returns the training process.
async fn train(sender: &mut Sender, site: &Site, pictures: &[Picture]) -> Result<u32> {
    for index in 0..2 {
        let id = period(index);
        for (number, picture) in pictures.iter().cycle().take(FRAMES).enumerate() {
            let at = id.start().plus_ms(number as i64 * PERIOD_MS / FRAMES as i64);
            let partition = number as i32 % sender.partitions;
            sender.frame(partition, &format!("camera-{partition}"), picture, at)?;
        }
        sender.watermark(id.start().plus_ms(PERIOD_MS + LATENESS_MS))?;
        sender.flush()?;
    }
    let is_out = |record: &PeriodRecord| record.state == PeriodState::Published;
    site.until_period(period(0), "the first version", is_out).await?;
    site.until("steps of the second training", async |site| {
        let of_second = metric(site, "palimpsest_train_steps").await? > 4.0;
        Ok((of_second && metric(site, "palimpsest_train_step").await? >= 2.0).then_some(()))
    })
    .await?;
    let found = children(site.daemon_id());
    ensure!(found.len() == 1, "the daemon has {} children, not one", found.len());
    Ok(found[0])
}

/// The value of a series without labels of its own.
async fn metric(site: &Site, name: &str) -> Result<f64> {
    let text = reqwest::get(format!("{}/metrics", site.address)).await?.text().await?;
    let line =
        text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let value = line.and_then(|line| line.rsplit(' ').next()).with_context(|| format!("no {name}"))?;
    Ok(value.parse()?)
}

struct Bench {
    broker: Broker,
    site: Site,
    pictures: Arc<Vec<Picture>>,
    child: u32,
    window: Duration,
}

impl Bench {
    /// `kind` 0: the training process stands still; 1: it works.
    async fn windows(&mut self, kind: usize, round: &mut Round) -> Result<()> {
        signal(self.child, if kind == 0 { libc::SIGSTOP } else { libc::SIGCONT })?;
        tokio::time::sleep(SETTLE).await;
        let (ingested, beside_ingest) = self.ingest().await?;
        round.ingest[kind] = ingested;
        tokio::time::sleep(QUIET).await;
        let (before, began) = (cpu(self.child)?.own, Instant::now());
        round.embed_ms[kind] = self.embed().await?;
        let beside_embed = (cpu(self.child)?.own - before) / began.elapsed().as_secs_f64();
        if kind == 1 {
            round.training_cores = [beside_ingest, beside_embed];
        }
        Ok(())
    }

    /// Saturates ingest for a window; with the cores that the training process gets meanwhile.
    async fn ingest(&mut self) -> Result<(Ingested, f64)> {
        let positions: Positions = Arc::new((0..PARTITIONS).map(|_| AtomicI64::new(0)).collect());
        let stop = AtomicBool::new(false);
        let (site, sender, pictures) = (&self.site, &mut self.broker.sender, &self.pictures);
        let start = period(2).start();
        let (window, child) = (self.window, self.child);
        std::thread::scope(|scope| {
            let (shared, ended) = (&positions, &stop);
            let producer = scope.spawn(move || saturate(sender, pictures, start, shared, ended));
            let measured = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(accepted((site, child), &positions, window))
            });
            stop.store(true, Ordering::Relaxed);
            let saturated = producer.join().map_err(|_| anyhow::anyhow!("the producer panicked"))??;
            let (ingested, training_cores) = measured?;
            Ok((Ingested { saturated, ..ingested }, training_cores))
        })
    }

    /// Milliseconds of each request, sent at a fixed rate whatever became of the former ones.
    async fn embed(&self) -> Result<Vec<f64>> {
        let client = reqwest::Client::new();
        let url = format!("{}/v1/embed", self.site.address);
        // The first request of all loads the encoder.
        let first =
            client.post(&url).header("content-type", "image/jpeg").body(self.pictures[0].image.clone());
        first.send().await?.error_for_status()?;
        let mut due = tokio::time::interval(Duration::from_secs(1) / REQUESTS_PER_SECOND);
        due.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let count = self.window.as_secs() as usize * REQUESTS_PER_SECOND as usize;
        let mut requests = Vec::with_capacity(count);
        for number in 0..count {
            let sent = due.tick().await;
            let image = self.pictures[number % self.pictures.len()].image.clone();
            let request = client.post(&url).header("content-type", "image/jpeg").body(image);
            requests.push(tokio::spawn(async move {
                let answer = request.send().await?;
                // Too many at once: somebody who would have waited for ever.
                if answer.status() == reqwest::StatusCode::SERVICE_UNAVAILABLE {
                    return Ok(f64::INFINITY);
                }
                answer.error_for_status()?.bytes().await?;
                Ok::<f64, reqwest::Error>(sent.elapsed().as_secs_f64() * 1000.0)
            }));
        }
        let mut times = vec![];
        for request in requests {
            times.push(request.await??);
        }
        Ok(times)
    }
}

/// Follows the committed positions: frames a second over the window, after the run-up; and the child's cores.
async fn accepted(
    (site, child): (&Site, u32),
    positions: &Positions,
    window: Duration,
) -> Result<(Ingested, f64)> {
    follow(site, positions, RUN_UP).await?;
    let (first, began) = (follow(site, positions, Duration::ZERO).await?, Instant::now());
    let before = [cpu(site.daemon_id())?.own, cpu(child)?.own, others(site, child)?];
    let last = follow(site, positions, window).await?;
    let seconds = began.elapsed().as_secs_f64();
    let cores = (cpu(site.daemon_id())?.own - before[0]) / seconds;
    let training_cores = (cpu(child)?.own - before[1]) / seconds;
    let others_cores = (others(site, child)? - before[2]) / seconds;
    let frames_per_second = (last - first) as f64 / seconds;
    Ok((Ingested { frames_per_second, cores, others_cores, saturated: 0.0 }, training_cores))
}

/// CPU seconds of all that is not the daemon, its training or this program.
fn others(site: &Site, child: u32) -> Result<f64> {
    let ours = [site.daemon_id(), child, std::process::id()].map(|id| cpu(id).map(|cpu| cpu.own));
    let ours = ours.into_iter().sum::<Result<f64>>()?;
    Ok(busy_seconds()? - ours)
}

/// Tells the producer the positions for so long; returns the frames committed so far.
async fn follow(site: &Site, positions: &Positions, duration: Duration) -> Result<i64> {
    let until = Instant::now() + duration;
    loop {
        let mut sum = 0;
        for record in site.registry.positions().await? {
            let position = record.position.unwrap_or(0);
            positions[record.partition.partition as usize].store(position, Ordering::Relaxed);
            sum += position;
        }
        if Instant::now() >= until {
            return Ok(sum);
        }
        tokio::time::sleep(POSITIONS_EVERY).await;
    }
}

fn print_half(number: usize, kind: usize, round: &Round) {
    let Ingested { frames_per_second, cores, others_cores, saturated } = round.ingest[kind];
    let times = &round.embed_ms[kind];
    let trained = match kind {
        0 => String::new(),
        _ => format!(
            "{:.2} beside ingest, {:.2} beside embed",
            round.training_cores[0], round.training_cores[1]
        ),
    };
    println!(
        "{:>5} {:<9} {frames_per_second:>9.0} {cores:>13.2} {others_cores:>7.2} {saturated:>5.2} {:>14.2} {:>7.2}  {trained}",
        number + 1,
        ["idle", "training"][kind],
        percentile(times, 0.50),
        percentile(times, 0.99),
    );
}

/// The smallest value that is not below `share` of all.
fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Over all rounds: medians of the rounds' own values, idle first; ratios are medians of the rounds' ratios.
struct Summary {
    frames_per_second: [f64; 2],
    cores: [f64; 2],
    others_cores: [f64; 2],
    ingest_ratio: f64,
    p50_ms: [f64; 2],
    p50_ratio: f64,
    p99_ms: [f64; 2],
    p99_ratio: f64,
    training_cores: [f64; 2],
}

impl Summary {
    fn of(rounds: &[Round]) -> Self {
        let over = |of: &dyn Fn(&Round) -> f64| median(rounds.iter().map(of).collect());
        let pair = |of: &dyn Fn(&Round, usize) -> f64| [over(&|r| of(r, 0)), over(&|r| of(r, 1))];
        let ratio = |of: &dyn Fn(&Round, usize) -> f64| over(&|r| of(r, 1) / of(r, 0));
        let frames = |round: &Round, kind: usize| round.ingest[kind].frames_per_second;
        let p50 = |round: &Round, kind: usize| percentile(&round.embed_ms[kind], 0.50);
        let p99 = |round: &Round, kind: usize| percentile(&round.embed_ms[kind], 0.99);
        Self {
            frames_per_second: pair(&frames),
            cores: pair(&|round, kind| round.ingest[kind].cores),
            others_cores: pair(&|round, kind| round.ingest[kind].others_cores),
            ingest_ratio: ratio(&frames),
            p50_ms: pair(&p50),
            p50_ratio: ratio(&p50),
            p99_ms: pair(&p99),
            p99_ratio: ratio(&p99),
            training_cores: [over(&|round| round.training_cores[0]), over(&|round| round.training_cores[1])],
        }
    }

    fn is_kept(&self) -> bool {
        self.ingest_ratio >= INGEST_BOUND && self.p99_ratio <= EMBED_BOUND
    }
}

fn text(plan: &Plan, summary: &Summary) -> Result<String> {
    let Plan { window, rounds } = plan;
    let verdict = |kept: bool| if kept { "kept" } else { "**broken**" };
    let mut text = page::made_by("make bench-daemon")?;
    text += &format!(
        "{rounds} rounds of windows of {} s, idle and training in changing order; the default model (`vit_tiny`, \
         64x64, 128 frames a step) with the default `train.threads` and `train.priority`. Medians of the rounds, ratios \
         within a round. `embed`: single 64x48 JPEGs, {REQUESTS_PER_SECOND} a second.\n\n",
        window.as_secs()
    );
    text += "| | idle | training | ratio | bound | |\n|---|--:|--:|--:|--:|---|\n";
    let Summary { frames_per_second: [idle, busy], ingest_ratio, .. } = summary;
    let kept = verdict(*ingest_ratio >= INGEST_BOUND);
    text += &format!(
        "| ingest, saturated, frames/s | {idle:.0} | {busy:.0} | {ingest_ratio:.2} | at least {INGEST_BOUND:.2} | {kept} |\n"
    );
    let [idle, busy] = summary.p99_ms;
    let kept = verdict(summary.p99_ratio <= EMBED_BOUND);
    text += &format!(
        "| `/v1/embed`, p99, ms | {idle:.1} | {busy:.1} | {:.2} | at most {EMBED_BOUND:.2} | {kept} |\n",
        summary.p99_ratio
    );
    let [idle, busy] = summary.p50_ms;
    text += &format!("| `/v1/embed`, p50, ms | {idle:.1} | {busy:.1} | {:.2} | | |\n", summary.p50_ratio);
    let [idle, busy] = summary.cores;
    text += &format!("| cores that the daemon uses for saturated ingest | {idle:.2} | {busy:.2} | | | |\n");
    let [idle, busy] = summary.others_cores;
    text += &format!(
        "| cores that other programs of the machine use meanwhile | {idle:.2} | {busy:.2} | | | |\n"
    );
    let [beside_ingest, beside_embed] = summary.training_cores;
    text += &format!(
        "\nTraining meanwhile got {beside_embed:.2} cores beside `embed` and {beside_ingest:.2} beside saturated ingest, \
         whose producer and broker ran on the same machine. "
    );
    Ok(text)
}
