//! The kernel: its version, the system calls that the sandbox is made of, its
//! security modules, and the settings that weaken a fence from outside.

use muster_core::fence;
use nix::errno::Errno;

use super::{
    finding::{Finding, State},
    host::Host,
};

/// cgroup.kill came with it.
const OLDEST: (u64, u64) = (5, 14);

/// What was seen of the kernel.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    release: Option<String>,
    calls: Vec<(&'static str, bool)>,
    /// None: no system call was tried.
    landlock_abi: Option<u64>,
    security_modules: Option<String>,
    seccomp_actions: Option<String>,
    user_namespaces_max: Option<u64>,
    /// Debian's switch.
    user_namespaces_unprivileged: Option<u64>,
    /// Ubuntu's switch.
    user_namespaces_apparmor: Option<u64>,
    ptrace_scope: Option<u64>,
    core_pattern: Option<String>,
    suid_dumpable: Option<u64>,
    legacy_tiocsti: Option<u64>,
}

impl Kernel {
    /// Looks; makes nothing but an empty memfd of its own.
    pub fn look(host: &Host) -> Self {
        let setting = |name: &str| host.number(format!("/proc/sys/{name}"));
        Self {
            release: host.line("/proc/sys/kernel/osrelease"),
            calls: if host.is_real() { calls() } else { Vec::new() },
            landlock_abi: host.is_real().then(landlock_abi),
            security_modules: host.line("/sys/kernel/security/lsm"),
            seccomp_actions: host.line("/proc/sys/kernel/seccomp/actions_avail"),
            user_namespaces_max: setting("user/max_user_namespaces"),
            user_namespaces_unprivileged: setting("kernel/unprivileged_userns_clone"),
            user_namespaces_apparmor: setting("kernel/apparmor_restrict_unprivileged_userns"),
            ptrace_scope: setting("kernel/yama/ptrace_scope"),
            core_pattern: host.line("/proc/sys/kernel/core_pattern"),
            suid_dumpable: setting("fs/suid_dumpable"),
            legacy_tiocsti: setting("dev/tty/legacy_tiocsti"),
        }
    }

    /// The rules. `rootless`: the spawner is an ordinary user's.
    pub fn findings(&self, rootless: bool) -> Vec<Finding> {
        let mut findings = vec![self.version()];
        findings.extend(self.calls.iter().map(|(name, there)| system_call(name, *there)));
        findings.extend([
            self.user_namespaces(rootless),
            self.landlock(),
            self.seccomp(),
            self.ptrace(rootless),
            self.core_dumps(),
            self.suid_dumps(),
            self.typing_into_terminals(),
        ]);
        findings
    }

    fn version(&self) -> Finding {
        let (check, affects) = ("kernel.version", "kill.cgroup, ns.*");
        let Some(release) = &self.release else {
            return Finding::unknown(check, affects, "/proc is not readable", "mount /proc");
        };
        let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => Finding::ok(check, affects, release),
            (Some(Ok(_)), Some(Ok(_))) => {
                Finding::missing(check, affects, release, "run Linux 5.14 or newer: cgroup.kill came with it")
            }
            _no_version => Finding::unknown(check, affects, release, "Linux 5.14 or newer is needed"),
        }
    }

    /// What keeps user namespaces from being made, if a setting does.
    pub fn user_namespaces_off(&self, rootless: bool) -> Option<(String, &'static str)> {
        if self.user_namespaces_max == Some(0) {
            let seen = "user.max_user_namespaces is 0".to_owned();
            return Some((seen, "sysctl -w user.max_user_namespaces=15000, and the same line in /etc/sysctl.d/"));
        }
        if rootless && self.user_namespaces_unprivileged == Some(0) {
            let seen = "kernel.unprivileged_userns_clone is 0".to_owned();
            return Some((seen, "sysctl -w kernel.unprivileged_userns_clone=1, and the same line in /etc/sysctl.d/"));
        }
        if rootless && self.user_namespaces_apparmor == Some(1) {
            let seen = "AppArmor takes the rights in a new user namespace away".to_owned();
            let mend = "give muster an AppArmor profile with `userns,`, or \
                sysctl -w kernel.apparmor_restrict_unprivileged_userns=0";
            return Some((seen, mend));
        }
        None
    }

    fn user_namespaces(&self, rootless: bool) -> Finding {
        let check = "kernel.user_namespaces";
        let (affects, state) =
            if rootless { ("ns.*, root.readonly", State::Missing) } else { ("ns.user", State::Warn) };
        match self.user_namespaces_off(rootless) {
            Some((seen, mend)) => Finding::bad(state, check, affects, seen, mend),
            None => Finding::ok(check, affects, "no setting forbids them"),
        }
    }

    fn landlock(&self) -> Finding {
        let (check, affects) = ("kernel.landlock", "landlock");
        let listed = self.security_modules.as_ref().map(|list| list.split(',').any(|module| module == "landlock"));
        let mend = "a kernel with CONFIG_SECURITY_LANDLOCK, and `landlock` in its lsm= parameter (if there is one)";
        let state = asked_state(affects);
        match (self.landlock_abi, listed) {
            (Some(abi @ 1..), _) => Finding::ok(check, affects, format!("ABI {abi}")),
            (Some(_), Some(false)) => {
                let lsm = self.security_modules.as_deref().unwrap_or_default();
                let mend = format!("add to the kernel's command line: lsm=landlock,{lsm}");
                Finding::bad(state, check, affects, "the kernel is booted without it", mend)
            }
            (Some(_), _) => Finding::bad(state, check, affects, "the kernel has none", mend),
            (None, Some(true)) => Finding::ok(check, affects, "listed among the security modules"),
            (None, Some(false)) => Finding::bad(state, check, affects, "not among the security modules", mend),
            (None, None) => Finding::unknown(check, affects, "securityfs is not mounted", mend),
        }
    }

    fn seccomp(&self) -> Finding {
        let (check, affects) = ("kernel.seccomp", "seccomp");
        let needed = ["errno", "kill_process", "allow"];
        match &self.seccomp_actions {
            Some(actions) if needed.iter().all(|need| actions.split(' ').any(|action| action == *need)) => {
                Finding::ok(check, affects, "filters with errno and kill_process")
            }
            Some(actions) => Finding::bad(
                asked_state(affects),
                check,
                affects,
                format!("only the actions {actions}"),
                "run Linux 5.14 or newer",
            ),
            None => Finding::bad(
                asked_state(affects),
                check,
                affects,
                "the kernel has no seccomp filters",
                "a kernel with CONFIG_SECCOMP_FILTER",
            ),
        }
    }

    fn ptrace(&self, rootless: bool) -> Finding {
        let (check, affects) = ("kernel.ptrace_scope", "uid.own");
        match (rootless, self.ptrace_scope) {
            (false, _) => Finding::ok(check, affects, "each job has a uid of its own"),
            (true, Some(1..)) => Finding::ok(check, affects, "only a parent may trace its child"),
            (true, Some(0) | None) => Finding::warn(
                check,
                affects,
                "processes of one user may trace each other, and jobs have your uid",
                "sysctl -w kernel.yama.ptrace_scope=1",
            ),
        }
    }

    /// A handler behind a pipe or a socket gets the dump whatever RLIMIT_CORE says (core(5)).
    fn core_dumps(&self) -> Finding {
        let (check, affects) = ("kernel.core_pattern", "core files of jobs");
        match self.core_pattern.as_deref() {
            Some(pattern) if pattern.starts_with(['|', '@']) => Finding::warn(
                check,
                affects,
                format!("a handler gets the memory of crashed jobs, as root and outside of their limits: {pattern}"),
                "sysctl -w kernel.core_pattern=core, and the same line in /etc/sysctl.d/ (or remove the handler's \
                package: systemd-coredump, apport)",
            ),
            Some(pattern) => Finding::ok(check, affects, format!("a file ({pattern}), which a job's limits forbid")),
            None => Finding::unknown(check, affects, "kernel.core_pattern is not readable", "mount /proc"),
        }
    }

    fn suid_dumps(&self) -> Finding {
        let (check, affects) = ("kernel.suid_dumpable", "uid.own");
        match self.suid_dumpable {
            Some(1) => Finding::warn(
                check,
                affects,
                "processes that changed their uid are dumped and traced like others (1, for debugging only)",
                "sysctl -w fs.suid_dumpable=0",
            ),
            Some(value) => Finding::ok(check, affects, value.to_string()),
            None => Finding::unknown(check, affects, "fs.suid_dumpable is not readable", "mount /proc"),
        }
    }

    fn typing_into_terminals(&self) -> Finding {
        let (check, affects) = ("kernel.legacy_tiocsti", "terminals");
        match self.legacy_tiocsti {
            Some(0) => Finding::ok(check, affects, "nobody types into another's terminal"),
            Some(_) => Finding::warn(
                check,
                affects,
                "a process may type into its terminal (jobs have none, other services may)",
                "sysctl -w dev.tty.legacy_tiocsti=0",
            ),
            None => Finding::ok(check, affects, "this kernel has no such switch; jobs have no terminal"),
        }
    }
}

/// Whether the lack of a fence keeps a strict job away.
pub fn asked_state(name: &str) -> State {
    if fence::STRICT.contains(&name) { State::Missing } else { State::Warn }
}

fn system_call(name: &str, there: bool) -> Finding {
    let check = format!("kernel.{name}");
    if there {
        Finding::ok(&check, "every start of a job", "the kernel has it")
    } else {
        let mend = "run Linux 5.14 or newer; in a container: a seccomp profile that allows it";
        Finding::missing(&check, "every start of a job", "the kernel or this container refuses it", mend)
    }
}

/// Asked for the impossible, so that nothing happens: a kernel that has the call says what is wrong with it.
fn calls() -> Vec<(&'static str, bool)> {
    let there = |number: libc::c_long, first: libc::c_long| {
        let none: libc::c_long = 0;
        // SAFETY: each call below refuses these arguments before it reads any memory, of which there is none.
        let answer = unsafe { libc::syscall(number, first, none, none, none, none) };
        answer >= 0 || !matches!(Errno::last(), Errno::ENOSYS | Errno::EPERM)
    };
    vec![
        ("clone3", there(libc::SYS_clone3, 0)),
        ("openat2", there(libc::SYS_openat2, -1)),
        // An empty range: its first is above its last.
        ("close_range", there(libc::SYS_close_range, 1)),
        ("mount_setattr", there(libc::SYS_mount_setattr, -1)),
        ("pidfd_send_signal", there(libc::SYS_pidfd_send_signal, -1)),
        ("memfd_sealing", seals()),
    ]
}

fn seals() -> bool {
    use nix::{
        fcntl::{FcntlArg, SealFlag, fcntl},
        sys::memfd::{MFdFlags, memfd_create},
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    memfd_create(c"muster-doctor", flags)
        .and_then(|memory| fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK)))
        .is_ok()
}

/// 0: none.
fn landlock_abi() -> u64 {
    const CREATE_RULESET_VERSION: libc::c_long = 1;
    let none: libc::c_long = 0;
    // SAFETY: with this flag the call takes no memory, and makes nothing (landlock_create_ruleset(2)).
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, none, CREATE_RULESET_VERSION) };
    u64::try_from(answer).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::host::fixture;

    fn one(files: &[(&str, &str)], rootless: bool, check: &str) -> Finding {
        let (_folder, host) = fixture(files);
        let found = Kernel::look(&host).findings(rootless);
        found.into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_kernel_without_cgroup_kill_is_too_old() {
        let state = |release| one(&[("/proc/sys/kernel/osrelease", release)], false, "kernel.version").state;
        assert_eq!(state("5.13.19-generic"), State::Missing);
        assert_eq!(state("5.14.0-362.el9"), State::Ok);
        assert_eq!(state("6.1.0-18-amd64"), State::Ok);
        assert_eq!(state("linux"), State::Unknown);
    }

    #[test]
    fn user_namespaces_that_are_off_keep_an_ordinary_user_away_and_not_root() {
        let off = [("/proc/sys/kernel/unprivileged_userns_clone", "0\n")];
        let finding = one(&off, true, "kernel.user_namespaces");
        assert_eq!(finding.state, State::Missing);
        assert!(finding.mend.contains("kernel.unprivileged_userns_clone=1"), "{finding:?}");
        assert_eq!(one(&off, false, "kernel.user_namespaces").state, State::Ok);
        let apparmor = [("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")];
        assert_eq!(one(&apparmor, true, "kernel.user_namespaces").state, State::Missing);
        assert_eq!(one(&apparmor, false, "kernel.user_namespaces").state, State::Ok);
        let none = [("/proc/sys/user/max_user_namespaces", "0\n")];
        assert_eq!(one(&none, true, "kernel.user_namespaces").state, State::Missing);
        assert_eq!(one(&none, false, "kernel.user_namespaces").state, State::Warn);
    }

    #[test]
    fn a_kernel_booted_without_landlock_gets_its_own_list_back_with_it() {
        let kernel = Kernel {
            landlock_abi: Some(0),
            security_modules: Some("lockdown,yama,apparmor".into()),
            ..Kernel::default()
        };
        let finding = kernel.landlock();
        assert_eq!(finding.state, asked_state("landlock"));
        assert!(finding.mend.ends_with("lsm=landlock,lockdown,yama,apparmor"), "{finding:?}");
        assert_eq!(Kernel { landlock_abi: Some(4), ..kernel }.landlock().state, State::Ok);
    }

    #[test]
    fn a_core_handler_behind_a_pipe_or_a_socket_is_told() {
        let state = |pattern| one(&[("/proc/sys/kernel/core_pattern", pattern)], false, "kernel.core_pattern").state;
        assert_eq!(state("|/usr/lib/systemd/systemd-coredump %P %u\n"), State::Warn);
        assert_eq!(state("@/run/coredump.socket\n"), State::Warn);
        assert_eq!(state("core\n"), State::Ok);
    }

    #[test]
    fn seccomp_without_filters_is_told() {
        let path = "/proc/sys/kernel/seccomp/actions_avail";
        let state = |files: &[(&str, &str)]| one(files, false, "kernel.seccomp").state;
        assert_eq!(state(&[(path, "kill_process kill_thread trap errno user_notif trace log allow\n")]), State::Ok);
        assert_eq!(state(&[(path, "kill_thread trap errno allow\n")]), asked_state("seccomp"));
        assert_eq!(state(&[]), asked_state("seccomp"));
    }

    #[test]
    fn jobs_of_an_ordinary_user_may_trace_each_other_without_yama() {
        let scope = |value| one(&[("/proc/sys/kernel/yama/ptrace_scope", value)], true, "kernel.ptrace_scope").state;
        assert_eq!((scope("0\n"), scope("1\n")), (State::Warn, State::Ok));
        assert_eq!(one(&[], false, "kernel.ptrace_scope").state, State::Ok);
    }

    #[test]
    fn this_kernel_answers_every_system_call_that_tests_of_the_sandbox_use() {
        assert!(calls().iter().all(|(_, there)| *there), "{:?}", calls());
    }
}
