//! The driver's clock: starts at the wall clock's time, or one millisecond past
//! the last stored time if that is later, and then follows the boot-time clock.
//! A step of the wall clock does not move it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use muster_core::time::Timestamp;
use nix::time::{ClockId, clock_gettime};

/// One per process, so that every part of it means the same by "now".
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    base_ms: u64,
    started: Duration,
}

impl Clock {
    /// A clock that goes on after `last`.
    #[must_use]
    pub fn after(last: Timestamp) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall_ms = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
        Self { base_ms: wall_ms.max(last.0.saturating_add(1)), started: boot_time() }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let passed = boot_time().saturating_sub(self.started);
        Timestamp(self.base_ms.saturating_add(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long until `at`.
    #[must_use]
    pub fn until(&self, at: Timestamp) -> Duration {
        Duration::from_millis(at.since(self.now()).0)
    }
}

/// Counts suspend too, so that a lease does not outlive a closed lid.
pub(crate) fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_starts_before_the_last_stored_time() {
        let future = Timestamp(u64::MAX / 2);
        assert!(Clock::after(future).now() > future);
        let clock = Clock::after(Timestamp(0));
        assert!(clock.now() >= Timestamp(1_600_000_000_000), "the wall clock's time");
        assert_eq!(clock.until(Timestamp(0)), Duration::ZERO);
    }
}
