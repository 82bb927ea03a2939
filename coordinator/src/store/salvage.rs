//! What can still be read of a damaged file, in a new one: rows are read from
//! both ends of each table, so that a page that is gone costs what it held;
//! rows that do not decode are left out; the rest is made to agree.

use std::path::Path;

use muster_core::{fleet::Image, time::Timestamp};
use rusqlite::{Connection, params, params_from_iter, types::Value};

use super::{
    Error, Store as _,
    embedded::{EmbeddedStore, check_head, check_log, failed},
    rows::{signed, to_json},
    survey::{TABLES, Table, key_of, open_to_read},
};

/// Sentences about single rows that are told.
const TOLD_MAX: usize = 100;

/// Reads `damaged` into `mended`, which must not be there. Says what was lost or changed: nothing, if it was whole.
///
/// # Errors
/// The damaged file cannot be opened as a store at all, or the new one cannot be written.
pub fn salvage(damaged: &Path, mended: &Path, now: Timestamp) -> Result<Vec<String>, Error> {
    let log = check_log(damaged);
    let from = open_to_read(damaged)?;
    // Nothing can be written by this connection. It makes SQLite read a file that is shorter than its head says.
    from.execute_batch("PRAGMA writable_schema = ON").map_err(failed("open the damaged file"))?;
    let schema = check_head(&from, damaged)?;
    let mut to = EmbeddedStore::create(mended)?;
    let mut said: Vec<String> =
        log.err().map(|error| format!("{error}; what was committed after that is lost")).into_iter().collect();
    for table in &TABLES {
        copy(&from, to.connection(), table, schema > 1, &mut said)?;
    }
    drop(from);
    let (mut image, _) = to.load()?;
    said.extend(image.mend(now));
    let cut = said.len().saturating_sub(TOLD_MAX);
    said.truncate(TOLD_MAX);
    if cut > 0 {
        said.push(format!("and {cut} more like these"));
    }
    if !said.is_empty() {
        let reason = format!(
            "the store was repaired and lost rows ({} findings, in the output of the repair); nothing is placed until \
             `muster state accept-loss`",
            said.len()
        );
        image.mark_lost(now, reason);
    }
    write_back(to.connection(), &image).map_err(failed("write the mended rows"))?;
    to.connection().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").map_err(failed("finish the new file"))?;
    Ok(said)
}

fn copy(from: &Connection, to: &Connection, table: &Table, sealed: bool, said: &mut Vec<String>) -> Result<(), Error> {
    let marks = vec!["?"; table.columns.split(',').count()].join(", ");
    let insert = format!("INSERT OR IGNORE INTO {} ({}) VALUES ({marks})", table.name, table.columns);
    let seal = if sealed { format!("seal IS checksum('{}', {})", table.name, table.columns) } else { "1".to_owned() };
    let rows = |order: &str| {
        let keys: Vec<String> = table.key.split(", ").map(|key| format!("{key} {order}")).collect();
        format!("SELECT {}, {seal} FROM {} ORDER BY {}", table.columns, table.name, keys.join(", "))
    };
    let broken_at_start = copy_in_order(from, to, table, &rows(""), &insert, said)?;
    if let Some(why) = broken_at_start {
        said.push(format!("{}: a part of it cannot be read ({why})", table.name));
        // What lies behind the gap; where it meets what is there, that stays.
        copy_in_order(from, to, table, &rows("DESC"), &insert, &mut Vec::new())?;
    }
    Ok(())
}

/// Copies until the end, or until a page cannot be read: why.
fn copy_in_order(
    from: &Connection,
    to: &Connection,
    table: &Table,
    sql: &str,
    insert: &str,
    said: &mut Vec<String>,
) -> Result<Option<String>, Error> {
    let width = table.columns.split(',').count();
    to.execute_batch("BEGIN").map_err(failed("write the new file"))?;
    let mut write = to.prepare(insert).map_err(failed("write the new file"))?;
    let mut ask = match from.prepare(sql) {
        Ok(ask) => ask,
        Err(error) => {
            to.execute_batch("COMMIT").map_err(failed("write the new file"))?;
            return Ok(Some(error.to_string()));
        }
    };
    let mut rows = ask.query([]).map_err(failed("read the damaged file"))?;
    let broken = loop {
        let row = match rows.next() {
            Ok(Some(row)) => row,
            Ok(None) => break None,
            Err(error) => break Some(error.to_string()),
        };
        if row.get::<_, i64>(width) == Ok(0) {
            said.push(format!("{} {}: it is not what was written and is left out", table.name, key_of(row, table)));
            continue;
        }
        if let Err(why) = (table.read)(row) {
            said.push(format!("{} {}: it does not read and is left out ({why})", table.name, key_of(row, table)));
            continue;
        }
        let values: rusqlite::Result<Vec<Value>> = (0..width).map(|index| row.get(index)).collect();
        let Ok(values) = values else { continue };
        let written = write.execute(params_from_iter(values)).map_err(failed("write the new file"))?;
        // From the end on: it has come to what was read from the start.
        if written == 0 && sql.ends_with("DESC") {
            break None;
        }
    };
    to.execute_batch("COMMIT").map_err(failed("write the new file"))?;
    Ok(broken)
}

fn write_back(connection: &Connection, image: &Image) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN")?;
    connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('counters', ?1)", [to_json(&image.meta)])?;
    for (id, job) in &image.jobs {
        connection.execute(
            "UPDATE jobs SET record = ?2, key = ?3 WHERE id = ?1",
            params![signed(id.0), to_json(job), job.key],
        )?;
    }
    for (id, node) in &image.nodes {
        connection.execute("UPDATE nodes SET record = ?2 WHERE id = ?1", params![signed(id.0), to_json(node)])?;
    }
    for (name, pool) in &image.pools {
        connection.execute("UPDATE pools SET record = ?2 WHERE name = ?1", params![name.0, to_json(pool)])?;
    }
    connection.execute_batch("CREATE TEMP TABLE live (job INTEGER, task INTEGER, number INTEGER)")?;
    for (id, _) in &image.attempts {
        let key = params![signed(id.job.0), id.task, id.number.get()];
        connection.execute("INSERT INTO live VALUES (?1, ?2, ?3)", key)?;
    }
    connection.execute_batch(
        "DELETE FROM attempts WHERE ended = 0 AND (job, task, number) NOT IN (SELECT job, task, number FROM live);
         DROP TABLE live; COMMIT",
    )
}
