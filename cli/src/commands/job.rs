//! `muster job ...`: submit, watch, end and repeat jobs.

use std::{io::IsTerminal, process::ExitCode};

use muster_core::ids::JobId;
use muster_proto::v1::{
    CancelRequest, EventsRequest, InspectJobRequest, JobDetail, JobProgress, JobSummary, ListJobsRequest,
    ListTasksRequest, RetryRequest, TaskCounts,
};
use serde_json::json;

use super::{Context, fleet, jobs, logs, outputs, partial, run as attached, show, submit, watch::until_finished};
use crate::{
    args::{Job, Submit},
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    output::List,
    template::Draft,
};

/// Tasks asked for at once; their inline outputs come with them.
const TASKS_PAGE: u32 = 500;

/// Runs one command.
pub async fn run(context: &Context, command: Job) -> Result<ExitCode> {
    if let Job::Submit(request) = command {
        return submit_job(context, *request).await;
    }
    let client = context.connect().await?;
    match command {
        Job::Submit(_) => unreachable!("taken above"),
        Job::List { state, limit } => list(context, &client, state, limit).await,
        Job::Inspect { job } => inspect(context, &client, &job).await,
        Job::Tasks { job, first, limit, state } => tasks(context, &client, &job, first, limit, state).await,
        Job::Logs { job, follow, task, attempt, raw } => {
            let options = logs::Options { follow, task, attempt: attempt.unwrap_or(0), raw };
            logs::run(context, &client, &job, options).await
        }
        Job::Cancel { jobs, tasks, reason } => cancel(context, &client, &jobs, tasks, &reason).await,
        Job::Wait { jobs, propagate_exit } => wait(context, &client, &jobs, propagate_exit).await,
        Job::Retry { jobs } => retry(context, &client, &jobs).await,
        Job::Progress { job } => progress(context, &client, &job).await,
        Job::Events { job, follow } => {
            let id = JobId(jobs::resolve(&client, &job).await?);
            let request = EventsRequest { subject: format!("job/{id}"), follow, ..EventsRequest::default() };
            fleet::show_events(context, &client, request).await
        }
        Job::Outputs { job, to, task, overwrite } => outputs::fetch(context, &client, &job, &to, task, overwrite).await,
    }
}

async fn submit_job(context: &Context, request: Submit) -> Result<ExitCode> {
    let mut draft = match &request.file {
        Some(path) => Draft::from_file(path)?,
        None => Draft::default(),
    };
    if request.array.is_some() {
        (draft.array, draft.each_line) = (request.array, None);
    }
    if request.each_line.is_some() {
        (draft.array, draft.each_line) = (None, request.each_line);
    }
    if draft.array.is_some() && draft.each_line.is_some() {
        return Err(Failure::usage("a job is an array or has a task for each line, not both"));
    }
    draft.apply(request.command, request.options);
    // A wrong draft is told also when no coordinator is there.
    draft.template()?;
    let client = context.connect().await?;
    let accepted = submit::submit(context, &client, draft).await?;
    let id = JobId(accepted.job).to_string();
    if accepted.existed {
        context.output.say(&format!("The key was known: it made job {id}."));
    }
    if !request.propagate_exit {
        let value = json!({ "job": id, "existed": accepted.existed });
        context.output.one("Submitted", &value, &format!("{id}\n"), &id)?;
    }
    if request.wait { wait(context, &client, &[id], request.propagate_exit).await } else { Ok(Exit::Ok.into()) }
}

async fn list(context: &Context, client: &Client, state: Option<String>, limit: u32) -> Result<ExitCode> {
    let state = state.unwrap_or_default();
    if !matches!(state.as_str(), "" | "waiting" | "running" | "finished") {
        return Err(Failure::usage(format!(
            "`{}` is no state to list by; there are waiting, running and finished",
            escape::text(&state)
        )));
    }
    let columns = ["JOB", "NAME", "STATE", "DONE", "FAILED", "SUBMITTED", "+OWNER", "+PRIORITY", "REASON"];
    let mut shown = List::new("JobList", &columns);
    let (mut before, mut left) = (0, limit);
    while left > 0 {
        let request = ListJobsRequest { state: state.clone(), limit: left.min(1_000), before };
        let page = client.jobs().list(client.ask(request)).await?.into_inner();
        for job in &page.jobs {
            let counts = job.counts.unwrap_or_default();
            shown.push(
                vec![
                    JobId(job.job).to_string().into(),
                    (&job.name).into(),
                    context.output.state(&job.state),
                    format!("{}/{}", done(&counts), counts.total).into(),
                    counts.failed.to_string().into(),
                    context.output.time(job.submitted_ms).into(),
                    (&job.owner).into(),
                    job.priority.to_string().into(),
                    (&job.reason).into(),
                ],
                show::job(job),
            );
            before = job.job;
        }
        left = left.saturating_sub(u32::try_from(page.jobs.len()).unwrap_or(left));
        if !page.more || page.jobs.is_empty() {
            break;
        }
    }
    context.output.list(&shown)?;
    Ok(Exit::Ok.into())
}

const fn done(counts: &TaskCounts) -> u32 {
    counts.succeeded + counts.failed + counts.cancelled
}

async fn inspect(context: &Context, client: &Client, text: &str) -> Result<ExitCode> {
    let job = jobs::resolve(client, text).await?;
    let detail = client.jobs().inspect(client.ask(InspectJobRequest { job })).await?.into_inner();
    let request = ListTasksRequest { job, first: 0, limit: 1 };
    let tasks = client.jobs().list_tasks(client.ask(request)).await?.into_inner().tasks;
    let summary = detail.summary.clone().unwrap_or_default();
    let mut value = show::job(&summary);
    value["ends"] = json!(detail.ends);
    value["template"] = template_value(&detail);
    value["first_tasks"] = tasks.iter().map(|task| show::task(job, task)).collect();
    value["events"] = detail.events.iter().map(show::event).collect();
    let id = JobId(job).to_string();
    let mut text = inspect_text(context, &summary, &detail);
    if let [task] = tasks.as_slice() {
        text.push_str(&format!("task {}  {}  {}\n", task.index, escape::text(&task.state), escape::text(&task.reason)));
        for attempt in &task.attempts {
            text.push_str(&format!("  {}\n", attempt_line(context, attempt)));
        }
    }
    for event in &detail.events {
        text.push_str(&format!("{}\n", show::event_line(event, &context.output)));
    }
    context.output.one("Job", &value, &text, &id)?;
    Ok(Exit::Ok.into())
}

fn attempt_line(context: &Context, attempt: &muster_proto::v1::Attempt) -> String {
    let end = show::end_text(attempt.end.as_ref()).unwrap_or_else(|| attempt.state.clone());
    format!(
        "attempt {} on {}: {end}{}, placed {} because {}; wall {} ms, {}, fences {}",
        attempt.attempt.map_or(0, |id| id.number),
        escape::text(&attempt.node_name),
        if attempt.presumed { " (presumed)" } else { "" },
        context.output.time(attempt.placed_ms),
        escape::text(&attempt.placement_reason),
        attempt.wall_ms,
        show::start_text(attempt),
        attempt.fences.join(","),
    )
}

fn template_value(detail: &JobDetail) -> serde_json::Value {
    let Some(template) = &detail.template else { return serde_json::Value::Null };
    let body = template.body.clone().unwrap_or_default();
    json!({
        "command": body.arguments.iter().map(|argument| escape::bytes(argument)).collect::<Vec<_>>(),
        "request": show::resources(body.request.as_ref()),
        "profile": body.profile().as_str_name().trim_start_matches("PROFILE_").to_lowercase(),
        "network": body.network().as_str_name().trim_start_matches("NETWORK_").to_lowercase(),
        "without": body.without,
        "delivery": body.delivery().as_str_name().trim_start_matches("DELIVERY_").to_lowercase(),
        "on_drain": body.on_drain().as_str_name().trim_start_matches("ON_DRAIN_").to_lowercase(),
        "checkpoint_signal": body.checkpoint_signal, "time_limit_ms": body.time_limit_ms, "grace_ms": body.grace_ms, "pids_limit": body.pids_limit,
        "output_limit_bytes": body.output_limit_bytes, "tasks": template.tasks, "first_index": template.first_index,
        "constraints": template.constraints, "pool": template.pool, "inputs": body.inputs.len(),
        "outputs": body.outputs.iter().map(|path| escape::bytes(path)).collect::<Vec<_>>(),
    })
}

fn inspect_text(context: &Context, summary: &JobSummary, detail: &JobDetail) -> String {
    let counts = summary.counts.unwrap_or_default();
    let mut text = format!(
        "job        {} ({})\nstate      {}\ntasks      {} of {} done: {} succeeded, {} failed, {} cancelled; \
         {} running, {} placed, {} waiting\nsubmitted  {} by {}\n",
        JobId(summary.job),
        escape::text(&summary.name),
        escape::text(&summary.state),
        done(&counts),
        counts.total,
        counts.succeeded,
        counts.failed,
        counts.cancelled,
        counts.running + counts.stopping,
        counts.placed,
        counts.waiting,
        context.output.time(summary.submitted_ms),
        escape::text(&summary.owner),
    );
    if let Some(finished) = summary.finished_ms {
        text.push_str(&format!("finished   {}\n", context.output.time(finished)));
    }
    if !summary.reason.is_empty() {
        text.push_str(&format!("waits for  {}\n", escape::text(&summary.reason)));
    }
    if !detail.ends.is_empty() {
        let mut ends: Vec<String> =
            detail.ends.iter().map(|(end, count)| format!("{} {count}", escape::text(end))).collect();
        ends.sort();
        text.push_str(&format!("ends       {}\n", ends.join(", ")));
    }
    if let Some(body) = detail.template.as_ref().and_then(|template| template.body.as_ref()) {
        let words: Vec<String> = body.arguments.iter().map(|argument| escape::bytes(argument)).collect();
        text.push_str(&format!("command    {}\n", words.join(" ")));
        if !body.without.is_empty() {
            text.push_str(&format!("without    {}\n", escape::text(&body.without.join(", "))));
        }
    }
    text
}

async fn tasks(
    context: &Context,
    client: &Client,
    text: &str,
    first: u32,
    limit: u32,
    state: Option<String>,
) -> Result<ExitCode> {
    let job = jobs::resolve(client, text).await?;
    let columns = ["TASK", "STATE", "NODE", "TRIES", "WALL", "START", "+FENCES", "REASON"];
    let mut shown = List::new("TaskList", &columns);
    let (mut next, mut left) = (first, limit);
    while left > 0 {
        let request = ListTasksRequest { job, first: next, limit: left.min(TASKS_PAGE) };
        let page = client.jobs().list_tasks(client.ask(request)).await?.into_inner();
        for task in &page.tasks {
            next = task.index + 1;
            if state.as_ref().is_some_and(|state| !task.state.starts_with(state.as_str())) {
                continue;
            }
            let last = task.attempts.last().cloned().unwrap_or_default();
            shown.push(
                vec![
                    format!("{}.{}", JobId(job), task.index).into(),
                    context.output.state(&task.state),
                    (&last.node_name).into(),
                    task.attempts.len().to_string().into(),
                    known(last.wall_ms, "ms").into(),
                    known(last.start_us, "us").into(),
                    last.fences.join(",").into(),
                    (&task.reason).into(),
                ],
                show::task(job, task),
            );
        }
        left = left.saturating_sub(u32::try_from(page.tasks.len()).unwrap_or(left));
        if !page.more || page.tasks.is_empty() {
            break;
        }
    }
    context.output.list(&shown)?;
    Ok(Exit::Ok.into())
}

/// A figure that was not told is none.
fn known(figure: u64, unit: &str) -> String {
    if figure == 0 { String::from("-") } else { format!("{figure} {unit}") }
}

async fn cancel(
    context: &Context,
    client: &Client,
    named: &[String],
    tasks: Option<(u32, u32)>,
    reason: &str,
) -> Result<ExitCode> {
    let ids = jobs::resolve_all(client, named).await?;
    if ids.len() > 1 {
        context.confirm(&effect_of_cancel(client, &ids).await?)?;
    }
    let tasks: Vec<u32> = tasks.map(|(first, last)| (first..=last).collect()).unwrap_or_default();
    let mut list = List::new("Cancelled", &["JOB", "CANCELLED", "STOPPING", "ENDED BEFORE"]);
    let (alone, mut done_for, mut refused) = (ids.len() == 1, 0, Vec::new());
    for job in ids {
        let request = CancelRequest { job, tasks: tasks.clone(), reason: reason.to_owned() };
        let done = match client.jobs().cancel(client.ask(request)).await {
            Ok(done) => done.into_inner(),
            Err(status) => {
                refused.push(refusal(job, status, alone)?);
                continue;
            }
        };
        done_for += 1;
        let id = JobId(job).to_string();
        let value = json!({
            "job": id, "cancelled_waiting": done.cancelled_waiting, "stopping": done.stopping,
            "already_ended": done.already_ended,
        });
        list.push(
            vec![
                id.into(),
                done.cancelled_waiting.to_string().into(),
                done.stopping.to_string().into(),
                done.already_ended.to_string().into(),
            ],
            value,
        );
    }
    context.output.list(&list)?;
    partial(done_for, &refused, &context.output)
}

/// What one of several jobs was refused for; the others are still asked. What is no refusal ends the command.
fn refusal(job: u64, status: tonic::Status, alone: bool) -> Result<String> {
    use tonic::Code::{FailedPrecondition, NotFound, PermissionDenied};
    if alone || !matches!(status.code(), FailedPrecondition | NotFound | PermissionDenied) {
        return Err(status.into());
    }
    Ok(format!("job {}: {}", JobId(job), status.message()))
}

async fn effect_of_cancel(client: &Client, ids: &[u64]) -> Result<String> {
    let (mut running, mut waiting) = (0, 0);
    for job in ids {
        let detail = client.jobs().inspect(client.ask(InspectJobRequest { job: *job })).await?.into_inner();
        let counts = detail.summary.and_then(|summary| summary.counts).unwrap_or_default();
        running += counts.running + counts.placed;
        waiting += counts.waiting;
    }
    Ok(format!("This ends {} jobs with {running} running and {waiting} waiting tasks", ids.len()))
}

async fn retry(context: &Context, client: &Client, named: &[String]) -> Result<ExitCode> {
    let mut list = List::new("Retried", &["JOB", "TASKS"]);
    let ids = jobs::resolve_all(client, named).await?;
    let (alone, mut done_for, mut refused) = (ids.len() == 1, 0, Vec::new());
    for job in ids {
        let done = match client.jobs().retry(client.ask(RetryRequest { job })).await {
            Ok(done) => done.into_inner(),
            Err(status) => {
                refused.push(refusal(job, status, alone)?);
                continue;
            }
        };
        done_for += 1;
        let id = JobId(job).to_string();
        let value = json!({ "job": id, "placed_again": done.placed_again });
        list.push(vec![id.into(), done.placed_again.to_string().into()], value);
    }
    context.output.list(&list)?;
    partial(done_for, &refused, &context.output)
}

async fn wait(context: &Context, client: &Client, named: &[String], propagate: bool) -> Result<ExitCode> {
    let ids = jobs::resolve_all(client, named).await?;
    let shown: Vec<String> = ids.iter().map(|id| JobId(*id).to_string()).collect();
    let way_back = format!("`muster job wait {}` comes back to it.", shown.join(" "));
    let all = async {
        let mut last = None;
        let mut failed = Vec::new();
        for job in &ids {
            let step = until_finished(client, *job, &mut |_| ()).await?;
            let state = step.summary.as_ref().map(|summary| summary.state.clone()).unwrap_or_default();
            if state != "succeeded" {
                failed.push(format!("job {} {state}", JobId(*job)));
            }
            last = Some(step);
        }
        Ok((last, failed))
    };
    let (last, failed) = context.wait(&format!("job {}", shown.join(", ")), &way_back, all).await?;
    // An array has no code of its own: it succeeded or it did not.
    if propagate
        && let ([id], Some(step)) = (ids.as_slice(), &last)
        && step.end.is_some()
    {
        return Ok(attached::exit_code(context, JobId(*id), step.end.as_ref()));
    }
    if failed.is_empty() {
        return Ok(Exit::Ok.into());
    }
    Err(Failure::new(Exit::Failed, format!("{}; `muster job inspect` says why", failed.join(", "))))
}

async fn progress(context: &Context, client: &Client, text: &str) -> Result<ExitCode> {
    let job = jobs::resolve(client, text).await?;
    let id = JobId(job);
    let live = std::io::stderr().is_terminal() && !context.output.quiet;
    let mut draw = |step: &JobProgress| {
        let counts = step.summary.as_ref().and_then(|summary| summary.counts).unwrap_or_default();
        let line = format!(
            "{id}  {}/{} done, {} failed, {} running, {} waiting",
            done(&counts),
            counts.total,
            counts.failed,
            counts.running,
            counts.waiting
        );
        if live {
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
    };
    let way_back = format!("`muster job progress {id}` comes back to it.");
    let last = context.wait(&format!("job {id}"), &way_back, until_finished(client, job, &mut draw)).await;
    if live {
        eprintln!();
    }
    let summary = last?.summary.unwrap_or_default();
    context.output.one("Job", &show::job(&summary), "", &id.to_string())?;
    Ok(if summary.state == "succeeded" { Exit::Ok } else { Exit::Failed }.into())
}
