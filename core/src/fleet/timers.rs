//! When something is to be looked at again. A timer only says "look": the state decides, and sets the next one.

use alloc::collections::{BTreeMap, BTreeSet};

use crate::{
    ids::{JobId, NodeId, PoolName},
    rolling::RollingId,
    time::Timestamp,
};

/// What is to be looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Node(NodeId),
    Job(JobId),
    Pool(PoolName),
    Prefill(NodeId),
    Rolling(RollingId),
}

/// All that is due at some time.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_time: BTreeSet<(Timestamp, Timer)>,
    /// The one look that is pending of each node and job: who looks sets the next, so that a second one
    /// would begin a second chain, and each event of a long drain another.
    pending: BTreeMap<Timer, Timestamp>,
}

impl Timers {
    /// Looks no later than then.
    pub(super) fn set(&mut self, at: Timestamp, timer: Timer) {
        if matches!(timer, Timer::Pool(_)) {
            // What a pool waits for is set once for each host, and not again at each look.
            self.by_time.insert((at, timer));
            return;
        }
        if self.pending.get(&timer).is_some_and(|pending| *pending <= at) {
            return;
        }
        if let Some(later) = self.pending.insert(timer.clone(), at) {
            self.by_time.remove(&(later, timer.clone()));
        }
        self.by_time.insert((at, timer));
    }

    /// When something is due next.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes one that is due.
    pub(super) fn pop_due(&mut self, now: Timestamp) -> Option<Timer> {
        let (at, _) = self.by_time.first()?;
        if *at > now {
            return None;
        }
        let (_, timer) = self.by_time.pop_first()?;
        self.pending.remove(&timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_look_pending_the_earliest_that_was_asked() {
        let mut timers = Timers::default();
        for at in [5, 3, 4, 9] {
            timers.set(Timestamp(at), Timer::Node(NodeId(1)));
        }
        assert_eq!(timers.next(), Some(Timestamp(3)));
        assert_eq!(timers.pop_due(Timestamp(2)), None);
        assert_eq!(timers.pop_due(Timestamp(9)), Some(Timer::Node(NodeId(1))));
        assert_eq!(timers.pop_due(Timestamp(9)), None, "who looks sets the next");
    }
}
