//! The operator's API over the coordinator's Unix socket, typed, for assertions.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use muster_proto::v1::{
    self, ListNodesRequest, ListTasksRequest, LogsRequest, SubmitRequest, WatchJobRequest, fleet_client::FleetClient,
    jobs_client::JobsClient, nodes_client::NodesClient, pools_client::PoolsClient,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{WAIT, eventually};

/// A connected operator.
#[derive(Clone, Debug)]
pub struct Client {
    /// Jobs and blobs.
    pub jobs: JobsClient<Channel>,
    /// Nodes.
    pub nodes: NodesClient<Channel>,
    /// Pools.
    pub pools: PoolsClient<Channel>,
    /// The fleet as a whole.
    pub fleet: FleetClient<Channel>,
}

/// A job that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its record.
    pub summary: v1::JobSummary,
    /// All its tasks with their attempts.
    pub tasks: Vec<v1::Task>,
}

impl Finished {
    /// The end of the last attempt of a task.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    pub fn end(&self, task: usize) -> v1::end::Reason {
        self.last_attempt(task).end.and_then(|end| end.reason).expect("an ended attempt has an end")
    }

    /// The last attempt of a task.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    pub fn last_attempt(&self, task: usize) -> v1::Attempt {
        self.tasks[task].attempts.last().expect("a finished task has an attempt").clone()
    }
}

impl Client {
    /// Connects to the socket; each call after a restart of the coordinator reconnects by itself.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let dial = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://muster-coordinator").timeout(WAIT);
        let channel = endpoint.connect_with_connector_lazy(dial);
        Self {
            jobs: JobsClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            nodes: NodesClient::new(channel.clone()),
            pools: PoolsClient::new(channel.clone()),
            fleet: FleetClient::new(channel),
        }
    }

    /// Submits under a fresh key, again and again while the coordinator is away.
    pub async fn submit(&self, template: v1::JobTemplate) -> u64 {
        let key = fresh_key();
        eventually("the coordinator takes a job", WAIT, async || match self.try_submit(&key, template.clone()).await {
            Ok(answer) => Some(answer.job),
            Err(status) if is_away(&status) => None,
            Err(status) => panic!("the job was refused: {status}"),
        })
        .await
    }

    /// Submits once.
    ///
    /// # Errors
    ///
    /// The coordinator's refusal.
    pub async fn try_submit(&self, key: &str, template: v1::JobTemplate) -> Result<v1::SubmitResponse, Status> {
        let request = SubmitRequest { idempotency_key: key.to_owned(), template: Some(template) };
        Ok(self.jobs.clone().submit(request).await?.into_inner())
    }

    /// A job's record; waits over a restart of the coordinator.
    pub async fn summary(&self, job: u64) -> v1::JobSummary {
        eventually("the coordinator answers", WAIT, async || {
            match self.jobs.clone().inspect(v1::InspectJobRequest { job }).await {
                Ok(answer) => answer.into_inner().summary,
                Err(status) if is_away(&status) => None,
                Err(status) => panic!("job {job}: {status}"),
            }
        })
        .await
    }

    /// Waits until the job has ended.
    pub async fn finished(&self, job: u64, deadline: Duration) -> Finished {
        let summary = eventually(&format!("job {job} finishes"), deadline, async || {
            let summary = self.summary(job).await;
            summary.finished_ms.is_some().then_some(summary)
        })
        .await;
        Finished { summary, tasks: self.tasks(job).await }
    }

    /// Submits and waits.
    pub async fn run(&self, template: v1::JobTemplate) -> Finished {
        let job = self.submit(template).await;
        self.finished(job, WAIT).await
    }

    /// All tasks of a job, page by page.
    ///
    /// # Panics
    ///
    /// If the coordinator refuses.
    pub async fn tasks(&self, job: u64) -> Vec<v1::Task> {
        let mut tasks: Vec<v1::Task> = Vec::new();
        loop {
            let first = tasks.last().map_or(0, |task| task.index + 1);
            let request = ListTasksRequest { job, first, limit: 1_000 };
            let page = self.jobs.clone().list_tasks(request).await.expect("a page of tasks").into_inner();
            tasks.extend(page.tasks);
            if !page.more {
                return tasks;
            }
        }
    }

    /// Waits until `count` tasks of the job run.
    pub async fn running(&self, job: u64, count: u32) {
        eventually(&format!("{count} tasks of job {job} run"), WAIT, async || {
            let counts = self.summary(job).await.counts.unwrap_or_default();
            (counts.running >= count).then_some(())
        })
        .await;
    }

    /// What the last attempt of a task wrote: stdout and stderr.
    ///
    /// # Panics
    ///
    /// If the coordinator refuses.
    pub async fn output(&self, job: u64, task: u32) -> (Vec<u8>, Vec<u8>) {
        let request = LogsRequest { job, task, attempt: 0, follow: false };
        let mut stream = self.jobs.clone().logs(request).await.expect("a log").into_inner();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(part) = stream.message().await.expect("a part of the log") {
            match part.stream() {
                v1::Stream::Stdout => out.extend_from_slice(&part.data),
                v1::Stream::Stderr => err.extend_from_slice(&part.data),
                v1::Stream::Unspecified => panic!("a part of no stream"),
            }
        }
        (out, err)
    }

    /// All nodes; waits over a restart of the coordinator.
    pub async fn nodes(&self) -> Vec<v1::Node> {
        eventually("the coordinator lists its nodes", WAIT, async || {
            match self.nodes.clone().list(ListNodesRequest {}).await {
                Ok(answer) => Some(answer.into_inner().nodes),
                Err(status) if is_away(&status) => None,
                Err(status) => panic!("nodes: {status}"),
            }
        })
        .await
    }

    /// A node by name.
    pub async fn node(&self, name: &str) -> Option<v1::Node> {
        self.nodes().await.into_iter().find(|node| node.name == name)
    }

    /// Waits until a node is in this state.
    pub async fn node_in(&self, name: &str, state: &str) -> v1::Node {
        eventually(&format!("node {name} is {state}"), WAIT, async || {
            self.node(name).await.filter(|node| node.state == state)
        })
        .await
    }

    /// A job's progress until it has ended: the last message.
    ///
    /// # Panics
    ///
    /// If the stream ends early.
    pub async fn watch_to_end(&self, job: u64) -> v1::JobProgress {
        let mut stream =
            self.jobs.clone().watch(WatchJobRequest { job, follow: true }).await.expect("a watch").into_inner();
        let mut last = None;
        while let Some(progress) = stream.message().await.expect("progress") {
            last = Some(progress);
        }
        last.expect("at least one message")
    }
}

/// A key that no other submit uses.
#[must_use]
pub fn fresh_key() -> String {
    use std::{collections::hash_map::RandomState, hash::BuildHasher};
    format!("test-{:016x}", RandomState::new().hash_one(std::process::id()))
}

/// The coordinator is not there just now: ask again.
#[must_use]
pub fn is_away(status: &Status) -> bool {
    matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled)
}

/// Bytes of a text.
#[must_use]
pub fn bytes(text: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(text.as_ref())
}
