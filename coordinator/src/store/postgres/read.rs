//! The readers' side: a connection of its own, so that no answer to a person
//! waits for a commit. A read that was cut off is asked once more.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::future::join_all;
use muster_core::{
    effect::AttemptRecord,
    ids::{HostRequestId, JobId, PoolName, TaskIndex, Term},
    time::Timestamp,
};
use tokio_postgres::{Row, types::ToSql};

use super::{
    attempt_key, column, json, number,
    session::{Session, Target, Worker},
};
use crate::store::{
    Entry, Error, HistoryQuery, Reader, StoredAttempt, TokenRecord,
    rows::{signed, sizes_of_text},
};

type Param = Box<dyn ToSql + Sync + Send>;

/// The beginning of every question about the history.
macro_rules! history {
    () => {
        "SELECT revision, time, subject, kind, reason, actor, sizes FROM muster.history
         WHERE revision > $1 AND ($3 = '' OR kind = $3)"
    };
}

/// The readers' side. Tokens, which no rule reads, are written here, under the same fence.
#[derive(Clone, Debug)]
pub struct PostgresReader {
    worker: Arc<Worker>,
    term: i64,
}

impl PostgresReader {
    /// For the coordinator that leads with this term of the leadership row.
    #[must_use]
    pub fn new(target: &Target, term: Term) -> Self {
        Self { worker: Arc::new(Worker::start(target.clone(), "muster reader")), term: signed(term.0) }
    }

    fn rows(&self, sql: &'static str, params: Vec<Param>) -> Result<Vec<Row>, Error> {
        self.worker.run(move |session| {
            Box::pin(async move {
                match query(session, sql, &params).await {
                    Err(Error::Unreachable { .. }) => query(session, sql, &params).await,
                    answer => answer,
                }
            })
        })
    }

    /// One statement that changes a token, in a transaction behind the fence.
    fn change(&self, sql: &'static str, params: Vec<Param>) -> Result<(), Error> {
        let term = self.term;
        self.worker.run(move |session| {
            Box::pin(async move {
                let (client, [fence, change]) = session.prepared(["SELECT muster.fence($1)", sql]).await?;
                let params = borrowed(&params);
                let fenced: [&(dyn ToSql + Sync); 1] = [&term];
                let begin = async { client.batch_execute("BEGIN").await.map(|()| 0) };
                let commit = async { client.batch_execute("COMMIT").await.map(|()| 0) };
                let steps: [futures_util::future::LocalBoxFuture<'_, _>; 4] = [
                    Box::pin(begin),
                    Box::pin(client.execute(&fence, &fenced)),
                    Box::pin(client.execute(&change, &params)),
                    Box::pin(commit),
                ];
                let answers = join_all(steps).await;
                match answers.into_iter().find_map(Result::err) {
                    None => Ok(()),
                    Some(error) => Err(session.failed("keep a token", error)),
                }
            })
        })
    }
}

async fn query(session: &mut Session, sql: &'static str, params: &[Param]) -> Result<Vec<Row>, Error> {
    let (client, [statement]) = session.prepared([sql]).await?;
    let answer = client.query(&statement, &borrowed(params)).await;
    answer.map_err(|error| {
        let failed = session.failed("read", error);
        if matches!(failed, Error::Unreachable { .. }) {
            session.drop_connection();
        }
        failed
    })
}

fn borrowed(params: &[Param]) -> Vec<&(dyn ToSql + Sync)> {
    params.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect()
}

impl Reader for PostgresReader {
    fn template(&self, job: JobId) -> Result<Option<Bytes>, Error> {
        let rows = self.rows("SELECT template FROM muster.jobs WHERE id = $1", vec![Box::new(signed(job.0))])?;
        rows.first().map(|row| column::<Vec<u8>>(row, 0).map(Bytes::from)).transpose()
    }

    fn attempts(&self, job: JobId, tasks: Range<TaskIndex>) -> Result<Vec<StoredAttempt>, Error> {
        let sql = "SELECT job, task, number, record, detail FROM muster.attempts
                   WHERE job = $1 AND task >= $2 AND task < $3 ORDER BY task, number";
        let params: Vec<Param> =
            vec![Box::new(signed(job.0)), Box::new(i64::from(tasks.start)), Box::new(i64::from(tasks.end))];
        let read = |row: &Row| {
            let record: AttemptRecord = json(row, 3)?;
            Ok(StoredAttempt { id: attempt_key(row)?, record, detail: column(row, 4)? })
        };
        self.rows(sql, params)?.iter().map(read).collect()
    }

    fn history(&self, query: &HistoryQuery) -> Result<Vec<Entry>, Error> {
        // Texts of their own, so that each has the plan of its index.
        let sql = match (query.subject.is_empty(), query.newest) {
            (true, false) => concat!(history!(), " AND $2 = '' ORDER BY revision ASC LIMIT $4"),
            (true, true) => concat!(history!(), " AND $2 = '' ORDER BY revision DESC LIMIT $4"),
            (false, false) => concat!(history!(), " AND subject = $2 ORDER BY revision ASC LIMIT $4"),
            (false, true) => concat!(history!(), " AND subject = $2 ORDER BY revision DESC LIMIT $4"),
        };
        let params: Vec<Param> = vec![
            Box::new(signed(query.after)),
            Box::new(query.subject.clone()),
            Box::new(query.kind.clone()),
            Box::new(i64::from(query.limit)),
        ];
        let mut entries = self.rows(sql, params)?.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        if query.newest {
            entries.reverse();
        }
        Ok(entries)
    }

    fn add_token(&self, token: &TokenRecord) -> Result<(), Error> {
        let sql = "INSERT INTO muster.tokens (id, secret, pool, host, expires) VALUES ($1, $2, $3, $4, $5)";
        let params: Vec<Param> = vec![
            Box::new(token.id.to_vec()),
            Box::new(token.secret.to_vec()),
            Box::new(token.pool.0.clone()),
            Box::new(token.host.map(|host| signed(host.0))),
            Box::new(signed(token.expires.0)),
        ];
        self.change(sql, params)
    }

    fn token(&self, id: [u8; 16]) -> Result<Option<TokenRecord>, Error> {
        let sql = "SELECT secret, pool, host, expires, used_by FROM muster.tokens WHERE id = $1";
        let read = |row: &Row| {
            let host: Option<i64> = column(row, 2)?;
            Ok(TokenRecord {
                id,
                secret: bytes_of(column(row, 0)?)?,
                pool: PoolName(column(row, 1)?),
                host: host.map(|host| HostRequestId(host.unsigned_abs())),
                expires: Timestamp(number(row, 3)?),
                used_by: column::<Option<Vec<u8>>>(row, 4)?.map(bytes_of).transpose()?,
            })
        };
        self.rows(sql, vec![Box::new(id.to_vec())])?.first().map(read).transpose()
    }

    fn bind_token(&self, id: [u8; 16], key: [u8; 32]) -> Result<Option<[u8; 32]>, Error> {
        let sql = "UPDATE muster.tokens SET used_by = $2 WHERE id = $1 AND used_by IS NULL";
        self.change(sql, vec![Box::new(id.to_vec()), Box::new(key.to_vec())])?;
        Ok(self.token(id)?.and_then(|token| token.used_by))
    }
}

fn entry(row: &Row) -> Result<Entry, Error> {
    Ok(Entry {
        revision: number(row, 0)?,
        at: Timestamp(number(row, 1)?),
        subject: column(row, 2)?,
        kind: column(row, 3)?,
        reason: column(row, 4)?,
        actor: column(row, 5)?,
        sizes: column::<Option<String>>(row, 6)?.as_deref().and_then(sizes_of_text),
    })
}

fn bytes_of<const N: usize>(bytes: Vec<u8>) -> Result<[u8; N], Error> {
    let length = bytes.len();
    bytes.try_into().map_err(|_| Error::Damaged { what: format!("a token's column has {length} bytes, not {N}") })
}
