//! The second half of an init's life: reap until the job is over, forward the
//! order to end, and end the job itself when the node's lease or the job's time is
//! over, also with the agent and the spawner dead, stopped or wedged.

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
    lease: Option<LeaseView>,
    limit_at_us: Option<u64>,
    grace_us: u64,
    /// It was told to end, by the spawner or by us.
    told: bool,
    kill_at_us: Option<u64>,
}

impl<'a> Watch<'a> {
    /// Of a job that began at `started_us`.
    #[must_use]
    pub fn new(
        control: BorrowedFd<'a>,
        children: &'a SignalFd,
        job: i32,
        lease: Option<LeaseView>,
        order: &Order<'_>,
        started_us: u64,
    ) -> Self {
        let limit_ms = order.time_limit_ms.saturating_add(LIMIT_LAG_MS);
        let limit_at_us = (order.time_limit_ms > 0).then(|| started_us.saturating_add(limit_ms.saturating_mul(1_000)));
        let grace_us = order.grace_ms.saturating_mul(1_000);
        Self { control, children, job, lease, limit_at_us, grace_us, told: false, kill_at_us: None }
    }

    fn due_us(&self) -> Option<u64> {
        if self.kill_at_us.is_some() {
            return self.kill_at_us;
        }
        let lease = self.lease.as_ref().map(lease_end_us);
        [lease, self.limit_at_us].into_iter().flatten().min()
    }

    fn terminate(&mut self) {
        self.told = true;
        signal_group(self.job, libc::SIGTERM);
    }

    /// True: time to go, and to take all else along.
    fn meet_deadlines(&mut self) -> bool {
        let now = sys::boottime_us();
        if let Some(kill_at) = self.kill_at_us {
            return now >= kill_at;
        }
        // Looked up anew: the lease may have been extended while we slept.
        let lease_end = self.lease.as_ref().map(lease_end_us).filter(|end| now >= *end);
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

/// Reaps until the job is over; whoever outlives it dies with pid 1. Returns the init's exit code.
pub fn until_over(mut watch: Watch<'_>) -> c_int {
    loop {
        if let Some(raw_status) = reap(watch.job) {
            let ended = Status::Ended { raw_status, told: watch.told, boottime_us: sys::boottime_us() };
            let _told = status::send(watch.control, &ended, &[]);
            return 0;
        }
        let timeout_ms = watch.due_us().map_or(-1, timeout_until);
        let [children, control] = wait_readable([watch.children.as_fd(), watch.control], timeout_ms);
        if children {
            while let Ok(Some(_)) = watch.children.read_signal() {}
        }
        if control {
            match read_order(watch.control) {
                Some(order::TERMINATE) => watch.terminate(),
                Some(_) => {}
                // The spawner is gone; our parent-death signal is on its way.
                None => return 1,
            }
        }
        if watch.meet_deadlines() {
            signal_group(watch.job, libc::SIGKILL);
            return 0;
        }
    }
}

fn lease_end_us(lease: &LeaseView) -> u64 {
    lease.deadline_ms().saturating_mul(1_000)
}

fn timeout_until(due_us: u64) -> c_int {
    let left_ms = due_us.saturating_sub(sys::boottime_us()).div_ceil(1_000);
    c_int::try_from(left_ms).unwrap_or(c_int::MAX)
}

/// Reaps all that has ended; the job's raw status, if it is among them.
fn reap(job: i32) -> Option<i32> {
    let mut ended = None;
    loop {
        let mut raw_status = 0;
        // SAFETY: a valid integer; -1 is any child.
        let pid = unsafe { libc::waitpid(-1, &raw mut raw_status, libc::WNOHANG) };
        if pid <= 0 {
            return ended;
        }
        if pid == job {
            ended = Some(raw_status);
        }
    }
}

/// The job made its own session, so its group has its number; we are its unreaped parent.
fn signal_group(job: i32, signal: c_int) {
    // SAFETY: kill(2) takes no memory.
    unsafe { libc::kill(-job, signal) };
}

/// One byte; none at the other side's end.
fn read_order(control: BorrowedFd<'_>) -> Option<u8> {
    let mut order = [0u8; 1];
    loop {
        match nix::unistd::read(control, &mut order) {
            Ok(1) => return Some(order[0]),
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
