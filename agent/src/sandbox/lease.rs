//! The end of the node's lease, in a page that the spawner writes and each init
//! of an `exclusive` job reads: so the job ends on time although the agent is
//! dead, wedged or stopped, and the spawner as well.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::{Mode, fchmod},
    },
    unistd::ftruncate,
};

/// Between the lease's end, when the job gets SIGTERM, and its kill. Shorter
/// than what the coordinator adds on its side for exactly this
/// (`muster_core::limits::LEASE_KILL`).
pub const TERM_MS: u64 = 1_000;

const PAGE: usize = 4096;

/// The spawner's side: the only one that can write.
pub struct LeasePage {
    memory: OwnedFd,
    /// The same memory, opened for reading: what an init gets.
    readable: OwnedFd,
    map: NonNull<AtomicU64>,
}

impl LeasePage {
    /// A page that says that there is no lease.
    ///
    /// # Errors
    /// No memory, or a kernel without sealing.
    pub fn new() -> Result<Self, Errno> {
        let memory = memfd_create(c"muster-lease", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&memory, PAGE as i64)?;
        // Ours alone to open for writing: not sealed against it, because the next program of this spawner must write on.
        fchmod(&memory, Mode::S_IRUSR)?;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Self::over(memory)
    }

    /// The page of the program that this process ran before.
    ///
    /// # Errors
    /// It is no such page.
    pub fn over(memory: OwnedFd) -> Result<Self, Errno> {
        let map = map(memory.as_fd(), libc::PROT_READ | libc::PROT_WRITE)?;
        // An init must not inherit the writable view; it maps the page anew.
        // SAFETY: the range is the mapping made above.
        if unsafe { libc::madvise(map.as_ptr().cast(), PAGE, libc::MADV_DONTFORK) } != 0 {
            return Err(Errno::last());
        }
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let readable = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { memory, readable, map })
    }

    /// For the next program of this process.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// For an init to map.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    /// Milliseconds of CLOCK_BOOTTIME; 0: there was never a lease.
    pub fn deadline_ms(&self) -> u64 {
        // SAFETY: mapped for as long as self lives.
        unsafe { self.map.as_ref() }.load(Ordering::Acquire)
    }

    /// The same in microseconds, which cannot overflow: a lease that never ends stays one.
    pub fn deadline_us(&self) -> u64 {
        self.deadline_ms().saturating_mul(1_000)
    }

    /// Moves the end; only to later, because an earlier one was already relied on.
    pub fn extend(&self, deadline_ms: u64) {
        // SAFETY: mapped for as long as self lives.
        unsafe { self.map.as_ref() }.fetch_max(deadline_ms, Ordering::AcqRel);
    }
}

impl Drop for LeasePage {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, used by nobody else.
        unsafe { libc::munmap(self.map.as_ptr().cast(), PAGE) };
    }
}

/// An init's side.
pub struct LeaseView {
    map: NonNull<AtomicU64>,
}

impl LeaseView {
    /// Maps the page for reading.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(memory: BorrowedFd<'_>) -> Result<Self, Errno> {
        map(memory, libc::PROT_READ).map(|map| Self { map })
    }

    /// Milliseconds of CLOCK_BOOTTIME.
    pub fn deadline_ms(&self) -> u64 {
        // SAFETY: mapped until this process ends.
        unsafe { self.map.as_ref() }.load(Ordering::Acquire)
    }

    /// The same in microseconds.
    pub fn deadline_us(&self) -> u64 {
        self.deadline_ms().saturating_mul(1_000)
    }
}

fn map(memory: BorrowedFd<'_>, protection: i32) -> Result<NonNull<AtomicU64>, Errno> {
    // SAFETY: a new shared mapping of a file that cannot shrink.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, memory.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    NonNull::new(address.cast()).ok_or(Errno::ENOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_moves_only_to_later_and_a_reader_sees_it() {
        let page = LeasePage::new().unwrap();
        let view = LeaseView::new(page.descriptor()).unwrap();
        assert_eq!(view.deadline_ms(), 0);
        page.extend(7_000);
        page.extend(5_000);
        assert_eq!((page.deadline_ms(), view.deadline_ms()), (7_000, 7_000));
    }

    #[test]
    fn the_next_program_writes_on_the_same_page() {
        let page = LeasePage::new().unwrap();
        let view = LeaseView::new(page.descriptor()).unwrap();
        let next = LeasePage::over(page.memory().try_clone_to_owned().unwrap()).unwrap();
        drop(page);
        next.extend(9_000);
        assert_eq!(view.deadline_ms(), 9_000);
    }

    #[test]
    fn an_init_cannot_map_the_page_for_writing() {
        let page = LeasePage::new().unwrap();
        assert_eq!(map(page.descriptor(), libc::PROT_READ | libc::PROT_WRITE), Err(Errno::EACCES));
    }
}
