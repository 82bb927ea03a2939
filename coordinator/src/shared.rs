//! What several parts read and no rule decides on: who the nodes are, by
//! committed state, and their last figures.

use std::{
    collections::HashMap,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use muster_core::{
    ids::{AttemptId, NodeId},
    time::Timestamp,
};
use muster_proto::v1;

/// Known nodes. A node that was removed is not here, so its certificate opens nothing.
#[derive(Debug, Default)]
pub struct Members {
    nodes: RwLock<HashMap<NodeId, Member>>,
    /// The highest number that a certificate of this fleet named, and that is not known.
    shown: AtomicU64,
}

/// What a request of a node is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Shown.
    pub name: String,
    /// SHA-256 of its public key.
    pub key: [u8; 32],
}

impl Members {
    /// A node's entry.
    #[must_use]
    pub fn get(&self, node: NodeId) -> Option<Member> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// A certificate of this fleet names a node that is not known: it was removed, or the store has lost it.
    pub fn note_shown(&self, node: NodeId) {
        self.shown.fetch_max(node.0, Ordering::Relaxed);
    }

    /// The highest number of these: it was given out once, so it is not again.
    #[must_use]
    pub fn shown(&self) -> NodeId {
        NodeId(self.shown.load(Ordering::Relaxed))
    }

    /// A node's name, or its number if it is forgotten.
    #[must_use]
    pub fn name(&self, node: NodeId) -> String {
        self.get(node).map_or_else(|| node.to_string(), |member| member.name)
    }

    /// Called by the driver after a commit.
    pub fn set(&self, node: NodeId, member: Option<Member>) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        match member {
            Some(member) => nodes.insert(node, member),
            None => nodes.remove(&node),
        };
    }
}

/// The last figures of nodes and of what runs. Lost with the process, and told again by the next heartbeat.
#[derive(Debug, Default)]
pub struct Vitals {
    nodes: RwLock<HashMap<NodeId, NodeVitals>>,
}

/// A node's last figures.
#[derive(Clone, Debug, Default)]
pub struct NodeVitals {
    /// The host's.
    pub metrics: Option<v1::HostMetrics>,
    /// When they came.
    pub at: Timestamp,
    /// Of what runs there.
    pub usage: HashMap<AttemptId, v1::Usage>,
    /// How attempts started there, until they end or the host says hello without them.
    pub starts: HashMap<AttemptId, v1::AttemptStarted>,
    /// Shown only.
    pub agent_version: String,
    /// Shown only.
    pub kernel: String,
}

impl Vitals {
    /// Changes a node's figures.
    pub fn update<T>(&self, node: NodeId, change: impl FnOnce(&mut NodeVitals) -> T) -> T {
        change(self.nodes.write().unwrap_or_else(PoisonError::into_inner).entry(node).or_default())
    }

    /// Reads a node's figures.
    pub fn of<T>(&self, node: NodeId, read: impl FnOnce(&NodeVitals) -> T) -> Option<T> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(&node).map(read)
    }

    /// Forgets a node.
    pub fn forget(&self, node: NodeId) {
        self.nodes.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }
}
