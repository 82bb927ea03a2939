//! The folders of the parts on this host: on which file system, and how much
//! room there is.

use std::path::{Path, PathBuf};

use nix::sys::{
    statfs::{FsType, statfs},
    statvfs::statvfs,
};

use super::{finding::Finding, host::Host};

/// Below this a job's output has nowhere to go.
const FREE_BYTES_MIN: u64 = 1 << 30;
/// Below this the same, in files.
const FREE_FILES_MIN: u64 = 10_000;

/// What a file system is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keeps what is synced, and locks work.
    Disk,
    /// Gone after a reboot.
    Memory(&'static str),
    /// A container's top layer: gone with it.
    Layer(&'static str),
    /// Locks and syncs depend on another machine.
    Network(&'static str),
}

/// One folder.
#[derive(Clone, Debug)]
pub struct Folder {
    /// `folder.agent` and so on.
    pub check: &'static str,
    /// Where it is, or will be.
    pub path: PathBuf,
    /// Its nearest parent that is there.
    pub kind: Option<Kind>,
    /// Bytes for an ordinary user.
    pub free_bytes: u64,
    /// Files that can be made; none: the file system does not count them.
    pub free_files: Option<u64>,
    /// After a reboot its content is needed again.
    pub durable: bool,
}

impl Folder {
    /// Looks at the folder, or at its nearest parent.
    pub fn look(host: &Host, check: &'static str, path: &Path, durable: bool) -> Self {
        let real = host.path(path);
        let there = real.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        let space = statvfs(there).ok();
        Self {
            check,
            path: path.to_owned(),
            kind: statfs(there).ok().map(|disk| kind(disk.filesystem_type())),
            free_bytes: space.map_or(0, |disk| disk.blocks_available().saturating_mul(disk.fragment_size())),
            free_files: space.and_then(|disk| (disk.files() > 0).then_some(disk.files_available())),
            durable,
        }
    }

    /// The rule.
    pub fn finding(&self) -> Finding {
        let (path, affects) = (self.path.display(), if self.durable { "FL-1, FL-10" } else { "starts of jobs" });
        let move_it = format!("give it a disk: mount one at {path}, or choose another folder");
        match self.kind {
            None => return Finding::unknown(self.check, affects, format!("{path} cannot be looked at"), "run as root"),
            Some(Kind::Network(name)) => {
                let seen = format!("{path} is on {name}, where locks and syncs do not hold as they must");
                return Finding::missing(self.check, affects, seen, move_it);
            }
            Some(Kind::Memory(name)) if self.durable => {
                let seen = format!("{path} is on {name}: a reboot loses it");
                return Finding::warn(self.check, affects, seen, move_it);
            }
            Some(Kind::Layer(name)) if self.durable => {
                let seen = format!("{path} is on {name}: it goes with the container");
                return Finding::warn(self.check, affects, seen, move_it);
            }
            Some(Kind::Disk | Kind::Memory(_) | Kind::Layer(_)) => {}
        }
        let free = format!("{path}: {} MiB free", self.free_bytes >> 20);
        if self.free_bytes < FREE_BYTES_MIN {
            let mend = format!("free {} MiB, or mount a larger disk at {path}", FREE_BYTES_MIN >> 20);
            return Finding::warn(self.check, affects, free, mend);
        }
        if let Some(files) = self.free_files.filter(|files| *files < FREE_FILES_MIN) {
            let mend = "remove small files, or make the file system with more inodes (mkfs.ext4 -N)";
            return Finding::warn(self.check, affects, format!("{path}: only {files} files more"), mend);
        }
        Finding::ok(self.check, affects, free)
    }
}

fn kind(magic: FsType) -> Kind {
    // statfs(2), linux/magic.h; as i64 they are the same on all our targets.
    match magic.0 as u64 & 0xffff_ffff {
        0x0102_1994 => Kind::Memory("tmpfs"),
        0x8584_58f6 => Kind::Memory("ramfs"),
        0x794c_7630 => Kind::Layer("overlayfs"),
        0x6969 => Kind::Network("NFS"),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => Kind::Network("SMB"),
        0x0102_1997 => Kind::Network("9p"),
        0x00c3_6400 => Kind::Network("Ceph"),
        0x6573_5546 => Kind::Network("FUSE"),
        _ => Kind::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::State;

    fn folder() -> Folder {
        Folder {
            check: "folder.agent",
            path: "/var/lib/muster-agent".into(),
            kind: Some(Kind::Disk),
            free_bytes: 20 << 30,
            free_files: Some(1 << 20),
            durable: true,
        }
    }

    #[test]
    fn a_folder_needs_a_disk_with_room() {
        let state = |change: fn(&mut Folder)| {
            let mut folder = folder();
            change(&mut folder);
            folder.finding().state
        };
        assert_eq!(state(|_| {}), State::Ok);
        assert_eq!(state(|folder| folder.kind = Some(Kind::Network("NFS"))), State::Missing);
        assert_eq!(state(|folder| folder.kind = Some(Kind::Memory("tmpfs"))), State::Warn);
        assert_eq!(state(|folder| (folder.kind, folder.durable) = (Some(Kind::Memory("tmpfs")), false)), State::Ok);
        assert_eq!(state(|folder| folder.free_bytes = 100 << 20), State::Warn);
        assert_eq!(state(|folder| folder.free_files = Some(10)), State::Warn);
        assert_eq!(state(|folder| folder.free_files = None), State::Ok);
        assert_eq!(state(|folder| folder.kind = None), State::Unknown);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_seen_by_its_parent() {
        let parent = tempfile::tempdir().unwrap();
        let seen = Folder::look(&Host::below(parent.path()), "folder.agent", Path::new("/not/yet"), true);
        assert!(seen.kind.is_some() && seen.free_bytes > 0, "{seen:?}");
        assert_eq!(kind(nix::sys::statfs::TMPFS_MAGIC), Kind::Memory("tmpfs"));
        assert_eq!(kind(nix::sys::statfs::NFS_SUPER_MAGIC), Kind::Network("NFS"));
    }
}
