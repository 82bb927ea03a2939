//! Files in and out of a working folder, by a child that has the job's own
//! uid: beneath the folder, through no link, across no mount.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
};

use nix::errno::Errno;

use super::sys;
use crate::spawner::protocol::{Collected, Input};

/// Copies the inputs in. Runs as the job's uid.
///
/// # Errors
/// As the first call that failed.
pub fn copy_in(folder: BorrowedFd<'_>, inputs: &[Input], descriptors: &[OwnedFd]) -> Result<(), Errno> {
    for input in inputs {
        let source = descriptors.get(usize::from(input.descriptor)).ok_or(Errno::EBADF)?;
        let target = create_beneath(folder, &input.path, if input.executable { 0o700 } else { 0o600 })?;
        copy(source, &target, input.offset, input.length).map_err(|error| errno_of(&error))?;
        if input.executable {
            File::from(target)
                .set_permissions(std::fs::Permissions::from_mode(0o700))
                .map_err(|error| errno_of(&error))?;
        }
    }
    Ok(())
}

/// Is this working folder empty, its owner's alone, and without any attribute that a job could have left?
#[must_use]
pub fn is_as_new(folder: BorrowedFd<'_>, uid: u32) -> bool {
    let plain =
        nix::sys::stat::fstat(folder).is_ok_and(|stat| stat.st_mode == libc::S_IFDIR | 0o700 && stat.st_uid == uid);
    plain && sys::has_no_attributes(folder) && sys::is_empty_folder(folder)
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn create_beneath(folder: BorrowedFd<'_>, path: &[u8], mode: u32) -> Result<OwnedFd, Errno> {
    let mut parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    let Some(name) = parts.pop() else { return Err(Errno::EISDIR) };
    let mut at: Option<OwnedFd> = None;
    for part in parts {
        let part = CString::new(part).map_err(|_| Errno::EINVAL)?;
        let parent = at.as_ref().map_or(folder, |fd| fd.as_fd());
        match sys::make_folder_at(parent, &part, 0o700) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        at = Some(sys::open_beneath(parent, &part, libc::O_DIRECTORY | libc::O_PATH, 0)?);
    }
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let parent = at.as_ref().map_or(folder, |fd| fd.as_fd());
    sys::open_beneath(parent, &name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL, mode)
}

fn copy(source: &OwnedFd, target: &OwnedFd, mut offset: u64, mut left: u64) -> io::Result<()> {
    let source = File::from(source.try_clone()?);
    let mut target = File::from(target.try_clone()?);
    let mut buffer = [0u8; 64 << 10];
    while left > 0 {
        let want = usize::try_from(left.min(buffer.len() as u64)).unwrap_or(buffer.len());
        match source.read_at(&mut buffer[..want], offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                io::Write::write_all(&mut target, &buffer[..read])?;
                offset += read as u64;
                left -= read as u64;
            }
        }
    }
    Ok(())
}

/// Opens one output. Runs as the job's uid, after nothing of the job runs any more.
#[must_use]
pub fn open_output(folder: BorrowedFd<'_>, path: &[u8], bytes_max: u64) -> (Collected, Option<OwnedFd>) {
    let skipped = |reason: String| (Collected::Skipped { reason }, None);
    let Ok(name) = CString::new(path) else { return skipped("its name has a NUL byte".into()) };
    // Not blocking: opening a FIFO must not wait for a writer.
    let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match sys::open_beneath(folder, &name, flags, 0) {
        Ok(file) => file,
        Err(Errno::ENOENT) => return skipped("missing".into()),
        Err(Errno::ELOOP) => return skipped("a symbolic link".into()),
        Err(Errno::EXDEV) => return skipped("it leaves the working folder".into()),
        Err(Errno::ENXIO) => return skipped("not a regular file".into()),
        Err(errno) => return skipped(errno.desc().into()),
    };
    let metadata = match File::from(match file.try_clone() {
        Ok(copy) => copy,
        Err(error) => return skipped(error.to_string()),
    })
    .metadata()
    {
        Ok(metadata) => metadata,
        Err(error) => return skipped(error.to_string()),
    };
    if !metadata.is_file() {
        return skipped("not a regular file".into());
    }
    let length = metadata.len();
    if length > bytes_max || metadata.blocks() * 512 > bytes_max.saturating_add(1 << 20) {
        return skipped(format!("larger than the limit of {bytes_max} bytes"));
    }
    // Reads of it must not be non-blocking for whoever gets it.
    // SAFETY: fcntl(2) on a descriptor that we own.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_RDONLY) };
    (Collected::File { length }, Some(file))
}
