//! A coordinator that belongs to another process ends with it: the pipe that
//! the parent holds closes even when the parent is killed.

use std::{
    fs, io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
    path::Path,
    thread,
};

use tokio::sync::oneshot;

/// Tells when the parent's end of the pipe is closed.
///
/// # Errors
/// There is no such descriptor, or it is not for us to take.
pub fn watch(descriptor: RawFd) -> io::Result<oneshot::Receiver<()>> {
    if descriptor < 3 || nix::fcntl::fcntl(borrow(descriptor), nix::fcntl::FcntlArg::F_GETFD).is_err() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("--parent-fd {descriptor} is no open pipe")));
    }
    // SAFETY: it is open (just checked), and named on our command line for us to own.
    let pipe = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name("parent".into()).spawn(move || {
        let mut byte = [0];
        while matches!(nix::unistd::read(&pipe, &mut byte), Ok(1..) | Err(nix::errno::Errno::EINTR)) {}
        let _ = ended.send(());
    })?;
    Ok(end)
}

const fn borrow(descriptor: RawFd) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: only asked whether it is open, which is sound for any number but -1, excluded by the caller.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) }
}

/// Removes a data folder that was only for the time of the parent, and the parent's folder if that is empty.
pub fn remove_data(data: &Path) {
    if let Err(error) = fs::remove_dir_all(data) {
        tracing::warn!("cannot remove {}: {error}", data.display());
    }
    if let Some(above) = data.parent() {
        // Others may still be in there.
        let _ = fs::remove_dir(above);
    }
}
