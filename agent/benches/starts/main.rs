//! What a start costs: the spawner's own, over its own protocol, beside `posix_spawn`, bubblewrap and runc, in one run
//! and interleaved in another order each round, so that what disturbs the machine, or was left by the start before,
//! disturbs all: `cargo bench -p muster-agent --bench starts [-- ROUNDS TASKS]`, after `cargo build --release -p muster`.
//!
//! The program that is started is one page without a libc, so that only the start itself is measured. Of each way to
//! start two programs are run: one that tells when its first instruction ran, one that only exits. Nothing here fails
//! because of a time: a budget is met or missed, and the line says which.
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

mod peers;
mod program;
mod spawner;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    process::ExitCode,
    time::Duration,
};

use muster_agent::spawner::protocol::Profile;
use peers::{Bubblewrap, PosixSpawn, Runc};
use program::Programs;
use spawner::{Shape, Spawner};

/// Rounds that are run and not counted.
const WARM_UP: usize = 20;
/// Between two starts: what the last one left to the kernel (namespaces are taken down behind the scenes) is over.
const PAUSE: Duration = Duration::from_millis(5);
/// The pause before a start that is to find a sandbox made ahead: time for the spawner to make it. After so long a rest
/// the machine itself wakes up slowly, a bare `posix_spawn` too: it is measured after both, and each start is compared
/// with the one that had rested for as long.
const REST: Duration = Duration::from_millis(20);
/// Starts under way at once in the measurement of throughput: this machine's cores, as `xargs -P` has it.
const OUTSTANDING: usize = 2;

const SPAWNED: &str = "posix_spawn";
const SPAWNED_RESTED: &str = "the same, rested";
const PREPARED: &str = "strict prepared";

/// One start, in nanoseconds of CLOCK_MONOTONIC from the moment before the request.
struct Sample {
    /// The program's first instruction.
    first: u64,
    /// The caller knows that it runs; only the spawner tells that.
    started: Option<u64>,
    /// The caller has the exit code, of the program that only exits.
    exit: u64,
}

/// One way to start a program.
trait Way {
    fn name(&self) -> &'static str;
    /// Starts both programs, each by itself.
    fn sample(&mut self, programs: &Programs) -> Sample;
    /// A remark on what was measured, after all rounds.
    fn remark(&self) -> Option<String> {
        None
    }
}

fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap()
}

fn main() -> ExitCode {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<usize>().ok());
    let (rounds, tasks) = (numbers.next().unwrap_or(200), numbers.next().unwrap_or(10_000));
    let programs = match Programs::build() {
        Ok(programs) => programs,
        Err(reason) => {
            println!("not on this machine: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    let spawner = Spawner::start();
    println!("{}", spawner.description());
    compare(&spawner, &programs, rounds.max(1));
    throughput(&spawner, &programs, tasks);
    ExitCode::SUCCESS
}

fn compare(spawner: &Spawner, programs: &Programs, rounds: usize) {
    let mut ways: Vec<Box<dyn Way + '_>> = vec![
        Box::new(PosixSpawn { name: SPAWNED, rest: PAUSE }),
        Box::new(PosixSpawn { name: SPAWNED_RESTED, rest: REST }),
    ];
    match Bubblewrap::find(programs) {
        Ok(way) => ways.push(Box::new(way)),
        Err(reason) => println!("bubblewrap: not on this machine: {reason}"),
    }
    match Runc::find(programs) {
        Ok(way) => ways.push(Box::new(way)),
        Err(reason) => println!("runc: not on this machine: {reason}"),
    }
    for (name, profile, shape) in [
        (PREPARED, Profile::Strict, Shape::Usual),
        ("strict again", Profile::Strict, Shape::Again),
        ("strict cold", Profile::Strict, Shape::New),
        ("shared", Profile::Shared, Shape::Again),
        ("none", Profile::None, Shape::Again),
    ] {
        ways.push(Box::new(spawner.way(name, profile, shape)));
    }
    let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
    for round in 0..WARM_UP + rounds {
        for index in order_of(round, ways.len()) {
            let way = &mut ways[index];
            let sample = way.sample(programs);
            if round >= WARM_UP {
                samples.entry(way.name()).or_default().push(sample);
            }
        }
    }
    let names: Vec<&str> = ways.iter().map(|way| way.name()).collect();
    print_table(&names, &samples);
    for remark in ways.iter().filter_map(|way| way.remark()) {
        println!("{remark}");
    }
    print_budgets(&samples);
}

/// In which order a round goes: what one way leaves to the kernel and in the caches does not always meet the same other.
/// Sorted by a hash without a random key, so that a run can be repeated.
fn order_of(round: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_cached_key(|way| BuildHasherDefault::<DefaultHasher>::default().hash_one((round, way)));
    order
}

/// Smallest, median and 90th percentile, in microseconds.
#[derive(Clone, Copy)]
struct Figures {
    min: f64,
    median: f64,
    p90: f64,
}

impl Figures {
    fn of(samples: &[Sample], pick: impl Fn(&Sample) -> Option<u64>) -> Option<Self> {
        let mut values: Vec<u64> = samples.iter().filter_map(pick).collect();
        values.sort_unstable();
        let at = |share: usize| values.get(values.len() * share / 100).map(|ns| *ns as f64 / 1_000.0);
        Some(Self { min: at(0)?, median: at(50)?, p90: at(90)? })
    }

    fn first(samples: &BTreeMap<&str, Vec<Sample>>, name: &str) -> Option<Self> {
        Self::of(samples.get(name)?, |sample| Some(sample.first))
    }

    fn exit(samples: &BTreeMap<&str, Vec<Sample>>, name: &str) -> Option<Self> {
        Self::of(samples.get(name)?, |sample| Some(sample.exit))
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:>7.0} {:>7.0} {:>7.0}", self.min, self.median, self.p90)
    }
}

fn print_table(names: &[&str], samples: &BTreeMap<&str, Vec<Sample>>) {
    println!("us from the request: min, median, p90");
    println!(
        "{:<16} {:^23} | {:^23} | {:^23} | exit: x posix_spawn, x bubblewrap",
        "", "first instruction", "told that it runs", "exit code"
    );
    let [spawned, rested, wrapped] = [SPAWNED, SPAWNED_RESTED, "bubblewrap"].map(|name| Figures::exit(samples, name));
    for name in names {
        let text = |figures: Option<Figures>| figures.map_or_else(|| format!("{:^23}", "-"), |f| f.to_string());
        let exit = Figures::exit(samples, name);
        let ratio = |to: Option<Figures>| match (exit, to) {
            (Some(own), Some(to)) => format!("{:.2}", own.median / to.median),
            (None, _) | (_, None) => "-".to_owned(),
        };
        println!(
            "{name:<16} {} | {} | {} | {:>8} {:>8}",
            text(Figures::first(samples, name)),
            text(samples.get(name).and_then(|all| Figures::of(all, |sample| sample.started))),
            text(exit),
            ratio(if [PREPARED, SPAWNED_RESTED].contains(name) { rested } else { spawned }),
            ratio(wrapped),
        );
    }
}

fn print_budgets(samples: &BTreeMap<&str, Vec<Sample>>) {
    let first = |name| Figures::first(samples, name).map(|figures| figures.median);
    let exit = |name| Figures::exit(samples, name).map(|figures| figures.median);
    let budget = |what: &str, own: Option<f64>, of: &str, peer: Option<f64>, most: f64| match (own, peer) {
        (Some(own), Some(peer)) => {
            let ratio = own / peer;
            let verdict = if ratio <= most { "met" } else { "missed" };
            println!("budget: {what}: {own:.0} us = {ratio:.2} x {of} ({peer:.0} us), at most {most}: {verdict}");
        }
        (None, _) | (_, None) => println!("budget: {what}: not measured, {of} is not on this machine"),
    };
    let rested = exit(SPAWNED_RESTED);
    let of = "posix_spawn with its wait after the same rest";
    budget("prepared, to the first instruction", first(PREPARED), of, rested, 2.0);
    budget("prepared, to the exit code", exit(PREPARED), of, rested, 4.0);
    let spawned = exit(SPAWNED);
    let of = "posix_spawn with its wait";
    budget("used again, to the first instruction", first("strict again"), of, spawned, 2.0);
    budget("used again, to the exit code", exit("strict again"), of, spawned, 4.0);
    budget("cold, to the exit code", exit("strict cold"), "bubblewrap", exit("bubblewrap"), 0.5);
}

fn throughput(spawner: &Spawner, programs: &Programs, tasks: usize) {
    let rate = |took: Duration| tasks as f64 / took.as_secs_f64();
    let xargs = peers::xargs(&programs.exits, tasks, OUTSTANDING).map(rate);
    println!("{tasks} starts back to back, {OUTSTANDING} under way at once:");
    match xargs {
        Some(rate) => println!("{:<16} {rate:>7.0} tasks/s", format!("xargs -P{OUTSTANDING} -n1")),
        None => println!("xargs: not on this machine"),
    }
    for (name, profile) in [("none", Profile::None), ("strict", Profile::Strict)] {
        let own = rate(spawner.back_to_back(profile, &programs.exits, tasks, OUTSTANDING));
        let share = xargs.map_or_else(String::new, |xargs| format!(" = {:.2} x xargs", own / xargs));
        println!("{name:<16} {own:>7.0} tasks/s{share}");
    }
}
