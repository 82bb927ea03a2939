//! Content-addressed bytes in a folder: `blobs/ab/cdef…`, named by their SHA-256.
//!
//! A blob is whole, verified and on the disk before it has its name, so a name
//! that is there can be trusted. All calls here block.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use muster_core::limits;
use sha2::{Digest as _, Sha256};

use crate::{hex, tokens::random};

/// A blob's name.
pub type Digest = [u8; 32];

/// Why a blob could not be kept or given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not here.
    #[error("there is no blob {}; store it first", hex::encode(.0))]
    Unknown(Digest),
    /// The bytes are not what the name says.
    #[error("the bytes have SHA-256 {}, not {} as announced", hex::encode(.found), hex::encode(.announced))]
    Mismatch {
        /// What was announced.
        announced: Digest,
        /// What came.
        found: Digest,
    },
    /// Too large.
    #[error("a blob has at most {} bytes", limits::BLOB_BYTES_MAX)]
    TooLarge,
    /// The slice reaches past its end.
    #[error("blob {} has {length} bytes, and bytes up to {asked} were asked", hex::encode(.digest))]
    PastEnd {
        /// The blob.
        digest: Digest,
        /// Its length.
        length: u64,
        /// The end of what was asked.
        asked: u64,
    },
    /// The disk is full.
    #[error("the coordinator's disk is full; free some space and try again")]
    DiskFull,
    /// The system refused.
    #[error("cannot {doing} a blob")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The nearest error of the system, for who is told a number.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unknown(_) => libc::ENOENT,
            Self::TooLarge => libc::EFBIG,
            Self::DiskFull => libc::ENOSPC,
            Self::Mismatch { .. } | Self::PastEnd { .. } => libc::EIO,
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull,
        _other => Error::Io { doing, source },
    }
}

/// The folder.
#[derive(Debug)]
pub struct Blobs {
    root: PathBuf,
    /// Of this process alone: coordinators in containers may share the folder and have the same pid.
    own: String,
    writes: AtomicU64,
}

/// A blob on its way in. Dropped before its end, it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    file: File,
    path: PathBuf,
    hash: Sha256,
    length: u64,
    announced: Option<Digest>,
    kept: bool,
}

impl Blobs {
    /// Opens the folder, and sweeps what a crash left half written.
    ///
    /// # Errors
    /// The system refuses.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let incoming = root.join("incoming");
        fs::create_dir_all(&incoming).map_err(failed("make a folder for"))?;
        for entry in fs::read_dir(&incoming).map_err(failed("sweep"))?.flatten() {
            let _ = fs::remove_file(entry.path());
        }
        Ok(Self { root: root.to_owned(), own: hex::encode(&random::<8>()), writes: AtomicU64::new(0) })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = hex::encode(digest);
        self.root.join(&name[..2]).join(&name[2..])
    }

    /// Begins a blob; `announced` is checked at the end.
    ///
    /// # Errors
    /// The system refuses.
    pub fn begin(&self, announced: Option<Digest>) -> Result<Incoming, Error> {
        let number = self.writes.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("incoming").join(format!("{}-{number}", self.own));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed("begin"))?;
        Ok(Incoming { file, path, hash: Sha256::new(), length: 0, announced, kept: false })
    }

    /// Gives a whole blob its name. Durable when it returns.
    ///
    /// # Errors
    /// The bytes are not as announced, or the system refuses.
    pub fn finish(&self, mut incoming: Incoming) -> Result<(Digest, u64), Error> {
        let found: Digest = incoming.hash.clone().finalize().into();
        if let Some(announced) = incoming.announced.filter(|announced| *announced != found) {
            return Err(Error::Mismatch { announced, found });
        }
        incoming.file.sync_all().map_err(failed("sync"))?;
        let path = self.path(&found);
        let folder = path.parent().expect("a blob lies in a folder of its own two digits");
        if !folder.exists() {
            fs::create_dir_all(folder).map_err(failed("make a folder for"))?;
            sync_folder(&self.root)?;
        }
        fs::rename(&incoming.path, &path).map_err(failed("name"))?;
        incoming.kept = true;
        sync_folder(folder)?;
        Ok((found, incoming.length))
    }

    /// A blob's length.
    ///
    /// # Errors
    /// It is not here.
    pub fn length(&self, digest: &Digest) -> Result<u64, Error> {
        match fs::metadata(self.path(digest)) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Unknown(*digest)),
            Err(error) => Err(failed("look at")(error)),
        }
    }

    /// Checks that a slice is there.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, digest: &Digest, offset: u64, length: u64) -> Result<(), Error> {
        let whole = self.length(digest)?;
        let asked = offset.saturating_add(length);
        if asked > whole { Err(Error::PastEnd { digest: *digest, length: whole, asked }) } else { Ok(()) }
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// It is not here.
    pub fn file(&self, digest: &Digest) -> Result<File, Error> {
        File::open(self.path(digest)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Unknown(*digest),
            _other => failed("open")(error),
        })
    }

    /// Reads a slice that fits into memory.
    ///
    /// # Errors
    /// It is not all there.
    pub fn slice(&self, digest: &Digest, offset: u64, length: usize) -> Result<Bytes, Error> {
        let mut bytes = vec![0; length];
        self.file(digest)?.read_exact_at(&mut bytes, offset).map_err(failed("read"))?;
        Ok(bytes.into())
    }
}

impl Incoming {
    /// Adds bytes.
    ///
    /// # Errors
    /// Too many, or the system refuses.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.length = self.length.saturating_add(bytes.len() as u64);
        if self.length > limits::BLOB_BYTES_MAX {
            return Err(Error::TooLarge);
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(failed("write"))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync the folder of"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_whole_or_not_there() {
        let root = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(root.path()).unwrap();
        let mut incoming = blobs.begin(None).unwrap();
        incoming.write(b"hello ").unwrap();
        incoming.write(b"world").unwrap();
        let (digest, length) = blobs.finish(incoming).unwrap();
        assert_eq!(length, 11);
        assert_eq!(blobs.slice(&digest, 6, 5).unwrap().as_ref(), b"world");
        assert!(matches!(blobs.check(&digest, 6, 6), Err(Error::PastEnd { length: 11, asked: 12, .. })));
        assert!(matches!(blobs.length(&[9; 32]), Err(Error::Unknown(_))));
    }

    #[test]
    fn other_bytes_than_announced_are_refused_and_swept() {
        let root = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(root.path()).unwrap();
        let mut incoming = blobs.begin(Some([7; 32])).unwrap();
        incoming.write(b"lies").unwrap();
        assert!(matches!(blobs.finish(incoming), Err(Error::Mismatch { .. })));
        assert_eq!(fs::read_dir(root.path().join("incoming")).unwrap().count(), 0);
    }
}
