//! The fences by name, and which profile asks which: the one list that the
//! wire's checks, the spawner, the command line and the tests read.
//!
//! A host reports the fences that it can raise; those that a job's profile asks
//! are a constraint on its placement, and a start without one of them is
//! refused (FL-13). What each does stands in docs/sandbox.md.

/// A network of its own: not asked by a job that asks for the host's.
pub const NETWORK: &str = "ns.net";
/// A timer on the node's lease: asked by every exclusive job.
pub const LEASE_TIMER: &str = "lease.timer";

/// Every fence that a host can have and a job can name or do without, in alphabetic order.
pub const ALL: [&str; 27] = [
    "caps.none",
    "descriptors",
    "dumpable",
    "keyring",
    "kill.cgroup",
    "kill.pidns",
    "landlock",
    LEASE_TIMER,
    "limits.cpu",
    "limits.disk",
    "limits.io",
    "limits.memory",
    "limits.pids",
    "no_new_privs",
    "ns.cgroup",
    "ns.ipc",
    "ns.mount",
    NETWORK,
    "ns.pid",
    "ns.user",
    "ns.uts",
    "proc.subset",
    "rlimits",
    "root.readonly",
    "seccomp",
    "session",
    "uid.own",
];

/// What the profile `strict` asks; [`NETWORK`] only of a job without the host's network.
pub const STRICT: [&str; 19] = [
    "ns.pid",
    "ns.mount",
    "ns.ipc",
    "ns.uts",
    NETWORK,
    "ns.cgroup",
    "ns.user",
    "root.readonly",
    "proc.subset",
    "no_new_privs",
    "caps.none",
    "seccomp",
    "rlimits",
    "uid.own",
    "limits.cpu",
    "limits.memory",
    "limits.pids",
    "limits.disk",
    "kill.cgroup",
];

/// What the profile `shared` asks.
pub const SHARED: [&str; 9] = [
    "ns.pid",
    "no_new_privs",
    "seccomp",
    "rlimits",
    "uid.own",
    "limits.cpu",
    "limits.memory",
    "limits.pids",
    "kill.cgroup",
];

/// Raised for `strict` and `shared` wherever a host has it, and not missed where it does not.
pub const WHERE_PRESENT: [&str; 2] = ["landlock", "limits.io"];

/// Does a word of `--without` stand for this fence? `limits` stands for every `limits.…`.
#[must_use]
pub fn covers(without: &str, fence: &str) -> bool {
    fence == without || fence.strip_prefix(without).is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_ask_only_what_has_a_name_and_a_weaker_one_asks_no_more() {
        assert!(ALL.is_sorted());
        assert!(STRICT.iter().chain(&SHARED).all(|fence| ALL.contains(fence)));
        assert!(SHARED.iter().all(|fence| STRICT.contains(fence)));
    }

    #[test]
    fn a_family_covers_its_members_and_no_other() {
        assert!(covers("limits", "limits.cpu") && covers("uid.own", "uid.own"));
        assert!(!covers("limit", "limits.cpu") && !covers("limits.cpu", "limits") && !covers("ns.p", "ns.pid"));
    }
}
