//! A parent that must not leave anything behind: the agent watches the read
//! end of its pipe, whose end comes with the parent's, by `kill -9` too.

use std::{
    fs, io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
    path::Path,
    rc::Rc,
};

use crate::output::WatchedPipe;
use nix::fcntl::{FcntlArg, fcntl};

/// The pipe of a parent, if there is one.
#[derive(Debug)]
pub struct Parent(Option<Rc<OwnedFd>>);

impl Parent {
    /// Takes over the descriptor that the parent passed by number.
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn adopt(descriptor: Option<RawFd>) -> io::Result<Self> {
        let Some(descriptor) = descriptor else { return Ok(Self(None)) };
        if descriptor <= 2 {
            return Err(io::Error::other("--parent-fd names one of stdin, stdout and stderr"));
        }
        // SAFETY: only borrowed for one question, which fails if it is not open.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
        fcntl(borrowed, FcntlArg::F_GETFD)
            .map_err(|errno| io::Error::other(format!("--parent-fd {descriptor} is not open: {errno}")))?;
        // SAFETY: it is open, and whoever started us passed it to be ours.
        Ok(Self(Some(Rc::new(unsafe { OwnedFd::from_raw_fd(descriptor) }))))
    }

    /// Returns when the parent has ended; never if there is none.
    pub async fn ended(&self) {
        let Some(pipe) = &self.0 else { return std::future::pending().await };
        let registered = WatchedPipe::watch(Rc::clone(pipe));
        let Ok(watched) = registered else {
            return std::future::pending().await;
        };
        while let Ok(mut ready) = watched.readable().await {
            // Hang-up says it; what a parent may have written means nothing.
            if ready.ready().is_read_closed() {
                return;
            }
            let mut ignored = [0; 64];
            if matches!(nix::unistd::read(pipe, &mut ignored), Ok(0)) {
                return;
            }
            ready.clear_ready();
        }
    }
}

/// Removes an ephemeral folder, and its parent if that is empty by then.
pub fn remove_folder(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        tracing::warn!(folder = %folder.display(), %error, "cannot remove the folder");
    }
    if let Some(parent) = folder.parent() {
        // Others may still clean up in there; the last one succeeds.
        let _ = fs::remove_dir(parent);
    }
}
