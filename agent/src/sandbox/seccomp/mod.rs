//! The filter over a job's system calls: an allow-list of the native interface
//! and nothing else. [`table`] says what is allowed and why, `program` turns
//! that into the kernel's instructions. A call that is not on the list is
//! answered "this kernel does not have it", so that libraries fall back as they
//! do on an older kernel; one that is refused on purpose "you may not"; one
//! of another interface (32-bit, x32) ends the process.
//!
//! The program is written here and not by a library: what the library at hand
//! (`seccompiler`) makes knows one answer for all that is not allowed, and
//! compares one number after the other, which costs a start six times as much.

mod program;
pub mod table;
#[cfg(test)]
pub(super) mod tests;

use nix::errno::Errno;

/// A compiled filter. It is made once, before any clone; installing allocates nothing.
#[derive(Clone, Debug)]
pub struct Filter(Box<[libc::sock_filter]>);

impl Filter {
    /// The allow-list, for the profiles `strict` and `shared`.
    #[must_use]
    pub fn strict() -> Self {
        Self(program::write())
    }

    /// The instructions, as seccomp(2) takes them.
    #[must_use]
    pub fn program(&self) -> &[libc::sock_filter] {
        &self.0
    }

    /// Puts the calling thread, and all that it starts from now on, under the filter for good.
    ///
    /// It passes no flags. Without `SECCOMP_FILTER_FLAG_SPEC_ALLOW` kernels before 5.16 turn the guard against
    /// speculative store bypass on for the job, which is right for code that nobody vouches for; later ones leave
    /// it as it is. There is one thread, so none to take along (`TSYNC`); a log line for each refusal would be
    /// a job's way to fill the host's log.
    ///
    /// # Errors
    /// As seccomp(2): EACCES without `no_new_privs` (or CAP_SYS_ADMIN), EINVAL or ENOSYS on a kernel without filters.
    pub fn install(&self) -> Result<(), Errno> {
        let program = libc::sock_fprog { len: self.0.len() as u16, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: a program of that length, which the kernel only reads.
        let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        Errno::result(done).map(drop)
    }
}

/// Does this kernel have filters, with all the answers that ours gives?
#[must_use]
pub fn is_supported() -> bool {
    let kill: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads one u32.
    unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const kill) == 0 }
}
