//! Real fleets under real faults: while a client submits jobs, parts are killed,
//! stopped and started again at seeded moments; then all is healed, waited for,
//! and an independent checker judges the history of what was seen.
//!
//! A seed fixes the jobs and the faults with their moments. What the machine makes
//! of them is its own affair, so a replay is likely, not certain, to show the same.

mod dice;
mod faults;
mod history;
mod load;
mod run;
mod world;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use tokio::{
    runtime::Runtime,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
    task::{JoinError, LocalSet},
};

use run::Outcome;

/// As a shell says of SIGINT.
const INTERRUPTED: u8 = 130;

/// Which store the coordinators have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Store {
    /// One coordinator on SQLite.
    Embedded,
    /// Three coordinators on a PostgreSQL of their own.
    Postgres,
}

impl Store {
    const fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Postgres => "postgres",
        }
    }
}

/// Kills anything at any moment, and has the history judged.
#[derive(Debug, Parser)]
#[command(name = "muster-chaos", version)]
struct Options {
    /// How many runs; each has the next seed.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The coordinators' store.
    #[arg(long, value_enum, default_value_t = Store::Embedded)]
    store: Store,
    /// How long jobs are submitted and faults begin.
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// How the wires between hosts and coordinators are disturbed all the time, in the words of tc-netem(8):
    /// "delay 40ms 30ms loss 3%". Needs root and a kernel with netem.
    #[arg(long)]
    netem: Option<String>,
}

/// Somebody wants it to end.
async fn interrupted() {
    let mut polite = signal(SignalKind::terminate()).expect("a handler of SIGTERM");
    tokio::select! {
        _ = ctrl_c() => (),
        _ = polite.recv() => (),
    }
}

/// One run to its end; none: it was interrupted, and its guards have ended and removed what it had made.
fn play(runtime: &Runtime, options: &Options, seed: u64) -> Option<Result<Outcome, JoinError>> {
    // A task of its own, so that a harness that gives up fails this run alone.
    let local = LocalSet::new();
    let mut run = local.spawn_local(run::run(options.store, seed, options.seconds, options.netem.clone()));
    let ended = local.block_on(runtime, async {
        tokio::select! {
            ended = &mut run => Some(ended),
            () = interrupted() => None,
        }
    });
    if ended.is_none() {
        run.abort();
        let _aborted = local.block_on(runtime, run);
    }
    ended
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime starts where processes do");
    let (mut passed, mut failed) = (0, 0);
    for seed in options.seed..options.seed.saturating_add(options.runs) {
        let netem = options.netem.as_ref().map_or_else(String::new, |netem| format!(" --netem \"{netem}\""));
        let again =
            format!("muster-chaos --store {} --seed {seed} --seconds {}{netem}", options.store.name(), options.seconds);
        let Some(ended) = play(&runtime, &options, seed) else {
            println!("interrupted in the middle of seed {seed}");
            return ExitCode::from(INTERRUPTED);
        };
        match ended {
            Ok(Ok(Some(said))) => {
                println!("seed {seed}: {said}");
                passed += 1;
            }
            Ok(Ok(None)) => {
                println!("SKIP chaos-{}: PostgreSQL is not installed", options.store.name());
                return ExitCode::SUCCESS;
            }
            Ok(Err(why)) => {
                println!("seed {seed}: FAILED\n{why}\nagain: {again}");
                failed += 1;
            }
            Err(error) => {
                println!("seed {seed}: FAILED: the run itself gave up: {error}\nagain: {again}");
                failed += 1;
            }
        }
    }
    println!("{}: {passed} passed, {failed} failed", options.store.name());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
