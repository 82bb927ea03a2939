//! An init with its job: reap until the job is over, forward the order to end, and
//! end the job itself when the node's lease or the job's time is over, also with
//! the agent and the spawner dead, stopped or wedged.

use std::{
    ffi::c_int,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signalfd::SignalFd,
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

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
    /// None: it does not end with the lease, or has been told that the lease is over.
    lease: Option<&'a LeaseView>,
    /// None: it has no limit, or has been told that it is over.
    limit_at_us: Option<u64>,
    grace_us: u64,
    /// It was told to end, by the spawner or by us.
    told: bool,
    /// It was sent SIGTERM.
    terminated: bool,
    kill_at_us: Option<u64>,
    /// By the clock of the lease: poll(2) by itself does not count the time that a host sleeps.
    alarm: Option<TimerFd>,
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
    /// The grace is over: whoever is there dies with pid 1, or by its hand.
    Grace,
    /// The spawner is gone; our parent-death signal is on its way.
    Spawner,
}

impl<'a> Watch<'a> {
    /// Of a job that began at `started_us`. One with a lease needs an [`alarm`] too.
    #[must_use]
    pub fn new(
        control: BorrowedFd<'a>,
        children: &'a SignalFd,
        job: i32,
        lease: Option<&'a LeaseView>,
        alarm: Option<TimerFd>,
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
            terminated: false,
            kill_at_us: None,
            alarm,
            used: Used::default(),
        }
    }

    fn due_us(&self) -> Option<u64> {
        let lease = self.lease.map(LeaseView::deadline_us);
        [lease, self.limit_at_us, self.kill_at_us].into_iter().flatten().min()
    }

    /// Sleeps until something is due or readable: the children, the spawner.
    fn wait(&self) -> [bool; 2] {
        let due_us = self.due_us();
        let is_armed = |alarm: &TimerFd| due_us.is_some_and(|due_us| arm(alarm, due_us).is_ok());
        let alarm = self.alarm.as_ref().filter(|alarm| is_armed(alarm));
        let timeout_ms = if alarm.is_some() { -1 } else { due_us.map_or(-1, timeout_until) };
        let [children, control, _alarm] = wait_readable(
            [Some(self.children.as_fd()), Some(self.control), alarm.map(|alarm| alarm.as_fd())],
            timeout_ms,
        );
        [children, control]
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
        (self.told, self.terminated) = (true, true);
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
        // Looked up anew: the lease may have been extended while we slept. Also while a grace runs: that is none to
        // go on beside the attempt that is placed next (FL-3).
        if let Some(end) = self.lease.map(LeaseView::deadline_us).filter(|end| now >= *end) {
            self.lease = None;
            self.end_by(end.saturating_add(TERM_MS * 1_000), &Status::LeaseEnded { boottime_us: now });
        }
        if self.limit_at_us.take_if(|at| now >= *at).is_some() {
            self.end_by(now.saturating_add(self.grace_us), &Status::TimeLimitEnded { boottime_us: now });
        }
        self.kill_at_us.is_some_and(|at| now >= at)
    }

    /// The job's own group dies here, the rest after us.
    fn end(&self) -> Over {
        signal_group(self.job, libc::SIGKILL);
        Over::Grace
    }

    /// SIGTERM, if it has not had it, and the end by then at the latest.
    fn end_by(&mut self, kill_at_us: u64, why: &Status) {
        self.kill_at_us = Some(self.kill_at_us.map_or(kill_at_us, |earlier| earlier.min(kill_at_us)));
        let _told = status::send(self.control, why, &[]);
        if !self.terminated {
            self.terminate();
        }
    }
}

/// A timer by the clock of leases. It inherits to no job.
///
/// # Errors
/// timerfd_create(2) failed.
pub fn alarm() -> Result<TimerFd, Errno> {
    TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
}

/// Reaps until the job is over.
pub fn until_over(mut watch: Watch<'_>) -> Over {
    loop {
        if let Some((raw_status, alone)) = watch.reap() {
            return Over::Job { raw_status, told: watch.told, alone, used: watch.used };
        }
        let [children, control] = watch.wait();
        if children {
            while let Ok(Some(_)) = watch.children.read_signal() {}
        }
        if control {
            match read_order(watch.control) {
                // It was told already: the lease's end comes to all of us at once.
                Some([order::TERMINATE, _]) if watch.terminated => {}
                Some([order::TERMINATE, _]) => watch.terminate(),
                Some([order::SIGNAL, signal]) => watch.ask_to_save(signal.into()),
                Some([order::KILL, _]) => return watch.end(),
                Some(_) => {}
                None => return Over::Spawner,
            }
        }
        if watch.meet_deadlines() {
            return watch.end();
        }
    }
}

fn arm(alarm: &TimerFd, due_us: u64) -> Result<(), Errno> {
    let due = TimeSpec::from_duration(Duration::from_micros(due_us));
    alarm.set(Expiration::OneShot(due), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
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

fn wait_readable<const N: usize>(descriptors: [Option<BorrowedFd<'_>>; N], timeout_ms: c_int) -> [bool; N] {
    // poll(2) passes over a negative one.
    let mut polls =
        descriptors.map(|fd| libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events: libc::POLLIN, revents: 0 });
    // SAFETY: a live array of that length.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    polls.map(|poll| poll.revents != 0)
}
