//! The test of the suite itself: with each fence claimed and not raised, at
//! least one case must notice.

use std::collections::BTreeSet;

use crate::{
    case::{Body, Case},
    fleet::FleetStage,
    report::Status,
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
const COVERED: [(&str, &str); 3] = [
    ("kill.cgroup", "ns.pid: the kernel ends all of a PID namespace with its pid 1"),
    ("keyring", "seccomp: no call of the key management reaches the kernel"),
    ("dumpable", "uid.own: a job has not the uid of its init, and so no right to what /proc shows of it"),
];

/// Runs every case against each broken fence; true if all were caught or are covered.
pub fn try_all(tools: &Tools, cases: &[&Case], only: Option<&str>) -> Result<bool, String> {
    let sound = failures(tools, cases, None)?;
    println!(
        "with all fences, these fail already: {}",
        if sound.is_empty() { "none".to_owned() } else { list(&sound) }
    );
    let mut all = true;
    for fence in FENCES.into_iter().filter(|fence| only.is_none_or(|only| only == *fence)) {
        let caught: BTreeSet<&str> = match failures(tools, cases, Some(fence)) {
            Ok(failed) => failed.difference(&sound).copied().collect(),
            Err(why) => {
                println!("{fence}: FAIL, no job could be run: {why}");
                all = false;
                continue;
            }
        };
        let covered = COVERED.iter().find(|(name, _)| *name == fence);
        match (caught.is_empty(), covered) {
            (false, _) => println!("{fence}: caught by {}", list(&caught)),
            (true, Some((_, by))) => println!("{fence}: covered by {by}"),
            (true, None) => {
                println!("{fence}: FAIL, caught by none (was muster built with --features break-fences?)");
                all = false;
            }
        }
    }
    Ok(all)
}

fn list(cases: &BTreeSet<&str>) -> String {
    cases.iter().copied().collect::<Vec<_>>().join(" ")
}

fn failures<'a>(tools: &Tools, cases: &[&'a Case], broken: Option<&str>) -> Result<BTreeSet<&'a str>, String> {
    let mut stage = Stage::start(tools, broken)?;
    let mut fleet = FleetStage::new(tools);
    let mut failed = BTreeSet::new();
    for case in cases.iter().filter(|case| !matches!(case.body, Body::Fleet(_))) {
        if stage.run(case, &mut fleet).status == Status::Failed {
            failed.insert(case.id);
        }
        if !stage.spawner.part.is_running() {
            stage = Stage::start(tools, broken)?;
        }
    }
    Ok(failed)
}
