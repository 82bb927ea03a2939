//! A node: our record of a host. Three independent fields, each with its
//! reason; what the CLI shows as STATE is a pure function of them.
//!
//! ```text
//! liveness  joining -> live <-> silent -> lost -> (live again, or gone)
//! duty      eligible <-> cordoned;  either -> draining -> drained -> stopping
//!                                   resume: back to what it was before
//! hold      none <-> cooling
//! ```
//! Beside these, a node whose disk is nearly full gets nothing new. One that joined by itself and went after scale-in's
//! drain is gone and stopping: it is asleep.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
};

use serde::{Deserialize, Serialize};

use crate::{
    event::{DrainOrder, HostSample},
    ids::{Actor, AttemptId, HostRequestId, Incarnation, PoolName, Revision, SessionId},
    resources::Resources,
    rolling::RollingId,
    time::{Millis, Timestamp},
};

/// Who drains for scale-in.
pub const SCALER: &str = "scaler";

/// A node as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Unique in the fleet; shown.
    pub name: String,
    /// Its pool.
    pub pool: PoolName,
    /// SHA-256 of its public key: its identity.
    pub key: [u8; 32],
    /// The provider's request that it came from.
    pub host: Option<HostRequestId>,
    /// When it enrolled.
    pub joined: Timestamp,
    /// Its present life.
    pub incarnation: Incarnation,
    /// Of its present life.
    pub boot_id: String,
    /// Of its installation.
    pub instance: String,
    /// The agent's last start that we know.
    pub agent_start: u64,
    /// What it has.
    pub capacity: Resources,
    /// Operator's labels.
    pub labels: BTreeMap<String, String>,
    /// Fences that it can raise.
    pub fences: BTreeSet<String>,
    /// Shown only.
    pub version: String,
    /// Do we hear of it?
    pub liveness: Liveness,
    /// May it get work?
    pub duty: Duty,
    /// Do we trust it?
    pub hold: Hold,
    /// Faults of its own in a row, since the last start that went well.
    pub faults: u32,
    /// Attempts that it ever got.
    pub attempts_total: u64,
    /// Since when nothing is on it; none: something is.
    pub idle_since: Option<Timestamp>,
    /// The last drain's revision.
    pub drain_revision: Revision,
    /// The rolling drain that it waits in, or drains for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolling: Option<RollingId>,
    /// Its disk is nearly full since then: nothing new until there is room.
    #[serde(default)]
    pub disk_full: Option<Timestamp>,
}

/// Do we hear of a node?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    /// Enrolled; never said hello.
    Joining,
    /// Its lease runs.
    Live,
    /// Its lease ran out then: nothing new is placed.
    Silent(Timestamp),
    /// Given up then: its attempts have ended as node_lost.
    Lost(Timestamp),
    /// It will not come back by itself.
    Gone(Timestamp),
}

/// Who changed a duty, when and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Who.
    pub actor: Actor,
    /// Why.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// May a node get work?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duty {
    /// Yes.
    Eligible,
    /// Nothing new.
    Cordoned(Mark),
    /// Nothing new, and what is there leaves.
    Draining(Drain),
    /// The agent proved that nothing is left.
    Drained {
        /// The drain.
        drain: Drain,
        /// When.
        proved: Timestamp,
    },
    /// Proved, and told to go.
    Stopping {
        /// The drain.
        drain: Drain,
        /// When it was proved.
        proved: Timestamp,
    },
}

/// A drain in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// What was asked; the deadline is the earliest of all requests.
    pub order: DrainOrder,
    /// Rises with each drain of the node; the proof names it.
    pub revision: Revision,
    /// When.
    pub requested: Timestamp,
    /// The cordon from before it, to be restored by resume.
    pub cordon_before: Option<Mark>,
    /// The rolling drain in which its turn had come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolling: Option<RollingId>,
}

/// Do we trust a node?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// Yes.
    None,
    /// Several starts in a row failed by its fault: nothing new until then.
    Cooling {
        /// Until when.
        until: Timestamp,
        /// The last fault.
        reason: String,
    },
}

/// A node in memory: its record, and what a restart rebuilds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// As it is stored.
    pub record: NodeRecord,
    /// Its open stream.
    pub session: Option<SessionId>,
    /// Which one that is, or was, by the agent's own count.
    pub stream: u64,
    /// The coordinator's side of the lease: later than the host's side by the margin.
    pub lease_end: Timestamp,
    /// Last heard of.
    pub heard: Timestamp,
    /// Its last host figures.
    pub sample: HostSample,
    /// Attempts on it that are not ended.
    pub attempts: BTreeSet<AttemptId>,
    /// Those of them that hold no capacity yet, in the order in which they will start.
    pub prefilled: alloc::collections::VecDeque<AttemptId>,
    /// Taken by those that hold capacity.
    pub allocated: Resources,
    /// Mean wall time of its last attempts; none: not known.
    pub mean_task: Option<Millis>,
    /// When it last got an attempt, in placements: for taking turns.
    pub last_placed: u64,
    /// The drain's proof was last asked for then.
    pub asked_drained: Option<Timestamp>,
}

impl Node {
    /// A node as restored or enrolled: nothing heard, nothing on it.
    #[must_use]
    pub const fn new(record: NodeRecord, now: Timestamp) -> Self {
        Self {
            record,
            session: None,
            stream: 0,
            lease_end: now,
            heard: now,
            sample: HostSample {
                cpu_used_milli: None,
                memory_used_bytes: None,
                disk_total_bytes: None,
                disk_available_bytes: None,
                pressure_permille: None,
            },
            attempts: BTreeSet::new(),
            prefilled: alloc::collections::VecDeque::new(),
            allocated: Resources { cpu_milli: 0, memory_bytes: 0, disk_bytes: 0 },
            mean_task: None,
            last_placed: 0,
            asked_drained: None,
        }
    }

    /// New work may be placed here.
    #[must_use]
    pub const fn is_placeable(&self) -> bool {
        self.session.is_some()
            && matches!(self.record.liveness, Liveness::Live)
            && matches!(self.record.duty, Duty::Eligible)
            && matches!(self.record.hold, Hold::None)
            && self.record.disk_full.is_none()
    }

    /// What is not taken.
    #[must_use]
    pub const fn free(&self) -> Resources {
        self.record.capacity.minus(&self.allocated)
    }

    /// Taken thousandths of the scarcer of CPU and memory.
    #[must_use]
    pub fn load_permille(&self) -> u64 {
        let part = |taken: u64, have: u64| (taken * 1_000).checked_div(have).unwrap_or(0);
        part(self.allocated.cpu_milli, self.record.capacity.cpu_milli)
            .max(part(self.allocated.memory_bytes, self.record.capacity.memory_bytes))
    }
}

impl NodeRecord {
    /// It joined by itself, and scale-in has drained it and sent it away: it can be woken. Who was sent away by a person
    /// stays away until a person brings it back.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        let Duty::Stopping { drain, .. } = &self.duty else { return false };
        matches!(self.liveness, Liveness::Gone(_)) && self.host.is_none() && drain.order.actor.0 == SCALER
    }

    /// The word that the CLI shows as STATE.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match (&self.liveness, &self.duty, &self.hold) {
            (Liveness::Gone(_), ..) if self.is_asleep() => "asleep",
            (Liveness::Gone(_), _, _) => "gone",
            (Liveness::Lost(_), _, _) => "lost",
            (Liveness::Silent(_), _, _) => "silent",
            (Liveness::Joining, _, _) => "joining",
            (Liveness::Live, Duty::Draining(_), _) => "draining",
            (Liveness::Live, Duty::Drained { .. }, _) => "drained",
            (Liveness::Live, Duty::Stopping { .. }, _) => "stopping",
            (Liveness::Live, Duty::Cordoned(_), _) => "cordoned",
            (Liveness::Live, Duty::Eligible, Hold::Cooling { .. }) => "cooling",
            (Liveness::Live, Duty::Eligible, Hold::None) if self.disk_full.is_some() => "disk-full",
            (Liveness::Live, Duty::Eligible, Hold::None) => "ready",
        }
    }

    /// The drain in force, in whatever stage.
    #[must_use]
    pub const fn drain(&self) -> Option<&Drain> {
        match &self.duty {
            Duty::Draining(drain) | Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } => Some(drain),
            Duty::Eligible | Duty::Cordoned(_) => None,
        }
    }
}

impl Liveness {
    /// The word that is shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Live => "live",
            Self::Silent(_) => "silent",
            Self::Lost(_) => "lost",
            Self::Gone(_) => "gone",
        }
    }
}

impl Duty {
    /// The word that is shown.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Eligible => "eligible",
            Self::Cordoned(_) => "cordoned",
            Self::Draining(_) => "draining",
            Self::Drained { .. } => "drained",
            Self::Stopping { .. } => "stopping",
        }
    }
}

impl Hold {
    /// The word that is shown.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Cooling { .. } => "cooling",
        }
    }
}
