//! The test of the suite itself: with each fence claimed and not raised, at
//! least one case must notice.

use std::collections::BTreeSet;

use crate::{
    case::{Body, Case},
    fleet::FleetStage,
    stage::{Stage, Tools},
};

/// All fences of profile strict that a spawner built with `break-fences` can leave out.
const FENCES: [&str; 25] = [
    "ns.pid",
    "ns.mount",
    "ns.ipc",
    "ns.uts",
    "ns.net",
    "ns.cgroup",
    "ns.user",
    "root.readonly",
    "uid.own",
    "caps.none",
    "no_new_privs",
    "seccomp",
    "landlock",
    "limits.cpu",
    "limits.memory",
    "limits.pids",
    "limits.io",
    "limits.disk",
    "kill.cgroup",
    "rlimits",
    "descriptors",
    "session",
    "keyring",
    "dumpable",
    "proc.subset",
];

/// Fences whose absence alone a job cannot see, with what stands behind them.
const COVERED: [(&str, &str); 4] = [
    ("kill.cgroup", "ns.pid: the kernel ends all of a PID namespace with its pid 1"),
    ("limits.pids", "rlimits: its uid is its own and may have as many processes (RLIMIT_NPROC)"),
    ("keyring", "seccomp: no call of the key management reaches the kernel"),
    ("dumpable", "uid.own: a job has not the uid of its init, and so no right to what /proc shows of it"),
];

/// What went wrong: the case, and the try or invariant that it is about.
type Failure = (&'static str, String);

/// Runs every case against each broken fence; true if all were caught or are covered.
pub fn try_all(tools: &Tools, cases: &[&'static Case], only: Option<&str>) -> Result<bool, String> {
    let (sound, missing) = failures(tools, cases, None)?;
    println!("with all fences, these fail already: {}", list(&sound));
    let mut all = true;
    for fence in FENCES.into_iter().filter(|fence| only.is_none_or(|only| only == *fence)) {
        let (holds, sentence) = if missing.iter().any(|name| name == fence) {
            (true, "not tried: this host lacks it".to_owned())
        } else {
            judge(fence, failures(tools, cases, Some(fence)).map(|(found, _)| &found - &sound))
        };
        println!("{fence}: {sentence}");
        all &= holds;
    }
    Ok(all)
}

fn judge(fence: &str, caught: Result<BTreeSet<Failure>, String>) -> (bool, String) {
    let covered = COVERED.iter().find(|(name, _)| *name == fence);
    match (caught, covered) {
        (Err(why), _) => (true, format!("no job starts without it: {why}")),
        (Ok(caught), _) if !caught.is_empty() => (true, format!("caught by {}", list(&caught))),
        (Ok(_), Some((_, by))) => (true, format!("covered by {by}")),
        (Ok(_), None) => (false, "FAIL, caught by none (was muster built with --features break-fences?)".to_owned()),
    }
}

fn list(failures: &BTreeSet<Failure>) -> String {
    let cases: BTreeSet<&str> = failures.iter().map(|(case, _)| *case).collect();
    if cases.is_empty() { "none".to_owned() } else { cases.into_iter().collect::<Vec<_>>().join(" ") }
}

/// What fails, and what this host lacks.
fn failures(
    tools: &Tools,
    cases: &[&'static Case],
    broken: Option<&str>,
) -> Result<(BTreeSet<Failure>, Vec<String>), String> {
    let mut stage = Stage::start(tools, broken)?;
    let mut fleet = FleetStage::new(tools);
    let mut failed = BTreeSet::new();
    for case in cases.iter().filter(|case| !matches!(case.body, Body::Fleet(_))) {
        let report = stage.run(case, &mut fleet);
        let about = |problem: String| problem.split([' ', ':']).next().unwrap_or_default().to_owned();
        failed.extend(report.problems.into_iter().map(|problem| (case.id, about(problem))));
        if !stage.spawner.part.is_running() {
            stage = Stage::start(tools, broken)?;
        }
    }
    Ok((failed, std::mem::take(&mut stage.spawner.missing)))
}
