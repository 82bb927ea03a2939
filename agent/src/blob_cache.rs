//! Fetched blobs, kept as files named by their SHA-256: a job array fetches
//! its inputs once per host. Bounded; what was used longest ago goes first.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::PathBuf,
    rc::Rc,
    time::{Duration, SystemTime},
};

use muster_core::limits;
use muster_proto::v1;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, watch};
use tonic::{Code, Status, transport::Channel};

use crate::hex;

/// The present channel to the coordinator, if there is one.
pub type ChannelWatch = watch::Receiver<Option<Channel>>;

/// A SHA-256.
pub type Digest = [u8; 32];

/// A blob cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The coordinator has no such blob, or gives it not.
    #[error("the coordinator did not give blob {}: {}", hex::encode(digest), status.message())]
    Refused {
        /// Its name.
        digest: Digest,
        /// The answer.
        status: Box<Status>,
    },
    /// The bytes are not what the name says.
    #[error("blob {} came with another SHA-256", hex::encode(.0))]
    Mismatch(Digest),
    /// The disk did not take it.
    #[error("cannot keep blob {}", hex::encode(digest))]
    Disk {
        /// Its name.
        digest: Digest,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The agent leaves.
    #[error("the agent leaves")]
    Leaving,
}

/// The folder. Cheap to clone; all clones are the same cache.
#[derive(Clone)]
pub struct BlobCache {
    shared: Rc<Shared>,
}

struct Shared {
    folder: PathBuf,
    bytes_max: u64,
    kept: RefCell<Kept>,
    /// One fetch of a blob at a time; the others wait for it.
    fetching: RefCell<BTreeMap<Digest, Rc<Mutex<()>>>>,
}

#[derive(Default)]
struct Kept {
    by_digest: BTreeMap<Digest, (u64, u64)>,
    bytes: u64,
    clock: u64,
}

impl BlobCache {
    /// Takes over what is in the folder; half-fetched blobs are removed.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn open(folder: PathBuf, bytes_max: u64) -> io::Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let digest: Option<Digest> =
                hex::decode(&entry.file_name().to_string_lossy()).and_then(|bytes| bytes.try_into().ok());
            match (digest, entry.metadata()) {
                (Some(digest), Ok(metadata)) => {
                    let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    found.push((used, digest, metadata.len()));
                }
                (None, _) | (_, Err(_)) => drop(fs::remove_file(entry.path())),
            }
        }
        found.sort_unstable();
        let mut kept = Kept::default();
        for (_, digest, length) in found {
            kept.insert(digest, length);
        }
        let shared = Shared { folder, bytes_max, kept: RefCell::new(kept), fetching: RefCell::default() };
        Ok(Self { shared: Rc::new(shared) })
    }

    /// The whole blob, open for reading. Waits while there is no connection.
    ///
    /// # Errors
    /// The coordinator does not have it, or the disk does not take it.
    pub async fn get(&self, digest: Digest, channels: &mut ChannelWatch) -> Result<File, BlobError> {
        let turn = Rc::clone(self.shared.fetching.borrow_mut().entry(digest).or_default());
        let held = turn.lock().await;
        let result = self.get_alone(digest, channels).await;
        drop(held);
        let mut fetching = self.shared.fetching.borrow_mut();
        if Rc::strong_count(&turn) <= 2 {
            fetching.remove(&digest);
        }
        result
    }

    async fn get_alone(&self, digest: Digest, channels: &mut ChannelWatch) -> Result<File, BlobError> {
        if let Some(file) = self.kept(digest) {
            return Ok(file);
        }
        loop {
            let channel = wait_for_channel(channels).await.ok_or(BlobError::Leaving)?;
            match self.fetch(digest, channel).await {
                Err(BlobError::Refused { status, .. }) if is_passing(&status) => {
                    tokio::time::sleep(FETCH_AGAIN).await;
                }
                result => return result,
            }
        }
    }

    fn kept(&self, digest: Digest) -> Option<File> {
        let mut kept = self.shared.kept.borrow_mut();
        let length = kept.by_digest.get(&digest)?.0;
        let file = File::open(self.path(digest)).ok()?;
        kept.insert(digest, length);
        // Only the order after a restart depends on it.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    async fn fetch(&self, digest: Digest, channel: Channel) -> Result<File, BlobError> {
        let refused = |status| BlobError::Refused { digest, status: Box::new(status) };
        let disk = |source| BlobError::Disk { digest, source };
        let mut client =
            v1::agent_client::AgentClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
        let whole = v1::BlobRef { digest: digest.to_vec().into(), offset: 0, length: 0 };
        let mut chunks = client.fetch_blob(whole).await.map_err(refused)?.into_inner();
        let fresh = Fresh(self.shared.folder.join(format!("{}.new", hex::encode(&digest))));
        let mut file =
            File::options().read(true).write(true).create(true).truncate(true).open(&fresh.0).map_err(disk)?;
        let (mut hash, mut length) = (Sha256::new(), 0u64);
        while let Some(chunk) = chunks.message().await.map_err(refused)? {
            length += chunk.data.len() as u64;
            if length > limits::BLOB_BYTES_MAX {
                return Err(BlobError::Mismatch(digest));
            }
            hash.update(&chunk.data);
            file.write_all(&chunk.data).map_err(disk)?;
        }
        if hash.finalize().as_slice() != digest {
            return Err(BlobError::Mismatch(digest));
        }
        // A name in this folder is trusted after a power loss too.
        let file = tokio::task::spawn_blocking(move || file.sync_data().map(|()| file))
            .await
            .expect("syncing does not panic")
            .map_err(disk)?;
        fs::rename(&fresh.0, self.path(digest)).map_err(disk)?;
        self.shared.kept.borrow_mut().insert(digest, length);
        self.evict(digest);
        Ok(file)
    }

    fn evict(&self, newest: Digest) {
        let mut kept = self.shared.kept.borrow_mut();
        while kept.bytes > self.shared.bytes_max {
            let oldest =
                kept.by_digest.iter().filter(|(digest, _)| **digest != newest).min_by_key(|(_, (_, used))| *used);
            let Some(digest) = oldest.map(|(digest, _)| *digest) else { return };
            kept.remove(digest);
            // Jobs that still read it hold it open.
            let _ = fs::remove_file(self.path(digest));
        }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.shared.folder.join(hex::encode(&digest))
    }
}

impl Kept {
    fn insert(&mut self, digest: Digest, length: u64) {
        self.remove(digest);
        self.clock += 1;
        self.bytes += length;
        self.by_digest.insert(digest, (length, self.clock));
    }

    fn remove(&mut self, digest: Digest) {
        if let Some((length, _)) = self.by_digest.remove(&digest) {
            self.bytes -= length;
        }
    }
}

/// A file that goes away unless it got its name.
struct Fresh(PathBuf);

impl Drop for Fresh {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Between two tries of a fetch or a store whose stream broke.
pub const FETCH_AGAIN: Duration = Duration::from_millis(500);

/// The present channel, or the next one; none if the agent leaves.
pub async fn wait_for_channel(channels: &mut ChannelWatch) -> Option<Channel> {
    channels.wait_for(Option::is_some).await.ok().and_then(|channel| channel.clone())
}

/// Trying again may help: the stream broke, or the coordinator is short of something.
#[must_use]
pub fn is_passing(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable
        | Code::Unknown
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::ResourceExhausted
        | Code::Internal => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_first_and_leftovers_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        for (digest, at) in [([1u8; 32], 300), ([2; 32], 100), ([3; 32], 200)] {
            let file = File::create(folder.path().join(hex::encode(&digest))).unwrap();
            file.set_len(10).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(at)).unwrap();
        }
        fs::write(folder.path().join("half.new"), "x").unwrap();
        let cache = BlobCache::open(folder.path().to_owned(), 20).unwrap();
        assert!(!folder.path().join("half.new").exists());
        assert!(cache.kept([2; 32]).is_some());
        cache.evict([1; 32]);
        assert!(cache.kept([3; 32]).is_none());
        assert!(cache.kept([1; 32]).is_some() && cache.kept([2; 32]).is_some());
    }
}
