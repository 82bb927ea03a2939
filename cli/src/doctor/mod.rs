//! `muster doctor`: what this host lacks for strict jobs, and what mends it.
//! It changes nothing: it reads files, asks the kernel, tries namespaces in
//! children of its own that end at once, and asks the coordinator for the time.
//!
//! Each part first looks (facts, from a root that tests replace) and then
//! judges them (rules without any I/O).

mod cgroups;
mod clock;
mod drift;
mod fences;
mod finding;
mod folders;
mod host;
mod identity;
mod kernel;
mod units;
mod users;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use self::{
    cgroups::Cgroups,
    clock::Clock,
    drift::Drift,
    finding::{Finding, State},
    folders::Folder,
    host::Host,
    identity::Identity,
    kernel::Kernel,
    units::Units,
    users::Users,
};
use crate::{
    args::Doctor,
    exit::{Exit, Failure, Result},
    output::{Format, List, Output},
};

/// Looks, judges and tells: exit 1 if something is missing. Only in a process with one thread.
pub fn run(output: &Output, args: &Doctor) -> Result<ExitCode> {
    let findings = examine(&Host::real(), args, output.now_ms)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot try fences: {error}")).caused_by(error))?;
    show(output, &findings)?;
    let count = |state| findings.iter().filter(|finding| finding.state == state).count();
    let (missing, warnings, unknown) = (count(State::Missing), count(State::Warn), count(State::Unknown));
    output.say(&format!("{missing} missing, {warnings} warnings, {unknown} unknown of {} checks", findings.len()));
    if fences::strict_is_kept_away(&findings) {
        output.say("jobs of profile strict are refused here, or a promise of the fleet does not hold");
        return Ok(Exit::Failed.into());
    }
    Ok(Exit::Ok.into())
}

fn examine(host: &Host, args: &Doctor, now_ms: u64) -> io::Result<Vec<Finding>> {
    let uid = nix::unistd::geteuid();
    let rootless = !uid.is_root();
    let units = Units::look(host);
    // An ordinary user asks about a spawner of its own, which has nothing to do with the unit.
    let of_unit =
        || if rootless { None } else { units.spawner_cgroup(muster_agent::sandbox::cgroup::mount_point().as_deref()) };
    let group = args.cgroup.clone().or_else(of_unit);
    let raised = fences::look(rootless, group.as_deref())?;
    let (kernel, cgroups) = (Kernel::look(host), Cgroups::look(host));
    let mut folders = vec![
        Folder::look(host, "folder.spawner", &args.spawner_state, false),
        Folder::look(host, "folder.agent", &args.agent_state, true),
    ];
    if host.has(&args.coordinator_data) {
        folders.push(Folder::look(host, "folder.coordinator", &args.coordinator_data, true));
    }
    let mut findings = fences::findings(&raised, &kernel, &cgroups, rootless);
    findings.extend(kernel.findings(rootless));
    findings.extend(cgroups.findings());
    findings.extend(Users::look(host, args, uid.as_raw()).findings());
    findings.extend(units.findings());
    findings.extend(Clock::look().findings());
    // After all that tries fences: it needs a runtime.
    findings.push(Drift::look(host, args).finding());
    findings.extend(folders.iter().map(Folder::finding));
    findings.extend(Identity::look(host, args, now_ms).findings());
    Ok(findings)
}

/// A table of all; below it, for people, how to mend each that is not well.
fn show(output: &Output, findings: &[Finding]) -> Result<()> {
    let mut list = List::new("FindingList", &["CHECK", "STATE", "AFFECTS", "SEEN", "+MEND"]);
    for finding in findings {
        let row = vec![
            (&finding.check).into(),
            output.state(finding.state.word()),
            (&finding.affects).into(),
            (&finding.seen).into(),
            (&finding.mend).into(),
        ];
        list.push(row, finding.value());
    }
    output.list(&list)?;
    if output.format != Format::Table || !output.columns.is_empty() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    for (mend, checks) in mends(findings) {
        writeln!(out, "\n{}:\n  {}", checks.join(", "), crate::escape::text(mend))?;
    }
    Ok(())
}

/// What mends, each once, with all that it mends, in the order of the findings.
fn mends(findings: &[Finding]) -> Vec<(&str, Vec<&str>)> {
    let mut mends: Vec<(&str, Vec<&str>)> = Vec::new();
    for finding in findings.iter().filter(|finding| !finding.mend.is_empty()) {
        match mends.iter_mut().find(|(mend, _)| *mend == finding.mend) {
            Some((_, checks)) => checks.push(&finding.check),
            None => mends.push((&finding.mend, vec![&finding.check])),
        }
    }
    mends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mends_several_things_is_said_once() {
        let findings = [
            Finding::missing("limits.cpu", "", "", "reboot"),
            Finding::ok("ns.pid", "", ""),
            Finding::warn("user.agent", "", "", "make it"),
            Finding::missing("cgroup.layout", "", "", "reboot"),
        ];
        assert_eq!(
            mends(&findings),
            [("reboot", vec!["limits.cpu", "cgroup.layout"]), ("make it", vec!["user.agent"])]
        );
    }
}
