//! Pid 1 of a job: a clone of the spawner without another exec. It assembles
//! what the job sees, starts it, reaps, forwards the order to end, watches the
//! lease, tells how the job ended, and by its own end takes all else with it.
//!
//! The steps are those of docs/sandbox.md, in that order; each failure names
//! its step, and nothing of the job has run then.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use nix::errno::Errno;

use super::{
    files,
    lease::{LeaseView, TERM_MS},
    mounts,
    status::{self, Failure, Status, Step},
    sys,
};
use crate::spawner::protocol::Start;

/// All that the init and the job need, resolved by the spawner before the clone.
pub struct Plan<'a> {
    /// What was asked.
    pub start: &'a Start,
    /// Descriptors beside the request.
    pub descriptors: &'a [OwnedFd],
    /// This init's end of the pair to the spawner.
    pub control: OwnedFd,
    /// The job's stdin, stdout, stderr.
    pub standard: [RawFd; 3],
    /// Its uid and gid; none: the spawner's own.
    pub identity: Option<u32>,
    /// The fences to raise.
    pub fences: &'a [&'static str],
    /// Where the strict root is assembled.
    pub root: &'a CStr,
    /// The working folder of a job that keeps the host's file system.
    pub folder: &'a CStr,
    /// The lease's page, for an exclusive job.
    pub lease: Option<BorrowedFd<'a>>,
}

/// Runs the whole life of pid 1. Returns its exit code.
pub fn run(plan: &Plan<'_>) -> c_int {
    let control = plan.control.as_fd();
    match prepare(plan).and_then(|(folder, lease)| start_job(plan, folder.as_fd()).map(|job| (folder, lease, job))) {
        Ok((folder, lease, job)) => {
            let _told =
                status::send(control, &Status::Started { boottime_us: sys::boottime_us() }, Some(folder.as_fd()));
            drop(folder);
            // Who reads the job's pipes must see their end when the job's own copies are closed.
            for fd in plan.standard {
                let _closed = sys::close_range(fd.cast_unsigned(), fd.cast_unsigned(), 0);
            }
            watch(control, job, lease.as_ref())
        }
        Err(failure) => {
            let _told = status::send(control, &Status::Failed(failure), None);
            1
        }
    }
}

fn has(plan: &Plan<'_>, fence: &str) -> bool {
    plan.fences.contains(&fence)
}

/// Everything before the job's process exists.
fn prepare(plan: &Plan<'_>) -> Result<(OwnedFd, Option<LeaseView>), Failure> {
    sys::block_all_signals(true);
    // The folders of the root get the modes that are written here, whatever umask the unit sets.
    // SAFETY: umask(2) takes no memory and cannot fail.
    unsafe { libc::umask(0o022) };
    // Ends with the spawner. If it is gone by now, its end of the pair is closed.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(Failure::at(Step::Parent))?;
    wait_for_go(plan.control.as_fd())?;
    close_all_but(&kept(plan)).map_err(Failure::at(Step::Descriptors))?;
    // A job of the same uid could otherwise open our descriptors through /proc/1/fd.
    sys::prctl(libc::PR_SET_DUMPABLE, 0).map_err(Failure::at(Step::Dumpable))?;
    become_killable_for_memory();
    if !has(plan, "ns.pid") {
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(Failure::at(Step::Parent))?;
    }
    if has(plan, "ns.net") {
        sys::raise_loopback().map_err(Failure::at(Step::Loopback))?;
    }
    if has(plan, "ns.uts") {
        sys::set_hostname(c"muster").map_err(Failure::at(Step::Hostname))?;
    }
    let folder = if has(plan, "root.readonly") {
        let (uid, bytes) = (plan.identity.unwrap_or(0), plan.start.limits.disk_bytes);
        mounts::assemble(plan.root, bytes, uid, uid).map_err(Failure::at(Step::MountRoot))?;
        sys::open(c"/work", libc::O_RDONLY | libc::O_DIRECTORY).map_err(Failure::at(Step::MountWork))?
    } else {
        sys::open(plan.folder, libc::O_RDONLY | libc::O_DIRECTORY).map_err(Failure::at(Step::Folder))?
    };
    // Not every kernel has keyrings; without them there is nothing to inherit.
    let _absent = sys::join_new_session_keyring();
    let lease = plan.lease.map(LeaseView::new).transpose().map_err(Failure::at(Step::Lease))?;
    if !plan.start.inputs.is_empty() {
        copy_inputs(plan, folder.as_fd())?;
    }
    Ok((folder, lease))
}

/// The spawner is protected from the out-of-memory killer, and a child inherits that: a job at its
/// memory limit would then hang for ever instead of being killed. Raising the score is always allowed.
fn become_killable_for_memory() {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let protected = std::fs::read_to_string(SCORE).is_ok_and(|score| score.starts_with('-'));
    if protected {
        let _kept_as_it_is = std::fs::write(SCORE, "0");
    }
}

/// The spawner maps our uid first; `G` says that it is done.
fn wait_for_go(control: BorrowedFd<'_>) -> Result<(), Failure> {
    match read_order(control) {
        Ok(Some(b'G')) => Ok(()),
        Ok(_) => Err(Failure { step: Step::Parent, errno: libc::ESRCH }),
        Err(errno) => Err(Failure::at(Step::Parent)(errno)),
    }
}

fn read_order(control: BorrowedFd<'_>) -> Result<Option<u8>, Errno> {
    let mut order = [0u8; 1];
    loop {
        match nix::unistd::read(control, &mut order) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(order[0])),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn kept(plan: &Plan<'_>) -> Vec<RawFd> {
    // 0 to 2 stay taken, so that nothing that is opened here gets a number that the job's own will replace.
    let mut kept: Vec<RawFd> = vec![0, 1, 2];
    kept.extend(plan.descriptors.iter().map(|fd| fd.as_raw_fd()));
    kept.extend(plan.standard);
    kept.push(plan.control.as_raw_fd());
    kept.extend(plan.lease.map(|lease| lease.as_raw_fd()));
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// Other attempts' pipes and the agent's socket are not ours.
fn close_all_but(kept: &[RawFd]) -> Result<(), Errno> {
    let mut next: u32 = 0;
    for fd in kept {
        let fd = fd.cast_unsigned();
        if fd > next {
            sys::close_range(next, fd - 1, 0)?;
        }
        next = fd + 1;
    }
    sys::close_range(next, u32::MAX, 0)
}

/// In a child that holds the job's uid, so that the kernel checks its rights.
fn copy_inputs(plan: &Plan<'_>, folder: BorrowedFd<'_>) -> Result<(), Failure> {
    // SAFETY: one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(0, None) }.map_err(Failure::at(Step::Inputs))? {
        sys::Cloned::Child => {
            let copied = become_job(plan).and_then(|()| files::copy_in(folder, &plan.start.inputs, plan.descriptors));
            sys::exit_now(copied.err().map_or(0, |errno| errno as c_int))
        }
        sys::Cloned::Parent { pidfd, .. } => {
            wait_readable(&[pidfd.as_raw_fd()], -1);
            match sys::wait_pidfd(pidfd.as_fd(), true) {
                Ok(Some(reaped)) if reaped.raw_status == 0 => Ok(()),
                Ok(Some(reaped)) => Err(Failure { step: Step::Inputs, errno: libc::WEXITSTATUS(reaped.raw_status) }),
                Ok(None) | Err(_) => Err(Failure { step: Step::Inputs, errno: libc::ECHILD }),
            }
        }
    }
}

fn become_job(plan: &Plan<'_>) -> Result<(), Errno> {
    if let Some(uid) = plan.identity {
        sys::drop_bounding_capabilities()?;
        sys::become_identity(uid, uid)?;
    }
    sys::keep_capabilities(0)
}

/// What the job's process needs, and where it leaves the reason if it never becomes user code.
struct Launch<'a, 'b> {
    plan: &'a Plan<'b>,
    folder: BorrowedFd<'a>,
    failure: Option<Failure>,
}

/// Of the job's process before its exec; the pages that it does not touch cost nothing.
const LAUNCH_STACK_BYTES: usize = 256 << 10;

/// The job's process: its pid here. It shares our memory until its exec, so
/// that no page is copied for it, and we wait until then.
fn start_job(plan: &Plan<'_>, folder: BorrowedFd<'_>) -> Result<i32, Failure> {
    let mut launch = Launch { plan, folder, failure: None };
    let mut stack = vec![0u8; LAUNCH_STACK_BYTES];
    // SAFETY: one thread; the child writes only `failure`, its stack and heap that nobody else uses meanwhile.
    let job =
        unsafe { sys::vfork_process(&mut stack, become_user_code, &mut launch) }.map_err(Failure::at(Step::Job))?;
    match launch.failure {
        None => {
            // Only what is needed to signal the job is kept from here on.
            let kill: u64 = if plan.identity.is_some() { 1 << 5 } else { 0 };
            sys::keep_capabilities(kill).map_err(Failure::at(Step::Capabilities))?;
            Ok(job)
        }
        Some(failure) => Err(failure),
    }
}

/// From a copy of the init to the job. Returns only if it cannot, and leaves the reason.
extern "C" fn become_user_code(launch: *mut c_void) -> c_int {
    // SAFETY: it points to the `Launch` of `start_job`, which waits until we are gone.
    let launch = unsafe { &mut *launch.cast::<Launch<'_, '_>>() };
    match enter(launch.plan, launch.folder) {
        Ok(never) => match never {},
        Err(failure) => launch.failure = Some(failure),
    }
    127
}

enum Never {}

fn enter(plan: &Plan<'_>, folder: BorrowedFd<'_>) -> Result<Never, Failure> {
    nix::unistd::setsid().map_err(Failure::at(Step::Session))?;
    // Away from 0, 1 and 2 first, so that none overwrites another.
    let high: Vec<RawFd> = plan
        .standard
        .iter()
        .map(|fd| duplicate_high(*fd))
        .collect::<Result<_, _>>()
        .map_err(Failure::at(Step::Standard))?;
    for (fd, place) in high.iter().zip(0..) {
        sys::place_descriptor(*fd, place).map_err(Failure::at(Step::Standard))?;
    }
    sys::change_folder(folder.as_raw_fd()).map_err(Failure::at(Step::WorkingFolder))?;
    // All others close at the exec.
    sys::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).map_err(Failure::at(Step::Descriptors))?;
    let limit = |resource, soft, hard| sys::limit_resource(resource, soft, hard).map_err(Failure::at(Step::Limits));
    limit(libc::RLIMIT_CORE, 0, 0)?;
    limit(libc::RLIMIT_NOFILE, 1_024, 65_536)?;
    limit(libc::RLIMIT_MEMLOCK, 8 << 20, 8 << 20)?;
    become_job(plan).map_err(Failure::at(Step::Identity))?;
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(Failure::at(Step::NoNewPrivileges))?;
    // SAFETY: umask(2) takes no memory and cannot fail.
    unsafe { libc::umask(0o077) };
    if !plan.start.working_folder.is_empty() {
        let path = CString::new(plan.start.working_folder.clone())
            .map_err(|_| Failure { step: Step::WorkingFolder, errno: libc::EINVAL })?;
        sys::change_folder_to(&path).map_err(Failure::at(Step::WorkingFolder))?;
    }
    reset_signals();
    Err(Failure::at(Step::Exec)(execute(plan)))
}

fn duplicate_high(fd: RawFd) -> Result<RawFd, Errno> {
    // SAFETY: fcntl(2) with a number.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100) };
    if copy < 0 { Err(Errno::last()) } else { Ok(copy) }
}

/// The spawner ignores SIGPIPE and blocks others; a job starts with defaults.
fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always valid; signals that cannot be set are left.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    sys::block_all_signals(false);
}

fn execute(plan: &Plan<'_>) -> Errno {
    let strings = |items: Vec<Vec<u8>>| items.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let environment =
        plan.start.environment.iter().map(|(name, value)| [name.as_slice(), b"=", value].concat()).collect();
    let (Ok(arguments), Ok(environment)) = (strings(plan.start.arguments.clone()), strings(environment)) else {
        return Errno::EINVAL;
    };
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    let mut reason = Errno::ENOENT;
    for program in candidates(plan.start) {
        // SAFETY: both arrays end in null and point to live C strings.
        match unsafe { sys::execute(&program, argv.as_ptr(), envp.as_ptr()) } {
            Errno::ENOENT | Errno::ENOTDIR => {}
            other => reason = other,
        }
    }
    reason
}

/// Where execvp(3) would look, by the job's own PATH.
fn candidates(start: &Start) -> Vec<CString> {
    let Some(program) = start.arguments.first() else { return Vec::new() };
    if program.contains(&b'/') {
        return CString::new(program.clone()).into_iter().collect();
    }
    let path =
        start.environment.iter().find(|(name, _)| name == b"PATH").map_or(&b"/usr/bin:/bin"[..], |(_, value)| value);
    path.split(|byte| *byte == b':').filter_map(|folder| CString::new([folder, b"/", program].concat()).ok()).collect()
}

/// Reaps until the job is over. Whoever outlives it dies with pid 1.
fn watch(control: BorrowedFd<'_>, job: i32, lease: Option<&LeaseView>) -> c_int {
    use nix::sys::signalfd::{SfdFlags, SigSet, SignalFd};
    let mut mask = SigSet::empty();
    mask.add(nix::sys::signal::Signal::SIGCHLD);
    let Ok(children) = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) else { return 1 };
    let (mut told, mut lease_ended) = (false, false);
    loop {
        if let Some(raw_status) = reap(job) {
            let boottime_us = sys::boottime_us();
            let _told = status::send(control, &Status::Ended { raw_status, told, boottime_us }, None);
            return 0;
        }
        let timeout = lease.map_or(-1, |lease| lease_timeout(lease, lease_ended));
        wait_readable(&[children.as_raw_fd(), control.as_raw_fd()], timeout);
        while let Ok(Some(_)) = children.read_signal() {}
        if sys::is_readable(control) {
            match read_order(control) {
                Ok(Some(status::TERMINATE)) => {
                    told = true;
                    signal_group(job, libc::SIGTERM);
                }
                Ok(Some(_)) => {}
                // The spawner is gone; the kernel's signal is on its way.
                Ok(None) | Err(_) => return 1,
            }
        }
        let Some(lease) = lease else { continue };
        let over_ms = (sys::boottime_us() / 1_000).saturating_sub(lease.deadline_ms());
        if over_ms > 0 && !lease_ended {
            (lease_ended, told) = (true, true);
            let _told = status::send(control, &Status::LeaseEnded { boottime_us: sys::boottime_us() }, None);
            signal_group(job, libc::SIGTERM);
        } else if lease_ended && over_ms >= TERM_MS {
            signal_group(job, libc::SIGKILL);
            return 0;
        }
    }
}

fn lease_timeout(lease: &LeaseView, ended: bool) -> c_int {
    let end = lease.deadline_ms().saturating_add(if ended { TERM_MS } else { 0 });
    let left = end.saturating_sub(sys::boottime_us() / 1_000) + 1;
    c_int::try_from(left).unwrap_or(c_int::MAX)
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

fn wait_readable(descriptors: &[RawFd], timeout_ms: c_int) {
    let mut polls: Vec<libc::pollfd> =
        descriptors.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: a live array of that length.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
}
