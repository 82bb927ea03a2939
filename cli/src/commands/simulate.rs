//! `muster simulate`: the real rules in a simulated fleet, in virtual time, with faults.

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use muster_core::time::Millis;
use muster_sim::{Failure as Broken, Mix, Progress as Played, Setup, Summary, play_all, shrink, trace};
use serde_json::{Value, json};

use super::replay;
use crate::{
    args::Simulate,
    exit::{Exit, Failure, Result},
    output::Output,
    progress::{Progress, time_left},
};

/// Lines of a trace that are shown of a seed that fails.
const TAIL_LINES: usize = 40;
/// What occurs less often than this is named: it was hardly tried.
const RARE: u64 = 100;

/// Runs the command.
pub fn run(output: &Output, command: &Simulate) -> Result<ExitCode> {
    if let Some(policy) = &command.replay.policy {
        let trace = command.trace.as_deref().map(Path::new);
        let task = replay::Task { policy, trace, seed: command.seed, threads: command.threads };
        return replay::run(output, &command.replay, task);
    }
    let setup = setup_of(command)?;
    if let Some(seed) = seed_of(command)? {
        return play_one(output, seed, setup);
    }
    let threads = command.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let begun = Instant::now();
    let line = Progress::new(output);
    let progress = |played| line.show(|since| far(played, command.seeds, since));
    progress(Played { seeds: 0, violations: 0 });
    let summary = play_all(command.seed, command.seeds, threads, setup, &progress);
    let failure =
        summary.failure.as_ref().map(|failure| if command.shrink { shrink(failure) } else { failure.clone() });
    drop(line);
    let elapsed = begun.elapsed();
    output.one("Simulation", &value(&summary, failure.as_ref(), elapsed), &text(&summary, elapsed), "simulation")?;
    match failure {
        None => Ok(Exit::Ok.into()),
        Some(failure) => Err(Failure::new(Exit::Failed, sentence(&failure))),
    }
}

fn setup_of(command: &Simulate) -> Result<Setup> {
    let mix = Mix {
        at_most_once: command.at_most_once,
        exclusive: command.exclusive,
        long: command.long,
        limited: command.limited,
        poison: command.poison,
        endless: command.endless,
    };
    if mix.at_most_once + mix.exclusive > 1_000 {
        return Err(Failure::usage("--at-most-once and --exclusive together are more than all jobs (1000)"));
    }
    Ok(Setup {
        hosts: command.hosts,
        pool_max: command.pool_max,
        jobs: command.jobs,
        span: Millis(u64::try_from(command.span.as_millis()).unwrap_or(u64::MAX)),
        coordinators: command.coordinators,
        mix,
        faults: command.faults,
        pause: Millis(u64::try_from(command.fault_every.as_millis()).unwrap_or(u64::MAX)),
    })
}

/// The one seed to play.
fn seed_of(command: &Simulate) -> Result<Option<u64>> {
    let Some(trace) = &command.trace else { return Ok(None) };
    let seed = trace.to_str().and_then(|text| text.parse().ok());
    seed.map(Some).ok_or_else(|| {
        Failure::usage("--trace is a seed of the simulator, a number; for the file of a trace give --policy FILE too")
    })
}

/// One seed, with all that happens.
fn play_one(output: &Output, seed: u64, setup: Setup) -> Result<ExitCode> {
    let (lines, hash, violation) = trace(seed, setup, usize::MAX);
    let text = format!("{}\nhash {hash:016x}\n", lines.join("\n"));
    let value = json!({ "seed": seed, "hash": format!("{hash:016x}"), "lines": lines });
    output.one("SimulationTrace", &value, &text, "trace")?;
    match violation {
        None => Ok(Exit::Ok.into()),
        Some(violation) => Err(Failure::new(Exit::Failed, format!("seed {seed}: {violation}"))),
    }
}

/// How far it is, for a person who waits.
fn far(Played { seeds, violations }: Played, total: u64, since: Duration) -> String {
    let rate = seeds as f64 / since.as_secs_f64().max(0.001);
    let left = time_left(seeds, total, since).map_or_else(String::new, |left| format!(", {left} left"));
    format!("{seeds}/{total} seeds, {rate:.1} a second{left}, {violations} violations")
}

fn text(summary: &Summary, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64().max(0.001);
    let mut text = format!(
        "{} seeds in {seconds:.1} s, {:.0} a second; {:.1} simulated hours, {} starts, {} steps\n\n{:>12}  WHAT\n",
        summary.seeds,
        summary.seeds as f64 / seconds,
        hours(summary),
        summary.starts,
        summary.steps,
        "TIMES"
    );
    for (what, times) in summary.coverage.lines() {
        text.push_str(&format!("{times:>12}  {what}\n"));
    }
    let rare: Vec<String> = summary.coverage.rare(RARE).into_iter().map(|(what, _)| what).collect();
    if !rare.is_empty() {
        text.push_str(&format!("\nfewer than {RARE} times: {}\n", rare.join(", ")));
    }
    text
}

fn value(summary: &Summary, failure: Option<&Broken>, elapsed: Duration) -> Value {
    let counts: serde_json::Map<String, Value> =
        summary.coverage.lines().into_iter().map(|(what, times)| (what, json!(times))).collect();
    json!({
        "seeds": summary.seeds,
        "elapsed_ms": u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        "simulated_ms": summary.simulated.0,
        "starts": summary.starts,
        "steps": summary.steps,
        "counts": counts,
        "failure": failure.map(|failure| json!({
            "seed": failure.seed,
            "promise": failure.violation.promise,
            "detail": failure.violation.detail,
            "replay": replay_command(failure),
        })),
    })
}

fn hours(summary: &Summary) -> f64 {
    summary.simulated.0 as f64 / 3_600_000.0
}

fn sentence(failure: &Broken) -> String {
    let (lines, _, _) = trace(failure.seed, failure.setup, TAIL_LINES);
    format!(
        "seed {}: {}\nthe last of what happened:\n{}\nreplay: {}",
        failure.seed,
        failure.violation,
        lines.join("\n"),
        replay_command(failure)
    )
}

/// The command that plays the same again.
fn replay_command(failure: &Broken) -> String {
    let Setup { hosts, pool_max, jobs, span, coordinators, mix, faults, pause } = failure.setup;
    let mut command = format!(
        "muster simulate --trace {} --hosts {hosts} --pool-max {pool_max} --jobs {jobs} --span {}ms --faults {faults} \
         --fault-every {}ms --at-most-once {} --exclusive {} --long {} --limited {} --poison {} \
         --endless {}",
        failure.seed, span.0, pause.0, mix.at_most_once, mix.exclusive, mix.long, mix.limited, mix.poison, mix.endless
    );
    if let Some(coordinators) = coordinators {
        command.push_str(&format!(" --coordinators {coordinators}"));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser as _;
    use muster_sim::{Fault, Violation};

    #[test]
    fn progress_tells_how_many_how_fast_and_how_long_yet() {
        let far = |seeds, violations| far(Played { seeds, violations }, 100, Duration::from_secs(2));
        assert_eq!(far(0, 0), "0/100 seeds, 0.0 a second, 0 violations");
        assert_eq!(far(25, 1), "25/100 seeds, 12.5 a second, 6s left, 1 violations");
    }

    #[test]
    fn the_replay_command_means_the_same_world() {
        let setup = Setup {
            hosts: 3,
            coordinators: Some(2),
            faults: Setup::default().faults.without(Fault::Reboot),
            ..Setup::default()
        };
        let violation = Violation { promise: "FL-4", detail: String::new() };
        let command = replay_command(&Broken { seed: 77, setup, violation });
        let Ok(Cli { command: Command::Simulate(parsed), .. }) = Cli::try_parse_from(command.split(' ')) else {
            panic!("{command} is not understood")
        };
        assert_eq!(seed_of(&parsed).expect("a seed"), Some(77));
        assert_eq!(setup_of(&parsed).expect("a possible world"), setup);
        let Ok(Cli { command: Command::Simulate(plain), .. }) = Cli::try_parse_from(["muster", "simulate"]) else {
            panic!("the defaults are not understood")
        };
        assert_eq!(setup_of(&plain).expect("a possible world"), Setup::default());
    }
}
