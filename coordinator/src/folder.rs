//! The coordinator's data folder: who may use it, and what it must hold.
//!
//! `fleet.toml` is written last when a fleet is made. Where it is, a store must
//! be: without one the coordinator refuses to start rather than begin empty.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, lchown},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::store;

/// What can be wrong with the folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another coordinator works on it.
    #[error("{folder} is in use by the coordinator with pid {pid}; stop that one first, or choose another folder")]
    InUse {
        /// The folder.
        folder: String,
        /// As the holder wrote it.
        pid: String,
    },
    /// `init` on a folder that has a fleet.
    #[error("{folder} already holds fleet {fleet}; nothing was changed")]
    Exists {
        /// The folder.
        folder: String,
        /// Its fleet.
        fleet: String,
    },
    /// `serve` on a folder without one.
    #[error("{folder} holds no fleet; make one with `muster-coordinator init --data {folder}`, or serve with --init")]
    Empty {
        /// The folder.
        folder: String,
    },
    /// The marker does not read.
    #[error("{file} does not read as a fleet's marker")]
    Marker {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: toml::de::Error,
    },
    /// A shared folder of another fleet.
    #[error("{folder} belongs to fleet {owner}, and this coordinator to fleet {fleet}")]
    OtherFleet {
        /// The folder.
        folder: String,
        /// Whose it is.
        owner: String,
        /// Ours.
        fleet: String,
    },
    /// The system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The marker: this folder belongs to a fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Marker {
    /// Random, in hexadecimal.
    pub fleet: String,
    /// Names and addresses in the server's certificate beside the usual ones.
    #[serde(default)]
    pub sans: Vec<String>,
    /// Where the state is kept.
    #[serde(default, skip_serializing_if = "StoreKind::is_folder")]
    pub store: StoreKind,
}

/// Where a fleet's state is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// In the data folder.
    #[default]
    Folder,
    /// In a data base that several coordinators share.
    Postgres,
}

impl StoreKind {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    const fn is_folder(&self) -> bool {
        matches!(self, Self::Folder)
    }
}

impl std::fmt::Display for StoreKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Folder => "a store in the folder itself (without --store)",
            Self::Postgres => "a store in PostgreSQL (--store postgres://...)",
        })
    }
}

/// The folder, held by this process until dropped.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    _lock: Flock<File>,
}

pub(crate) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Io { doing, path, source }
}

impl Folder {
    /// Makes the folder if need be, and takes it for this process alone.
    ///
    /// # Errors
    /// Another coordinator has it, or the system refuses.
    pub fn take(root: &Path) -> Result<Self, Error> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io_error("make", root))?;
        let path = root.join("coordinator.lock");
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        let mut pid = String::new();
        let _ = (&mut file).take(32).read_to_string(&mut pid);
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| Error::InUse { folder: root.display().to_string(), pid: pid.trim().to_owned() })?;
        lock.set_len(0)
            .and_then(|()| io::Seek::rewind(&mut *lock))
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(io_error("write", &path))?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// A path below it.
    #[must_use]
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// What root has made here is given to whom the folder belongs: the unit's coordinator is a user of its own, and
    /// could not open it. Blobs and logs are made by that coordinator alone.
    ///
    /// # Errors
    /// The system refuses.
    pub fn give_to_owner(&self) -> Result<(), Error> {
        let owner = fs::metadata(&self.root).map_err(io_error("look at", &self.root))?;
        let ours = nix::unistd::geteuid().as_raw();
        if owner.uid() == ours {
            return Ok(());
        }
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(io_error("read", &folder))? {
                let path = entry.map_err(io_error("read", &folder))?.path();
                let found = fs::symlink_metadata(&path).map_err(io_error("look at", &path))?;
                if found.uid() == ours {
                    lchown(&path, Some(owner.uid()), Some(owner.gid())).map_err(io_error("give away", &path))?;
                }
                if found.is_dir() && !path.ends_with("blobs") && !path.ends_with("logs") {
                    folders.push(path);
                }
            }
        }
        Ok(())
    }

    /// The store's file.
    #[must_use]
    pub fn store_file(&self) -> PathBuf {
        self.path("fleet.db")
    }

    /// The marker, if a fleet was made here.
    ///
    /// # Errors
    /// It is there and does not read.
    pub fn marker(&self) -> Result<Option<Marker>, Error> {
        read_marker(&self.path("fleet.toml"))
    }

    /// Writes the marker: from here on the folder must have a store.
    ///
    /// # Errors
    /// The system refuses.
    pub fn mark(&self, marker: &Marker) -> Result<(), Error> {
        let text = toml::to_string(marker).expect("a marker is a plain table");
        write_durably(&self.path("fleet.toml"), text.as_bytes(), 0o600)
    }

    /// Opens the store that a marked folder must have.
    ///
    /// # Errors
    /// It is missing, damaged or of a later schema.
    pub fn open_store(&self) -> Result<store::EmbeddedStore, store::Error> {
        let file = self.store_file();
        if !file.exists() {
            return Err(store::Error::Missing {
                folder: self.root.display().to_string(),
                file: file.display().to_string(),
            });
        }
        store::EmbeddedStore::open(&file)
    }
}

/// A folder's marker, if a fleet was made there.
///
/// # Errors
/// It is there and does not read.
pub fn read_marker(file: &Path) -> Result<Option<Marker>, Error> {
    match fs::read_to_string(file) {
        Ok(text) => {
            toml::from_str(&text).map(Some).map_err(|source| Error::Marker { file: file.display().to_string(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", file)(error)),
    }
}

/// The folder that several coordinators share for blobs and logs: bound to its fleet by the first of them, so that
/// a folder that is not mounted, or another fleet's, is noticed.
///
/// # Errors
/// It is not there, belongs to another fleet, or the system refuses.
pub fn take_shared(shared: &Path, fleet: &str) -> Result<PathBuf, Error> {
    let file = shared.join("fleet");
    if !file.exists() {
        fs::metadata(shared).map_err(io_error("find", shared))?;
        // Several may come at once: each writes a file of its own, and the first to give it the name has bound the folder.
        let mine = shared.join(format!("fleet-{}", crate::hex::encode(&crate::tokens::random::<8>())));
        write_durably(&mine, format!("{fleet}\n").as_bytes(), 0o644)?;
        let named = fs::hard_link(&mine, &file);
        let _ = fs::remove_file(&mine);
        match named {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("name", &file)(error)),
            Ok(()) | Err(_) => {}
        }
    }
    let owner = fs::read_to_string(&file).map_err(io_error("read", &file))?;
    if owner.trim() == fleet {
        return Ok(shared.to_owned());
    }
    Err(Error::OtherFleet {
        folder: shared.display().to_string(),
        owner: owner.trim().to_owned(),
        fleet: fleet.to_owned(),
    })
}

/// Writes a file whole or not at all, durable when it returns.
pub(crate) fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .map_err(io_error("make", &temporary))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("rename", path))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(io_error("sync", parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_makes_in_another_users_folder_is_that_users() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        lchown(root.path(), Some(12_345), Some(12_346)).unwrap();
        let held = Folder::take(root.path()).unwrap();
        fs::create_dir(held.path("pki")).unwrap();
        fs::write(held.path("pki/ca.key"), "secret").unwrap();
        std::os::unix::fs::symlink("/etc/hostname", held.path("link")).unwrap();
        held.give_to_owner().unwrap();
        for made in ["pki", "pki/ca.key", "link", "coordinator.lock"] {
            let found = fs::symlink_metadata(held.path(made)).unwrap();
            assert_eq!((found.uid(), found.gid()), (12_345, 12_346), "{made}");
        }
        assert_eq!(fs::metadata("/etc/hostname").unwrap().uid(), 0, "no link is followed");
    }

    #[test]
    fn a_second_holder_is_refused_and_told_who_has_it() {
        let root = tempfile::tempdir().unwrap();
        let held = Folder::take(root.path()).unwrap();
        let refused = Folder::take(root.path()).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(held);
        assert!(Folder::take(root.path()).is_ok());
    }

    #[test]
    fn a_shared_folder_belongs_to_one_fleet_whoever_comes_first() {
        let root = tempfile::tempdir().unwrap();
        assert!(take_shared(&root.path().join("not-mounted"), "ab").is_err());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| take_shared(root.path(), "ab").unwrap());
            }
        });
        let refused = take_shared(root.path(), "cd").unwrap_err().to_string();
        assert!(refused.contains("belongs to fleet ab"), "{refused}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing else is left there");
    }

    #[test]
    fn a_marked_folder_without_a_store_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::take(root.path()).unwrap();
        assert_eq!(folder.marker().unwrap(), None);
        let marker = Marker { fleet: "ab".into(), sans: vec!["fleet.example".into()], store: StoreKind::Folder };
        folder.mark(&marker).unwrap();
        assert_eq!(folder.marker().unwrap(), Some(marker));
        assert!(matches!(folder.open_store(), Err(store::Error::Missing { .. })));
    }
}
