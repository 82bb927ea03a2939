//! Word from outside that a host goes: a probe of the operator's, and a watcher
//! that holds the shutdown up, with the shipped script and a stand-in for logind.

use std::{ffi::OsString, fs, os::unix::fs::PermissionsExt as _, path::Path, path::PathBuf, time::Duration};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, eventually, eventually_blocking, fleet::selector};

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
}

fn shipped(name: &str) -> PathBuf {
    let notices = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/notices");
    notices.join(name).canonicalize().expect("it is shipped")
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
             echo >>'{own}/taken'; touch '{own}/lock'; \"$@\"; code=$?; rm '{own}/lock'; exit $code"
        ),
    );
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    bin
}

/// The shipped watcher with the stand-ins.
fn watcher(folder: &Path) -> NodeOptions {
    let (bin, program) = (stand_ins(folder), folder.join("logind"));
    script(&program, &format!("PATH='{}':$PATH exec '{}'", bin.display(), shipped("logind").display()));
    asking(&program, &["--notice-time-seconds", "0", "--notice-every-seconds", "1"])
}

#[tokio::test]
async fn a_shutdown_waits_until_the_node_is_drained() {
    let mut fleet = Fleet::start().await;
    let folder = fleet.folder().to_owned();
    let options = watcher(&folder);
    fleet.add_node("n1", &options).await;
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
    // A host that is empty may be shut down: nobody holds it up before it is open to work again.
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    let request = v1::CordonRequest { selector: Some(selector("n1")), reason: String::from("a test") };
    fleet.client.nodes.clone().resume(request).await.expect("a resume");
    eventually("the lock is taken again", WAIT, async || lock.exists().then_some(())).await;
    let taken = fs::read_to_string(folder.join("taken")).expect("it was taken");
    assert_eq!(taken.lines().count(), 2, "once before the drain and once after it");
    // An agent that is killed holds nobody up: what it ran ends with it.
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    assert!(eventually_blocking(Duration::from_secs(20), || (!lock.exists()).then_some(())).is_some());
}

/// A cloud of one host, which it ends by a shutdown: that takes as long as somebody holds it up.
fn cloud(folder: &Path) -> String {
    let host = folder.join("host");
    let host = host.display();
    format!(
        r#"asked=$(cat)
case $1 in
    create) echo "$asked" >'{host}.new'; mv '{host}.new' '{host}'; echo '{{}}' ;;
    delete) echo '{{"state":"going"}}' ;;
    describe) echo '{{"summary":"it runs"}}' ;;
    list) sed 's/.*\("request":"[^"]*"\).*/{{"hosts":[{{\1}}]}}/' '{host}' ;;
esac"#
    )
}

#[tokio::test]
async fn a_host_that_its_provider_shuts_down_is_not_held_up_by_its_own_lock() {
    let mut fleet = Fleet::start().await;
    let folder = fleet.folder().to_owned();
    fs::create_dir(fleet.providers()).expect("a folder");
    script(&fleet.providers().join("fake"), &cloud(&folder));
    let policy = "name = \"cloud\"\nprovider = \"exec\"\nprogram = \"fake\"\npreset = \"none\"\nmax = 1\n\
                  [host]\ncpu = \"1\"\nmemory = \"1GiB\"\ndisk = \"1GiB\"\n";
    let pools = fleet.client.pools.clone();
    pools.clone().set(v1::SetPoolRequest { policy: policy.to_owned() }).await.expect("the policy is good");
    let request = v1::ScalePoolRequest { pool: "cloud".into(), size: 1, hold_ms: None, reason: "a test".into() };
    pools.clone().scale(request).await.expect("within the maximum");
    let told = eventually("the host is made", WAIT, async || fs::read_to_string(folder.join("host")).ok()).await;
    let told: serde_json::Value = serde_json::from_str(&told).expect("what it was told");
    let text = |key: &str| told[key].as_str().expect("it is told").to_owned();
    let name = text("name");
    fleet.join_with_token(&name, &text("token"), &watcher(&folder)).await;
    let lock = folder.join("lock");
    eventually("the lock is taken", WAIT, async || lock.exists().then_some(())).await;

    fleet.drain(&name, None, "delete").await;
    fleet.client.node_in(&name, "stopping").await;
    eventually("the lock is given back", WAIT, async || (!lock.exists()).then_some(())).await;
}
