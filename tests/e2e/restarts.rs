//! `kill -9` of each part while jobs run: nothing is lost, nothing runs twice,
//! nothing is left behind.

use std::{collections::BTreeSet, time::Duration};

use muster_proto::v1::{self, Delivery, end::Reason};
use muster_tests::{Fleet, WAIT, client::fresh_key, eventually, host, part::Part};
use nix::sys::signal::Signal;

const LONG: Duration = Duration::from_secs(180);

#[tokio::test]
async fn a_coordinator_killed_three_times_during_an_array_records_one_end_for_each_task() {
    let mut fleet = Fleet::with_node().await;
    let rounds = if std::env::var_os("MUSTER_LONG").is_some() { 12 } else { 3 };
    let tasks = rounds * 40;
    let mut template = fleet.script("echo begin $MUSTER_TASK; sleep 0.2; echo end $MUSTER_TASK");
    template.tasks = tasks;
    let job = fleet.client.submit(template).await;

    for round in 1..=rounds {
        // Not before something new was done, so that each kill hits work in flight.
        let wanted = (round - 1) * 20 + 1;
        eventually("the array goes on", LONG, async || {
            (fleet.client.summary(job).await.counts.unwrap_or_default().succeeded >= wanted).then_some(())
        })
        .await;
        fleet.kill_coordinator();
        fleet.start_coordinator().await;
    }

    let done = fleet.client.finished(job, LONG).await;
    let counts = done.summary.counts.expect("counts");
    let wrong: Vec<_> = done.tasks.iter().filter(|task| task.state != "succeeded").collect();
    assert_eq!((counts.total, counts.succeeded), (tasks, tasks), "{wrong:#?}");
    assert_eq!(done.tasks.len(), usize::try_from(tasks).expect("few"));
    let mut seen = BTreeSet::new();
    for task in &done.tasks {
        assert!(seen.insert(task.index), "task {} twice", task.index);
        let ends: Vec<_> = task.attempts.iter().filter_map(|attempt| attempt.end.as_ref()?.reason.as_ref()).collect();
        let succeeded = ends.iter().filter(|end| matches!(end, Reason::Succeeded(_))).count();
        assert_eq!(succeeded, 1, "task {}: {ends:?}", task.index);
        // The node was there all the time, so no attempt was given up (FL-6).
        assert_eq!(task.attempts.len(), 1, "task {}: {ends:?}", task.index);
        let (out, _) = fleet.client.output(job, task.index).await;
        assert_eq!(String::from_utf8_lossy(&out), format!("begin {0}\nend {0}\n", task.index));
    }
}

#[tokio::test]
async fn a_submit_that_was_answered_survives_a_kill() {
    let mut fleet = Fleet::start().await;
    let mut jobs = Vec::new();
    for _ in 0..5 {
        // No node yet: they wait.
        jobs.push(fleet.client.submit(fleet.script("echo here")).await);
        fleet.kill_coordinator();
        fleet.start_coordinator().await;
    }
    for job in &jobs {
        assert_eq!(fleet.client.summary(*job).await.state, "waiting");
    }
    let distinct: BTreeSet<_> = jobs.iter().collect();
    assert_eq!(distinct.len(), jobs.len());
}

#[tokio::test]
async fn an_agent_killed_with_running_jobs_adopts_them_with_whole_logs() {
    let mut fleet = Fleet::with_node().await;
    // Longer than the absence of the agent by far, and a code of its own for each task.
    let mut template =
        fleet.script("for i in $(seq 300); do echo line $i; sleep 0.01; done; exit $((MUSTER_TASK + 10))");
    template.tasks = 4;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 4).await;

    for _ in 0..2 {
        fleet.node("n1").agent.as_mut().expect("an agent").kill9();
        fleet.start_agent("n1");
        fleet.client.node_in("n1", "ready").await;
    }

    let done = fleet.client.finished(job, LONG).await;
    let expected: String = (1..=300).map(|line| format!("line {line}\n")).collect();
    for task in 0..4 {
        let index = usize::try_from(task).expect("few");
        assert_eq!(done.tasks[index].attempts.len(), 1, "adopted, not restarted");
        assert_eq!(done.end(index), Reason::Exited(i32::try_from(task).expect("few") + 10));
        let (out, _) = fleet.client.output(job, task).await;
        assert!(out == expected.as_bytes(), "task {task}: each line once:\n{}", String::from_utf8_lossy(&out));
    }
}

/// FL-10: however the agent dies amid a job's output, the log has each line once, up to the last.
#[tokio::test]
async fn ten_kills_of_the_agent_neither_lose_nor_repeat_a_line_of_its_writer() {
    let mut fleet = Fleet::with_node().await;
    // Bursts, so that a kill hits lines in every place from the pipe to the store; told to end, it says what was last.
    let script = "trap 'stop=1' TERM; i=0
        while [ -z \"$stop\" ]; do
            for _ in 1 2 3 4 5 6 7 8 9; do i=$((i + 1)); echo line $i; done
            sleep 0.01
        done
        echo last $i";
    let job = fleet.client.submit(fleet.script(script)).await;
    fleet.client.running(job, 1).await;

    let mut stored = 0;
    for _ in 0..10 {
        stored = eventually("more of its output is stored", LONG, async || {
            Some(fleet.client.output(job, 0).await.0.len()).filter(|now| *now > stored)
        })
        .await;
        fleet.node("n1").agent.as_mut().expect("an agent").kill9();
        fleet.start_agent("n1");
        fleet.client.node_in("n1", "ready").await;
    }

    let request = v1::CancelRequest { job, tasks: Vec::new(), reason: String::from("enough") };
    fleet.client.jobs.clone().cancel(request).await.expect("a cancel");
    let done = fleet.client.finished(job, LONG).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Cancelled(v1::Empty {}), 1));
    let out = String::from_utf8(fleet.client.output(job, 0).await.0).expect("text");
    let last = out.lines().count() - 1;
    let expected: String = (1..=last).map(|line| format!("line {line}\n")).collect();
    let wrong = out.lines().zip(expected.lines()).position(|(is, wanted)| is != wanted);
    assert!(out == format!("{expected}last {last}\n"), "wrong from line {wrong:?} of {last}");
    assert!(out.len() > stored, "and nothing that was stored is gone");
}

#[tokio::test]
async fn a_job_that_ends_while_its_agent_is_dead_keeps_its_code_and_output() {
    let mut fleet = Fleet::with_node().await;
    let marker = fresh_key();
    let job =
        fleet.client.submit(fleet.job(["/bin/sh", "-c", "echo before; sleep 1; echo after; exit 23", &marker])).await;
    fleet.client.running(job, 1).await;
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    eventually("the job ends by itself", WAIT, async || host::processes_with(&marker).is_empty().then_some(())).await;
    fleet.start_agent("n1");
    let done = fleet.client.finished(job, LONG).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Exited(23), 1));
    assert_eq!(fleet.client.output(job, 0).await.0, b"before\nafter\n");
}

#[tokio::test]
async fn an_agent_told_to_leave_leaves_its_jobs_running() {
    let mut fleet = Fleet::with_node().await;
    let job = fleet.client.submit(fleet.script("sleep 2; echo done")).await;
    fleet.client.running(job, 1).await;
    let agent = fleet.node("n1").agent.as_mut().expect("an agent");
    agent.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(agent.wait(WAIT).code(), Some(0));
    fleet.start_agent("n1");
    let done = fleet.client.finished(job, LONG).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
}

/// An order that lies in the socket when the next program takes over was never read: it is handed over again.
#[tokio::test]
async fn short_tasks_that_may_start_once_all_run_while_their_spawner_is_reloaded_again_and_again() {
    let mut fleet = Fleet::with_node().await;
    let (tasks, rounds) = (800, 12);
    let mut template = fleet.script("echo $MUSTER_TASK");
    template.tasks = tasks;
    template.body.as_mut().expect("a script has a body").delivery = Delivery::AtMostOnce.into();
    let job = fleet.client.submit(template).await;
    for round in 1..=rounds {
        // Not before something new was done, so that each reload hits orders under way.
        eventually("the array goes on", WAIT, async || {
            let done = fleet.client.summary(job).await.counts.unwrap_or_default();
            (done.succeeded + done.failed >= round * 40).then_some(())
        })
        .await;
        fleet.node("n1").spawner.as_mut().expect("a spawner").signal(Signal::SIGHUP);
    }
    let done = fleet.client.finished(job, LONG).await;
    let wrong: Vec<_> = done.tasks.iter().filter(|task| task.state != "succeeded").collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let spawner = fleet.node("n1").spawner.as_ref().expect("a spawner");
    assert!(spawner.log().contains("the next program takes over"), "it was reloaded while they ran");
}

#[tokio::test]
async fn a_killed_spawner_takes_its_jobs_along_and_they_are_placed_again() {
    let mut fleet = Fleet::with_node().await;
    let marker = fresh_key();
    // The first attempt would run for ever; the second one ends.
    let script = "[ \"${MUSTER_EPOCH#*.}\" = 1 ] || exit 0; sleep 600";
    let job = fleet.client.submit(fleet.job(["/bin/sh", "-c", script, &marker])).await;
    fleet.client.running(job, 1).await;
    fleet.node("n1").spawner.as_mut().expect("a spawner").kill9();
    eventually("the job died with its keeper", WAIT, async || host::processes_with(&marker).is_empty().then_some(()))
        .await;
    fleet.start_spawner("n1");
    let done = fleet.client.finished(job, LONG).await;
    let attempts = &done.tasks[0].attempts;
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    let first = attempts[0].end.clone().and_then(|end| end.reason);
    assert_eq!(first, Some(Reason::SpawnerLost(v1::Empty {})));
    assert_eq!(done.end(0), Reason::Succeeded(v1::Empty {}));
}

#[tokio::test]
async fn a_second_coordinator_on_the_same_data_is_refused() {
    let mut fleet = Fleet::start().await;
    let log = fleet.folder().join("second.log");
    let mut arguments = fleet.serve_arguments(&fleet.folder().join("second-port"));
    // Any other port: the data folder alone must refuse it.
    let at = arguments.iter().position(|argument| argument == "--listen").expect("an address");
    arguments[at + 1] = "127.0.0.1:0".into();
    let mut second = Part::start("second coordinator", &log, &arguments);
    let status = second.wait(WAIT);
    assert!(!status.success());
    let said = second.log();
    assert!(said.contains("coordinator") && !said.contains("panicked"), "a sentence says who holds it: {said}");
    assert!(fleet.coordinator.as_mut().expect("the first").is_running());
    fleet.client.nodes().await;
}

#[tokio::test]
async fn parts_that_lose_their_parent_end_what_they_made() {
    let mut fleet = Fleet::with_node().await;
    let marker = fresh_key();
    let job = fleet.client.submit(fleet.job(["/bin/sh", "-c", "sleep 600; :", &marker])).await;
    fleet.client.running(job, 1).await;
    let node = fleet.node("n1");
    for part in [node.spawner.as_mut(), node.agent.as_mut()].into_iter().flatten() {
        part.cut_lifeline();
    }
    for part in [node.spawner.as_mut(), node.agent.as_mut()].into_iter().flatten() {
        part.wait(WAIT);
    }
    assert_eq!(host::processes_with(&marker), Vec::new());
    let own = format!("muster-{}", fleet.node_id("n1"));
    assert!(!host::muster_cgroups().contains(&own), "its cgroup is gone");
}
