//! What holds a pool at its size although it should shrink: a provider that keeps
//! a host or says nothing, a metric without data, and most of the fleet silent at
//! once. Each with its reason in `explain`. The agents are a crowd's.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use muster_core::resources::Resources;
use muster_proto::v1;
use muster_tests::{Crowd, Fleet, WAIT, crowd::Claim, eventually};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

/// Room for one task of [`tasks`].
const ROOM: Resources = Resources { cpu_milli: 100, memory_bytes: 1 << 20, disk_bytes: 1 << 20 };

/// A provider that keeps the host of which it is asked first, and can be told to say nothing.
const PROGRAM: &str = r#"#!/bin/sh
set -eu
own=$(dirname "$0")/state
mkdir -p "$own/hosts"
asked=$(cat)
request=$(echo "$asked" | sed -n 's/.*"request":"\([^"]*\)".*/\1/p')
case $1 in
    create)
        echo "$asked" >"$own/new.$request"; mv "$own/new.$request" "$own/hosts/$request"
        if [ -e "$own/slow" ]; then
            while [ ! -e "$own/over" ]; do sleep 0.1; done
            echo "it was not ready in time" >&2; exit 1
        fi
        echo '{}' ;;
    delete) rm -f "$own/hosts/$request"; echo '{"state":"gone"}' ;;
    describe)
        [ -e "$own/kept" ] || echo "$request" >"$own/kept"
        if [ "$(cat "$own/kept")" = "$request" ]; then
            echo '{"summary":"it runs","keep":"termination protection is on"}'
        else
            echo '{"summary":"it runs"}'
        fi ;;
    list)
        if [ -e "$own/silent" ]; then echo "no route to the provider" >&2; exit 1; fi
        ls "$own/hosts" | sed 's/.*/{"request":"&"}/' | paste -sd , - | sed 's/.*/{"hosts":[&]}/' ;;
esac
"#;

/// A pool of hosts of one slot, which nothing makes larger, and from which idle hosts go after a second.
fn policy(name: &str, provider: &str, max: u32, step: u32) -> String {
    format!(
        r#"
name = "{name}"
{provider}
preset = "none"
max = {max}

[host]
cpu = "100m"
memory = "1MiB"
disk = "1MiB"

[[scale_out]]
metric = "queue_length"
above = 1000
step = 1

[scale_in]
idle = "1s"
step = {step}
"#
    )
}

pub(crate) async fn pool(fleet: &Fleet, name: &str) -> v1::Pool {
    let pools = fleet.client.pools.clone().list(v1::ListPoolsRequest {}).await.expect("pools").into_inner().pools;
    pools.into_iter().find(|pool| pool.name == name).expect("it was made")
}

/// Waits until `explain` says it in a line of this label.
pub(crate) async fn explained(fleet: &Fleet, name: &str, label: &str, words: &str) -> String {
    let what = format!("`explain` says `{words}` of {label}");
    eventually(&what, LONG, async || {
        let lines = pool(fleet, name).await.explanation;
        lines.into_iter().find(|line| line.starts_with(label) && line.contains(words))
    })
    .await
}

pub(crate) async fn set_pool(fleet: &Fleet, policy: &str) {
    let request = v1::SetPoolRequest { policy: policy.to_owned() };
    fleet.client.pools.clone().set(request).await.expect("the policy is good");
}

async fn scale(fleet: &Fleet, size: u32) {
    let request = v1::ScalePoolRequest { pool: "cloud".into(), size, hold_ms: None, reason: "a test".into() };
    fleet.client.pools.clone().scale(request).await.expect("within the maximum");
}

async fn in_state(fleet: &Fleet, state: &str) -> usize {
    fleet.client.nodes().await.iter().filter(|node| node.state == state).count()
}

async fn ready(fleet: &Fleet, count: usize) {
    eventually("the nodes are ready", LONG, async || (in_state(fleet, "ready").await == count).then_some(())).await;
}

/// What the program was told of each host that it made.
fn made(folder: &Path) -> Vec<Value> {
    let Ok(entries) = fs::read_dir(folder.join("state/hosts")) else { return Vec::new() };
    let texts = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
    texts.filter_map(|text| serde_json::from_str(&text).ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_its_provider_keeps_is_no_victim_and_a_silent_provider_holds() {
    let fleet = Fleet::start().await;
    let programs = fleet.providers();
    fs::create_dir(&programs).expect("a folder");
    fs::write(programs.join("fake"), PROGRAM).expect("a program");
    fs::set_permissions(programs.join("fake"), fs::Permissions::from_mode(0o755)).expect("its mode");
    set_pool(&fleet, &policy("cloud", "provider = \"exec\"\nprogram = \"fake\"", 3, 3)).await;
    scale(&fleet, 2).await;
    let hosts =
        eventually("two hosts are made", LONG, async || Some(made(&programs)).filter(|all| all.len() == 2)).await;
    let mut crowd = Crowd::join(&fleet, 0, ROOM).await;
    for (number, host) in hosts.iter().enumerate() {
        let text = |key: &str| host[key].as_str().expect("it is told").to_owned();
        let claim = Claim { name: text("name"), ..Crowd::claim(number, ROOM) };
        crowd.join_with(&fleet, claim, &text("token")).await;
    }
    ready(&fleet, 2).await;

    scale(&fleet, 1).await;
    let line = explained(&fleet, "cloud", "kept", "termination protection is on").await;
    eventually("the other one goes", LONG, async || (made(&programs).len() == 1).then_some(())).await;
    let kept = fs::read_to_string(programs.join("state/kept")).expect("the first that was asked of");
    let left = made(&programs)[0]["request"].as_str().expect("a request").to_owned();
    assert_eq!(left, kept.trim(), "the one that is kept is there: {line}");
    eventually("its node is gone", LONG, async || (in_state(&fleet, "gone").await == 1).then_some(())).await;
    assert_eq!(in_state(&fleet, "ready").await, 1, "and takes work");

    // Without a word of the provider nothing goes, whatever is asked.
    fs::write(programs.join("state/silent"), "").expect("a mark");
    explained(&fleet, "cloud", "scale-in", "the provider does not say which hosts there are").await;
    scale(&fleet, 0).await;
    let line = explained(&fleet, "cloud", "scale-in", "hold, the provider does not say").await;
    assert!(line.contains("no route to the provider"), "{line}");
    assert_eq!((in_state(&fleet, "ready").await, made(&programs).len()), (1, 1));
}

/// A program that waits for its host for longer than it has, while the host has joined and works.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_has_joined_stays_although_its_making_is_said_to_have_failed() {
    let fleet = Fleet::start().await;
    let programs = fleet.providers();
    fs::create_dir_all(programs.join("state")).expect("a folder");
    fs::write(programs.join("fake"), PROGRAM).expect("a program");
    fs::set_permissions(programs.join("fake"), fs::Permissions::from_mode(0o755)).expect("its mode");
    fs::write(programs.join("state/slow"), "").expect("a mark");
    set_pool(&fleet, &policy("cloud", "provider = \"exec\"\nprogram = \"fake\"", 1, 1)).await;
    scale(&fleet, 1).await;
    let hosts = eventually("a host is made", LONG, async || Some(made(&programs)).filter(|all| !all.is_empty())).await;
    let mut crowd = Crowd::join(&fleet, 0, ROOM).await;
    let text = |key: &str| hosts[0][key].as_str().expect("it is told").to_owned();
    let claim = Claim { name: text("name"), ..Crowd::claim(0, ROOM) };
    crowd.join_with(&fleet, claim, &text("token")).await;
    ready(&fleet, 1).await;
    let mut template = fleet.script("a crowd runs nothing");
    template.body.as_mut().expect("a body").request = Some(ROOM.into());
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 1).await;

    fs::write(programs.join("state/over"), "").expect("a mark");
    eventually("the program has failed", LONG, async || {
        let coordinator = fleet.coordinator.as_ref().expect("it was started");
        coordinator.log().contains("it has joined all the same").then_some(())
    })
    .await;
    assert_eq!((in_state(&fleet, "ready").await, made(&programs).len()), (1, 1));
    assert_eq!((pool(&fleet, "cloud").await.hosts, fleet.client.summary(job).await.state), (1, "running".into()));
}

const ON_CPU: &str = r#"when = [{ metric = "cpu_utilization", below = 90 }]"#;

#[tokio::test(flavor = "multi_thread")]
async fn most_of_the_fleet_silent_at_once_holds_and_so_does_a_metric_without_data() {
    const NODES: usize = 10;
    let fleet = Fleet::start().await;
    let mut crowd = Crowd::join(&fleet, NODES, ROOM).await;
    ready(&fleet, NODES).await;
    let name = fleet.client.nodes().await[0].pool.clone();
    let policy = policy(&name, "provider = \"static\"", 20, 20);

    // Agents of a crowd send no figures: a condition on one never holds, however long all have been idle.
    set_pool(&fleet, &format!("{policy}{ON_CPU}\n")).await;
    explained(&fleet, &name, "metrics", "cpu_utilization has no data (0 of 10 nodes are fresh").await;
    let since = eventually("all are idle, and were looked at", WAIT, async || {
        let pool = pool(&fleet, &name).await;
        (pool.idle == 10).then_some(pool.decided_ms)
    })
    .await;
    let seen = eventually("they are looked at again, past their idle time", WAIT, async || {
        Some(pool(&fleet, &name).await).filter(|pool| pool.decided_ms > since + 3_000)
    })
    .await;
    assert_eq!((seen.draining, in_state(&fleet, "ready").await), (0, NODES), "{:?}", seen.explanation);

    let mut template = fleet.script("a crowd runs nothing");
    template.tasks = NODES.try_into().expect("few");
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(8), drained: None });
    template.body.as_mut().expect("a body").request = Some(ROOM.into());
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, NODES.try_into().expect("few")).await;

    // Six of ten fall silent at once, and the others have nothing to do any more.
    for number in 0..6 {
        crowd.kill(number).await;
    }
    let line = explained(&fleet, &name, "scale-in", "hold, only 4 of 10 nodes are heard").await;
    assert!(line.contains("none ("), "{line}");
    set_pool(&fleet, &policy).await;
    crowd.end_below(NODES.try_into().expect("few"));
    eventually("four have nothing to do", WAIT, async || (pool(&fleet, &name).await.idle >= 4).then_some(())).await;
    // Their leases run out, and that is no reason either: the brake says so.
    let line = explained(&fleet, &name, "scale-in", "hold, much of the fleet fell silent at once").await;
    assert!(line.contains("none ("), "{line}");
    assert_eq!((in_state(&fleet, "silent").await, in_state(&fleet, "ready").await), (6, 4), "nobody was drained");
    let request = v1::PoolHistoryRequest { pool: name.clone() };
    let history = fleet.client.pools.clone().history(request).await.expect("a history").into_inner();
    assert_eq!(history.decisions.len(), 0, "{:?}", history.decisions);
}
