//! Room on the coordinator's disks. Before the last of it is used, what makes
//! more work is refused, so that ends, cancels and drains can still be stored.

use std::path::PathBuf;

use muster_core::limits;
use nix::sys::statvfs::statvfs;

/// The disks that hold the state, and blobs and logs.
#[derive(Clone, Debug)]
pub struct Room {
    folders: Vec<PathBuf>,
}

/// A disk is nearly full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the coordinator's disk is nearly full: {free_mib} MiB are left in {}, and the last {reserve_mib} MiB are kept for \
     what is under way; free some space and try again", folder.display()
)]
pub struct Full {
    folder: PathBuf,
    free_mib: u64,
    reserve_mib: u64,
}

impl Room {
    /// In these folders.
    #[must_use]
    pub const fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// Whether there is room for more than what is under way.
    ///
    /// # Errors
    /// A disk has less left than is kept for that.
    pub fn check(&self) -> Result<(), Full> {
        self.folders.iter().try_for_each(|folder| {
            // A disk that says nothing of itself fails by its own errors.
            let Ok(disk) = statvfs(folder) else { return Ok(()) };
            let size: u64 = disk.fragment_size();
            let (free, whole) = (disk.blocks_available() * size, disk.blocks() * size);
            let reserve = limits::DISK_RESERVE_BYTES.min(whole / limits::DISK_RESERVE_PART);
            if free >= reserve {
                return Ok(());
            }
            Err(Full { folder: folder.clone(), free_mib: free >> 20, reserve_mib: reserve >> 20 })
        })
    }
}
