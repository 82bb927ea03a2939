//! A pool: alike hosts with one provider and one scaling policy.
//!
//! ```text
//! host:  requested --joined--> joined(node) --delete--> deleting --gone--> (forgotten)
//!            |                                              ^
//!            +------ boot deadline passed ------------------+
//!
//! asleep:  (no entry) --wake--> waking(node) --hello, failed, boot deadline--> (no entry)
//! ```

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
    vec::Vec,
};

use serde::{Deserialize, Serialize};

use crate::{
    autoscale::{
        PoolView, Readings,
        demand::{BootTimes, Memory, Runs},
        flow::Flow,
        pattern::{Ongoing, Pattern},
        waits::Waits,
    },
    ids::{HostRequestId, NodeId},
    node::Mark,
    policy::PoolPolicy,
    resources::Resources,
    time::Timestamp,
};

/// A pool as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Its policy.
    pub policy: PoolPolicy,
    /// Every host that was requested and is not confirmed gone, and every one that is being woken (FL-11).
    pub hosts: BTreeMap<HostRequestId, Host>,
    /// Hosts in a row that failed.
    pub failures: u32,
    /// Scale-out rests, and why, because hosts kept failing.
    pub paused: Option<String>,
    /// Then one host is tried; none: at once.
    #[serde(default)]
    pub paused_until: Option<Timestamp>,
    /// The last change of its size.
    pub last_scaled: Option<Timestamp>,
    /// The last change for more.
    #[serde(default)]
    pub last_out: Option<Timestamp>,
    /// All scaling rests, because an operator said so.
    #[serde(default)]
    pub stopped: Option<Mark>,
    /// An operator's own size.
    #[serde(default)]
    pub pin: Option<Pin>,
    /// How long its hosts took to boot.
    #[serde(default)]
    pub boots: BootTimes,
    /// What its hosts have cost.
    #[serde(default)]
    pub spent: Spent,
    /// What a host of this pool turned out to have.
    #[serde(default)]
    pub made: Option<Made>,
    /// Its need over day and week.
    #[serde(default, skip_serializing_if = "Pattern::is_empty")]
    pub pattern: Pattern,
}

impl PoolRecord {
    /// A new pool without a host.
    #[must_use]
    pub fn new(policy: PoolPolicy) -> Self {
        Self {
            policy,
            hosts: BTreeMap::new(),
            failures: 0,
            paused: None,
            paused_until: None,
            last_scaled: None,
            last_out: None,
            stopped: None,
            pin: None,
            boots: BootTimes::default(),
            spent: Spent::default(),
            made: None,
            pattern: Pattern::default(),
        }
    }
}

impl PoolRecord {
    /// The request under which this node is being woken.
    #[must_use]
    pub fn waking_of(&self, id: NodeId) -> Option<HostRequestId> {
        self.hosts.iter().find(|(_, host)| host.waking() == Some(id)).map(|(host, _)| *host)
    }
}

/// An operator's own size for a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// So many hosts.
    pub size: u32,
    /// Until then; none: until it is resumed.
    pub until: Option<Timestamp>,
    /// Who said so, and why.
    pub mark: Mark,
}

/// What the last host that a provider made turned out to have: a task that needs more asks for no such host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Its capacity.
    pub capacity: Resources,
    /// Fences that it can raise.
    pub fences: BTreeSet<String>,
}

/// Time of a pool's hosts since midnight (UTC), and of how many it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// Hosts counted since `at`.
    pub hosts: u32,
    /// Counted up to then.
    pub at: Timestamp,
    /// Host-milliseconds of that day.
    pub host_ms: u64,
}

impl Spent {
    const DAY: u64 = 86_400_000;

    /// Time has passed, and there are so many hosts from now on.
    pub const fn count(&mut self, hosts: u32, now: Timestamp) {
        let midnight = Timestamp(now.0 - now.0 % Self::DAY);
        if self.at.0 < midnight.0 {
            self.at = midnight;
            self.host_ms = 0;
        }
        self.host_ms = self.host_ms.saturating_add(now.since(self.at).0.saturating_mul(self.hosts as u64));
        self.at = now;
        self.hosts = hosts;
    }
}

/// A host that was requested of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// It boots, since then.
    Requested(Timestamp),
    /// It joined as this node.
    Joined(NodeId),
    /// A host that joined by itself is being woken.
    Waking {
        /// Its node.
        node: NodeId,
        /// First asked for then.
        since: Timestamp,
        /// Last asked for then.
        told: Timestamp,
    },
    /// The provider was told to end it.
    Deleting {
        /// Its node, if it joined.
        node: Option<NodeId>,
        /// Last told then.
        told: Timestamp,
        /// First told then; none: by an older release.
        #[serde(default)]
        since: Option<Timestamp>,
    },
}

impl Host {
    /// The node as which it joined, and is.
    #[must_use]
    pub const fn joined(&self) -> Option<NodeId> {
        match self {
            Self::Joined(node) => Some(*node),
            Self::Requested(_) | Self::Waking { .. } | Self::Deleting { .. } => None,
        }
    }

    /// The node that is being woken.
    #[must_use]
    pub const fn waking(&self) -> Option<NodeId> {
        match self {
            Self::Waking { node, .. } => Some(*node),
            Self::Requested(_) | Self::Joined(_) | Self::Deleting { .. } => None,
        }
    }

    /// Whether the order to delete it is of this very batch, and so not sent yet.
    #[must_use]
    pub fn is_untold(&self, now: Timestamp) -> bool {
        match self {
            Self::Deleting { told, .. } => *told == now,
            Self::Requested(_) | Self::Joined(_) | Self::Waking { .. } => false,
        }
    }
}

/// What a provider says of deleting a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preflight {
    /// It was asked then.
    Asked(Timestamp),
    /// It may be deleted, as of then.
    Cleared(Timestamp),
    /// It is not deleted now.
    Kept {
        /// As of then.
        since: Timestamp,
        /// Why.
        reason: String,
    },
}

/// A pool in memory: its record, and what a restart rebuilds or learns anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// As it is stored.
    pub record: PoolRecord,
    /// For each rule for more hosts, since when it is breached.
    pub breached_since: Vec<Option<Timestamp>>,
    /// For each condition for fewer, since when it holds.
    pub below_since: Vec<Option<Timestamp>>,
    /// What was needed lately.
    pub memory: Memory,
    /// How many tasks come to it.
    pub flow: Flow,
    /// How long its tasks run.
    pub runs: Runs,
    /// The part of its pattern that is under way.
    pub ongoing: Ongoing,
    /// How long its tasks waited.
    pub waits: Waits,
    /// What its provider says of deleting hosts of it.
    pub preflights: BTreeMap<HostRequestId, Preflight>,
    /// Nodes that could not be woken, and when: they are tried last.
    pub unwoken: BTreeMap<NodeId, Timestamp>,
    /// Why its provider gives no answer; none: it does, or was not asked.
    pub provider_trouble: Option<String>,
    /// It is not looked at again before.
    pub next_look: Timestamp,
    /// As it was last looked at.
    pub view: PoolView,
}

impl Pool {
    /// A pool as restored or made.
    #[must_use]
    pub fn new(record: PoolRecord) -> Self {
        Self {
            record,
            breached_since: Vec::new(),
            below_since: Vec::new(),
            memory: Memory::default(),
            flow: Flow::default(),
            runs: Runs::default(),
            ongoing: Ongoing::default(),
            waits: Waits::default(),
            preflights: BTreeMap::new(),
            unwoken: BTreeMap::new(),
            provider_trouble: None,
            next_look: Timestamp(0),
            view: PoolView::default(),
        }
    }

    /// Notes since when each rule is breached and each condition holds. What has no data has no such time.
    pub fn watch(&mut self, readings: &Readings, now: Timestamp) {
        let since = |known: Option<&Option<Timestamp>>, is: bool| is.then(|| known.copied().flatten().unwrap_or(now));
        let rules = self.record.policy.out_rules();
        let breached = rules.iter().enumerate();
        self.breached_since = breached
            .map(|(at, rule)| since(self.breached_since.get(at), readings.breach(rule) == Some(true)))
            .collect();
        let conditions = self.record.policy.in_rule().map(|rule| rule.when).unwrap_or_default();
        let below = conditions.iter().enumerate();
        self.below_since =
            below.map(|(at, one)| since(self.below_since.get(at), readings.is_below(one) == Some(true))).collect();
    }

    /// Nothing can ever change its size: it is not looked at.
    #[must_use]
    pub const fn is_fixed(&self) -> bool {
        self.record.policy.is_fixed() && self.record.pin.is_none()
    }

    /// Its rules have changed: how long each has held begins anew.
    pub fn forget_breaches(&mut self) {
        self.breached_since.clear();
        self.below_since.clear();
        self.next_look = Timestamp(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_paid_from_its_midnight() {
        let mut spent = Spent::default();
        let day = 20_000 * Spent::DAY;
        spent.count(4, Timestamp(day - 3_600_000));
        assert_eq!(spent.host_ms, 0);
        spent.count(2, Timestamp(day + 1_800_000));
        assert_eq!(spent.host_ms, 4 * 1_800_000);
        spent.count(0, Timestamp(day + 3_600_000));
        assert_eq!(spent.host_ms, 4 * 1_800_000 + 2 * 1_800_000);
    }
}
