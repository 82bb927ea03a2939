//! Taking more than was asked for: P01 to P14, P46.

use muster_agent::spawner::protocol::{Network, Profile, Start};

use crate::{
    case::{Attempt, Body, Case, Control, Place, Rule, Wants, as_it_is, exact, no_facts, refused, value, works},
    fleet,
    spawner::{DISK_BYTES, DISK_WRITE_BYTES_PER_SECOND, MEMORY_BYTES, PIDS},
    stage::{Stage, USED_CPU},
};

/// The probe and the suite's few files lie in the working folder too.
const PROBE_BYTES_MAX: u64 = 4 << 20;
/// tmpfs has one inode for each page of its size.
const INODES: u64 = DISK_BYTES / 4_096;
/// Of a job's soft limit of descriptors.
const DESCRIPTORS: u64 = 1_024;
/// Made by a job one after the other, for its init to reap.
const ORPHANS: u64 = 500;

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(u64::MAX)
}

fn at_most_pids(text: &str, _: &Stage) -> bool {
    number(text) <= u64::from(PIDS)
}

fn is_zero(text: &str, _: &Stage) -> bool {
    text == "0"
}

fn for_seconds(start: &mut Start) {
    // Long enough for an emulated guest to reach the limit.
    (start.time_limit_ms, start.grace_ms) = (20_000, 200);
}

fn bomb(_: &Stage, place: Place) -> Vec<String> {
    let hold = if place == Place::Inside { "yes" } else { "no" };
    vec!["max=300".into(), format!("hold={hold}")]
}

fn much_memory(_: &Stage, place: Place) -> Vec<String> {
    // Outside enough to show that it could; a small guest has 1 GiB.
    let max = if place == Place::Inside { 4_096 } else { 320 };
    vec![format!("max={max}")]
}

fn greedy(_: &Stage, place: Place) -> Vec<String> {
    let max = if place == Place::Inside { 1_024 } else { 70 };
    vec![format!("max={max}")]
}

fn disk(_: &Stage, place: Place) -> Vec<String> {
    let max = if place == Place::Inside { 1 << 30 } else { 2 * DISK_BYTES };
    vec![format!("max={max}"), format!("limit={DISK_BYTES}")]
}

fn files(_: &Stage, place: Place) -> Vec<String> {
    vec![format!("max={}", if place == Place::Inside { 1 << 20 } else { INODES + 100 })]
}

fn descriptors(_: &Stage, _: Place) -> Vec<String> {
    vec!["max=3000".into()]
}

/// Outside a few more than the limit, which the guest's own memory pays for.
fn zombies(_: &Stage, place: Place) -> Vec<String> {
    let max = if place == Place::Inside { 10_000 } else { 1_000 };
    vec![format!("max={max}"), format!("orphans={ORPHANS}")]
}

fn slow(start: &mut Start) {
    start.limits.cpu_milli = 200;
}

fn burn(_: &Stage, _: Place) -> Vec<String> {
    vec!["threads=4".into(), "seconds=5".into()]
}

/// `used of wall`: at most the share of a core that it asked for, with room for the edges of the periods.
fn within_its_share(text: &str, _: &Stage) -> bool {
    text.split_once(" of ").is_some_and(|(used, wall)| number(used) * 1_000 <= number(wall) * 300)
}

/// Some seconds at the rate that it may have.
fn much_to_write(_: &Stage, _: Place) -> Vec<String> {
    vec![format!("bytes={}", 4 * DISK_WRITE_BYTES_PER_SECOND)]
}

/// A strict job writes to memory alone; what has a folder on a disk is weaker.
fn on_disk(start: &mut Start) {
    (start.profile, start.network) = (Profile::Shared, Network::Host);
}

fn crash_in_guest(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    // A handler of crashes would run as root outside of every sandbox, for as long as the job cares to crash.
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    let told = |error: std::io::Error| format!("{PATTERN}: {error}");
    let before = std::fs::read_to_string(PATTERN).map_err(told)?;
    let mark = stage.spawner.folder.path().join("core-handler-was-called");
    let mut tries = Vec::new();
    for (name, pattern) in [
        ("file", "core".to_owned()),
        ("handler", format!("|{} note-core file={}", stage.tools.probe.display(), mark.display())),
    ] {
        std::fs::write(PATTERN, pattern).map_err(told)?;
        let start = stage.spawner.order(&["crash", "times=100"]);
        let key = stage.spawner.begin(start, None, &[])?;
        let life = stage.live_through(key);
        std::fs::write(PATTERN, before.trim_end()).map_err(told)?;
        for attempt in crate::case::attempts(&life?.stdout) {
            tries.push(Attempt { name: format!("{name}-{}", attempt.name), ..attempt });
        }
    }
    tries.push(Attempt::compare("handler-was-called", &mark.exists(), &false));
    Ok(tries)
}

pub static CASES: [Case; 15] = [
    Case {
        id: "P01",
        title: "fork bomb: own sessions, SIGTERM ignored",
        destructive: true,
        needs: &["limits.pids"],
        body: Body::Probe { command: "fork-bomb", facts: bomb, shape: for_seconds },
        control: Control::Runs(&[]),
        ends: &["timeout"],
        rules: &[refused("fork", &["EAGAIN"]), value("forked", "at most pids.max", at_most_pids)],
    },
    Case {
        id: "P02",
        title: "thread bomb",
        destructive: true,
        needs: &["limits.pids"],
        body: Body::Probe { command: "thread-bomb", facts: bomb, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("thread", &["EAGAIN"]), value("threads", "at most pids.max", at_most_pids)],
    },
    Case {
        id: "P03",
        title: "takes and touches memory for ever",
        destructive: true,
        needs: &["limits.memory"],
        body: Body::Probe { command: "memory", facts: much_memory, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["oom"],
        rules: &[works("begun"), Rule { tries: "memory", wants: Wants::Never }],
    },
    Case {
        id: "P04",
        title: "small parent, greedy children",
        destructive: true,
        needs: &["limits.memory"],
        body: Body::Probe { command: "greedy-children", facts: greedy, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["oom"],
        rules: &[works("children"), Rule { tries: "outlived", wants: Wants::Never }],
    },
    Case {
        id: "P05",
        title: "fills its working folder",
        destructive: false,
        needs: &["limits.disk"],
        body: Body::Probe { command: "fill-folder", facts: disk, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("fill", &["ENOSPC"]),
            value("filled", "its size, less what lay in it", |text, _| {
                (DISK_BYTES - PROBE_BYTES_MAX..=DISK_BYTES).contains(&number(text))
            }),
            works("remove|write-again"),
        ],
    },
    Case {
        id: "P06",
        title: "makes files until refused",
        destructive: false,
        needs: &["limits.disk"],
        body: Body::Probe { command: "many-files", facts: files, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("file", &["ENOSPC"]),
            value("files", "at most the inodes of its size", |text, _| number(text) <= INODES),
        ],
    },
    Case {
        id: "P07",
        title: "floods stdout and stderr",
        destructive: false,
        needs: &[],
        body: Body::Fleet(fleet::flood),
        control: Control::None("the flood itself is the proof: more is written than is kept"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P08",
        title: "a line of 1 GiB, NUL bytes, random bytes",
        destructive: false,
        needs: &[],
        body: Body::Fleet(fleet::strange_bytes),
        control: Control::None("the bytes that come back are compared with those sent"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P09",
        title: "opens files until refused",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "open-files+limits", facts: descriptors, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("open", &["EMFILE"]),
            value("soft-limit|opened", "at most 1,024", |text, _| number(text) <= DESCRIPTORS),
            refused("raise-hard", &["EPERM"]),
            value("core", "1 at most, which also keeps handlers from being called", |text, _| number(text) <= 1),
            value("files", "at most 65,536", |text, _| number(text) <= 65_536),
            value("file-size", "the size of its folder", |text, _| number(text) <= DISK_BYTES),
            value("message-queues", "at most 819,200 bytes", |text, _| number(text) <= 819_200),
            value("pending-signals", "at most 4,096", |text, _| number(text) <= 4_096),
            value("locked-memory", "at most 8 MiB", |text, _| number(text) <= 8 << 20),
            value("processes", "its limit of pids, with one more for the init", |text, _| {
                number(text) <= u64::from(PIDS) + 1
            }),
        ],
    },
    Case {
        id: "P10",
        title: "burns CPU on more threads than its share",
        destructive: true,
        needs: &["limits.cpu"],
        body: Body::Probe { command: "burn", facts: burn, shape: slow },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value(USED_CPU, "at most 0.3 of the wall time for 0.2 of a core", within_its_share),
            value("cpu-ms", "little of 5 s on every core", |text, _| number(text) <= 2_500),
        ],
    },
    Case {
        id: "P11",
        title: "nice -20, real time, locked memory, OOM score",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "priority", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("nice|fifo|round-robin|io-real-time|never-killed-for-memory", &["EPERM", "EACCES"]),
            // mlock(2): past a limit that is not 0, the answer is ENOMEM.
            refused("lock-16-mib", &["EPERM", "ENOMEM"]),
        ],
    },
    Case {
        id: "P12",
        title: "a file past its limit, sparse files",
        destructive: false,
        needs: &["limits.disk"],
        body: Body::Probe { command: "large-file", facts: disk, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("sparse-past-limit|sparse-1-tib|write-past-limit", &["EFBIG", "ENOSPC"]),
            value("write-past-limit-end", "killed by SIGXFSZ, or refused", |text, _| {
                text == "signal 25" || text == "exit 1"
            }),
            works("sparse-2-mib"),
        ],
    },
    Case {
        id: "P13",
        title: "crashes 100 times with 1 GiB mapped",
        destructive: true,
        needs: &[crate::differences::ROOT],
        body: Body::Acts(crash_in_guest),
        control: Control::None("a crash outside would be dumped: that is the host's own setting"),
        ends: &[],
        rules: &[
            value("file-crashed|handler-crashed", "all of them", |text, _| text == "100"),
            value("file-cores|file-core-files|handler-cores|handler-core-files", "none", is_zero),
            exact("handler-was-called"),
        ],
    },
    Case {
        id: "P14",
        title: "10,000 zombies, 500 orphans",
        destructive: true,
        needs: &["limits.pids"],
        body: Body::Probe { command: "zombies", facts: zombies, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("zombie", &["EAGAIN"]),
            value("zombies|waited", "at most pids.max", at_most_pids),
            value("orphans", "all of them, so the init reaps", |text, _| number(text) == ORPHANS),
        ],
    },
    Case {
        id: "P46",
        title: "writes to a disk as fast as it can",
        destructive: true,
        needs: &["limits.io"],
        body: Body::Probe { command: "write-disk", facts: much_to_write, shape: on_disk },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            works("write-disk"),
            // A slow machine only writes less.
            value("bytes-per-second", "the rate of spawner.toml, with room for its edges", |text, _| {
                number(text) <= DISK_WRITE_BYTES_PER_SECOND * 3 / 2
            }),
        ],
    },
];

/// The memory that P03 and P04 run into is far below what they take.
const _: () = assert!(MEMORY_BYTES == 256 << 20);
