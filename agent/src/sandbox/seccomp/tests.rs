//! The filter, over every number in user space, and in real children.

use std::{collections::BTreeMap, fmt::Write as _, fs, mem::offset_of, path::Path};

use libc::{seccomp_data, sock_filter};

use super::{
    Filter,
    program::{FOREIGN_FROM, NATIVE, NO_CALL},
    table::{self, Rule},
};

pub(in crate::sandbox) mod children;

/// linux/audit.h
const I386: u32 = 0x4000_0003;

/// Instructions; each is translated at every install.
const LENGTH_MAX: usize = 100;
/// Instructions on the longest path of a number whose arguments do not count.
const PATH_MAX: usize = 16;
/// Instructions on the path of a number, on average; the kernel plays each number once at an install.
const PATH_MEAN_MAX: f64 = 10.0;
/// Numbers beyond the last that any kernel has.
const NUMBERS: u32 = 501;

/// What the kernel would make of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Verdict {
    action: u32,
    steps: usize,
    /// An argument was looked at, so the kernel cannot remember the answer.
    looked: bool,
}

/// Plays the program as the kernel does; it panics at what the kernel would not play for its memory of allowed calls.
fn evaluate(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6], instruction_pointer: u64) -> Verdict {
    let mut data = [0_u8; size_of::<seccomp_data>()];
    let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset_of!(seccomp_data, nr), &nr.to_ne_bytes());
    put(offset_of!(seccomp_data, arch), &arch.to_ne_bytes());
    put(offset_of!(seccomp_data, instruction_pointer), &instruction_pointer.to_ne_bytes());
    for (index, argument) in args.iter().enumerate() {
        put(offset_of!(seccomp_data, args) + index * size_of::<u64>(), &argument.to_ne_bytes());
    }
    let (mut at, mut loaded, mut steps, mut looked) = (0, 0_u32, 0, false);
    loop {
        let one = &program[at];
        (at, steps) = (at + 1, steps + 1);
        let jump = |yes: bool| usize::from(if yes { one.jt } else { one.jf });
        match u32::from(one.code) {
            code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                let from = one.k as usize;
                looked |= from >= offset_of!(seccomp_data, instruction_pointer);
                loaded = u32::from_ne_bytes(data[from..from + 4].try_into().unwrap());
            }
            code if code == libc::BPF_ALU | libc::BPF_AND => loaded &= one.k,
            code if code == libc::BPF_JMP | libc::BPF_JEQ => at += jump(loaded == one.k),
            code if code == libc::BPF_JMP | libc::BPF_JGE => at += jump(loaded >= one.k),
            code if code == libc::BPF_JMP | libc::BPF_JSET => at += jump(loaded & one.k != 0),
            code if code == libc::BPF_RET => return Verdict { action: one.k, steps, looked },
            code => panic!("instruction {}: the kernel would not play code {code:#x}", at - 1),
        }
    }
}

fn action(filter: &Filter, nr: u32, args: [u64; 6]) -> String {
    name_of(evaluate(filter.program(), NATIVE, nr, args, 0).action)
}

fn name_of(action: u32) -> String {
    match action {
        libc::SECCOMP_RET_ALLOW => "allow".to_owned(),
        libc::SECCOMP_RET_KILL_PROCESS => "kill".to_owned(),
        action if action & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO => {
            format!("{:?}", nix::errno::Errno::from_raw((action & libc::SECCOMP_RET_DATA) as i32))
        }
        action => panic!("no answer of ours: {action:#x}"),
    }
}

/// Calls by number: the name without `SYS_`, and the rule.
fn listed() -> BTreeMap<u32, (&'static str, Rule)> {
    let mut listed = BTreeMap::new();
    for group in table::groups() {
        assert!(group.why.len() > 10, "a reason: {}", group.why);
        for (name, number) in group.calls {
            let name = name.strip_prefix("SYS_").unwrap();
            let before = listed.insert(*number as u32, (name, group.rule));
            assert_eq!(before, None, "{name} is listed twice");
        }
    }
    listed
}

fn number(name: &str) -> u32 {
    *listed().iter().find(|(_, (listed, _))| *listed == name).unwrap_or_else(|| panic!("{name} is not listed")).0
}

/// Calls whose arguments are looked at: what for, the index of the argument, its value.
const VARIANTS: &[(&str, &str, usize, u64)] = &[
    ("clone", "fork", 0, 17),
    ("clone", "thread", 0, 0x3d_0f00),
    ("clone", "vfork", 0, 0x4111),
    ("clone", "pidfd", 0, 0x1011),
    ("clone", "newtime", 0, 0x80),
    ("clone", "newns", 0, 0x2_0011),
    ("clone", "newcgroup", 0, 0x0200_0011),
    ("clone", "newuts", 0, 0x0400_0011),
    ("clone", "newipc", 0, 0x0800_0011),
    ("clone", "newuser", 0, 0x1000_0011),
    ("clone", "newpid", 0, 0x2000_0011),
    ("clone", "newnet", 0, 0x4000_0011),
    ("clone", "fork, newuser in the unread half", 0, 0x1000_0000_0000_0011),
    ("socket", "unspec", 0, 0),
    ("socket", "unix", 0, 1),
    ("socket", "inet", 0, 2),
    ("socket", "inet6", 0, 10),
    ("socket", "netlink", 0, 16),
    ("socket", "packet", 0, 17),
    ("socket", "rxrpc", 0, 33),
    ("socket", "alg", 0, 38),
    ("socket", "vsock", 0, 40),
    ("socket", "xdp", 0, 44),
    ("socket", "-1", 0, u64::MAX),
    ("socket", "packet, rubbish in the unread half", 0, 0xffff_ffff_0000_0011),
    ("socketpair", "unix", 0, 1),
    ("socketpair", "tipc", 0, 30),
    ("ioctl", "TCGETS", 1, 0x5401),
    ("ioctl", "TIOCSTI", 1, 0x5412),
    ("ioctl", "TIOCSTI, rubbish in the unread half", 1, 0xdead_beef_0000_5412),
    ("ioctl", "TIOCLINUX", 1, 0x541c),
    ("ioctl", "TIOCLINUX, rubbish in the unread half", 1, 0x1_0000_541c),
    ("ioctl", "TIOCSETD", 1, 0x5423),
    ("ioctl", "FIONBIO", 1, 0x5421),
    ("mknodat", "plain", 2, 0o644),
    ("mknodat", "regular", 2, 0o100_644),
    ("mknodat", "fifo", 2, 0o010_644),
    ("mknodat", "socket", 2, 0o140_644),
    ("mknodat", "character device", 2, 0o020_644),
    ("mknodat", "block device", 2, 0o060_644),
    ("mknodat", "block device, rubbish in the unread part", 2, 0xffff_ffff_ffff_6000),
    #[cfg(target_arch = "x86_64")]
    ("mknod", "fifo", 1, 0o010_644),
    #[cfg(target_arch = "x86_64")]
    ("mknod", "character device", 1, 0o020_644),
    #[cfg(target_arch = "x86_64")]
    ("mknod", "block device", 1, 0o060_644),
    ("personality", "linux", 0, 0),
    ("personality", "ask", 0, 0xffff_ffff),
    ("personality", "no random addresses", 0, 0x4_0000),
    ("personality", "read implies exec", 0, 0x40_0000),
    ("personality", "32 bits", 0, 8),
];

/// Every outcome as text.
fn outcomes(filter: &Filter) -> String {
    let listed = listed();
    let mut text = String::new();
    for nr in (0..NUMBERS).chain([1_000, 0x7fff, FOREIGN_FROM - 1, FOREIGN_FROM, NO_CALL - 1, NO_CALL]) {
        let (name, rule) = listed.get(&nr).copied().unwrap_or(("-", Rule::Absent));
        if let Rule::Check(_) = rule {
            for (_, what, index, value) in VARIANTS.iter().filter(|(of, ..)| *of == name) {
                let mut args = [0; 6];
                args[*index] = *value;
                writeln!(text, "{nr} {name} {} ({what})", action(filter, nr, args)).unwrap();
            }
        } else {
            writeln!(text, "{nr} {name} {}", action(filter, nr, [0; 6])).unwrap();
        }
    }
    text
}

/// The list as the program really decides it. Recorded anew with `MUSTER_RECORD=1`; the change is reviewed as a diff.
#[cfg(target_arch = "x86_64")]
#[test]
fn every_number_has_the_outcome_that_is_on_record() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sandbox/seccomp/golden-x86_64.txt");
    let now = outcomes(&Filter::strict());
    if std::env::var_os("MUSTER_RECORD").is_some() {
        fs::write(&path, &now).unwrap();
    }
    let recorded = fs::read_to_string(&path).unwrap();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let (was, is) = (lines(&recorded), lines(&now));
    let gone = was.difference(&is).map(|line| format!("- {line}"));
    let come = is.difference(&was).map(|line| format!("+ {line}"));
    let diff: Vec<String> = gone.chain(come).collect();
    assert!(diff.is_empty(), "outcomes changed; if they should, run with MUSTER_RECORD=1:\n{}", diff.join("\n"));
}

/// The tree decides as the list says, so the golden table cannot be wrong about a name.
#[test]
fn the_program_follows_the_list() {
    let (filter, listed) = (Filter::strict(), listed());
    for nr in 0..0x1_0000 {
        let verdict = evaluate(filter.program(), NATIVE, nr, [0; 6], 0);
        match listed.get(&nr).map_or(Rule::Absent, |(_, rule)| *rule) {
            Rule::Allow => assert_eq!((name_of(verdict.action).as_str(), verdict.looked), ("allow", false), "{nr}"),
            Rule::Refuse => assert_eq!(name_of(verdict.action), "EPERM", "{nr}"),
            Rule::Absent => assert_eq!(name_of(verdict.action), "ENOSYS", "{nr}"),
            Rule::Check(_) => assert!(verdict.looked, "{nr}"),
        }
    }
}

#[test]
fn every_number_of_another_interface_ends_the_process() {
    let filter = Filter::strict();
    let kill = |arch: u32, nr: u32| {
        let verdict = evaluate(filter.program(), arch, nr, [0; 6], 0);
        assert_eq!(name_of(verdict.action), "kill", "{arch:#x} {nr:#x}");
    };
    for nr in (0..0x1_0000).chain([NO_CALL]) {
        kill(I386, nr);
        kill(NATIVE ^ 1, nr);
    }
    for nr in (0..0x1_0000).map(|nr| FOREIGN_FROM | nr).chain([0x8000_0000, NO_CALL - 1]) {
        kill(NATIVE, nr);
    }
}

#[test]
fn the_paths_are_short() {
    let filter = Filter::strict();
    let length = filter.program().len();
    let steps = |arch: u32| (0..470).map(move |nr| (nr, arch));
    let played = |(nr, arch): (u32, u32)| evaluate(filter.program(), arch, nr, [0; 6], 0).steps;
    let native: Vec<usize> = steps(NATIVE).map(played).collect();
    let (longest, mean) = (*native.iter().max().unwrap(), native.iter().sum::<usize>() as f64 / native.len() as f64);
    println!("{length} instructions, the longest path {longest}, the mean path {mean:.1}");
    assert!(length <= LENGTH_MAX, "{length}");
    assert!(longest <= PATH_MAX, "{longest}");
    assert!(mean <= PATH_MEAN_MAX, "{mean}");
    assert!(steps(I386).map(played).all(|steps| steps == 3));
}

/// What the init of a sandbox still does when it is under the filter itself.
#[test]
fn the_init_can_work_under_it() {
    let filter = Filter::strict();
    let names = "recvmsg sendmsg ppoll read write close close_range dup dup3 fcntl fchdir chdir setsid prlimit64 setgroups \
        setresgid setresuid capset capget umask prctl execve openat openat2 mkdirat fchmod fchown fstat statx newfstatat \
        clock_gettime wait4 waitid kill signalfd4 rt_sigaction rt_sigprocmask rt_sigreturn mmap munmap mprotect madvise \
        brk futex getrandom copy_file_range sendfile pidfd_open pidfd_send_signal exit_group getpid \
        landlock_create_ruleset landlock_add_rule landlock_restrict_self";
    for name in names.split_whitespace() {
        assert_eq!(action(&filter, number(name), [0; 6]), "allow", "{name}");
    }
    for flags in [libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, libc::CLONE_PIDFD | libc::SIGCHLD] {
        assert_eq!(action(&filter, number("clone"), [flags as u64, 0, 0, 0, 0, 0]), "allow");
    }
    #[cfg(target_arch = "x86_64")]
    for name in ["poll", "dup2"] {
        assert_eq!(action(&filter, number(name), [0; 6]), "allow", "{name}");
    }
}
