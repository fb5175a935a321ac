//! The command line: words to settings, results to text and exit codes (0 done, 1 failed, 2 wrong usage or configuration).

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use palimpsest::{app, cli, demo, train};

/// Keeps an image embedding up to date with a stream, without forgetting.
///
/// palimpsest reads frames from Kafka per time window, trains an encoder on each closed window alone, held to
/// the version before it by distillation, measures what was forgotten and publishes immutable versions.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon: ingest frames, learn from closed periods, serve versions.
    Run {
        #[command(flatten)]
        config: ConfigFile,
        /// What this process does of it.
        #[arg(long, value_enum, default_value_t = Role::All)]
        role: Role,
    },
    /// Run one training job (the daemon starts this by itself).
    ///
    /// Reads the job file and all that it names from the object store (store.url), writes the candidate below the job's
    /// prefix and reports in JSON lines on standard output.
    Train {
        #[command(flatten)]
        config: ConfigFile,
        /// Object name of the job file.
        #[arg(long, value_name = "NAME")]
        job: String,
        /// Stop, after a checkpoint, when the standard input closes. SIGTERM does the same in any case.
        #[arg(long)]
        stop_with_stdin: bool,
    },
    /// Measure what methods forget on a stream of labelled periods, the learner's own and what it is compared with.
    ///
    /// Writes results.json, a table (report.md) and a picture (accuracy.svg). Model, training and augmentation are the
    /// configuration's; config/forgetting.toml holds the published benchmark's.
    #[command(args_override_self = true)]
    Bench {
        #[command(flatten)]
        config: ConfigFile,
        #[command(flatten)]
        arguments: app::bench::BenchArguments,
    },
    /// See the main job in a few minutes: three periods of real frames through an in-process broker.
    Demo(demo::DemoArguments),
    /// Replay a folder of images or a Parquet file into Kafka.
    Produce {
        #[command(flatten)]
        config: ConfigFile,
        #[command(flatten)]
        arguments: cli::ProduceArguments,
    },
    /// Bring the registry's schema up to date.
    Migrate {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Check the configuration, or show what is in force.
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
    /// List, show and promote published versions.
    Versions {
        #[command(flatten)]
        config: ConfigFile,
        #[command(subcommand)]
        action: cli::VersionsAction,
    },
    /// List, show, close and retry periods.
    Periods {
        #[command(flatten)]
        config: ConfigFile,
        #[command(subcommand)]
        action: cli::PeriodsAction,
    },
    /// List and reset the positions in Kafka's partitions.
    Positions {
        #[command(flatten)]
        config: ConfigFile,
        #[command(subcommand)]
        action: cli::PositionsAction,
    },
}

#[derive(clap::Args)]
struct ConfigFile {
    /// TOML file; `PALIMPSEST__SECTION__KEY` environment variables override it. Without it: the defaults.
    #[arg(long, short, global = true, value_name = "FILE", env = "PALIMPSEST_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum ConfigAction {
    /// Tell every mistake in it; exit code 2 if there is one.
    Check {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Print every key as it is in force, secrets left out.
    Show {
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    All,
    Ingest,
    Learn,
    Serve,
}

impl From<Role> for app::Roles {
    fn from(role: Role) -> Self {
        let is = |one| role == Role::All || role == one;
        Self { ingest: is(Role::Ingest), learn: is(Role::Learn), serve: is(Role::Serve) }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("palimpsest: {error:#}");
            ExitCode::from(if error.is::<cli::WrongUsage>() { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    // Training sets up its threads and its allocator before the first tensor, and needs no async runtime of ours.
    if let Command::Train { config, job, stop_with_stdin } = &command {
        return app::train::train(&cli::load(config.config.as_deref())?, job, *stop_with_stdin);
    }
    if let Command::Bench { config, arguments } = &command {
        return app::bench::bench(&cli::load(config.config.as_deref())?, arguments);
    }
    if matches!(command, Command::Run { .. } | Command::Demo(_)) {
        train::runtime::prepare_daemon()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run_async(command))
}

async fn run_async(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run { config, role } => app::run(&cli::load(config.config.as_deref())?, role.into()).await,
        Command::Train { .. } | Command::Bench { .. } => unreachable!("handled before the runtime starts"),
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::Produce { config, arguments } => {
            cli::produce(&cli::load(config.config.as_deref())?, arguments).await
        }
        Command::Migrate { config } => cli::migrate(&cli::load(config.config.as_deref())?).await,
        Command::Config { action: ConfigAction::Check { config } } => cli::check(config.config.as_deref()),
        Command::Config { action: ConfigAction::Show { config } } => cli::show(config.config.as_deref()),
        Command::Versions { config, action } => {
            cli::versions(&cli::load(config.config.as_deref())?, action).await
        }
        Command::Periods { config, action } => {
            cli::periods(&cli::load(config.config.as_deref())?, action).await
        }
        Command::Positions { config, action } => {
            cli::positions(&cli::load(config.config.as_deref())?, action).await
        }
    }
}
