//! Every thing the shell can be asked to do, and what a change left to store.
//!
//! The driver commits the [`Touched`] rows of a batch in one transaction and
//! only then carries out the effects, in order.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
    vec::Vec,
};

use serde::{Deserialize, Serialize};

use crate::{
    denied::Denied,
    end::End,
    event::DrainThen,
    ids::{
        Actor, AttemptId, Epoch, HostRequestId, Incarnation, JobId, NodeId, PoolName, RequestId, Revision, SessionId,
        Term,
    },
    policy::HostTemplate,
    rolling::RollingId,
    time::{Millis, Timestamp},
};

/// One thing to do, after the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Answer a request.
    Reply {
        /// The request.
        request: RequestId,
        /// Its one answer.
        reply: Result<Reply, Denied>,
    },
    /// Answer a hello.
    Welcome {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The life that it begins or goes on with.
        incarnation: Incarnation,
        /// Held there, not known or ended here: to be ended there.
        unknown: Vec<AttemptId>,
        /// Of the drain in force; none: it does not drain.
        drain: Option<DrainNotice>,
    },
    /// Answer a heartbeat: extend the lease.
    GrantLease {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The heartbeat.
        sequence: u64,
        /// Counted by the host from the heartbeat's sending.
        duration: Millis,
        /// Held there, not known or ended here: to be ended there.
        unknown: Vec<AttemptId>,
    },
    /// Order attempts. They are stored as placed before this is sent.
    Start {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// In the order in which they should start.
        attempts: Vec<(AttemptId, Epoch)>,
    },
    /// End attempts.
    Stop {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// What to end, and how.
        attempts: Vec<StopOrder>,
    },
    /// The ends of these are stored: the host may forget them.
    Acknowledge {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The attempts.
        attempts: Vec<AttemptId>,
    },
    /// Ask for attempts back that have not started, newest first.
    Recall {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// At most this many.
        count: u32,
    },
    /// Its jobs may know that it drains, and until when they have.
    NoticeDrain {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// What they are told.
        notice: DrainNotice,
    },
    /// Ask for the proof that nothing is left.
    AskDrained {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The drain to prove.
        revision: Revision,
        /// It may refuse while it holds work.
        refusable: bool,
    },
    /// The drain is proved: go as told.
    Release {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The drain that was proved.
        revision: Revision,
        /// How to go.
        then: DrainThen,
    },
    /// The drain is off: take work again.
    Reopen {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The drain that is off.
        revision: Revision,
    },
    /// Break a stream: its node is gone, replaced, or claimed twice.
    CloseSession {
        /// The node.
        node: NodeId,
        /// The stream.
        session: SessionId,
        /// The sentence for the other side.
        reason: String,
    },
    /// Make a host. Idempotent by `host`.
    CreateHost {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
        /// What to make.
        template: HostTemplate,
    },
    /// Wake a host that sleeps. Idempotent by `host`; its hello is the answer, or `HostFailed`.
    WakeHost {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
        /// The node that sleeps.
        node: NodeId,
    },
    /// Ask whether a host may be deleted. Answered by `HostDescribed`.
    AskHost {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
    },
    /// End a host. Idempotent by `host`.
    DeleteHost {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
        /// Its node, if it joined.
        node: Option<NodeId>,
    },
}

/// The answer to a request that was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The job is accepted (FL-1).
    Submitted {
        /// Its id.
        job: JobId,
        /// The key was known.
        existed: bool,
    },
    /// What a cancel did.
    Cancelled {
        /// Waiting tasks that ended at once.
        waiting: u32,
        /// Attempts that are being ended.
        stopping: u32,
        /// Tasks that had ended before.
        ended: u32,
    },
    /// What a retry did.
    Retried {
        /// Tasks that wait again.
        tasks: u32,
    },
    /// The node's record changed, or was already so.
    NodeChanged,
    /// A rolling drain has begun.
    Rolling {
        /// Its id.
        rolling: RollingId,
        /// Its nodes.
        nodes: BTreeSet<NodeId>,
        /// A sentence for each node that is not part of it.
        refused: Vec<String>,
    },
    /// A rolling drain was ended.
    RollingCancelled {
        /// Whose turn had not come: they stay as they are.
        waited: BTreeSet<NodeId>,
        /// Who drained for it: they take work again.
        resumed: BTreeSet<NodeId>,
    },
    /// The pool's policy is in force.
    PoolSet,
    /// The fleet goes on from what its store has.
    LossAccepted {
        /// A loss had been noticed.
        lost: bool,
    },
    /// Evictions and scale-in go on.
    BrakeReleased {
        /// They rested.
        held: bool,
        /// Nodes that are silent: they are given up, one after the other, as each has been for long enough.
        silent: u32,
    },
    /// The host may have a certificate for this node.
    Enrolled {
        /// The node.
        node: NodeId,
    },
}

/// How to end one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopOrder {
    /// The attempt.
    pub attempt: AttemptId,
    /// As it was ordered.
    pub epoch: Epoch,
    /// Recorded as its end, unless it ended by itself first.
    pub reason: StopReason,
    /// SIGTERM, this long, then the whole group; zero: at once.
    pub grace: Millis,
    /// Before that this signal, and as long a grace to save.
    pub first: Option<u8>,
}

/// What jobs of a node are told of its drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainNotice {
    /// What is left then is ended; none: there is no deadline.
    pub within: Option<Millis>,
}

/// Why an attempt is being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// An operator cancelled it.
    Cancelled,
    /// A drain evicts it.
    Drained,
    /// Work of higher priority takes its place.
    Preempted,
    /// Its result no longer counts.
    Superseded,
}

/// What a batch of events left to store, each record once, as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Jobs whose state changed; the record is [`Fleet::job`](crate::fleet::Fleet::job).
    pub jobs: BTreeSet<JobId>,
    /// Jobs accepted in this batch, and the request that brought each: the shell stores the body with it.
    pub accepted: BTreeMap<JobId, RequestId>,
    /// Nodes whose record changed; absent from the fleet: delete the row.
    pub nodes: BTreeSet<NodeId>,
    /// Pools whose record changed.
    pub pools: BTreeSet<PoolName>,
    /// Attempts, live or ended.
    pub attempts: BTreeMap<AttemptId, AttemptRecord>,
    /// Attempts that provably never started and were taken back: their rows go. The job remembers their numbers.
    pub withdrawn: BTreeSet<AttemptId>,
    /// Counters and leadership: [`Fleet::meta`](crate::fleet::Fleet::meta).
    pub meta: bool,
    /// History in order.
    pub history: Vec<HistoryEntry>,
    /// Second results, kept and never counted (FL-2).
    pub evidence: Vec<Evidence>,
}

impl Touched {
    /// Nothing is to be stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.meta
            && self.jobs.is_empty()
            && self.nodes.is_empty()
            && self.pools.is_empty()
            && self.attempts.is_empty()
            && self.withdrawn.is_empty()
            && self.history.is_empty()
            && self.evidence.is_empty()
    }
}

/// An attempt as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// Where.
    pub node: NodeId,
    /// The node's life at the placement.
    pub incarnation: Incarnation,
    /// The term of its epoch.
    pub term: Term,
    /// Why there.
    pub placement_reason: String,
    /// When it was placed.
    pub placed: Timestamp,
    /// When its start was reported.
    pub started: Option<Timestamp>,
    /// It is being ended, since when and why.
    pub stopping: Option<(Timestamp, StopReason)>,
    /// Its end.
    pub ended: Option<EndRecord>,
}

/// An attempt's end as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// How.
    pub end: End,
    /// When it was recorded.
    pub at: Timestamp,
    /// By the coordinator, not reported by the host.
    pub presumed: bool,
    /// What the shell keeps with it: usage, outputs, log tails.
    #[serde(skip)]
    pub detail: Vec<u8>,
}

/// A result that came after its task's end, or for an attempt that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The attempt that it claims.
    pub attempt: AttemptId,
    /// Who sent it.
    pub node: NodeId,
    /// The epoch that it claims.
    pub epoch: Epoch,
    /// What it claims.
    pub end: End,
    /// When it came.
    pub at: Timestamp,
    /// Why it does not count.
    pub reason: String,
}

/// One line of the append-only history: Watch, audit and `inspect` read it; it is never replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When.
    pub at: Timestamp,
    /// What it is about.
    pub subject: Subject,
    /// The kind of event: "submitted", "drain_proved".
    pub kind: String,
    /// The sentence for a person (FL-14).
    pub reason: String,
    /// Who caused it.
    pub actor: Option<Actor>,
}

/// What a history entry is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The coordinator itself.
    Fleet,
    /// A job.
    Job(JobId),
    /// A node.
    Node(NodeId),
    /// A pool. Scaling decisions have kind "scaled" and these sizes.
    Pool {
        /// The pool.
        name: PoolName,
        /// Of a scaling decision.
        sizes: Option<Sizes>,
    },
}

/// A scaling decision in numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Sizes {
    /// Hosts before.
    pub from: u32,
    /// Hosts that should follow.
    pub to: u32,
    /// All that it was made of, in a sentence.
    pub inputs: String,
}
