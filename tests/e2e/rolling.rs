//! Draining a whole pool in turn: how many at once, what becomes of work that
//! arrives meanwhile, and how long it takes. The agents have the real
//! connection and rules and no processes: see `tests/harness/crowd.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use muster_core::{ids::AttemptId, resources::Resources};
use muster_proto::v1::{self, end::Reason};
use muster_tests::{Crowd, Fleet, WAIT, client::is_away, crowd::code_of, eventually, part::muster_binary};

/// Drained, and beside them nodes that take what arrives.
const NODES: usize = 100;
const SPARE: usize = 10;
const AT_ONCE: u32 = 10;
/// Room of one node: so many tasks, each of which takes this.
const SLOTS: u64 = 4;
const SLOT: Resources = Resources { cpu_milli: 100, memory_bytes: 1 << 20, disk_bytes: 1 << 20 };
/// So many tasks run or wait as long as the drain goes on: two for each node.
const OUTSTANDING: u32 = 220;
const TASKS: u32 = 20;
const LONG: Duration = Duration::from_secs(240);

/// Half a second to three, by the task.
fn life(attempt: AttemptId) -> Duration {
    let mixed = (attempt.job.0 * 31 + u64::from(attempt.task)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    Duration::from_millis(500 + mixed % 2_500)
}

async fn all_ready(fleet: &Fleet, nodes: usize) {
    eventually("all nodes are ready", LONG, async || {
        let ready = fleet.client.nodes().await.iter().filter(|node| node.state == "ready").count();
        (ready == nodes).then_some(())
    })
    .await;
}

fn some_tasks(fleet: &Fleet) -> v1::JobTemplate {
    let mut template = fleet.script("a crowd runs nothing");
    template.tasks = TASKS;
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(0), drained: Some(0) });
    template.body.as_mut().expect("a script has a body").request = Some(SLOT.into());
    template
}

/// What goes on in turn; waits while the coordinator is away.
async fn rolling(fleet: &Fleet) -> v1::ListRollingResponse {
    eventually("the coordinator answers", WAIT, async || {
        match fleet.client.nodes.clone().list_rolling(v1::ListRollingRequest {}).await {
            Ok(answer) => Some(answer.into_inner()),
            Err(status) if is_away(&status) => None,
            Err(status) => panic!("{status}"),
        }
    })
    .await
}

async fn drain_in_turn(fleet: &Fleet, nodes: &[String], at_once: u32) -> v1::RollingDrain {
    let request = v1::DrainRequest {
        selector: Some(v1::NodeSelector { nodes: nodes.to_vec(), ..Default::default() }),
        reason: "new kernel".to_owned(),
        at_once: Some(at_once),
        ..Default::default()
    };
    let answer = fleet.client.nodes.clone().drain(request).await.expect("a drain in turn").into_inner();
    assert_eq!(answer.refused, Vec::<String>::new());
    answer.rolling.expect("it goes on")
}

async fn all_events(fleet: &Fleet) -> Vec<v1::FleetEvent> {
    let request = v1::EventsRequest::default();
    let mut stream = fleet.client.fleet.clone().events(request).await.expect("events").into_inner();
    let mut all = Vec::new();
    while let Some(event) = stream.message().await.expect("an event") {
        all.push(event);
    }
    all
}

/// Tasks of all these jobs that have not ended.
async fn outstanding(fleet: &Fleet, jobs: &[u64]) -> u32 {
    let mut open = 0;
    // Older ones have long ended.
    for job in jobs.iter().rev().take(40) {
        let counts = fleet.client.summary(*job).await.counts.unwrap_or_default();
        open += counts.total - counts.succeeded - counts.failed - counts.cancelled;
    }
    open
}

/// When the drain of each node was asked for and proved, in milliseconds; checks the budget at each step.
fn drains(events: &[v1::FleetEvent]) -> BTreeMap<String, (u64, u64)> {
    let (mut drain_now, mut spans) = (BTreeMap::new(), BTreeMap::new());
    for event in events {
        let Some(node) = event.subject.strip_prefix("node/") else { continue };
        match event.kind.as_str() {
            "drain_requested" => {
                assert_eq!((event.actor.is_empty(), event.reason.contains("new kernel")), (false, true), "{event:?}");
                assert_eq!(drain_now.insert(node.to_owned(), event.time_ms), None, "asked twice: {event:?}");
                assert!(drain_now.len() <= AT_ONCE as usize, "{} drain at once", drain_now.len());
            }
            "drain_proved" => {
                let began = drain_now.remove(node).expect("it was asked before");
                assert_eq!(spans.insert(node.to_owned(), (began, event.time_ms)), None, "proved twice: {event:?}");
            }
            _other => {}
        }
    }
    assert!(drain_now.is_empty(), "not proved: {drain_now:?}");
    spans
}

/// How long it would take if a place were never empty: each node, in the order in which they began, needs the time
/// from its own beginning to the end of its last task.
fn ideal_ms(spans: &BTreeMap<String, (u64, u64)>, last_end: &BTreeMap<String, u64>) -> u64 {
    let mut begun: Vec<(u64, u64)> = spans
        .iter()
        .map(|(node, (began, _))| (*began, last_end.get(node).copied().unwrap_or_default().saturating_sub(*began)))
        .collect();
    begun.sort_unstable();
    let mut places = vec![0; AT_ONCE as usize];
    for (_, needs) in begun {
        let first = places.iter_mut().min().expect("there are places");
        *first += needs;
    }
    places.into_iter().max().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_a_hundred_nodes_drains_ten_at_once_while_jobs_arrive_and_loses_none() {
    let mut fleet = Fleet::start().await;
    let capacity = Resources {
        cpu_milli: SLOT.cpu_milli * SLOTS,
        memory_bytes: SLOT.memory_bytes * SLOTS,
        disk_bytes: SLOT.disk_bytes * SLOTS,
    };
    let crowd = Crowd::join_for(&fleet, NODES + SPARE, capacity, Some(life)).await;
    all_ready(&fleet, NODES + SPARE).await;
    let mut jobs = Vec::new();
    while u32::try_from(jobs.len()).expect("few") * TASKS < OUTSTANDING {
        jobs.push(fleet.client.submit(some_tasks(&fleet)).await);
    }
    let names: Vec<String> = (0..NODES).map(|number| format!("crowd-{number}")).collect();
    let begun = drain_in_turn(&fleet, &names, AT_ONCE).await;
    assert_eq!((begun.nodes, begun.draining.len(), begun.waiting.len()), (100, 10, 90));

    let mut killed = false;
    loop {
        let list = rolling(&fleet).await;
        let Some(now) = list.rolling.first() else { break };
        assert!(now.draining.len() <= AT_ONCE as usize, "{now:?}");
        if now.drained >= 20 && !now.waiting.is_empty() && !killed {
            assert!(now.time_left_ms.is_some(), "it says how long it goes on: {now:?}");
            fleet.kill_coordinator();
            fleet.start_coordinator().await;
            killed = true;
        }
        // One at a time: on a busy machine many would take long, and the middle would have passed.
        if outstanding(&fleet, &jobs).await < OUTSTANDING {
            jobs.push(fleet.client.submit(some_tasks(&fleet)).await);
        }
    }
    assert!(killed, "the coordinator was killed in the middle");

    let events = all_events(&fleet).await;
    let spans = drains(&events);
    assert_eq!(spans.keys().collect::<BTreeSet<_>>(), names.iter().collect::<BTreeSet<_>>(), "each was drained once");
    let mut last_end: BTreeMap<String, u64> = BTreeMap::new();
    let mut tasks = 0;
    for job in &jobs {
        let done = fleet.client.finished(*job, LONG).await;
        for (task, index) in done.tasks.iter().zip(0..) {
            tasks += 1;
            let [only] = task.attempts.as_slice() else { panic!("doubled: {:?}", task.attempts) };
            let end = only.end.clone().and_then(|end| end.reason);
            assert_eq!((end, only.presumed), (Some(Reason::Exited(code_of(index))), false), "task {job}.{index}");
            let ended = only.ended_ms.expect("it has ended");
            let node = last_end.entry(only.node_name.clone()).or_default();
            *node = (*node).max(ended);
            if let Some((began, _)) = spans.get(&only.node_name) {
                let placed = only.placed_ms;
                assert!(
                    placed <= *began,
                    "{} was placed there {} ms after its drain began",
                    task.index,
                    placed - began
                );
            }
        }
    }
    {
        let seen = crowd.seen();
        assert!(seen.starts.values().all(|starts| *starts == 1), "started twice");
        assert_eq!((seen.starts.len(), seen.stored.len(), seen.stopped.len()), (tasks, tasks, 0));
    }
    let began = spans.values().map(|(began, _)| *began).min().expect("some");
    let took = spans.values().map(|(_, proved)| *proved).max().expect("some") - began;
    let ideal = ideal_ms(&spans, &last_end);
    let seconds = |ms: u64| f64::from(u32::try_from(ms).expect("short")) / 1e3;
    println!(
        "{NODES} nodes drained, at most {AT_ONCE} at once, in {:.2} s; without an empty place it were {:.2} s: {:.3} of \
         the ideal; {tasks} tasks in {} jobs meanwhile, the coordinator killed once",
        seconds(took),
        seconds(ideal),
        seconds(took) / seconds(ideal.max(1)),
        jobs.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_in_turn_that_is_ended_leaves_the_drained_nodes_drained_and_resumes_the_others() {
    let fleet = Fleet::start().await;
    let crowd = Crowd::join(&fleet, 4, SLOT).await;
    all_ready(&fleet, 4).await;
    let mut template = some_tasks(&fleet);
    template.tasks = 3;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 3).await;
    let names: Vec<String> = (0..4).map(|number| format!("crowd-{number}")).collect();
    let begun = drain_in_turn(&fleet, &names, 1).await;
    // The idle one is first, and the next one has work.
    let states = eventually("the second one drains", WAIT, async || {
        let nodes = fleet.client.nodes().await;
        let state = |wanted: &str| nodes.iter().filter(|node| node.state == wanted).count();
        let states = (state("drained"), state("draining"), state("ready"));
        (states.0 == 1 && states.1 == 1).then_some(states)
    })
    .await;
    assert_eq!(states, (1, 1, 2));
    let waiting = rolling(&fleet).await.nodes;
    assert_eq!(waiting.len(), 3, "the drained one has left");
    let again = v1::DrainRequest {
        selector: Some(v1::NodeSelector { nodes: vec![waiting[0].name.clone()], ..Default::default() }),
        reason: "twice".to_owned(),
        at_once: Some(1),
        ..Default::default()
    };
    let refused = fleet.client.nodes.clone().drain(again).await.expect_err("it is part of one");
    assert!(refused.message().contains("part of another rolling drain"), "{refused}");

    let cancel = v1::CancelRollingRequest { rolling: begun.rolling, reason: "not today".to_owned() };
    let changed = fleet.client.nodes.clone().cancel_rolling(cancel.clone()).await.expect("an end").into_inner();
    assert_eq!(changed.nodes.len(), 3);
    let nodes = fleet.client.nodes().await;
    assert_eq!(nodes.iter().filter(|node| node.state == "ready" && node.rolling.is_none()).count(), 3);
    let gone = fleet.client.nodes.clone().cancel_rolling(cancel).await.expect_err("it is over");
    assert_eq!(gone.code(), tonic::Code::NotFound);
    crowd.end_below(3);
    let done = fleet.client.finished(job, WAIT).await;
    assert!(done.tasks.iter().all(|task| task.attempts.len() == 1), "nothing was moved: {:?}", done.tasks);
    assert!(crowd.seen().stopped.is_empty());
}

/// Exit code, stdout and stderr of a command.
async fn muster(fleet: &Fleet, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = tokio::process::Command::new(muster_binary());
    command.args(arguments).env("MUSTER_SERVER", format!("unix:{}", fleet.data().join("operator.sock").display()));
    let output = command.stdin(std::process::Stdio::null()).output().await.expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_say_what_a_drain_in_turn_does_and_how_far_it_is() {
    let fleet = Fleet::start().await;
    let crowd = Crowd::join(&fleet, 4, SLOT).await;
    all_ready(&fleet, 4).await;
    let mut template = some_tasks(&fleet);
    template.tasks = 4;
    let job = fleet.client.submit(template).await;
    fleet.client.running(job, 4).await;
    let drain = ["node", "drain", "crowd-[0-2]", "--reason", "new kernel", "--deadline", "1h"];

    let (code, out, err) = muster(&fleet, &[&drain[..], &["--dry-run", "--max-parallel", "1"]].concat()).await;
    assert_eq!(code, Some(10), "something would change: {err}");
    assert_eq!(out.matches("may finish until the deadline").count(), 3, "{out}");
    assert!(err.contains("no other node has room"), "the fourth is full: {err}");
    let (code, _, err) = muster(&fleet, &[&drain[..], &["--max-parallel", "0"]].concat()).await;
    assert_eq!(code, Some(2), "{err}");
    let (code, _, err) = muster(&fleet, &[&drain[..], &["--max-parallel", "50%"]].concat()).await;
    assert!(code == Some(2) && err.contains("needs -y"), "it touches more than one: {err}");

    let (code, out, err) = muster(&fleet, &[&drain[..], &["--max-parallel", "50%", "-y"]].concat()).await;
    assert!(code == Some(0) && err.contains("`muster drain cancel r1` undoes it"), "{err}");
    assert_eq!(out.matches("waits for its turn (at most 1 at once)").count(), 2, "half of three is one: {out}");
    let (_, out, _) = muster(&fleet, &["node", "list"]).await;
    assert_eq!(out.matches("waits for its turn in r1: new kernel").count(), 2, "{out}");
    let (_, out, _) = muster(&fleet, &["drain", "list", "-o", "json"]).await;
    let list: serde_json::Value = serde_json::from_str(&out).expect("a document");
    let only = &list["items"][0];
    assert_eq!((&only["drain"], &only["drained"], &only["nodes"]), (&"r1".into(), &0.into(), &3.into()), "{out}");
    assert_eq!((only["waiting"].as_array().map(Vec::len), &only["within_ms"]), (Some(2), &3_600_000.into()), "{out}");
    let (code, out, err) = muster(&fleet, &["drain", "show", "r1"]).await;
    assert!(code == Some(0) && err.contains("0 of 3 nodes are drained") && err.contains("new kernel"), "{err}");
    assert_eq!(out.matches("waits for its turn").count(), 2, "{out}");

    // A wait goes on over all turns, and a drain that is over is none any more.
    let waits = ["node", "drain", "crowd-3", "--reason", "too", "--max-parallel", "1", "--wait", "--timeout", "60s"];
    crowd.end_below(4);
    let (code, out, err) = muster(&fleet, &waits).await;
    assert!(code == Some(0) && out.contains("crowd-3  drained"), "{out}{err}");
    eventually("both are over", WAIT, async || rolling(&fleet).await.rolling.is_empty().then_some(())).await;
    let (code, _, err) = muster(&fleet, &["drain", "cancel", "r1"]).await;
    assert!(code == Some(3) && err.contains("r1"), "it is over: {err}");
    let (_, out, _) = muster(&fleet, &["events"]).await;
    assert!(out.contains("rolling_done") && out.contains("r1: 3 of 3 nodes drained"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_of_several_does_what_it_can_and_says_what_was_refused() {
    let fleet = Fleet::start().await;
    let _crowd = Crowd::join(&fleet, 2, SLOT).await;
    all_ready(&fleet, 2).await;
    // Nobody can delete a host that joined by itself, and nothing goes on.
    for wait in [&[][..], &["--wait", "--timeout", "60s"]] {
        let drain = ["node", "drain", "crowd-0", "--reason", "old", "--then", "delete"];
        let (code, out, err) = muster(&fleet, &[&drain[..], wait].concat()).await;
        assert_eq!(code, Some(5), "{out}{err}");
        assert!(err.contains("provider") && !err.contains("goes on") && !err.contains("resumed"), "{err}");
    }
    let mut once = some_tasks(&fleet);
    once.tasks = 1;
    let other = fleet.client.submit(once.clone()).await;
    once.body.as_mut().expect("a body").delivery = v1::Delivery::AtMostOnce.into();
    let once = fleet.client.submit(once).await;
    fleet.client.running(once, 1).await;
    let [once, other] = [once, other].map(|id| muster_core::ids::JobId(id).to_string());
    let (code, _, err) = muster(&fleet, &["job", "cancel", &once, "--reason", "a test"]).await;
    assert_eq!(code, Some(0), "{err}");
    eventually("it is over", WAIT, async || {
        let (_, out, _) = muster(&fleet, &["job", "inspect", &once]).await;
        out.contains("cancelled").then_some(())
    })
    .await;
    let (code, out, err) = muster(&fleet, &["job", "retry", &once, &other]).await;
    assert!(code == Some(8) && out.contains(&other) && !out.contains(&once), "{code:?} {out}{err}");
    assert!(err.contains(&format!("job {once}: ")) && err.contains("at_most_once"), "{err}");
}
