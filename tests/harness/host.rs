//! What the host has, and what was left on it.

use std::{fs, path::PathBuf};

/// Whether the test runs as root.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Pids whose command line or (where readable) environment holds the marker; not our own.
#[must_use]
pub fn processes_with(marker: &str) -> Vec<(u32, String)> {
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == own {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if holds(&command, marker) || holds(&environment, marker) {
            found.push((pid, String::from_utf8_lossy(&command).replace('\0', " ")));
        }
    }
    found
}

fn holds(bytes: &[u8], marker: &str) -> bool {
    bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
}

/// Mount points of this namespace whose line holds the text.
#[must_use]
pub fn mounts_with(text: &str) -> Vec<String> {
    let all = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    all.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
}

/// The cgroup2 mount, found by file system type.
#[must_use]
pub fn cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Our own cgroups at the top of the cgroup2 mount.
#[must_use]
pub fn muster_cgroups() -> Vec<String> {
    let Some(mount) = cgroup2() else { return Vec::new() };
    let entries = fs::read_dir(mount).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("muster-")).collect()
}

/// User and system time of a process so far, in milliseconds, with that of its reaped children.
#[must_use]
pub fn cpu_ms(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold blanks and brackets: fields are counted after the last one (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    // USER_HZ is 100 on every Linux that we run on.
    Some(ticks * 10)
}

/// Whether a program is on PATH.
#[must_use]
pub fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// The boot-time clock, as jobs read it too, in milliseconds.
#[must_use]
pub fn boot_ms() -> i64 {
    let clock = nix::time::ClockId::CLOCK_BOOTTIME;
    nix::time::clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000 + time.tv_nsec() / 1_000_000)
}
