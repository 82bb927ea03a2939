//! System calls as the kernel takes them: what a library would refuse to send is sent here.

use std::ffi::{CStr, CString, c_int, c_long};

use crate::tell::Outcome;

/// One argument of a system call.
pub enum Arg<'a> {
    /// A number, also a null pointer.
    Number(i64),
    /// A string.
    Text(&'a CStr),
    /// Memory that the kernel reads or writes; it is told its length by another argument.
    Memory(&'a mut [u8]),
}

use Arg::{Memory, Number, Text};

/// Any system call.
pub fn call(number: c_long, arguments: &mut [Arg<'_>]) -> Outcome<i64> {
    let mut raw = [0i64; 6];
    for (place, argument) in raw.iter_mut().zip(arguments) {
        *place = match argument {
            Number(number) => *number,
            Text(text) => text.as_ptr() as i64,
            Memory(bytes) => bytes.as_mut_ptr() as i64,
        };
    }
    // SAFETY: pointers are of live memory of the length that the caller passes; a call that would
    // change our own memory map or threads in a way that Rust does not expect is made in a child.
    let result = unsafe { libc::syscall(number, raw[0], raw[1], raw[2], raw[3], raw[4], raw[5]) };
    if result < 0 { Err(last_errno()) } else { Ok(result) }
}

/// A call whose arguments are numbers.
pub fn call_numbers<const N: usize>(number: c_long, arguments: [i64; N]) -> Outcome<i64> {
    call(number, &mut arguments.map(Number))
}

/// errno(3) of this thread.
pub fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A C string of a text without NUL.
pub fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL in a fact or a constant")
}

/// A child by clone(2) with these flags, without shared memory. It runs `work` and ends.
pub fn fork(flags: c_int, work: impl FnOnce() -> c_int) -> Outcome<i32> {
    let flags = i64::from(flags | libc::SIGCHLD);
    match call_numbers(libc::SYS_clone, [flags, 0, 0, 0, 0])? {
        0 => exit_now(work()),
        pid => Ok(i32::try_from(pid).expect("a pid")),
    }
}

/// Ends this process at once.
pub fn exit_now(code: c_int) -> ! {
    // SAFETY: takes no memory and does not return.
    unsafe { libc::_exit(code) }
}

/// Waits for a child: its raw status.
pub fn wait(pid: i32) -> Outcome<c_int> {
    let mut status = 0;
    loop {
        // SAFETY: a valid integer.
        let done = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        match (done, last_errno()) {
            (-1, libc::EINTR) => {}
            (-1, errno) => return Err(errno),
            _ => return Ok(status),
        }
    }
}

/// How a child ended, in words.
pub fn status_text(status: c_int) -> String {
    match (libc::WIFEXITED(status), libc::WTERMSIG(status)) {
        (true, _) => format!("exit {}", libc::WEXITSTATUS(status)),
        (false, libc::SIGSYS) => "SIGSYS".to_owned(),
        (false, signal) => format!("signal {signal}"),
    }
}

/// Runs `work` in a child, where it may be killed for it: how that ended.
pub fn in_child(work: impl FnOnce() -> c_int) -> Outcome<String> {
    fork(0, work).and_then(wait).map(status_text)
}

/// A try that is made in a child: the child's own errno.
pub fn errno_of_child(work: impl FnOnce() -> Outcome<i64>) -> Outcome<i64> {
    let status = fork(0, || work().err().unwrap_or(0)).and_then(wait)?;
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(0),
        (true, errno) => Err(errno),
        (false, _) => Err(libc::EINTR),
    }
}

/// Ignores a signal.
pub fn ignore(signal: c_int) {
    // SAFETY: SIG_IGN is always valid.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// The default again: the language's own runtime handles some.
pub fn restore(signal: c_int) {
    // SAFETY: SIG_DFL is always valid.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Blocks every signal that can be blocked.
pub fn block_all_signals() {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset(3) initialises the set that sigprocmask(2) then reads.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
    }
}

/// Stays until it is killed.
pub fn stay() -> ! {
    loop {
        // SAFETY: takes no memory.
        unsafe { libc::pause() };
    }
}

/// Anonymous memory of this size; every page is written if `touched`.
pub fn map(bytes: usize, touched: bool) -> Outcome<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping that nobody else knows; it is never unmapped.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(last_errno());
    }
    for page in (0..if touched { bytes } else { 1 }).step_by(4_096) {
        // SAFETY: inside the mapping.
        unsafe { start.cast::<u8>().add(page).write_volatile(1) };
    }
    Ok(())
}

/// The effective uid.
pub fn euid() -> u32 {
    // SAFETY: takes no memory and cannot fail.
    unsafe { libc::geteuid() }
}
