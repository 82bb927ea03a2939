//! Word from outside that a host goes: a probe of the operator's, and a watcher
//! that holds the shutdown up, with the shipped script and a stand-in for logind.

use std::{ffi::OsString, fs, os::unix::fs::PermissionsExt as _, path::Path, path::PathBuf, time::Duration};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, eventually, eventually_blocking};

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
}

fn asking(program: &Path, more: &[&str]) -> NodeOptions {
    let mut agent_flags: Vec<OsString> = vec!["--notice-program".into(), program.into()];
    agent_flags.extend(more.iter().map(OsString::from));
    NodeOptions { agent_flags, ..NodeOptions::default() }
}

/// Milliseconds until the node's deadline, as the coordinator has it.
fn within_ms(node: &v1::Node) -> u64 {
    let drain = node.drain.as_ref().expect("it drains");
    drain.deadline_ms.expect("it has until then") - drain.requested_ms
}

#[tokio::test]
async fn a_spot_notice_drains_the_host_in_the_time_that_it_leaves() {
    let mut fleet = Fleet::start().await;
    let (probe, notice) = (fleet.folder().join("probe"), fleet.folder().join("notice.json"));
    script(&probe, &format!("cat '{}' 2>/dev/null || true", notice.display()));
    fleet.add_node("n1", &asking(&probe, &["--notice-every-seconds", "1"])).await;
    let endless = fleet.script("[ \"${MUSTER_EPOCH#*.}\" = 1 ] || exit 0; trap 'exit 9' TERM; sleep 600 & wait");
    let (short, endless) =
        (fleet.client.submit(fleet.script("sleep 2; echo finished")).await, fleet.client.submit(endless).await);
    fleet.client.running(short, 1).await;
    fleet.client.running(endless, 1).await;

    // Whole or not there, as a metadata service answers.
    let new = fleet.folder().join("notice.new");
    fs::write(&new, "{\"within_seconds\": 20, \"reason\": \"spot notice\"}\n").expect("a notice");
    fs::rename(new, &notice).expect("its place");
    let node = fleet.client.node_in("n1", "draining").await;
    let drain = node.drain.clone().expect("a drain");
    assert_eq!((drain.actor.as_str(), drain.reason.as_str()), ("host n1", "spot notice"));
    let within = within_ms(&node);
    assert!((2_000..=5_000).contains(&within), "20 s but for the reserve of 15: {within} ms");

    // What can finish does; what cannot is elsewhere before the host is gone.
    let done = fleet.client.finished(short, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    fleet.client.node_in("n1", "drained").await;
    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(endless, WAIT).await;
    let first = done.tasks[0].attempts[0].end.clone().and_then(|end| end.reason);
    assert_eq!((first, done.last_attempt(0).node_name), (Some(Reason::Drained(v1::Empty {})), "n2".to_owned()));

    // The same notice, again and again, is one drain; without it a host that begins anew takes work.
    assert_eq!(fleet.client.node("n1").await.and_then(|node| node.drain).map(|drain| drain.revision), Some(1));
    fs::remove_file(&notice).expect("it was there");
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    fleet.start_agent("n1");
    fleet.client.node_in("n1", "ready").await;
}

#[tokio::test]
async fn a_notice_that_comes_again_with_less_time_brings_the_deadline_forward() {
    let mut fleet = Fleet::start().await;
    let (probe, notice) = (fleet.folder().join("probe"), fleet.folder().join("notice.json"));
    script(&probe, &format!("cat '{}' 2>/dev/null || true", notice.display()));
    let options = asking(&probe, &["--notice-every-seconds", "1", "--notice-reserve-seconds", "0"]);
    fleet.add_node("n1", &options).await;
    let job = fleet.client.submit(fleet.script("sleep 600")).await;
    fleet.client.running(job, 1).await;
    fs::write(&notice, "{\"within_seconds\": 3600}\n").expect("a notice");
    let later = within_ms(&fleet.client.node_in("n1", "draining").await);
    fs::write(&notice, "{\"within_seconds\": 600}\n").expect("a notice");
    let sooner = eventually("the deadline comes forward", WAIT, async || {
        Some(within_ms(&fleet.client.node("n1").await?)).filter(|within| *within < later)
    })
    .await;
    assert!((3_590_000..=3_600_500).contains(&later) && sooner < 660_000, "{later} ms, then {sooner} ms");
}

/// Stand-ins for what comes with systemd, in a folder of their own: the lock is a file that is there while it is held.
fn stand_ins(folder: &Path) -> PathBuf {
    let bin = folder.join("bin");
    fs::create_dir(&bin).expect("a folder");
    let own = folder.display();
    script(
        &bin.join("busctl"),
        &format!("case $5 in PreparingForShutdown) cat '{own}/preparing' ;; *) echo t 60000000 ;; esac"),
    );
    script(
        &bin.join("systemd-inhibit"),
        &format!(
            "case \"$*\" in *--what=shutdown*--mode=delay*) ;; *) exit 1 ;; esac\n\
             while case $1 in --*) true ;; *) false ;; esac; do shift; done\n\
             touch '{own}/lock'; \"$@\"; code=$?; rm '{own}/lock'; exit $code"
        ),
    );
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    bin
}

#[tokio::test]
async fn a_shutdown_waits_until_the_node_is_drained() {
    let mut fleet = Fleet::start().await;
    let folder = fleet.folder().to_owned();
    let bin = stand_ins(&folder);
    let shipped =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/notices/logind").canonicalize().expect("it is shipped");
    let program = folder.join("logind");
    script(&program, &format!("PATH='{}':$PATH exec '{}'", bin.display(), shipped.display()));
    fleet.add_node("n1", &asking(&program, &["--notice-time-seconds", "0", "--notice-every-seconds", "1"])).await;
    let lock = folder.join("lock");
    eventually("the lock is taken", WAIT, async || lock.exists().then_some(())).await;
    let job = fleet.client.submit(fleet.script("sleep 3; echo finished")).await;
    fleet.client.running(job, 1).await;

    fs::write(folder.join("preparing"), "b true\n").expect("a property");
    let node = fleet.client.node_in("n1", "draining").await;
    assert_eq!(node.drain.as_ref().map(|drain| drain.reason.as_str()), Some("this host is shut down"));
    let within = within_ms(&node);
    assert!((40_000..=45_000).contains(&within), "a minute but for the reserve: {within} ms");
    assert!(lock.exists(), "the shutdown waits while the job runs");
    fleet.client.node_in("n1", "drained").await;
    eventually("the lock is given back", WAIT, async || (!lock.exists()).then_some(())).await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    // An agent that is killed holds nobody up: what it ran ends with it.
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    eventually("the lock is taken again", WAIT, async || lock.exists().then_some(())).await;
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    assert!(eventually_blocking(Duration::from_secs(20), || (!lock.exists()).then_some(())).is_some());
}
