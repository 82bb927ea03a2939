//! cgroup v2: where it is mounted, which controllers a spawner would get, and
//! what a host that keeps them in v1 loses.

use std::path::{Path, PathBuf};

use super::{finding::Finding, host::Host};

/// Controllers without which a fence of `strict` is missing.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// Brings a hybrid host to cgroup v2 alone (kernel-command-line(7), the kernel's cgroup-v2.rst).
pub const UNIFIED: &str = "add to the kernel's command line and reboot: \
    systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all";

/// What was seen of the host's cgroups.
#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    /// Where cgroup2 is mounted.
    mount: Option<PathBuf>,
    /// Controllers that a v1 hierarchy holds.
    in_v1: Vec<String>,
    /// Controllers that v2 has at its top.
    available: Vec<String>,
    /// Whether groups below the top have cgroup.kill; none: there is no group to see it in.
    kill: Option<bool>,
    /// Whether groups below the top have memory.swap.max; none: no group has the memory controller.
    swap_limit: Option<bool>,
    swap_in_use: bool,
}

impl Cgroups {
    /// Looks.
    pub fn look(host: &Host) -> Self {
        let mounts = host.text("/proc/self/mountinfo").unwrap_or_default();
        let mount = mounts.lines().filter_map(mounted).find(|(_, kind, _)| *kind == "cgroup2").map(|(path, ..)| path);
        let in_v1 = mounts.lines().filter_map(mounted).filter(|(_, kind, _)| *kind == "cgroup");
        let in_v1: Vec<String> = in_v1
            .flat_map(|(_, _, options)| options.split(','))
            .filter(|option| ["cpu", "memory", "pids", "blkio"].contains(option))
            .map(str::to_owned)
            .collect();
        let words = |file: PathBuf| -> Vec<String> {
            host.text(file).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let groups = mount.as_ref().map(|mount| groups_below(host, mount)).unwrap_or_default();
        let swaps = host.text("/proc/swaps").unwrap_or_default();
        Self {
            available: mount.as_ref().map(|mount| words(mount.join("cgroup.controllers"))).unwrap_or_default(),
            kill: groups.first().map(|group| group.join("cgroup.kill").exists()),
            swap_limit: groups
                .iter()
                .find(|group| group.join("memory.max").exists())
                .map(|group| group.join("memory.swap.max").exists()),
            // One line of names, then a line for each.
            swap_in_use: swaps.lines().count() > 1,
            mount,
            in_v1,
        }
    }

    /// v1 holds a controller that a fence needs.
    pub fn is_hybrid(&self) -> bool {
        self.in_v1.iter().any(|name| NEEDED.contains(&name.as_str()))
    }

    /// The rules.
    pub fn findings(&self) -> Vec<Finding> {
        vec![self.layout(), self.controllers(), self.killing(), self.swap()]
    }

    fn layout(&self) -> Finding {
        let (check, affects) = ("cgroup.layout", "limits.*, kill.cgroup");
        match &self.mount {
            None if self.in_v1.is_empty() => {
                Finding::missing(check, affects, "no cgroup2 is mounted", "mount -t cgroup2 none /sys/fs/cgroup")
            }
            None => Finding::missing(check, affects, "cgroup v1 only", UNIFIED),
            Some(mount) if self.is_hybrid() => Finding::missing(
                check,
                "limits.*",
                format!(
                    "hybrid: cgroup2 at {}, but v1 holds {}; cgroup.kill works, limits do not",
                    mount.display(),
                    self.in_v1.join(", ")
                ),
                UNIFIED,
            ),
            Some(mount) => Finding::ok(check, affects, format!("cgroup2 alone, at {}", mount.display())),
        }
    }

    fn controllers(&self) -> Finding {
        let (check, affects) = ("cgroup.controllers", "limits.cpu, limits.memory, limits.pids");
        let lacking: Vec<&str> =
            NEEDED.into_iter().filter(|need| !self.available.iter().any(|name| name == need)).collect();
        if lacking.is_empty() {
            return Finding::ok(check, affects, self.available.join(" "));
        }
        let mend = if self.is_hybrid() {
            UNIFIED
        } else {
            "take cgroup_disable= off the kernel's command line; in a container: give it the controllers"
        };
        Finding::missing(check, affects, format!("cgroup v2 has no {}", lacking.join(", ")), mend)
    }

    fn killing(&self) -> Finding {
        let (check, affects) = ("cgroup.kill", "kill.cgroup");
        match self.kill {
            Some(true) => Finding::ok(check, affects, "groups have it"),
            Some(false) => Finding::missing(check, affects, "groups lack it", "run Linux 5.14 or newer"),
            None => Finding::unknown(check, affects, "there is no group to see it in", "run the spawner once"),
        }
    }

    fn swap(&self) -> Finding {
        let (check, affects) = ("cgroup.swap", "limits.memory");
        match (self.swap_in_use, self.swap_limit) {
            (false, _) => Finding::ok(check, affects, "no swap"),
            (true, Some(true)) => Finding::ok(check, affects, "swap is limited by memory.swap.max"),
            (true, Some(false)) => Finding::warn(
                check,
                affects,
                "without memory.swap.max a job takes swap beyond its memory limit",
                "add swapaccount=1 to the kernel's command line, or swapoff -a",
            ),
            (true, None) => Finding::unknown(
                check,
                affects,
                "swap is in use, and no group has the memory controller to see its limit in",
                "swapoff -a, if limits.memory is wanted",
            ),
        }
    }
}

/// Mount point, type and the file system's own options of a line of mountinfo (proc_pid_mountinfo(5)).
fn mounted(line: &str) -> Option<(PathBuf, &str, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let path = PathBuf::from(before.split(' ').nth(4)?);
    let mut after = after.split(' ');
    let kind = after.next()?;
    Some((path, kind, after.nth(1).unwrap_or_default()))
}

/// Two levels are enough to find one that systemd has made.
fn groups_below(host: &Host, mount: &Path) -> Vec<PathBuf> {
    let below = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
    };
    let first = below(&host.path(mount));
    let second: Vec<PathBuf> = first.iter().flat_map(|group| below(group)).collect();
    first.into_iter().chain(second).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{finding::State, host::fixture};

    const UNIFIED_MOUNTS: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID_MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    fn states(files: &[(&str, &str)]) -> Vec<(String, State)> {
        let (_folder, host) = fixture(files);
        Cgroups::look(&host).findings().into_iter().map(|finding| (finding.check, finding.state)).collect()
    }

    fn expected(states: [State; 4]) -> Vec<(String, State)> {
        ["cgroup.layout", "cgroup.controllers", "cgroup.kill", "cgroup.swap"]
            .map(str::to_owned)
            .into_iter()
            .zip(states)
            .collect()
    }

    #[test]
    fn a_host_with_cgroup_v2_alone_is_well() {
        let files = [
            ("/proc/self/mountinfo", UNIFIED_MOUNTS),
            ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
            ("/sys/fs/cgroup/system.slice/cgroup.kill", ""),
            ("/sys/fs/cgroup/system.slice/memory.max", "max\n"),
            ("/sys/fs/cgroup/system.slice/memory.swap.max", "max\n"),
            ("/proc/swaps", "Filename Type Size\n/dev/vda2 partition 1000\n"),
        ];
        assert_eq!(states(&files), expected([State::Ok; 4]));
    }

    #[test]
    fn a_hybrid_host_loses_its_limits_and_keeps_the_kill() {
        let (_folder, host) = fixture(&[
            ("/proc/self/mountinfo", HYBRID_MOUNTS),
            ("/sys/fs/cgroup/unified/cgroup.controllers", "\n"),
            ("/sys/fs/cgroup/unified/init.scope/cgroup.kill", ""),
        ]);
        let cgroups = Cgroups::look(&host);
        assert!(cgroups.is_hybrid());
        let found = cgroups.findings();
        let states: Vec<State> = found.iter().map(|finding| finding.state).collect();
        assert_eq!(states, [State::Missing, State::Missing, State::Ok, State::Ok]);
        assert!(found[0].seen.contains("cpu, memory, pids") && found[0].affects == "limits.*", "{found:?}");
        for finding in &found[..2] {
            assert!(finding.mend.contains("systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"), "{finding:?}");
        }
    }

    #[test]
    fn swap_that_no_group_can_limit_is_told() {
        let mut files = vec![
            ("/proc/self/mountinfo", UNIFIED_MOUNTS),
            ("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n"),
            ("/sys/fs/cgroup/system.slice/cgroup.kill", ""),
            ("/sys/fs/cgroup/system.slice/memory.max", "max\n"),
            ("/proc/swaps", "Filename Type Size\n/dev/vda2 partition 1000\n"),
        ];
        assert_eq!(states(&files)[3].1, State::Warn);
        files.pop();
        assert_eq!(states(&files)[3].1, State::Ok);
    }

    #[test]
    fn no_cgroup_v2_at_all_is_told_with_the_way_to_it() {
        assert_eq!(states(&[]), expected([State::Missing, State::Missing, State::Unknown, State::Ok]));
        let (_folder, host) =
            fixture(&[("/proc/self/mountinfo", "35 31 0:32 / /c/memory rw - cgroup cgroup rw,memory\n")]);
        assert!(Cgroups::look(&host).findings()[0].mend.contains("cgroup_no_v1=all"));
    }
}
