//! Files of the kernel's: cgroup v2, /proc/PID/stat, mounts, load, pressure. Each
//! text goes to all of their parsers, and as a process's own file through the
//! reader and the meter of an attempt's usage.

use std::{cell::RefCell, fs, time::Instant};

use muster_agent::{
    sandbox::cgroup,
    spawner::protocol::{Ended, Running, StartPhases, Usage, Verdict},
    usage::{self, AttemptMeter, AttemptReader, Sum},
};
use tempfile::TempDir;

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target = Target {
    name: "kernel_text",
    shape: Shape::Text,
    words: &[
        "usage_usec ",
        "oom_kill ",
        "populated ",
        "some avg10=",
        "MemTotal:",
        " kB",
        "cgroup2",
        ") S ",
        "max",
        "nan",
        "inf",
    ],
    inputs_in_ci: 1_000,
    take,
    seeds,
};

const KEYS: [&str; 3] = ["usage_usec ", "populated ", "oom_kill "];
/// The process whose file the input is.
const PID: u32 = 7;

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    for key in KEYS.into_iter().map(Some).chain([None]) {
        let number = cgroup::number_of(input, key);
        found(signs, key.unwrap_or("number"), number.is_some());
    }
    let Ok(text) = std::str::from_utf8(input) else { return Ok(()) };
    found(signs, "load", usage::load1_milli(text).is_some());
    found(signs, "pressure", usage::some_avg10(text).is_some());
    found(signs, "mount", usage::cgroup2_mount(text).is_some());
    let process = usage::parse_stat(PID, text);
    found(signs, "stat", process.is_some());
    FOLDER.with_borrow_mut(|folder| {
        if folder.is_none() {
            *folder = Some(proc_folder().map_err(|error| error.to_string())?);
        }
        let Some(folder) = folder.as_ref() else { return Ok(()) };
        let write = |name: &str| fs::write(folder.path().join(name), input).map_err(|error| error.to_string());
        write("meminfo")?;
        write("7/stat")?;
        found(signs, "memory", usage::memory_total(folder.path()).is_some());
        let reader = AttemptReader::new(folder.path().into());
        let mut meter = AttemptMeter::default();
        let start_ticks = process.map_or(0, |process| process.start_ticks);
        for _ in 0..2 {
            reader.look(&running(start_ticks), &mut meter, Instant::now());
        }
        let used = meter.usage();
        found(signs, "usage", used.is_some());
        if used.is_some() != process.is_some() {
            return Err("a process is seen if its file reads, and only then".into());
        }
        let last = meter.final_usage(&ended(start_ticks), Instant::now());
        let _sum = Sum::of([&meter, &meter].into_iter());
        if last.cpu_milliseconds < used.and_then(|used| used.cpu_milliseconds) {
            return Err("the time that was used falls".into());
        }
        Ok(())
    })
}

fn found(signs: &mut Signs, place: &str, is_there: bool) {
    signs.accepted |= is_there;
    signs.note(place, if is_there { "some" } else { "none" });
}

thread_local! {
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// A /proc with one process and without children.
fn proc_folder() -> std::io::Result<TempDir> {
    let folder = tempfile::tempdir()?;
    fs::create_dir_all(folder.path().join("7/task/7"))?;
    fs::write(folder.path().join("7/task/7/children"), "")?;
    Ok(folder)
}

fn running(start_ticks: u64) -> Running {
    Running {
        fences: Vec::new(),
        start_us: 1,
        cgroup: None,
        init_pid: PID,
        init_start_ticks: start_ticks,
        cpu_before_us: 0,
        memory_peak_before_bytes: 0,
        started_boottime_ms: 0,
        phases: StartPhases::default(),
    }
}

fn ended(wall_ms: u64) -> Ended {
    Ended {
        verdict: Verdict::Exited(0),
        usage: Usage::default(),
        wall_ms,
        fences: Vec::new(),
        start_us: 1,
        phases: StartPhases::default(),
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // As Linux 6.1 wrote them.
    let texts = [
        ("cpu_stat", "usage_usec 33741\nuser_usec 12123\nsystem_usec 21618\nnr_periods 0\nnr_throttled 0\n"),
        ("cgroup_events", "populated 1\nfrozen 0\n"),
        ("memory_events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"),
        ("memory_peak", "7340032\n"),
        ("memory_max", "max\n"),
        ("loadavg", "0.52 0.58 0.59 1/597 12345\n"),
        (
            "pressure",
            "some avg10=0.22 avg60=0.17 avg300=1.11 total=58761459\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        ("meminfo", "MemTotal:        8039768 kB\nMemFree:          355244 kB\nMemAvailable:    4838264 kB\n"),
        (
            "mounts",
            "proc /proc proc rw,nosuid 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n",
        ),
        (
            "stat",
            "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 3 4 20 0 1 0 555 1000 77 18446744073709551615 1 1 0 0 0\n",
        ),
    ];
    texts.into_iter().map(|(name, text)| (name, text.as_bytes().to_vec())).collect()
}
