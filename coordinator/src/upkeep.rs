//! A data folder's store, looked after by hand: checked, copied while it is in
//! use, put back, repaired. Nothing is ever overwritten: what was there before
//! a restore or a repair is kept beside it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use muster_core::time::Timestamp;

pub use crate::store::Findings;
use crate::{
    folder::{self, Folder, io_error, read_marker},
    store::{self, EmbeddedStore, postgres},
};

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder.
    #[error(transparent)]
    Folder(folder::Error),
    /// A coordinator works on the folder.
    #[error(transparent)]
    InUse(folder::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// There is nothing to work on.
    #[error("{folder} holds no fleet: it has no fleet.toml")]
    NoFleet {
        /// The folder.
        folder: String,
    },
    /// A backup's target is in use.
    #[error("{folder} is there already; name a folder that is not")]
    Exists {
        /// The folder.
        folder: String,
    },
    /// A backup of another fleet.
    #[error("{backup} is a backup of fleet {theirs}, and {folder} holds fleet {ours}")]
    OtherFleet {
        /// Where it lies.
        backup: String,
        /// Its fleet.
        theirs: String,
        /// The folder.
        folder: String,
        /// The folder's fleet.
        ours: String,
    },
    /// A backup that would not start.
    #[error("the store in {folder} is damaged: {first}; `muster state verify` tells all")]
    Damaged {
        /// Where it lies.
        folder: String,
        /// The first finding.
        first: String,
    },
}

impl From<folder::Error> for Error {
    fn from(error: folder::Error) -> Self {
        match &error {
            folder::Error::InUse { .. } => Self::InUse(error),
            folder::Error::Exists { .. }
            | folder::Error::Empty { .. }
            | folder::Error::Marker { .. }
            | folder::Error::OtherFleet { .. }
            | folder::Error::Io { .. } => Self::Folder(error),
        }
    }
}

const STORE_FILE: &str = "fleet.db";

/// Looks at every row of a folder's store, also while a coordinator runs on it.
///
/// # Errors
/// There is no store, or it cannot be opened at all.
pub fn verify(data: &Path) -> Result<Findings, Error> {
    marked(data)?;
    Ok(store::survey(&data.join(STORE_FILE))?)
}

/// Looks at the state in PostgreSQL, also while coordinators run on it.
///
/// # Errors
/// It cannot be reached or read.
pub fn verify_postgres(url: &str, ca: Option<&Path>) -> Result<Findings, Error> {
    let image = postgres::read_state(&postgres::Target::parse(url, ca)?)?;
    let rows = vec![
        ("jobs", image.jobs.len() as u64),
        ("nodes", image.nodes.len() as u64),
        ("pools", image.pools.len() as u64),
        ("live attempts", image.attempts.len() as u64),
    ];
    let mut findings = Findings { rows, problems: Vec::new() };
    store::check_state(image, &mut findings.problems);
    Ok(findings)
}

/// Copies the store as of one moment, with the fleet's marker and keys, into a new folder, and checks the copy.
/// A coordinator may run on it. Blobs and logs are files of their own and are copied as files.
///
/// # Errors
/// The store cannot be read, the target is there or cannot be written, or the copy is damaged.
pub fn backup(data: &Path, to: &Path) -> Result<Findings, Error> {
    marked(data)?;
    if to.exists() {
        return Err(Error::Exists { folder: to.display().to_string() });
    }
    make_folder(to)?;
    let file = to.join(STORE_FILE);
    EmbeddedStore::copy(&data.join(STORE_FILE), &file)?;
    copy_durably(&data.join("fleet.toml"), &to.join("fleet.toml"))?;
    copy_keys(&data.join("pki"), &to.join("pki"))?;
    File::open(&file).and_then(|file| file.sync_all()).map_err(io_error("sync", &file))?;
    File::open(to).and_then(|folder| folder.sync_all()).map_err(io_error("sync", to))?;
    sound(to)
}

/// Puts a backup back. The coordinator must be stopped; its store is kept beside the new one: its path, if there was one.
///
/// # Errors
/// The backup is damaged or of another fleet, a coordinator runs, or the folder cannot be written.
pub fn restore(from: &Path, data: &Path) -> Result<Option<PathBuf>, Error> {
    let theirs = marked(from)?;
    sound(from)?;
    let folder = Folder::take(data)?;
    match folder.marker()? {
        Some(ours) if ours.fleet != theirs.fleet => {
            return Err(Error::OtherFleet {
                backup: from.display().to_string(),
                theirs: theirs.fleet,
                folder: data.display().to_string(),
                ours: ours.fleet,
            });
        }
        Some(_) => {}
        None => copy_keys(&from.join("pki"), &data.join("pki"))?,
    }
    let incoming = data.join("fleet.incoming");
    let _ = fs::remove_file(&incoming);
    copy_durably(&from.join(STORE_FILE), &incoming)?;
    let kept = put_in_place(&incoming, &folder, "before-restore")?;
    sound(data)?;
    if folder.marker()?.is_none() {
        folder.mark(&theirs)?;
    }
    folder.give_to_owner()?;
    Ok(kept)
}

/// What a repair did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// What was lost or changed, a sentence each; empty: the store was whole and is left as it is.
    pub said: Vec<String>,
    /// Where the damaged one is kept.
    pub kept: Option<PathBuf>,
}

/// Makes a store that opens from what can still be read. The coordinator must be stopped.
///
/// # Errors
/// Nothing of it can be read, a coordinator runs, or the folder cannot be written.
pub fn repair(data: &Path) -> Result<Repaired, Error> {
    marked(data)?;
    let folder = Folder::take(data)?;
    let mended = data.join("fleet.mended");
    let _ = fs::remove_file(&mended);
    let said = store::salvage(&folder.store_file(), &mended, Timestamp(now_ms()))?;
    if said.is_empty() && store::survey(&folder.store_file())?.problems.is_empty() {
        fs::remove_file(&mended).map_err(io_error("remove", &mended))?;
        return Ok(Repaired { said, kept: None });
    }
    let kept = put_in_place(&mended, &folder, "damaged")?;
    sound(data)?;
    folder.give_to_owner()?;
    Ok(Repaired { said, kept })
}

fn marked(data: &Path) -> Result<folder::Marker, Error> {
    let marker = read_marker(&data.join("fleet.toml"))?;
    marker.ok_or_else(|| Error::NoFleet { folder: data.display().to_string() })
}

fn sound(folder: &Path) -> Result<Findings, Error> {
    let findings = store::survey(&folder.join(STORE_FILE))?;
    match findings.problems.first() {
        None => Ok(findings),
        Some(first) => Err(Error::Damaged { folder: folder.display().to_string(), first: first.clone() }),
    }
}

/// The old file with its log goes aside, the new one takes its name. A crash in between leaves a folder whose
/// store is missing, which is refused, with both files in it.
fn put_in_place(new: &Path, folder: &Folder, kept_as: &str) -> Result<Option<PathBuf>, Error> {
    let file = folder.store_file();
    let aside = file.with_extension(format!("db.{kept_as}-{}", now_ms()));
    let mut kept = None;
    // Its log also where the file itself was moved away by hand: left here it would be played into the new one.
    for ending in ["", "-wal", "-shm"] {
        let (from, to) = (with_ending(&file, ending), with_ending(&aside, ending));
        match fs::rename(&from, &to) {
            Ok(()) => kept = kept.or(Some(to)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("rename", &from)(error).into()),
        }
    }
    File::open(new).and_then(|file| file.sync_all()).map_err(io_error("sync", new))?;
    fs::rename(new, &file).map_err(io_error("rename", new))?;
    for ending in ["-wal", "-shm"] {
        let _ = fs::remove_file(with_ending(new, ending));
    }
    let parent = folder.path("");
    File::open(&parent).and_then(|folder| folder.sync_all()).map_err(io_error("sync", &parent))?;
    Ok(kept)
}

fn with_ending(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn make_folder(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    Ok(made.map_err(io_error("make", path))?)
}

fn copy_keys(from: &Path, to: &Path) -> Result<(), Error> {
    make_folder(to)?;
    for entry in fs::read_dir(from).map_err(io_error("read", from))? {
        let entry = entry.map_err(io_error("read", from))?;
        copy_durably(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// With its permissions.
fn copy_durably(from: &Path, to: &Path) -> Result<(), Error> {
    fs::copy(from, to).map_err(io_error("copy", from))?;
    Ok(File::open(to).and_then(|file| file.sync_all()).map_err(io_error("sync", to))?)
}

fn now_ms() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use muster_core::{
        effect::{HistoryEntry, Subject},
        ids::{Actor, JobId},
        job::JobRecord,
        limits,
        spec::{Delivery, JobSpec, OnDrain, Retries},
    };

    use super::*;
    use crate::store::{Batch, Store as _};

    fn job(number: u64) -> JobRecord {
        let spec = JobSpec {
            name: format!("job number {number}"),
            owner: Actor("ana".into()),
            pool: None,
            priority: 0,
            tasks: 2,
            request: Default::default(),
            fences: Default::default(),
            constraints: Default::default(),
            delivery: Delivery::AtLeastOnce,
            on_drain: OnDrain::Finish,
            retries: Retries::default(),
            time_limit: None,
            grace: limits::GRACE,
        };
        JobRecord::accepted(spec, format!("key-{number}"), [7; 32], Timestamp(5))
    }

    const JOBS: u64 = 400;

    /// A fleet's folder with jobs and a history.
    fn fleet() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let init = crate::config::Init {
            data: root.path().join("data"),
            san: Vec::new(),
            store: None,
            store_ca: None,
            join_from: None,
        };
        crate::founding::init(&init).unwrap();
        let mut store = EmbeddedStore::open(&root.path().join("data/fleet.db")).unwrap();
        add(&mut store, 1024..1024 + JOBS);
        root
    }

    fn add(store: &mut EmbeddedStore, numbers: std::ops::Range<u64>) {
        let jobs: Vec<_> = numbers.map(|number| (JobId(number), job(number))).collect();
        let history: Vec<_> = jobs.iter().map(|(id, _)| entry(*id)).collect();
        let batch = Batch {
            templates: jobs.iter().map(|(id, _)| (*id, bytes::Bytes::from(vec![]))).collect(),
            jobs: jobs.iter().map(|(id, record)| (*id, record)).collect(),
            history: &history,
            ..Batch::default()
        };
        store.commit(&batch).unwrap();
    }

    fn entry(job: JobId) -> HistoryEntry {
        let reason = "2 tasks".to_owned();
        HistoryEntry { at: Timestamp(5), subject: Subject::Job(job), kind: "submitted".into(), reason, actor: None }
    }

    fn jobs(data: &Path) -> usize {
        EmbeddedStore::open(&data.join(STORE_FILE)).unwrap().load().unwrap().0.jobs.len()
    }

    #[test]
    fn a_backup_is_made_beside_a_writer_and_put_back_only_without_one() {
        let root = fleet();
        let (data, to) = (root.path().join("data"), root.path().join("backup"));
        let mut store = EmbeddedStore::open(&data.join(STORE_FILE)).unwrap();
        let folder = Folder::take(&data).unwrap();
        assert_eq!(verify(&data).unwrap().problems, Vec::<String>::new());
        let findings = backup(&data, &to).unwrap();
        assert!(findings.rows.contains(&("jobs", JOBS)));
        assert!(to.join("pki/ca.key").exists());
        assert!(matches!(backup(&data, &to), Err(Error::Exists { .. })));
        add(&mut store, 5_000..5_010);
        assert!(matches!(restore(&to, &data), Err(Error::InUse(_))), "a coordinator has it");
        assert!(matches!(repair(&data), Err(Error::InUse(_))));
        drop((store, folder));
        assert_eq!(jobs(&data), 410);
        let kept = restore(&to, &data).unwrap().expect("there was a store");
        assert_eq!(jobs(&data), 400);
        assert!(kept.exists(), "nothing is thrown away");

        let anew = root.path().join("anew");
        assert_eq!(restore(&to, &anew).unwrap(), None);
        assert_eq!(jobs(&anew), 400);
        let other = fleet();
        assert!(matches!(restore(&to, &other.path().join("data")), Err(Error::OtherFleet { .. })));
    }

    /// It would be played into the store from the backup.
    #[test]
    fn the_log_of_a_store_that_was_moved_away_by_hand_goes_aside_too() {
        let root = fleet();
        let (data, to) = (root.path().join("data"), root.path().join("backup"));
        backup(&data, &to).unwrap();
        let (file, log) = (data.join(STORE_FILE), data.join("fleet.db-wal"));
        let mut store = EmbeddedStore::open(&file).unwrap();
        add(&mut store, 5_000..5_010);
        fs::copy(&log, data.join("saved")).unwrap();
        drop(store);
        fs::rename(&file, root.path().join("moved.db")).unwrap();
        fs::rename(data.join("saved"), &log).unwrap();
        let kept = restore(&to, &data).unwrap().expect("the log");
        assert!(kept.exists() && kept.to_string_lossy().ends_with("-wal"), "{kept:?}");
        assert_eq!(jobs(&data), 400);
    }

    #[test]
    fn a_whole_store_is_not_touched_by_a_repair() {
        let root = fleet();
        let data = root.path().join("data");
        assert_eq!(repair(&data).unwrap(), Repaired { said: Vec::new(), kept: None });
        assert_eq!(jobs(&data), 400);
    }

    /// Overwrites the page in the middle of the table of jobs.
    fn break_a_page(file: &Path) {
        let connection = rusqlite::Connection::open(file).unwrap();
        connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        let size: u64 = connection.pragma_query_value(None, "page_size", |row| row.get::<_, i64>(0)).unwrap() as u64;
        drop(connection);
        let bytes = fs::read(file).unwrap();
        let at = bytes.windows(15).position(|window| window == b"job number 1200").unwrap() as u64;
        let handle = fs::OpenOptions::new().write(true).open(file).unwrap();
        handle.write_all_at(&vec![0xa5; size as usize], at / size * size).unwrap();
    }

    #[test]
    fn a_broken_page_is_found_costs_what_it_held_and_stops_placement() {
        let root = fleet();
        let data = root.path().join("data");
        let file = data.join(STORE_FILE);
        break_a_page(&file);
        assert!(!verify(&data).unwrap().problems.is_empty());
        assert!(EmbeddedStore::open(&file).is_err(), "it is not started from");
        let repaired = repair(&data).unwrap();
        assert!(repaired.kept.unwrap().exists());
        assert!(repaired.said.iter().any(|sentence| sentence.starts_with("jobs:")), "{:?}", repaired.said);
        let left = jobs(&data);
        assert!((300..400).contains(&left), "only what was on that page is gone: {left} are left");
        assert_eq!(verify(&data).unwrap().problems, Vec::<String>::new());
        let (image, _) = EmbeddedStore::open(&file).unwrap().load().unwrap();
        assert!(image.meta.loss.is_some());
        assert_eq!(image.meta.next_job, JobId(1024 + JOBS), "no number is given twice");
    }

    #[test]
    fn a_flipped_bit_in_a_record_is_found_and_costs_that_record() {
        let root = fleet();
        let data = root.path().join("data");
        let file = data.join(STORE_FILE);
        rusqlite::Connection::open(&file).unwrap().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        // 2 tasks become 3: it reads as well as before.
        let mut bytes = fs::read(&file).unwrap();
        let find =
            |text: &[u8], from: usize| from + bytes[from..].windows(text.len()).position(|at| at == text).unwrap();
        let at = find(b"\"tasks\":2", find(b"job number 1100", 0)) + 8;
        bytes[at] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(EmbeddedStore::open(&file).is_err(), "it is not started from");
        let problems = verify(&data).unwrap().problems;
        assert!(problems.len() == 1 && problems[0].starts_with("jobs 1100:"), "{problems:?}");
        let repaired = repair(&data).unwrap();
        assert_eq!(repaired.said.len(), 1, "{:?}", repaired.said);
        assert_eq!(jobs(&data), 399);
    }

    #[test]
    fn a_truncated_file_is_refused_and_what_is_left_of_it_saved() {
        let root = fleet();
        let data = root.path().join("data");
        let file = data.join(STORE_FILE);
        rusqlite::Connection::open(&file).unwrap().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        let length = fs::metadata(&file).unwrap().len();
        fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(length / 2).unwrap();
        assert!(EmbeddedStore::open(&file).is_err());
        assert!(verify(&data).is_err(), "not even its pages can be listed");
        let repaired = repair(&data).unwrap();
        assert!(!repaired.said.is_empty());
        assert_eq!(verify(&data).unwrap().problems, Vec::<String>::new());
        fs::write(&file, b"").unwrap();
        let error = repair(&data).unwrap_err().to_string();
        assert!(error.contains("fleet.db"), "an emptied file is no empty fleet: {error}");
    }
}
