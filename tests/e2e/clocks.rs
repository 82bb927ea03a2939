//! Wall clocks that jump: leases, deadlines and time limits are counted on clocks
//! that do not, and nothing of one host's wall clock is compared with another's.

use std::time::{Duration, Instant};

use muster_proto::v1::{self, Delivery, end::Reason};
use muster_tests::{Fleet, NodeOptions, Preload, WAIT, eventually, skip, until};

const HOUR_MS: i64 = 3_600_000;

/// Longer than a node's lease by either side's reckoning.
const LEASE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_wall_clock_that_jumps_an_hour_either_way_ends_no_lease_and_no_time_limit() {
    let (Some(coordinators), Some(agents)) = (Preload::compile(), Preload::compile()) else {
        skip!("no C compiler for the library that is preloaded")
    };
    let mut fleet = Fleet::start().await;
    fleet.kill_coordinator();
    fleet.environment = coordinators.environment();
    fleet.start_coordinator().await;
    fleet.environment = agents.environment();
    fleet.add_node("n1", &NodeOptions::default()).await;
    let mut exclusive = fleet.script("sleep 600");
    let body = exclusive.body.as_mut().expect("a script has a body");
    body.delivery = Delivery::Exclusive.into();
    let exclusive = fleet.client.submit(exclusive).await;
    let mut limited = fleet.script("sleep 600");
    limited.body.as_mut().expect("a script has a body").time_limit_ms = 600_000;
    let limited = fleet.client.submit(limited).await;
    fleet.client.running(exclusive, 1).await;
    fleet.client.running(limited, 1).await;

    for (coordinator, agent) in [(HOUR_MS, -HOUR_MS), (-HOUR_MS, HOUR_MS)] {
        coordinators.set_clock(coordinator);
        agents.set_clock(agent);
        let ends = Instant::now() + LEASE;
        // New work is placed and ends as ever, all the time.
        while Instant::now() < ends {
            let mut short = fleet.script("sleep 0.5; exit 3");
            short.retries = Some(v1::RetryPolicy { failed: Some(0), lost: Some(0), drained: None });
            assert_eq!(fleet.client.run(short).await.end(0), Reason::Exited(3));
            until(Instant::now() + Duration::from_millis(200)).await;
        }
        for job in [exclusive, limited] {
            let tasks = fleet.client.tasks(job).await;
            assert_eq!((tasks[0].state.as_str(), tasks[0].attempts.len()), ("running", 1), "{coordinator} {agent}");
        }
        assert_eq!(fleet.client.node("n1").await.expect("it is known").state, "ready");
    }
    // A limit counts as long as it says although the clock jumps while it runs.
    let mut limited = fleet.script("sleep 600");
    limited.body.as_mut().expect("a script has a body").time_limit_ms = 3_000;
    let limited = fleet.client.submit(limited).await;
    fleet.client.running(limited, 1).await;
    coordinators.set_clock(HOUR_MS);
    agents.set_clock(-HOUR_MS);
    assert_eq!(fleet.client.finished(limited, WAIT).await.end(0), Reason::TimedOut(v1::Empty {}));
    eventually("the node is well", WAIT, async || fleet.client.node("n1").await.filter(|node| node.state == "ready"))
        .await;
}
