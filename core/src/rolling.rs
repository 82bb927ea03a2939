//! A rolling drain: many nodes, of which at most so many drain at once. Those
//! whose turn has not come stay as they are, and go on taking work.
//!
//! ```text
//! a node: waits --a place is free--> drains --proof--> has left (drained)
//!           |                          |
//!           +-- resumed, gone, removed +--> has left
//! ```

use alloc::{collections::BTreeSet, string::String};
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    event::DrainThen,
    ids::{Actor, NodeId},
    time::{Millis, Timestamp},
};

/// Names a rolling drain: shown as `r3`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RollingId(pub u64);

impl RollingId {
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for RollingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// What a rolling drain asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollingOrder {
    /// At most so many of its nodes drain at once; at least 1.
    pub at_once: u32,
    /// The time that each node has from the beginning of its own drain; none: as long as it takes.
    pub within: Option<Millis>,
    /// What follows for each node.
    pub then: DrainThen,
    /// Who asks.
    pub actor: Actor,
    /// Why.
    pub reason: String,
}

/// A rolling drain as it is stored, with the fleet's counters. Which nodes it still has is in their records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rolling {
    /// What was asked.
    pub order: RollingOrder,
    /// When.
    pub requested: Timestamp,
    /// Nodes that it began with.
    pub nodes: u32,
    /// Of them drained so far.
    pub drained: u32,
    /// How long their drains took, added up.
    pub took: Millis,
}

/// The nodes that a rolling drain still has. Rebuilt from their records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Their turn has not come.
    pub waiting: BTreeSet<NodeId>,
    /// They drain now, whoever told them to.
    pub draining: BTreeSet<NodeId>,
}

impl Members {
    /// Where the node stands.
    pub fn put(&mut self, node: NodeId, drains: bool) {
        let (to, from) =
            if drains { (&mut self.draining, &mut self.waiting) } else { (&mut self.waiting, &mut self.draining) };
        to.insert(node);
        from.remove(&node);
    }

    /// It has left.
    pub fn remove(&mut self, node: NodeId) {
        self.waiting.remove(&node);
        self.draining.remove(&node);
    }

    /// None is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.draining.is_empty()
    }
}

/// How long a rolling drain goes on, if each drain takes as long as those before; none: nothing tells.
///
/// `present` is what the nodes that drain now still need, `mean` what one took so far.
#[must_use]
pub fn time_left(waiting: u64, at_once: u32, mean: Option<Millis>, present: Option<Millis>) -> Option<Millis> {
    let rounds = waiting.div_ceil(u64::from(at_once.max(1)));
    if rounds == 0 {
        return present;
    }
    let each = mean.or(present)?;
    Some(Millis(each.0.saturating_mul(rounds).saturating_add(present.unwrap_or_default().0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_rounds_of_the_mean_and_what_runs_now() {
        let left = |waiting, mean: Option<u64>, present: Option<u64>| {
            time_left(waiting, 10, mean.map(Millis), present.map(Millis)).map(|left| left.0)
        };
        assert_eq!(left(0, Some(5), Some(7)), Some(7));
        assert_eq!(left(25, Some(5), Some(7)), Some(22));
        assert_eq!(left(25, None, Some(7)), Some(28), "until one is drained, those that drain now are the measure");
        assert_eq!(left(25, None, None), None);
    }
}
