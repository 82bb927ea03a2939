//! The two pipes that tie children to their parent. `parent`: its write end is
//! held by the parent only, so its end tells every child that the parent is
//! gone. `children`: its write end is held by every child, so its end tells
//! the janitor that they are gone.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    unistd::pipe2,
};

/// Both pipes, as the parent holds them.
#[derive(Debug)]
pub struct Pipes {
    parent_read: OwnedFd,
    /// Nobody else may ever hold this.
    parent_write: Option<OwnedFd>,
    children_read: OwnedFd,
    children_write: Option<OwnedFd>,
}

/// The ends that one child inherits.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// `--parent-fd`.
    pub parent: RawFd,
    /// Held and never used by a child; read by the janitor.
    pub children: RawFd,
}

impl Pipes {
    /// New pipes; no end survives an exec unless it is [inherited](keep_over_exec).
    pub fn new() -> io::Result<Self> {
        let (parent_read, parent_write) = pipe2(OFlag::O_CLOEXEC)?;
        let (children_read, children_write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok(Self { parent_read, parent_write: Some(parent_write), children_read, children_write: Some(children_write) })
    }

    /// For a coordinator, spawner or agent; none once the end was told.
    pub fn for_child(&self) -> Option<Inherited> {
        let children = self.children_write.as_ref()?.as_raw_fd();
        self.parent_write.as_ref().map(|_| Inherited { parent: self.parent_read.as_raw_fd(), children })
    }

    /// For the janitor.
    pub fn for_janitor(&self) -> Inherited {
        Inherited { parent: self.parent_read.as_raw_fd(), children: self.children_read.as_raw_fd() }
    }

    /// Tells all children that their parent is gone.
    pub fn tell_end(&mut self) {
        self.parent_write = None;
        self.children_write = None;
    }
}

/// Lets a descriptor survive the exec that follows. Only for between fork and exec.
pub fn keep_over_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open: the parent holds it until after the spawn.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// Waits until the other end of an inherited pipe is closed by all who held it.
pub fn wait_for_end(fd: RawFd) -> io::Result<()> {
    // SAFETY: the number was handed to this process at its exec for this one
    // purpose, and nothing else here owns it.
    let mut pipe = unsafe { File::from_raw_fd(fd) };
    let mut bytes = [0u8; 64];
    while pipe.read(&mut bytes)? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_seen_when_the_parent_lets_go() {
        let mut pipes = Pipes::new().unwrap();
        assert!(pipes.for_child().is_some());
        let reader = pipes.parent_read.try_clone().unwrap();
        pipes.tell_end();
        assert!(pipes.for_child().is_none());
        let mut read = File::from(reader);
        assert_eq!(read.read(&mut [0; 1]).unwrap(), 0);
    }
}
