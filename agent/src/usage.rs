//! How busy this host is, and what its attempts use. A figure that cannot be
//! read is absent, never 0: missing data must hold decisions, not make them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use muster_core::{ids::AttemptId, resources::Resources};
use muster_proto::v1;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::spawner::protocol::{Ended, Running};

/// Reads the host's figures.
pub struct HostSampler {
    proc_root: PathBuf,
    /// Whose disk is reported: other mounts, a hung network one too, are never touched.
    disk_path: PathBuf,
    /// This node is a slice of the machine with this capacity.
    slice: Option<Resources>,
    /// None: the crate does not know this system; nothing is known then.
    system: Option<System>,
    sampled: Option<Instant>,
}

impl HostSampler {
    /// Reads below `proc_root`, which is `/proc` but for tests.
    #[must_use]
    pub fn new(proc_root: PathBuf, disk_path: PathBuf, slice: Option<Resources>) -> Self {
        let mut sampler = Self { proc_root, disk_path, slice, system: System::new().ok(), sampled: None };
        // The first figures of busy time are the difference to this look.
        if sampler.can_read("stat") && slice.is_none() {
            sampler.refresh();
            sampler.sampled = Some(Instant::now());
        }
        sampler
    }

    /// The figures now. `attempts` is what this node's attempts use together.
    pub fn sample(&mut self, attempts: &Sum) -> v1::HostMetrics {
        let mut metrics = match self.slice {
            Some(capacity) => Self::of_slice(capacity, attempts),
            None => self.of_machine(),
        };
        metrics.load1_milli = self.read("loadavg").and_then(|text| load1_milli(&text));
        metrics.cpu_pressure = self.read("pressure/cpu").and_then(|text| some_avg10(&text));
        metrics.memory_pressure = self.read("pressure/memory").and_then(|text| some_avg10(&text));
        metrics.io_pressure = self.read("pressure/io").and_then(|text| some_avg10(&text));
        if let Ok(disk) = nix::sys::statvfs::statvfs(&self.disk_path) {
            let block: u64 = disk.fragment_size();
            metrics.disk_total_bytes = Some(disk.blocks().saturating_mul(block));
            metrics.disk_available_bytes = Some(disk.blocks_available().saturating_mul(block));
        }
        metrics
    }

    fn of_machine(&mut self) -> v1::HostMetrics {
        let mut metrics = v1::HostMetrics::default();
        let spaced = self.sampled.is_some_and(|at| at.elapsed() >= CPU_INTERVAL_MIN);
        let (stat, meminfo) = (self.can_read("stat"), self.can_read("meminfo"));
        if (stat && spaced) || meminfo {
            self.refresh();
        }
        let Some(system) = &self.system else { return metrics };
        if stat && spaced {
            metrics.cpu_core_milli =
                system.cpus().iter().map(|cpu| (cpu.usage().clamp(0.0, 100.0) * 10.0) as u32).collect();
            metrics.cpu_used_milli = Some(metrics.cpu_core_milli.iter().map(|core| u64::from(*core)).sum());
        }
        if meminfo {
            metrics.memory_total_bytes = Some(system.total_memory());
            metrics.memory_available_bytes = Some(system.available_memory());
            metrics.memory_used_bytes = Some(system.total_memory().saturating_sub(system.available_memory()));
        }
        if stat && (spaced || self.sampled.is_none()) {
            self.sampled = Some(Instant::now());
        }
        metrics
    }

    fn of_slice(capacity: Resources, attempts: &Sum) -> v1::HostMetrics {
        let mut metrics = v1::HostMetrics {
            cpu_used_milli: attempts.cpu_milli,
            memory_total_bytes: Some(capacity.memory_bytes),
            memory_used_bytes: attempts.memory_bytes,
            memory_available_bytes: attempts.memory_bytes.map(|used| capacity.memory_bytes.saturating_sub(used)),
            ..v1::HostMetrics::default()
        };
        if let Some(mut used) = attempts.cpu_milli {
            // Which real core an attempt ran on is nobody's business in a slice: fill from the first.
            for core in 0..capacity.cpu_milli.div_ceil(1_000) {
                let size = (capacity.cpu_milli - core * 1_000).min(1_000);
                let busy = used.min(size);
                metrics.cpu_core_milli.push((busy * 1_000 / size) as u32);
                used -= busy;
            }
        }
        metrics
    }

    fn refresh(&mut self) {
        if let Some(system) = &mut self.system {
            system.refresh_specifics(
                RefreshKind::nothing()
                    .with_cpu(CpuRefreshKind::nothing().with_usage())
                    .with_memory(MemoryRefreshKind::nothing().with_ram()),
            );
        }
    }

    /// The crate answers 0 for what it cannot read, so its source is tried first.
    fn can_read(&self, file: &str) -> bool {
        self.read(file).is_some_and(|text| !text.is_empty())
    }

    fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.proc_root.join(file)).ok()
    }
}

/// Busy time over less than this is mostly noise (sysinfo's own minimum).
const CPU_INTERVAL_MIN: Duration = Duration::from_millis(200);

/// MemTotal, if it can be read.
#[must_use]
pub fn memory_total(proc_root: &Path) -> Option<u64> {
    let text = fs::read_to_string(proc_root.join("meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1_024)
}

/// The first figure of /proc/loadavg, in thousandths.
#[must_use]
pub fn load1_milli(text: &str) -> Option<u64> {
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    is_figure(load).then_some((load * 1_000.0) as u64)
}

/// "some avg10" of a file in /proc/pressure, in hundredths of a percent.
#[must_use]
pub fn some_avg10(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let value: f64 = line.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?.parse().ok()?;
    is_figure(value).then_some((value * 100.0).round() as u32)
}

/// "nan" and "-1" read as numbers, and would count as 0.
fn is_figure(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

/// What all attempts of this node use together; absent if one of them could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Busy thousandths of a core since the last look.
    pub cpu_milli: Option<u64>,
    /// Memory in use.
    pub memory_bytes: Option<u64>,
}

/// One attempt's usage over its life.
#[derive(Debug, Default)]
pub struct AttemptMeter {
    cpu_ms: Option<u64>,
    memory_bytes: Option<u64>,
    memory_peak_bytes: Option<u64>,
    byte_milliseconds: u128,
    processes: Option<u32>,
    /// CPU per process at the last look: what a process that is gone had used stays counted.
    gone_ms: u64,
    last_by_process: BTreeMap<(u32, u64), u64>,
    looked: Option<Instant>,
    cpu_milli: Option<u64>,
    from_proc: bool,
}

/// Reads what attempts use: from their cgroup, else by walking /proc.
#[derive(Debug)]
pub struct AttemptReader {
    proc_root: PathBuf,
    cgroup_mount: Option<PathBuf>,
    ticks_per_second: u64,
    page_bytes: u64,
}

/// One process of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it began, in clock ticks since the host's start.
    pub start_ticks: u64,
    /// User and system time, with that of children it has waited for.
    pub ticks: u64,
    /// What of it is in memory.
    pub resident_pages: u64,
}

impl AttemptReader {
    /// Reads below `proc_root`, which is `/proc` but for tests.
    #[must_use]
    pub fn new(proc_root: PathBuf) -> Self {
        use nix::unistd::{SysconfVar, sysconf};
        let number = |variable, default| sysconf(variable).ok().flatten().map_or(default, |value| value as u64);
        let cgroup_mount = fs::read_to_string(proc_root.join("self/mounts")).ok().and_then(|text| cgroup2_mount(&text));
        Self {
            proc_root,
            cgroup_mount,
            ticks_per_second: number(SysconfVar::CLK_TCK, 100),
            page_bytes: number(SysconfVar::PAGE_SIZE, 4_096),
        }
    }

    /// Looks at one running attempt.
    pub fn look(&self, running: &Running, meter: &mut AttemptMeter, now: Instant) {
        let cgroup = running.cgroup.as_ref().and_then(|name| self.cgroup_path(name));
        let cgroup_cpu_ms = cgroup.as_ref().and_then(|path| {
            let text = fs::read_to_string(path.join("cpu.stat")).ok()?;
            text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse::<u64>().ok()
        });
        let cgroup_memory = cgroup.as_ref().and_then(|path| read_number(&path.join("memory.current")));
        let cgroup_peak = cgroup.as_ref().and_then(|path| read_number(&path.join("memory.peak")));
        let told = cgroup_cpu_ms.is_some() && cgroup_memory.is_some();
        let found = match &cgroup {
            Some(path) => members(path).map(|pids| {
                // What the group tells needs no look at each process, of which a job may have very many.
                let looked_at = if told { 0 } else { PROCESSES_MAX };
                (pids.len(), pids.into_iter().take(looked_at).filter_map(|pid| self.process(pid)).collect())
            }),
            None => self.descendants(running).map(|processes| (processes.len(), processes)),
        };
        let Some((count, processes)) = found else {
            // Gone since, or unreadable: nothing is known, and nothing is 0.
            (meter.memory_bytes, meter.processes, meter.cpu_milli) = (None, None, None);
            return;
        };
        let resident = processes.iter().map(|process| process.resident_pages.saturating_mul(self.page_bytes));
        let resident = resident.fold(0, u64::saturating_add);
        let cpu_ms = match cgroup_cpu_ms {
            Some(microseconds) => microseconds / 1_000,
            None => meter.sum_of_processes(&processes, self.ticks_per_second),
        }
        .saturating_sub(running.cpu_before_us / 1_000);
        let cgroup_peak = cgroup_peak.filter(|peak| *peak > running.memory_peak_before_bytes);
        meter.from_proc |= !told;
        meter.processes = u32::try_from(count).ok();
        meter.take(cpu_ms, cgroup_memory.unwrap_or(resident), cgroup_peak, now);
    }

    fn cgroup_path(&self, name: &[u8]) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStrExt as _;
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let name = name.strip_prefix("/").unwrap_or(name);
        Some(self.cgroup_mount.as_ref()?.join(name)).filter(|path| path.is_dir())
    }

    /// The attempt's init and all below it; none if that number is another process by now.
    fn descendants(&self, running: &Running) -> Option<Vec<Process>> {
        let init = self.process(running.init_pid)?;
        let since = running.init_start_ticks;
        if !(since..=since.saturating_add(START_TICKS_SLACK)).contains(&init.start_ticks) {
            return None;
        }
        let mut processes = vec![init];
        let mut next = 0;
        while let Some(parent) = processes.get(next).map(|process| process.pid) {
            next += 1;
            let Ok(threads) = fs::read_dir(self.proc_root.join(parent.to_string()).join("task")) else { continue };
            for thread in threads.flatten() {
                let Ok(text) = fs::read_to_string(thread.path().join("children")) else { continue };
                processes.extend(text.split_whitespace().filter_map(|pid| self.process(pid.parse().ok()?)));
            }
            if processes.len() > PROCESSES_MAX {
                break;
            }
        }
        Some(processes)
    }

    fn process(&self, pid: u32) -> Option<Process> {
        let text = fs::read_to_string(self.proc_root.join(pid.to_string()).join("stat")).ok()?;
        parse_stat(pid, &text)
    }
}

/// All processes in a cgroup and below it.
fn members(cgroup: &Path) -> Option<Vec<u32>> {
    let mut pids = Vec::new();
    let mut folders = vec![cgroup.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) else { continue };
        pids.extend(text.lines().filter_map(|pid| pid.parse::<u32>().ok()));
        if folders.len() < CGROUPS_MAX
            && let Ok(entries) = fs::read_dir(&folder)
        {
            folders.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
    }
    (!pids.is_empty()).then_some(pids)
}

/// A job cannot make the agent walk for ever.
const CGROUPS_MAX: usize = 256;
const PROCESSES_MAX: usize = 16_384;

/// See proc_pid_stat(5): the name may hold spaces and brackets, so fields count from the last one.
#[must_use]
pub fn parse_stat(pid: u32, text: &str) -> Option<Process> {
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = [number(14)?, number(15)?, number(16)?, number(17)?].into_iter().fold(0, u64::saturating_add);
    Some(Process { pid, start_ticks: number(22)?, ticks, resident_pages: number(24)? })
}

/// The spawner tells the clock before the clone, not what the kernel then wrote down; no number comes round so fast.
const START_TICKS_SLACK: u64 = 10;

/// Where /proc/self/mounts says that cgroup v2 is.
#[must_use]
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl AttemptMeter {
    /// A child that was waited for is in its parent's figure already; one that
    /// was not (reparented, or its parent ignores it) would fall out of the sum.
    fn sum_of_processes(&mut self, processes: &[Process], ticks_per_second: u64) -> u64 {
        let now: BTreeMap<_, _> = processes
            .iter()
            .map(|process| {
                let used_ms = u128::from(process.ticks) * 1_000 / u128::from(ticks_per_second.max(1));
                ((process.pid, process.start_ticks), u64::try_from(used_ms).unwrap_or(u64::MAX))
            })
            .collect();
        let total =
            |gone: u64, by_process: &BTreeMap<_, u64>| by_process.values().copied().fold(gone, u64::saturating_add);
        let before = total(self.gone_ms, &self.last_by_process);
        // The sum never falls: what is missing was used by processes that are gone.
        self.gone_ms += before.saturating_sub(total(self.gone_ms, &now));
        self.last_by_process = now;
        total(self.gone_ms, &self.last_by_process)
    }

    fn take(&mut self, cpu_ms: u64, memory_bytes: u64, peak: Option<u64>, now: Instant) {
        let cpu_ms = cpu_ms.max(self.cpu_ms.unwrap_or(0));
        if let Some(looked) = self.looked {
            let elapsed = now.saturating_duration_since(looked).as_millis().max(1);
            let used = u128::from(cpu_ms - self.cpu_ms.unwrap_or(0));
            self.cpu_milli = u64::try_from(used * 1_000 / elapsed).ok();
            let mean = u128::from(u64::midpoint(self.memory_bytes.unwrap_or(memory_bytes), memory_bytes));
            self.byte_milliseconds += mean * elapsed;
        }
        self.cpu_ms = Some(cpu_ms);
        self.memory_bytes = Some(memory_bytes);
        self.memory_peak_bytes = self.memory_peak_bytes.max(Some(memory_bytes)).max(peak);
        self.looked = Some(now);
    }

    /// For a heartbeat; none while nothing is known.
    #[must_use]
    pub fn usage(&self) -> Option<v1::Usage> {
        self.cpu_ms.map(|cpu_ms| v1::Usage {
            cpu_milliseconds: Some(cpu_ms),
            memory_bytes: self.memory_bytes,
            memory_peak_bytes: self.memory_peak_bytes,
            memory_byte_seconds: u64::try_from(self.byte_milliseconds / 1_000).ok(),
            processes: self.processes,
            approximate: self.from_proc,
        })
    }

    /// For the end's report: the spawner's word and our samples together.
    #[must_use]
    pub fn final_usage(&self, ended: &Ended, now: Instant) -> v1::Usage {
        let peak = ended.usage.memory_peak_bytes.max(self.memory_peak_bytes.unwrap_or(0));
        // The time that no sample covers is taken at the last known size, or at the peak.
        let uncovered_ms = match self.looked {
            Some(looked) => now.saturating_duration_since(looked).as_millis(),
            None => u128::from(ended.wall_ms),
        };
        let size = self.memory_bytes.unwrap_or(peak);
        let byte_milliseconds = self.byte_milliseconds.saturating_add(u128::from(size).saturating_mul(uncovered_ms));
        v1::Usage {
            cpu_milliseconds: Some(ended.usage.cpu_ms.max(self.cpu_ms.unwrap_or(0))),
            memory_bytes: None,
            memory_peak_bytes: (peak > 0).then_some(peak),
            memory_byte_seconds: u64::try_from(byte_milliseconds / 1_000).ok(),
            processes: None,
            approximate: ended.usage.approximate || self.from_proc,
        }
    }
}

impl Sum {
    /// Of these meters; nothing runs: 0.
    pub fn of<'a>(meters: impl Iterator<Item = &'a AttemptMeter>) -> Self {
        let zero = Self { cpu_milli: Some(0), memory_bytes: Some(0) };
        meters.fold(zero, |sum, meter| Self {
            // A fresh attempt has no rate yet: it counts from the next look on.
            cpu_milli: sum.cpu_milli.map(|cpu| cpu.saturating_add(meter.cpu_milli.unwrap_or(0))),
            memory_bytes: sum.memory_bytes.zip(meter.memory_bytes).map(|(sum, memory)| sum.saturating_add(memory)),
        })
    }
}

/// What runs now, for a heartbeat.
pub fn of_attempts<'a>(meters: impl Iterator<Item = (AttemptId, &'a AttemptMeter)>) -> Vec<v1::AttemptUsage> {
    meters
        .filter_map(|(attempt, meter)| {
            meter.usage().map(|usage| v1::AttemptUsage { attempt: Some(attempt.into()), usage: Some(usage) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawner::protocol::Usage;

    fn running(pid: u32, start_ticks: u64) -> Running {
        Running {
            fences: vec![],
            start_us: 0,
            cgroup: None,
            init_pid: pid,
            init_start_ticks: start_ticks,
            cpu_before_us: 0,
            memory_peak_before_bytes: 0,
            started_boottime_ms: 0,
            phases: crate::spawner::protocol::StartPhases::default(),
        }
    }

    #[test]
    fn what_cannot_be_read_is_absent_and_never_zero() {
        let empty = tempfile::tempdir().unwrap();
        let mut sampler = HostSampler::new(empty.path().into(), empty.path().join("no/such/folder"), None);
        let metrics = sampler.sample(&Sum::of(std::iter::empty()));
        assert_eq!(metrics, v1::HostMetrics::default());
        let mut meter = AttemptMeter::default();
        AttemptReader::new(empty.path().into()).look(&running(1, 1), &mut meter, Instant::now());
        assert_eq!(meter.usage(), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let mut sampler = HostSampler::new("/proc".into(), "/".into(), None);
        sampler.sampled = Instant::now().checked_sub(Duration::from_secs(1));
        let metrics = sampler.sample(&Sum::of(std::iter::empty()));
        assert_eq!(metrics.memory_total_bytes, memory_total(Path::new("/proc")));
        assert!(metrics.memory_used_bytes.unwrap() > 0 && metrics.disk_total_bytes.unwrap() > 0);
        assert_eq!(metrics.cpu_core_milli.len(), fs::read_to_string("/proc/stat").unwrap().matches("\ncpu").count());
    }

    #[test]
    fn a_slice_reports_its_attempts_against_its_declared_capacity() {
        let capacity = Resources { cpu_milli: 2_500, memory_bytes: 1_000, disk_bytes: 0 };
        let mut sampler = HostSampler::new("/proc".into(), "/".into(), Some(capacity));
        let metrics = sampler.sample(&Sum { cpu_milli: Some(1_250), memory_bytes: Some(400) });
        assert_eq!(metrics.cpu_core_milli, [1_000, 250, 0]);
        assert_eq!((metrics.cpu_used_milli, metrics.memory_available_bytes), (Some(1_250), Some(600)));
    }

    #[test]
    fn an_attempt_is_seen_with_its_children_and_never_by_a_reused_number() {
        let own = std::process::id();
        let reader = AttemptReader::new("/proc".into());
        let start = reader.process(own).unwrap().start_ticks;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let seen = reader.descendants(&running(own, start)).unwrap();
        let found = seen.iter().any(|process| process.pid == child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
        assert_eq!(reader.descendants(&running(own, start + 1)), None);
    }

    #[test]
    fn usage_integrates_memory_and_never_falls() {
        let mut meter = AttemptMeter::default();
        let begin = Instant::now();
        let one = |pid, ticks| Process { pid, start_ticks: 1, ticks, resident_pages: 0 };
        assert_eq!(meter.sum_of_processes(&[one(1, 10), one(2, 50)], 100), 600);
        // Process 2 is gone and nobody waited for it.
        assert_eq!(meter.sum_of_processes(&[one(1, 20)], 100), 600);
        assert_eq!(meter.sum_of_processes(&[one(1, 30)], 100), 700);
        meter.take(0, 1_000, None, begin);
        meter.take(1_000, 3_000, None, begin + Duration::from_secs(2));
        let usage = meter.usage().unwrap();
        assert_eq!((usage.memory_byte_seconds, usage.memory_peak_bytes), (Some(4_000), Some(3_000)));
        assert_eq!(meter.cpu_milli, Some(500));
        let ended = Ended {
            verdict: crate::spawner::protocol::Verdict::Exited(0),
            usage: Usage { cpu_ms: 1_500, memory_peak_bytes: 2_000, approximate: true },
            wall_ms: 3_000,
            fences: vec![],
            start_us: 1,
            phases: crate::spawner::protocol::StartPhases::default(),
        };
        let last = meter.final_usage(&ended, begin + Duration::from_secs(3));
        assert_eq!((last.cpu_milliseconds, last.memory_byte_seconds), (Some(1_500), Some(7_000)));
    }

    #[test]
    fn a_process_name_with_brackets_does_not_shift_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 3 4 20 0 1 0 555 1000 77 18446744073709551615";
        assert_eq!(parse_stat(7, text), Some(Process { pid: 7, start_ticks: 555, ticks: 37, resident_pages: 77 }));
    }
}
