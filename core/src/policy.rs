//! A pool's policy: how many hosts, of what size, at what price, and when more
//! or fewer. What it means is here; how its file is read, in `policy/text.rs`.

mod amounts;
mod schedule;
mod text;

use alloc::{collections::BTreeMap, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

pub use amounts::{Money, PERCENT, WHOLE};
pub use schedule::{Bounds, Day, Window};
pub use text::BadKey;

use crate::{ids::PoolName, resources::Resources, time::Millis};

/// A pool's whole policy. Read from and written as TOML and JSON by [`text::PolicyText`], which
/// refuses unknown keys and names the key of a value that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "text::PolicyText", into = "text::PolicyText")]
pub struct PoolPolicy {
    /// The pool's name.
    pub name: PoolName,
    /// Who makes and ends its hosts.
    pub provider: ProviderKind,
    /// Of [`ProviderKind::Exec`]: the program's name; none: the pool's own.
    pub program: Option<String>,
    /// Of [`ProviderKind::Static`]: how a host that scale-in has drained goes to sleep.
    pub sleep: Sleep,
    /// Of [`ProviderKind::Static`]: the program that wakes such a host; none: a person does.
    pub wake: Option<String>,
    /// Never fewer hosts than this.
    pub min: u32,
    /// Never more hosts than this, counting all that were requested and are not confirmed gone (FL-11).
    pub max: u32,
    /// What sets its size besides the rules written out.
    pub preset: Preset,
    /// Which node an attempt goes to.
    pub placement: PlacementOrder,
    /// What a host of this pool has.
    pub host: HostTemplate,
    /// A requested host that has not joined by then is removed.
    pub boot_deadline: Millis,
    /// This many failed hosts in a row pause scale-out.
    pub boot_failures: u32,
    /// The most that any of these asks is wanted.
    pub scale_out: Vec<ScaleOut>,
    /// When hosts go; none: only as the preset says.
    pub scale_in: Option<ScaleIn>,
    /// At most so many hosts drain at once; none: idle hosts as many as there are, of busy ones a tenth.
    pub max_draining: Option<Share>,
    /// Other limits at certain times of the week.
    pub schedule: Vec<Window>,
    /// What a host costs, and how much may be spent.
    pub cost: Option<Cost>,
}

impl PoolPolicy {
    /// A pool that only keeps `min` hosts: no preset, no rule, defaults for the rest.
    #[must_use]
    pub const fn fixed(name: PoolName, provider: ProviderKind, min: u32, max: u32, host: HostTemplate) -> Self {
        Self {
            name,
            provider,
            program: None,
            sleep: Sleep::Stop,
            wake: None,
            min,
            max,
            preset: Preset::None,
            placement: PlacementOrder::Spread,
            host,
            boot_deadline: text::BOOT_DEADLINE,
            boot_failures: text::BOOT_FAILURES,
            scale_out: Vec::new(),
            scale_in: None,
            max_draining: None,
            schedule: Vec::new(),
            cost: None,
        }
    }

    /// The name of the program that makes its hosts.
    #[must_use]
    pub fn program(&self) -> &str {
        self.program.as_deref().unwrap_or(&self.name.0)
    }

    /// No rule, schedule or minimum can ever change its size.
    #[must_use]
    pub const fn is_fixed(&self) -> bool {
        self.min == 0
            && matches!(self.preset, Preset::None)
            && self.scale_out.is_empty()
            && self.scale_in.is_none()
            && self.schedule.is_empty()
    }

    /// Its rules for more hosts: the preset's, then its own.
    #[must_use]
    pub fn out_rules(&self) -> Vec<ScaleOut> {
        let mut rules = match self.preset {
            Preset::Thresholds => Vec::from(THRESHOLDS_OUT),
            Preset::Demand | Preset::None => Vec::new(),
        };
        rules.extend_from_slice(&self.scale_out);
        rules
    }

    /// Its rule for fewer hosts: its own before the preset's. Demand decides by itself when hosts go.
    #[must_use]
    pub fn in_rule(&self) -> Option<ScaleIn> {
        match (&self.scale_in, self.preset) {
            (Some(own), _) => Some(own.clone()),
            (None, Preset::Thresholds) => Some(ScaleIn::halving(Vec::from(THRESHOLDS_IN))),
            (None, Preset::Demand | Preset::None) => None,
        }
    }
}

/// What sets a pool's size besides the rules written out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// What the running and waiting tasks use, have lately used and by their pattern will use.
    #[default]
    Demand,
    /// CPU, queue and latency against fixed numbers; doubled and halved.
    Thresholds,
    /// Nothing: the rules written out alone.
    None,
}

/// The rules of [`Preset::Thresholds`] for more hosts.
const THRESHOLDS_OUT: [ScaleOut; 3] = [
    ScaleOut::doubling(Metric::CpuUtilization, 70 * PERCENT, Millis::from_secs(300)),
    ScaleOut::doubling(Metric::QueueLength, 100, Millis::from_secs(60)),
    ScaleOut::doubling(Metric::ExecutionLatency, 1_000, Millis::from_secs(120)),
];
/// The conditions of [`Preset::Thresholds`] for fewer hosts; all must hold.
const THRESHOLDS_IN: [Below; 2] = [
    Below { metric: Metric::CpuUtilization, below: 30 * PERCENT, hold: Millis::from_secs(600) },
    Below { metric: Metric::QueueLength, below: 10, hold: Millis::from_secs(300) },
];

/// Who makes and ends a pool's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderKind {
    /// Hosts join by themselves.
    Static,
    /// Agents on this machine, made by `muster up` or `muster demo`.
    Local,
    /// An operator's program makes them.
    Exec,
}

impl ProviderKind {
    /// The word of the policy's file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Local => "local",
            Self::Exec => "exec",
        }
    }
}

/// How a host that joined by itself is left when scale-in has drained it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sleep {
    /// Its agent exits and stays down; the machine runs on.
    #[default]
    Stop,
    /// It is powered off, if its own `spawner.toml` allows that.
    Poweroff,
}

/// Which of the nodes that could take an attempt does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlacementOrder {
    /// The least loaded one; among equals in turn.
    #[default]
    Spread,
    /// The fullest one that still fits, so that scale-in finds empty hosts.
    BinPack,
}

/// What a pool's host has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "text::HostText", into = "text::HostText")]
pub struct HostTemplate {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes for working folders.
    pub disk_bytes: u64,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl HostTemplate {
    /// What a host made from this has.
    #[must_use]
    pub const fn capacity(&self) -> Resources {
        Resources { cpu_milli: self.cpu_milli, memory_bytes: self.memory_bytes, disk_bytes: self.disk_bytes }
    }
}

/// What a rule measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Busy part of the CPU of live, fresh nodes, weighted by capacity; in thousandths.
    CpuUtilization,
    /// Used part of their memory, alike.
    MemoryUtilization,
    /// Part of the time in which work stood still for want of CPU, memory or disk, the worst of the three; alike.
    Pressure,
    /// Tasks that wait and could run in this pool; those sent ahead wait too.
    QueueLength,
    /// 95th percentile from request to answer of function invocations; milliseconds.
    ExecutionLatency,
    /// 95th percentile from submit to start of the last minute's starts, or the age of the oldest
    /// waiting task if that is more; milliseconds.
    WaitTime,
}

impl Metric {
    /// The word of the policy's file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CpuUtilization => "cpu_utilization",
            Self::MemoryUtilization => "memory_utilization",
            Self::Pressure => "pressure",
            Self::QueueLength => "queue_length",
            Self::ExecutionLatency => "execution_latency",
            Self::WaitTime => "wait_time",
        }
    }
}

/// By how much a rule changes the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// So many hosts.
    Step(u32),
    /// To this many thousandths of its size; by one host at least.
    Factor(u32),
}

impl Change {
    /// The size that follows on `size` hosts; scale-in gives this as its lower bound.
    #[must_use]
    pub fn applied_to(self, size: u32, outwards: bool) -> u32 {
        match (self, outwards) {
            (Self::Step(step), true) => size.saturating_add(step),
            (Self::Step(step), false) => size.saturating_sub(step),
            (Self::Factor(permille), true) => {
                let grown = (u64::from(size) * u64::from(permille)).div_ceil(u64::from(WHOLE));
                u32::try_from(grown).unwrap_or(u32::MAX).max(size.saturating_add(1))
            }
            (Self::Factor(permille), false) => {
                let shrunk = (u64::from(size) * u64::from(permille)).div_ceil(u64::from(WHOLE));
                u32::try_from(shrunk).unwrap_or(u32::MAX).min(size.saturating_sub(1))
            }
        }
    }
}

/// One rule that asks for more hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleOut {
    /// What is measured.
    pub metric: Metric,
    /// More than this breaches the rule, in the metric's unit.
    pub above: u64,
    /// It must be breached this long without a break.
    pub hold: Millis,
    /// How many more.
    pub change: Change,
    /// After a scale-out of this pool the rule rests this long; none: as long as it must hold,
    /// or as long as hosts take to boot, whichever is longer.
    pub cooldown: Option<Millis>,
}

impl ScaleOut {
    const fn doubling(metric: Metric, above: u64, hold: Millis) -> Self {
        Self { metric, above, hold, change: Change::Factor(2 * WHOLE), cooldown: None }
    }
}

/// When hosts are given back: all conditions hold, and nothing asks for more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaleIn {
    /// All must hold; none: the queue is empty.
    pub when: Vec<Below>,
    /// A host without work for this long may go.
    pub idle: Millis,
    /// At most so many fewer at once.
    pub change: Change,
    /// After any scaling of this pool, scale-in rests this long; none: as long as its conditions must
    /// hold, or as long as hosts take to boot, whichever is longer.
    pub cooldown: Option<Millis>,
    /// Hosts with work on them may go too, and have this long until what is left is evicted.
    pub busy: Option<Millis>,
}

impl ScaleIn {
    /// One host at a time, as soon as it is idle and nothing waits.
    #[must_use]
    pub const fn one_by_one(idle: Millis) -> Self {
        Self { when: Vec::new(), idle, change: Change::Step(1), cooldown: None, busy: None }
    }

    /// The longest that any of its conditions must hold.
    #[must_use]
    pub fn longest_hold(&self) -> Millis {
        self.when.iter().map(|one| one.hold).max().unwrap_or_default()
    }

    const fn halving(when: Vec<Below>) -> Self {
        Self { when, idle: Millis(0), change: Change::Factor(WHOLE / 2), cooldown: None, busy: None }
    }
}

/// A condition of scale-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Below {
    /// What is measured.
    pub metric: Metric,
    /// It must be less than this.
    pub below: u64,
    /// For this long without a break.
    pub hold: Millis,
}

/// A number of hosts, or a part of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// So many.
    Hosts(u32),
    /// So many hundredths of the pool's hosts; one host at least.
    Percent(u32),
}

impl Share {
    /// Of a pool of this size.
    #[must_use]
    pub fn of(self, hosts: u32) -> u32 {
        match self {
            Self::Hosts(count) => count,
            Self::Percent(percent) => u32::try_from(u64::from(hosts) * u64::from(percent) / 100).unwrap_or(1).max(1),
        }
    }
}

/// What a host costs, and how much may be spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Of one host for an hour.
    pub price_per_hour: Money,
    /// A host is paid for in pieces of this length: one that has been begun is paid.
    pub billed_by: Millis,
    /// All hosts together cost no more than this an hour.
    pub budget_per_hour: Option<Money>,
    /// When this much has been spent in a day (UTC), only the minimum is kept.
    pub budget_per_day: Option<Money>,
}

#[cfg(test)]
mod tests;
