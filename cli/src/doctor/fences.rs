//! The fences, by the spawner's own probe, so that both never disagree: each
//! is really tried in throw-away children, or looked up in the cgroup that the
//! spawner has.

use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::Path};

use muster_agent::sandbox::{cgroup, fences::Fences};
use muster_core::fence;

use super::{
    cgroups::{Cgroups, UNIFIED},
    finding::{Finding, State},
    kernel::{Kernel, asked_state},
};

/// Probes. Only in a process with one thread. `unit`: the cgroup of the spawner's unit.
///
/// # Errors
/// There is no folder to try a root in.
pub fn look(rootless: bool, unit: Option<&Path>) -> std::io::Result<Fences> {
    // Where the spawner has a folder of its own state; empty, and removed at once.
    let folder = tempfile::Builder::new().prefix("muster-doctor-").tempdir()?;
    let root = CString::new(folder.path().as_os_str().as_bytes()).map_err(std::io::Error::other)?;
    Ok(Fences::probe(rootless, cgroup::Root::foreseen(unit).as_ref(), &root, Path::new("/")))
}

/// The rules: what was found of the kernel and of cgroups says what mends a missing fence.
pub fn findings(fences: &Fences, kernel: &Kernel, cgroups: &Cgroups, rootless: bool) -> Vec<Finding> {
    let affects = |name: &str| if fence::STRICT.contains(&name) { "profile strict" } else { "jobs that name it" };
    let mut findings: Vec<Finding> =
        fences.present.iter().map(|name| Finding::ok(name, affects(name), "this host can raise it")).collect();
    for (name, why) in &fences.missing {
        let mend = mend(name, kernel, cgroups, rootless);
        findings.push(Finding::bad(asked_state(name), name, affects(name), why, mend));
    }
    let heard: Vec<&str> = findings.iter().map(|finding| finding.check.as_str()).collect();
    let unheard: Vec<&str> = fence::STRICT.into_iter().filter(|name| !heard.contains(name)).collect();
    for name in unheard {
        let mend = "use a spawner and a muster of the same version";
        findings.push(Finding::missing(name, affects(name), "this version cannot raise it", mend));
    }
    findings.sort_by(|one, other| one.check.cmp(&other.check));
    findings
}

fn mend(name: &str, kernel: &Kernel, cgroups: &Cgroups, rootless: bool) -> String {
    let family = name.split('.').next().unwrap_or(name);
    let mend = match family {
        "uid" => "run the spawner as root: systemctl enable --now muster-spawner",
        "limits" | "kill" if rootless => {
            "run the spawner in a delegated group: systemd-run --user -p Delegate=yes ..., or as root from its unit"
        }
        "limits" if cgroups.is_hybrid() => UNIFIED,
        "limits" | "kill" => "run the spawner from its unit, with Delegate=yes (see unit.spawner.delegate)",
        "ns" | "root" => match kernel.user_namespaces_off(rootless) {
            Some((_, mend)) => mend,
            None => "in a container: run it privileged, or muster on the host itself",
        },
        "landlock" | "seccomp" => "see kernel.landlock and kernel.seccomp",
        _ => "see docs/sandbox.md",
    };
    mend.to_owned()
}

/// Something that `strict` asks is missing.
pub fn strict_is_kept_away(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.state == State::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::host::fixture;

    fn found(fences: &Fences, files: &[(&str, &str)], rootless: bool) -> Vec<Finding> {
        let (_folder, host) = fixture(files);
        findings(fences, &Kernel::look(&host), &Cgroups::look(&host), rootless)
    }

    fn all_but(missing: &[&'static str]) -> Fences {
        let present = fence::ALL.into_iter().filter(|name| !missing.contains(name)).collect();
        Fences::found(present, missing.iter().map(|name| (*name, "a test".to_owned())).collect())
    }

    #[test]
    fn a_fence_that_strict_asks_is_missing_and_another_is_a_warning() {
        let findings = found(&all_but(&["limits.cpu", "limits.io"]), &[], false);
        let state = |name: &str| findings.iter().find(|finding| finding.check == name).unwrap().state;
        assert_eq!(
            (state("limits.cpu"), state("limits.io"), state("ns.pid")),
            (State::Missing, State::Warn, State::Ok)
        );
        assert!(strict_is_kept_away(&findings));
        assert!(!strict_is_kept_away(&found(&all_but(&["limits.io"]), &[], false)));
    }

    #[test]
    fn a_fence_that_the_probe_does_not_know_is_not_taken_as_present() {
        let mut fences = all_but(&[]);
        fences.present.remove("root.readonly");
        let findings = found(&fences, &[], false);
        assert_eq!(findings.iter().find(|finding| finding.check == "root.readonly").unwrap().state, State::Missing);
    }

    #[test]
    fn what_mends_a_fence_depends_on_the_host() {
        let mend = |files: &[(&str, &str)], fence: &'static str, rootless| {
            let findings = found(&all_but(&[fence]), files, rootless);
            findings.into_iter().find(|finding| finding.check == fence).unwrap().mend
        };
        let hybrid = ("/proc/self/mountinfo", "35 31 0:32 / /c/memory rw - cgroup cgroup rw,memory\n");
        assert!(mend(&[hybrid], "limits.memory", false).contains("cgroup_no_v1=all"));
        assert!(mend(&[], "limits.memory", false).contains("Delegate=yes"));
        assert!(mend(&[], "limits.memory", true).contains("systemd-run --user"));
        let off = ("/proc/sys/user/max_user_namespaces", "0");
        assert!(mend(&[off], "ns.net", true).contains("user.max_user_namespaces"));
        assert!(mend(&[], "ns.net", false).contains("privileged"));
    }
}
