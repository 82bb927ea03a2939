//! More than anybody should send, write, or be slow: it is refused, cut or shown,
//! and the rest of the fleet does not notice.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, WAIT, client::fresh_key, eventually, until};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

/// What a process has in memory of its own.
fn memory_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a kernel since 4.5");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => size_of(&entry.path()),
        Ok(data) => data.len(),
        Err(_gone) => 0,
    };
    entries.map(size).sum()
}

async fn refusal(fleet: &Fleet, change: impl FnOnce(&mut v1::JobTemplate)) -> Status {
    let mut template = fleet.script("exit 0");
    change(&mut template);
    let sent = fleet.client.try_submit(&fresh_key(), template).await;
    sent.expect_err("it makes no sense")
}

#[tokio::test]
async fn messages_beyond_all_measure_are_refused_at_the_edge_and_cost_no_memory() {
    const ENTRIES: usize = 1_000_000;
    let mut fleet = Fleet::with_node().await;
    let pid = fleet.coordinator.as_ref().expect("it runs").pid();
    let before = memory_bytes(pid);
    let label = |number: usize| (format!("label-{number}"), "x".repeat(8));
    for _ in 0..2 {
        // 25 MB: refused by its length, before any of it is read.
        let status = refusal(&fleet, |job| job.constraints = (0..ENTRIES).map(label).collect()).await;
        assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
        // 7 MB: it may be read, and is far beyond what a job may have.
        let status = refusal(&fleet, |job| job.constraints = (0..ENTRIES / 4).map(label).collect()).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let status = refusal(&fleet, |job| {
            let body = job.body.as_mut().expect("a script has a body");
            body.arguments = vec![bytes::Bytes::from(vec![b'x'; 7 << 20])];
        })
        .await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    let grown = memory_bytes(pid).saturating_sub(before);
    println!("the coordinator has {} MiB more than before", grown >> 20);
    assert!(grown < 256 << 20, "nothing of it stays: {} MiB", grown >> 20);

    // What a later version may say and this one does not know, and what nobody may leave out.
    let unknown = refusal(&fleet, |job| job.body.as_mut().expect("a body").delivery = 99).await;
    assert_eq!(unknown.code(), Code::InvalidArgument, "{unknown}");
    assert!(unknown.message().contains("delivery"), "{unknown}");
    let missing = refusal(&fleet, |job| job.body = None).await;
    assert_eq!(missing.code(), Code::InvalidArgument, "{missing}");
    assert!(missing.message().contains("body"), "{missing}");
    let many = refusal(&fleet, |job| job.tasks = u32::MAX).await;
    assert_eq!(many.code(), Code::InvalidArgument, "{many}");
    let labels = HashMap::from([("\u{1b}[2J".to_owned(), "x".to_owned())]);
    assert_eq!(refusal(&fleet, |job| job.constraints = labels).await.code(), Code::InvalidArgument);
    assert_eq!(fleet.client.run(fleet.script("exit 3")).await.end(0), Reason::Exited(3));
    assert!(fleet.coordinator.as_mut().expect("it was started").is_running());
}

#[tokio::test]
async fn a_huge_log_that_nobody_reads_to_its_end_is_cut_and_holds_up_nobody() {
    const LIMIT: u64 = 8 << 20;
    let fleet = Fleet::with_node().await;
    let mut template = fleet.script("echo begin; head -c 4G /dev/zero; echo end >&2; exit 3");
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: None, drained: None });
    template.body.as_mut().expect("a script has a body").output_limit_bytes = LIMIT;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;
    // It follows the log, reads the first part and then nothing more.
    let request = v1::LogsRequest { job, task: 0, attempt: 0, follow: true };
    let mut reader = fleet.client.jobs.clone().logs(request).await.expect("a log").into_inner();
    assert!(reader.message().await.expect("a part").is_some());
    let mut largest = 0;
    let mut others = 0;
    let done = loop {
        assert_eq!(fleet.client.run(fleet.script("exit 0")).await.end(0), Reason::Succeeded(v1::Empty {}));
        others += 1;
        largest = largest.max(size_of(&fleet.folder().join("n1")));
        if fleet.client.summary(job).await.finished_ms.is_some() {
            break fleet.client.finished(job, WAIT).await;
        }
    };
    println!("{others} jobs ran beside 4 GiB of output; the host's folder had {} MiB at most", largest >> 20);
    assert_eq!(done.end(0), Reason::Exited(3));
    assert!(done.last_attempt(0).output_truncated, "it says that the log was cut");
    assert!(largest < 4 * LIMIT, "the spool is bounded: {largest} bytes");
    let (out, err) = fleet.client.output(job, 0).await;
    assert!(out.starts_with(b"begin\n") && (out.len() + err.len()) as u64 <= LIMIT + 4_096, "{} bytes", out.len());
    drop(reader);
}

#[tokio::test]
async fn an_agent_that_hardly_gets_to_run_keeps_its_node_and_its_jobs() {
    let mut fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("for i in $(seq 400); do echo line $i; sleep 0.05; done; exit 3")).await;
    fleet.client.running(job, 1).await;
    let deadline = Instant::now() + Duration::from_secs(22);
    while Instant::now() < deadline {
        let agent = fleet.node("n1").agent.as_ref().expect("an agent");
        // A tenth of the time, in pieces longer than a heartbeat apart.
        agent.stop();
        until(Instant::now() + Duration::from_millis(3_600)).await;
        let agent = fleet.node("n1").agent.as_ref().expect("an agent");
        agent.signal(Signal::SIGCONT);
        until(Instant::now() + Duration::from_millis(400)).await;
        let node = fleet.client.node("n1").await.expect("it is known");
        assert_eq!((node.state.as_str(), node.liveness.as_str()), ("ready", "live"));
    }
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.tasks[0].attempts.len(), done.end(0)), (1, Reason::Exited(3)));
    let (out, _) = fleet.client.output(job, 0).await;
    let whole: String = (1..=400).map(|line| format!("line {line}\n")).collect();
    assert!(out == whole.as_bytes(), "each line once");
    eventually("it takes work as before", WAIT, async || fleet.client.node("n1").await).await;
}
