//! The coordinator as its peers see it: over real TLS and gRPC, in one process.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use muster_coordinator::server;
use muster_proto::v1::{
    self, agent_message, coordinator_message::Message, fleet_client::FleetClient, jobs_client::JobsClient,
    nodes_client::NodesClient,
};
use support::{Coordinator, FakeHost, PATIENCE, config, message, new_key, succeeded, template};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, transport::Channel};

async fn submit(
    jobs: &mut JobsClient<Channel>,
    key: &str,
    template: v1::JobTemplate,
) -> Result<v1::SubmitResponse, tonic::Status> {
    let request = v1::SubmitRequest { idempotency_key: key.into(), template: Some(template) };
    jobs.submit(request).await.map(tonic::Response::into_inner)
}

async fn finished(jobs: &mut JobsClient<Channel>, job: u64) -> v1::JobProgress {
    let follow = v1::WatchJobRequest { job, follow: true };
    let mut progress = jobs.watch(follow).await.unwrap().into_inner();
    let last = async {
        loop {
            let next = progress.message().await.unwrap().expect("a job that is followed ends");
            if next.finished {
                return next;
            }
        }
    };
    tokio::time::timeout(PATIENCE, last).await.expect("the job ends in time")
}

async fn output(jobs: &mut JobsClient<Channel>, job: u64, task: u32, follow: bool) -> Vec<u8> {
    let request = v1::LogsRequest { job, task, attempt: 0, follow };
    let mut chunks = jobs.logs(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(chunk) = tokio::time::timeout(PATIENCE, chunks.message()).await.expect("output in time").unwrap() {
        all.extend_from_slice(&chunk.data);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_from_submit_to_inspect_and_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let mut host = FakeHost::join(&coordinator, "web-01").await;
    let mut session = host.connect(&coordinator, Vec::new()).await;
    let Message::Welcome(first) = session.next().await else { panic!("Welcome comes first") };

    let mut jobs = JobsClient::new(coordinator.operator().await);
    let accepted = submit(&mut jobs, "key", template(2)).await.unwrap();
    assert!(!accepted.existed);
    let again = submit(&mut jobs, "key", template(2)).await.unwrap();
    assert_eq!((again.job, again.existed), (accepted.job, true), "the same request again is the same job");
    let conflict = submit(&mut jobs, "key", template(3)).await.unwrap_err();
    assert_eq!(conflict.code(), Code::AlreadyExists, "{conflict}");

    let mut left = 2;
    while left > 0 {
        let starts = session.starts().await;
        assert_eq!(starts.bodies.len(), 1, "what tasks share is sent once");
        assert_eq!(starts.bodies[0].job, accepted.job);
        for start in &starts.attempts {
            let task = start.attempt.unwrap().task;
            assert_eq!(start.item.as_deref(), Some(task.to_string().as_bytes()));
            session.report(start, succeeded("hello\n")).await;
            left -= 1;
        }
    }
    session.stored().await;
    let end = finished(&mut jobs, accepted.job).await;
    assert_eq!(end.summary.unwrap().state, "succeeded");
    assert_eq!(output(&mut jobs, accepted.job, 1, false).await, b"hello\n");
    drop((session, jobs));
    coordinator.stop().await;

    let coordinator = Coordinator::start(folder.path()).await;
    let mut jobs = JobsClient::new(coordinator.admin().await);
    let detail = jobs.inspect(v1::InspectJobRequest { job: accepted.job }).await.unwrap().into_inner();
    assert_eq!(detail.ends["succeeded"], 2);
    assert_eq!(detail.template.unwrap().tasks, 2);
    let request = v1::ListTasksRequest { job: accepted.job, ..Default::default() };
    let tasks = jobs.list_tasks(request).await.unwrap().into_inner().tasks;
    assert_eq!(tasks[1].attempts[0].start_us, 321);
    assert_eq!(tasks[1].attempts[0].start_phases.map(|phases| (phases.prepared, phases.exec_us)), Some((true, 110)));
    assert_eq!(tasks[1].attempts[0].node_name, "web-01");
    assert!(submit(&mut jobs, "key", template(2)).await.is_err(), "another owner's request is another request");
    let mut session = host.connect(&coordinator, Vec::new()).await;
    let Message::Welcome(welcome) = session.next().await else { panic!("Welcome comes first") };
    assert!(welcome.term > first.term, "each start leads anew");
    drop((session, jobs));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_followed_while_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let mut host = FakeHost::join(&coordinator, "web-01").await;
    let mut session = host.connect(&coordinator, Vec::new()).await;
    let mut jobs = JobsClient::new(coordinator.operator().await);
    let job = submit(&mut jobs, "key", template(1)).await.unwrap().job;
    let start = session.starts().await.attempts.remove(0);

    let mut follower = jobs.clone();
    let following = tokio::spawn(async move { output(&mut follower, job, 0, true).await });
    let stream = v1::Stream::Stdout.into();
    let chunk = |offset, data: &'static str| v1::LogChunk { attempt: start.attempt, stream, offset, data: data.into() };
    let upload = tokio_stream::iter([chunk(0, "one "), chunk(4, "two "), chunk(4, "two ")]);
    let mut acks = session.agent.upload_logs(upload).await.unwrap().into_inner();
    let mut acknowledged = 0;
    while let Some(ack) = acks.message().await.unwrap() {
        acknowledged = ack.offset;
    }
    assert_eq!(acknowledged, 8);
    let mut ended = succeeded("two three");
    ended.tails[0].offset = 4;
    session.report(&start, ended).await;
    assert_eq!(following.await.unwrap(), b"one two three", "the tail overlaps what was uploaded");

    let gap = tokio_stream::iter([chunk(100, "x")]);
    let mut acks = session.agent.upload_logs(gap).await.unwrap().into_inner();
    let ack = acks.message().await.unwrap().unwrap();
    assert_eq!(ack.offset, 8, "the answer says from where on to send");
    let strange = v1::AttemptId { job: 7, task: 0, number: 1 };
    let foreign = tokio_stream::iter([v1::LogChunk { attempt: Some(strange), ..chunk(0, "x") }]);
    let mut acks = session.agent.upload_logs(foreign).await.unwrap().into_inner();
    let ack = acks.message().await.unwrap().unwrap();
    assert_eq!((ack.attempt, ack.offset), (Some(strange), 1), "nobody would read it: it is taken, and dropped");
    let logs = folder.path().join("logs");
    assert_eq!(std::fs::read_dir(logs).unwrap().count(), 1, "of the one job that there is");
    drop((session, jobs));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_the_door_once() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let token = coordinator.token().await;
    let (first, second) = (new_key(), new_key());
    let joined = coordinator.join(&token, "web-01", &first).await.unwrap();
    assert_eq!(joined.coordinators, ["a.example:1"], "a host learns where all coordinators are");
    let repeated = coordinator.join(&token, "web-01", &first).await.unwrap();
    assert_eq!(joined.node, repeated.node, "a lost answer costs nothing");
    let used = coordinator.join(&token, "web-02", &second).await.unwrap_err();
    assert_eq!(used.code(), Code::Unauthenticated);
    assert!(used.message().contains("another host"), "{used}");
    let taken = coordinator.join(&coordinator.token().await, "web-01", &second).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_the_right_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let mut anonymous = JobsClient::new(coordinator.dial(None).await);
    let refused = anonymous.list(v1::ListJobsRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");

    let mut host = FakeHost::join(&coordinator, "web-01").await;
    let as_node = coordinator.dial(Some((host.chain.clone(), host.key.clone()))).await;
    let refused = JobsClient::new(as_node).list(v1::ListJobsRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    let mut session = host.connect(&coordinator, Vec::new()).await;
    session.next().await;
    let mut nodes = NodesClient::new(coordinator.admin().await);
    let remove = v1::RemoveNodeRequest { node: "web-01".into(), force: true, reason: "test".into() };
    nodes.remove(remove).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, session.hear.message()).await.unwrap();
    assert!(end.unwrap_err().message().contains("removed"), "its stream is cut with the reason");
    let refused = session.agent.renew(v1::RenewRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "its certificate opens nothing: {refused}");

    let mut plain = tokio::net::TcpStream::connect(coordinator.running.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // Closed, with at most a TLS alert; a reset is as good.
    let _ = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await.expect("closed in time");
    assert!(answer.len() < 16, "{answer:?}");
    assert!(nodes.list(v1::ListNodesRequest {}).await.is_ok(), "and it goes on serving");
    drop((nodes, session));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_proved_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let mut host = FakeHost::join(&coordinator, "web-01").await;
    let mut session = host.connect(&coordinator, Vec::new()).await;
    session.next().await;
    let mut nodes = NodesClient::new(coordinator.operator().await);
    let selector = v1::NodeSelector { nodes: vec!["web-01".into(), "web-99".into()], ..Default::default() };
    let drain = v1::DrainRequest { selector: Some(selector), then: "stop".into(), ..Default::default() };
    let drained = nodes.drain(drain).await.unwrap().into_inner();
    assert_eq!(drained.refused.len(), 1, "the one that is not there");
    let Message::AskDrained(ask) = session.next().await else { panic!("the host is asked for the proof") };
    let proof = v1::DrainProof { revision: ask.revision };
    session.say.send(message(agent_message::Message::DrainProof(proof))).await.unwrap();
    let Message::Release(release) = session.next().await else { panic!("a proved drain is released") };
    assert_eq!(release.then(), v1::release::Then::Stop);
    let mut fleet = FleetClient::new(coordinator.operator().await);
    let request = v1::EventsRequest { subject: "node/web-01".into(), ..Default::default() };
    let mut events = fleet.events(request).await.unwrap().into_inner();
    let mut kinds = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        assert_eq!(event.subject, "node/web-01");
        kinds.push(event.kind);
    }
    assert!(kinds.iter().any(|kind| kind == "drain_proved"), "{kinds:?}");
    drop((nodes, fleet, session));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_tasks_travel_with_the_order_and_missing_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let mut host = FakeHost::join(&coordinator, "web-01").await;
    let mut session = host.connect(&coordinator, Vec::new()).await;
    let mut jobs = JobsClient::new(coordinator.operator().await);
    let store = |data: Vec<u8>| tokio_stream::iter([v1::BlobChunk { digest: Default::default(), data: data.into() }]);
    let pack = jobs.store_blob(store(b"redgreen".to_vec())).await.unwrap().into_inner();
    let row = |item: &'static str, offset, length| {
        let blob = v1::BlobRef { digest: pack.digest.clone(), offset, length };
        let content = v1::FileContent { source: Some(v1::file_content::Source::Blob(blob)) };
        let input = v1::InputFile { path: "colour".into(), content: Some(content), executable: false };
        v1::TaskParameters { item: Some(item.into()), inputs: vec![input] }
    };
    let table = |rows| prost::Message::encode_to_vec(&v1::TaskTable { tasks: rows });
    let good = jobs.store_blob(store(table(vec![row("r", 0, 3), row("g", 3, 5)]))).await.unwrap().into_inner();
    let bad = jobs.store_blob(store(table(vec![row("r", 0, 300)]))).await.unwrap().into_inner();

    let with = |table: v1::BlobRef| v1::JobTemplate { task_table: Some(table), ..template(0) };
    let refused = submit(&mut jobs, "bad", with(bad)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let unknown = v1::BlobRef { digest: vec![7; 32].into(), offset: 0, length: 10 };
    let refused = submit(&mut jobs, "unknown", with(unknown)).await.unwrap_err();
    assert!(refused.code() == Code::NotFound && refused.message().contains("0707"), "{refused}");

    submit(&mut jobs, "good", with(good)).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        for start in session.starts().await.attempts {
            let content = start.inputs[0].content.as_ref().and_then(|content| content.source.clone());
            let Some(v1::file_content::Source::Inline(data)) = content else { panic!("small files travel inline") };
            seen.push((start.item.unwrap(), data));
        }
    }
    assert_eq!(seen, [("r".into(), "red".into()), ("g".into(), "green".into())]);
    drop((jobs, session));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_coordinator_on_the_same_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    let refused = server::start(config(folder.path())).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
    coordinator.stop().await;

    std::fs::remove_file(folder.path().join("fleet.db")).unwrap();
    let refused = server::start(config(folder.path())).await.unwrap_err().to_string();
    assert!(refused.contains("missing"), "never starts empty: {refused}");
}
