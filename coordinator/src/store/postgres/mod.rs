//! The store in PostgreSQL: for several coordinators, of which one leads.
//!
//! A batch is one transaction, sent whole and answered once: a single round
//! trip. It begins with the fence, so that a coordinator that leads no more
//! writes nothing, and moves the commit's number on by one, so that after a cut
//! the outcome is read, not guessed: sent again, the same batch cannot be
//! stored twice.

mod leadership;
mod read;
mod session;
mod tls;
mod write;

use std::{sync::Arc, time::Duration};

use muster_core::{
    fleet::Image,
    ids::{AttemptId, JobId, NodeId, PoolName, Term},
    time::Timestamp,
};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::Row;

pub use self::{
    leadership::{Campaign, Candidate, campaign},
    read::PostgresReader,
    session::Target,
};
use self::{
    session::{Session, Worker},
    write::Rows,
};
use super::{
    Batch, Error, Store,
    rows::{damaged, parse, signed},
};
use crate::leadership::Leadership;

/// One step a release that changed the tables; never edited once released.
const MIGRATIONS: [&str; 1] = [include_str!("schema.sql")];
/// Held while the tables are made or changed ("mstr").
const MIGRATION_LOCK: i64 = 0x6d73_7472;
/// Between two tries to reach the server again within a commit.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// For a commit that was cut off, while the leadership is renewed all the same.
const COMMIT_AGAIN: Duration = Duration::from_secs(10);

/// The writer's side.
#[derive(Debug)]
pub struct PostgresStore {
    worker: Worker,
    leadership: Leadership,
    /// Of the leadership row: the fence.
    term: i64,
    /// The last commit's.
    number: i64,
    /// The last one of the history.
    revision: i64,
}

/// Makes the tables if there are none, and binds them to this fleet.
///
/// # Errors
/// They belong to another fleet, are of a later version, or the server does not serve.
pub fn prepare(target: &Target, fleet: &str, create: bool) -> Result<(), Error> {
    let fleet = fleet.to_owned();
    Worker::start(target.clone(), "muster setup")
        .run(move |session| Box::pin(async move { prepare_tables(session, &fleet, create).await }))
}

async fn prepare_tables(session: &mut Session, fleet: &str, create: bool) -> Result<(), Error> {
    check_server(session).await?;
    let found = schema_of(session).await?;
    match found {
        Some(found) if found > newest() => return Err(Error::NewerSchema { found, known: newest() }),
        None if !create => {
            let reason = "it has no tables; make them with `muster-coordinator init`, or restore a backup".to_owned();
            return Err(Error::Unfit { reason });
        }
        None => migrate(session, 0, Some(fleet)).await?,
        // An older one is migrated by the coordinator that leads. Tables that nobody ever led hold nothing: an
        // `init` that was cut off before its folder was marked left them, and this one has another id.
        Some(_) if create => {
            let client = session.client().await?;
            let rebind = "UPDATE muster.meta SET value = $1
                WHERE name = 'fleet' AND (SELECT term FROM muster.leadership) = 0";
            client.execute(rebind, &[&fleet]).await.map_err(|error| session.failed("bind the tables", error))?;
        }
        Some(_) => {}
    }
    let client = session.client().await?;
    let row = client.query_opt("SELECT value FROM muster.meta WHERE name = 'fleet'", &[]).await;
    let row = row.map_err(|error| session.failed("read whose tables these are", error))?;
    let owner: String = row.as_ref().map(|row| column(row, 0)).transpose()?.unwrap_or_default();
    if owner != fleet {
        let reason = format!(
            "its tables belong to fleet {owner}, and this folder to fleet {fleet}; \
             a further coordinator is made with `muster-coordinator init --join-from`"
        );
        return Err(Error::Unfit { reason });
    }
    Ok(())
}

/// A server that acknowledges what it may lose cannot keep our promises.
async fn check_server(session: &mut Session) -> Result<(), Error> {
    let client = session.client().await?;
    let ask = "SELECT current_setting('fsync'), current_setting('full_page_writes'),
                      current_setting('synchronous_standby_names'), current_setting('data_checksums')";
    let row = client.query_one(ask, &[]).await.map_err(|error| session.failed("read the server's settings", error))?;
    let (fsync, pages): (String, String) = (column(&row, 0)?, column(&row, 1)?);
    if fsync != "on" || pages != "on" {
        let reason = format!("the server has fsync = {fsync} and full_page_writes = {pages}; both must be on");
        return Err(Error::Unfit { reason });
    }
    let (standbys, checksums): (String, String) = (column(&row, 2)?, column(&row, 3)?);
    if checksums != "on" {
        tracing::info!(
            "the store's pages have no checksums (initdb --data-checksums): a disk that damages them is not noticed"
        );
    }
    if standbys.is_empty() {
        tracing::info!(
            "the store has no synchronous standby: if PostgreSQL itself fails over, answered requests may be lost, \
             which is noticed and stops placement"
        );
    }
    Ok(())
}

async fn schema_of(session: &mut Session) -> Result<Option<i64>, Error> {
    let client = session.client().await?;
    let there = client.query_one("SELECT to_regclass('muster.meta') IS NOT NULL", &[]).await;
    let there = there.map_err(|error| session.failed("look for the tables", error))?;
    if !column::<bool>(&there, 0)? {
        return Ok(None);
    }
    let client = session.client().await?;
    let row = client.query_opt("SELECT value FROM muster.meta WHERE name = 'schema'", &[]).await;
    let row = row.map_err(|error| session.failed("read the schema's version", error))?;
    let row = row.ok_or_else(|| damaged("the tables have no version"))?;
    parse("the schema's version", &column::<String>(&row, 0)?).map(Some)
}

fn newest() -> i64 {
    i64::try_from(MIGRATIONS.len()).expect("a handful")
}

/// All steps after `from`, in one transaction: the tables are of one version, also after a crash.
async fn migrate(session: &mut Session, from: i64, fleet: Option<&str>) -> Result<(), Error> {
    let steps = MIGRATIONS.iter().skip(usize::try_from(from).unwrap_or(0)).copied().collect::<Vec<_>>().join("\n");
    // Two that start at once both come here: the second waits, and finds the first one's tables.
    let mut script = format!("BEGIN; SELECT pg_advisory_xact_lock({MIGRATION_LOCK});");
    if let Some(fleet) = fleet {
        if !fleet.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(damaged("the fleet's id is no hexadecimal number"));
        }
        script += &format!(
            "CREATE SCHEMA IF NOT EXISTS muster; {steps}
             INSERT INTO muster.meta VALUES ('schema', '{0}'), ('fleet', '{fleet}'); COMMIT;",
            newest()
        );
    } else {
        script += &format!("{steps} UPDATE muster.meta SET value = '{}' WHERE name = 'schema'; COMMIT;", newest());
    }
    let client = session.client().await?;
    match client.batch_execute(&script).await {
        Ok(()) => Ok(()),
        // It lost the race: what matters is whose tables they are, and that is read next.
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::DUPLICATE_TABLE) => {
            let client = session.client().await?;
            client.batch_execute("ROLLBACK").await.map_err(|error| session.failed("roll back", error))
        }
        Err(error) => Err(session.failed("make the tables", error)),
    }
}

impl PostgresStore {
    /// For the coordinator that leads with this term of the leadership row. Older tables are brought up to date.
    ///
    /// # Errors
    /// The tables are of a later version or damaged, or the server is away.
    pub fn open(target: &Target, term: Term, leadership: Leadership) -> Result<Self, Error> {
        let worker = Worker::start(target.clone(), leadership::WRITER);
        let (number, revision) = worker.run(|session| {
            Box::pin(async move {
                let found = schema_of(session).await?.ok_or_else(|| damaged("the tables are gone"))?;
                if found > newest() {
                    return Err(Error::NewerSchema { found, known: newest() });
                }
                if found < newest() {
                    migrate(session, found, None).await?;
                }
                let ask = "SELECT number, (SELECT coalesce(max(revision), 0) FROM muster.history) FROM muster.commits";
                let client = session.client().await?;
                let row =
                    client.query_one(ask, &[]).await.map_err(|error| session.failed("read the last commit", error))?;
                Ok((column(&row, 0)?, column(&row, 1)?))
            })
        })?;
        Ok(Self { worker, leadership, term: signed(term.0), number, revision })
    }
}

impl Store for PostgresStore {
    fn load(&mut self) -> Result<(Image, Timestamp), Error> {
        self.worker.run(|session| Box::pin(load(session)))
    }

    fn commits(&mut self) -> Result<u64, Error> {
        Ok(self.number.unsigned_abs())
    }

    fn commit(&mut self, batch: &Batch<'_>) -> Result<u64, Error> {
        let rows = Arc::new(Rows::of(batch, self.revision));
        let (term, number) = (self.term, self.number);
        let leadership = self.leadership.clone();
        let last = rows.last_revision(self.revision);
        self.worker
            .run(move |session| Box::pin(async move { commit(session, term, number, &rows, &leadership).await }))?;
        self.number += 1;
        self.revision = last;
        Ok(last.unsigned_abs())
    }
}

/// The state as of one moment, also while coordinators work on it.
///
/// # Errors
/// It cannot be reached, or a row does not read.
pub fn read_state(target: &Target) -> Result<Image, Error> {
    Worker::start(target.clone(), "muster verify").run(|session| {
        Box::pin(async move {
            let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY";
            let client = session.client().await?;
            client.batch_execute(begin).await.map_err(|error| session.failed("begin to read", error))?;
            load(session).await.map(|(image, _)| image)
        })
    })
}

/// Until the outcome is known, our time to lead is over, or what was cut off fails again and again: it leads no more then
/// as well, so that another one can.
async fn commit(
    session: &mut Session,
    term: i64,
    number: i64,
    rows: &Rows,
    leadership: &Leadership,
) -> Result<(), Error> {
    let mut give_up: Option<Instant> = None;
    loop {
        let once = write::once(session, term, number, rows);
        let tried = match give_up {
            None => once.await,
            Some(at) => match timeout_at(at, once).await {
                Ok(tried) => tried,
                Err(_late) => return Err(session.unreachable("it does not take what was cut off")),
            },
        };
        let error = match tried {
            Ok(write::Outcome::Stored) => return Ok(()),
            Ok(write::Outcome::WasStored) => {
                tracing::info!("the last commit's answer was cut off; it had been stored");
                return Ok(());
            }
            Err(error @ Error::Unreachable { .. }) => error,
            Err(error) => return Err(error),
        };
        let at = *give_up.get_or_insert_with(|| Instant::now() + COMMIT_AGAIN);
        if !leadership.holds() || Instant::now() >= at {
            return Err(error);
        }
        session.drop_connection();
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

async fn load(session: &mut Session) -> Result<(Image, Timestamp), Error> {
    let mut image = Image::default();
    let mut clock = Timestamp::default();
    for row in ask(session, "SELECT name, value FROM muster.meta").await? {
        let (name, value): (String, String) = (column(&row, 0)?, column(&row, 1)?);
        match name.as_str() {
            "counters" => image.meta = parse("meta", &value)?,
            "clock" => clock = parse("clock", &value)?,
            _other => {}
        }
    }
    for row in ask(session, "SELECT id, record FROM muster.jobs ORDER BY id").await? {
        image.jobs.push((JobId(number(&row, 0)?), json(&row, 1)?));
    }
    for row in ask(session, "SELECT id, record FROM muster.nodes ORDER BY id").await? {
        image.nodes.push((NodeId(number(&row, 0)?), json(&row, 1)?));
    }
    for row in ask(session, "SELECT name, record FROM muster.pools ORDER BY name").await? {
        image.pools.push((PoolName(column(&row, 0)?), json(&row, 1)?));
    }
    let live = "SELECT job, task, number, record FROM muster.attempts WHERE NOT ended ORDER BY job, task, number";
    for row in ask(session, live).await? {
        image.attempts.push((attempt_key(&row)?, json(&row, 3)?));
    }
    Ok((image, clock))
}

async fn ask(session: &mut Session, sql: &'static str) -> Result<Vec<Row>, Error> {
    let client = session.client().await?;
    client.query(sql, &[]).await.map_err(|error| session.failed("read the state", error))
}

fn column<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, index: usize) -> Result<T, Error> {
    row.try_get(index).map_err(|error| damaged(format!("column {index} of a row: {error}")))
}

fn number(row: &Row, index: usize) -> Result<u64, Error> {
    let value: i64 = column(row, index)?;
    u64::try_from(value).map_err(|_| damaged(format!("column {index} of a row is {value}")))
}

fn json<T: serde::de::DeserializeOwned>(row: &Row, index: usize) -> Result<T, Error> {
    parse("a record", column::<&str>(row, index)?)
}

fn attempt_key(row: &Row) -> Result<AttemptId, Error> {
    let small = |index| u32::try_from(number(row, index)?).map_err(|_| damaged("an attempt's task or number"));
    let number_of_try = std::num::NonZeroU32::new(small(2)?).ok_or_else(|| damaged("an attempt with number 0"))?;
    Ok(AttemptId { job: JobId(number(row, 0)?), task: small(1)?, number: number_of_try })
}
