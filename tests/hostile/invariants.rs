//! What holds after every case, whatever the job did: the spawner is the same
//! and as large as before, nothing of the job is left, the host is untouched,
//! and no secret was seen.

use std::{collections::BTreeMap, fs, path::Path};

use muster_tests::{WAIT, eventually_blocking, host};
use sha2::{Digest as _, Sha256};

use crate::spawner::{Spawner, UIDS};

/// The spawner's resident memory may grow by so much over a whole run: records of attempts that must not run again.
const GROWTH_BYTES: u64 = 4 << 20;
/// One sandbox more or less may be ready for the next request: its descriptors. A leak of one a case is more.
const SPARE_DESCRIPTORS: usize = 16;
/// Of each sandbox more that waits: its process, its channel, its pipes, its folder, its group and that's events, its network.
const SANDBOX_DESCRIPTORS: usize = 8;
/// Sandboxes that wait ready-made at most, as [`muster_agent::spawner::policy`] has it by default: more of them wait after
/// a case with many jobs.
const READY_MAX: usize = 8;
/// So many looks at it show the same.
const TICKS_AT_REST: u32 = 10;
const PAGE_BYTES: u64 = 4_096;

/// The spawner and the host before the first case.
pub struct Base {
    descriptors: usize,
    children: usize,
    networks: usize,
    resident_bytes: u64,
    mounts: usize,
    host: BTreeMap<String, String>,
}

impl Base {
    /// As it is when the spawner has come to rest: it may make sandboxes ahead of the next request.
    ///
    /// # Errors
    /// It never rests: it uses the processor although nothing is asked of it.
    pub fn of(spawner: &Spawner, muster: &Path) -> Result<Self, String> {
        let pid = spawner.part.pid();
        let size = || (descriptors(pid), children(pid).len(), host::cpu_ms(pid));
        let mut last = size();
        let mut same = 0;
        let rests = eventually_blocking(WAIT, || {
            let now = size();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            (same >= TICKS_AT_REST).then_some(())
        });
        rests.ok_or_else(|| format!("I2: the spawner never comes to rest: {last:?}"))?;
        let (descriptors, children, _) = last;
        let (resident_bytes, networks) = (resident_bytes(pid), networks_held(pid));
        Ok(Self { descriptors, children, networks, resident_bytes, mounts: mounts(pid), host: host_facts(muster) })
    }

    /// What does not hold. The spawner gets a deadline to come back to its size; the rest must hold at once.
    pub fn broken(&self, spawner: &mut Spawner, muster: &Path) -> Vec<String> {
        let mut broken = Vec::new();
        let pid = spawner.part.pid();
        if !spawner.part.is_running() {
            return vec![format!("I2: the spawner has ended: {}", spawner.part.log())];
        }
        let more = || children(pid).len().saturating_sub(self.children).min(READY_MAX);
        let most = || self.descriptors + SPARE_DESCRIPTORS + more() * SANDBOX_DESCRIPTORS;
        let back = eventually_blocking(WAIT, || (descriptors(pid) <= most()).then_some(()));
        if back.is_none() {
            broken.push(format!("I2: the spawner holds {} descriptors, {} before", descriptors(pid), self.descriptors));
        }
        let most = self.resident_bytes + self.resident_bytes / 20 + GROWTH_BYTES;
        if eventually_blocking(WAIT, || (resident_bytes(pid) <= most).then_some(())).is_none() {
            broken.push(format!(
                "I2: the spawner has {} bytes resident, {} before",
                resident_bytes(pid),
                self.resident_bytes
            ));
        }
        let most = self.children.max(READY_MAX) + 1;
        if eventually_blocking(WAIT, || (children(pid).len() <= most).then_some(())).is_none() {
            broken.push(format!("I3: the spawner has the children {:?}, {} before", children(pid), self.children));
        }
        if eventually_blocking(WAIT, || dead_children(pid).is_empty().then_some(())).is_none() {
            broken.push(format!("I3: the spawner has not waited for {:?}", dead_children(pid)));
        }
        let left = processes_of_jobs(spawner);
        if !left.is_empty() {
            broken.push(format!("I3: processes of jobs are left: {left:?}"));
        }
        if mounts(pid) != self.mounts {
            broken.push(format!("I3: {} mounts, {} before", mounts(pid), self.mounts));
        }
        // It keeps empty ones for the next task of the same job, and lets go of them when none comes.
        if eventually_blocking(WAIT, || (networks_held(pid) <= self.networks + 1).then_some(())).is_none() {
            broken.push(format!(
                "I3: the spawner holds {} network namespaces, {} before",
                networks_held(pid),
                self.networks
            ));
        }
        let now = host_facts(muster);
        broken.extend(
            self.host
                .iter()
                .filter(|(what, was)| now.get(*what) != Some(was))
                .map(|(what, was)| format!("I4: {what} was {was:?} and is {:?}", now.get(what))),
        );
        broken
    }
}

/// Processes of jobs, each with what tells its sandbox from others. As root that is its uid, one of the range for jobs;
/// an ordinary user's jobs have the user's own, and are the children of the spawner's children, which are their inits.
pub fn processes_of_jobs(spawner: &Spawner) -> Vec<(u32, u32)> {
    let range = spawner.first_uid..spawner.first_uid + UIDS;
    let processes = processes();
    if host::is_root() {
        let of_jobs = processes.iter().filter(|process| range.contains(&process.uid) && !process.dead);
        return of_jobs.map(|process| (process.pid, process.uid)).collect();
    }
    let parents: BTreeMap<u32, u32> = processes.iter().map(|process| (process.pid, process.parent)).collect();
    let spawner = spawner.part.pid();
    let init_of = |pid: u32| {
        let mut at = pid;
        while let Some(parent) = parents.get(&at) {
            if *parent == spawner {
                return Some(at).filter(|init| *init != pid);
            }
            at = *parent;
        }
        None
    };
    processes.iter().filter(|process| !process.dead).filter_map(|one| Some((one.pid, init_of(one.pid)?))).collect()
}

struct Process {
    pid: u32,
    parent: u32,
    uid: u32,
    /// Its parent has not waited for it: it runs no more.
    dead: bool,
}

fn processes() -> Vec<Process> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        let (parent, uid) = (field("PPid:")?.parse().ok()?, field("Uid:")?.parse().ok()?);
        Some(Process { pid, parent, uid, dead: field("State:").is_none_or(|state| matches!(state, "Z" | "X")) })
    })
    .collect()
}

fn dead_children(pid: u32) -> Vec<u32> {
    processes().into_iter().filter(|one| one.parent == pid && one.dead).map(|one| one.pid).collect()
}

/// The text's occurrence in what a job wrote, also across other bytes than text.
pub fn holds(bytes: &[u8], text: &str) -> bool {
    !text.is_empty() && bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The second field of statm is resident pages (proc_pid_statm(5)).
fn resident_bytes(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE_BYTES
}

fn mounts(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).map_or(0, |text| text.lines().count())
}

fn children(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

fn networks_held(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|link| link.to_string_lossy().starts_with("net:"))
        .count()
}

/// What no job may change: our own binary, system files, settings.
fn host_facts(muster: &Path) -> BTreeMap<String, String> {
    let digest = |path: &Path| fs::read(path).map(|bytes| format!("{:x}", Sha256::digest(&bytes))).unwrap_or_default();
    let mut facts: BTreeMap<String, String> =
        [muster, Path::new("/etc/passwd"), Path::new("/bin/sh"), Path::new("/usr/bin/env")]
            .into_iter()
            .map(|path| (path.display().to_string(), digest(path)))
            .collect();
    for setting in [
        "kernel/hostname",
        "kernel/domainname",
        "kernel/core_pattern",
        "kernel/sysrq",
        "kernel/modprobe",
        "vm/overcommit_memory",
        "net/ipv4/ip_forward",
    ] {
        let text = fs::read_to_string(Path::new("/proc/sys").join(setting)).unwrap_or_default();
        facts.insert(setting.to_owned(), text.trim().to_owned());
    }
    facts
}
