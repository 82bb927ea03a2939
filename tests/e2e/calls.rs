//! A coordinator that is killed at each call of a submit, and one whose disk
//! fails a call: what it had answered is there, and what it had not can be asked
//! for again by its key.

use muster_proto::v1;
use muster_tests::{
    Fleet, Preload, WAIT,
    client::{fresh_key, is_away},
    preload::{Fault, Scope},
    skip,
};

const NO_COMPILER: &str = "no C compiler for the library that is preloaded";
/// A submit takes fewer calls; more would be a coordinator that does not come to an end.
const CALLS_MAX: i32 = 200;

async fn started_with(preload: &Preload) -> Fleet {
    let mut fleet = Fleet::start().await;
    fleet.kill_coordinator();
    fleet.environment = preload.environment();
    fleet.start_coordinator().await;
    fleet
}

async fn jobs(fleet: &Fleet) -> Vec<v1::JobSummary> {
    let request = v1::ListJobsRequest { state: String::new(), limit: 1_000, before: 0 };
    fleet.client.jobs.clone().list(request).await.expect("a list").into_inner().jobs
}

/// Submits with a fault at each call in turn, until a submit is over before its fault comes. How often it came.
async fn at_each_call(fleet: &mut Fleet, preload: &Preload, fault: Fault, scope: Scope) -> i32 {
    for call in 1..CALLS_MAX {
        let key = fresh_key();
        let mut template = fleet.script("exit 0");
        template.name.clone_from(&key);
        preload.arm(call, fault, scope);
        let answered = fleet.client.try_submit(&key, template.clone()).await;
        let faults = preload.disarm();
        let coordinator = fleet.coordinator.as_mut().expect("it was started");
        if faults < call {
            let job = answered.expect("nothing was in the way").job;
            assert!(coordinator.is_running());
            assert_eq!(fleet.client.summary(job).await.name, key);
            return call - 1;
        }
        // A call beside the submit's own may have met the fault: then it was answered.
        if let Err(status) = &answered {
            assert!(is_away(status), "call {call}: an error that leaves all open: {status}");
        }
        let status = coordinator.wait(WAIT);
        assert!(!status.success(), "call {call}: {status}");
        if fault == Fault::Failed {
            let said = coordinator.log();
            assert!(said.contains("a commit failed") && !said.contains("panicked"), "call {call}: {said}");
        }
        fleet.start_coordinator().await;
        let known: Vec<u64> = jobs(fleet).await.iter().filter(|job| job.name == key).map(|job| job.job).collect();
        let again = fleet.client.try_submit(&key, template).await.expect("it is taken or known");
        assert_eq!(again.existed, !known.is_empty(), "call {call}");
        if let Ok(answer) = answered {
            assert_eq!(known, [answer.job], "call {call}: it was answered, so it is there");
        }
        let found = jobs(fleet).await.iter().filter(|job| job.name == key).map(|job| job.job).collect::<Vec<_>>();
        assert_eq!(found, [again.job], "call {call}: once, whatever was asked");
    }
    panic!("a submit of {CALLS_MAX} calls");
}

#[tokio::test]
async fn a_coordinator_killed_at_any_call_of_a_submit_has_the_job_or_takes_it_again() {
    let Some(preload) = Preload::compile() else { skip!(NO_COMPILER) };
    let mut fleet = started_with(&preload).await;
    let calls = at_each_call(&mut fleet, &preload, Fault::Killed, Scope::StoreAndSockets).await;
    println!("killed before each of {calls} calls of a submit");
    assert!(calls >= 5, "the frames of a commit, its sync, and an answer: {calls}");
}

#[tokio::test]
async fn a_write_that_is_cut_in_half_by_a_kill_costs_nothing_that_was_answered() {
    let Some(preload) = Preload::compile() else { skip!(NO_COMPILER) };
    let mut fleet = started_with(&preload).await;
    let calls = at_each_call(&mut fleet, &preload, Fault::Torn, Scope::Store).await;
    println!("killed in the middle of each of {calls} calls of a commit");
    assert!(calls >= 3, "{calls}");
}

#[tokio::test]
async fn a_coordinator_whose_disk_fails_a_write_or_a_sync_ends_and_comes_back_with_all_that_it_answered() {
    let Some(preload) = Preload::compile() else { skip!(NO_COMPILER) };
    let mut fleet = started_with(&preload).await;
    let calls = at_each_call(&mut fleet, &preload, Fault::Failed, Scope::Store).await;
    println!("EIO at each of {calls} calls of a commit");
    assert!(calls >= 3, "{calls}");
}
