//! A pool's policy: how many hosts, of what size, and when more or fewer.
//! Read from TOML by the shell; unknown keys are refused there.

use alloc::{collections::BTreeMap, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{ids::PoolName, resources::Resources, time::Millis};

/// A pool's whole policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolPolicy {
    /// The pool's name.
    pub name: PoolName,
    /// Who makes and ends its hosts.
    pub provider: ProviderKind,
    /// Never fewer hosts than this.
    #[serde(default)]
    pub min: u32,
    /// Never more hosts than this, counting all that were requested and are not confirmed gone (FL-11).
    pub max: u32,
    /// Which node an attempt goes to.
    #[serde(default)]
    pub placement: PlacementOrder,
    /// What a host of this pool has.
    pub host: HostTemplate,
    /// A requested host that has not joined by then is removed.
    #[serde(default = "default_boot_deadline")]
    pub boot_deadline_ms: Millis,
    /// This many failed hosts in a row pause scale-out until the policy is set again.
    #[serde(default = "default_boot_failures")]
    pub boot_failures: u32,
    /// The most that any of these asks is wanted.
    #[serde(default)]
    pub scale_out: Vec<ScaleOut>,
    /// None: the pool never shrinks by itself.
    #[serde(default)]
    pub scale_in: Option<ScaleIn>,
}

const fn default_boot_deadline() -> Millis {
    Millis::from_secs(300)
}

const fn default_boot_failures() -> u32 {
    3
}

impl PoolPolicy {
    /// No rule and no minimum can ever change its size.
    #[must_use]
    pub const fn is_fixed(&self) -> bool {
        self.min == 0 && self.scale_out.is_empty() && self.scale_in.is_none()
    }
}

/// Who makes and ends a pool's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderKind {
    /// Hosts join by themselves.
    Static,
    /// Agents on this machine, made by `muster up` or `muster demo`.
    Local,
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
#[serde(deny_unknown_fields)]
pub struct HostTemplate {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes for working folders.
    pub disk_bytes: u64,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl HostTemplate {
    /// What a host made from this has.
    #[must_use]
    pub const fn capacity(&self) -> Resources {
        Resources { cpu_milli: self.cpu_milli, memory_bytes: self.memory_bytes, disk_bytes: self.disk_bytes }
    }
}

/// One rule that asks for more hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleOut {
    /// What is measured.
    pub metric: Metric,
    /// More than this breaches the rule.
    pub above: u64,
    /// It must be breached this long without a break.
    #[serde(default)]
    pub hold_ms: Millis,
    /// Hosts added at once.
    #[serde(default = "default_step")]
    pub step: u32,
    /// After a scale-out of this pool the rule rests this long.
    #[serde(default)]
    pub cooldown_ms: Millis,
}

const fn default_step() -> u32 {
    1
}

/// What a rule measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Tasks that wait and could run in this pool; prefilled ones count as waiting.
    QueueLength,
}

/// When a host is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleIn {
    /// A host without work for this long may go.
    pub idle_ms: Millis,
    /// Only while fewer tasks than this wait.
    #[serde(default = "default_queue_below")]
    pub queue_below: u64,
    /// Hosts released at once.
    #[serde(default = "default_step")]
    pub step: u32,
    /// After any scaling of this pool, scale-in rests this long.
    #[serde(default)]
    pub cooldown_ms: Millis,
}

const fn default_queue_below() -> u64 {
    1
}
