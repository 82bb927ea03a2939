//! The root that a strict job sees: the host's programs read-only, and private
//! folders of a bounded size.
//!
//! It is made in two halves. The first, the same for all jobs, is assembled once
//! in a mount namespace that the spawner keeps ([`Template`]); a sandbox copies
//! that namespace, which costs a tenth of assembling it, and mounts only what is
//! private. As an ordinary user each sandbox does both halves, because a namespace
//! of another user namespace cannot be entered with less.

use std::{
    ffi::{CStr, CString, OsStr},
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::sys::{self, Cloned};

const READ_ONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;

/// Of the host or the image, what a job may read and execute.
const PROGRAMS: [&str; 9] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt"];
/// Their kernel numbers, because device nodes are made anew where that is allowed.
const DEVICES: [(&str, u32); 5] = [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)];

/// What /proc shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proc {
    /// Processes of its PID namespace that it may trace, and nothing of the kernel (since Linux 5.8).
    OwnOnly,
    /// Everything that a /proc of its PID namespace has.
    Whole,
}

/// The common half of every strict root, in a mount namespace of its own.
#[derive(Debug)]
pub struct Template {
    namespace: OwnedFd,
}

impl Template {
    /// Assembles it in a child that ends at once; the namespace lives as long as this value.
    ///
    /// # Errors
    /// The child could not assemble it.
    pub fn build(root: &CStr, image: &Path, told: &Path) -> io::Result<Self> {
        let (ours, theirs) = crate::spawner::socket::pair()?;
        // SAFETY: the spawner has one thread; the child leaves by exit_now.
        match unsafe { sys::clone_process(libc::CLONE_NEWNS, None) }? {
            Cloned::Child => {
                drop(ours);
                let errno = assemble(root, image, Some(told), None).err().map_or(0, |errno| errno as i32);
                let _told = nix::unistd::write(&theirs, &errno.to_ne_bytes());
                // Until the parent has opened our namespace, or is gone.
                let _closed = nix::unistd::read(&theirs, &mut [0; 4]);
                sys::exit_now(0)
            }
            Cloned::Parent { pid, pidfd } => {
                drop(theirs);
                let mut errno = [0; 4];
                let read = nix::unistd::read(&ours, &mut errno)?;
                let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"));
                sys::end_and_reap(pidfd.as_fd());
                match (read, i32::from_ne_bytes(errno)) {
                    (4, 0) => Ok(Self { namespace: namespace?.into() }),
                    (_, errno) => Err(io::Error::from_raw_os_error(errno.max(1))),
                }
            }
        }
    }

    /// For setns(2).
    #[must_use]
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

fn c(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("a path without NUL")
}

/// Assembles the common half at `root`, of the folders of `image` (`/`: the host's own), and enters it.
/// `told`: what is shown as /run/muster.
/// Private folders are empty mount points yet. `proc`: mounted too, which in a user namespace must be while the
/// host's own is still in sight.
///
/// # Errors
/// As the first call that failed.
pub fn assemble(root: &CStr, image: &Path, told: Option<&Path>, proc: Option<Proc>) -> Result<(), Errno> {
    // Nothing that is mounted here from now on reaches the host.
    sys::mount(c"none", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c"")?;
    sys::mount(c"tmpfs", root, c"tmpfs", libc::MS_NOSUID | libc::MS_NODEV, c"size=1m,nr_inodes=256,mode=755")?;
    let at = |path: &str| c(format!("{}/{path}", root.to_string_lossy()));
    for name in PROGRAMS {
        bind_program_folder(&image.join(name), &at(name))?;
    }
    for folder in ["proc", "dev", "tmp", "work", "var", "run"] {
        sys::make_folder(&at(folder), 0o755)?;
    }
    link("/tmp", &at("var/tmp"))?;
    if let Some(told) = told {
        let target = at("run/muster");
        sys::make_folder(&target, 0o755)?;
        sys::mount(&c(told.as_os_str().as_bytes()), &target, c"", libc::MS_BIND, c"")?;
        sys::mount_set(&target, READ_ONLY | NOSUID | NODEV | NOEXEC, false)?;
    }
    make_devices(&at)?;
    if let Some(proc) = proc {
        mount_proc(&at("proc"), proc)?;
    }
    sys::mount_set(root, READ_ONLY | NOSUID | NODEV, false)?;
    sys::change_folder_to(root)?;
    sys::pivot_root(c".", c".")?;
    sys::detach(c".")?;
    sys::change_folder_to(c"/")
}

/// A /proc of the caller's PID namespace.
///
/// # Errors
/// As mount(2).
pub fn mount_proc(at: &CStr, proc: Proc) -> Result<(), Errno> {
    let options = match proc {
        Proc::OwnOnly => c"subset=pid,hidepid=invisible",
        Proc::Whole => c"",
    };
    sys::mount(c"proc", at, c"proc", PRIVATE | libc::MS_NOEXEC, options)
}

const PRIVATE: u64 = libc::MS_NOSUID | libc::MS_NODEV;

/// Mounts one tmpfs of `bytes` behind /work, /tmp and /dev/shm of an assembled root. /work belongs to `owner`.
///
/// # Errors
/// As the first call that failed.
pub fn mount_private(bytes: u64, owner: Option<u32>) -> Result<(), Errno> {
    let size = c(format!("size={},nr_inodes={},mode=755", bytes.max(PAGE), inodes(bytes)));
    sys::mount(c"tmpfs", c"/work", c"tmpfs", PRIVATE, &size)?;
    sys::make_folder(c"/work/work", 0o700)?;
    for scratch in [c"/work/tmp", c"/work/shm"] {
        sys::make_folder(scratch, 0o777)?;
        sys::change_mode(scratch, 0o1777)?;
    }
    if let Some(uid) = owner {
        sys::change_owner(c"/work/work", uid, uid)?;
    }
    sys::mount(c"/work/tmp", c"/tmp", c"", libc::MS_BIND, c"")?;
    sys::mount(c"/work/shm", c"/dev/shm", c"", libc::MS_BIND, c"")?;
    // Last, because it covers the tmpfs that the others came from.
    sys::mount(c"/work/work", c"/work", c"", libc::MS_BIND, c"")
}

/// For a sandbox whose private folders have no limit but memory.
pub const UNLIMITED: u64 = 1 << 50;

const PAGE: u64 = 4_096;

/// A file for each page, within what the kernel's own memory for them should cost.
fn inodes(bytes: u64) -> u64 {
    (bytes / PAGE).clamp(64, 1 << 20)
}

/// A link stays a link, a folder is bound with all below it, what is absent stays absent.
fn bind_program_folder(source: &Path, target: &CStr) -> Result<(), Errno> {
    let Ok(metadata) = fs::symlink_metadata(source) else { return Ok(()) };
    if metadata.is_symlink() {
        let to = fs::read_link(source).map_err(|_| Errno::EIO)?;
        return link(to, target);
    }
    sys::make_folder(target, 0o755)?;
    sys::mount(&c(source.as_os_str().as_bytes()), target, c"", libc::MS_BIND | libc::MS_REC, c"")?;
    sys::mount_set(target, READ_ONLY | NOSUID | NODEV, true)
}

fn link(to: impl AsRef<Path>, at: &CStr) -> Result<(), Errno> {
    std::os::unix::fs::symlink(to, PathBuf::from(OsStr::from_bytes(at.to_bytes()))).map_err(|_| Errno::EIO)
}

/// A tmpfs with the five harmless devices; bound from the host's where a node may not be made.
fn make_devices(at: &impl Fn(&str) -> CString) -> Result<(), Errno> {
    let dev = at("dev");
    sys::mount(c"tmpfs", &dev, c"tmpfs", libc::MS_NOSUID | libc::MS_NOEXEC, c"size=64k,nr_inodes=32,mode=755")?;
    for (name, minor) in DEVICES {
        let target = at(&format!("dev/{name}"));
        match sys::make_device(&target, 0o666, 1, minor) {
            Ok(()) => {}
            Err(Errno::EPERM) => {
                drop(sys::open(&target, libc::O_CREAT | libc::O_WRONLY)?);
                sys::mount(&c(format!("/dev/{name}")), &target, c"", libc::MS_BIND, c"")?;
            }
            Err(errno) => return Err(errno),
        }
    }
    for (name, to) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        link(format!("/proc/self/fd{to}"), &at(&format!("dev/{name}")))?;
    }
    sys::make_folder(&at("dev/shm"), 0o755)?;
    sys::mount_set(&dev, READ_ONLY | NOSUID | NOEXEC, false)
}
