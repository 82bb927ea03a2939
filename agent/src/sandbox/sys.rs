//! System calls that no library wraps the way a clone of a single-threaded
//! process needs them: nothing here allocates, none asks libc for the thread.
//! Every `unsafe` of the sandbox that is only a call lives here.

mod process;

use std::{
    ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void},
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::errno::Errno;
pub use process::{
    Cloned, Reaped, clone_process, end_and_reap, execute, exit_now, fork_process, is_own_child, reap_any, signal_pidfd,
    vfork_process, wait_for_any, wait_pid, wait_pidfd,
};

/// What these calls return.
pub type Result<T> = std::result::Result<T, Errno>;

fn check(returned: c_long) -> Result<c_long> {
    if returned < 0 { Err(Errno::last()) } else { Ok(returned) }
}

/// setns(2).
///
/// # Errors
/// As setns(2).
pub fn enter_namespace(namespace: BorrowedFd<'_>, kind: c_int) -> Result<()> {
    // SAFETY: a live descriptor.
    check(c_long::from(unsafe { libc::setns(namespace.as_raw_fd(), kind) })).map(drop)
}

/// unshare(2).
///
/// # Errors
/// As unshare(2).
pub fn unshare(flags: c_int) -> Result<()> {
    // SAFETY: takes no memory.
    check(c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

/// mount(2).
///
/// # Errors
/// As mount(2).
pub fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: c_ulong, data: &CStr) -> Result<()> {
    // SAFETY: four C strings that live through the call.
    check(c_long::from(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    }))
    .map(drop)
}

/// mount_setattr(2) of a mount point: sets these attributes, on all below it too if `recursive`.
///
/// # Errors
/// As mount_setattr(2).
pub fn mount_set(target: &CStr, attributes: u64, recursive: bool) -> Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns: u64,
    }
    let attr = MountAttr { set: attributes, clear: 0, propagation: 0, userns: 0 };
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: a C string and a struct of the size that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            target.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// umount2(2) with MNT_DETACH.
///
/// # Errors
/// As umount2(2).
pub fn detach(target: &CStr) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) })).map(drop)
}

/// pivot_root(2).
///
/// # Errors
/// As pivot_root(2).
pub fn pivot_root(new: &CStr, old: &CStr) -> Result<()> {
    // SAFETY: two C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, new.as_ptr(), old.as_ptr()) }).map(drop)
}

/// The root of the message queues of this IPC namespace (mq_overview(7)), mounted nowhere, and what holds it: letting
/// go of the mount makes the kernel wait for all processors, so it is kept for as long as the folder.
///
/// # Errors
/// As fsopen(2), fsconfig(2), fsmount(2) or openat(2).
pub fn open_message_queues() -> Result<[OwnedFd; 2]> {
    const FSOPEN_CLOEXEC: c_uint = 1;
    const FSCONFIG_CMD_CREATE: c_uint = 6;
    const FSMOUNT_CLOEXEC: c_uint = 1;
    let none = std::ptr::null::<c_char>();
    // SAFETY: a C string; the descriptor is new.
    let context = unsafe {
        let fd = check(libc::syscall(libc::SYS_fsopen, c"mqueue".as_ptr(), FSOPEN_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd as RawFd)
    };
    // SAFETY: this command takes no key and no value; the descriptor is new.
    let mount = unsafe {
        check(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0))?;
        let fd = check(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0))?;
        OwnedFd::from_raw_fd(fd as RawFd)
    };
    Ok([open_at(mount.as_fd(), c".", libc::O_RDONLY | libc::O_DIRECTORY)?, mount])
}

/// Does this IPC namespace hold no shared memory, no semaphores and no queue of System V?
pub fn has_no_system_v_objects() -> bool {
    const SHM_INFO: c_int = 14;
    // As sys/shm.h has it; the kernel writes no more than this.
    let mut shared = [0u64; 16];
    // SAFETY: all zeros is valid for both.
    let (mut queues, mut semaphores): (libc::msginfo, libc::seminfo) = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: each struct is as large as its call writes, and lives through it.
    let answers = unsafe {
        [
            libc::shmctl(0, SHM_INFO, shared.as_mut_ptr().cast()),
            libc::msgctl(0, libc::MSG_INFO, (&raw mut queues).cast()),
            libc::semctl(0, 0, libc::SEM_INFO, &raw mut semaphores),
        ]
    };
    // The number of segments is the first int of its struct, of queues in `msgpool`, of sets in `semusz`.
    answers.iter().all(|answer| *answer >= 0)
        && shared[0] & u64::from(u32::MAX) == 0
        && queues.msgpool == 0
        && semaphores.semusz == 0
}

/// mkdirat(2) by a name of one component.
///
/// # Errors
/// As mkdirat(2).
pub fn make_folder_at(folder: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<()> {
    // SAFETY: a descriptor and a C string.
    check(c_long::from(unsafe { libc::mkdirat(folder.as_raw_fd(), name.as_ptr(), mode) })).map(drop)
}

/// mkdir(2).
///
/// # Errors
/// As mkdir(2).
pub fn make_folder(path: &CStr, mode: u32) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::mkdir(path.as_ptr(), mode) })).map(drop)
}

/// chmod(2), which no umask lessens.
///
/// # Errors
/// As chmod(2).
pub fn change_mode(path: &CStr, mode: u32) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::chmod(path.as_ptr(), mode) })).map(drop)
}

/// mknod(2) of a character device.
///
/// # Errors
/// As mknod(2).
pub fn make_device(path: &CStr, mode: u32, major: u32, minor: u32) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | mode, libc::makedev(major, minor)) }))?;
    change_mode(path, mode)
}

/// chown(2).
///
/// # Errors
/// As chown(2).
pub fn change_owner(path: &CStr, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::chown(path.as_ptr(), uid, gid) })).map(drop)
}

/// fchown(2).
///
/// # Errors
/// As fchown(2).
pub fn change_owner_of(file: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: a live descriptor.
    check(c_long::from(unsafe { libc::fchown(file.as_raw_fd(), uid, gid) })).map(drop)
}

/// open(2).
///
/// # Errors
/// As open(2).
pub fn open(path: &CStr, flags: c_int) -> Result<OwnedFd> {
    // SAFETY: a C string; the descriptor is new.
    check(c_long::from(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }))
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// openat(2) of a file that a folder of the kernel's own (cgroupfs) holds.
///
/// # Errors
/// As openat(2).
pub fn open_at(folder: BorrowedFd<'_>, name: &CStr, flags: c_int) -> Result<OwnedFd> {
    // SAFETY: a descriptor and a C string; the descriptor is new.
    check(c_long::from(unsafe { libc::openat(folder.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC) }))
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// openat2(2) that never leaves `folder`: no `..` out of it, no link of any kind, no other mount.
///
/// # Errors
/// As openat2(2).
pub fn open_beneath(folder: BorrowedFd<'_>, path: &CStr, flags: c_int, mode: u32) -> Result<OwnedFd> {
    // SAFETY: all zeros is a valid open_how.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve =
        libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_XDEV;
    // SAFETY: a descriptor, a C string and a struct of the size that is passed; the descriptor is new.
    check(unsafe {
        libc::syscall(libc::SYS_openat2, folder.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    })
    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Does a folder, opened for reading, hold nothing? What cannot be read counts as something.
pub fn is_empty_folder(folder: BorrowedFd<'_>) -> bool {
    let mut entries = [0u8; 128];
    // SAFETY: takes no memory.
    unsafe { libc::lseek(folder.as_raw_fd(), 0, libc::SEEK_SET) };
    // SAFETY: a buffer of that length. Two entries, `.` and `..`, have 24 bytes each.
    let length =
        unsafe { libc::syscall(libc::SYS_getdents64, folder.as_raw_fd(), entries.as_mut_ptr(), entries.len()) };
    length == 48
}

/// Has it no extended attribute, an access list included? What cannot be read counts as one.
pub fn has_no_attributes(file: BorrowedFd<'_>) -> bool {
    // SAFETY: asks for the length alone.
    unsafe { libc::flistxattr(file.as_raw_fd(), std::ptr::null_mut(), 0) == 0 }
}

/// fchdir(2).
///
/// # Errors
/// As fchdir(2).
pub fn change_folder(folder: RawFd) -> Result<()> {
    // SAFETY: takes no memory.
    check(c_long::from(unsafe { libc::fchdir(folder) })).map(drop)
}

/// chdir(2).
///
/// # Errors
/// As chdir(2).
pub fn change_folder_to(path: &CStr) -> Result<()> {
    // SAFETY: a C string.
    check(c_long::from(unsafe { libc::chdir(path.as_ptr()) })).map(drop)
}

/// sethostname(2).
///
/// # Errors
/// As sethostname(2).
pub fn set_hostname(name: &CStr) -> Result<()> {
    // SAFETY: a C string of that length.
    check(c_long::from(unsafe { libc::sethostname(name.as_ptr(), name.to_bytes().len()) })).map(drop)
}

/// close_range(2).
///
/// # Errors
/// As close_range(2).
pub fn close_range(first: c_uint, last: c_uint, flags: c_uint) -> Result<()> {
    // SAFETY: the callers own what they close.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// dup2(2) that also clears close-on-exec when both numbers are the same.
///
/// # Errors
/// As dup2(2).
pub fn place_descriptor(from: RawFd, to: RawFd) -> Result<()> {
    // SAFETY: takes no memory.
    let returned = unsafe { if from == to { libc::fcntl(to, libc::F_SETFD, 0) } else { libc::dup2(from, to) } };
    check(c_long::from(returned)).map(drop)
}

/// prctl(2) with one argument.
///
/// # Errors
/// As prctl(2).
pub fn prctl(option: c_int, argument: c_ulong) -> Result<()> {
    let none: c_ulong = 0;
    // SAFETY: only options that take numbers are used.
    check(c_long::from(unsafe { libc::prctl(option, argument, none, none, none) })).map(drop)
}

/// Has a descriptor stay open over an exec, or not.
///
/// # Errors
/// As fcntl(2).
pub fn keep_over_exec(fd: RawFd, kept: bool) -> Result<()> {
    // SAFETY: takes no memory.
    check(c_long::from(unsafe { libc::fcntl(fd, libc::F_SETFD, if kept { 0 } else { libc::FD_CLOEXEC }) })).map(drop)
}

/// Takes all capabilities that the kernel knows from the bounding set.
///
/// # Errors
/// Not permitted.
pub fn drop_bounding_capabilities() -> Result<()> {
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            // The first number that this kernel does not know.
            Err(Errno::EINVAL) if capability > 0 => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Leaves exactly these capabilities permitted and effective, none inheritable or ambient.
///
/// # Errors
/// As capset(2).
pub fn keep_capabilities(bits: u64) -> Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION_3, 0];
    let [low, high] = [bits as u32, (bits >> 32) as u32];
    // Effective, permitted, inheritable; for each half of the bits.
    let data: [u32; 6] = [low, low, 0, high, high, 0];
    // SAFETY: a header of version 3 and its two data structs.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// Becomes this uid and gid in all of their forms, without supplementary groups.
///
/// # Errors
/// As setgroups(2), setresgid(2) or setresuid(2).
pub fn become_identity(uid: u32, gid: u32) -> Result<()> {
    let no_groups: *const u32 = std::ptr::null();
    // SAFETY: raw calls, because libc's would signal threads that this clone does not have.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, no_groups))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

/// A session keyring of its own, so that keys of the caller's session are not found.
///
/// # Errors
/// As keyctl(2).
pub fn join_new_session_keyring() -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    let anonymous: *const c_char = std::ptr::null();
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) }).map(drop)
}

/// Replaces the whole signal mask: all blocked, or none.
pub fn block_all_signals(blocked: bool) {
    let mask: u64 = if blocked { u64::MAX } else { 0 };
    let old: *mut u64 = std::ptr::null_mut();
    // SAFETY: the kernel's own sigset is one u64; this cannot fail with these arguments.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, old, size_of::<u64>()) };
}

/// setrlimit(2), never above the hard limit that is there.
///
/// # Errors
/// As prlimit(2).
pub fn limit_resource(resource: c_uint, soft: u64, hard: u64) -> Result<()> {
    let mut now = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid structs; pid 0 is this process.
    unsafe {
        check(libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<c_void>(), &raw mut now))?;
        let hard = hard.min(now.rlim_max);
        let wanted = libc::rlimit64 { rlim_cur: soft.min(hard), rlim_max: hard };
        check(libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const wanted, std::ptr::null_mut::<c_void>()))?;
    }
    Ok(())
}

/// Sets the flags of an interface of this network namespace to "up".
///
/// # Errors
/// As netdevice(7).
pub fn raise_loopback() -> Result<()> {
    // SAFETY: the socket is new; ifreq is all zeros but its name; both live through the call.
    unsafe {
        let socket = check(c_long::from(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)))?;
        let socket = OwnedFd::from_raw_fd(socket as RawFd);
        let mut request: libc::ifreq = MaybeUninit::zeroed().assume_init();
        request.ifr_name[0] = b'l' as c_char;
        request.ifr_name[1] = b'o' as c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        check(c_long::from(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request))).map(drop)
    }
}

/// Does the network namespace of this /proc/PID/net/sockstat hold no socket, and none that only waits for its time
/// to pass (TIME_WAIT)?
///
/// # Errors
/// It cannot be read.
pub fn has_no_sockets(sockstat: BorrowedFd<'_>) -> Result<bool> {
    let mut buffer = [0; 512];
    let length = nix::sys::uio::pread(sockstat, &mut buffer, 0)?;
    let text = std::str::from_utf8(&buffer[..length]).map_err(|_| Errno::EIO)?;
    let number = |line: &str, key: &str| -> Option<u64> {
        let mut words = text.lines().find_map(|found| found.strip_prefix(line))?.split(' ');
        words.find(|word| *word == key)?;
        words.next()?.parse().ok()
    };
    Ok(number("TCP:", "inuse") == Some(0) && number("TCP:", "tw") == Some(0) && number("UDP:", "inuse") == Some(0))
}

/// Microseconds of the clock that counts suspend.
pub fn boottime_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid struct; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}
