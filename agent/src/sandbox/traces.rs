//! What a job may leave in its sandbox besides processes, and whether it did: files,
//! message queues, System V objects, sockets that outlive their process.
//!
//! A sandbox in which nothing is found is as it was made, and may serve the next task
//! of the same job. What cannot be looked at counts as something. All descriptors are
//! opened before the job exists; a look is a handful of calls that read.

use std::{
    ffi::CStr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

use super::{
    fences::{Fence, FenceSet},
    sys,
};

/// Where a job could leave something that its own end does not take away.
#[derive(Debug)]
pub struct Places {
    folders: Vec<Folder>,
    /// Those of the IPC namespace, if it is the sandbox's own, and the mount that holds their folder.
    queues: Option<[OwnedFd; 2]>,
    /// /proc/self/net/sockstat, if the network namespace is the sandbox's own.
    sockets: Option<OwnedFd>,
}

/// A private folder as it was made.
#[derive(Debug)]
struct Folder {
    directory: OwnedFd,
    mode: libc::mode_t,
    owner: (libc::uid_t, libc::gid_t),
}

/// Besides the working folder.
const SCRATCH: [&CStr; 2] = [c"/tmp", c"/dev/shm"];

impl Places {
    /// Of a sandbox that is assembled and that no job was in.
    ///
    /// # Errors
    /// One of them cannot be opened: then nobody can say that it is as new.
    pub fn of(fences: FenceSet, work: BorrowedFd<'_>) -> Result<Self, Errno> {
        let mut folders = vec![Folder::of(work.try_clone_to_owned().map_err(|_| Errno::EMFILE)?)?];
        if fences.has(Fence::RootReadonly) {
            for path in SCRATCH {
                folders.push(Folder::of(sys::open(path, libc::O_RDONLY | libc::O_DIRECTORY)?)?);
            }
        }
        let queues = fences.has(Fence::NsIpc).then(sys::open_message_queues).transpose()?;
        let sockets = fences.has(Fence::NsNet).then(open_sockstat).transpose()?;
        Ok(Self { folders, queues, sockets })
    }

    /// Nothing is in any of them. Only when no process of the job is there any more, else it may still come.
    #[must_use]
    pub fn are_as_new(&self) -> bool {
        self.folders.iter().all(Folder::is_as_new)
            && self
                .queues
                .as_ref()
                .is_none_or(|[queues, _]| sys::is_empty_folder(queues.as_fd()) && sys::has_no_system_v_objects())
            && self.sockets.as_ref().is_none_or(|sockstat| sys::has_no_sockets(sockstat.as_fd()) == Ok(true))
    }
}

impl Folder {
    fn of(directory: OwnedFd) -> Result<Self, Errno> {
        let stat = nix::sys::stat::fstat(&directory)?;
        Ok(Self { directory, mode: stat.st_mode, owner: (stat.st_uid, stat.st_gid) })
    }

    fn is_as_new(&self) -> bool {
        let directory = self.directory.as_fd();
        nix::sys::stat::fstat(directory)
            .is_ok_and(|stat| stat.st_mode == self.mode && (stat.st_uid, stat.st_gid) == self.owner)
            && sys::has_no_attributes(directory)
            && sys::is_empty_folder(directory)
    }
}

/// Of our own network namespace.
///
/// # Errors
/// There is no /proc.
pub fn open_sockstat() -> Result<OwnedFd, Errno> {
    sys::open(c"/proc/self/net/sockstat", libc::O_RDONLY)
}
