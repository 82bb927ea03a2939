//! Real children under the filter. Each attempt is made without it too: what
//! the kernel then answers shows that the filter, and nothing else, refused.

use std::{
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Command, Output},
    ptr,
    time::Instant,
};

use libc::c_int;

use crate::sandbox::{
    seccomp::{Filter, is_supported},
    sys,
};

/// Names what [`a_child_that_the_other_tests_start`] does.
const PART: &str = "MUSTER_TEST_SECCOMP_PART";

/// What an attempt ends with when nothing filters it.
enum Control {
    /// With this errno, or 0, on every host.
    Always(c_int),
    /// That depends on the host's modules and settings.
    OfTheHost,
}

use Control::{Always, OfTheHost};

/// A call, what it ends with without the filter, and with it.
type Attempt = (&'static str, fn() -> c_int, Control, c_int);

/// The errno of a call, 0 if it worked.
fn errno(returned: i64) -> c_int {
    if returned < 0 { io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
}

macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {
        // SAFETY: the arguments are numbers, null or strings that live on; memory is left alone.
        errno(unsafe { libc::syscall($number $(, $argument)*) })
    };
}

fn clone_with(flags: c_int) -> c_int {
    // SAFETY: without a stack of its own this is a fork, and the child leaves at once.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        0 => sys::exit_now(0),
        ..0 => errno(pid),
        1.. => {
            // SAFETY: our own child.
            unsafe { libc::waitpid(pid as c_int, ptr::null_mut(), 0) };
            0
        }
    }
}

fn fifo_and_back() -> c_int {
    let folder = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&folder.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU)
        .map_or_else(|error| error as c_int, |()| 0)
}

fn thread_and_back() -> c_int {
    std::thread::Builder::new().spawn(|| 0).map_or(-1, |thread| thread.join().unwrap())
}

fn program_and_back() -> c_int {
    Command::new("/bin/sh")
        .args(["-c", "echo $(echo x) | cat >/dev/null"])
        .status()
        .map_or(-1, |status| i32::from(!status.success()))
}

const NOTHING: *const u8 = ptr::null();
const NO_FILE: c_int = -1;

const ATTEMPTS: &[Attempt] = &[
    ("thread", thread_and_back, Always(0), 0),
    ("program", program_and_back, Always(0), 0),
    ("clone3", || call!(libc::SYS_clone3, NOTHING, 0), Always(libc::EINVAL), libc::ENOSYS),
    ("fork", || clone_with(0), Always(0), 0),
    ("clone newuser", || clone_with(libc::CLONE_NEWUSER), OfTheHost, libc::EPERM),
    ("clone newns", || clone_with(libc::CLONE_NEWNS), OfTheHost, libc::EPERM),
    ("unshare nothing", || call!(libc::SYS_unshare, 0), Always(0), libc::EPERM),
    ("unshare newuser", || call!(libc::SYS_unshare, libc::CLONE_NEWUSER), OfTheHost, libc::EPERM),
    ("setns", || call!(libc::SYS_setns, NO_FILE, 0), Always(libc::EBADF), libc::EPERM),
    (
        "mount",
        || call!(libc::SYS_mount, NOTHING, c"/missing".as_ptr(), NOTHING, 0, NOTHING),
        Always(libc::ENOENT),
        libc::EPERM,
    ),
    ("unix", || call!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0), Always(0), 0),
    ("inet", || call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0), Always(0), 0),
    ("netlink", || call!(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0), Always(0), libc::EAFNOSUPPORT),
    ("packet", || call!(libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0), OfTheHost, libc::EAFNOSUPPORT),
    ("alg", || call!(libc::SYS_socket, libc::AF_ALG, libc::SOCK_SEQPACKET, 0), OfTheHost, libc::EAFNOSUPPORT),
    ("vsock", || call!(libc::SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0), OfTheHost, libc::EAFNOSUPPORT),
    ("TIOCSTI", || call!(libc::SYS_ioctl, NO_FILE, libc::TIOCSTI, NOTHING), Always(libc::EBADF), libc::EPERM),
    (
        "TIOCSTI + 2^32",
        || call!(libc::SYS_ioctl, NO_FILE, u64::from(libc::TIOCSTI as u32) | 1 << 32, NOTHING),
        Always(libc::EBADF),
        libc::EPERM,
    ),
    ("TIOCLINUX", || call!(libc::SYS_ioctl, NO_FILE, libc::TIOCLINUX, NOTHING), Always(libc::EBADF), libc::EPERM),
    ("FIONREAD", || call!(libc::SYS_ioctl, NO_FILE, libc::FIONREAD, NOTHING), Always(libc::EBADF), libc::EBADF),
    ("mkfifo", fifo_and_back, Always(0), 0),
    (
        "fifo nowhere",
        || call!(libc::SYS_mknodat, NO_FILE, c"x".as_ptr(), libc::S_IFIFO, 0),
        Always(libc::EBADF),
        libc::EBADF,
    ),
    (
        "character device nowhere",
        || call!(libc::SYS_mknodat, NO_FILE, c"x".as_ptr(), libc::S_IFCHR, 259),
        Always(libc::EBADF),
        libc::EPERM,
    ),
    (
        "block device nowhere",
        || call!(libc::SYS_mknodat, NO_FILE, c"x".as_ptr(), libc::S_IFBLK, 259),
        Always(libc::EBADF),
        libc::EPERM,
    ),
    ("io_uring_setup", || call!(libc::SYS_io_uring_setup, 1, NOTHING), OfTheHost, libc::ENOSYS),
    ("bpf", || call!(libc::SYS_bpf, -1, NOTHING, 0), OfTheHost, libc::EPERM),
    ("perf_event_open", || call!(libc::SYS_perf_event_open, NOTHING, 0, -1, NO_FILE, 0), OfTheHost, libc::EPERM),
    ("userfaultfd", || call!(libc::SYS_userfaultfd, -1), OfTheHost, libc::EPERM),
    ("keyctl", || call!(libc::SYS_keyctl, -1), OfTheHost, libc::EPERM),
    (
        "ptrace",
        || call!(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, c_int::MAX, NOTHING, NOTHING),
        Always(libc::ESRCH),
        libc::EPERM,
    ),
    (
        "clock_settime",
        || call!(libc::SYS_clock_settime, libc::CLOCK_REALTIME, NOTHING),
        Always(libc::EFAULT),
        libc::EPERM,
    ),
    ("adjtimex", || call!(libc::SYS_adjtimex, NOTHING), Always(libc::EFAULT), libc::EFAULT),
    ("personality?", || call!(libc::SYS_personality, u32::MAX), Always(0), 0),
    ("unknown", || call!(0x7fff), Always(libc::ENOSYS), libc::ENOSYS),
];

/// Runs the tests' program anew for one part, under the filter or not.
fn child(part: &str, filtered: bool) -> Output {
    let name = concat!(module_path!(), "::a_child_that_the_other_tests_start");
    let name = name.split_once("::").unwrap().1;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads", "1"]).env(PART, part);
    let filter = Filter::strict();
    // SAFETY: both steps are system calls.
    unsafe {
        command.pre_exec(move || {
            if filtered {
                sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
                filter.install()?;
            }
            Ok(())
        })
    };
    command.output().unwrap()
}

#[ignore = "the other tests start it"]
#[test]
fn a_child_that_the_other_tests_start() {
    match std::env::var(PART).as_deref() {
        Ok("attempts") => {
            for (name, attempt, ..) in ATTEMPTS {
                println!("\n{name}={}", attempt());
            }
        }
        Ok("x32") => drop(call!(0x4000_0000_i64 | libc::SYS_getpid)),
        #[cfg(target_arch = "x86_64")]
        Ok("i386") => {
            // The number of getpid there.
            let mut answer: u32 = 20;
            // SAFETY: a call of the 32-bit interface that takes nothing; older kernels clear these registers.
            unsafe {
                std::arch::asm!("int 0x80", inout("eax") answer, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
            println!("\ni386={answer}");
        }
        _ => {}
    }
}

fn answers(output: &Output) -> Vec<(String, c_int)> {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.filter_map(|(name, answer)| Some((name.to_owned(), answer.parse().ok()?))).collect()
}

#[test]
fn the_filter_and_nothing_else_refuses() {
    assert!(is_supported());
    let (without, with) = (answers(&child("attempts", false)), answers(&child("attempts", true)));
    assert_eq!((without.len(), with.len()), (ATTEMPTS.len(), ATTEMPTS.len()), "{with:?}");
    for ((name, _, control, expected), (without, with)) in ATTEMPTS.iter().zip(without.iter().zip(&with)) {
        assert_eq!(with.1, *expected, "{name} under the filter");
        match control {
            Always(control) => assert_eq!(without.1, *control, "{name} without the filter"),
            OfTheHost if without.1 == *expected => println!("{name}: this host refuses it without the filter too"),
            OfTheHost => {}
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn another_interface_ends_the_process() {
    assert!(child("x32", false).status.success());
    for part in ["x32", "i386"] {
        let output = child(part, true);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{part}: {output:?}");
    }
}

/// `cargo test -p muster-agent --lib what_installing_costs -- --ignored --nocapture`
#[ignore = "a measurement"]
#[test]
fn what_installing_costs() {
    const ROUNDS: usize = 500;
    let filter = Filter::strict();
    let mut costs_ns: Vec<u64> = (0..ROUNDS).map(|_| cost_ns(|| filter.install().is_ok())).collect();
    costs_ns.sort_unstable();
    let us = |per_cent: usize| costs_ns[ROUNDS * per_cent / 100] as f64 / 1e3;
    println!("install: p5 {:.1} us, p50 {:.1} us, p95 {:.1} us", us(5), us(50), us(95));
}

/// What `work` takes in a child of its own.
pub(in crate::sandbox) fn cost_ns(work: impl FnOnce() -> bool) -> u64 {
    let (read, write) = nix::unistd::pipe().unwrap();
    // SAFETY: the child makes only system calls, and leaves by exit_now.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let prepared = sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).is_ok();
        let before = Instant::now();
        let worked = work();
        let cost = before.elapsed().as_nanos() as u64;
        let told = nix::unistd::write(&write, &cost.to_ne_bytes()).is_ok();
        sys::exit_now(i32::from(!(prepared && worked && told)));
    }
    let (mut bytes, mut status) = ([0; 8], 0);
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(status, 0, "the child could not do its work");
    nix::unistd::read(&read, &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}
