//! The hostile suite: every way in which a job may attack its host, run against
//! a spawner of its own (and a fleet of its own where the agent takes part).
//!
//! Prints a table and exits with 0 only if no case failed. A case that cannot
//! run here says why; `--destructive` is for a host that may be thrown away.

mod case;
mod differences;
mod fences;
mod fleet;
mod inputs;
mod invariants;
mod life;
mod outside;
mod privilege;
mod report;
mod resources;
mod seeing;
mod spawner;
mod stage;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use case::Case;
use clap::Parser;
use muster_tests::{host, part::muster_binary};
use report::Status;
use stage::{Stage, Tools};

/// Runs hostile jobs and judges what came of them.
#[derive(Debug, Parser)]
#[command(name = "muster-hostile", version)]
struct Options {
    /// Only these cases.
    #[arg(long, value_name = "P26")]
    only: Vec<String>,
    /// Prints the cases and runs none.
    #[arg(long)]
    list: bool,
    /// Prints what an ordinary user's jobs can do that root's cannot, as docs/sandbox.md has it, and runs none.
    #[arg(long)]
    differences: bool,
    /// Also the cases and controls that exhaust or end what they reach: only on a host that may be thrown away.
    #[arg(long)]
    destructive: bool,
    /// Break each fence in turn, or only this one, and see which case notices.
    #[arg(long, value_name = "FENCE", num_args = 0..=1, default_missing_value = "all")]
    r#break: Option<String>,
    /// Writes the table as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The static probe; default: MUSTER_PROBE, else the one of the build folder, else the one beside this program.
    #[arg(long, env = "MUSTER_PROBE")]
    probe: Option<PathBuf>,
}

fn cases() -> Vec<&'static Case> {
    let families: [&[Case]; 5] = [&resources::CASES, &seeing::CASES, &privilege::CASES, &life::CASES, &inputs::CASES];
    let mut cases: Vec<&Case> = families.into_iter().flatten().collect();
    cases.sort_by_key(|case| case.id);
    cases
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("muster-hostile: {why}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool, String> {
    let chosen: Vec<&'static Case> = cases()
        .into_iter()
        .filter(|case| options.only.is_empty() || options.only.iter().any(|id| id.eq_ignore_ascii_case(case.id)))
        .collect();
    if let Some(unknown) = options.only.iter().find(|id| !chosen.iter().any(|case| id.eq_ignore_ascii_case(case.id))) {
        return Err(format!("there is no case {unknown}; `muster-hostile --list` names them"));
    }
    if options.list {
        for case in chosen {
            println!("{} {}{}", case.id, case.title, if case.destructive { " (destructive)" } else { "" });
        }
        return Ok(true);
    }
    if options.differences {
        differences::print_table(&chosen);
        return Ok(true);
    }
    let tools = tools(options)?;
    match options.r#break.as_deref() {
        Some(fence) => fences::try_all(&tools, &chosen, Some(fence).filter(|fence| *fence != "all")),
        None => run_cases(&tools, &chosen, options.json.as_deref()),
    }
}

fn run_cases(tools: &Tools, chosen: &[&Case], json: Option<&Path>) -> Result<bool, String> {
    let mut stage = Stage::start(tools, None)?;
    let mut fleet = fleet::FleetStage::new(tools);
    println!("this host lacks: {}", stage.spawner.missing.join(" "));
    report::print_head();
    let mut reports = Vec::new();
    for case in chosen {
        let report = stage.run(case, &mut fleet);
        report.print();
        reports.push(report);
        if !stage.spawner.part.is_running() {
            stage = Stage::start(tools, None)?;
        }
    }
    let count = |wanted: fn(&Status) -> bool| reports.iter().filter(|report| wanted(&report.status)).count();
    let failed = count(|status| *status == Status::Failed);
    println!("slowest canary: {} ms", stage.canary_slowest.as_millis());
    println!(
        "{} passed, {} differ as documented, {failed} failed, {} skipped",
        count(|status| *status == Status::Passed),
        count(|status| matches!(status, Status::Differs(_))),
        count(|status| matches!(status, Status::Skipped(_)))
    );
    if let Some(path) = json {
        fs::write(path, report::json_of(&reports).to_string())
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(failed == 0)
}

fn tools(options: &Options) -> Result<Tools, String> {
    let muster = muster_binary();
    let probe = options.probe.clone().or_else(probe_of_the_build).ok_or_else(|| {
        "no probe: build it by `cargo rustc --profile probe -p muster-probe -- -C target-feature=+crt-static`, or name it by --probe".to_owned()
    })?;
    let probe = fs::canonicalize(&probe).map_err(|error| format!("the probe {}: {error}", probe.display()))?;
    let setuid = if options.destructive { install_setuid(&probe)? } else { None };
    Ok(Tools { muster, probe, setuid, cgroup: leave_own_group()?, destructive: options.destructive })
}

/// Beside the folder of this program (`target/debug`), or in that folder.
fn probe_of_the_build() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let folder = own.parent()?;
    let candidates = [folder.parent()?.join("probe/muster-probe"), folder.join("muster-probe")];
    candidates.into_iter().find(|path| path.is_file())
}

/// Where a job's root shows it. Only on a host that may be thrown away; an ordinary user has what root has left there.
fn install_setuid(probe: &Path) -> Result<Option<PathBuf>, String> {
    let path = PathBuf::from("/usr/bin/muster-hostile-set-uid");
    if !host::is_root() {
        return Ok(Some(path).filter(|path| path.is_file()));
    }
    let told = |error: std::io::Error| format!("{}: {error}", path.display());
    fs::copy(probe, &path).map_err(told)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4_755)).map_err(told)?;
    Ok(Some(path))
}

/// In a systemd unit with a delegated cgroup, the spawner shall have that group, and processes live in leaves only.
fn leave_own_group() -> Result<Option<PathBuf>, String> {
    let (Some(_), Some(mount)) = (std::env::var_os("INVOCATION_ID"), host::cgroup2()) else { return Ok(None) };
    if !host::is_root() {
        return Ok(None);
    }
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return Ok(None) };
    let own = mount.join(own);
    if own.extension().is_none_or(|kind| kind != "service") {
        return Ok(None);
    }
    let leaf = own.join("suite");
    let told = |error: std::io::Error| format!("{}: {error}", leaf.display());
    fs::create_dir_all(&leaf).map_err(told)?;
    fs::write(leaf.join("cgroup.procs"), "0").map_err(told)?;
    Ok(Some(own))
}
