//! A batch as columns, and the one transaction that stores it.

use std::cell::Cell;

use futures_util::future::{LocalBoxFuture, join_all};
use muster_core::effect::HistoryEntry;
use tokio_postgres::{Client, Statement, types::ToSql};

use super::session::{FOLLOWED, Session};
use crate::store::{
    Batch, Error,
    rows::{damaged, signed, sizes_to_text, to_json},
    subject_name,
};

const BEGIN: &str = "BEGIN";
const COMMIT: &str = "COMMIT";
const ROLLBACK: &str = "ROLLBACK";
const FENCE: &str = "SELECT muster.fence($1)";
const FOLLOW: &str = "SELECT muster.follow($1)";
const META: &str = "INSERT INTO muster.meta (name, value) SELECT * FROM unnest($1::text[], $2::text[])
    ON CONFLICT (name) DO UPDATE SET value = excluded.value";
const NEW_JOBS: &str = "INSERT INTO muster.jobs (id, key, digest, template, record)
    SELECT * FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::bytea[], $5::text[])";
const JOBS: &str = "UPDATE muster.jobs SET record = now.record
    FROM unnest($1::bigint[], $2::text[]) AS now (id, record) WHERE jobs.id = now.id";
const NODES: &str = "INSERT INTO muster.nodes (id, record) SELECT * FROM unnest($1::bigint[], $2::text[])
    ON CONFLICT (id) DO UPDATE SET record = excluded.record";
const FORGOTTEN: &str = "DELETE FROM muster.nodes WHERE id = ANY ($1::bigint[])";
const POOLS: &str = "INSERT INTO muster.pools (name, record) SELECT * FROM unnest($1::text[], $2::text[])
    ON CONFLICT (name) DO UPDATE SET record = excluded.record";
const DELETED: &str = "DELETE FROM muster.pools WHERE name = ANY ($1::text[])";
const WITHDRAWN: &str = "DELETE FROM muster.attempts USING unnest($1::bigint[], $2::bigint[], $3::bigint[])
    AS gone (job, task, number)
    WHERE attempts.job = gone.job AND attempts.task = gone.task AND attempts.number = gone.number";
const ATTEMPTS: &str = "INSERT INTO muster.attempts (job, task, number, ended, record, detail)
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[], $5::text[], $6::bytea[])
    ON CONFLICT (job, task, number)
    DO UPDATE SET ended = excluded.ended, record = excluded.record, detail = excluded.detail";
const HISTORY: &str = "INSERT INTO muster.history (revision, time, subject, kind, reason, actor, sizes)
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])";
const EVIDENCE: &str = "INSERT INTO muster.evidence (record) SELECT * FROM unnest($1::text[])";

type Param = Box<dyn ToSql + Sync + Send>;

/// A batch, column by column, of those statements alone that have rows.
pub(super) struct Rows {
    statements: Vec<(&'static str, Vec<Param>)>,
    history: i64,
}

impl Rows {
    /// History goes on after `revision`.
    pub(super) fn of(batch: &Batch<'_>, revision: i64) -> Self {
        let mut rows = Self { statements: Vec::new(), history: i64::try_from(batch.history.len()).expect("far fewer") };
        rows.meta(batch);
        rows.jobs(batch);
        rows.nodes_and_pools(batch);
        rows.attempts(batch);
        rows.history(batch, revision);
        rows
    }

    /// The history's last one with this batch.
    pub(super) fn last_revision(&self, before: i64) -> i64 {
        before + self.history
    }

    fn add(&mut self, statement: &'static str, params: Vec<Param>) {
        self.statements.push((statement, params));
    }

    fn meta(&mut self, batch: &Batch<'_>) {
        let (mut names, mut values) = (vec!["clock".to_owned()], vec![batch.now.0.to_string()]);
        if let Some(meta) = batch.meta {
            names.push("counters".to_owned());
            values.push(to_json(meta));
        }
        self.add(META, vec![Box::new(names), Box::new(values)]);
    }

    fn jobs(&mut self, batch: &Batch<'_>) {
        let (mut ids, mut keys, mut digests, mut templates, mut records) = (vec![], vec![], vec![], vec![], vec![]);
        let (mut known, mut changed) = (Vec::new(), Vec::new());
        for (id, record) in &batch.jobs {
            match batch.templates.iter().find(|(job, _)| job == id) {
                Some((_, template)) => {
                    ids.push(signed(id.0));
                    keys.push(record.key.clone());
                    digests.push(record.digest.to_vec());
                    templates.push(template.to_vec());
                    records.push(to_json(record));
                }
                None => {
                    known.push(signed(id.0));
                    changed.push(to_json(record));
                }
            }
        }
        if !ids.is_empty() {
            let params: Vec<Param> =
                vec![Box::new(ids), Box::new(keys), Box::new(digests), Box::new(templates), Box::new(records)];
            self.add(NEW_JOBS, params);
        }
        if !known.is_empty() {
            self.add(JOBS, vec![Box::new(known), Box::new(changed)]);
        }
    }

    fn nodes_and_pools(&mut self, batch: &Batch<'_>) {
        let (mut ids, mut records, mut forgotten) = (Vec::new(), Vec::new(), Vec::new());
        for (id, record) in &batch.nodes {
            match record {
                Some(record) => {
                    ids.push(signed(id.0));
                    records.push(to_json(record));
                }
                None => forgotten.push(signed(id.0)),
            }
        }
        if !ids.is_empty() {
            self.add(NODES, vec![Box::new(ids), Box::new(records)]);
        }
        if !forgotten.is_empty() {
            self.add(FORGOTTEN, vec![Box::new(forgotten)]);
        }
        let kept = batch.pools.iter().filter_map(|(name, record)| Some((name.0.clone(), to_json((*record)?))));
        let (names, records): (Vec<String>, Vec<String>) = kept.unzip();
        if !names.is_empty() {
            self.add(POOLS, vec![Box::new(names), Box::new(records)]);
        }
        let deleted = batch.pools.iter().filter(|(_, record)| record.is_none()).map(|(name, _)| name.0.clone());
        let deleted: Vec<String> = deleted.collect();
        if !deleted.is_empty() {
            self.add(DELETED, vec![Box::new(deleted)]);
        }
    }

    fn attempts(&mut self, batch: &Batch<'_>) {
        if !batch.withdrawn.is_empty() {
            let ids = || batch.withdrawn.iter();
            let params: Vec<Param> = vec![
                Box::new(ids().map(|id| signed(id.job.0)).collect::<Vec<_>>()),
                Box::new(ids().map(|id| i64::from(id.task)).collect::<Vec<_>>()),
                Box::new(ids().map(|id| i64::from(id.number.get())).collect::<Vec<_>>()),
            ];
            self.add(WITHDRAWN, params);
        }
        if !batch.attempts.is_empty() {
            let rows = || batch.attempts.iter();
            let detail = |end: &muster_core::effect::EndRecord| Some(end.detail.clone()).filter(|it| !it.is_empty());
            let params: Vec<Param> = vec![
                Box::new(rows().map(|(id, _)| signed(id.job.0)).collect::<Vec<_>>()),
                Box::new(rows().map(|(id, _)| i64::from(id.task)).collect::<Vec<_>>()),
                Box::new(rows().map(|(id, _)| i64::from(id.number.get())).collect::<Vec<_>>()),
                Box::new(rows().map(|(_, record)| record.ended.is_some()).collect::<Vec<_>>()),
                Box::new(rows().map(|(_, record)| to_json(record)).collect::<Vec<_>>()),
                Box::new(rows().map(|(_, record)| record.ended.as_ref().and_then(detail)).collect::<Vec<_>>()),
            ];
            self.add(ATTEMPTS, params);
        }
    }

    fn history(&mut self, batch: &Batch<'_>, revision: i64) {
        if !batch.history.is_empty() {
            let rows = || batch.history.iter();
            let column = |read: fn(&HistoryEntry) -> String| rows().map(read).collect::<Vec<_>>();
            let params: Vec<Param> = vec![
                Box::new((revision + 1..=revision + self.history).collect::<Vec<_>>()),
                Box::new(rows().map(|entry| signed(entry.at.0)).collect::<Vec<_>>()),
                Box::new(column(|entry| plain(&subject_name(&entry.subject)))),
                Box::new(column(|entry| plain(&entry.kind))),
                Box::new(column(|entry| plain(&entry.reason))),
                Box::new(rows().map(|entry| entry.actor.as_ref().map(|actor| plain(&actor.0))).collect::<Vec<_>>()),
                Box::new(rows().map(|entry| sizes_to_text(&entry.subject)).collect::<Vec<_>>()),
            ];
            self.add(HISTORY, params);
        }
        if !batch.evidence.is_empty() {
            self.add(EVIDENCE, vec![Box::new(batch.evidence.iter().map(to_json).collect::<Vec<_>>())]);
        }
    }
}

/// PostgreSQL's text has no zero byte; a host's sentence may have one, and must not stop the fleet.
fn plain(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// What became of a batch.
pub(super) enum Outcome {
    /// Stored now.
    Stored,
    /// Stored by an earlier try, whose answer was cut off.
    WasStored,
}

/// Sends the whole transaction and reads its answers: one round trip.
pub(super) async fn once(session: &mut Session, term: i64, number: i64, rows: &Rows) -> Result<Outcome, Error> {
    let mut sent: Vec<(Statement, &[Param])> = Vec::with_capacity(rows.statements.len());
    for (text, params) in &rows.statements {
        let (_, [statement]) = session.prepared([*text]).await?;
        sent.push((statement, params));
    }
    let (client, [fence, follow]) = session.prepared([FENCE, FOLLOW]).await?;
    let (mine, previous): ([Param; 1], [Param; 1]) = ([Box::new(term)], [Box::new(number)]);
    sent.insert(0, (follow, &previous));
    sent.insert(0, (fence, &mine));
    // What this side could not even send, the server does not refuse: then nothing is to be committed.
    let is_unsent = Cell::new(false);
    let mut steps: Vec<LocalBoxFuture<'_, Result<(), tokio_postgres::Error>>> = Vec::with_capacity(sent.len() + 2);
    steps.push(Box::pin(client.batch_execute(BEGIN)));
    steps.extend(sent.into_iter().map(|(statement, params)| execute(client, statement, params, &is_unsent)));
    steps.push(Box::pin(async { client.batch_execute(if is_unsent.get() { ROLLBACK } else { COMMIT }).await }));
    // Each is sent when it is first asked, and all are asked before the first answer is read. After one that
    // failed the server refuses the others, and ends the transaction at its COMMIT without keeping anything.
    let mut answers = join_all(steps).await.into_iter();
    match answers.find_map(Result::err) {
        None => Ok(Outcome::Stored),
        Some(error) if error.code().is_some_and(|code| code.code() == FOLLOWED) => was_stored(session, number).await,
        Some(error) => Err(session.failed("commit", error)),
    }
}

fn execute<'a>(
    client: &'a Client,
    statement: Statement,
    params: &'a [Param],
    is_unsent: &'a Cell<bool>,
) -> LocalBoxFuture<'a, Result<(), tokio_postgres::Error>> {
    Box::pin(async move {
        let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect();
        client.execute(&statement, &params).await.map(|_| ()).inspect_err(|_| is_unsent.set(true))
    })
}

/// The batch was refused as not the next one: an earlier try of it had come through.
async fn was_stored(session: &mut Session, number: i64) -> Result<Outcome, Error> {
    let client = session.client().await?;
    let row = client.query_one("SELECT number FROM muster.commits", &[]).await;
    let found: i64 = super::column(&row.map_err(|error| session.failed("read the last commit", error))?, 0)?;
    if found == number + 1 {
        // It may wait for a synchronous standby still: one whose session has ended counts as committed before. A later
        // record of the log is there only after it.
        let client = session.client().await?;
        let again = client.execute("UPDATE muster.commits SET number = number WHERE number = $1", &[&found]).await;
        again.map_err(|error| session.failed("wait for the last commit", error))?;
        return Ok(Outcome::WasStored);
    }
    Err(damaged(format!("commit {found} is stored, and this coordinator, which leads, made {number}")))
}
