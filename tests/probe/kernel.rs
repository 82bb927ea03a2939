//! The kernel's surface: administration, the clock, keys, terminals, and calls that a job has no use for.

use std::{
    fs::{self, OpenOptions},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
};

use crate::{
    Facts,
    sys::{
        self,
        Arg::{self, Memory, Number, Text},
    },
    tell::{self, Outcome, tell, tell_value},
};

/// What only the host's administrator may. Where it is allowed, each is asked for something that changes nothing.
pub fn administration(_: &Facts) {
    let mut nothing = [0u8; 64];
    tell("init-module", sys::call(libc::SYS_init_module, &mut [Memory(&mut nothing), Number(64), Text(c"")]));
    tell("finit-module", sys::call(libc::SYS_finit_module, &mut [Number(0), Text(c""), Number(0)]));
    tell("delete-module", sys::call(libc::SYS_delete_module, &mut [Text(c"no_such_module"), Number(0)]));
    tell("kexec-load", sys::call_numbers(libc::SYS_kexec_load, [0, 0, 0, 0]));
    // LINUX_REBOOT_CMD_CAD_OFF: whether ctrl-alt-del reboots; off is what a server has.
    tell("reboot", sys::call_numbers(libc::SYS_reboot, [0xfee1_dead, 672_274_793, 0, 0]));
    tell("swapon", sys::call(libc::SYS_swapon, &mut [Text(c"/no/such/swap"), Number(0)]));
    tell("swapoff", sys::call(libc::SYS_swapoff, &mut [Text(c"/no/such/swap")]));
    tell("acct", sys::call_numbers(libc::SYS_acct, [0]));
    // Q_GETFMT for users, of a device that is not there.
    tell(
        "quotactl",
        sys::call(libc::SYS_quotactl, &mut [Number(0x8000_0400), Text(c"/no/such/device"), Number(0), Number(0)]),
    );
    tell("syslog", sys::call_numbers(libc::SYS_syslog, [9, 0, 0]));
    tell("iopl", sys::errno_of_child(|| sys::call_numbers(libc::SYS_iopl, [3])));
    tell("vhangup", sys::errno_of_child(|| sys::call_numbers(libc::SYS_vhangup, [])));
    tell("set-domain-name", sys::call(libc::SYS_setdomainname, &mut [Text(c"(none)"), Number(6)]));
}

/// Setting the clock to what it is.
pub fn clock(_: &Facts) {
    let mut now = [0u8; 16];
    let real = i64::from(libc::CLOCK_REALTIME);
    tell("read", sys::call(libc::SYS_clock_gettime, &mut [Number(real), Memory(&mut now)]));
    tell("clock-settime", sys::call(libc::SYS_clock_settime, &mut [Number(real), Memory(&mut now)]));
    let mut now_us = [0u8; 16];
    tell("read-day", sys::call(libc::SYS_gettimeofday, &mut [Memory(&mut now_us), Number(0)]));
    tell("settimeofday", sys::call(libc::SYS_settimeofday, &mut [Memory(&mut now_us), Number(0)]));
    // A `struct timex` whose modes say ADJ_TICK: 10,000 microseconds, which is what it is.
    let mut timex = [0u8; 208];
    timex[..4].copy_from_slice(&0x4000u32.to_ne_bytes());
    timex[88..96].copy_from_slice(&10_000i64.to_ne_bytes());
    tell("adjtimex", sys::call(libc::SYS_adjtimex, &mut [Memory(&mut timex)]));
    let mut timex = [0u8; 208];
    tell("read-adjustment", sys::call(libc::SYS_clock_adjtime, &mut [Number(real), Memory(&mut timex)]));
}

/// Calls that widen the kernel's surface, and other ABIs of the same machine.
pub fn surface(_: &Facts) {
    // BPF_PROG_TYPE_SOCKET_FILTER with no instructions: refused by content only where it is allowed at all.
    let mut attributes = [0u8; 128];
    attributes[0] = 1;
    tell("bpf", sys::call(libc::SYS_bpf, &mut [Number(5), Memory(&mut attributes), Number(128)]));
    // A software clock on oneself: what an unprivileged user is most often allowed.
    let mut event = [0u8; 112];
    event[0] = 1;
    event[4] = 112;
    event[40] = 0x61;
    tell(
        "perf-event-open",
        sys::call(libc::SYS_perf_event_open, &mut [Memory(&mut event), Number(0), Number(-1), Number(-1), Number(0)]),
    );
    // UFFD_USER_MODE_ONLY, which needs no privilege.
    tell("userfaultfd", sys::call_numbers(libc::SYS_userfaultfd, [1]));
    let mut ring = [0u8; 120];
    tell("io-uring-setup", sys::call(libc::SYS_io_uring_setup, &mut [Number(1), Memory(&mut ring)]));
    tell("fanotify-init", sys::call_numbers(libc::SYS_fanotify_init, [0x200, 0]));
    let mut handle = [0u8; 136];
    handle[0] = 128;
    let mut mount = [0u8; 4];
    let here = i64::from(libc::AT_FDCWD);
    tell(
        "name-to-handle",
        sys::call(
            libc::SYS_name_to_handle_at,
            &mut [Number(here), Text(c"/usr"), Memory(&mut handle), Memory(&mut mount), Number(0)],
        ),
    );
    tell("open-by-handle", sys::call(libc::SYS_open_by_handle_at, &mut [Number(here), Memory(&mut handle), Number(0)]));
    // READ_IMPLIES_EXEC: all memory becomes code.
    tell("personality", sys::errno_of_child(|| sys::call_numbers(libc::SYS_personality, [0x0040_0000])));
    tell("modify-ldt", sys::call_numbers(libc::SYS_modify_ldt, [0, 0, 0]));
    tell("pidfd-getfd", sys::call_numbers(libc::SYS_pidfd_getfd, [-1, 0, 0]));
    tell("lookup-dcookie", sys::call_numbers(libc::SYS_lookup_dcookie, [0, 0, 0]));
    tell("unknown-call", sys::call_numbers(4_000, [0, 0, 0]));
    tell_value("i386", sys::in_child(call_i386));
    // Bit 30 of the number is the x32 ABI.
    tell_value("x32", sys::in_child(|| sys::call_numbers(0x4000_0000 + libc::SYS_getpid, []).map_or(1, |_| 0)));
}

/// getpid(2) of the 32-bit table; 0 if the kernel has run it.
#[cfg(target_arch = "x86_64")]
fn call_i386() -> i32 {
    let mut result: i64 = 20;
    // SAFETY: the call takes no argument and touches no memory.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
    };
    i32::from(result <= 0)
}

#[cfg(not(target_arch = "x86_64"))]
fn call_i386() -> i32 {
    1
}

/// The kernel's keyrings.
pub fn keys(_: &Facts) {
    // Special key numbers of keyctl(2): -3 is the session keyring; operation 0 tells its id.
    let text = [Text(c"user"), Text(c"hostile"), Text(c"x"), Number(1), Number(-3)];
    let added = sys::call(libc::SYS_add_key, &mut { text });
    tell("add-key", added);
    if let Ok(key) = added {
        // KEYCTL_INVALIDATE: nothing stays behind where it was allowed.
        let _gone = sys::call_numbers(libc::SYS_keyctl, [21, key]);
    }
    tell(
        "request-key",
        sys::call(libc::SYS_request_key, &mut [Text(c"user"), Text(c"muster-hostile-planted"), Number(0), Number(0)]),
    );
    tell_value("session-keyring", sys::call_numbers(libc::SYS_keyctl, [0, -3, 0]));
    tell_value(
        "read-planted",
        sys::call(
            libc::SYS_keyctl,
            &mut [Number(10), Number(-3), Text(c"user"), Text(c"muster-hostile-planted"), Number(0)],
        ),
    );
    tell_value("all-keys", tell::of(fs::read_to_string("/proc/keys")).map(|text| text.lines().count()));
}

/// Characters into a terminal, by every descriptor that might be one. `own=yes`: a terminal of its own first.
pub fn terminal(facts: &Facts) {
    let own = if facts.text("own") == "yes" { own_terminal() } else { Err(libc::ENOTTY) };
    let session = sys::call_numbers(libc::SYS_getsid, [0]).map(|session| session == i64::from(std::process::id()));
    tell_value("leads-its-session", session);
    for fd in 0..3 {
        push(&format!("descriptor-{fd}"), fd);
    }
    let terminal = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/tty");
    match tell::of(terminal) {
        Ok(file) => push("controlling", i64::from(file.as_raw_fd())),
        Err(errno) => tell("controlling-push", Err::<(), _>(errno)),
    }
    drop(own);
}

fn push(name: &str, fd: i64) {
    let ioctl = |call: u64, bytes: &mut [u8]| {
        let call = i64::try_from(call).expect("a small number");
        sys::call(libc::SYS_ioctl, &mut [Number(fd), Number(call), Memory(bytes)])
    };
    tell(&format!("{name}-push"), ioctl(libc::TIOCSTI, &mut [b'x']));
    // TIOCLINUX; sub-code 2 begins a selection (ioctl_console(2)).
    tell(&format!("{name}-console"), ioctl(0x541c, &mut [2u8; 16]));
}

/// A pseudo terminal that controls a session of our own, as descriptor 0.
fn own_terminal() -> Outcome<fs::File> {
    let master = tell::of(OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/ptmx"))?;
    let fd = i64::from(master.as_raw_fd());
    let ioctl = |fd: i64, call: u64, argument: Arg<'_>| {
        sys::call(libc::SYS_ioctl, &mut [Number(fd), Number(i64::try_from(call).expect("a small number")), argument])
    };
    ioctl(fd, libc::TIOCSPTLCK, Memory(&mut [0; 4]))?;
    let slave = ioctl(fd, libc::TIOCGPTPEER, Number(i64::from(libc::O_RDWR | libc::O_NOCTTY)))?;
    let _leads_already = sys::call_numbers(libc::SYS_setsid, []);
    ioctl(slave, libc::TIOCSCTTY, Number(0))?;
    sys::call_numbers(libc::SYS_dup2, [slave, 0])?;
    Ok(master)
}
