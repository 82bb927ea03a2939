//! The folder of one run, below `muster-UID` in the temporary folder; finding
//! the newest run; removing a run's folder, and nothing that is mounted in it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The coordinator's socket for operators, in a run's folder.
pub const OPERATOR_SOCKET: &str = "operator.sock";
/// `sun_path` has 108 bytes with its NUL; this much is left for names below a run's folder.
const FOLDER_BYTES_MAX: usize = 108 - 40;

/// The folders in which runs may be: of TMPDIR, and of /tmp.
fn bases() -> Vec<PathBuf> {
    let name = format!("muster-{}", nix::unistd::geteuid());
    let mut bases = vec![std::env::temp_dir().join(&name), Path::new("/tmp").join(&name)];
    bases.retain(|base| base.as_os_str().len() + 8 < FOLDER_BYTES_MAX);
    bases.dedup();
    bases
}

/// Only a folder of our own that nobody else may write to is used.
fn is_ours(folder: &Path) -> bool {
    folder.symlink_metadata().is_ok_and(|found| {
        found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() && found.permissions().mode() & 0o022 == 0
    })
}

/// Makes a folder for a new run. Others may pass through it, so that jobs with
/// uids of their own reach what is theirs; what is in it is closed one by one.
pub fn create() -> io::Result<PathBuf> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "TMPDIR is too long for a socket's path");
    for base in bases() {
        // Another run's end may remove the base between the two steps.
        for _ in 0..8 {
            match fs::DirBuilder::new().mode(0o711).create(&base) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    last = error;
                    break;
                }
            }
            if !is_ours(&base) {
                last = io::Error::other(format!("{} belongs to somebody else", base.display()));
                break;
            }
            let mut name = [0u8; 3];
            getrandom::fill(&mut name).map_err(|error| io::Error::other(error.to_string()))?;
            let folder = base.join(name.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
            match fs::DirBuilder::new().mode(0o711).create(&folder) {
                Ok(()) => return Ok(folder),
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}

/// The socket of the run that was started last and still has one.
pub fn newest_operator_socket() -> Option<PathBuf> {
    let mut newest: Option<(SystemTime, PathBuf)> = None;
    for base in bases().into_iter().filter(|base| is_ours(base)) {
        for run in fs::read_dir(base).into_iter().flatten().flatten() {
            let socket = run.path().join(OPERATOR_SOCKET);
            let Ok(made) = socket.symlink_metadata().and_then(|found| found.modified()) else { continue };
            // A socket that nobody listens on is what a run left when its machine went down.
            let answers = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
            if newest.as_ref().is_none_or(|(time, _)| made > *time) && answers() {
                newest = Some((made, socket));
            }
        }
    }
    newest.map(|(_, socket)| socket)
}

/// Removes a run's folder, and the base if that was the last run.
pub fn remove(folder: &Path) -> io::Result<()> {
    remove_tree(folder)?;
    if let Some(base) = folder.parent() {
        // Other runs may still be there.
        drop(fs::remove_dir(base));
    }
    Ok(())
}

/// Removes a folder with all that is in it; refused while something is mounted there.
pub fn remove_tree(folder: &Path) -> io::Result<()> {
    if let Some(mounted) = mounted_below(folder)? {
        return Err(io::Error::other(format!("{} is still mounted", mounted.display())));
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Something that is mounted at or below the folder: removing would reach into it.
fn mounted_below(folder: &Path) -> io::Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.into_iter().find(|point| point.starts_with(folder)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_folder_is_ours_and_goes_again() {
        let folder = create().unwrap();
        assert!(is_ours(&folder));
        fs::write(folder.join("x"), "y").unwrap();
        remove(&folder).unwrap();
        assert!(!folder.exists());
        remove(&folder).unwrap();
    }
}
