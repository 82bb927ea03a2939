//! Room on the coordinator's disks. Before the last of it is used, what makes
//! more work is refused, so that ends, cancels and drains can still be stored.

use std::{path::PathBuf, sync::Arc, time::Duration};

use muster_core::limits;
use nix::sys::statvfs::statvfs;
use tokio::sync::Semaphore;

/// A shared folder whose server is gone holds who looks at it: so many at once, and each so long, then it counts as full.
const LOOKS_MAX: usize = 4;
const PATIENCE: Duration = Duration::from_secs(2);

/// The disks that hold the state, and blobs and logs.
#[derive(Clone, Debug)]
pub struct Room {
    folders: Arc<[PathBuf]>,
    looks: Arc<Semaphore>,
}

/// There is no room for more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// A disk is nearly full.
    #[error(
        "the coordinator's disk is nearly full: {free_mib} MiB are left in {}, and the last {reserve_mib} MiB are kept for \
         what is under way; free some space and try again", folder.display()
    )]
    Full {
        /// Where.
        folder: PathBuf,
        /// What is left.
        free_mib: u64,
        /// What is kept.
        reserve_mib: u64,
    },
    /// The system does not say what is left.
    #[error("the disk of the coordinator's folders does not answer; nothing new is taken until it does")]
    Silent,
}

impl Room {
    /// In these folders.
    #[must_use]
    pub fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders: folders.into(), looks: Arc::new(Semaphore::new(LOOKS_MAX)) }
    }

    /// Whether there is room for more than what is under way. It never holds up the thread that asks.
    ///
    /// # Errors
    /// A disk has less left than is kept for that, or does not answer.
    pub async fn check(&self) -> Result<(), NoRoom> {
        let (folders, looks) = (Arc::clone(&self.folders), Arc::clone(&self.looks));
        let look = async {
            let permit = looks.acquire_owned().await.expect("it is never closed");
            let look = tokio::task::spawn_blocking(move || {
                // Kept until the look is over, however long that takes: no more threads hang than may look.
                let _permit = permit;
                look_at(&folders)
            });
            look.await.expect("a look does not panic")
        };
        tokio::time::timeout(PATIENCE, look).await.unwrap_or(Err(NoRoom::Silent))
    }
}

fn look_at(folders: &[PathBuf]) -> Result<(), NoRoom> {
    folders.iter().try_for_each(|folder| {
        // A disk that says nothing of itself fails by its own errors.
        let Ok(disk) = statvfs(folder) else { return Ok(()) };
        let size: u64 = disk.fragment_size();
        let (free, whole) = (disk.blocks_available() * size, disk.blocks() * size);
        let reserve = limits::DISK_RESERVE_BYTES.min(whole / limits::DISK_RESERVE_PART);
        if free >= reserve {
            return Ok(());
        }
        Err(NoRoom::Full { folder: folder.clone(), free_mib: free >> 20, reserve_mib: reserve >> 20 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_that_does_not_answer_holds_up_nobody() {
        let room = Room::new(vec![std::env::temp_dir()]);
        assert_eq!(room.check().await, Ok(()));
        // As many looks hang as may.
        let hang = Arc::clone(&room.looks).acquire_many_owned(u32::try_from(LOOKS_MAX).unwrap()).await.unwrap();
        assert_eq!(room.check().await, Err(NoRoom::Silent));
        drop(hang);
        assert_eq!(room.check().await, Ok(()));
    }
}
