//! Budgets, blame and holds of tasks: what follows when an attempt ends.

use super::*;
use crate::{resources::Resources, spec::Retries};

const NOW: Timestamp = Timestamp(1_000_000);

fn job(tasks: u32, retries: Retries, delivery: Delivery) -> JobRecord {
    let spec = JobSpec {
        name: "test".into(),
        owner: Actor("ana".into()),
        pool: None,
        priority: 0,
        tasks,
        request: Resources::default(),
        fences: BTreeSet::new(),
        constraints: BTreeMap::new(),
        delivery,
        on_drain: crate::spec::OnDrain::Finish,
        retries,
        time_limit: None,
        grace: limits::GRACE,
    };
    JobRecord::accepted(spec, "key".into(), [0; 32], NOW)
}

/// Its start was reported on this node, and its end too.
fn on(node: u64, end: &End) -> Ending<'_> {
    Ending { end, node: NodeId(node), had_started: true, leased_until: None }
}

#[test]
fn a_failure_of_its_own_never_uses_up_the_budget_for_lost_nodes() {
    let mut job = job(1, Retries { failed: 1, lost: 1, drained: 0 }, Delivery::AtLeastOnce);
    let lost = End::NodeLost(crate::end::NodeLoss::Silent);
    job.place_next();
    assert_eq!(job.end_attempt(0, &on(1, &lost), NOW), Next::Waiting);
    job.place_next();
    assert_eq!(job.end_attempt(0, &on(1, &End::Exited(1)), NOW), Next::Delayed(NOW + limits::RETRY_BACKOFF_MIN));
    assert!(job.wake_delayed(NOW + limits::RETRY_BACKOFF_MIN));
    assert_eq!(job.place_next(), NonZeroU32::new(3).map(|number| (0, number)));
    assert_eq!(
        job.end_attempt(0, &on(1, &lost), NOW),
        Next::Ended,
        "the lost budget is used up by the first loss alone"
    );
    assert_eq!(job.end_of(0), Some("node_lost(silent)"));
}

#[test]
fn at_most_once_is_never_placed_again_once_it_may_have_run() {
    let mut job = job(1, Retries { failed: 5, lost: 5, drained: 5 }, Delivery::AtMostOnce);
    job.place_next();
    assert_eq!(job.end_attempt(0, &on(1, &End::SpawnerLost), NOW), Next::Ended);
}

#[test]
fn at_most_once_that_provably_never_started_waits_again_under_a_new_number() {
    let mut job = job(1, Retries::default(), Delivery::AtMostOnce);
    job.place_next();
    assert_eq!(job.give_back(0), Next::Waiting);
    assert_eq!(job.place_next().map(|(_, number)| number.get()), Some(2));
}

#[test]
fn a_million_tasks_cost_one_range() {
    let job = job(1_000_000, Retries::default(), Delivery::AtLeastOnce);
    assert_eq!(job.waiting.ranges().count(), 1);
    assert!(serde_json::to_string(&job).expect("serializable").len() < 1_000);
}

#[test]
fn cancel_ends_waiting_tasks_at_once_and_names_the_live_ones() {
    let mut job = job(3, Retries::default(), Delivery::AtLeastOnce);
    job.place_next();
    job.cancelled_by = Some((Actor("ana".into()), "changed my mind".into()));
    assert_eq!(job.cancel(None), (2, Vec::from([0]), 0));
    assert_eq!(job.end_attempt(0, &on(1, &End::Cancelled), NOW), Next::Ended);
    assert!(job.is_done());
    assert_eq!(job.end_counts(), EndCounts { succeeded: 0, failed: 0, cancelled: 3 });
}

#[test]
fn retry_places_only_what_did_not_succeed() {
    let mut job = job(2, Retries::default(), Delivery::AtLeastOnce);
    job.place_next();
    job.place_next();
    job.end_attempt(0, &on(1, &End::Succeeded), NOW);
    job.end_attempt(1, &on(1, &End::Exited(3)), NOW);
    assert_eq!(job.retry(NOW), 1);
    assert_eq!(job.place_next().map(|(task, number)| (task, number.get())), Some((1, 2)));
}

#[test]
fn a_task_that_brings_down_one_node_five_times_is_held_as_well() {
    let mut job = job(1, Retries { failed: 0, lost: 9, drained: 0 }, Delivery::AtLeastOnce);
    let lose = |job: &mut JobRecord, node| {
        job.place_next().expect("it waits");
        job.end_attempt(0, &on(node, &End::SpawnerLost), NOW)
    };
    for _ in 1..limits::POISON_FALLS {
        assert_eq!(lose(&mut job, 1), Next::Waiting);
    }
    assert_eq!(lose(&mut job, 1), Next::Held);
    assert_eq!(job.retry(NOW), 1);
    assert_eq!(lose(&mut job, 1), Next::Waiting, "a retry forgets the past");
    let mut bounded = self::job(1, Retries::default(), Delivery::AtLeastOnce);
    for _ in 0..Retries::default().lost {
        assert_eq!(lose(&mut bounded, 1), Next::Waiting);
    }
    assert_eq!(lose(&mut bounded, 1), Next::Ended, "its budget ends it before");
}

#[test]
fn a_task_that_brings_down_three_nodes_is_held_until_a_person_decides() {
    let mut job = job(1, Retries { failed: 0, lost: 9, drained: 0 }, Delivery::AtLeastOnce);
    let lose = |job: &mut JobRecord, node| {
        job.place_next().expect("it waits");
        job.end_attempt(0, &on(node, &End::SpawnerLost), NOW)
    };
    assert_eq!(lose(&mut job, 1), Next::Waiting);
    assert_eq!(lose(&mut job, 1), Next::Waiting, "the same node twice says nothing against the task");
    assert_eq!(lose(&mut job, 2), Next::Waiting);
    assert_eq!(lose(&mut job, 3), Next::Held);
    assert!(job.place_next().is_none() && !job.is_done());
    assert_eq!(job.retry(NOW), 1);
    assert_eq!(lose(&mut job, 4), Next::Waiting, "a retry forgets the past");
    job.place_next();
    let not_started = Ending { had_started: false, ..on(5, &End::SpawnerLost) };
    assert_eq!(job.end_attempt(0, &not_started, NOW), Next::Waiting);
}

#[test]
fn an_exclusive_task_whose_end_is_presumed_within_its_lease_waits_for_the_leases_end() {
    let until = NOW + Millis::from_secs(19);
    let lost = End::NodeLost(crate::end::NodeLoss::Silent);
    let presumed = Ending { leased_until: Some(until), ..on(1, &lost) };
    let mut again = job(1, Retries { failed: 0, lost: 1, drained: 0 }, Delivery::Exclusive);
    again.place_next();
    assert_eq!(again.end_attempt(0, &presumed, NOW), Next::Delayed(until));
    assert!(!again.wake_delayed(NOW) && again.wake_delayed(until));

    let mut over = job(1, Retries { failed: 0, lost: 0, drained: 0 }, Delivery::Exclusive);
    over.place_next();
    assert_eq!(over.end_attempt(0, &presumed, NOW), Next::Ended);
    assert_eq!(over.retry(NOW), 1);
    assert!(over.place_next().is_none(), "nor does a retry by hand start it earlier");
    assert!(over.fence_again(until + Millis(5)));
    assert!(!over.wake_delayed(until) && over.wake_delayed(until + Millis(5)));
}

#[test]
fn at_most_once_is_not_retried_by_hand_either() {
    let mut job = job(2, Retries::default(), Delivery::AtMostOnce);
    job.cancel(Some(&[1]));
    assert!(job.may_retry(), "it was cancelled before it was ever placed");
    job.place_next();
    job.end_attempt(0, &on(1, &End::Exited(1)), NOW);
    assert!(!job.may_retry());
}

#[test]
fn the_wait_after_failures_doubles_up_to_a_minute() {
    let waits: Vec<u64> = [0, 1, 7, 8, 63, 64, u32::MAX].map(|tries| backoff(tries).0).into();
    let most = limits::RETRY_BACKOFF_MAX.0;
    assert_eq!(waits, [250, 500, 32_000, most, most, most, most]);
}
