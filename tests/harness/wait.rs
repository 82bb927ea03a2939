//! Waiting for a condition with a deadline: the one place where tests sleep,
//! and never longer than a tick.

use std::time::{Duration, Instant};

/// Deadline of a wait whose length is not the point of the test: generous, for slow machines.
pub const WAIT: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(20);

/// Asks until there is an answer; panics with `what` at the deadline.
pub async fn eventually<T>(what: &str, deadline: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = probe().await {
            return answer;
        }
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        tokio::time::sleep(TICK).await;
    }
}

/// Lets time pass up to a moment: for programs that do things to a fleet at times of their own, never for a test
/// that waits for something.
pub async fn until(moment: Instant) {
    tokio::time::sleep_until(moment.into()).await;
}

/// [`eventually`] without async; `None` at the deadline, so that it serves in `drop`.
pub fn eventually_blocking<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(TICK);
    }
}
