//! The root that a strict job sees: the host's programs read-only, and private
//! folders of a bounded size.

use std::{
    ffi::{CStr, CString},
    fs,
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use nix::errno::Errno;

use super::sys;

const READ_ONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
/// Size of /tmp and of /dev/shm.
const SCRATCH_BYTES: u64 = 64 << 20;

fn c(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("a path without NUL")
}

/// Assembles the root at `root` and enters it. `/work` belongs to `uid` and holds `work_bytes`.
///
/// # Errors
/// As the first call that failed.
pub fn assemble(root: &CStr, work_bytes: u64, uid: u32, gid: u32) -> Result<(), Errno> {
    // Nothing that is mounted here from now on reaches the host.
    sys::mount(c"none", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c"")?;
    sys::mount(c"tmpfs", root, c"tmpfs", libc::MS_NOSUID | libc::MS_NODEV, c"size=1m,nr_inodes=256,mode=755")?;
    let at = |path: &str| c(format!("{}/{path}", root.to_string_lossy()));
    for name in ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt"] {
        bind_from_host(name, &at(name))?;
    }
    for folder in ["proc", "dev", "tmp", "work", "var", "run"] {
        sys::make_folder(&at(folder), 0o755)?;
    }
    std::os::unix::fs::symlink("/tmp", Path::new(std::ffi::OsStr::from_bytes(at("var/tmp").to_bytes())))
        .map_err(|_| Errno::EIO)?;
    make_devices(&at)?;
    private_folder(&at("tmp"), SCRATCH_BYTES, "1777")?;
    private_folder(&at("work"), work_bytes, "0700")?;
    // Without a uid of its own the folder belongs to us already.
    if uid != 0 {
        sys::change_owner(&at("work"), uid, gid)?;
    }
    mount_proc(&at("proc"))?;
    sys::mount_set(root, READ_ONLY | NOSUID | NODEV, false)?;
    sys::change_folder_to(root)?;
    sys::pivot_root(c".", c".")?;
    sys::detach(c".")?;
    sys::change_folder_to(c"/")
}

/// A link stays a link, a folder is bound with all below it, what is absent stays absent.
fn bind_from_host(name: &str, target: &CStr) -> Result<(), Errno> {
    let source = format!("/{name}");
    let Ok(metadata) = fs::symlink_metadata(&source) else { return Ok(()) };
    if metadata.is_symlink() {
        let link = fs::read_link(&source).map_err(|_| Errno::EIO)?;
        let target = Path::new(std::ffi::OsStr::from_bytes(target.to_bytes()));
        return std::os::unix::fs::symlink(link, target).map_err(|_| Errno::EIO);
    }
    sys::make_folder(target, 0o755)?;
    sys::mount(&c(source), target, c"", libc::MS_BIND | libc::MS_REC, c"")?;
    sys::mount_set(target, READ_ONLY | NOSUID | NODEV, true)
}

fn make_devices(at: &impl Fn(&str) -> CString) -> Result<(), Errno> {
    for name in ["null", "zero", "full", "random", "urandom"] {
        let target = at(&format!("dev/{name}"));
        drop(sys::open(&target, libc::O_CREAT | libc::O_WRONLY)?);
        sys::mount(&c(format!("/dev/{name}")), &target, c"", libc::MS_BIND, c"")?;
    }
    for (name, link) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let path = at(&format!("dev/{name}"));
        std::os::unix::fs::symlink(link, Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())))
            .map_err(|_| Errno::EIO)?;
    }
    let shm = at("dev/shm");
    sys::make_folder(&shm, 0o755)?;
    private_folder(&shm, SCRATCH_BYTES, "1777")
}

fn private_folder(target: &CStr, bytes: u64, mode: &str) -> Result<(), Errno> {
    let data = c(format!("size={},nr_inodes={},mode={mode}", bytes.max(4_096), (bytes / 4_096).clamp(64, 1 << 20)));
    sys::mount(c"tmpfs", target, c"tmpfs", libc::MS_NOSUID | libc::MS_NODEV, &data)
}

/// Only its own processes where the kernel can; else a /proc of its own PID namespace all the same.
fn mount_proc(target: &CStr) -> Result<(), Errno> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    sys::mount(c"proc", target, c"proc", flags, c"subset=pid")
        .or_else(|_| sys::mount(c"proc", target, c"proc", flags, c""))
}
