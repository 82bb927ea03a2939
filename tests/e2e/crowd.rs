//! One coordinator and many agents: what a long outage, a storm of reconnects,
//! reboots and copied identities cost. The agents have the real connection and
//! rules and no processes: see `tests/harness/crowd.rs`.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use muster_core::resources::Resources;
use muster_proto::v1::{self, end::Reason, node_lost::Cause};
use muster_tests::{Crowd, Fleet, HighlyAvailable, WAIT, crowd::code_of, eventually, skip, until};

const TASKS: u32 = 1_000;
const LONG: Duration = Duration::from_secs(240);
/// Longer than a node's lease by the coordinator's reckoning; a long one is asked for by `MUSTER_OUTAGE_SECONDS`.
const OUTAGE_SECONDS: u64 = 22;
/// Of the storm; more are asked for by `MUSTER_STORM_AGENTS`.
const AGENTS: usize = 1_000;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Room for so many tasks of [`tasks`].
const fn room(tasks: u64) -> Resources {
    Resources { cpu_milli: 100 * tasks, memory_bytes: tasks << 20, disk_bytes: tasks << 20 }
}

/// Each ends when the crowd is told so, and is not tried again for that.
fn tasks(fleet: &Fleet, count: u32) -> v1::JobTemplate {
    let mut template = fleet.script("a crowd runs nothing");
    template.tasks = count;
    template.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(8), drained: None });
    template.body.as_mut().expect("a script has a body").request = Some(room(1).into());
    template
}

async fn counts(fleet: &Fleet, job: u64) -> v1::TaskCounts {
    fleet.client.summary(job).await.counts.unwrap_or_default()
}

async fn all_ready(fleet: &Fleet, count: usize) {
    eventually("all nodes are ready", LONG, async || {
        (fleet.client.nodes().await.iter().filter(|node| node.state == "ready").count() == count).then_some(())
    })
    .await;
}

/// Each task was started once, has one attempt, and the end that its agent reported.
async fn each_ran_once(fleet: &Fleet, crowd: &Crowd, job: u64, count: u32) {
    let done = fleet.client.finished(job, LONG).await;
    assert_eq!(done.tasks.len(), usize::try_from(count).expect("few"));
    for (task, index) in done.tasks.iter().zip(0..) {
        let [only] = task.attempts.as_slice() else { panic!("task {index} has run again: {:?}", task.attempts) };
        let reason = only.end.clone().and_then(|end| end.reason);
        assert_eq!((reason, only.presumed), (Some(Reason::Exited(code_of(index))), false), "task {index}");
    }
    let seen = crowd.seen();
    assert!(seen.starts.values().all(|starts| *starts == 1), "started twice");
    assert_eq!((seen.starts.len(), seen.stored.len()), (done.tasks.len(), done.tasks.len()));
    assert!(seen.stopped.is_empty(), "told to stop: {:?}", seen.stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_running_tasks_are_adopted_after_an_outage_and_each_result_is_accepted_once() {
    const NODES: usize = 20;
    let outage = Duration::from_secs(setting("MUSTER_OUTAGE_SECONDS").unwrap_or(OUTAGE_SECONDS));
    let mut fleet = Fleet::start().await;
    let crowd = Crowd::join(&fleet, NODES, room(50)).await;
    all_ready(&fleet, NODES).await;
    let job = fleet.client.submit(tasks(&fleet, TASKS)).await;
    fleet.client.running(job, TASKS).await;

    let killed = Instant::now();
    fleet.kill_coordinator();
    eventually("the agents see it", WAIT, async || (crowd.connected() == 0).then_some(())).await;
    // A third of the tasks end while there is no coordinator.
    crowd.end_below(TASKS / 3);
    until(killed + outage).await;
    let began = Instant::now();
    fleet.start_coordinator().await;
    let served = began.elapsed();
    eventually("what ended meanwhile is known", LONG, async || {
        (counts(&fleet, job).await.failed == TASKS / 3).then_some(())
    })
    .await;
    let known = began.elapsed();
    all_ready(&fleet, NODES).await;
    let ready = began.elapsed();
    assert_eq!(counts(&fleet, job).await.running, TASKS - TASKS / 3, "the others are adopted");
    println!(
        "coordinator down for {outage:?} with {TASKS} tasks running on {NODES} nodes: it serves {served:.2?} after its \
         start, has the {} ends of meanwhile after {known:.2?} and all nodes after {ready:.2?}",
        TASKS / 3
    );
    crowd.end_below(TASKS);
    each_ran_once(&fleet, &crowd, job, TASKS).await;
}

/// All agents, each with a task that runs.
struct Storm {
    crowd: Crowd,
    count: u32,
    job: u64,
}

impl Storm {
    async fn brew(fleet: &Fleet) -> Self {
        let count = setting("MUSTER_STORM_AGENTS").map_or(AGENTS, |agents| usize::try_from(agents).expect("a number"));
        let began = Instant::now();
        let crowd = Crowd::join(fleet, count, room(1)).await;
        all_ready(fleet, count).await;
        println!("{count} agents joined in {:.1?}", began.elapsed());
        let count = u32::try_from(count).expect("few");
        let job = fleet.client.submit(tasks(fleet, count)).await;
        fleet.client.running(job, count).await;
        crowd.seen().slowest_answer = Duration::ZERO;
        Self { crowd, count, job }
    }

    async fn is_cut_off(&self) {
        eventually("all agents see it", WAIT, async || (self.crowd.connected() == 0).then_some(())).await;
    }

    /// All come back, nothing was given up, and all their ends at once are stored.
    async fn is_over(&self, fleet: &Fleet, since: Instant) {
        let Self { crowd, count, job } = self;
        eventually("all agents are back", LONG, async || (crowd.connected() == u64::from(*count)).then_some(())).await;
        let back = since.elapsed();
        all_ready(fleet, usize::try_from(*count).expect("few")).await;
        {
            let seen = crowd.seen();
            println!(
                "all are back after {back:.2?}; the slowest answer to a heartbeat took {:.2?}; {} leases ran out, the \
                 longest for {:.1?}; {:?}",
                seen.slowest_answer,
                seen.lease_gaps.len(),
                seen.lease_gaps.values().max().copied().unwrap_or_default(),
                seen.broken
            );
        }
        let counts = counts(fleet, *job).await;
        assert_eq!(counts.running, *count, "nothing was given up: {counts:?}");
        let began = Instant::now();
        crowd.end_below(*count);
        each_ran_once(fleet, crowd, *job, *count).await;
        println!("{count} ends at once were stored and told in {:.2?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_agents_that_reconnect_at_once_are_all_back_and_none_is_given_up() {
    let mut fleet = Fleet::start().await;
    let storm = Storm::brew(&fleet).await;
    fleet.kill_coordinator();
    storm.is_cut_off().await;
    fleet.start_coordinator().await;
    storm.is_over(&fleet, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_agents_follow_a_takeover_on_postgres_and_none_is_given_up() {
    let Some(mut ha) = HighlyAvailable::start(2).await else { skip!("PostgreSQL is not installed") };
    let storm = Storm::brew(&ha.fleet).await;
    let leader = ha.leader().await;
    let killed = Instant::now();
    ha.kill(leader);
    storm.is_cut_off().await;
    ha.leader().await;
    println!("a standby leads {:.2?} after the kill", killed.elapsed());
    storm.is_over(&ha.fleet, killed).await;
}

async fn only_attempts(fleet: &Fleet, job: u64) -> Vec<v1::Attempt> {
    fleet.client.tasks(job).await.swap_remove(0).attempts
}

async fn events(fleet: &Fleet, kind: &str) -> Vec<v1::FleetEvent> {
    let mut stream =
        fleet.client.fleet.clone().events(v1::EventsRequest::default()).await.expect("events").into_inner();
    let mut all = Vec::new();
    while let Some(event) = stream.message().await.expect("an event") {
        all.push(event);
    }
    all.retain(|event| event.kind == kind);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_rebooted_has_lost_its_attempts_at_its_first_word() {
    let fleet = Fleet::start().await;
    let mut crowd = Crowd::join(&fleet, 1, room(4)).await;
    let job = fleet.client.submit(tasks(&fleet, 1)).await;
    fleet.client.running(job, 1).await;
    crowd.kill(0).await;
    let claim = Crowd::claim(0, room(4));
    crowd.add_as(&fleet, muster_tests::crowd::Claim { boot_id: "another boot".into(), agent_start: 2, ..claim });
    // Its lease has not ended, nor is it two minutes until it would be lost.
    let attempts = eventually("its task runs again", Duration::from_secs(12), async || {
        Some(only_attempts(&fleet, job).await).filter(|all| all.len() == 2 && all[1].started_ms.is_some())
    })
    .await;
    let end = attempts[0].end.clone().and_then(|end| end.reason);
    assert!(matches!(end, Some(Reason::NodeLost(loss)) if loss.cause() == Cause::Rebooted), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_identity_is_refused_while_the_first_one_speaks_and_both_are_named() {
    let fleet = Fleet::start().await;
    let mut crowd = Crowd::join(&fleet, 1, room(4)).await;
    let job = fleet.client.submit(tasks(&fleet, 1)).await;
    fleet.client.running(job, 1).await;
    let claim = Crowd::claim(0, room(4));
    crowd.add_as(&fleet, muster_tests::crowd::Claim { boot_id: "boot-of-the-copy".into(), ..claim });
    let said = eventually("the copy is noticed, again and again", WAIT, async || {
        Some(events(&fleet, "claimed_twice").await).filter(|events| events.len() >= 3)
    })
    .await;
    assert!(said[0].reason.contains("boot-0") && said[0].reason.contains("boot-of-the-copy"), "{}", said[0].reason);
    assert_eq!(only_attempts(&fleet, job).await.len(), 1, "the first one is not disturbed");
    assert_eq!(crowd.connected(), 1);
    crowd.end_below(1);
    each_ran_once(&fleet, &crowd, job, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_brings_down_three_hosts_is_held_until_a_person_decides() {
    const NODES: usize = 4;
    let fleet = Fleet::start().await;
    let mut crowd = Crowd::join(&fleet, NODES, room(4)).await;
    all_ready(&fleet, NODES).await;
    let job = fleet.client.submit(tasks(&fleet, 1)).await;
    let mut lives: Vec<usize> = (0..NODES).collect();
    let mut fallen = BTreeSet::new();
    for round in 0.. {
        let summary = eventually("it runs or is held", WAIT, async || {
            let summary = fleet.client.summary(job).await;
            let attempts = only_attempts(&fleet, job).await;
            let runs = attempts.get(round).is_some_and(|attempt| attempt.started_ms.is_some());
            (runs || summary.reason.contains("held")).then_some(summary)
        })
        .await;
        if summary.reason.contains("held") {
            break;
        }
        assert!(fallen.len() < 3, "it goes on to a fourth host: {fallen:?}");
        let node = only_attempts(&fleet, job).await.pop().expect("it runs").node_name;
        let number: usize = node.trim_start_matches("crowd-").parse().expect("one of ours");
        fallen.insert(number);
        // Its host dies and comes back, and takes nothing until somebody has looked at it.
        crowd.kill(lives[number]).await;
        let reason = String::from("it has died");
        let request = v1::CordonRequest { selector: Some(muster_tests::fleet::selector(&node)), reason };
        fleet.client.nodes.clone().cordon(request).await.expect("a cordon");
        lives[number] = NODES + round;
        let claim = Crowd::claim(number, room(4));
        let boot_id = format!("boot-after-{round}");
        let agent_start = u64::try_from(round).expect("few") + 2;
        crowd.add_as(&fleet, muster_tests::crowd::Claim { boot_id, agent_start, ..claim });
    }
    assert_eq!(fallen.len(), 3, "{fallen:?}");
}

/// What happens to the silent nodes then takes minutes, and stands in `tests/scenarios/brake_released.txt`.
#[tokio::test(flavor = "multi_thread")]
async fn evictions_that_rest_because_many_hosts_fell_silent_go_on_when_an_operator_says_so() {
    let fleet = Fleet::start().await;
    let mut crowd = Crowd::join(&fleet, 6, room(1)).await;
    all_ready(&fleet, 6).await;
    let release = async || {
        let request = v1::ReleaseBrakeRequest { reason: "the rack has burnt".into() };
        fleet.client.fleet.clone().release_brake(request).await.expect("an answer").into_inner()
    };
    assert!(!release().await.held, "nothing rests");
    for number in 0..3 {
        crowd.kill(number).await;
    }
    let braked = async || {
        let status = fleet.client.fleet.clone().status(v1::StatusRequest {}).await.expect("a status").into_inner();
        status.alarms.iter().any(|alarm| alarm.contains("release-brake"))
    };
    eventually("evictions rest", WAIT, async || braked().await.then_some(())).await;
    let silent = async || fleet.client.nodes().await.into_iter().filter(|node| node.state == "silent").count() == 3;
    eventually("all three are silent", WAIT, async || silent().await.then_some(())).await;
    assert_eq!(release().await, v1::ReleaseBrakeResponse { held: true, silent: 3 });
    assert!(!braked().await);
    let released = events(&fleet, "brake_released").await;
    assert_eq!(released.len(), 1, "{released:?}");
    assert!(released[0].reason.contains("the rack has burnt") && !released[0].actor.is_empty(), "{released:?}");
}
