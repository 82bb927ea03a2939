//! What jobs may know of this host: a file that is there while it drains. One
//! folder for all, which each strict root shows read-only as `/run/muster`.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use super::Keeper;
use crate::spawner::protocol::{Profile, Start};

/// The folder below the spawner's own.
const FOLDER: &str = "told";
/// Where a strict job sees it.
const SEEN: &str = "/run/muster";
/// The file in it.
const DRAIN: &str = "drain";
/// Names the file to the job.
const VARIABLE: &[u8] = b"MUSTER_DRAIN_FILE";
/// The word for a drain without a deadline.
const NO_DEADLINE: &str = "none";

/// Makes the folder. What an earlier life has told is over, unless this one goes on from it.
pub(super) fn make_folder(state: &Path, goes_on: bool) -> io::Result<PathBuf> {
    let folder = state.join(FOLDER);
    fs::create_dir_all(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    if !goes_on {
        remove(&folder)?;
    }
    Ok(folder)
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(DRAIN)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whole or not there: one line, the deadline in seconds of the Unix clock, or `none`.
fn write(folder: &Path, deadline_unix_s: Option<u64>) -> io::Result<()> {
    let line = deadline_unix_s.map_or_else(|| NO_DEADLINE.to_owned(), |at| at.to_string());
    let new = folder.join("drain.new");
    fs::write(&new, format!("{line}\n"))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644))?;
    fs::rename(new, folder.join(DRAIN))
}

impl Keeper {
    /// None: this host does not drain.
    pub(super) fn notice_drain(&mut self, deadline_unix_s: Option<Option<u64>>) {
        let told = match deadline_unix_s {
            Some(deadline) => write(&self.told, deadline),
            None => remove(&self.told),
        };
        if let Err(error) = told {
            tracing::warn!(folder = %self.told.display(), "jobs cannot be told of the drain: {error}");
        }
    }

    /// The job finds the file, under the name that it has for it, whatever it was given.
    pub(super) fn name_notice(&self, start: &mut Start) {
        let folder = if start.profile == Profile::Strict { Path::new(SEEN) } else { &self.told };
        start.environment.retain(|(name, _)| name != VARIABLE);
        let path = folder.join(DRAIN);
        start.environment.push((VARIABLE.to_vec(), std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_until_when_and_goes_with_the_drain() {
        let state = tempfile::tempdir().unwrap();
        let folder = make_folder(state.path(), false).unwrap();
        let read = || fs::read_to_string(folder.join(DRAIN)).ok();
        assert_eq!(read(), None);
        write(&folder, Some(1_795_804_200)).unwrap();
        assert_eq!(read().as_deref(), Some("1795804200\n"));
        write(&folder, None).unwrap();
        assert_eq!(read().as_deref(), Some("none\n"));
        make_folder(state.path(), true).unwrap();
        assert_eq!(read().as_deref(), Some("none\n"), "an upgrade goes on from it");
        make_folder(state.path(), false).unwrap();
        assert_eq!(read(), None, "a new life begins without one");
        remove(&folder).unwrap();
    }
}
