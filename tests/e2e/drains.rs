//! Draining a node: what it waits for, what ends at the deadline, what proof it
//! takes, and what follows.

use std::time::Duration;

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, client::fresh_key, eventually, fleet::selector, host};

fn requeue(mut template: v1::JobTemplate) -> v1::JobTemplate {
    template.body.as_mut().expect("a body").on_drain = v1::OnDrain::Requeue.into();
    template
}

async fn resume(fleet: &Fleet, name: &str) {
    let request = v1::CordonRequest { selector: Some(selector(name)), reason: String::from("a test") };
    fleet.client.nodes.clone().resume(request).await.expect("a resume");
}

#[tokio::test]
async fn at_the_deadline_what_is_left_ends_as_drained_and_runs_elsewhere() {
    let mut fleet = Fleet::with_node().await;
    let script = "[ \"${MUSTER_EPOCH#*.}\" = 1 ] || exit 0; trap 'exit 9' TERM; sleep 30 & wait";
    let job = fleet.client.submit(fleet.script(script)).await;
    fleet.client.running(job, 1).await;

    let answer = fleet.drain("n1", Some(Duration::from_secs(1)), "nothing").await;
    assert_eq!(answer.blockers.len(), 1, "{answer:?}");
    fleet.client.node_in("n1", "drained").await;
    let summary = fleet.client.summary(job).await;
    assert_eq!(summary.state, "waiting", "only another node may take it (FL-9)");
    assert!(!summary.reason.is_empty(), "it says why it waits");

    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(job, WAIT).await;
    let attempts = &done.tasks[0].attempts;
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    assert_eq!(attempts[0].end.clone().and_then(|end| end.reason), Some(Reason::Drained(v1::Empty {})));
    assert_eq!((attempts[1].node_name.as_str(), done.end(0)), ("n2", Reason::Succeeded(v1::Empty {})));
}

#[tokio::test]
async fn without_a_deadline_it_waits_and_takes_nothing_new() {
    let fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("sleep 2; echo finished")).await;
    fleet.client.running(job, 1).await;
    fleet.drain("n1", None, "nothing").await;
    let later = fleet.client.submit(fleet.job(["/bin/true"])).await;
    assert_eq!(fleet.client.node("n1").await.expect("n1").state, "draining");

    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    assert_eq!(fleet.client.output(job, 0).await.0, b"finished\n");
    let node = fleet.client.node_in("n1", "drained").await;
    assert!(node.drain.and_then(|drain| drain.proved_ms).is_some(), "drained is proved (FL-7)");
    assert_eq!(fleet.client.summary(later).await.state, "waiting");

    resume(&fleet, "n1").await;
    fleet.client.node_in("n1", "ready").await;
    assert_eq!(fleet.client.finished(later, WAIT).await.summary.state, "succeeded");
}

#[tokio::test]
async fn a_cancelled_drain_ends_nothing() {
    let fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("sleep 3; echo finished")).await;
    fleet.client.running(job, 1).await;
    fleet.drain("n1", Some(Duration::from_secs(2)), "nothing").await;
    resume(&fleet, "n1").await;
    fleet.client.node_in("n1", "ready").await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
}

#[tokio::test]
async fn a_drain_survives_a_kill_of_both_sides() {
    let mut fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("sleep 3; echo finished")).await;
    fleet.client.running(job, 1).await;
    fleet.drain("n1", None, "nothing").await;
    fleet.kill_coordinator();
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    fleet.start_coordinator().await;
    fleet.start_agent("n1");
    let node = fleet.client.node_in("n1", "drained").await;
    assert_eq!(node.drain.expect("a drain").reason, "a test");
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
}

#[tokio::test]
async fn a_job_that_is_requeued_on_drain_does_not_wait_for_the_deadline() {
    let mut fleet = Fleet::with_node().await;
    let script = "[ \"${MUSTER_EPOCH#*.}\" = 1 ] || exit 0; sleep 600";
    let job = fleet.client.submit(requeue(fleet.script(script))).await;
    fleet.client.running(job, 1).await;
    fleet.add_node("n2", &NodeOptions::default()).await;
    let node = fleet.client.tasks(job).await[0].attempts[0].node_name.clone();
    fleet.drain(&node, Some(Duration::from_secs(3_600)), "nothing").await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!(done.tasks[0].attempts.len(), 2);
    assert_ne!(done.last_attempt(0).node_name, node);
    fleet.client.node_in(&node, "drained").await;
}

#[tokio::test]
async fn a_released_node_stays_down() {
    let mut fleet = Fleet::with_node().await;
    fleet.drain("n1", Some(Duration::from_secs(1)), "stop").await;
    let agent = fleet.node("n1").agent.as_mut().expect("an agent");
    assert_eq!(agent.wait(WAIT).code(), Some(86));
    assert!(fleet.folder().join("n1/agent/released").exists(), "the marker that keeps it down");
    fleet.start_agent("n1");
    let agent = fleet.node("n1").agent.as_mut().expect("an agent");
    assert_eq!(agent.wait(WAIT).code(), Some(86), "a later start refuses");
    assert!(agent.log().contains("released"), "and says why: {}", agent.log());
}

#[tokio::test]
async fn a_stopped_node_leaves_nothing_on_its_host() {
    let mut fleet = Fleet::with_node().await;
    let marker = fresh_key();
    let mut template = fleet.job(["/bin/sh", "-c", "sleep 600; :", &marker]);
    template.tasks = 3;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 3).await;
    let folder = fleet.folder().join("n1").display().to_string();
    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    spawner.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(spawner.wait(WAIT).success());
    assert_eq!(host::processes_with(&marker), Vec::new());
    assert_eq!(host::mounts_with(&folder), Vec::<String>::new());
    let own = format!("muster-{}", fleet.node_id("n1"));
    assert!(!host::muster_cgroups().contains(&own), "its cgroup is gone");
}

fn on_drain(mut template: v1::JobTemplate, on_drain: v1::OnDrain, grace_ms: u64) -> v1::JobTemplate {
    let body = template.body.as_mut().expect("a body");
    (body.on_drain, body.grace_ms) = (on_drain.into(), grace_ms);
    template
}

async fn stdout_has(fleet: &Fleet, job: u64, wanted: &str) -> String {
    eventually(&format!("the job says {wanted}"), WAIT, async || {
        let text = String::from_utf8_lossy(&fleet.client.output(job, 0).await.0).into_owned();
        text.contains(wanted).then_some(text)
    })
    .await
}

/// What the job's file says of a drain, each time that it changes.
const TELLS_OF_DRAINS: &str = "echo at $MUSTER_DRAIN_FILE; last=x; while :; do \
     if [ -e \"$MUSTER_DRAIN_FILE\" ]; then now=$(cat \"$MUSTER_DRAIN_FILE\"); else now=no; fi; \
     [ \"$now\" = \"$last\" ] || echo \"drain: $now.\"; last=$now; sleep 0.1; done";

#[tokio::test]
async fn a_job_can_read_until_when_its_node_drains() {
    let mut fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script(TELLS_OF_DRAINS)).await;
    stdout_has(&fleet, job, "drain: no.").await;
    fleet.drain("n1", None, "nothing").await;
    stdout_has(&fleet, job, "drain: none.").await;
    // A deadline that comes later is told as well; by this host's own clock.
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    fleet.drain("n1", Some(Duration::from_secs(3_600)), "nothing").await;
    let deadline = eventually("the deadline is told", WAIT, async || {
        let text = String::from_utf8_lossy(&fleet.client.output(job, 0).await.0).into_owned();
        let last = text.lines().rev().find_map(|line| line.strip_prefix("drain: ")?.strip_suffix('.')?.parse().ok());
        last.filter(|at: &u64| *at > 0)
    })
    .await;
    let within = deadline.checked_sub(before).expect("it is to come");
    assert!((3_590..=3_660).contains(&within), "an hour from now: {within} s");
    // The agent is started again, and so is the coordinator: it stands until the drain is off.
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    fleet.kill_coordinator();
    fleet.start_coordinator().await;
    fleet.start_agent("n1");
    fleet.client.node_in("n1", "draining").await;
    resume(&fleet, "n1").await;
    let text = eventually("it is off", WAIT, async || {
        let text = String::from_utf8_lossy(&fleet.client.output(job, 0).await.0).into_owned();
        (text.matches("drain: no.").count() == 2).then_some(text)
    })
    .await;
    assert!(text.starts_with("at /run/muster/drain\n") || !text.contains("/run/muster"), "{text}");
    assert_eq!(text.matches("drain: no.").count(), 2, "not for a moment in between: {text}");
}

#[tokio::test]
async fn a_job_that_saves_is_asked_first_and_waits_again_at_no_budget() {
    let mut fleet = Fleet::with_node().await;
    let script = "[ \"${MUSTER_EPOCH#*.}\" = 1 ] || { echo again; exit 0; }; \
         trap 'echo saved; exit 0' USR1; trap 'echo not by TERM' TERM; echo ready; while :; do sleep 0.1; done";
    let mut template = on_drain(fleet.script(script), v1::OnDrain::Checkpoint, 30_000);
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(0), drained: Some(0) });
    let job = fleet.client.submit(template).await;
    stdout_has(&fleet, job, "ready").await;
    let answer = fleet.drain("n1", Some(Duration::from_secs(600)), "nothing").await;
    assert_eq!(answer.blockers[0].on_drain(), v1::OnDrain::Checkpoint);
    assert!(!answer.blockers[0].ended_by_deadline);
    fleet.client.node_in("n1", "drained").await;
    assert_eq!(fleet.client.output(job, 0).await.0, b"ready\nsaved\n");
    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(job, WAIT).await;
    let attempts = &done.tasks[0].attempts;
    assert_eq!(attempts[0].end.clone().and_then(|end| end.reason), Some(Reason::Drained(v1::Empty {})));
    assert_eq!(
        (attempts.len(), done.end(0)),
        (2, Reason::Succeeded(v1::Empty {})),
        "it had no retry for it, and needed none"
    );
}

#[tokio::test]
async fn what_a_job_saved_is_there_when_it_starts_elsewhere() {
    let mut fleet = Fleet::with_node().await;
    // It counts, and begins where it was told to, or where it has been.
    let script = "read n <count; echo \"from $n\"; trap 'echo $n >count; head -c 200000 /dev/zero >big; exit 0' USR1; \
         while [ $n -lt 1000 ]; do n=$((n + 1)); sleep 0.05; [ $n != 45 ] || exit 0; done";
    let mut template = on_drain(fleet.script(script), v1::OnDrain::Checkpoint, 30_000);
    let body = template.body.as_mut().expect("a body");
    let content = v1::FileContent { source: Some(v1::file_content::Source::Inline("7\n".into())) };
    body.inputs = vec![v1::InputFile { path: "count".into(), content: Some(content), executable: false }];
    // One that travels inside the report, and one through the blob store.
    body.outputs = vec!["count".into(), "big".into()];
    let job = fleet.client.submit(template).await;
    stdout_has(&fleet, job, "from 7").await;
    fleet.drain("n1", Some(Duration::from_secs(600)), "nothing").await;
    fleet.client.node_in("n1", "drained").await;
    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.tasks[0].attempts.len(), done.end(0)), (2, Reason::Succeeded(v1::Empty {})));
    let output = String::from_utf8(fleet.client.output(job, 0).await.0).expect("text");
    let from: Vec<u32> = output.lines().filter_map(|line| line.strip_prefix("from ")?.parse().ok()).collect();
    assert!(from.last().is_some_and(|n| *n > 7), "it goes on from where it was: {output}");
}

#[tokio::test]
async fn a_job_that_saves_and_goes_on_is_told_to_end_then() {
    let fleet = Fleet::with_node().await;
    let script = "trap 'echo saved' USR1; trap 'echo ends; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let job = fleet.client.submit(on_drain(fleet.script(script), v1::OnDrain::Checkpoint, 1_000)).await;
    stdout_has(&fleet, job, "ready").await;
    fleet.drain("n1", None, "nothing").await;
    fleet.client.node_in("n1", "drained").await;
    assert_eq!(fleet.client.output(job, 0).await.0, b"ready\nsaved\nends\n", "once each, in this order");
    let tasks = fleet.client.tasks(job).await;
    assert_eq!(tasks[0].attempts[0].end.clone().and_then(|end| end.reason), Some(Reason::Drained(v1::Empty {})));
}

#[tokio::test]
async fn at_the_deadline_a_job_that_saves_has_no_more_time() {
    let fleet = Fleet::with_node().await;
    let script = "trap 'echo saving' USR1; trap 'echo ends; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let job = fleet.client.submit(on_drain(fleet.script(script), v1::OnDrain::Checkpoint, 600_000)).await;
    stdout_has(&fleet, job, "ready").await;
    fleet.drain("n1", Some(Duration::from_secs(3)), "nothing").await;
    fleet.client.node_in("n1", "drained").await;
    assert_eq!(fleet.client.output(job, 0).await.0, b"ready\nsaving\nends\n");
}

/// What a spawner has told the service manager so far.
fn told(manager: &std::os::unix::net::UnixDatagram) -> String {
    let mut all = String::new();
    let mut buffer = [0; 4_096];
    while let Ok(length) = manager.recv(&mut buffer) {
        all.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    all
}

#[tokio::test]
async fn a_host_that_is_stopped_by_its_system_drains_itself_first() {
    let mut fleet = Fleet::start().await;
    let manager = std::os::unix::net::UnixDatagram::bind(fleet.notify_socket("n1")).expect("a socket");
    manager.set_nonblocking(true).expect("a socket's flag");
    let policy = "drain_at_stop_seconds = 600\n";
    fleet.add_node("n1", &NodeOptions { policy, ..NodeOptions::default() }).await;
    let job = fleet.client.submit(fleet.script("sleep 3; echo finished")).await;
    fleet.client.running(job, 1).await;
    assert!(told(&manager).contains("READY=1"));

    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    spawner.signal(nix::sys::signal::Signal::SIGTERM);
    let node = fleet.client.node_in("n1", "draining").await;
    assert!(node.drain.is_some_and(|drain| drain.deadline_ms.is_some()), "it has the time that the host has");
    let later = fleet.client.submit(fleet.job(["/bin/true"])).await;

    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    assert_eq!(fleet.client.output(job, 0).await.0, b"finished\n");
    fleet.client.node_in("n1", "drained").await;
    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    assert!(spawner.wait(WAIT).success(), "it ends by itself when the drain is proved: {}", spawner.log());
    let told = told(&manager);
    assert!(told.contains("STOPPING=1") && told.contains("EXTEND_TIMEOUT_USEC="), "it asked for time: {told}");
    assert_eq!(fleet.client.summary(later).await.state, "waiting");

    // Started again it takes work as before, without an operator.
    fleet.start_spawner("n1");
    fleet.client.node_in("n1", "ready").await;
    assert_eq!(fleet.client.finished(later, WAIT).await.summary.state, "succeeded");
}

#[tokio::test]
async fn an_end_after_the_hosts_time_is_told_before_the_spawner_goes() {
    let mut fleet = Fleet::start().await;
    let policy = "drain_at_stop_seconds = 1\n";
    fleet.add_node("n1", &NodeOptions { policy, ..NodeOptions::default() }).await;
    // Longer than the time that the host gives, and what the spawner adds to it, but within the job's own grace.
    let mut template = fleet.script("trap 'sleep 7; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
    template.body.as_mut().expect("a body").grace_ms = 60_000;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;
    eventually("the trap is set", WAIT, async || {
        fleet.client.output(job, 0).await.0.starts_with(b"ready").then_some(())
    })
    .await;
    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    spawner.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(spawner.wait(WAIT).success(), "{}", spawner.log());
    let end = first_end(&fleet, job).await;
    assert!(matches!(end, Reason::Drained(_)), "not lost with the spawner: {end:?}");
}

/// How the first attempt at a job's first task ended.
async fn first_end(fleet: &Fleet, job: u64) -> Reason {
    eventually("the end is told", WAIT, async || {
        let tasks = fleet.client.tasks(job).await;
        tasks.first()?.attempts.first()?.end.clone()?.reason
    })
    .await
}

#[tokio::test]
async fn a_second_signal_means_that_the_time_is_over() {
    let mut fleet = Fleet::start().await;
    let policy = "drain_at_stop_seconds = 600\n";
    fleet.add_node("n1", &NodeOptions { policy, ..NodeOptions::default() }).await;
    let marker = fresh_key();
    let job = fleet.client.submit(fleet.job(["/bin/sh", "-c", "sleep 600; :", &marker])).await;
    fleet.client.running(job, 1).await;
    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    spawner.signal(nix::sys::signal::Signal::SIGTERM);
    fleet.client.node_in("n1", "draining").await;
    let spawner = fleet.node("n1").spawner.as_mut().expect("a spawner");
    assert!(spawner.is_running() && !host::processes_with(&marker).is_empty(), "the first one lets it finish");
    spawner.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(spawner.wait(WAIT).success());
    assert_eq!(host::processes_with(&marker), Vec::new());
    // The spawner ended it, before any order of the coordinator came: it is the same drain.
    let end = first_end(&fleet, job).await;
    assert!(matches!(end, Reason::Drained(_)), "not lost with the spawner: {end:?}");
}

#[tokio::test]
async fn a_dry_run_lists_the_blockers_and_changes_nothing() {
    let fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("sleep 600")).await;
    fleet.client.running(job, 1).await;
    let request = v1::DrainRequest {
        selector: Some(selector("n1")),
        reason: String::from("a test"),
        deadline_ms: Some(60_000),
        then: String::new(),
        dry_run: true,
        at_once: None,
    };
    let answer = fleet.client.nodes.clone().drain(request).await.expect("a dry run").into_inner();
    assert_eq!(answer.blockers.first().and_then(|blocker| blocker.attempt).map(|attempt| attempt.job), Some(job));
    assert_eq!(fleet.client.node("n1").await.expect("n1").state, "ready");
}

#[tokio::test]
async fn a_removed_node_may_not_come_back_with_its_old_certificate() {
    let mut fleet = Fleet::with_node().await;
    fleet.drain("n1", Some(Duration::from_secs(1)), "nothing").await;
    fleet.client.node_in("n1", "drained").await;
    let request = v1::RemoveNodeRequest { node: String::from("n1"), force: true, reason: String::from("a test") };
    fleet.client.nodes.clone().remove(request).await.expect("a removal");
    eventually("the node is gone", WAIT, async || {
        let node = fleet.client.node("n1").await;
        node.is_none_or(|node| node.liveness == "gone").then_some(())
    })
    .await;
    let agent = fleet.node("n1").agent.as_mut().expect("an agent");
    agent.kill9();
    fleet.start_agent("n1");
    // It is refused for as long as it tries; a job for it would wait.
    let job = fleet.client.submit(fleet.job(["/bin/true"])).await;
    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!(done.last_attempt(0).node_name, "n2");
    assert!(fleet.client.node("n1").await.is_none_or(|node| node.liveness == "gone"));
}
