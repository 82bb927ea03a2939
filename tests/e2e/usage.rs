//! What a job used, told twice: by its attempt's record and by its node's
//! metrics; both must agree with what the kernel says of the processes.

use std::time::{Duration, Instant};

use muster_proto::v1::end::Reason;
use muster_tests::{Fleet, NodeOptions, WAIT, client::fresh_key, eventually, host};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn a_burning_job_is_seen_in_its_usage_and_in_its_nodes_metrics() {
    let mut fleet = Fleet::start().await;
    fleet.add_node("n1", &NodeOptions { cpu: "2", memory: "8G", ..NodeOptions::default() }).await;
    let marker = fresh_key();
    let mut template = fleet.job(["/bin/sh", "-c", "while :; do :; done", &marker]);
    let body = template.body.as_mut().expect("a body");
    body.request.as_mut().expect("a request").cpu_milli = 1_000;
    body.time_limit_ms = 8_000;
    let begun = Instant::now();
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;

    // The sum over the job's processes, straight from /proc, while it runs.
    let kernel = eventually("the job burns CPU", WAIT, async || {
        let sum: u64 = host::processes_with(&marker).iter().filter_map(|(pid, _)| host::cpu_ms(*pid)).sum();
        (sum > 1_000).then_some(sum)
    })
    .await;
    let share = u64::try_from(begun.elapsed().as_millis()).expect("short");
    let node = eventually("the node's metric shows it", Duration::from_secs(20), async || {
        let node = fleet.client.node("n1").await?;
        let used = node.metrics.as_ref()?.cpu_used_milli?;
        (used >= 300).then_some(node)
    })
    .await;
    let used = node.metrics.and_then(|metrics| metrics.cpu_used_milli).expect("a metric");
    assert!(used <= 1_500, "one process in a loop is one core at most: {used}");

    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!(done.end(0), Reason::TimedOut(muster_proto::v1::Empty {}));
    let attempt = done.last_attempt(0);
    let told = attempt.usage.and_then(|usage| usage.cpu_milliseconds).expect("CPU time is always told");
    assert!(
        told + 100 >= kernel,
        "not less than the kernel had counted {share} ms after the submit: {told} < {kernel}"
    );
    assert!(told <= attempt.wall_ms + 500, "not more than one core: {told} of {} ms", attempt.wall_ms);
}

#[tokio::test]
async fn a_job_that_touches_memory_is_told_with_its_peak() {
    if !host::has_program("python3") {
        muster_tests::skip!("python3 is not installed");
    }
    let mut fleet = Fleet::start().await;
    fleet.add_node("n1", &NodeOptions { memory: "4G", ..NodeOptions::default() }).await;
    let touched = 256 * MIB;
    // Kept until the test has seen it, then given back by the end.
    let script =
        format!("import signal\nheld = bytearray(b'x') * {touched}\nprint('held', flush=True)\nsignal.pause()");
    let python = which("python3");
    let mut template = fleet.job([&python, "-c", &script]);
    template.body.as_mut().expect("a body").request.as_mut().expect("a request").memory_bytes = 1 << 30;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;

    let node = eventually("the node's metric shows the memory", Duration::from_secs(40), async || {
        let summary = fleet.client.summary(job).await;
        assert!(summary.finished_ms.is_none(), "it ended early: {:?}", fleet.client.output(job, 0).await);
        let node = fleet.client.node("n1").await?;
        (node.metrics.as_ref()?.memory_used_bytes? >= touched).then_some(node)
    })
    .await;
    let metrics = node.metrics.expect("metrics");
    let used = metrics.memory_used_bytes.expect("a figure");
    assert!(used <= touched + 128 * MIB, "a slice reports its attempts, not the whole machine: {used}");
    assert_eq!(metrics.memory_total_bytes, Some(4 << 30), "of what it declared");

    let request = muster_proto::v1::CancelRequest { job, tasks: Vec::new(), reason: String::from("seen") };
    fleet.client.jobs.clone().cancel(request).await.expect("a cancel");
    let done = fleet.client.finished(job, WAIT).await;
    let usage = done.last_attempt(0).usage.expect("usage");
    let peak = usage.memory_peak_bytes.expect("a peak");
    assert!((touched..touched + 128 * MIB).contains(&peak), "{peak} for {touched} touched");
}

/// The program as the job can find it: a wrapper below somebody's home is not in the sandbox.
fn which(name: &str) -> String {
    let system = ["/usr/bin", "/bin", "/usr/local/bin"].map(|folder| format!("{folder}/{name}"));
    system.into_iter().find(|path| std::path::Path::new(path).exists()).unwrap_or_else(|| name.to_owned())
}
