//! A coordinator whose disk fills up: what is under way goes on, more work is
//! refused, and with the space the fleet comes back by itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, eventually, host, skip};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;

/// A small disk at a folder, until dropped.
struct Disk(PathBuf);

impl Disk {
    fn at(folder: &Path, options: &str) -> Self {
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("root mounts a tmpfs");
        Self(folder.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Moves a stopped coordinator's data to a disk of 64 MiB.
fn move_to_small_disk(fleet: &Fleet) -> Disk {
    let (data, aside) = (fleet.data(), fleet.folder().join("aside"));
    fs::rename(&data, &aside).expect("our own folder");
    fs::create_dir(&data).expect("a folder");
    let disk = Disk::at(&data, "size=64m");
    let copied = Command::new("cp").arg("-a").arg(aside.join(".")).arg(&data).status().expect("cp");
    assert!(copied.success());
    disk
}

/// A node whose agent and spawner have a disk of 32 MiB.
async fn node_on_small_disk(fleet: &mut Fleet) -> Disk {
    let folder = fleet.folder().join("full");
    fs::create_dir(&folder).expect("a folder in our own");
    let disk = Disk::at(&folder, "size=32m");
    fleet.add_node("full", &NodeOptions::default()).await;
    disk
}

/// A small job that is tried once.
fn once(fleet: &Fleet, script: &str) -> v1::JobTemplate {
    let mut template = fleet.script(script);
    let body = template.body.as_mut().expect("a script has a body");
    body.request = Some(v1::Resources { cpu_milli: 100, memory_bytes: 64 << 20, disk_bytes: 1 << 20 });
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(0), drained: None });
    template
}

/// Takes all but so many bytes of the disk.
fn fill(folder: &Path, left: u64) -> PathBuf {
    let disk = nix::sys::statvfs::statvfs(folder).expect("a mounted disk");
    let free = disk.blocks_available() * disk.fragment_size();
    let file = folder.join("ballast");
    let length = i64::try_from(free - left).expect("a small disk");
    let ballast = fs::File::create(&file).expect("a file");
    nix::fcntl::posix_fallocate(&ballast, 0, length).expect("there is so much room");
    file
}

#[tokio::test]
async fn on_a_nearly_full_disk_running_work_ends_and_new_work_is_refused() {
    if !host::is_root() {
        skip!("only root mounts a small disk");
    }
    let mut fleet = Fleet::with_node().await;
    fleet.kill_coordinator();
    let _disk = move_to_small_disk(&fleet);
    fleet.start_coordinator().await;
    fleet.client.node_in("n1", "ready").await;
    let short = fleet.client.submit(fleet.script("sleep 3; exit 7")).await;
    let long = fleet.client.submit(fleet.script("sleep 600")).await;
    let mut template = fleet.script("sleep 3; head -c 200000 /dev/zero > big");
    template.body.as_mut().expect("a script has a body").outputs = vec![bytes::Bytes::from_static(b"big")];
    let brings = fleet.client.submit(template).await;
    fleet.client.running(short, 1).await;
    fleet.client.running(brings, 1).await;
    fleet.client.running(long, 1).await;

    let ballast = fill(&fleet.data(), 2 << 20);
    let refused = fleet.client.try_submit("more", fleet.script("echo more")).await.expect_err("there is no room");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("MiB are left"), "{refused}");
    let chunk = v1::BlobChunk { digest: bytes::Bytes::new(), data: vec![7; 100_000].into() };
    let blob =
        fleet.client.jobs.clone().store_blob(futures_util::stream::iter([chunk])).await.expect_err("there is no room");
    assert_eq!(blob.code(), Code::ResourceExhausted, "{blob}");
    let request = v1::CancelRequest { job: long, tasks: Vec::new(), reason: String::from("a test") };
    fleet.client.jobs.clone().cancel(request).await.expect("a cancel is stored");
    assert_eq!(fleet.client.finished(long, WAIT).await.end(0), Reason::Cancelled(v1::Empty {}));
    assert_eq!(fleet.client.finished(short, WAIT).await.end(0), Reason::Exited(7));
    let alarms = fleet.client.fleet.clone().status(v1::StatusRequest {}).await.expect("a status").into_inner().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains("nearly full")), "{alarms:?}");

    // The file of an ended task waits on its host for the room.
    assert_eq!(fleet.client.summary(brings).await.state, "running");
    fs::remove_file(ballast).expect("our own file");
    let brought = fleet.client.finished(brings, WAIT).await;
    assert_eq!((brought.end(0), brought.last_attempt(0).outputs.len()), (Reason::Succeeded(v1::Empty {}), 1));
    assert_eq!(fleet.client.run(fleet.script("echo more")).await.end(0), Reason::Succeeded(v1::Empty {}));
}

#[tokio::test]
async fn a_coordinator_that_cannot_write_ends_and_comes_back_with_all_that_it_answered() {
    if !host::is_root() {
        skip!("only root mounts a small disk");
    }
    let mut fleet = Fleet::with_node().await;
    fleet.kill_coordinator();
    let _disk = move_to_small_disk(&fleet);
    fleet.start_coordinator().await;
    fleet.client.node_in("n1", "ready").await;
    let job = fleet.client.submit(fleet.script("sleep 5; exit 7")).await;
    fleet.client.running(job, 1).await;
    let ballast = fill(&fleet.data(), 0);
    // Each of them must be stored, until there is no page left.
    let status = eventually("it ends rather than go on unstored", WAIT, async || {
        let node = v1::CordonRequest { selector: Some(muster_tests::fleet::selector("n1")), reason: "x".repeat(1_000) };
        let _ = fleet.client.nodes.clone().cordon(node.clone()).await;
        let _ = fleet.client.nodes.clone().uncordon(node).await;
        let coordinator = fleet.coordinator.as_mut().expect("it was started");
        (!coordinator.is_running()).then(|| coordinator.wait(WAIT))
    })
    .await;
    assert!(!status.success());
    let said = fleet.coordinator.as_mut().expect("it was started").log();
    assert!(said.contains("a commit failed") && !said.contains("panicked"), "{said}");
    fs::remove_file(ballast).expect("our own file");
    fleet.start_coordinator().await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Exited(7), 1));
}

/// The folders of agent and spawner on a disk that is full: what runs keeps its end, what could not be kept of its
/// output is said to be lost, and with the space the host is as before.
#[tokio::test]
async fn on_a_hosts_full_disk_running_work_keeps_its_end_and_lost_output_is_told() {
    if !host::is_root() {
        skip!("only root mounts a small disk");
    }
    let mut fleet = Fleet::start().await;
    let disk = node_on_small_disk(&mut fleet).await;
    let scripts = ["sleep 3; exit 7", "sleep 3; head -c 4M /dev/zero", "sleep 3; head -c 4M /dev/zero; exit 9"];
    let mut jobs = Vec::new();
    for script in scripts {
        jobs.push(fleet.client.submit(once(&fleet, script)).await);
    }
    for job in &jobs {
        fleet.client.running(*job, 1).await;
    }
    let ballast = fill(&disk.0, 0);
    let mut ends = Vec::new();
    for job in jobs {
        let done = fleet.client.finished(job, WAIT).await;
        assert_eq!(done.tasks[0].attempts.len(), 1, "{:?}", done.tasks[0]);
        ends.push(done.end(0));
    }
    assert_eq!(ends, [Reason::Exited(7), Reason::OutputLost(v1::Empty {}), Reason::Exited(9)]);
    eventually("the host says that its disk is full", WAIT, async || {
        let node = fleet.client.node("full").await.expect("it is known");
        (node.state == "disk-full" && node.liveness == "live").then_some(())
    })
    .await;
    let alarms = fleet.client.fleet.clone().status(v1::StatusRequest {}).await.expect("a status").into_inner().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains("node full has little room")), "{alarms:?}");
    // What comes now waits for the room, and is not tried without it.
    let job = fleet.client.submit(fleet.script("head -c 4M /dev/zero")).await;
    let waits = fleet.client.summary(job).await.reason;
    assert!(waits.contains("not ready: disk"), "{waits}");
    fs::remove_file(ballast).expect("our own file");
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    assert_eq!(fleet.client.output(job, 0).await.0.len(), 4 << 20);
}

/// An agent that cannot start on a full disk could not empty it either.
#[tokio::test]
async fn an_agent_that_is_killed_on_a_full_disk_comes_back_and_adopts_its_jobs() {
    if !host::is_root() {
        skip!("only root mounts a small disk");
    }
    let mut fleet = Fleet::start().await;
    let disk = node_on_small_disk(&mut fleet).await;
    let job = fleet.client.submit(once(&fleet, "sleep 5; exit 7")).await;
    fleet.client.running(job, 1).await;
    let _ballast = fill(&disk.0, 0);
    for _ in 0..3 {
        fleet.node("full").agent.as_mut().expect("an agent").kill9();
        fleet.start_agent("full");
        fleet.client.node_in("full", "disk-full").await;
    }
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Exited(7), 1));
}

/// More than travels with an end was spooled and is not stored when the disk is full and the job ends: it goes first.
#[tokio::test]
async fn what_was_spooled_before_a_hosts_disk_was_full_is_stored_before_its_end_is_told() {
    if !host::is_root() {
        skip!("only root mounts a small disk");
    }
    let mut fleet = Fleet::start().await;
    let disk = node_on_small_disk(&mut fleet).await;
    let job = fleet.client.submit(once(&fleet, "sleep 3; head -c 4M /dev/zero")).await;
    fleet.client.running(job, 1).await;
    let ballast = fill(&disk.0, 2 << 20);
    fleet.kill_coordinator();
    eventually("its output does not fit", WAIT, async || {
        fleet.node("full").agent.as_ref().expect("it runs").log().contains("output is lost").then_some(())
    })
    .await;
    fleet.start_coordinator().await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::OutputLost(v1::Empty {}), 1));
    let kept = fleet.client.output(job, 0).await.0.len();
    assert!((16 << 10..4 << 20).contains(&kept), "{kept} bytes of its log were kept");
    fs::remove_file(ballast).expect("our own file");
    let done = fleet.client.run(fleet.script("echo more")).await;
    assert_eq!(done.end(0), Reason::Succeeded(v1::Empty {}));
}
