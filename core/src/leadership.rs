//! A coordinator's time-bound right to lead, where several share one store.
//!
//! ```text
//! standby ──row unchanged for lease + margin──► leads(term + 1) ──renewal refused, or late──► standby
//! ```
//!
//! The store fences what a leader writes by its term. What it says without
//! writing, a node's lease above all, this fences by time: the leader counts
//! from the moment it *sent* a renewal, a standby from the moment it *saw* the
//! last one, plus a margin, so the old leader's end always comes first.

use crate::{
    limits,
    mutation::{self, Mutation},
    time::{Millis, Timestamp},
};

/// The right to lead, by the leader's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// None: a lock on the store holds off all others for as long as this process lives.
    until: Option<Timestamp>,
}

impl Leadership {
    /// Nobody else can lead while this process lives: the embedded store is locked.
    #[must_use]
    pub const fn locked() -> Self {
        Self { until: None }
    }

    /// Taken by a write to the shared store that was sent then.
    #[must_use]
    pub fn taken(sent: Timestamp) -> Self {
        Self { until: Some(sent + limits::LEADERSHIP_LEASE) }
    }

    /// A renewal that was sent then has been committed.
    pub fn renewed(&mut self, sent: Timestamp) {
        self.until = self.until.map(|until| until.max(sent + limits::LEADERSHIP_LEASE));
    }

    /// May this coordinator grant leases now? Asked at the moment of sending.
    #[must_use]
    pub fn holds(&self, now: Timestamp) -> bool {
        mutation::is_on(Mutation::GrantWithoutLeadership) || self.until.is_none_or(|until| now < until)
    }
}

/// How long a standby must have seen no renewal before it takes over.
#[must_use]
pub fn takeover_after() -> Millis {
    limits::LEADERSHIP_LEASE + limits::LEADERSHIP_LEASE.percent(limits::LEASE_DRIFT_PERCENT) + limits::TAKEOVER_MARGIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_stops_granting_before_a_standby_may_begin() {
        let sent = Timestamp(10_000);
        let leads = Leadership::taken(sent);
        let last = Timestamp(sent.0 + limits::LEADERSHIP_LEASE.0 - 1);
        assert!(leads.holds(last) && !leads.holds(sent + limits::LEADERSHIP_LEASE));
        // The standby saw the write no earlier than it was sent; its clock may run a tenth fast.
        let earliest_by_the_leaders_clock = sent.0 + takeover_after().0 * 10 / 11;
        assert!(last.0 < earliest_by_the_leaders_clock);
    }

    #[test]
    fn a_renewal_counts_from_its_sending_and_never_shortens() {
        let mut leads = Leadership::taken(Timestamp(10_000));
        leads.renewed(Timestamp(11_000));
        leads.renewed(Timestamp(10_500));
        assert!(leads.holds(Timestamp(13_999)) && !leads.holds(Timestamp(14_000)));
        let mut locked = Leadership::locked();
        locked.renewed(Timestamp(1));
        assert!(locked.holds(Timestamp(u64::MAX)));
    }
}
