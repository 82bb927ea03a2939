//! Hosts of a static pool sleep when nothing is to be done, and are woken by the
//! program that the pool's policy names. The program stands in a real folder of
//! providers and asks; the test is the power button and starts the agent again.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, eventually};
use serde_json::Value;

use crate::shrinking::{explained, pool, set_pool};

const LONG: Duration = Duration::from_secs(120);

/// Keeps what it was asked, by the host's name.
const WAKES: &str = r#"
[ "$1" = wake ] || exit 2
asked=$(cat)
name=$(echo "$asked" | sed -n 's/.*"name":"\([^"]*\)".*/\1/p')
echo "$asked" >"$0.new"
mv "$0.new" "$0.$name"
echo '{}'"#;

const FAILS: &str = "echo 'no route to the rack' >&2; exit 1";

/// A pool that has a host for each waiting task, and from which idle hosts go after this long.
fn policy(idle: &str) -> String {
    format!(
        r#"
name = "rack"
provider = "static"
wake = "wake"
max = 2
boot_failures = 1
preset = "none"

[host]
cpu = "500m"
memory = "1GiB"
disk = "1GiB"

[[scale_out]]
metric = "queue_length"
above = 0
cooldown = "0s"

[scale_in]
idle = "{idle}"
step = 2
cooldown = "0s"
"#
    )
}

fn program(fleet: &Fleet, script: &str) -> PathBuf {
    let folder = fleet.providers();
    let (path, new) = (folder.join("wake"), folder.join("new"));
    fs::create_dir_all(&folder).expect("a folder");
    // Written beside and renamed: the coordinator may be running the one before.
    fs::write(&new, format!("#!/bin/sh\nset -eu\n{script}\n")).expect("a program");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("its mode");
    fs::rename(&new, &path).expect("its name");
    path
}

/// A fleet with one host in the pool, which has gone to sleep.
async fn asleep(script: &str) -> (Fleet, PathBuf) {
    let mut fleet = Fleet::start().await;
    let program = program(&fleet, script);
    set_pool(&fleet, &policy("1h")).await;
    let agent_flags = ["--label", "mac=52:54:00:12:34:56"].map(Into::into).to_vec();
    fleet.add_node("n1", &NodeOptions { pool: "rack", cpu: "500m", agent_flags, ..NodeOptions::default() }).await;
    set_pool(&fleet, &policy("1s")).await;
    sleeps(&mut fleet).await;
    (fleet, program)
}

/// Until then the host may sleep: it cannot renew its certificate meanwhile.
fn certificate_life_ms(fleet: &Fleet) -> u64 {
    let text = fs::read_to_string(fleet.folder().join("n1/agent/certificate.json")).expect("its certificate");
    let kept: Value = serde_json::from_str(&text).expect("as the agent keeps it");
    let at = |key: &str| kept[key].as_u64().expect("a time");
    at("not_after_ms") - at("received_ms")
}

async fn sleeps(fleet: &mut Fleet) {
    fleet.client.node_in("n1", "asleep").await;
    let agent = fleet.node("n1").agent.as_mut().expect("an agent");
    assert_eq!(agent.wait(WAIT).code(), Some(86), "it was released");
    let shown = pool(fleet, "rack").await;
    assert_eq!((shown.nodes, shown.hosts, shown.asleep, shown.draining), (0, 0, 1, 0), "a sleeper is nothing else");
}

fn wanted(fleet: &Fleet) -> v1::JobTemplate {
    v1::JobTemplate { pool: "rack".into(), ..fleet.script("echo awake") }
}

/// What the program was asked.
async fn asked(program: &Path) -> Value {
    let path = format!("{}.n1", program.display());
    let text = eventually("the program is asked", LONG, async || fs::read_to_string(&path).ok()).await;
    serde_json::from_str(&text).expect("a question")
}

/// As the machine that was woken would: the mark goes and the agent starts.
fn power_on(fleet: &mut Fleet) {
    fs::remove_file(fleet.folder().join("n1/agent/released")).expect("the mark of its release");
    fleet.start_agent("n1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_sleeps_when_idle_and_is_woken_for_work() {
    let (mut fleet, program) = asleep(WAKES).await;
    let month_ms = 30 * 24 * 3_600_000;
    assert!(certificate_life_ms(&fleet) / 3 >= month_ms - 60_000, "what is left of it when it is renewed");
    let job = fleet.client.submit(wanted(&fleet)).await;
    let question = asked(&program).await;
    assert_eq!((&question["pool"], &question["name"]), (&"rack".into(), &"n1".into()), "{question}");
    assert_eq!(question["labels"]["mac"], "52:54:00:12:34:56");
    assert_eq!(question["node"], "n1", "the first node of the fleet");
    let request = question["request"].as_str().expect("a request");
    assert!(request.starts_with(question["fleet"].as_str().expect("a fleet")), "{question}");
    let shown = pool(&fleet, "rack").await;
    assert_eq!((shown.booting, shown.hosts), (1, 1), "one that is woken counts as one that boots");

    power_on(&mut fleet);
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.last_attempt(0).node_name.as_str()), (Reason::Succeeded(v1::Empty {}), "n1"));
    assert_eq!(pool(&fleet, "rack").await.booting, 0);
    sleeps(&mut fleet).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_fails_pauses_the_pool_in_its_words_and_works_again_when_it_is_mended() {
    let (mut fleet, _) = asleep(FAILS).await;
    let job = fleet.client.submit(wanted(&fleet)).await;
    let line = explained(&fleet, "rack", "paused", "no route to the rack").await;
    assert!(line.contains("`n1`"), "{line}");
    let shown = pool(&fleet, "rack").await;
    assert_eq!((shown.booting, shown.hosts, shown.asleep), (0, 0, 1), "nothing is left of it");

    let program = program(&fleet, WAKES);
    let request = v1::PoolRequest { pool: "rack".into(), reason: "mended".into() };
    fleet.client.pools.clone().resume(request).await.expect("a pool");
    asked(&program).await;
    power_on(&mut fleet);
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!(done.end(0), Reason::Succeeded(v1::Empty {}));
}
