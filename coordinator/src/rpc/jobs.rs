//! Jobs: submit, see, cancel, follow.

use std::{sync::Arc, time::Duration};

use muster_core::{
    effect::Reply,
    event::Event,
    fleet::Fleet,
    ids::{Actor, JobId},
    job::JobState,
};
use muster_proto::{convert, v1};
use prost::Message as _;
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Answers, Context, blobs, blocking, enrollment::unexpected, fleet::history_of, logs, person, shown, status,
};
use crate::{
    driver::{AcceptedJob, Change},
    identity::sha256,
    person::Role,
    starts::Parts,
};

const LIST_DEFAULT: usize = 100;
const LIST_MAX: usize = 1_000;
const TASKS_DEFAULT: u32 = 1_000;
const TASKS_MAX: u32 = 10_000;
const EVENTS_SHOWN: u32 = 50;
/// Progress of a busy job is told at most this often; its end, and its first steps, at once.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
const PROGRESS_AT_ONCE: u32 = 8;

/// The service.
#[derive(Debug)]
pub struct Jobs(pub Arc<Context>);

fn no_job(id: JobId) -> Status {
    status::denied(muster_core::denied::Denied::UnknownJob(id))
}

#[tonic::async_trait]
impl v1::jobs_server::Jobs for Jobs {
    type WatchStream = Answers<v1::JobProgress>;
    type LogsStream = Answers<v1::LogsResponse>;
    type FetchBlobStream = Answers<v1::BlobChunk>;

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitResponse>, Status> {
        let (name, _) = person(&request)?;
        self.0.room.check().await.map_err(status::no_room)?;
        let request = request.into_inner();
        let key = convert::idempotency_key(&request.idempotency_key).map_err(status::rejected)?;
        let Some(wire) = request.template else { return Err(Status::invalid_argument("template: is missing")) };
        let (checked, parts) = check(&self.0, wire, Actor(name)).await?;
        let job = AcceptedJob { template: checked.wire.encode_to_vec().into(), parts };
        let (digest, spec) = (sha256(&checked.canonical), checked.spec);
        let submit = |request| Event::Submit { request, key, digest, spec };
        let answer = self.0.handle.submit(job, submit).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::Submitted { job, existed } => Ok(Response::new(v1::SubmitResponse { job: job.0, existed })),
            other => Err(unexpected(&other)),
        }
    }

    async fn list(&self, request: Request<v1::ListJobsRequest>) -> Result<Response<v1::ListJobsResponse>, Status> {
        let request = request.into_inner();
        let wanted = state_filter(&request.state)?;
        let limit = match request.limit as usize {
            0 => LIST_DEFAULT,
            asked => asked.min(LIST_MAX),
        };
        let before = if request.before == 0 { u64::MAX } else { request.before };
        let read = move |fleet: &Fleet, _| {
            let mut jobs: Vec<_> = fleet
                .jobs()
                .rev()
                .filter(|(id, job)| id.0 < before && wanted(job.state()))
                .take(limit + 1)
                .map(|(id, job)| shown::summary(fleet, *id, job))
                .collect();
            let more = jobs.len() > limit;
            jobs.truncate(limit);
            v1::ListJobsResponse { jobs, more }
        };
        self.0.handle.query(read).await.map(Response::new).map_err(status::stopped)
    }

    async fn inspect(&self, request: Request<v1::InspectJobRequest>) -> Result<Response<v1::JobDetail>, Status> {
        let id = JobId(request.into_inner().job);
        let read = move |fleet: &Fleet, _| {
            let job = fleet.job(id)?;
            let ends = job.ended.iter().map(|(name, tasks)| (name.clone(), tasks.len())).collect();
            Some((shown::summary(fleet, id, job), ends))
        };
        let found = self.0.handle.query(read).await.map_err(status::stopped)?;
        let (summary, ends) = found.ok_or_else(|| no_job(id))?;
        let reader = self.0.reader.clone();
        let stored = blocking(move || reader.template(id).map_err(status::store)).await?;
        let template = stored.and_then(|bytes| v1::JobTemplate::decode(bytes).ok());
        let events = history_of(&self.0, format!("job/{id}"), EVENTS_SHOWN).await?;
        Ok(Response::new(v1::JobDetail { summary: Some(summary), template, ends, events }))
    }

    async fn list_tasks(
        &self,
        request: Request<v1::ListTasksRequest>,
    ) -> Result<Response<v1::ListTasksResponse>, Status> {
        let request = request.into_inner();
        let id = JobId(request.job);
        let limit = if request.limit == 0 { TASKS_DEFAULT } else { request.limit.min(TASKS_MAX) };
        let first = request.first;
        let read = move |fleet: &Fleet, _| {
            let job = fleet.job(id)?;
            let end = first.saturating_add(limit).min(job.spec.tasks);
            let wait = fleet.explain_wait(id).unwrap_or_default();
            let tasks = (first..end).map(|index| {
                let (state, waits) = shown::task_state(job, index);
                let reason = if waits { wait.clone() } else { String::new() };
                v1::Task { index, state: state.to_owned(), reason, attempts: Vec::new() }
            });
            Some((tasks.collect::<Vec<_>>(), end < job.spec.tasks))
        };
        let found = self.0.handle.query(read).await.map_err(status::stopped)?;
        let (mut tasks, more) = found.ok_or_else(|| no_job(id))?;
        let (context, end) = (self.0.clone(), first.saturating_add(limit));
        let attempts = blocking(move || context.reader.attempts(id, first..end).map_err(status::store)).await?;
        for stored in attempts {
            let Some(task) = stored.id.task.checked_sub(first).and_then(|at| tasks.get_mut(at as usize)) else {
                continue;
            };
            let attempt = shown::stored_attempt(&self.0, &stored);
            if task.state == "placed" && attempt.end.is_none() {
                task.state.clone_from(&attempt.state);
                task.reason.clone_from(&attempt.placement_reason);
            }
            task.attempts.push(attempt);
        }
        Ok(Response::new(v1::ListTasksResponse { tasks, more }))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Result<Response<v1::CancelResponse>, Status> {
        let (name, role) = person(&request)?;
        let request = request.into_inner();
        let job = JobId(request.job);
        let reason = convert::reason(&request.reason).map_err(status::rejected)?;
        self.check_owner(job, &name, role).await?;
        let tasks = (!request.tasks.is_empty()).then_some(request.tasks);
        let cancel = |request| Event::Cancel { request, job, tasks, actor: Actor(name), reason };
        let answer = self.0.handle.ask(cancel).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::Cancelled { waiting, stopping, ended } => {
                let answer = v1::CancelResponse { cancelled_waiting: waiting, stopping, already_ended: ended };
                Ok(Response::new(answer))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn retry(&self, request: Request<v1::RetryRequest>) -> Result<Response<v1::RetryResponse>, Status> {
        let (name, role) = person(&request)?;
        let job = JobId(request.into_inner().job);
        self.check_owner(job, &name, role).await?;
        let retry = |request| Event::Retry { request, job, actor: Actor(name) };
        let answer = self.0.handle.ask(retry).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::Retried { tasks } => Ok(Response::new(v1::RetryResponse { placed_again: tasks })),
            other => Err(unexpected(&other)),
        }
    }

    async fn watch(&self, request: Request<v1::WatchJobRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let (out, answers) = mpsc::channel(4);
        let watch = Watch { context: self.0.clone(), job: JobId(request.job), follow: request.follow, out };
        tokio::spawn(watch.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn logs(&self, request: Request<v1::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        logs::read(self.0.clone(), request.into_inner()).await
    }

    async fn store_blob(&self, request: Request<Streaming<v1::BlobChunk>>) -> Result<Response<v1::BlobRef>, Status> {
        blobs::store(&self.0, request.into_inner()).await
    }

    async fn fetch_blob(&self, request: Request<v1::BlobRef>) -> Result<Response<Self::FetchBlobStream>, Status> {
        blobs::fetch(&self.0, request.into_inner()).await
    }
}

impl Jobs {
    /// Who may only submit may change only what is theirs.
    async fn check_owner(&self, id: JobId, name: &str, role: Role) -> Result<(), Status> {
        if role >= Role::Operate {
            return Ok(());
        }
        let owner = self.0.handle.query(move |fleet, _| fleet.job(id).map(|job| job.spec.owner.clone()));
        match owner.await.map_err(status::stopped)? {
            Some(owner) if owner.0 != name => Err(Status::permission_denied(format!(
                "job {id} belongs to {owner}; changing it needs the role operate"
            ))),
            Some(_) | None => Ok(()),
        }
    }
}

fn state_filter(word: &str) -> Result<fn(JobState) -> bool, Status> {
    use JobState::{Cancelled, Cancelling, Failed, Running, Succeeded, Waiting};
    match word {
        "" => Ok(|_| true),
        "waiting" => Ok(|state| state == Waiting),
        "running" => Ok(|state| matches!(state, Running | Cancelling)),
        "finished" => Ok(|state| matches!(state, Succeeded | Failed | Cancelled)),
        _unknown => Err(Status::invalid_argument("state: is waiting, running or finished")),
    }
}

/// A template with its table, every blob of them present.
async fn check(
    context: &Arc<Context>,
    wire: v1::JobTemplate,
    owner: Actor,
) -> Result<(convert::Template, Arc<Parts>), Status> {
    let plain = wire.task_table.is_none()
        && wire.body.as_ref().is_none_or(|body| convert::blobs_in(body, None).next().is_none());
    if plain {
        return check_blocking(context, wire, &owner);
    }
    let context = context.clone();
    blocking(move || check_blocking(&context, wire, &owner)).await
}

fn check_blocking(
    context: &Context,
    wire: v1::JobTemplate,
    owner: &Actor,
) -> Result<(convert::Template, Arc<Parts>), Status> {
    let table = match &wire.task_table {
        Some(reference) => {
            convert::blob("task_table", reference).map_err(status::rejected)?;
            let bytes = context.bodies.table(reference).map_err(status::blob)?;
            Some(convert::task_table(bytes).map_err(status::rejected)?)
        }
        None => None,
    };
    let checked = convert::template(wire, owner, table.as_ref()).map_err(status::rejected)?;
    let body = checked.wire.body.as_ref().expect("a checked template has a body");
    let mut last = None;
    for reference in convert::blobs_in(body, table.as_ref()) {
        let (digest, offset, length) = convert::blob("blob", reference).map_err(status::rejected)?;
        // Tasks share packs: the same blob is looked at once in a row.
        let whole = match last {
            Some((known, whole)) if known == digest => whole,
            Some(_) | None => context.blobs.length(&digest).map_err(status::blob)?,
        };
        last = Some((digest, whole));
        if offset + length > whole {
            context.blobs.check(&digest, offset, length).map_err(status::blob)?;
        }
    }
    let parts = Arc::new(Parts::new(&checked.wire, table));
    Ok((checked, parts))
}

/// One follower of a job's progress.
struct Watch {
    context: Arc<Context>,
    job: JobId,
    follow: bool,
    out: mpsc::Sender<Result<v1::JobProgress, Status>>,
}

impl Watch {
    async fn run(self) {
        if let Err(status) = self.tell_all().await {
            // The follower may be gone already.
            let _ = self.out.send(Err(status)).await;
        }
    }

    async fn tell_all(&self) -> Result<(), Status> {
        // Listening begins before the first look, so that nothing falls in between.
        let mut changes = self.context.handle.changes();
        let mut told = 0;
        loop {
            let progress = self.look().await?;
            let finished = progress.finished;
            if self.out.send(Ok(progress)).await.is_err() || finished || !self.follow {
                return Ok(());
            }
            told += 1;
            let due = Instant::now() + PROGRESS_EVERY;
            let mut pending = false;
            loop {
                let (changed, finished) = tokio::select! {
                    change = changes.recv() => match change.as_deref() {
                        Ok(Change::Committed { jobs, finished, .. }) => {
                            (jobs.contains(&self.job), finished.contains(&self.job))
                        }
                        Ok(Change::Output(_)) => (false, false),
                        // What was missed may be the end.
                        Err(RecvError::Lagged(_)) => (true, true),
                        Err(RecvError::Closed) => return Err(status::stopped(crate::driver::Stopped)),
                    },
                    () = tokio::time::sleep_until(due), if pending => break,
                    () = self.out.closed() => return Ok(()),
                };
                if finished || (changed && (told < PROGRESS_AT_ONCE || Instant::now() >= due)) {
                    break;
                }
                pending |= changed;
            }
        }
    }

    async fn look(&self) -> Result<v1::JobProgress, Status> {
        let id = self.job;
        let read = move |fleet: &Fleet, _| {
            let job = fleet.job(id)?;
            let single = (job.spec.tasks == 1).then(|| job.end_of(0).map(str::to_owned)).flatten();
            Some((shown::summary(fleet, id, job), job.finished.is_some(), single))
        };
        let found = self.context.handle.query(read).await.map_err(status::stopped)?;
        let (summary, finished, single) = found.ok_or_else(|| no_job(id))?;
        let end = match single {
            Some(name) if finished => self.end_of_single(&name).await?,
            Some(_) | None => None,
        };
        Ok(v1::JobProgress { summary: Some(summary), finished, end })
    }

    /// The last attempt's end has the figures; a task that was cancelled while it waited has none.
    async fn end_of_single(&self, name: &str) -> Result<Option<v1::End>, Status> {
        let (reader, id) = (self.context.reader.clone(), self.job);
        let attempts = blocking(move || reader.attempts(id, 0..1).map_err(status::store)).await?;
        let last = attempts.last().and_then(|stored| stored.record.ended.as_ref()).map(|end| &end.end);
        Ok(match last {
            Some(end) if end.summary() == name => Some(convert::end_to_wire(end)),
            Some(_) | None => shown::end_by_name(name),
        })
    }
}
