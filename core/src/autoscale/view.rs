//! A pool as a decision sees it: numbers, and nothing that only a running fleet knows.

use alloc::{string::String, vec::Vec};

use crate::{
    ids::NodeId,
    policy::{Below, Metric, Money, ScaleOut},
    time::{Millis, Timestamp},
};

/// What a metric says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// This, in the metric's unit.
    Value(u64),
    /// Nothing that may be relied on: so many of so many nodes were heard lately.
    NoData {
        /// Heard, with a figure.
        fresh: u32,
        /// That should have been.
        of: u32,
    },
    /// There is nothing that could be measured here: no function was ever invoked.
    Never,
}

/// All metrics of a pool at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readings {
    /// Thousandths of the capacity.
    pub cpu: Reading,
    /// Thousandths of the capacity.
    pub memory: Reading,
    /// Thousandths of the time.
    pub pressure: Reading,
    /// Waiting tasks that could run here.
    pub queue: u64,
    /// Milliseconds.
    pub latency: Reading,
    /// Milliseconds.
    pub wait: Reading,
}

impl Default for Readings {
    fn default() -> Self {
        let none = Reading::NoData { fresh: 0, of: 0 };
        Self { cpu: none, memory: none, pressure: none, queue: 0, latency: Reading::Never, wait: Reading::Value(0) }
    }
}

impl Readings {
    /// What this metric says.
    #[must_use]
    pub const fn of(&self, metric: Metric) -> Reading {
        match metric {
            Metric::CpuUtilization => self.cpu,
            Metric::MemoryUtilization => self.memory,
            Metric::Pressure => self.pressure,
            Metric::QueueLength => Reading::Value(self.queue),
            Metric::ExecutionLatency => self.latency,
            Metric::WaitTime => self.wait,
        }
    }

    /// Is the rule breached? None: there is no data.
    #[must_use]
    pub const fn breach(&self, rule: &ScaleOut) -> Option<bool> {
        match self.of(rule.metric) {
            Reading::Value(value) => Some(value > rule.above),
            Reading::Never => Some(false),
            Reading::NoData { .. } => None,
        }
    }

    /// Does the condition hold? None: there is no data.
    #[must_use]
    pub const fn is_below(&self, condition: &Below) -> Option<bool> {
        match self.of(condition.metric) {
            Reading::Value(value) => Some(value < condition.below),
            Reading::Never => Some(true),
            Reading::NoData { .. } => None,
        }
    }
}

/// Hosts that the work needs, in hosts of the pool's template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// What runs and waits now, packed.
    pub now: u32,
    /// Hosts beyond the supply that the waiting tasks would fill, by simulated placement.
    pub missing: u32,
    /// The most that was needed lately.
    pub recent: u32,
    /// How long is lately.
    pub window: Millis,
    /// When `recent` may fall.
    pub recent_until: Option<Timestamp>,
    /// By how much it will rise before a host that is asked for now is there.
    pub rise: u32,
    /// What its pattern of day and week says for the time until a host that is asked for now has booted.
    pub pattern: u32,
    /// When `pattern` changes.
    pub pattern_until: Option<Timestamp>,
}

impl Need {
    /// Hosts that should be there.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.now.saturating_add(self.rise).max(self.recent).max(self.pattern)
    }
}

/// A host with nothing on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleHost {
    /// Its node.
    pub node: NodeId,
    /// Since when.
    pub since: Timestamp,
    /// When it joined: it is paid from then.
    pub joined: Timestamp,
}

/// A host with work on it, of a policy that names such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyHost {
    /// Its node.
    pub node: NodeId,
    /// Time that its attempts have run: what is thrown away if they are evicted.
    pub work: Millis,
}

/// An operator's own size for the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// So many hosts.
    pub size: u32,
    /// Until then; none: until it is resumed.
    pub until: Option<Timestamp>,
}

/// A pool as the decision sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// When it was seen.
    pub at: Timestamp,
    /// Hosts that their provider does not delete now, each with its reason: no victims.
    pub kept: Vec<String>,
    /// Hosts that take or will take work: live or silent and eligible, or booting, or being woken.
    pub supply: u32,
    /// Those of them that boot.
    pub booting: u32,
    /// All hosts requested or joined and not confirmed gone.
    pub hosts: u32,
    /// All that drain, whoever asked.
    pub draining: u32,
    /// Nodes being drained by the scaler that can still be kept.
    pub cancellable: Vec<NodeId>,
    /// Nodes that joined by themselves and that the scaler has sent to sleep, in the order in which they are woken.
    pub asleep: Vec<NodeId>,
    /// Nodes with nothing on them, longest first.
    pub idle: Vec<IdleHost>,
    /// Nodes with work on them, if the policy names such.
    pub busy: Vec<BusyHost>,
    /// The metrics.
    pub readings: Readings,
    /// What the work needs.
    pub need: Need,
    /// For each rule for more hosts, since when it is breached.
    pub breached_since: Vec<Option<Timestamp>>,
    /// For each condition for fewer, since when it holds.
    pub below_since: Vec<Option<Timestamp>>,
    /// How long hosts take to boot.
    pub boot: Millis,
    /// The last change of the pool's size.
    pub last_scaled: Option<Timestamp>,
    /// The last change for more.
    pub last_out: Option<Timestamp>,
    /// Scale-out rests because hosts kept failing: why.
    pub paused: Option<String>,
    /// From then on one host at a time is tried all the same.
    pub trial_at: Option<Timestamp>,
    /// All scaling rests because an operator said so: why.
    pub stopped: Option<String>,
    /// An operator's own size.
    pub pinned: Option<Pinned>,
    /// Scale-in rests for want of data: why, and until when at least.
    pub silent: Option<(String, Option<Timestamp>)>,
    /// What all hosts have cost since midnight (UTC).
    pub spent_today: Money,
}

impl PoolView {
    /// New hosts that failures allow.
    pub(super) fn may_make(&self) -> u32 {
        match (&self.paused, self.trial_at) {
            (None, _) => u32::MAX,
            (Some(_), Some(at)) if at <= self.at => 1u32.saturating_sub(self.booting),
            (Some(_), _) => 0,
        }
    }

    /// An operator's own size, if its time is not over.
    #[must_use]
    pub fn pin_in_force(&self) -> Option<Pinned> {
        self.pinned.filter(|pinned| pinned.until.is_none_or(|until| until > self.at))
    }
}
