//! The agent's folder: what it must remember over its own restart.
//!
//! Durable (synced): who it is, how often it started, which drain it is closed
//! for, what leaders said that they had committed, and that it was released. Not synced: the reasons of running stops and
//! the output spool; a power loss ends the jobs that they belong to.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use muster_core::{effect::StopReason, ids::Revision, timeline::Seen};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{hex, spawner::protocol::AttemptKey};

/// A file or folder of the agent's could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct StateError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl StateError {
    fn is_for_want_of_room(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The agent's folder, locked while this lives.
#[derive(Debug)]
pub struct StateFolder {
    root: PathBuf,
    remembered: Remembered,
    seen: SeenNote,
    seen_noted: Instant,
    _lock: Flock<File>,
}

/// What a leader said, with its seal, which alone makes it count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenNote {
    /// Its term and last commit.
    pub seen: Seen,
    /// Hexadecimal.
    pub seal: String,
}

/// What leaders said, below the agent's folder.
const SEEN_FILE: &str = "seen.json";
/// Given up for a small write when the disk is full.
const RESERVE_FILE: &str = "reserve";
const RESERVE_BYTES: usize = 64 << 10;
/// The drain that this host is closed for.
const CLOSED_FILE: &str = "closed_for_drain";
/// Between two notes of what one leader says.
const SEEN_EVERY: Duration = Duration::from_secs(60);

fn read_seen(path: &Path) -> Result<SeenNote, StateError> {
    match fs::read(path) {
        // It is a help to the coordinator; without it this host takes part as one that has seen nothing.
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(SeenNote::default()),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// What counts this installation and its starts.
const REMEMBERED: &str = "agent.json";

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Remembered {
    instance: String,
    agent_start: u64,
}

impl StateFolder {
    /// Makes the folder if there is none, locks it and counts this start.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another agent uses it.
    pub fn open(root: &Path) -> Result<Self, StateError> {
        for folder in ["", "spool", "stops", "cache"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(failed("make the folder", &path))?;
        }
        let lock = lock(&root.join("lock"))?;
        let path = root.join(REMEMBERED);
        let remembered = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| StateError {
                action: "read (it is damaged; restore it, or remove the folder and join again)",
                path: path.clone(),
                source: error.into(),
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Remembered::new(),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let seen = read_seen(&root.join(SEEN_FILE))?;
        let mut state = Self { root: root.to_owned(), remembered, seen, seen_noted: Instant::now(), _lock: lock };
        match state.count_start() {
            Err(error) if error.is_for_want_of_room() => {
                // Nobody uses it yet, and all of it can be fetched again.
                for entry in fs::read_dir(state.cache()).into_iter().flatten().flatten() {
                    let _ = fs::remove_file(entry.path());
                }
                state.count_start()?;
            }
            counted => counted?,
        }
        Ok(state)
    }

    /// A full disk must not keep this agent from what empties it: the spool goes with the uploads.
    fn write(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        let (path, reserve) = (self.root.join(name), self.root.join(RESERVE_FILE));
        let written = match write_durably(&path, content, 0o600) {
            Err(error) if error.is_for_want_of_room() => {
                // What does not go away makes no room, and the second try says so.
                let _ = fs::remove_file(&reserve);
                write_durably(&path, content, 0o600)
            }
            written => written,
        };
        let is_whole = fs::metadata(&reserve).is_ok_and(|found| found.len() == RESERVE_BYTES as u64);
        if written.is_ok() && !is_whole {
            // Without room for it now there may be at the next write.
            let _ = fs::write(&reserve, [0x5a; RESERVE_BYTES]);
        }
        written
    }

    /// Counts a start; also of a host that begins anew under the same agent.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn count_start(&mut self) -> Result<(), StateError> {
        self.remembered.agent_start += 1;
        let text = serde_json::to_vec(&self.remembered).expect("plain fields are JSON");
        self.write(REMEMBERED, &text)
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Random per installation.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.remembered.instance
    }

    /// Grows by one at each start.
    #[must_use]
    pub const fn agent_start(&self) -> u64 {
        self.remembered.agent_start
    }

    /// The last that a leader said it had committed.
    #[must_use]
    pub const fn seen(&self) -> &SeenNote {
        &self.seen
    }

    /// A leader said so. Durable at once when it is another leader, else now and then: after a crash the host
    /// knows a little less, and others know more.
    ///
    /// # Errors
    /// The disk did not take it.
    pub fn note_seen(&mut self, seen: Seen, seal: &[u8]) -> Result<(), StateError> {
        if seen <= self.seen.seen {
            return Ok(());
        }
        let due = seen.term != self.seen.seen.term || self.seen_noted.elapsed() >= SEEN_EVERY;
        self.seen = SeenNote { seen, seal: hex::encode(seal) };
        if due {
            self.seen_noted = Instant::now();
            let text = serde_json::to_vec(&self.seen).expect("plain fields are JSON");
            write_durably(&self.root.join(SEEN_FILE), &text, 0o600)?;
        }
        Ok(())
    }

    /// The folder of output that the coordinator has not acknowledged.
    #[must_use]
    pub fn spool(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// The folder of fetched blobs.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// The drain that an earlier agent closed this host for.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn closed_for(&self) -> Result<Option<Revision>, StateError> {
        let path = self.root.join(CLOSED_FILE);
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map(|number| Some(Revision(number))).map_err(|error| StateError {
                action: "read",
                path,
                source: io::Error::new(io::ErrorKind::InvalidData, error),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Makes it durable that this host is closed for this drain, or open.
    ///
    /// # Errors
    /// The disk did not take it.
    pub fn set_closed_for(&self, revision: Option<Revision>) -> Result<(), StateError> {
        match revision {
            Some(revision) => self.write(CLOSED_FILE, format!("{}\n", revision.0).as_bytes()),
            None => remove_durably(&self.root.join(CLOSED_FILE)),
        }
    }

    /// Notes why an attempt is being stopped, for an agent that finds it stopped.
    ///
    /// # Errors
    /// The disk did not take it.
    pub fn note_stop(&self, key: AttemptKey, reason: StopReason) -> Result<(), StateError> {
        let path = self.stop_note(key);
        fs::write(&path, stop_word(reason)).map_err(failed("write", &path))
    }

    /// Why an attempt was being stopped.
    #[must_use]
    pub fn noted_stop(&self, key: AttemptKey) -> Option<StopReason> {
        let word = fs::read_to_string(self.stop_note(key)).ok()?;
        [StopReason::Cancelled, StopReason::Drained, StopReason::Preempted, StopReason::Superseded]
            .into_iter()
            .find(|reason| stop_word(*reason) == word)
    }

    /// The attempt is forgotten.
    pub fn forget_stop(&self, key: AttemptKey) {
        // A note that stays behind names an attempt that never comes again.
        let _ = fs::remove_file(self.stop_note(key));
    }

    fn stop_note(&self, key: AttemptKey) -> PathBuf {
        self.root.join("stops").join(key_name(key))
    }
}

impl Remembered {
    fn new() -> Self {
        let mut random = [0; 16];
        getrandom::fill(&mut random).expect("the kernel has random numbers once it has booted");
        Self { instance: hex::encode(&random), agent_start: 0 }
    }
}

/// The marker that keeps a released agent down for ever. The spawner's unit does not start while it is there.
const RELEASED: &str = "released";
/// The marker that keeps it down until the next boot: a host that was powered off and is on again is wanted again.
const POWERED_OFF: &str = "powered-off";

/// The marker that keeps a released agent down, with its sentence, if one counts now.
#[must_use]
pub fn released(root: &Path) -> Option<(PathBuf, String)> {
    released_in_boot(root, fs::read_to_string(BOOT_ID).ok().as_deref())
}

fn released_in_boot(root: &Path, this_boot: Option<&str>) -> Option<(PathBuf, String)> {
    [RELEASED, POWERED_OFF].into_iter().find_map(|name| {
        let path = root.join(name);
        let text = fs::read_to_string(&path).ok()?;
        let mut lines = text.lines();
        let sentence = lines.next().unwrap_or_default().to_owned();
        let boot_id = lines.next();
        let is_over = boot_id.is_some() && this_boot.is_some_and(|now| boot_id != Some(now.trim()));
        (!is_over).then_some((path, sentence))
    })
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Writes the marker that keeps this agent down, for ever or until another boot than this one.
///
/// # Errors
/// The disk did not take it.
pub fn mark_released(root: &Path, sentence: &str, boot_id: Option<&str>) -> Result<(), StateError> {
    let (name, text) = match boot_id {
        Some(boot_id) => (POWERED_OFF, format!("{sentence}\n{boot_id}\n")),
        None => (RELEASED, format!("{sentence}\n")),
    };
    write_durably(&root.join(name), text.as_bytes(), 0o644)
}

/// Takes the markers away.
///
/// # Errors
/// The disk did not take it.
pub fn clear_released(root: &Path) -> Result<(), StateError> {
    remove_durably(&root.join(RELEASED))?;
    remove_durably(&root.join(POWERED_OFF))
}

/// A file name for an attempt.
#[must_use]
pub fn key_name(key: AttemptKey) -> String {
    format!("{}.{}.{}.{}", key.job, key.task, key.number, key.term)
}

/// Replaces a file so that a loss of power leaves the old or the new one.
///
/// # Errors
/// The disk did not take it.
pub fn write_durably(path: &Path, content: &[u8], mode: u32) -> Result<(), StateError> {
    let mut name = OsString::from(path.file_name().unwrap_or_default());
    name.push(".new");
    let fresh = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&fresh)
        .map_err(failed("write", &fresh))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write", &fresh))?;
    fs::rename(&fresh, path).map_err(failed("rename", path))?;
    sync_folder_of(path)
}

fn remove_durably(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Ok(()) => sync_folder_of(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

fn sync_folder_of(path: &Path) -> Result<(), StateError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}

fn lock(path: &Path) -> Result<Flock<File>, StateError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed("open", path))?;
    let mut holder = String::new();
    // Who holds it is only for the message.
    let _ = file.read_to_string(&mut holder);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
            Ok(lock)
        }
        Err((_, errno)) => Err(StateError {
            action: "lock",
            path: path.to_owned(),
            source: io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("another agent (pid {}) uses this folder: {errno}", holder.trim()),
            ),
        }),
    }
}

const fn stop_word(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Cancelled => "cancelled",
        StopReason::Drained => "drained",
        StopReason::Preempted => "preempted",
        StopReason::Superseded => "superseded",
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_counts_and_the_instance_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (instance, start) = {
            let state = StateFolder::open(folder.path()).unwrap();
            (state.instance().to_owned(), state.agent_start())
        };
        let state = StateFolder::open(folder.path()).unwrap();
        assert_eq!((state.instance(), state.agent_start()), (instance.as_str(), start + 1));
    }

    #[test]
    fn a_second_agent_on_the_same_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = StateFolder::open(folder.path()).unwrap();
        assert!(StateFolder::open(folder.path()).is_err());
    }

    #[test]
    fn a_closure_and_a_stop_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let key = AttemptKey { job: 1, task: 2, number: 3, term: 4 };
        {
            let state = StateFolder::open(folder.path()).unwrap();
            state.set_closed_for(Some(Revision(7))).unwrap();
            state.note_stop(key, StopReason::Drained).unwrap();
        }
        let state = StateFolder::open(folder.path()).unwrap();
        assert_eq!(state.closed_for().unwrap(), Some(Revision(7)));
        assert_eq!(state.noted_stop(key), Some(StopReason::Drained));
        state.set_closed_for(None).unwrap();
        state.forget_stop(key);
        assert_eq!(state.closed_for().unwrap(), None);
        assert_eq!(state.noted_stop(key), None);
    }

    #[test]
    fn one_that_was_stopped_stays_down_and_one_that_was_powered_off_comes_back_with_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let counts = |boot| released_in_boot(folder.path(), Some(boot)).map(|(path, _)| path);
        mark_released(folder.path(), "powered off", Some("one")).unwrap();
        assert_eq!(counts("one\n"), Some(folder.path().join(POWERED_OFF)));
        assert_eq!(counts("two\n"), None);
        assert!(!folder.path().join(RELEASED).exists(), "the spawner's unit would not start while that is there");
        mark_released(folder.path(), "stopped", None).unwrap();
        assert_eq!(counts("two\n"), Some(folder.path().join(RELEASED)));
        clear_released(folder.path()).unwrap();
        assert_eq!(counts("one\n"), None);
    }
}
