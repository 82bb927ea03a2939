//! One attempt as its keeper knows it, from the order to the word "forget".

use std::{os::fd::OwnedFd, rc::Rc};

use super::sandbox::{Before, Owner, Sandbox};
use crate::{
    sandbox::{cgroup::Group, status::Failure, sys},
    spawner::protocol::{AttemptKey, Ended, Event, Running, StartPhases, Usage, Verdict},
};

/// Why we are ending it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Reason {
    /// The agent's order.
    Stopped,
    /// Its time limit.
    TimedOut,
    /// The node's lease.
    LeaseEnded,
}

/// What its init told of the end.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub enum Word {
    /// User code never ran.
    Failed(Failure),
    /// The job's own status; `told`: it had been told to end by then.
    Own { raw_status: i32, told: bool },
}

/// An attempt in the keeper's table.
pub struct Attempt {
    pub key: AttemptKey,
    pub note: Vec<u8>,
    pub owner: Owner,
    pub grace_ms: u64,
    pub time_limit_ms: u64,
    pub identity: Option<u32>,
    pub fences: Vec<String>,
    /// The read ends of stdout and stderr, from when the order went to its init.
    pub pipes: Vec<Rc<OwnedFd>>,
    pub requested_us: u64,
    /// Where the working folder is, if it is on a disk.
    pub folder_on_disk: Option<std::path::PathBuf>,
    pub stage: Stage,
    /// Its entry in the keeper's timers.
    pub timer_us: Option<u64>,
}

/// How far it is.
pub enum Stage {
    /// Its init lives.
    Live(Box<Live>),
    /// Nothing of it runs.
    Over { ended: Ended, folder: Option<OwnedFd> },
}

/// What is needed while something of it may run.
pub struct Live {
    pub sandbox: Sandbox,
    /// Not handed over yet: the sandbox is being made.
    pub order: Option<PendingOrder>,
    /// When the order went to the init.
    pub sent_us: u64,
    pub phases: StartPhases,
    pub started_us: Option<u64>,
    pub ended_us: Option<u64>,
    pub word: Option<Word>,
    pub ending: Option<Reason>,
    /// The kill follows then, in microseconds of CLOCK_BOOTTIME.
    pub kill_at_us: Option<u64>,
    /// Asked to save, it gets SIGTERM then.
    pub term_at_us: Option<u64>,
    /// It was killed and is looked at again then: what does not empty is killed again, and told.
    pub look_again_at_us: Option<u64>,
    /// Its init is of the program that this process had before.
    pub is_taken_over: bool,
    /// The init is reaped; its cgroup may not be empty yet.
    pub reaped: Option<sys::Reaped>,
}

/// An order that waits for its sandbox.
pub struct PendingOrder {
    pub packet: Vec<u8>,
    /// What is too large for the packet.
    pub memory: Option<OwnedFd>,
    /// As they came with the request.
    pub descriptors: Vec<OwnedFd>,
}

impl Attempt {
    /// What the agent may know while it runs.
    pub fn running(&self, live: &Live) -> Running {
        let started_us = live.started_us.unwrap_or(self.requested_us);
        let group = live.sandbox.group.as_ref();
        Running {
            fences: self.fences.clone(),
            start_us: started_us.saturating_sub(self.requested_us),
            cgroup: group.map(|group| std::os::unix::ffi::OsStrExt::as_bytes(group.path().as_os_str()).to_vec()),
            init_pid: live.sandbox.pid,
            init_start_ticks: live.sandbox.pid_start_ticks,
            cpu_before_us: live.sandbox.before.cpu_us,
            memory_peak_before_bytes: live.sandbox.before.memory_peak_bytes,
            started_boottime_ms: started_us / 1_000,
            phases: live.phases,
        }
    }

    /// When something is due, in microseconds of CLOCK_BOOTTIME.
    pub fn due_us(&self) -> Option<u64> {
        let Stage::Live(live) = &self.stage else { return None };
        let limit = match (self.time_limit_ms, live.started_us, live.ending) {
            (1.., Some(started), None) => Some(started.saturating_add(self.time_limit_ms.saturating_mul(1_000))),
            _ => None,
        };
        [limit, live.kill_at_us, live.term_at_us, live.look_again_at_us].into_iter().flatten().min()
    }

    /// Everything of it is gone: the verdict, and where the counters of its sandbox are now. `reaped` is of all that
    /// was ever in the sandbox.
    pub fn conclude(&self, live: &Live, reaped: sys::Reaped) -> (Ended, Before) {
        let before = live.sandbox.before;
        let used = live.sandbox.group.as_ref().map(Group::used).unwrap_or_default();
        let after = Before {
            cpu_us: used.cpu_us.unwrap_or(reaped.cpu_us),
            memory_peak_bytes: used.memory_peak_bytes.unwrap_or(0),
            oom_kills: used.oom_kills,
        };
        // A peak that an earlier job made says nothing of this one, but that its own was no higher.
        let own_peak = used.memory_peak_bytes.filter(|peak| *peak > before.memory_peak_bytes);
        let usage = Usage {
            cpu_ms: after.cpu_us.saturating_sub(before.cpu_us) / 1_000,
            memory_peak_bytes: own_peak.unwrap_or(reaped.memory_peak_bytes),
            approximate: own_peak.is_none(),
        };
        let started_us = live.started_us.unwrap_or(0);
        let ended_us = live.ended_us.unwrap_or_else(sys::boottime_us);
        let oom_kills = after.oom_kills.saturating_sub(before.oom_kills);
        let ended = Ended {
            verdict: verdict(live, reaped.raw_status, oom_kills, used.memory_peak_bytes),
            usage,
            wall_ms: if started_us == 0 { 0 } else { ended_us.saturating_sub(started_us) / 1_000 },
            fences: self.fences.clone(),
            start_us: if started_us == 0 { 0 } else { started_us.saturating_sub(self.requested_us) },
            phases: live.phases,
        };
        (ended, after)
    }

    /// The `Ended` event of an attempt that is over.
    pub fn ended_event(&self) -> Option<Event> {
        match &self.stage {
            Stage::Over { ended, .. } => Some(Event::Ended { attempt: self.key, end: ended.clone() }),
            Stage::Live(_) => None,
        }
    }
}

/// A job that ended by itself keeps its own verdict; its cgroup's word on memory goes before all.
fn verdict(live: &Live, init_status: i32, oom_kills: u64, peak: Option<u64>) -> Verdict {
    if let Some(Word::Failed(failure)) = live.word {
        return Verdict::StartFailed { step: failure.step.name().to_owned(), errno: failure.errno };
    }
    if oom_kills > 0
        && let Some(limit_bytes) = live.sandbox.group.as_ref().and_then(Group::memory_limit)
    {
        return Verdict::OutOfMemory { limit_bytes, peak_bytes: peak.unwrap_or(limit_bytes) };
    }
    let ours = live.ending.map(|reason| match reason {
        Reason::Stopped => Verdict::Stopped,
        Reason::TimedOut => Verdict::TimedOut,
        Reason::LeaseEnded => Verdict::LeaseEnded,
    });
    match (live.word, ours) {
        (Some(Word::Own { raw_status, told: false }), _) | (Some(Word::Own { raw_status, .. }), None) => {
            own(raw_status)
        }
        (_, Some(ours)) => ours,
        // Its init died without a word: by the kernel or by the host's root.
        (_, None) => own(init_status),
    }
}

fn own(raw_status: i32) -> Verdict {
    if libc::WIFEXITED(raw_status) {
        Verdict::Exited(libc::WEXITSTATUS(raw_status))
    } else {
        Verdict::Signaled(libc::WTERMSIG(raw_status))
    }
}
