//! The second fence round a job's files: Landlock rules, which hold also where
//! a mount or a mode was got wrong, and which end a job's signals and abstract
//! sockets at its sandbox also where it has the host's processes and network.
//!
//! What a job may do with a file is decided here once more; who it is and what
//! is mounted is not. The network is left alone: a job's loopback is its own.
//!
//! The system calls are made here and not by the `landlock` crate: that one
//! collects its rules on the heap, which the init, a clone, keeps off, and
//! three calls with constant arguments need no builder.

use std::{
    ffi::CStr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr,
};

use nix::errno::Errno;

use super::sys;

// linux/landlock.h: what may be done with files.
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_DIR: u64 = 1 << 4;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_CHAR: u64 = 1 << 6;
const MAKE_DIR: u64 = 1 << 7;
const MAKE_REG: u64 = 1 << 8;
const MAKE_SOCK: u64 = 1 << 9;
const MAKE_FIFO: u64 = 1 << 10;
const MAKE_BLOCK: u64 = 1 << 11;
const MAKE_SYM: u64 = 1 << 12;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;

const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1 << 0;
const SCOPE_SIGNAL: u64 = 1 << 1;
/// The first version that knows the scopes.
const SCOPES_ABI: u32 = 6;

const READ: u64 = EXECUTE | READ_FILE | READ_DIR;
const WRITE: u64 =
    WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE;
/// All that a rule can grant, and so all that is refused where no rule does. Devices are made nowhere.
const ALL: u64 = READ | WRITE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV;

/// What may be done beneath a folder.
type Rule<'a> = (&'a CStr, u64);

/// What a job is kept to.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// `None`: files are not looked at.
    files: Option<&'a [Rule<'a>]>,
}

impl Policy<'static> {
    /// A job with a root of its own, with the paths that it has there. It reads all and writes in its three folders.
    ///
    /// Beneath `/dev` it may write to the devices that are there, and give them commands: `isatty` is one. Beneath
    /// `/proc` it may write to what it may open for writing by its uid: its name, its `oom_score_adj`, which only goes
    /// up, what its own core file would hold; a shell's `>` opens them to be truncated too, which does nothing there.
    pub const STRICT: Self = Self {
        files: Some(&[
            (c"/", READ),
            (c"/work", READ | WRITE),
            (c"/tmp", READ | WRITE),
            (c"/dev/shm", READ | WRITE),
            (c"/dev", WRITE_FILE | IOCTL_DEV),
            (c"/proc", WRITE_FILE | TRUNCATE),
        ]),
    };

    /// A job with the host's files: only its signals and abstract sockets are kept in, where the kernel can.
    pub const SHARED: Self = Self { files: None };
}

/// The version of Landlock that this kernel has, from 1; none without it.
#[must_use]
pub fn abi() -> Option<u32> {
    const CREATE_RULESET_VERSION: u32 = 1;
    let none: *const Attributes = ptr::null();
    // SAFETY: asking for the version takes no memory.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, CREATE_RULESET_VERSION) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Does a version fence all that the policy names, files or scopes?
#[must_use]
pub fn fences_anything(abi: u32, policy: &Policy<'_>) -> bool {
    handled(abi, policy) != 0 || scoped(abi) != 0
}

/// Keeps the calling thread, and all that it starts from now on, to the policy, for good. Allocates nothing.
///
/// Rights that this version (from [`abi`]) does not know are not fenced; a policy of which it knows nothing is no
/// error and no fence (see [`fences_anything`]). Mounting is over for the thread once files are looked at. It passes
/// no flags: by default the kernel logs refusals of the installing program alone, not of what it executes.
///
/// # Errors
/// As landlock_restrict_self(2), EPERM without `no_new_privs` (or CAP_SYS_ADMIN); as open(2) if a path of the policy
/// does not exist, and then nothing was restricted.
pub fn restrict(abi: u32, policy: &Policy<'_>) -> Result<(), Errno> {
    if !fences_anything(abi, policy) {
        return Ok(());
    }
    let rules =
        create(&Attributes { handled_access_fs: handled(abi, policy), handled_access_net: 0, scoped: scoped(abi) })?;
    for (path, rights) in policy.files.unwrap_or_default() {
        let folder = sys::open(path, libc::O_PATH)?;
        grant(rules.as_fd(), folder.as_fd(), rights & handled(abi, policy))?;
    }
    // SAFETY: takes no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) }).map(drop)
}

/// The rights that are refused where no rule grants them.
fn handled(abi: u32, policy: &Policy<'_>) -> u64 {
    let unknown = match abi {
        // The first version forbids each move from one folder to another, which ordinary programs need.
        0 | 1 => ALL,
        2 => TRUNCATE | IOCTL_DEV,
        3 | 4 => IOCTL_DEV,
        5.. => 0,
    };
    policy.files.map_or(0, |_| ALL & !unknown)
}

fn scoped(abi: u32) -> u64 {
    if abi >= SCOPES_ABI { SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL } else { 0 }
}

/// `struct landlock_ruleset_attr` of the sixth version; earlier kernels take the longer form if its rest is zero.
#[repr(C)]
struct Attributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

fn create(attributes: &Attributes) -> Result<OwnedFd, Errno> {
    let size = size_of::<Attributes>();
    // SAFETY: a struct of the size that is passed.
    let made = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::from_ref(attributes), size, 0) };
    // SAFETY: the descriptor is new, and close-on-exec.
    Errno::result(made).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn grant(rules: BorrowedFd<'_>, folder: BorrowedFd<'_>, rights: u64) -> Result<(), Errno> {
    const RULE_PATH_BENEATH: u32 = 1;
    #[repr(C, packed)]
    struct PathBeneath {
        allowed_access: u64,
        parent_fd: i32,
    }
    let rule = PathBeneath { allowed_access: rights, parent_fd: folder.as_raw_fd() };
    // SAFETY: a struct of the kind that is named; both descriptors are live.
    let added =
        unsafe { libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), RULE_PATH_BENEATH, &raw const rule, 0) };
    Errno::result(added).map(drop)
}

#[cfg(test)]
mod tests;
