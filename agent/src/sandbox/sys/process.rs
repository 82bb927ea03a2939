//! Processes: how one begins, becomes another program, is told to end, and is
//! waited for. Rules as in the folder above: no allocation, one thread.

use std::{
    ffi::{CStr, c_char, c_int, c_long, c_void},
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::errno::Errno;

use super::{Result, check};

/// The two sides of [`clone_process`].
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the old one.
    Parent {
        /// The child's number here.
        pid: i32,
        /// Readable when it is over.
        pidfd: OwnedFd,
    },
}

/// clone3(2) with its own memory, like fork; `cgroup` is where it is born.
///
/// # Errors
/// As clone3(2).
///
/// # Safety
/// The caller has one thread. In the child, no value of the parent may be
/// dropped to an effect outside the process: it must leave by [`exit_now`] or exec.
pub unsafe fn clone_process(flags: c_int, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let mut pidfd: c_int = -1;
    // SAFETY: all zeros is a valid clone_args.
    let mut args: libc::clone_args = unsafe { MaybeUninit::zeroed().assume_init() };
    args.flags = (flags | libc::CLONE_PIDFD) as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        // linux/sched.h; libc's constant of that name overflows its type.
        args.flags |= 0x2_0000_0000;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is valid for its size, and the stack is copied, not shared.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a new descriptor there.
    Ok(Cloned::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

/// Runs `child` in a new process that shares this one's memory while this one
/// waits, until the child execs or returns (vfork(2)). Returns its pid here.
///
/// # Errors
/// As clone(2).
///
/// # Safety
/// One thread. The child may write only what the parent reads after it.
pub unsafe fn vfork_process<T>(
    stack: &mut [u8],
    child: extern "C" fn(*mut c_void) -> c_int,
    argument: &mut T,
) -> Result<i32> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: one past the end of a live slice; aligned down below.
    let top = unsafe { stack.as_mut_ptr().add(stack.len() & !15) };
    let top = top.map_addr(|address| address & !15);
    // SAFETY: the stack outlives the child, because this process waits until the child left it.
    let pid = unsafe { libc::clone(child, top.cast(), flags, (&raw mut *argument).cast()) };
    check(c_long::from(pid)).map(|pid| pid as i32)
}

/// fork(2) by the raw call, which a filter that refuses clone3(2) lets through. Returns the child's pid, 0 in the child.
///
/// # Errors
/// As clone(2).
///
/// # Safety
/// As for [`clone_process`].
pub unsafe fn fork_process() -> Result<i32> {
    let none = 0usize;
    // SAFETY: no stack and no pointers: as fork(2).
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, none, none, none, none) })?;
    Ok(pid as i32)
}

/// Leaves without running anything that was registered in the parent.
pub fn exit_now(code: c_int) -> ! {
    // SAFETY: always sound.
    unsafe { libc::_exit(code) }
}

/// execve(2): returns only the reason why not.
///
/// # Safety
/// `argv` and `envp` are null-terminated arrays of C strings.
pub unsafe fn execute(program: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> Errno {
    // SAFETY: as promised by the caller.
    unsafe { libc::execve(program.as_ptr(), argv, envp) };
    Errno::last()
}

/// How a child ended, and what it and the children that it had waited for used.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Reaped {
    /// As wait(2) returns it.
    pub raw_status: i32,
    /// User and system time, microseconds.
    pub cpu_us: u64,
    /// The most memory that one of them held.
    pub memory_peak_bytes: u64,
}

/// Waits without blocking for the child behind `pidfd`; `reap: false` leaves it a zombie.
///
/// # Errors
/// As waitid(2).
pub fn wait_pidfd(pidfd: BorrowedFd<'_>, reap: bool) -> Result<Option<Reaped>> {
    let flags = libc::WEXITED | libc::WNOHANG | if reap { 0 } else { libc::WNOWAIT };
    // SAFETY: all zeros is valid for both.
    let (mut info, mut usage): (libc::siginfo_t, libc::rusage) = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: both structs live through the call.
    check(unsafe {
        libc::syscall(libc::SYS_waitid, libc::P_PIDFD, pidfd.as_raw_fd(), &raw mut info, flags, &raw mut usage)
    })?;
    // SAFETY: waitid fills these fields; zero means that nothing ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let raw_status = match info.si_code {
        libc::CLD_EXITED => (status & 0xff) << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    };
    Ok(Some(reaped(raw_status, &usage)))
}

const fn reaped(raw_status: i32, usage: &libc::rusage) -> Reaped {
    const fn micros(time: libc::timeval) -> u64 {
        time.tv_sec.cast_unsigned() * 1_000_000 + time.tv_usec.cast_unsigned()
    }
    Reaped {
        raw_status,
        cpu_us: micros(usage.ru_utime) + micros(usage.ru_stime),
        memory_peak_bytes: usage.ru_maxrss.cast_unsigned() * 1_024,
    }
}

/// Reaps one child that has ended, whichever it is; none: those that there are live.
///
/// # Errors
/// As wait4(2): `ECHILD` if there is no child at all.
pub fn reap_any() -> Result<Option<(i32, Reaped)>> {
    let mut raw_status = 0;
    // SAFETY: all zeros is valid.
    let mut usage: libc::rusage = unsafe { MaybeUninit::zeroed().assume_init() };
    // Also children whose end raises no SIGCHLD: none may be overlooked.
    let options = libc::WNOHANG | libc::__WALL;
    // SAFETY: both live through the call; -1 is any child.
    let pid = unsafe { libc::wait4(-1, &raw mut raw_status, options, &raw mut usage) };
    let pid = check(c_long::from(pid))? as i32;
    Ok((pid != 0).then(|| (pid, reaped(raw_status, &usage))))
}

/// Whether this number is a child of this process that is not reaped.
#[must_use]
pub fn is_own_child(pid: i32) -> bool {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: all zeros is valid, and it lives through the call.
    let mut found: libc::siginfo_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: as above; nothing is reaped (WNOWAIT).
    unsafe { libc::waitid(libc::P_PID, pid.cast_unsigned(), &raw mut found, options) == 0 }
}

/// Waits until some child is over, and reaps it.
///
/// # Errors
/// As waitpid(2): `ECHILD` if there is no child at all.
pub fn wait_for_any() -> Result<()> {
    // SAFETY: no status is asked for; -1 is any child.
    check(c_long::from(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) })).map(|_| ())
}

/// Waits until this unreaped child is over; its raw status as wait(2) returns it.
///
/// # Errors
/// As waitpid(2).
pub fn wait_pid(child: i32) -> Result<i32> {
    let mut raw_status = 0;
    loop {
        // SAFETY: a valid integer.
        match check(c_long::from(unsafe { libc::waitpid(child, &raw mut raw_status, 0) })) {
            Err(Errno::EINTR) => {}
            other => return other.map(|_| raw_status),
        }
    }
}

/// SIGKILL to our own child behind `pidfd`, and waits until it is reaped: for one that runs only our code.
pub fn end_and_reap(pidfd: BorrowedFd<'_>) {
    let _already_over = signal_pidfd(pidfd, libc::SIGKILL);
    while matches!(wait_pidfd(pidfd, true), Ok(None)) {
        let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
    }
}

/// pidfd_send_signal(2).
///
/// # Errors
/// As pidfd_send_signal(2).
pub fn signal_pidfd(pidfd: BorrowedFd<'_>, signal: c_int) -> Result<()> {
    let info: *const c_void = std::ptr::null();
    // SAFETY: a null siginfo is as for kill(2).
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0) }).map(drop)
}
