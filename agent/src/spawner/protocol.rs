//! What the agent and the spawner say to each other: one packet a message on a
//! Unix SEQPACKET socket, postcard inside, descriptors beside it.
//!
//! The agent asks, the spawner decides: it trusts nothing in a request, also
//! from the genuine agent. The spawner is the keeper: it holds pipes, ends and
//! the agent's note of each attempt until the agent says [`Request::Forget`],
//! so an agent that restarts finds all of it again in [`Event::Held`].

use serde::{Deserialize, Serialize};

/// Raised when either side would misread the other.
pub const PROTOCOL_VERSION: u16 = 3;
/// One packet. A larger [`Start`] travels in a sealed memfd.
pub const PACKET_BYTES_MAX: usize = 128 << 10;
/// A [`Start`] in a memfd.
pub const START_BYTES_MAX: usize = 8 << 20;
/// Descriptors with one packet (the kernel's SCM_MAX_FD is 253).
pub const DESCRIPTORS_MAX: usize = 250;
/// What the agent may have the spawner remember of an attempt.
pub const NOTE_BYTES_MAX: usize = 32 << 10;
/// The name of who submitted a job.
pub const OWNER_BYTES_MAX: usize = 1 << 10;

/// An attempt with its epoch: `job.task.number` at leadership `term`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptKey {
    /// The job.
    pub job: u64,
    /// The task in the job.
    pub task: u32,
    /// Counts from 1 within the task.
    pub number: u32,
    /// The coordinator's term.
    pub term: u64,
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First, and only first. Answered by `Welcome`, then a `Held` for each
    /// attempt, then `HeldAll`. A new agent connection replaces the old one.
    Hello {
        /// [`PROTOCOL_VERSION`].
        version: u16,
    },
    /// Start a job. Beside it the descriptors that `Start::stdin` and
    /// `Start::inputs` number: regular files and pipes, no others are taken. Answered by `Started`, or by `Ended` with
    /// `Verdict::StartFailed` or `Verdict::Refused`. An id that was ever
    /// accepted is refused the second time (FL-4) with `Denied`.
    Start(Box<Start>),
    /// The same, encoded in a sealed memfd that is the first descriptor beside
    /// it; the numbers in `Start` count from the second.
    StartInMemory,
    /// SIGTERM to the job, the grace, then its whole group is killed; with a
    /// grace of 0 at once. The end comes as `Ended`. A second Stop may only
    /// shorten the grace.
    Stop {
        /// The attempt.
        attempt: AttemptKey,
        /// Milliseconds.
        grace_ms: u64,
    },
    /// Hand out the pipes of a held attempt again. Answered by `Attached`.
    Attach {
        /// The attempt.
        attempt: AttemptKey,
    },
    /// Open these files of an ended attempt's working folder, as its own uid,
    /// beneath it and through no link. Answered by `Outputs`, as many as needed.
    Collect {
        /// The attempt.
        attempt: AttemptKey,
        /// Relative paths.
        paths: Vec<Vec<u8>>,
        /// A file larger than this, apparent or real, is skipped.
        file_bytes_max: u64,
    },
    /// The end is stored for good: drop the sandbox and the record.
    Forget {
        /// The attempt.
        attempt: AttemptKey,
    },
    /// The node's lease now ends then, by CLOCK_BOOTTIME. Ends later only.
    RenewLease {
        /// Milliseconds of CLOCK_BOOTTIME.
        deadline_boottime_ms: u64,
    },
    /// Power the host off. Refused unless `spawner.toml` allows it.
    Poweroff,
    /// After [`Event::Leaving`]: the coordinator has taken the proof that this host is drained. Changes nothing
    /// but how soon a spawner that holds nothing ends.
    Drained,
    /// As `Stop`, but first this signal, and as long a grace to save.
    /// Nothing changes for an attempt that is being ended already.
    Checkpoint {
        /// The attempt.
        attempt: AttemptKey,
        /// One of those that a job may be asked by.
        signal: u8,
        /// Milliseconds, twice.
        grace_ms: u64,
    },
    /// This host drains: jobs find it in the file that their environment names.
    NoticeDrain {
        /// Seconds of the Unix clock; none: there is no deadline.
        deadline_unix_s: Option<u64>,
    },
    /// It does not.
    NoticeNoDrain,
}

/// All that a start needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The attempt.
    pub attempt: AttemptKey,
    /// Opaque: returned in `Held`, at most [`NOTE_BYTES_MAX`].
    pub note: Vec<u8>,
    /// Who submitted the job: what its jobs leave as new, only jobs of the same owner use. Empty: unknown, nothing is
    /// used again.
    pub owner: Vec<u8>,
    /// Program and arguments; not empty. Found in the job's own PATH if it has no slash.
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment of the job.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Below the private working folder; empty: the folder itself.
    pub working_folder: Vec<u8>,
    /// What isolation is asked.
    pub profile: Profile,
    /// Fences of the profile that the job can do without.
    pub without: Vec<String>,
    /// Its network.
    pub network: Network,
    /// Its limits.
    pub limits: Limits,
    /// 0: none. Held by the spawner, counted from the start of user code.
    pub time_limit_ms: u64,
    /// Between SIGTERM and the kill when the time limit or the lease ends it.
    pub grace_ms: u64,
    /// Ends when the node's lease does.
    pub exclusive: bool,
    /// Descriptor beside the request that becomes stdin; none: /dev/null.
    pub stdin: Option<u8>,
    /// Files to copy into the working folder before the start.
    pub inputs: Vec<Input>,
}

impl Start {
    /// What no kernel call may ever see, with so many descriptors beside it.
    ///
    /// # Errors
    /// The sentence that says what is wrong.
    pub fn check(&self, descriptors: usize) -> Result<(), String> {
        let missing = |index: u8| usize::from(index) >= descriptors;
        if self.arguments.first().is_none_or(Vec::is_empty) {
            return Err("there is no program to run".into());
        }
        let nul = |bytes: &Vec<u8>| bytes.contains(&0);
        if self.arguments.iter().any(nul)
            || self.environment.iter().any(|(name, value)| nul(name) || nul(value) || name.contains(&b'='))
        {
            return Err("an argument or variable has a NUL byte, or a name has `=`".into());
        }
        if self.working_folder.contains(&0) {
            return Err("the working folder has a NUL byte".into());
        }
        if self.attempt.task == u32::MAX || self.attempt.number == 0 {
            return Err("its task or attempt number is out of range".into());
        }
        if self.owner.len() > OWNER_BYTES_MAX {
            return Err(format!("the owner has more than {OWNER_BYTES_MAX} bytes"));
        }
        if self.note.len() > NOTE_BYTES_MAX {
            return Err(format!("the note has more than {NOTE_BYTES_MAX} bytes"));
        }
        if self.stdin.is_some_and(missing) || self.inputs.iter().any(|input| missing(input.descriptor)) {
            return Err("a descriptor that it names is not beside it".into());
        }
        let escapes =
            |path: &[u8]| path.starts_with(b"/") || path.split(|byte| *byte == b'/').any(|part| part == b"..");
        if escapes(&self.working_folder)
            || self.inputs.iter().any(|input| input.path.is_empty() || escapes(&input.path))
        {
            return Err("a path leaves the working folder".into());
        }
        Ok(())
    }
}

/// A file to copy in: a slice of one of the descriptors beside the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Relative path; missing folders are made.
    pub path: Vec<u8>,
    /// Which descriptor.
    pub descriptor: u8,
    /// Where the slice begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// Owner may execute it.
    pub executable: bool,
}

/// What isolation a job asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// Everything.
    Strict,
    /// The host's file system and network; its own uid and group of processes.
    Shared,
    /// A plain process.
    None,
}

/// A job's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// Loopback of its own.
    None,
    /// The host's.
    Host,
}

/// A job's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes of the private working folder.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
}

/// From the spawner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// First answer to `Hello`.
    Welcome {
        /// [`PROTOCOL_VERSION`].
        version: u16,
        /// /proc/sys/kernel/random/boot_id.
        boot_id: String,
        /// Random per life of the spawner: kept over its own upgrade, new after its death.
        spawner_id: [u8; 16],
        /// Fences that this host can raise.
        fences: Vec<String>,
        /// Fences that it cannot, each with the sentence why.
        missing: Vec<(String, String)>,
        /// Power-off is allowed.
        poweroff: bool,
    },
    /// One held attempt, after `Welcome`.
    Held {
        /// The attempt.
        attempt: AttemptKey,
        /// As given in `Start`.
        note: Vec<u8>,
        /// How far it is.
        phase: Phase,
    },
    /// No more `Held` follow.
    HeldAll,
    /// User code runs. Beside it: the read ends of stdout and stderr.
    Started {
        /// The attempt.
        attempt: AttemptKey,
        /// What it really has.
        running: Running,
    },
    /// The pipes again. Beside it: the read ends of stdout and stderr, unless it never started.
    Attached {
        /// The attempt.
        attempt: AttemptKey,
    },
    /// Over: nothing of it runs any more (FL-5). Kept until `Forget`.
    Ended {
        /// The attempt.
        attempt: AttemptKey,
        /// How.
        end: Ended,
    },
    /// A part of the answer to `Collect`. Beside it: a read-only descriptor
    /// for each `Collected::File`, in order.
    Outputs {
        /// The attempt.
        attempt: AttemptKey,
        /// In the order asked.
        files: Vec<(Vec<u8>, Collected)>,
        /// No more follow.
        last: bool,
    },
    /// Killed, and not gone long after: a process of it cannot die, for example in a call to a dead disk.
    Stuck {
        /// The attempt.
        attempt: AttemptKey,
    },
    /// A request that changes nothing: malformed, out of order, or against policy.
    Denied {
        /// The attempt, if it names one.
        attempt: Option<AttemptKey>,
        /// The sentence.
        reason: String,
    },
    /// The host's own system stops this node: nothing more is started, and what runs then is ended. Also after
    /// `HeldAll`, to an agent that comes later.
    Leaving {
        /// Milliseconds from now.
        within_ms: u64,
    },
}

/// How far a held attempt is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It runs.
    Running(Running),
    /// It was told to end.
    Stopping(Running),
    /// It is over.
    Ended(Ended),
}

/// A running attempt as the agent needs to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The fences that this attempt really has.
    pub fences: Vec<String>,
    /// Microseconds from the request to the job's exec.
    pub start_us: u64,
    /// Its cgroup below the cgroup2 mount, if it has one: to read usage.
    pub cgroup: Option<Vec<u8>>,
    /// Its init (profile none: the process itself), only to read usage from
    /// /proc: never to be signalled.
    pub init_pid: u32,
    /// Start time of that process (field 22 of /proc/PID/stat) or a little less,
    /// so that a reused number is noticed.
    pub init_start_ticks: u64,
    /// What that group, or that process with its children, had used before this attempt: microseconds.
    pub cpu_before_us: u64,
    /// The group's peak before this attempt; one that is no higher is not this attempt's.
    pub memory_peak_before_bytes: u64,
    /// When user code began, in milliseconds of CLOCK_BOOTTIME.
    pub started_boottime_ms: u64,
    /// Where the time of the start went.
    pub phases: StartPhases,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The verdict.
    pub verdict: Verdict,
    /// Of all its processes.
    pub usage: Usage,
    /// Milliseconds from the start of user code to its end.
    pub wall_ms: u64,
    /// The fences that it had.
    pub fences: Vec<String>,
    /// Microseconds from the request to the job's exec; 0: it never ran.
    pub start_us: u64,
    /// Where that time went.
    pub phases: StartPhases,
}

/// The spawner's word on how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Exit code.
    Exited(i32),
    /// Killed by this signal, which was not ours.
    Signaled(i32),
    /// By its own memory.events.
    OutOfMemory {
        /// Bytes.
        limit_bytes: u64,
        /// Bytes.
        peak_bytes: u64,
    },
    /// Its time limit.
    TimedOut,
    /// It was ended by `Stop` (and did not end by itself before).
    Stopped,
    /// The node's lease ran out.
    LeaseEnded,
    /// The host cannot or may not raise this fence.
    Refused {
        /// Its name.
        fence: String,
        /// The sentence why.
        reason: String,
    },
    /// It never ran.
    StartFailed {
        /// The step of docs/sandbox.md.
        step: String,
        /// errno(3).
        errno: i32,
    },
}

/// What all processes of an attempt used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// User and system time, milliseconds.
    pub cpu_ms: u64,
    /// The most memory at once: the group's, or the largest process's where there is no controller.
    pub memory_peak_bytes: u64,
    /// Taken from rusage, not from a controller.
    pub approximate: bool,
}

/// One path of a `Collect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Collected {
    /// A regular file; its descriptor is beside the packet.
    File {
        /// Its size when it was opened.
        length: u64,
    },
    /// Not taken: "missing", "not a regular file" ...
    Skipped {
        /// The sentence.
        reason: String,
    },
}

/// Where the time of a start went, in microseconds; zero for what was done ahead of the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPhases {
    /// The sandbox was ready before the request came.
    pub prepared: bool,
    /// Its cgroup with its limits.
    pub cgroup_us: u32,
    /// The clone of its init.
    pub clone_us: u32,
    /// Namespaces, mounts, filter.
    pub assemble_us: u32,
    /// The order, until the init had it.
    pub handover_us: u32,
    /// Copying inputs in.
    pub inputs_us: u32,
    /// From there to the job's first instruction.
    pub exec_us: u32,
}
