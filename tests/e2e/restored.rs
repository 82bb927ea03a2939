//! A store that lost its last writes: a backup of yesterday, put back. It looks
//! whole, and the hosts know better.

use std::{fs, path::Path};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, client::fresh_key, eventually, host};

/// The store's files, while no coordinator runs.
fn copy_store(from: &Path, to: &Path) {
    for name in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(to.join(name));
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).expect("a file in our own folder");
        }
    }
}

async fn alarms(fleet: &Fleet) -> Vec<String> {
    let status = fleet.client.fleet.clone().status(v1::StatusRequest {}).await;
    status.map(|status| status.into_inner().alarms).unwrap_or_default()
}

fn whole_node(fleet: &Fleet, script: &str, marker: &str) -> v1::JobTemplate {
    let mut template = fleet.job(["/bin/sh", "-c", script, marker]);
    let body = template.body.as_mut().expect("a body");
    body.request = Some(v1::Resources { cpu_milli: 4_000, memory_bytes: 64 << 20, disk_bytes: 16 << 20 });
    template
}

async fn cancel(fleet: &Fleet, job: u64) {
    let request = v1::CancelRequest { job, tasks: Vec::new(), reason: String::from("a test") };
    fleet.client.jobs.clone().cancel(request).await.expect("a cancel");
}

#[tokio::test]
async fn a_restored_backup_is_noticed_and_what_runs_is_adopted_and_not_run_again() {
    let mut fleet = Fleet::with_node().await;
    let marker = fresh_key();
    // The whole node is taken, so the second job waits when the backup is made.
    let gate = fleet.client.submit(whole_node(&fleet, "sleep 600", &fresh_key())).await;
    fleet.client.running(gate, 1).await;
    let kept = fleet.client.submit(whole_node(&fleet, "sleep 4; exit 23", &marker)).await;
    let backup = tempfile::tempdir().expect("a folder");
    fleet.kill_coordinator();
    copy_store(&fleet.data(), backup.path());
    fleet.start_coordinator().await;
    fleet.client.node_in("n1", "ready").await;

    // Today the gate is cancelled, and the job that waited runs.
    cancel(&fleet, gate).await;
    fleet.client.running(kept, 1).await;
    fleet.kill_coordinator();
    copy_store(backup.path(), &fleet.data());
    fleet.start_coordinator().await;

    let alarm = eventually("the loss is noticed", WAIT, async || {
        alarms(&fleet).await.into_iter().find(|alarm| alarm.contains("accept-loss"))
    })
    .await;
    assert!(alarm.contains("n1"), "{alarm}");
    // Nothing new starts, and what runs goes on as the attempt that it was.
    let new = fleet.client.submit(fleet.script("echo new")).await;
    let done = fleet.client.finished(kept, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Exited(23), 1));
    assert!(done.tasks[0].attempts[0].placement_reason.contains("adopted"), "{:?}", done.tasks[0].attempts[0]);
    assert_eq!(fleet.client.summary(new).await.state, "waiting");
    assert!(host::processes_with(&marker).is_empty());

    // Its cancel is among what was lost: it waits, and would run again.
    assert_eq!(fleet.client.summary(gate).await.state, "waiting");
    cancel(&fleet, gate).await;
    let request = v1::AcceptLossRequest { reason: String::from("a test") };
    let answer = fleet.client.fleet.clone().accept_loss(request).await.expect("an answer").into_inner();
    assert!(answer.lost);
    assert_eq!(fleet.client.finished(new, WAIT).await.end(0), Reason::Succeeded(v1::Empty {}));
    assert_eq!(alarms(&fleet).await, Vec::<String>::new());

    // The same again is no loss.
    fleet.kill_coordinator();
    fleet.start_coordinator().await;
    fleet.client.node_in("n1", "ready").await;
    assert_eq!(alarms(&fleet).await, Vec::<String>::new());
    fleet.add_node("n2", &NodeOptions::default()).await;
    assert_eq!(fleet.client.run(fleet.script("echo more")).await.end(0), Reason::Succeeded(v1::Empty {}));
}

#[tokio::test]
async fn a_restored_backup_is_noticed_although_nothing_runs() {
    let mut fleet = Fleet::with_node().await;
    let backup = tempfile::tempdir().expect("a folder");
    // What it says of yesterday's leader must not come later and be taken for today's.
    let told = fleet.folder().join("n1/agent/seen.json");
    let before = eventually("its host was told of a leader", WAIT, async || fs::read_to_string(&told).ok()).await;
    fleet.kill_coordinator();
    copy_store(&fleet.data(), backup.path());
    fleet.start_coordinator().await;
    eventually("its host was told of today's leader", WAIT, async || {
        (fs::read_to_string(&told).unwrap_or_default() != before).then_some(())
    })
    .await;
    fleet.kill_coordinator();
    copy_store(backup.path(), &fleet.data());
    fleet.start_coordinator().await;
    eventually("the loss is noticed", WAIT, async || {
        alarms(&fleet).await.into_iter().find(|alarm| alarm.contains("has seen commit"))
    })
    .await;
    let job = fleet.client.submit(fleet.script("echo here")).await;
    let answer = fleet.client.fleet.clone().accept_loss(v1::AcceptLossRequest::default()).await;
    assert!(answer.expect("an answer").into_inner().lost);
    assert_eq!(fleet.client.finished(job, WAIT).await.end(0), Reason::Succeeded(v1::Empty {}));
    let again = fleet.client.fleet.clone().accept_loss(v1::AcceptLossRequest::default()).await;
    assert!(!again.expect("an answer").into_inner().lost, "there is nothing more to accept");
}

/// Its folder of output is older too. What the hosts send of a job that it does not know has no reader; what it lost of
/// one that it knows comes again. Neither holds up the rest.
#[tokio::test]
async fn output_from_before_the_restore_comes_again_and_that_of_an_unknown_job_holds_up_nothing() {
    const PART: usize = 100_000;
    let mut fleet = Fleet::with_node().await;
    let script = format!("sleep 1; head -c {PART} /dev/zero; sleep 8; head -c {PART} /dev/zero");
    let kept = fleet.client.submit(fleet.script(&script)).await;
    fleet.client.running(kept, 1).await;
    let backup = tempfile::tempdir().expect("a folder");
    fleet.kill_coordinator();
    copy_store(&fleet.data(), backup.path());
    fleet.start_coordinator().await;
    fleet.client.node_in("n1", "ready").await;
    eventually("its first part is stored", WAIT, async || {
        (fleet.client.output(kept, 0).await.0.len() == PART).then_some(())
    })
    .await;

    // What it prints is not stored any more.
    let unknown =
        fleet.client.submit(fleet.script(&format!("sleep 2; head -c {} /dev/zero; sleep 600", 3 * PART))).await;
    fleet.client.running(unknown, 1).await;
    fleet.kill_coordinator();
    let spool = fleet.folder().join("n1/agent/spool");
    eventually("it has printed", WAIT, async || {
        let files = fs::read_dir(&spool).into_iter().flatten().flatten();
        files.filter_map(|file| file.metadata().ok()).any(|file| file.len() == 3 * PART as u64).then_some(())
    })
    .await;
    copy_store(backup.path(), &fleet.data());
    fs::remove_dir_all(fleet.data().join("logs")).expect("a folder in our own");
    fleet.start_coordinator().await;

    let done = fleet.client.finished(kept, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    assert_eq!(fleet.client.output(kept, 0).await.0.len(), 2 * PART);
}
