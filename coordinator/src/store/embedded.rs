//! The store in one file: SQLite with a write-ahead log and full sync.
//!
//! The writer owns one connection; readers share one that cannot write state,
//! and tokens, which no rule reads, have a third. A file that is damaged, or of
//! a later schema, is refused and left as it is.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use muster_core::{
    effect::{AttemptRecord, HistoryEntry},
    fleet::Image,
    ids::{AttemptId, HostRequestId, JobId, NodeId, PoolName, TaskIndex},
    time::Timestamp,
};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, params};
use serde::de::DeserializeOwned;

use super::{
    Batch, Entry, Error, HistoryQuery, Reader, Store, StoredAttempt, TokenRecord, checksum,
    rows::{damaged, parse, signed, sizes_of_text, sizes_to_text, to_json},
    subject_name, survey, wal,
};

const SCHEMA: i64 = 2;
/// Marks the file as ours ("mstr"), so that no other program's file is taken for it.
const APPLICATION: i64 = 0x6d73_7472;
const STATEMENTS_MAX: usize = 64;
pub(super) const TABLES_SQL: &str = include_str!("schema.sql");
/// A file of schema 1 becomes one of schema 2, whose rows have checksums: they are computed as the rows are copied.
const FROM_1_SQL: &str = include_str!("from_1.sql");

/// The writer's side.
#[derive(Debug)]
pub struct EmbeddedStore {
    connection: Connection,
    file: PathBuf,
}

/// The readers' side.
#[derive(Clone, Debug)]
pub struct EmbeddedReader {
    reads: Arc<Mutex<Connection>>,
    tokens: Arc<Mutex<Connection>>,
}

pub(super) fn failed(doing: &'static str) -> impl FnOnce(rusqlite::Error) -> Error {
    move |source| Error::Database { doing, source: source.into() }
}

impl EmbeddedStore {
    /// Makes a new, empty store. The file must not be there.
    ///
    /// # Errors
    /// The file is there, or cannot be written.
    pub fn create(file: &Path) -> Result<Self, Error> {
        let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        let found: i64 = connection
            .query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))
            .map_err(failed("make a table"))?;
        if found > 0 {
            return Err(damaged(format!("{} is there already", file.display())));
        }
        let schema = format!(
            "BEGIN; {TABLES_SQL} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT;"
        );
        connection.execute_batch(&schema).map_err(failed("make the tables"))?;
        Ok(Self { connection, file: file.to_owned() })
    }

    /// Opens a store that must be there and sound.
    ///
    /// One of an older schema is brought to ours, in one transaction.
    ///
    /// # Errors
    /// It is damaged, of a later schema, or unreadable.
    pub fn open(file: &Path) -> Result<Self, Error> {
        // Before SQLite reads the log, cuts it off and forgets.
        check_log(file)?;
        let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let found = check_head(&connection, file)?;
        let check: String = connection
            .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
            .map_err(|error| unreadable(file, &error))?;
        if check != "ok" {
            return Err(damaged(format!("{}: {check}", file.display())));
        }
        if found < SCHEMA {
            migrate(&connection).map_err(failed("bring the tables to this version's schema"))?;
        }
        if let Some(problem) = survey::wrong_seal(&connection).map_err(|error| unreadable(file, &error))? {
            return Err(damaged(format!("{}: {problem}", file.display())));
        }
        Ok(Self { connection, file: file.to_owned() })
    }

    /// Opens a store to load it, and to change nothing.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn read_only(file: &Path) -> Result<Self, Error> {
        Ok(Self { connection: survey::open_to_read(file)?, file: file.to_owned() })
    }

    /// Copies a store as of one moment into a new file, also while a coordinator writes it.
    ///
    /// # Errors
    /// It cannot be read, or the copy cannot be written.
    pub fn copy(file: &Path, to: &Path) -> Result<(), Error> {
        let connection = survey::open_to_read(file)?;
        check_head(&connection, file)?;
        let to = to.to_str().ok_or_else(|| damaged("the copy's name is no text"))?;
        connection.execute("VACUUM INTO ?1", [to]).map(|_| ()).map_err(failed("copy the store"))
    }

    pub(super) const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// A side for readers of the same file.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn reader(&self) -> Result<EmbeddedReader, Error> {
        let reads = connect(&self.file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        reads.execute_batch("PRAGMA query_only = ON").map_err(failed("open a reader"))?;
        let tokens = connect(&self.file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        Ok(EmbeddedReader { reads: Arc::new(Mutex::new(reads)), tokens: Arc::new(Mutex::new(tokens)) })
    }
}

fn migrate(connection: &Connection) -> rusqlite::Result<()> {
    // Texts of views and the like are not rewritten, for there are none; the old tables go at once.
    let done = connection.execute_batch(&format!(
        "PRAGMA legacy_alter_table = ON; BEGIN IMMEDIATE; {FROM_1_SQL} {TABLES_SQL} {} PRAGMA user_version = {SCHEMA}; COMMIT;
         PRAGMA legacy_alter_table = OFF;",
        survey::TABLES.iter().map(copy_from_1).collect::<String>(),
    ));
    if done.is_err() && !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK")?;
    }
    done
}

fn copy_from_1(table: &survey::Table) -> String {
    let (name, columns) = (table.name, table.columns);
    format!(
        "INSERT INTO {name} ({columns}) SELECT {columns} FROM {name}_1 ORDER BY {}; DROP TABLE {name}_1; ",
        table.key
    )
}

/// The log holds what was answered last; what is wrong with it must not be taken for its end.
pub(super) fn check_log(file: &Path) -> Result<(), Error> {
    let log = PathBuf::from(format!("{}-wal", file.display()));
    match std::fs::read(&log) {
        Ok(bytes) if wal::is_damaged(&bytes) => {
            Err(damaged(format!("{}: its log is damaged before its end", log.display())))
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(damaged(format!("{}: {error}", log.display()))),
    }
}

/// Ours, and of this version or an older one: which.
pub(super) fn check_head(connection: &Connection, file: &Path) -> Result<i64, Error> {
    let pragma = |name: &str| -> Result<i64, Error> {
        connection.pragma_query_value(None, name, |row| row.get(0)).map_err(|error| unreadable(file, &error))
    };
    let (application, found) = (pragma("application_id")?, pragma("user_version")?);
    if application != APPLICATION {
        return Err(damaged(format!("{} is no store of this program, or its head is lost", file.display())));
    }
    if found > SCHEMA {
        return Err(Error::NewerSchema { found, known: SCHEMA });
    }
    if found < 1 {
        return Err(damaged(format!("{} has schema {found}, which never was released", file.display())));
    }
    Ok(found)
}

fn unreadable(file: &Path, error: &rusqlite::Error) -> Error {
    damaged(format!("{}: {error}", file.display()))
}

fn connect(file: &Path, flags: OpenFlags) -> Result<Connection, Error> {
    let connection =
        Connection::open_with_flags(file, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(failed("open the file"))?;
    connection.busy_timeout(Duration::from_secs(10)).map_err(failed("set the timeout"))?;
    checksum::register(&connection).map_err(failed("set the checksum"))?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    // FULL: a commit that returned survives loss of power (FL-1).
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY;
             PRAGMA cache_size = -16384; PRAGMA wal_autocheckpoint = 4000;",
        )
        .map_err(|error| unreadable(file, &error))?;
    Ok(connection)
}

impl Store for EmbeddedStore {
    fn load(&mut self) -> Result<(Image, Timestamp), Error> {
        let meta = self.meta_row("counters")?.map(|text| parse("meta", &text)).transpose()?.unwrap_or_default();
        let clock = self.meta_row("clock")?.map(|text| parse("clock", &text)).transpose()?.unwrap_or_default();
        let image = Image {
            meta,
            jobs: self
                .rows("SELECT id, record FROM jobs ORDER BY id", |row| Ok((JobId(number(row, 0)?), json(row, 1)?)))?,
            nodes: self
                .rows("SELECT id, record FROM nodes ORDER BY id", |row| Ok((NodeId(number(row, 0)?), json(row, 1)?)))?,
            pools: self.rows("SELECT name, record FROM pools ORDER BY name", |row| {
                Ok((PoolName(column(row, 0)?), json(row, 1)?))
            })?,
            attempts: self.rows("SELECT job, task, number, record FROM attempts WHERE ended = 0", |row| {
                Ok((attempt_key(row)?, json(row, 3)?))
            })?,
        };
        Ok((image, clock))
    }

    fn commits(&mut self) -> Result<u64, Error> {
        Ok(self.meta_row("commits")?.map(|text| parse("commits", &text)).transpose()?.unwrap_or_default())
    }

    fn commit(&mut self, batch: &Batch<'_>) -> Result<u64, Error> {
        write(&mut self.connection, batch).map_err(failed("commit"))
    }
}

impl EmbeddedStore {
    fn meta_row(&self, name: &str) -> Result<Option<String>, Error> {
        self.connection
            .query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0))
            .optional()
            .map_err(failed("read the counters"))
    }

    fn rows<T>(&self, sql: &str, read: impl Fn(&Row<'_>) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        collect(&self.connection, sql, [], read)
    }
}

fn collect<T>(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
    read: impl Fn(&Row<'_>) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let mut statement = connection.prepare_cached(sql).map_err(failed("prepare a question"))?;
    let mut rows = statement.query(params).map_err(failed("ask"))?;
    let mut all = Vec::new();
    while let Some(row) = rows.next().map_err(failed("read a row"))? {
        all.push(read(row)?);
    }
    Ok(all)
}

fn column<T: rusqlite::types::FromSql>(row: &Row<'_>, index: usize) -> Result<T, Error> {
    row.get(index).map_err(|error| damaged(format!("column {index} of a row: {error}")))
}

fn number(row: &Row<'_>, index: usize) -> Result<u64, Error> {
    let value: i64 = column(row, index)?;
    u64::try_from(value).map_err(|_| damaged(format!("column {index} of a row is {value}")))
}

fn json<T: DeserializeOwned>(row: &Row<'_>, index: usize) -> Result<T, Error> {
    let text: String = column(row, index)?;
    parse("a record", &text)
}

fn attempt_key(row: &Row<'_>) -> Result<AttemptId, Error> {
    let small = |index| u32::try_from(number(row, index)?).map_err(|_| damaged("an attempt's task or number"));
    let number_of_try = std::num::NonZeroU32::new(small(2)?).ok_or_else(|| damaged("an attempt with number 0"))?;
    Ok(AttemptId { job: JobId(number(row, 0)?), task: small(1)?, number: number_of_try })
}

fn write(connection: &mut Connection, batch: &Batch<'_>) -> rusqlite::Result<u64> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    write_meta(&transaction, batch)?;
    write_jobs(&transaction, batch)?;
    write_nodes_and_pools(&transaction, batch)?;
    write_attempts(&transaction, batch)?;
    write_history(&transaction, batch)?;
    let revision = transaction
        .prepare_cached("SELECT coalesce(max(revision), 0) FROM history")?
        .query_row([], |row| row.get::<_, i64>(0))?;
    transaction.commit()?;
    Ok(revision.unsigned_abs())
}

fn write_meta(connection: &Connection, batch: &Batch<'_>) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached(
        "INSERT INTO meta (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )?;
    put.execute(params!["clock", batch.now.0.to_string()])?;
    let mut count = connection.prepare_cached(
        "INSERT INTO meta (name, value) VALUES ('commits', '1')
         ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)",
    )?;
    count.execute([])?;
    if let Some(meta) = batch.meta {
        put.execute(params!["counters", to_json(meta)])?;
    }
    Ok(())
}

fn write_jobs(connection: &Connection, batch: &Batch<'_>) -> rusqlite::Result<()> {
    let mut insert = connection
        .prepare_cached("INSERT INTO jobs (id, key, digest, template, record) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    let mut update = connection.prepare_cached("UPDATE jobs SET record = ?2 WHERE id = ?1")?;
    for (id, record) in &batch.jobs {
        let row = signed(id.0);
        let text = to_json(record);
        match batch.templates.iter().find(|(job, _)| job == id) {
            Some((_, template)) => {
                insert.execute(params![row, record.key, record.digest.as_slice(), template.as_ref(), text])?;
            }
            None => {
                update.execute(params![row, text])?;
            }
        }
    }
    Ok(())
}

fn write_nodes_and_pools(connection: &Connection, batch: &Batch<'_>) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached(
        "INSERT INTO nodes (id, record) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
    )?;
    let mut forget = connection.prepare_cached("DELETE FROM nodes WHERE id = ?1")?;
    for (id, record) in &batch.nodes {
        match record {
            Some(record) => put.execute(params![signed(id.0), to_json(record)])?,
            None => forget.execute([signed(id.0)])?,
        };
    }
    let mut put = connection.prepare_cached(
        "INSERT INTO pools (name, record) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
    )?;
    let mut forget = connection.prepare_cached("DELETE FROM pools WHERE name = ?1")?;
    for (name, record) in &batch.pools {
        match record {
            Some(record) => put.execute(params![name.0, to_json(record)])?,
            None => forget.execute([&name.0])?,
        };
    }
    Ok(())
}

fn write_attempts(connection: &Connection, batch: &Batch<'_>) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached(
        "INSERT INTO attempts (job, task, number, ended, record, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (job, task, number)
         DO UPDATE SET ended = excluded.ended, record = excluded.record, detail = excluded.detail",
    )?;
    let mut withdraw =
        connection.prepare_cached("DELETE FROM attempts WHERE job = ?1 AND task = ?2 AND number = ?3")?;
    for id in &batch.withdrawn {
        withdraw.execute(params![signed(id.job.0), id.task, id.number.get()])?;
    }
    for (id, record) in &batch.attempts {
        let end = record.ended.as_ref();
        put.execute(params![
            signed(id.job.0),
            id.task,
            id.number.get(),
            end.is_some(),
            to_json(record),
            end.map(|end| end.detail.as_slice()).filter(|detail| !detail.is_empty()),
        ])?;
    }
    Ok(())
}

fn write_history(connection: &Connection, batch: &Batch<'_>) -> rusqlite::Result<()> {
    let mut add = connection.prepare_cached(
        "INSERT INTO history (time, subject, kind, reason, actor, sizes) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    for HistoryEntry { at, subject, kind, reason, actor } in batch.history {
        let actor = actor.as_ref().map(|actor| actor.0.as_str());
        add.execute(params![signed(at.0), subject_name(subject), kind, reason, actor, sizes_to_text(subject)])?;
    }
    let mut add = connection.prepare_cached("INSERT INTO evidence (record) VALUES (?1)")?;
    for evidence in batch.evidence {
        add.execute([to_json(evidence)])?;
    }
    Ok(())
}

impl EmbeddedReader {
    /// A reader that panicked left no half-done write behind: the connection can go on.
    fn reads(&self) -> MutexGuard<'_, Connection> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self) -> MutexGuard<'_, Connection> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader for EmbeddedReader {
    fn template(&self, job: JobId) -> Result<Option<Bytes>, Error> {
        self.reads()
            .prepare_cached("SELECT template FROM jobs WHERE id = ?1")
            .and_then(|mut ask| ask.query_row([signed(job.0)], |row| row.get::<_, Vec<u8>>(0)).optional())
            .map(|found| found.map(Bytes::from))
            .map_err(failed("read a job"))
    }

    fn attempts(&self, job: JobId, tasks: Range<TaskIndex>) -> Result<Vec<StoredAttempt>, Error> {
        let sql = "SELECT job, task, number, record, detail FROM attempts
                   WHERE job = ?1 AND task >= ?2 AND task < ?3 ORDER BY task, number";
        collect(&self.reads(), sql, params![signed(job.0), tasks.start, tasks.end], |row| {
            let record: AttemptRecord = json(row, 3)?;
            Ok(StoredAttempt { id: attempt_key(row)?, record, detail: column(row, 4)? })
        })
    }

    fn history(&self, query: &HistoryQuery) -> Result<Vec<Entry>, Error> {
        let by_subject = if query.subject.is_empty() { "?2 = ''" } else { "subject = ?2" };
        let order = if query.newest { "DESC" } else { "ASC" };
        let sql = format!(
            "SELECT revision, time, subject, kind, reason, actor, sizes FROM history
             WHERE revision > ?1 AND {by_subject} AND (?3 = '' OR kind = ?3) ORDER BY revision {order} LIMIT ?4"
        );
        let params = params![signed(query.after), query.subject, query.kind, query.limit];
        let mut entries = collect(&self.reads(), &sql, params, |row| {
            let sizes: Option<String> = column(row, 6)?;
            Ok(Entry {
                revision: number(row, 0)?,
                at: Timestamp(number(row, 1)?),
                subject: column(row, 2)?,
                kind: column(row, 3)?,
                reason: column(row, 4)?,
                actor: column(row, 5)?,
                sizes: sizes.as_deref().and_then(sizes_of_text),
            })
        })?;
        if query.newest {
            entries.reverse();
        }
        Ok(entries)
    }

    fn add_token(&self, token: &TokenRecord) -> Result<(), Error> {
        let sql = "INSERT INTO tokens (id, secret, pool, host, expires, used_by) VALUES (?1, ?2, ?3, ?4, ?5, NULL)";
        let host = token.host.map(|host| signed(host.0));
        let row = params![token.id.as_slice(), token.secret.as_slice(), token.pool.0, host, signed(token.expires.0)];
        self.tokens().execute(sql, row).map(|_| ()).map_err(failed("keep a token"))
    }

    fn token(&self, id: [u8; 16]) -> Result<Option<TokenRecord>, Error> {
        let sql = "SELECT secret, pool, host, expires, used_by FROM tokens WHERE id = ?1";
        let found = collect(&self.tokens(), sql, [id.as_slice()], |row| {
            let host: Option<i64> = column(row, 2)?;
            Ok(TokenRecord {
                id,
                secret: column(row, 0)?,
                pool: PoolName(column(row, 1)?),
                host: host.map(|host| HostRequestId(host.unsigned_abs())),
                expires: Timestamp(number(row, 3)?),
                used_by: column(row, 4)?,
            })
        })?;
        Ok(found.into_iter().next())
    }

    fn bind_token(&self, id: [u8; 16], key: [u8; 32]) -> Result<Option<[u8; 32]>, Error> {
        let connection = self.tokens();
        connection
            .execute(
                "UPDATE tokens SET used_by = ?2 WHERE id = ?1 AND used_by IS NULL",
                params![id.as_slice(), key.as_slice()],
            )
            .and_then(|_| {
                connection
                    .query_row("SELECT used_by FROM tokens WHERE id = ?1", [id.as_slice()], |row| row.get(0))
                    .optional()
            })
            .map(Option::flatten)
            .map_err(failed("bind a token"))
    }
}
