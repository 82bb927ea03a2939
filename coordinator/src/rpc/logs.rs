//! A task's output: what is on the disk, then the tail that came with its end.
//! A follower waits for changes; it never polls.

use std::{num::NonZeroU32, sync::Arc};

use muster_core::{
    ids::{AttemptId, JobId},
    limits,
};
use muster_proto::v1::{self, Stream};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::{Answers, Context, blocking, shown::Detail, status};
use crate::{driver::Change, store::StoredAttempt};

const AHEAD: usize = 4;

/// Where a reader is.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    attempt: AttemptId,
    stdout: u64,
    stderr: u64,
}

impl Cursor {
    const fn start(attempt: AttemptId) -> Self {
        Self { attempt, stdout: 0, stderr: 0 }
    }

    const fn at(&mut self, stream: Stream) -> &mut u64 {
        match stream {
            Stream::Stderr => &mut self.stderr,
            Stream::Stdout | Stream::Unspecified => &mut self.stdout,
        }
    }
}

struct Reading {
    context: Arc<Context>,
    job: JobId,
    task: u32,
    /// None: the last one, and those that follow it.
    only: Option<NonZeroU32>,
    follow: bool,
    out: mpsc::Sender<Result<v1::LogsResponse, Status>>,
}

/// Answers a task's output.
pub(super) async fn read(
    context: Arc<Context>,
    request: v1::LogsRequest,
) -> Result<Response<Answers<v1::LogsResponse>>, Status> {
    let (job, task) = (JobId(request.job), request.task);
    let tasks = context.handle.query(move |fleet, _| fleet.job(job).map(|job| job.spec.tasks));
    match tasks.await.map_err(status::stopped)? {
        None => return Err(status::denied(muster_core::denied::Denied::UnknownJob(job))),
        Some(tasks) if task >= tasks => {
            return Err(status::denied(muster_core::denied::Denied::UnknownTask { job, task, tasks }));
        }
        Some(_) => {}
    }
    let (out, answers) = mpsc::channel(AHEAD);
    let reading = Reading { context, job, task, only: NonZeroU32::new(request.attempt), follow: request.follow, out };
    tokio::spawn(reading.run());
    Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
}

/// The reader went away.
struct Gone;

impl Reading {
    async fn run(self) {
        if let Err(status) = self.tell_all().await {
            let _ = self.out.send(Err(status)).await;
        }
    }

    async fn tell_all(&self) -> Result<(), Status> {
        // Listening begins before the first look, so that nothing falls in between.
        let mut changes = self.context.handle.changes();
        let mut cursor: Option<Cursor> = None;
        loop {
            // Read before the rows: a task that is over by then has all its rows.
            let over = self.is_over().await?;
            let attempts = self.attempts().await?;
            let Some(attempt) = self.choose(&attempts, cursor.as_ref()) else {
                if self.only.is_some() && over {
                    return Err(Status::not_found("the task has no such attempt"));
                }
                if over || !self.follow || !self.wait(&mut changes).await? {
                    return Ok(());
                }
                continue;
            };
            let mut at = cursor.filter(|at| at.attempt == attempt.id).unwrap_or(Cursor::start(attempt.id));
            if self.tell(&mut at, attempt).await?.is_err() {
                return Ok(());
            }
            cursor = Some(at);
            let more = attempts.last().is_some_and(|last| last.id != attempt.id) && self.only.is_none();
            if attempt.record.ended.is_some() && more && self.follow {
                // This one is told to its end; the next one is there.
                continue;
            }
            let done = over || (self.only.is_some() && attempt.record.ended.is_some());
            if done || !self.follow || !self.wait(&mut changes).await? {
                return Ok(());
            }
        }
    }

    async fn is_over(&self) -> Result<bool, Status> {
        let (job, task) = (self.job, self.task);
        let over =
            self.context.handle.query(move |fleet, _| fleet.job(job).is_none_or(|job| job.end_of(task).is_some()));
        over.await.map_err(status::stopped)
    }

    async fn attempts(&self) -> Result<Vec<StoredAttempt>, Status> {
        let (reader, job, task) = (self.context.reader.clone(), self.job, self.task);
        blocking(move || reader.attempts(job, task..task.saturating_add(1)).map_err(status::store)).await
    }

    /// The named one; else the last, or after one that was followed the next.
    fn choose<'a>(&self, attempts: &'a [StoredAttempt], cursor: Option<&Cursor>) -> Option<&'a StoredAttempt> {
        if let Some(only) = self.only {
            return attempts.iter().find(|stored| stored.id.number == only);
        }
        let Some(cursor) = cursor else { return attempts.last() };
        let at = attempts.iter().position(|stored| stored.id == cursor.attempt)?;
        let finished = attempts[at].record.ended.is_some();
        // Its end may have come since: it is looked at once more before the next one.
        attempts.get(at + 1).filter(|_| finished && cursor_is_done(cursor, &attempts[at])).or(attempts.get(at))
    }

    /// Waits for a change of this task. False: the reader went away.
    async fn wait(&self, changes: &mut broadcast::Receiver<Arc<Change>>) -> Result<bool, Status> {
        loop {
            let changed = tokio::select! {
                change = changes.recv() => match change.as_deref() {
                    Ok(Change::Committed { jobs, .. }) => jobs.contains(&self.job),
                    Ok(Change::Output(attempt)) => attempt.job == self.job && attempt.task == self.task,
                    Err(RecvError::Lagged(_)) => true,
                    Err(RecvError::Closed) => return Err(status::stopped(crate::driver::Stopped)),
                },
                () = self.out.closed() => return Ok(false),
            };
            if changed {
                return Ok(true);
            }
        }
    }

    /// All that is there of one attempt from the cursor on.
    async fn tell(&self, at: &mut Cursor, stored: &StoredAttempt) -> Result<Result<(), Gone>, Status> {
        loop {
            let (logs, from, term) = (self.context.logs.clone(), *at, stored.record.term);
            // Both at once: mostly there is nothing, and a handover to another thread costs more than the look.
            let read = move || -> Result<_, Status> {
                let read = |stream, offset| logs.read(from.attempt, term, stream, offset, limits::CHUNK_BYTES);
                let stdout = read(Stream::Stdout, from.stdout).map_err(status::log)?;
                let stderr = read(Stream::Stderr, from.stderr).map_err(status::log)?;
                Ok([(Stream::Stdout, stdout), (Stream::Stderr, stderr)])
            };
            let found = blocking(read).await?;
            if found.iter().all(|(_, data)| data.is_empty()) {
                break;
            }
            for (stream, data) in found.into_iter().filter(|(_, data)| !data.is_empty()) {
                if self.send(at, stream, data).await.is_err() {
                    return Ok(Err(Gone));
                }
            }
        }
        let ended = Detail::read(stored.detail.as_deref()).ended.unwrap_or_default();
        for tail in ended.tails {
            let stream = tail.stream();
            let known = at.at(stream).checked_sub(tail.offset).and_then(|known| usize::try_from(known).ok());
            // A tail past a gap is shown all the same: it is all that is left.
            let fresh = tail.data.slice(known.unwrap_or(0).min(tail.data.len())..);
            if !fresh.is_empty() && self.send(at, stream, fresh).await.is_err() {
                return Ok(Err(Gone));
            }
        }
        Ok(Ok(()))
    }

    async fn send(&self, at: &mut Cursor, stream: Stream, data: bytes::Bytes) -> Result<(), Gone> {
        *at.at(stream) += data.len() as u64;
        let response = v1::LogsResponse { stream: stream.into(), data, attempt: Some(at.attempt.into()) };
        self.out.send(Ok(response)).await.map_err(|_| Gone)
    }
}

/// The tail, which comes last, has been told.
fn cursor_is_done(cursor: &Cursor, stored: &StoredAttempt) -> bool {
    let ended = Detail::read(stored.detail.as_deref()).ended.unwrap_or_default();
    let mut cursor = *cursor;
    ended.tails.iter().all(|tail| *cursor.at(tail.stream()) >= tail.offset + tail.data.len() as u64)
}
