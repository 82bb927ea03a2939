//! A pool: alike hosts with one provider and one scaling policy.
//!
//! ```text
//! host:  requested --joined--> joined(node) --delete--> deleting --gone--> (forgotten)
//!            |                                              ^
//!            +------ boot deadline passed ------------------+
//! ```

use alloc::{collections::BTreeMap, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{HostRequestId, NodeId},
    policy::PoolPolicy,
    time::Timestamp,
};

/// A pool as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Its policy.
    pub policy: PoolPolicy,
    /// Every host that was requested and is not confirmed gone (FL-11).
    pub hosts: BTreeMap<HostRequestId, Host>,
    /// Hosts in a row that failed.
    pub failures: u32,
    /// Scale-out rests, and why, until the policy is set again.
    pub paused: Option<String>,
    /// The last change of its size.
    pub last_scaled: Option<Timestamp>,
}

/// A host that was requested of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// It boots, since then.
    Requested(Timestamp),
    /// It joined as this node.
    Joined(NodeId),
    /// The provider was told to end it.
    Deleting {
        /// Its node, if it joined.
        node: Option<NodeId>,
        /// Last told then.
        told: Timestamp,
    },
}

/// A pool in memory: its record, and what a restart rebuilds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// As it is stored.
    pub record: PoolRecord,
    /// For each scale-out rule, since when it is breached.
    pub breached_since: Vec<Option<Timestamp>>,
}

impl Pool {
    /// A pool as restored or made.
    #[must_use]
    pub fn new(record: PoolRecord) -> Self {
        let breached_since = record.policy.scale_out.iter().map(|_| None).collect();
        Self { record, breached_since }
    }
}
