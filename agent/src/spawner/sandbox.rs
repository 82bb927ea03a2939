//! One sandbox as its keeper holds it: its init, and all that was made with it.
//! Made for a shape, not for a job: it may wait ready-made until one comes.

use std::{os::fd::OwnedFd, path::PathBuf, rc::Rc};

use super::protocol::Start;
use crate::sandbox::{cgroup::Group, fences::FenceSet};

/// What must be decided before a sandbox is made; all else comes with the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Its fences.
    pub fences: FenceSet,
    /// Bytes of its private folders; 0 if it has none.
    pub disk_bytes: u64,
}

/// Who submitted a job: what one owner's job has left as new, another job of the same owner may use, and nobody else's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner(Rc<[u8]>);

impl Owner {
    /// Of a start.
    #[must_use]
    pub fn of(start: &Start) -> Self {
        Self(start.owner.as_slice().into())
    }

    /// Nobody knows whose: what is left is nobody's.
    #[must_use]
    pub fn unknown() -> Self {
        Self([].into())
    }

    /// Whether it is known.
    #[must_use]
    pub fn is_known(&self) -> bool {
        !self.0.is_empty()
    }

    /// For the next program of this spawner.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Owner {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

/// How long each part of making it took, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    pub cgroup_us: u32,
    pub clone_us: u32,
    pub assemble_us: u32,
}

/// An init, waiting or with its job.
pub struct Sandbox {
    /// Of its descriptors in the keeper's epoll.
    pub token: u64,
    pub shape: Shape,
    pub control: OwnedFd,
    pub pidfd: OwnedFd,
    pub pid: u32,
    /// Field 22 of /proc/PID/stat, from the clock: a little less than the kernel says at most.
    pub pid_start_ticks: u64,
    pub group: Option<Group>,
    /// Its uid and gid; none: the spawner's own.
    pub identity: Option<u32>,
    /// The working folder, from when it is ready.
    pub folder: Option<OwnedFd>,
    /// Where the working folder is, if it is on a disk.
    pub folder_on_disk: Option<PathBuf>,
    /// Its network namespace, for the owner's next job.
    pub network: Option<Rc<OwnedFd>>,
    pub made: Made,
    /// What earlier jobs in it have used: what its counters show of others than the one that runs.
    pub before: Before,
}

/// Counters of a sandbox at the start of its job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Before {
    pub cpu_us: u64,
    pub memory_peak_bytes: u64,
    pub oom_kills: u64,
}

/// Microseconds between two times of the clock that counts suspend.
#[must_use]
pub fn between(from_us: u64, to_us: u64) -> u32 {
    u32::try_from(to_us.saturating_sub(from_us)).unwrap_or(u32::MAX)
}
