//! The history as a stream by revision: each change once and in order, over
//! breaks; a reader that stands still is let go and told where to go on.

use std::{collections::BTreeMap, time::Duration};

use muster_proto::v1::{self, EventsRequest};
use muster_tests::{Fleet, eventually};
use tonic::Code;

const LONG: Duration = Duration::from_secs(180);

fn after(revision: u64, follow: bool) -> EventsRequest {
    EventsRequest { after: revision, follow, ..EventsRequest::default() }
}

async fn all(fleet: &Fleet) -> Vec<v1::FleetEvent> {
    let mut events = fleet.client.fleet.clone().events(after(0, false)).await.expect("events").into_inner();
    let mut seen = Vec::new();
    while let Some(event) = events.message().await.expect("an event") {
        seen.push(event);
    }
    seen
}

#[tokio::test]
async fn a_watch_resumed_by_revision_tells_each_change_once_over_three_kills_of_the_coordinator() {
    let mut fleet = Fleet::with_node().await;
    let mut template = fleet.script("echo $MUSTER_TASK; sleep 0.1");
    template.tasks = 60;
    let job = fleet.client.submit(template).await;
    let (mut last, mut seen) = (0, Vec::new());
    for round in 1..=3_u32 {
        let wanted = round * 15;
        let mut events = fleet.client.fleet.clone().events(after(last, true)).await.expect("events").into_inner();
        // Read until enough is done, then the coordinator is killed in the middle of the stream.
        loop {
            let event = events.message().await.expect("the stream holds").expect("it follows");
            last = event.revision;
            seen.push(event);
            if fleet.client.summary(job).await.counts.unwrap_or_default().succeeded >= wanted {
                break;
            }
        }
        fleet.kill_coordinator();
        // What was on its way may still come; then the stream breaks, and does not end as if all were told.
        let broken = loop {
            match events.message().await {
                Ok(Some(event)) => {
                    last = event.revision;
                    seen.push(event);
                }
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        assert!(broken, "a stream that is cut ends with an error");
        fleet.start_coordinator().await;
    }
    fleet.client.finished(job, LONG).await;
    let whole = all(&fleet).await;
    let mut events = fleet.client.fleet.clone().events(after(last, false)).await.expect("events").into_inner();
    while let Some(event) = events.message().await.expect("an event") {
        seen.push(event);
    }
    let revisions: Vec<u64> = seen.iter().map(|event| event.revision).collect();
    assert!(revisions.windows(2).all(|two| two[0] < two[1]), "in order, each once: {revisions:?}");
    let told: BTreeMap<u64, &v1::FleetEvent> = seen.iter().map(|event| (event.revision, event)).collect();
    let missed: Vec<_> = whole.iter().filter(|event| told.get(&event.revision) != Some(event)).collect();
    assert!(missed.is_empty(), "left out, or told otherwise: {missed:#?}");
}

#[tokio::test]
async fn a_revision_that_is_not_there_is_refused_with_what_to_do() {
    let fleet = Fleet::start().await;
    let status = match fleet.client.fleet.clone().events(after(1_000_000, true)).await {
        Err(status) => status,
        Ok(events) => events.into_inner().message().await.expect_err("there is no such revision"),
    };
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("read the state anew"), "{status}");
}

#[tokio::test]
async fn a_reader_that_stands_still_costs_others_nothing_and_is_told_where_to_go_on() {
    let fleet = Fleet::start().await;
    // No host: each of these is submitted and cancelled, so that there is more than a stream holds by itself.
    for _ in 0..40 {
        let mut template = fleet.script("echo never");
        template.name = "x".repeat(100);
        let job = fleet.client.submit(template).await;
        let tasks = v1::CancelRequest { job, reason: "y".repeat(900), ..Default::default() };
        fleet.client.jobs.clone().cancel(tasks).await.expect("cancel");
    }
    let mut still = fleet.client.fleet.clone().events(after(0, true)).await.expect("events").into_inner();
    let first = still.message().await.expect("the stream holds").expect("an event");
    // Another reader gets all of it, while the first takes nothing.
    let whole = eventually("all of it", LONG, async || {
        let whole = all(&fleet).await;
        (whole.len() >= 80).then_some(whole)
    })
    .await;
    // The first goes on from where it is told, and misses nothing.
    let mut seen = vec![first];
    while seen.len() < whole.len() {
        match still.message().await {
            Ok(Some(event)) => seen.push(event),
            Ok(None) => panic!("a stream that follows has no end of its own"),
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{status}");
                let last = seen.last().expect("the first").revision;
                assert!(status.message().ends_with(&format!("after revision {last}")), "{status}");
                still = fleet.client.fleet.clone().events(after(last, true)).await.expect("events").into_inner();
            }
        }
    }
    assert_eq!(seen, whole);
}
