//! One job at a time: its code, its output, its files, and how it is refused.

use std::time::Duration;

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, WAIT, client::bytes, client::fresh_key, eventually, fleet::selector, host};
use sha2::{Digest, Sha256};
use tonic::Code;

fn body(template: &mut v1::JobTemplate) -> &mut v1::JobBody {
    template.body.as_mut().expect("a template made here has a body")
}

#[tokio::test]
async fn a_job_tells_its_exit_code_and_both_outputs() {
    let fleet = Fleet::with_node().await;
    let done = fleet.client.run(fleet.script("echo out; echo err >&2; exit 7")).await;
    assert_eq!(done.end(0), Reason::Exited(7));
    assert_eq!(done.summary.state, "failed");
    let (out, err) = fleet.client.output(done.summary.job, 0).await;
    assert_eq!((out.as_slice(), err.as_slice()), (&b"out\n"[..], &b"err\n"[..]));

    let done = fleet.client.run(fleet.job(["/bin/true"])).await;
    assert_eq!((done.end(0), done.summary.state.as_str()), (Reason::Succeeded(v1::Empty {}), "succeeded"));
    assert!(!done.last_attempt(0).placement_reason.is_empty(), "every placement has a reason (FL-14)");
}

#[tokio::test]
async fn a_signal_a_missing_program_and_a_time_limit_are_told_apart() {
    let fleet = Fleet::with_node().await;
    let signaled = fleet.client.run(fleet.script("kill -SEGV $$")).await;
    assert_eq!(signaled.end(0), Reason::Signaled(11));

    let missing = fleet.client.run(fleet.job(["/no/such/program"])).await;
    let Reason::StartFailed(failed) = missing.end(0) else { panic!("{:?}", missing.end(0)) };
    assert_eq!((failed.step.as_str(), failed.errno), ("exec", 2));

    let mut slow = fleet.script("sleep 600");
    body(&mut slow).time_limit_ms = 500;
    assert_eq!(fleet.client.run(slow).await.end(0), Reason::TimedOut(v1::Empty {}));
}

#[tokio::test]
async fn inputs_arrive_and_outputs_come_back_byte_for_byte() {
    let fleet = Fleet::with_node().await;
    let names: [&[u8]; 3] = [b"a name with spaces", b"line\nbreak", b"not-utf8-\xff\xfe"];
    let content =
        |at: usize| -> Vec<u8> { (0..10_000 + at).map(|byte| u8::try_from(byte % 251).expect("small")).collect() };

    // Shell: copies every input to out/NUMBER, in the order of the names in the folder.
    let mut template =
        fleet.script("mkdir out; n=0; for f in in/*; do cp \"$f\" out/$n; n=$((n+1)); done; mkdir empty");
    body(&mut template).inputs = (0..)
        .zip(names)
        .map(|(at, name)| v1::InputFile {
            path: bytes([b"in/", name].concat()),
            content: Some(v1::FileContent { source: Some(v1::file_content::Source::Inline(bytes(content(at)))) }),
            executable: false,
        })
        .collect();
    body(&mut template).outputs = ["out/0", "out/1", "out/2", "empty", "never-made"].iter().map(bytes).collect();
    let done = fleet.client.run(template).await;
    assert_eq!(done.end(0), Reason::Succeeded(v1::Empty {}), "{:?}", fleet.client.output(done.summary.job, 0).await);

    let attempt = done.last_attempt(0);
    assert_eq!(attempt.outputs.len(), 3, "{attempt:?}");
    for output in &attempt.outputs {
        let got = match output.content.clone().and_then(|content| content.source).expect("content") {
            v1::file_content::Source::Inline(data) => data.to_vec(),
            v1::file_content::Source::Blob(blob) => fetch(&fleet, blob).await,
        };
        assert_eq!(output.digest.as_ref(), Sha256::digest(&got).as_slice());
        // A byte more for each name: so the length tells which input it was.
        assert_eq!(got, content(got.len() - 10_000));
    }
    let skipped: Vec<_> = attempt.skipped_outputs.iter().map(|output| output.path.as_ref()).collect();
    assert!(skipped.contains(&&b"never-made"[..]) && skipped.contains(&&b"empty"[..]), "{skipped:?}");
}

/// Each is an open file of the agent until it is stored: more than may be under way at once take turns.
#[tokio::test]
async fn all_files_come_back_of_tasks_that_end_together_with_very_many() {
    const FILES: usize = 900;
    let fleet = Fleet::with_node().await;
    let mut template = fleet.script(&format!("for i in $(seq {FILES}); do echo $i > f$i; done"));
    template.tasks = 4;
    body(&mut template).outputs = (1..=FILES).map(|number| bytes(format!("f{number}"))).collect();
    let done = fleet.client.run(template).await;
    for task in 0..4 {
        let attempt = done.last_attempt(task);
        assert_eq!((attempt.outputs.len(), attempt.skipped_outputs.len()), (FILES, 0), "task {task}");
    }
}

/// The stream of a host is for all its jobs: one that cannot be ordered any more ends, and holds up none of them.
#[tokio::test]
async fn a_job_whose_file_the_coordinator_has_lost_ends_alone() {
    let fleet = Fleet::with_node().await;
    let long = fleet.client.submit(fleet.script("sleep 600")).await;
    fleet.client.running(long, 1).await;
    let chunk = v1::BlobChunk { digest: bytes::Bytes::new(), data: bytes(vec![7; 10_000]) };
    let stored = fleet.client.jobs.clone().store_blob(futures_util::stream::iter([chunk])).await;
    let blob = stored.expect("there is room").into_inner();

    let cordon = v1::CordonRequest { selector: Some(selector("n1")), reason: String::from("a test") };
    fleet.client.nodes.clone().cordon(cordon.clone()).await.expect("a node that is there");
    let mut template = fleet.script("cat in");
    let content = v1::FileContent { source: Some(v1::file_content::Source::Blob(blob.clone())) };
    body(&mut template).inputs = vec![v1::InputFile { path: bytes("in"), content: Some(content), executable: false }];
    template.tasks = 3;
    template.retries = Some(v1::RetryPolicy { failed: Some(1), lost: Some(0), drained: None });
    let lost = fleet.client.submit(template).await;
    let healthy = fleet.client.submit(fleet.script("echo healthy")).await;
    let name: String = blob.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = fleet.data().join("blobs").join(&name[..2]).join(&name[2..]);
    std::fs::remove_file(file).expect("a blob is a file below the coordinator's data");
    fleet.client.nodes.clone().uncordon(cordon).await.expect("a node that is there");

    let done = fleet.client.finished(lost, WAIT).await;
    for task in 0..3 {
        let Reason::StartFailed(failed) = done.end(task) else { panic!("{:?}", done.end(task)) };
        assert_eq!((failed.step.as_str(), failed.errno), ("inputs", nix::errno::Errno::ENOENT as i32));
        assert_eq!(done.last_attempt(task).attempt.expect("an id").number, 2, "its budget holds");
    }
    assert_eq!(fleet.client.finished(healthy, WAIT).await.end(0), Reason::Succeeded(v1::Empty {}));
    assert_eq!(fleet.client.tasks(long).await[0].attempts.len(), 1, "what ran goes on");
    let node = fleet.client.node("n1").await.expect("it is there");
    assert_eq!(node.state, "ready", "no fault of its host");
}

async fn fetch(fleet: &Fleet, blob: v1::BlobRef) -> Vec<u8> {
    let mut stream = fleet.client.jobs.clone().fetch_blob(blob).await.expect("a blob").into_inner();
    let mut data = Vec::new();
    while let Some(chunk) = stream.message().await.expect("a chunk") {
        data.extend_from_slice(&chunk.data);
    }
    data
}

#[tokio::test]
async fn an_array_runs_every_task_once_and_tells_each_its_index() {
    let fleet = Fleet::with_node().await;
    let mut template = fleet.script("echo task $MUSTER_TASK of $MUSTER_TASK_COUNT");
    template.tasks = 60;
    let done = fleet.client.run(template).await;
    let counts = done.summary.counts.expect("counts");
    assert_eq!((counts.total, counts.succeeded, counts.failed), (60, 60, 0));
    assert!(done.tasks.iter().all(|task| task.attempts.len() == 1), "one attempt each");
    for task in [0, 17, 59] {
        let (out, _) = fleet.client.output(done.summary.job, task).await;
        assert_eq!(String::from_utf8_lossy(&out), format!("task {task} of 60\n"));
    }
}

#[tokio::test]
async fn a_large_output_is_whole_and_in_order() {
    let fleet = Fleet::with_node().await;
    let lines = 200_000;
    let done = fleet.client.run(fleet.script(&format!("seq {lines}"))).await;
    assert_eq!(done.end(0), Reason::Succeeded(v1::Empty {}));
    let (out, _) = fleet.client.output(done.summary.job, 0).await;
    let expected: String = (1..=lines).map(|line| format!("{line}\n")).collect();
    assert!(out == expected.as_bytes(), "{} bytes of {}", out.len(), expected.len());
}

#[tokio::test]
async fn output_past_its_limit_is_cut_and_says_so() {
    let fleet = Fleet::with_node().await;
    let mut template = fleet.script("seq 100000; exit 0");
    body(&mut template).output_limit_bytes = 10_000;
    let done = fleet.client.run(template).await;
    assert!(done.last_attempt(0).output_truncated, "{:?}", done.last_attempt(0));
    let (out, _) = fleet.client.output(done.summary.job, 0).await;
    assert!(out.starts_with(b"1\n2\n3\n") && out.len() <= 11_000, "{} bytes", out.len());
}

#[tokio::test]
async fn the_same_key_is_the_same_job_and_another_request_conflicts() {
    let fleet = Fleet::with_node().await;
    let key = fresh_key();
    let first = fleet.client.try_submit(&key, fleet.job(["/bin/true"])).await.expect("a new job");
    let again = fleet.client.try_submit(&key, fleet.job(["/bin/true"])).await.expect("the same job");
    assert_eq!((again.job, first.existed, again.existed), (first.job, false, true));
    let other = fleet.client.try_submit(&key, fleet.job(["/bin/false"])).await.expect_err("another request");
    assert_eq!(other.code(), Code::AlreadyExists);
    assert!(other.message().contains(&key), "the refusal names the key: {}", other.message());
}

#[tokio::test]
async fn unknown_names_and_impossible_requests_are_refused_with_a_sentence() {
    let fleet = Fleet::with_node().await;
    let inspect = v1::InspectNodeRequest { node: String::from("no-such-node") };
    let refused = fleet.client.nodes.clone().inspect(inspect).await.expect_err("no such node");
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("no-such-node"), "{}", refused.message());

    let request = v1::CordonRequest { selector: Some(selector("no-such-node")), reason: String::from("a test") };
    match fleet.client.nodes.clone().cordon(request).await {
        Ok(answer) => assert_eq!(answer.into_inner().refused.len(), 1),
        Err(status) => assert_eq!(status.code(), Code::NotFound),
    }

    let refused =
        fleet.client.jobs.clone().inspect(v1::InspectJobRequest { job: 1 << 40 }).await.expect_err("no such job");
    assert_eq!(refused.code(), Code::NotFound);

    let nothing = fleet.client.try_submit(&fresh_key(), v1::JobTemplate::default()).await.expect_err("no command");
    assert_eq!(nothing.code(), Code::InvalidArgument);
    let mut escaping = fleet.job(["/bin/true"]);
    body(&mut escaping).outputs = vec![bytes("../../etc/passwd")];
    let refused = fleet.client.try_submit(&fresh_key(), escaping).await.expect_err("a path that leaves the folder");
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_cancelled_job_ends_as_cancelled_and_leaves_no_process() {
    let fleet = Fleet::with_node().await;
    let marker = fresh_key();
    // Its child ignores SIGTERM and has left the session: only the end of the whole group gets it.
    let script = format!(
        "trap '' TERM; (setsid sh -c 'trap \"\" TERM; while :; do sleep 600; done' {marker}) & wait; sleep 600"
    );
    let mut template = fleet.job(["/bin/sh", "-c", &script, &marker]);
    body(&mut template).grace_ms = 300;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;
    eventually("the job's processes are there", WAIT, async || {
        (!host::processes_with(&marker).is_empty()).then_some(())
    })
    .await;

    let request = v1::CancelRequest { job, tasks: Vec::new(), reason: String::from("a test") };
    let answer = fleet.client.jobs.clone().cancel(request).await.expect("a cancel").into_inner();
    assert_eq!(answer.stopping, 1);
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.summary.state.as_str()), (Reason::Cancelled(v1::Empty {}), "cancelled"));
    // FL-5: the end is told only when nothing runs any more, so no wait here.
    assert_eq!(host::processes_with(&marker), Vec::new());
}

#[tokio::test]
async fn a_failed_task_is_tried_again_as_often_as_asked() {
    let fleet = Fleet::with_node().await;
    let mut template = fleet.script("exit 3");
    template.retries = Some(v1::RetryPolicy { failed: Some(2), ..Default::default() });
    let done = fleet.client.run(template).await;
    assert_eq!(done.tasks[0].attempts.len(), 3, "one try and two more");
    assert_eq!(done.summary.state, "failed");
    let numbers: Vec<u32> = done.tasks[0].attempts.iter().filter_map(|attempt| Some(attempt.attempt?.number)).collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test]
async fn the_sandbox_shows_the_job_nothing_of_the_host_that_it_did_not_ask_for() {
    let fleet = Fleet::with_node().await;
    let script = "id -u; pwd; echo $$; env | sort; ls /proc | grep -c '^[0-9]'; touch /usr/x 2>&1";
    let done = fleet.client.run(fleet.script(script)).await;
    let (out, _) = fleet.client.output(done.summary.job, 0).await;
    let text = String::from_utf8_lossy(&out).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() > 5, "{text}");
    if host::is_root() {
        assert_ne!(lines[0], "0", "a job is never root: {text}");
    }
    assert_eq!(lines[1], "/work", "{text}");
    assert!(lines[2].parse::<u32>().is_ok_and(|pid| pid < 10), "a PID namespace of its own: {text}");
    assert!(!text.contains("RUST_BACKTRACE"), "nothing of the spawner's environment: {text}");
    assert!(text.contains("MUSTER_JOB="), "{text}");
    assert!(matches!(done.end(0), Reason::Exited(_)), "the host's files are read-only: {text}");
}

#[tokio::test]
async fn a_job_that_asks_for_a_missing_fence_waits_with_the_reason() {
    let fleet = Fleet::with_node().await;
    let lacking = fleet.lacking();
    let Some(fence) = lacking.first() else { muster_tests::skip!("this host lacks no fence of profile strict") };
    let mut template = fleet.job(["/bin/true"]);
    body(&mut template).without.clear();
    match fleet.client.try_submit(&fresh_key(), template).await {
        // FL-13: it does not start, and somebody can read why.
        Ok(answer) => {
            let reason = eventually("a reason to wait", Duration::from_secs(10), async || {
                let summary = fleet.client.summary(answer.job).await;
                (!summary.reason.is_empty()).then_some(summary.reason)
            })
            .await;
            assert!(lacking.iter().any(|fence| reason.contains(fence.as_str())), "{reason} should name {fence}");
        }
        Err(status) => assert!(lacking.iter().any(|fence| status.message().contains(fence.as_str())), "{status}"),
    }
}
