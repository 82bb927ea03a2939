//! Files that are not what was written, and files of older schemas: nothing
//! starts from a value that changed without anybody's word.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use muster_core::{
    effect::{HistoryEntry, Subject},
    invariants,
};
use rusqlite::{Connection, types::Value};

use super::{
    postgres::{self, PostgresStore, Target},
    survey::{TABLES, open_to_read},
    *,
};
use crate::leadership::Role;

/// Of a small fleet, made by the version before rows had checksums: jobs that succeeded, failed, were cancelled, run
/// in each delivery and wait, a node that drains, tokens. `schema-1.sql` is the same on PostgreSQL.
const SCHEMA_1: &[u8] = include_bytes!("stored/schema-1.db");
const POSTGRES_1: &str = include_str!("stored/schema-1.sql");

/// SplitMix64: the same flips in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).unwrap()
    }
}

type Rows = BTreeMap<&'static str, Vec<Vec<Value>>>;

/// All that a store holds.
fn rows(file: &Path) -> Rows {
    let connection = open_to_read(file).unwrap();
    let read = |table: &survey::Table| {
        let sql = format!("SELECT {} FROM {} ORDER BY {}", table.columns, table.name, table.key);
        let mut ask = connection.prepare(&sql).unwrap();
        let width = ask.column_count();
        let rows = ask.query_map([], |row| (0..width).map(|index| row.get(index)).collect()).unwrap();
        rows.collect::<Result<Vec<_>, _>>().unwrap()
    };
    TABLES.iter().map(|table| (table.name, read(table))).collect()
}

struct Place {
    _folder: tempfile::TempDir,
    file: PathBuf,
}

impl Place {
    fn with(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("fleet.db");
        fs::write(&file, bytes).unwrap();
        Self { _folder: folder, file }
    }

    /// Puts these bytes in the place of the file, without a log.
    fn put(&self, bytes: &[u8]) {
        for ending in ["-wal", "-shm"] {
            let _ = fs::remove_file(format!("{}{ending}", self.file.display()));
        }
        fs::write(&self.file, bytes).unwrap();
    }

    fn log(&self) -> PathBuf {
        format!("{}-wal", self.file.display()).into()
    }
}

/// A store of this version with what `SCHEMA_1` holds and more history, without free pages, its log emptied.
fn whole() -> (Vec<u8>, Rows) {
    let place = Place::with(SCHEMA_1);
    let mut store = EmbeddedStore::open(&place.file).unwrap();
    let history: Vec<_> = (0..1_000).map(entry).collect();
    store.commit(&Batch { history: &history, ..Batch::default() }).unwrap();
    store.connection().execute_batch("VACUUM; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    drop(store);
    (fs::read(&place.file).unwrap(), rows(&place.file))
}

#[test]
fn a_file_of_schema_1_opens_with_all_that_it_held() {
    let place = Place::with(SCHEMA_1);
    let before = rows(&place.file);
    assert_eq!(before["jobs"].len(), 7);
    assert!(survey(&place.file).unwrap().problems.is_empty(), "also before it is brought to this version");
    for _ in 0..2 {
        let mut store = EmbeddedStore::open(&place.file).unwrap();
        assert_eq!(rows(&place.file), before);
        let (image, _) = store.load().unwrap();
        let fleet = muster_core::fleet::Fleet::restore(image).unwrap();
        invariants::check(&fleet).unwrap();
        assert!(survey(&place.file).unwrap().problems.is_empty());
    }
    let mut store = EmbeddedStore::open(&place.file).unwrap();
    let last = before["history"].len() as u64;
    assert_eq!(store.commit(&Batch { history: &[entry(1)], ..Batch::default() }).unwrap(), last + 1);
}

#[test]
fn a_migration_that_is_cut_off_leaves_the_older_schema_as_it_was() {
    let place = Place::with(SCHEMA_1);
    let before = rows(&place.file);
    // Its last step meets a table that is in the way.
    Connection::open(&place.file).unwrap().execute_batch("CREATE TABLE tokens_1 (one INTEGER)").unwrap();
    assert!(EmbeddedStore::open(&place.file).is_err());
    assert_eq!(rows(&place.file), before);
    Connection::open(&place.file).unwrap().execute_batch("DROP TABLE tokens_1").unwrap();
    EmbeddedStore::open(&place.file).unwrap();
    assert_eq!(rows(&place.file), before);
}

#[test]
fn tables_of_schema_1_on_postgres_open_with_all_that_they_held() {
    let Some(cluster) = contract::server::Cluster::start() else {
        println!("SKIP tables_of_schema_1_on_postgres_open_with_all_that_they_held: PostgreSQL is not installed");
        return;
    };
    cluster.execute(POSTGRES_1);
    let target = Target::parse(&cluster.url(), None).unwrap();
    let owner = POSTGRES_1.lines().find_map(|line| line.strip_prefix("INSERT INTO muster.meta VALUES ('fleet', '"));
    postgres::prepare(&target, owner.unwrap().trim_end_matches("');"), false).unwrap();
    let campaign = contract::lead(&target);
    let Role::Leading { term } = *campaign.role.borrow() else { panic!("it leads") };
    let mut store = PostgresStore::open(&target, term, campaign.leadership.clone()).unwrap();
    let (image, _) = store.load().unwrap();
    assert_eq!((image.jobs.len(), image.nodes.len(), image.attempts.len()), (7, 2, 3));
    invariants::check(&muster_core::fleet::Fleet::restore(image).unwrap()).unwrap();
    assert!(store.commit(&Batch { history: &[entry(1)], ..Batch::default() }).unwrap() > 1);
    campaign.resign();
}

/// Why a store does not start, or what it starts from.
fn start(file: &Path) -> Result<Rows, String> {
    let mut store = EmbeddedStore::open(file).map_err(|error| error.to_string())?;
    store.load().map_err(|error| error.to_string())?;
    drop(store);
    Ok(rows(file))
}

#[test]
fn a_bit_that_flips_anywhere_in_the_file_is_refused_or_changes_nothing() {
    const FLIPS: usize = 300;
    let (bytes, known) = whole();
    let place = Place::with(&bytes);
    let (mut dice, mut refused, mut found) = (Dice(7), 0, 0);
    for _ in 0..FLIPS {
        let (at, bit) = (dice.below(bytes.len()), dice.below(8));
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << bit;
        place.put(&flipped);
        found += usize::from(survey(&place.file).map_or(true, |findings| !findings.problems.is_empty()));
        match start(&place.file) {
            Ok(started) => assert!(started == known, "bit {bit} of byte {at}: it started with something else"),
            Err(_why) => refused += 1,
        }
    }
    println!(
        "of {FLIPS} flips {refused} were refused at the start, {found} found by a survey; the others lie where nothing is"
    );
    assert!(refused > FLIPS / 3 && found >= refused, "{refused} refused, {found} found");
}

#[test]
fn a_file_that_ends_too_early_is_refused() {
    let (bytes, _) = whole();
    let place = Place::with(&bytes);
    let mut dice = Dice(9);
    for _ in 0..40 {
        let length = dice.below(bytes.len());
        place.put(&bytes[..length]);
        assert!(start(&place.file).is_err(), "it started with {length} of {} bytes", bytes.len());
    }
}

fn entry(number: u64) -> HistoryEntry {
    HistoryEntry {
        at: Timestamp(number),
        subject: Subject::Fleet,
        kind: "test".into(),
        reason: number.to_string(),
        actor: None,
    }
}

/// A file and its log as `kill -9` leaves them after so many commits, and what it holds after each.
fn killed_after(commits: u64) -> (Vec<u8>, Vec<u8>, Vec<Rows>) {
    let (bytes, known) = whole();
    let place = Place::with(&bytes);
    let mut store = EmbeddedStore::open(&place.file).unwrap();
    let mut states = vec![known];
    for number in 1..=commits {
        store.commit(&Batch { now: Timestamp(number), history: &[entry(number)], ..Batch::default() }).unwrap();
        states.push(rows(&place.file));
    }
    (fs::read(&place.file).unwrap(), fs::read(place.log()).unwrap(), states)
}

#[test]
fn a_bit_that_flips_in_the_log_is_refused_unless_it_could_be_what_a_crash_left() {
    let (bytes, log, states) = killed_after(5);
    let place = Place::with(&bytes);
    fs::write(place.log(), &log).unwrap();
    assert_eq!(start(&place.file).unwrap(), states[5], "as it is, it holds all");
    let (mut dice, mut refused, mut shorter) = (Dice(11), 0, 0);
    for _ in 0..200 {
        let (at, bit) = (dice.below(log.len()), dice.below(8));
        let mut flipped = log.clone();
        flipped[at] ^= 1 << bit;
        place.put(&bytes);
        fs::write(place.log(), &flipped).unwrap();
        match start(&place.file) {
            Err(_why) => refused += 1,
            // The last commit of all looks like one that was cut off: its hosts know better.
            Ok(started) if started == states[4] => shorter += 1,
            Ok(started) => assert!(started == states[5], "bit {bit} of byte {at}: it lost more than one commit"),
        }
    }
    println!("of 200 flips in the log {refused} were refused; {shorter} lay in the last commit and cost it");
    assert!(refused > 100 && shorter < 80, "{refused} refused, {shorter} cost the last commit");
}

#[test]
fn a_log_that_a_crash_cut_off_costs_what_was_not_answered_alone() {
    let (bytes, log, states) = killed_after(4);
    let place = Place::with(&bytes);
    for length in (0..log.len()).step_by(509) {
        place.put(&bytes);
        fs::write(place.log(), &log[..length]).unwrap();
        let started = start(&place.file).unwrap_or_else(|why| panic!("cut at {length}: {why}"));
        assert!(states.contains(&started), "cut at {length}: it is no state that there was");
        // A disk may also have kept the length and lost what was in it.
        let mut lost = log.clone();
        lost[length..].fill(0);
        place.put(&bytes);
        fs::write(place.log(), &lost).unwrap();
        let started = start(&place.file).unwrap_or_else(|why| panic!("lost from {length}: {why}"));
        assert!(states.contains(&started), "lost from {length}: it is no state that there was");
    }
}
