//! The right to lead, and for how long.
//!
//! With the store in one file it is had for good: the folder's lock keeps a
//! second coordinator away. With several coordinators it is a lease, counted on
//! the boot-time clock, so that a coordinator that was stopped for a while knows
//! at once that its time is over. Whatever leaves the process asks first.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use muster_core::{ids::Term, limits};

use crate::clock::boot_time;

/// The leader's end comes first; one renewal may fail; a leader in good health is not doubted.
const _: () = {
    let drift = limits::LEADER_LEASE.percent(limits::LEASE_DRIFT_PERCENT);
    assert!(limits::LEADER_TAKEOVER.0 >= limits::LEADER_LEASE.0 + drift.0);
    assert!(limits::LEADER_RENEW.0 * 2 < limits::LEADER_LEASE.0);
    assert!(limits::LEADER_DOUBT.0 > limits::LEADER_RENEW.0);
};

/// Shared by all parts that act. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leadership {
    /// Boot time in milliseconds.
    until: Arc<AtomicU64>,
}

impl Leadership {
    /// For ever.
    #[must_use]
    pub fn alone() -> Self {
        Self { until: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// Not yet.
    #[must_use]
    pub fn none() -> Self {
        Self { until: Arc::new(AtomicU64::new(0)) }
    }

    /// Whether what leaves the process now is said by the leader.
    #[must_use]
    pub fn holds(&self) -> bool {
        milliseconds(boot_time()) < self.until.load(Ordering::Acquire)
    }

    /// How long that will be so.
    #[must_use]
    pub fn left(&self) -> Duration {
        Duration::from_millis(self.until.load(Ordering::Acquire).saturating_sub(milliseconds(boot_time())))
    }

    /// A renewal that was sent at this boot time was granted.
    pub(crate) fn extend(&self, sent: Duration) {
        self.until.fetch_max(milliseconds(sent) + limits::LEADER_LEASE.0, Ordering::AcqRel);
    }

    /// It is over.
    pub(crate) fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// What this coordinator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Another one leads, or nobody does yet.
    Standby {
        /// Where that one is dialled; none: it is not known, or to be seen soon.
        leader: Option<String>,
    },
    /// This one leads, by this term.
    Leading {
        /// Of the leadership row.
        term: Term,
    },
    /// It led, and leads no more: the process must end.
    Lost {
        /// The sentence.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_counted_from_the_sending_and_never_shortened() {
        let leadership = Leadership::none();
        assert!(!leadership.holds());
        let now = boot_time();
        leadership.extend(now);
        assert!(leadership.holds());
        leadership.extend(now.saturating_sub(Duration::from_secs(60)));
        assert!(leadership.holds(), "a late answer to an older renewal takes nothing away");
        leadership.end();
        assert!(!leadership.holds());
        leadership.extend(boot_time().saturating_sub(Duration::from_millis(limits::LEADER_LEASE.0)));
        assert!(!leadership.holds(), "an answer that took the whole lease gives nothing");
        assert!(Leadership::alone().holds());
    }
}
