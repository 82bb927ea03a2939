//! Seeing and touching other processes: the host's, other jobs', and pid 1 of one's own sandbox.

use std::{fs, io::Read as _};

use crate::{
    Facts,
    sys::{self, Arg},
    tell::{self, Outcome, tell, tell_value},
};

/// What was inherited: each descriptor above 2.
pub fn descriptors(_: &Facts) {
    let listed = fs::read_dir("/proc/self/fd").map(|folder| {
        let names = folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        // All but the one that reads this folder: it is closed again by now.
        names.filter(|name| name.parse::<i64>().is_ok_and(is_open)).collect::<Vec<_>>().join(",")
    });
    tell_value("open", tell::of(listed));
    let above: Vec<String> = (3..4_096).filter(|fd| is_open(*fd)).map(|fd| fd.to_string()).collect();
    tell_value("inherited", Ok(above.join(",")));
    for fd in 0..3 {
        let link = fs::read_link(format!("/proc/self/fd/{fd}")).map(|path| path.to_string_lossy().into_owned());
        tell_value(&format!("descriptor-{fd}"), tell::of(link));
    }
}

fn is_open(fd: i64) -> bool {
    sys::call_numbers(libc::SYS_fcntl, [fd, i64::from(libc::F_GETFD)]).is_ok()
}

/// What can be read of every other process there might be.
pub fn others(_: &Facts) {
    let own = std::process::id();
    let seen: Vec<u32> =
        (1..=65_536).filter(|pid| *pid != own && fs::metadata(format!("/proc/{pid}")).is_ok()).collect();
    // Pid 1 is the sandbox's own; what it lets us see is told apart.
    let foreign: Vec<String> = seen.iter().filter(|pid| **pid != 1).map(u32::to_string).collect();
    tell_value("foreign", Ok(foreign.join(",")));
    for what in ["environ", "cmdline", "mem", "maps", "status"] {
        let read = seen.iter().filter(|pid| **pid != 1).filter_map(|pid| read_some(*pid, what).ok()).count();
        tell_value(&format!("foreign-{what}"), Ok(read));
    }
    for what in ["environ", "cmdline", "mem", "maps"] {
        tell_value(&format!("init-{what}"), read_some(1, what));
    }
    for what in ["root", "cwd", "exe", "fd", "ns"] {
        tell(&format!("init-{what}"), tell::of(open_link(1, what)));
    }
}

fn read_some(pid: u32, what: &str) -> Outcome<String> {
    let mut bytes = Vec::new();
    tell::of(fs::File::open(format!("/proc/{pid}/{what}")).and_then(|file| file.take(4_096).read_to_end(&mut bytes)))?;
    Ok(String::from_utf8_lossy(&bytes).replace('\0', " "))
}

fn open_link(pid: u32, what: &str) -> std::io::Result<usize> {
    let path = format!("/proc/{pid}/{what}");
    match what {
        "fd" | "ns" => Ok(fs::read_dir(path)?.count()),
        _ => fs::read_link(path).map(|_| 0),
    }
}

/// Every way to reach into a process, on each that the suite names (`pid.NAME`).
pub fn attack(facts: &Facts) {
    for (name, pid) in facts.all("pid.") {
        let Ok(pid) = pid.parse() else { continue };
        let address = facts.number("address", 0);
        attack_one(name, pid, address);
    }
}

fn attack_one(name: &str, pid: i64, address: u64) {
    let told = |what: &str, outcome: Outcome<i64>| tell(&format!("{name}-{what}"), outcome);
    told("signal", sys::call_numbers(libc::SYS_kill, [pid, 0]));
    told("pidfd", sys::call_numbers(libc::SYS_pidfd_open, [pid, 0]));
    told(
        "trace",
        sys::errno_of_child(|| {
            let seized = sys::call_numbers(libc::SYS_ptrace, [i64::from(libc::PTRACE_SEIZE), pid, 0, 0]);
            seized.map(|_| 0)
        }),
    );
    let mut buffer = [0u8; 8];
    let place = buffer.as_mut_ptr() as u64;
    for (what, call) in [("read", libc::SYS_process_vm_readv), ("write", libc::SYS_process_vm_writev)] {
        let mut local = vector(place, buffer.len());
        let mut remote = vector(address, buffer.len());
        let mut arguments = [
            Arg::Number(pid),
            Arg::Memory(&mut local),
            Arg::Number(1),
            Arg::Memory(&mut remote),
            Arg::Number(1),
            Arg::Number(0),
        ];
        told(what, sys::call(call, &mut arguments));
    }
    told("priority", sys::call_numbers(libc::SYS_setpriority, [0, pid, 1]));
    let mut limit = [0u8; 16];
    let files = i64::from(libc::RLIMIT_NOFILE);
    told(
        "limit",
        sys::call(
            libc::SYS_prlimit64,
            &mut [Arg::Number(pid), Arg::Number(files), Arg::Number(0), Arg::Memory(&mut limit)],
        ),
    );
    // KCMP_VM: whether two processes share their memory.
    told("compare", sys::call_numbers(libc::SYS_kcmp, [pid, pid, 1, 0, 0]));
    told("affinity", {
        let mut set = [0xffu8; 128];
        sys::call(libc::SYS_sched_setaffinity, &mut [Arg::Number(pid), Arg::Number(128), Arg::Memory(&mut set)])
    });
}

/// A `struct iovec`.
fn vector(start: u64, length: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&start.to_ne_bytes());
    bytes[8..].copy_from_slice(&(length as u64).to_ne_bytes());
    bytes
}

/// Pid 1 of this sandbox (`pid`): its memory, its descriptors, its life, and a flood of orphans for it to reap.
pub fn attack_init(facts: &Facts) {
    let pid = facts.number("pid", 1);
    let number = i64::try_from(pid).unwrap_or(1);
    attack_one("init", number, facts.number("address", 0));
    for what in ["mem", "oom_score_adj", "environ", "maps", "auxv", "stack", "syscall"] {
        let write = matches!(what, "mem" | "oom_score_adj");
        let file = fs::OpenOptions::new().read(!write).write(write).open(format!("/proc/{pid}/{what}"));
        let read = file.and_then(|mut file| if write { Ok(0) } else { file.read(&mut [0; 64]) });
        tell(&format!("init-{what}"), tell::of(read));
    }
    let listed = fs::read_dir(format!("/proc/{pid}/fd")).map(|folder| folder.flatten().count());
    tell_value("init-descriptors", tell::of(listed));
    let pidfd = sys::call_numbers(libc::SYS_pidfd_open, [number, 0]);
    let stolen = pidfd.and_then(|pidfd| sys::call_numbers(libc::SYS_pidfd_getfd, [pidfd, 0, 0]));
    tell("init-steal-descriptor", stolen);
    if facts.text("signals") != "no" {
        let sent = pidfd
            .and_then(|pidfd| sys::call_numbers(libc::SYS_pidfd_send_signal, [pidfd, i64::from(libc::SIGKILL), 0, 0]));
        tell("init-kill-by-pidfd", sent);
        for (name, signal) in [("stop", libc::SIGSTOP), ("terminate", libc::SIGTERM), ("kill", libc::SIGKILL)] {
            tell(&format!("init-{name}"), sys::call_numbers(libc::SYS_kill, [number, i64::from(signal)]));
        }
    }
    tell_value("orphans", Ok(orphans(facts.number("orphans", 500))));
}

/// Makes so many orphans for pid 1 to reap. When they come faster than it reaps, the limit refuses some: those are made
/// again, so fewer come only from an init that does not reap.
pub fn orphans(wanted: u64) -> u64 {
    const REFUSALS_MAX: u32 = 100_000;
    let (mut made, mut refusals) = (0, 0);
    while made < wanted && refusals < REFUSALS_MAX {
        match sys::fork(0, || i32::from(sys::fork(0, || 0).is_err())).and_then(sys::wait) {
            Ok(0) => made += 1,
            Ok(_) | Err(_) => refusals += 1,
        }
    }
    made
}

/// Kills all that it can reach, after making something to reach.
pub fn kill_all(_: &Facts) {
    let children: Vec<i32> = (0..3).filter_map(|_| sys::fork(0, || sys::stay()).ok()).collect();
    tell("kill-all", sys::call_numbers(libc::SYS_kill, [-1, i64::from(libc::SIGKILL)]));
    let killed =
        children.into_iter().filter(|pid| sys::wait(*pid).is_ok_and(|status| libc::WIFSIGNALED(status))).count();
    tell_value("own-children", Ok(killed));
}

/// Which namespaces it is in, and what each shows.
pub fn namespaces(_: &Facts) {
    for name in ["pid", "mnt", "ipc", "uts", "net", "cgroup", "user"] {
        let link = fs::read_link(format!("/proc/self/ns/{name}")).map(|path| path.to_string_lossy().into_owned());
        tell_value(&format!("ns-{name}"), tell::of(link));
    }
    let text = |path: &str| {
        tell::of(fs::read_to_string(path)).map(|text| {
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(";")
        })
    };
    tell_value("host-name", host_name());
    tell_value("cgroup-path", text("/proc/self/cgroup"));
    tell_value("uid-map", text("/proc/self/uid_map"));
    for file in ["meminfo", "cpuinfo", "kallsyms", "modules", "version", "sys", "interrupts", "keys", "mounts"] {
        tell(&format!("proc-{file}"), tell::of(fs::metadata(format!("/proc/{file}"))));
    }
}

/// The host name.
pub fn host_name() -> Outcome<String> {
    let mut name = [0u8; 65];
    // SAFETY: a live buffer of that length.
    match unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } {
        0 => Ok(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()),
        _ => Err(sys::last_errno()),
    }
}
