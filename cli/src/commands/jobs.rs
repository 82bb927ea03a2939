//! Which job is meant: an id, a unique beginning of one, or `@last`.

use muster_core::ids::JobId;
use muster_proto::v1::{ListJobsRequest, WatchJobRequest};
use tonic::Code;

use crate::{
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
};

/// A beginning of an id is looked for among this many of the newest jobs.
const PREFIX_JOBS: u32 = 1_000;

/// A job, or a task of it (`7k2.15`).
pub fn split_task(text: &str) -> Result<(&str, Option<u32>)> {
    match text.split_once('.') {
        None => Ok((text, None)),
        Some((job, task)) => match task.parse() {
            Ok(task) => Ok((job, Some(task))),
            Err(_) => Err(Failure::usage(format!("`{}` is no task; write JOB.TASK, like 7k2.15", escape::text(text)))),
        },
    }
}

/// The jobs that were named; one that is not there ends the command before anything is done.
pub async fn resolve_all(client: &Client, named: &[String]) -> Result<Vec<u64>> {
    let mut ids = Vec::new();
    for text in named {
        ids.push(resolve(client, text).await?);
    }
    Ok(ids)
}

/// The job that is meant.
pub async fn resolve(client: &Client, text: &str) -> Result<u64> {
    let shown = escape::text(text);
    if text == "@last" {
        let request = ListJobsRequest { limit: 1, ..ListJobsRequest::default() };
        let newest = client.jobs().list(client.ask(request)).await?.into_inner().jobs;
        return newest
            .first()
            .map(|job| job.job)
            .ok_or_else(|| Failure::new(Exit::NotFound, "there is no last job; none was submitted yet"));
    }
    let id: JobId = text.parse().map_err(|why| Failure::usage(format!("`{shown}` names no job: {why}, or @last")))?;
    if is_known(client, id).await? {
        return Ok(id.0);
    }
    let request = ListJobsRequest { limit: PREFIX_JOBS, ..ListJobsRequest::default() };
    let jobs = client.jobs().list(client.ask(request)).await?.into_inner().jobs;
    let wanted = text.to_ascii_lowercase();
    let found: Vec<String> =
        jobs.iter().map(|job| JobId(job.job).to_string()).filter(|id| id.starts_with(&wanted)).collect();
    match found.as_slice() {
        [one] => Ok(one.parse::<JobId>().expect("it was printed from an id").0),
        [] => Err(Failure::new(
            Exit::NotFound,
            format!("there is no job {shown}; `muster job list` shows those that are kept"),
        )),
        many => Err(Failure::usage(format!("{shown} is the beginning of {} jobs: {}", many.len(), many.join(", ")))),
    }
}

/// Asked with the cheapest question; an unknown job may be told only where the stream would begin.
async fn is_known(client: &Client, id: JobId) -> Result<bool> {
    let asked = async {
        let request = client.ask(WatchJobRequest { job: id.0, follow: false });
        client.jobs().watch(request).await?.into_inner().message().await
    };
    match asked.await {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(status.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_written_after_a_point() {
        assert_eq!(split_task("7k2").unwrap(), ("7k2", None));
        assert_eq!(split_task("7k2.15").unwrap(), ("7k2", Some(15)));
        assert!(split_task("7k2.x").is_err());
    }
}
