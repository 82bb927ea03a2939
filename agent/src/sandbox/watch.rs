//! An init with its job: reap until the job is over, forward the order to end, and
//! end the job itself when the node's lease or the job's time is over, also with
//! the agent and the spawner dead, stopped or wedged.

use std::{
    ffi::c_int,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use nix::{errno::Errno, sys::signalfd::SignalFd};

use super::{
    lease::{LeaseView, TERM_MS},
    order::{self, Order},
    status::{self, Status},
    sys,
};

/// How much later than the spawner the init ends a job at its time limit: it acts only if the spawner does not.
const LIMIT_LAG_MS: u64 = 1_000;

/// A running job as its init sees it.
pub struct Watch<'a> {
    control: BorrowedFd<'a>,
    children: &'a SignalFd,
    job: i32,
    lease: Option<&'a LeaseView>,
    limit_at_us: Option<u64>,
    grace_us: u64,
    /// It was told to end, by the spawner or by us.
    told: bool,
    kill_at_us: Option<u64>,
    used: Used,
}

/// What all that was reaped has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// User and system time, microseconds.
    pub cpu_us: u64,
    /// The most memory that one of them held.
    pub memory_peak_bytes: u64,
}

/// How the watch ended.
#[derive(Clone, Copy, Debug)]
pub enum Over {
    /// The job's own process is over.
    Job {
        /// As wait(2) returned it.
        raw_status: i32,
        /// It had been told to end by then.
        told: bool,
        /// Others are there: processes that it has left.
        alone: bool,
        /// Of what was reaped so far.
        used: Used,
    },
    /// The grace is over: whoever is there dies with pid 1.
    Grace,
    /// The spawner is gone; our parent-death signal is on its way.
    Spawner,
}

impl<'a> Watch<'a> {
    /// Of a job that began at `started_us`.
    #[must_use]
    pub fn new(
        control: BorrowedFd<'a>,
        children: &'a SignalFd,
        job: i32,
        lease: Option<&'a LeaseView>,
        order: &Order<'_>,
        started_us: u64,
    ) -> Self {
        let limit_ms = order.time_limit_ms.saturating_add(LIMIT_LAG_MS);
        let limit_at_us = (order.time_limit_ms > 0).then(|| started_us.saturating_add(limit_ms.saturating_mul(1_000)));
        let grace_us = order.grace_ms.saturating_mul(1_000);
        Self {
            control,
            children,
            job,
            lease,
            limit_at_us,
            grace_us,
            told: false,
            kill_at_us: None,
            used: Used::default(),
        }
    }

    fn due_us(&self) -> Option<u64> {
        if self.kill_at_us.is_some() {
            return self.kill_at_us;
        }
        let lease = self.lease.map(LeaseView::deadline_us);
        [lease, self.limit_at_us].into_iter().flatten().min()
    }

    /// Reaps all that has ended; the job's raw status, if it is among them, and whether nobody else is there.
    fn reap(&mut self) -> Option<(i32, bool)> {
        let mut job = None;
        loop {
            match sys::reap_any() {
                Ok(Some((pid, reaped))) => {
                    self.used.cpu_us += reaped.cpu_us;
                    self.used.memory_peak_bytes = self.used.memory_peak_bytes.max(reaped.memory_peak_bytes);
                    if pid == self.job {
                        job = Some(reaped.raw_status);
                    }
                }
                Ok(None) => return job.map(|raw_status| (raw_status, false)),
                Err(errno) => return job.map(|raw_status| (raw_status, errno == Errno::ECHILD)),
            }
        }
    }

    fn terminate(&mut self) {
        self.told = true;
        signal_group(self.job, libc::SIGTERM);
    }

    /// Its end is ordered from here on, whatever it makes of the signal.
    fn ask_to_save(&mut self, signal: c_int) {
        self.told = true;
        signal_group(self.job, signal);
    }

    /// True: time to go, and to take all else along.
    fn meet_deadlines(&mut self) -> bool {
        let now = sys::boottime_us();
        if let Some(kill_at) = self.kill_at_us {
            return now >= kill_at;
        }
        // Looked up anew: the lease may have been extended while we slept.
        let lease_end = self.lease.map(LeaseView::deadline_us).filter(|end| now >= *end);
        let limit = self.limit_at_us.filter(|at| now >= *at);
        let (status, kill_at_us) = match (lease_end, limit) {
            (Some(end), _) => (Status::LeaseEnded { boottime_us: now }, end.saturating_add(TERM_MS * 1_000)),
            (None, Some(_)) => (Status::TimeLimitEnded { boottime_us: now }, now.saturating_add(self.grace_us)),
            (None, None) => return false,
        };
        self.kill_at_us = Some(kill_at_us);
        let _told = status::send(self.control, &status, &[]);
        self.terminate();
        false
    }
}

/// Reaps until the job is over.
pub fn until_over(mut watch: Watch<'_>) -> Over {
    loop {
        if let Some((raw_status, alone)) = watch.reap() {
            return Over::Job { raw_status, told: watch.told, alone, used: watch.used };
        }
        let timeout_ms = watch.due_us().map_or(-1, timeout_until);
        let [children, control] = wait_readable([watch.children.as_fd(), watch.control], timeout_ms);
        if children {
            while let Ok(Some(_)) = watch.children.read_signal() {}
        }
        if control {
            match read_order(watch.control) {
                Some([order::TERMINATE, _]) => watch.terminate(),
                Some([order::SIGNAL, signal]) => watch.ask_to_save(signal.into()),
                Some(_) => {}
                None => return Over::Spawner,
            }
        }
        if watch.meet_deadlines() {
            signal_group(watch.job, libc::SIGKILL);
            return Over::Grace;
        }
    }
}

fn timeout_until(due_us: u64) -> c_int {
    let left_ms = due_us.saturating_sub(sys::boottime_us()).div_ceil(1_000);
    c_int::try_from(left_ms).unwrap_or(c_int::MAX)
}

/// The job made its own session, so its group has its number; we are its unreaped parent.
fn signal_group(job: i32, signal: c_int) {
    // SAFETY: kill(2) takes no memory.
    unsafe { libc::kill(-job, signal) };
}

/// One packet of a byte, or of a byte and its argument; none at the other side's end.
fn read_order(control: BorrowedFd<'_>) -> Option<[u8; 2]> {
    let mut order = [0u8; 2];
    loop {
        match nix::unistd::read(control, &mut order) {
            Ok(1 | 2) => return Some(order),
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return None,
        }
    }
}

fn wait_readable(descriptors: [BorrowedFd<'_>; 2], timeout_ms: c_int) -> [bool; 2] {
    let mut polls = descriptors.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: a live array of that length.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    polls.map(|poll| poll.revents != 0)
}
