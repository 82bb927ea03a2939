//! Every row of a store's file, read and decoded: what is wrong with it. Works
//! beside a coordinator that runs on it, and changes nothing.

use std::path::Path;

use muster_core::{
    effect::{AttemptRecord, Evidence},
    fleet::{Fleet, Image, Meta},
    invariants,
    job::JobRecord,
    node::NodeRecord,
    pool::PoolRecord,
};
use muster_proto::v1;
use prost::Message as _;
use rusqlite::{Connection, OpenFlags, Row, types::ValueRef};
use serde::de::DeserializeOwned;

use super::{
    Error, Store as _, checksum,
    embedded::{EmbeddedStore, TABLES_SQL, check_head, check_log, failed},
};

/// Problems that are told; a damaged page makes a great many.
const PROBLEMS_MAX: usize = 100;
const OTHER_TABLES: &str = "its tables are not those of its schema";

/// What a survey found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Tables and their readable rows.
    pub rows: Vec<(&'static str, u64)>,
    /// A sentence each.
    pub problems: Vec<String>,
}

impl Findings {
    fn problem(&mut self, sentence: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(sentence);
        }
    }
}

/// A table, and how one of its rows is read.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// In the order of its key, which needs no other index than the table itself.
    pub(super) key: &'static str,
    pub(super) columns: &'static str,
    pub(super) read: fn(&Row<'_>) -> Result<(), String>,
}

/// All tables with state, in the order in which rows name one another.
pub(super) const TABLES: [Table; 8] = [
    Table { name: "meta", key: "name", columns: "name, value", read: read_meta },
    Table { name: "nodes", key: "id", columns: "id, record", read: |row| record::<NodeRecord>(row, 1) },
    Table { name: "pools", key: "name", columns: "name, record", read: |row| record::<PoolRecord>(row, 1) },
    Table { name: "jobs", key: "id", columns: "id, key, digest, template, record", read: read_job },
    Table {
        name: "attempts",
        key: "job, task, number",
        columns: "job, task, number, ended, record, detail",
        read: |row| record::<AttemptRecord>(row, 4),
    },
    Table {
        name: "history",
        key: "revision",
        columns: "revision, time, subject, kind, reason, actor, sizes",
        read: read_history,
    },
    Table { name: "evidence", key: "revision", columns: "revision, record", read: |row| record::<Evidence>(row, 1) },
    Table { name: "tokens", key: "id", columns: "id, secret, pool, host, expires, used_by", read: read_token },
];

fn text<'a>(row: &'a Row<'_>, index: usize) -> Result<&'a str, String> {
    let value = row.get_ref(index).map_err(|error| error.to_string())?;
    value.as_str().map_err(|error| error.to_string())
}

fn record<T: DeserializeOwned>(row: &Row<'_>, index: usize) -> Result<(), String> {
    serde_json::from_str::<T>(text(row, index)?).map(|_| ()).map_err(|error| error.to_string())
}

fn read_meta(row: &Row<'_>) -> Result<(), String> {
    match text(row, 0)? {
        "counters" => record::<Meta>(row, 1),
        _number => record::<u64>(row, 1),
    }
}

fn read_job(row: &Row<'_>) -> Result<(), String> {
    record::<JobRecord>(row, 4)?;
    let template = row.get_ref(3).ok().and_then(|value| value.as_blob().ok());
    let template = template.ok_or("its template is no bytes")?;
    v1::JobTemplate::decode(template).map(|_| ()).map_err(|error| error.to_string())
}

fn read_history(row: &Row<'_>) -> Result<(), String> {
    (2..5).try_for_each(|column| text(row, column).map(|_| ()))
}

fn read_token(row: &Row<'_>) -> Result<(), String> {
    let sizes = [(0, 16), (1, 32)];
    let right = |(column, size): (usize, usize)| {
        row.get_ref(column).ok().and_then(|value| value.as_blob().ok()).is_some_and(|bytes| bytes.len() == size)
    };
    if sizes.into_iter().all(right) { Ok(()) } else { Err("its id or secret has another length".to_owned()) }
}

/// How a row is named for a person: by its key.
pub(super) fn key_of(row: &Row<'_>, table: &Table) -> String {
    let parts = (0..table.key.split(',').count()).map(|index| match row.get_ref(index) {
        Ok(ValueRef::Integer(number)) => number.to_string(),
        Ok(ValueRef::Text(text)) => String::from_utf8_lossy(text).into_owned(),
        Ok(ValueRef::Blob(bytes)) => crate::hex::encode(bytes),
        Ok(ValueRef::Null | ValueRef::Real(_)) | Err(_) => "?".to_owned(),
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Opens a file to read it alone, also while a coordinator writes it.
pub(super) fn open_to_read(file: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags).map_err(failed("open the file"))?;
    connection.busy_timeout(std::time::Duration::from_secs(10)).map_err(failed("set the timeout"))?;
    checksum::register(&connection).map_err(failed("set the checksum"))?;
    Ok(connection)
}

/// Looks at all that the file holds, as of one moment.
///
/// # Errors
/// It is no store, is of a later version, or cannot be opened at all.
pub fn survey(file: &Path) -> Result<Findings, Error> {
    let mut findings = Findings::default();
    // A log that is written meanwhile is read half before and half after: whoever sees damage looks again.
    if let Err(error) = check_log(file).or_else(|_| check_log(file)) {
        findings.problem(error.to_string());
    }
    let connection = open_to_read(file)?;
    let schema = check_head(&connection, file)?;
    connection.execute_batch("BEGIN").map_err(failed("begin to read"))?;
    survey_pages(&connection, &mut findings);
    if schema > 1 && !has_our_tables(&connection).unwrap_or(false) {
        findings.problem(OTHER_TABLES.to_owned());
    }
    for table in &TABLES {
        survey_table(&connection, table, &mut findings);
        // Rows have checksums since schema 2.
        if schema > 1 {
            survey_seals(&connection, table, &mut findings);
        }
    }
    drop(connection);
    if findings.problems.is_empty() {
        survey_state(file, &mut findings)?;
    }
    Ok(findings)
}

fn survey_pages(connection: &Connection, findings: &mut Findings) {
    let pages = connection.prepare(&format!("PRAGMA integrity_check({PROBLEMS_MAX})")).and_then(|mut ask| {
        let said = ask.query_map([], |row| row.get::<_, String>(0))?;
        said.collect::<Result<Vec<_>, _>>()
    });
    match pages {
        Ok(said) => said.into_iter().filter(|line| line != "ok").for_each(|line| findings.problem(line)),
        Err(error) => findings.problem(format!("its pages cannot be checked: {error}")),
    }
}

fn survey_table(connection: &Connection, table: &Table, findings: &mut Findings) {
    let sql = format!("SELECT {} FROM {} ORDER BY {}", table.columns, table.name, table.key);
    let mut count = 0;
    let mut read = || -> rusqlite::Result<()> {
        let mut ask = connection.prepare(&sql)?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            match (table.read)(row) {
                Ok(()) => count += 1,
                Err(why) => findings.problem(format!("{} {}: {why}", table.name, key_of(row, table))),
            }
        }
        Ok(())
    };
    if let Err(error) = read() {
        findings.problem(format!("{}: not all of it can be read: {error}", table.name));
    }
    findings.rows.push((table.name, count));
}

/// Rows that are not what was written, although they read.
fn survey_seals(connection: &Connection, table: &Table, findings: &mut Findings) {
    if let Err(error) = wrong_seals(connection, table, |problem| findings.problem(problem)) {
        findings.problem(format!("{}: not all of its checksums can be read: {error}", table.name));
    }
}

fn wrong_seals(connection: &Connection, table: &Table, mut tell: impl FnMut(String)) -> rusqlite::Result<()> {
    let mut ask = connection.prepare(&format!(
        "SELECT {columns} FROM {name} WHERE seal IS NOT checksum('{name}', {columns})",
        name = table.name,
        columns = table.columns,
    ))?;
    let mut rows = ask.query([])?;
    while let Some(row) = rows.next()? {
        tell(format!("{} {}: it is not what was written: its checksum is another", table.name, key_of(row, table)));
    }
    Ok(())
}

/// The first thing that is not what was written: a row, or the tables themselves.
///
/// # Errors
/// The file cannot be read.
pub(super) fn wrong_seal(connection: &Connection) -> rusqlite::Result<Option<String>> {
    if !has_our_tables(connection)? {
        return Ok(Some(OTHER_TABLES.to_owned()));
    }
    let mut first = None;
    for table in &TABLES {
        wrong_seals(connection, table, |problem| {
            first.get_or_insert(problem);
        })?;
    }
    Ok(first)
}

fn has_our_tables(connection: &Connection) -> rusqlite::Result<bool> {
    let fresh = Connection::open_in_memory()?;
    checksum::register(&fresh)?;
    fresh.execute_batch(TABLES_SQL)?;
    Ok(tables_of(connection)? == tables_of(&fresh)?)
}

fn tables_of(connection: &Connection) -> rusqlite::Result<Vec<(String, Option<String>)>> {
    // What SQLite makes by itself, like its own statistics, is no matter.
    let sql =
        "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_stat%' ORDER BY name";
    connection.prepare(sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// The rows agree with one another, and keep every promise that one state can show.
fn survey_state(file: &Path, findings: &mut Findings) -> Result<(), Error> {
    let (image, _) = EmbeddedStore::read_only(file)?.load()?;
    check_state(image, &mut findings.problems);
    Ok(())
}

/// As the coordinator does at its start, and the invariants besides.
pub fn check_state(image: Image, problems: &mut Vec<String>) {
    match Fleet::restore(image) {
        Ok(fleet) => problems.extend(invariants::check(&fleet).err().map(|broken| broken.to_string())),
        Err(damage) => problems.push(damage.to_string()),
    }
}
