//! Every way the world can change, as the driver tells it to the core.
//!
//! A request of an operator carries a [`RequestId`] and gets exactly one
//! [`Reply`](crate::effect::Reply). What comes from a node carries the
//! [`SessionId`] of the stream that it came on: a message of an older stream
//! is from before a reconnect, and the core tells the two apart.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet},
    string::String,
    vec::Vec,
};

use serde::{Deserialize, Serialize};

use crate::{
    end::End,
    ids::{
        Actor, AttemptId, Epoch, HostRequestId, JobId, NodeId, PoolName, RequestId, Revision, SessionId, TaskIndex,
        Term,
    },
    policy::PoolPolicy,
    resources::Resources,
    rolling::{RollingId, RollingOrder},
    spec::JobSpec,
    time::{Millis, Timestamp},
    timeline::Seen,
};

/// One change of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This coordinator leads from now on, with all that is restored from the store.
    Led {
        /// Greater than any before.
        term: Term,
    },
    /// So many commits were stored before this leader; told before [`Self::Led`].
    Stored {
        /// 0: it is new.
        commits: u64,
    },
    /// Time passed; sent at [`Fleet::next_wake`](crate::fleet::Fleet::next_wake), and harmless at any time.
    Tick,

    /// Accept a job.
    Submit {
        /// Answered with `Submitted`.
        request: RequestId,
        /// The caller's idempotency key.
        key: String,
        /// Digest of all that was asked: the same key with another digest is a conflict.
        digest: [u8; 32],
        /// What the rules need of it.
        spec: JobSpec,
    },
    /// End a job, or some of its tasks.
    Cancel {
        /// Answered with `Cancelled`.
        request: RequestId,
        /// The job.
        job: JobId,
        /// None: all of them.
        tasks: Option<Vec<TaskIndex>>,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Place the failed and cancelled tasks of a job again, with fresh budgets.
    Retry {
        /// Answered with `Retried`.
        request: RequestId,
        /// The job.
        job: JobId,
        /// Who asks.
        actor: Actor,
    },
    /// Place nothing new on a node.
    Cordon {
        /// Answered with `NodeChanged`.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Undo a cordon.
    Uncordon {
        /// Answered with `NodeChanged`.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Empty a node, and then do with it as asked.
    Drain {
        /// Answered with `NodeChanged`.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// What is asked.
        order: DrainOrder,
    },
    /// Empty nodes in turn: at most so many of them at once.
    DrainRolling {
        /// Answered with `Rolling`.
        request: RequestId,
        /// The nodes.
        nodes: Vec<NodeId>,
        /// What is asked for each.
        order: RollingOrder,
    },
    /// End a rolling drain: whose turn has not come stays, who drains for it is resumed.
    CancelRolling {
        /// Answered with `RollingCancelled`.
        request: RequestId,
        /// Which.
        rolling: RollingId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Cancel a drain and restore the duty from before it.
    Resume {
        /// Answered with `NodeChanged`.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Forget a node. Refused while it is live, unless forced.
    RemoveNode {
        /// Answered with `NodeChanged`.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// Although it is live or has work: its attempts end as node_lost.
        force: bool,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// Make a pool, or replace its policy.
    SetPool {
        /// Answered with `PoolSet`.
        request: RequestId,
        /// The whole policy.
        policy: Box<PoolPolicy>,
        /// Who asks.
        actor: Actor,
    },

    /// Steer a pool otherwise than by its policy.
    SteerPool {
        /// Answered with `PoolSet`.
        request: RequestId,
        /// The pool.
        pool: PoolName,
        /// How.
        order: PoolOrder,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },

    /// Go on although the store lost writes that were answered.
    AcceptLoss {
        /// Answered with `LossAccepted`.
        request: RequestId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },

    /// Give up nodes that have been silent for long enough, although much of the fleet fell silent at once.
    ReleaseBrake {
        /// Answered with `BrakeReleased`.
        request: RequestId,
        /// Who asks.
        actor: Actor,
        /// Why.
        reason: String,
    },

    /// A host holds a valid token and wants a certificate.
    Enroll {
        /// Answered with `Enrolled`.
        request: RequestId,
        /// Unique in the fleet; a lost or gone node's name may be taken over.
        name: String,
        /// The token's pool.
        pool: PoolName,
        /// The provider's request that this host came from.
        host: Option<HostRequestId>,
        /// SHA-256 of the public key; the same key enrols as the same node.
        key: [u8; 32],
        /// The highest number that a certificate of this fleet has shown of a node that is not known; 0: none has.
        shown: NodeId,
    },
    /// What a host was told last, told by its hello, before it.
    HostSaw {
        /// By its certificate.
        node: NodeId,
        /// By whichever leader.
        seen: Seen,
    },
    /// A node opened its stream and said hello.
    NodeConnected {
        /// By its certificate.
        node: NodeId,
        /// SHA-256 of its public key, by its certificate.
        key: [u8; 32],
        /// The new stream.
        session: SessionId,
        /// What it said.
        hello: Hello,
    },
    /// A stream broke. Says nothing about the node: only the lease does.
    NodeDisconnected {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
    },
    /// A heartbeat.
    Heartbeat {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// Echoed in the lease.
        sequence: u64,
        /// Host figures that rules read; absent where it could not read them.
        sample: HostSample,
        /// All that it holds.
        held: Vec<Held>,
    },
    /// User code may run from here on.
    AttemptStarted {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The attempt.
        attempt: AttemptId,
        /// As it was ordered.
        epoch: Epoch,
    },
    /// An attempt is over: its group is empty, its output is stored.
    AttemptEnded {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The attempt.
        attempt: AttemptId,
        /// As it was ordered.
        epoch: Epoch,
        /// How.
        end: End,
        /// How long it ran, by the host's clock; none: only our own clock can tell.
        wall: Option<Millis>,
        /// What the shell keeps with the record: usage, outputs, log tails. Opaque here.
        detail: Vec<u8>,
    },
    /// Attempts that the agent never started and never will.
    GivenBack {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The attempts.
        attempts: Vec<AttemptId>,
    },
    /// The agent proved that nothing is left.
    DrainProved {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The drain that it proves.
        revision: Revision,
    },
    /// The agent refused a scale-in drain.
    DrainRefused {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The drain that it refuses.
        revision: Revision,
        /// Its sentence.
        reason: String,
    },
    /// The host is being stopped by its own system.
    StopNotice {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// Its sentence.
        reason: String,
        /// The time it has.
        within: Option<Millis>,
    },

    /// A killed attempt does not end on its node: nothing more is placed there.
    AttemptStuck {
        /// The node.
        node: NodeId,
        /// Its stream.
        session: SessionId,
        /// The attempt.
        attempt: AttemptId,
    },

    /// A provider could not make a host.
    HostFailed {
        /// The pool.
        pool: PoolName,
        /// The request.
        host: HostRequestId,
        /// The provider's sentence.
        reason: String,
    },
    /// A provider confirmed that a host is gone (or never came to be).
    HostGone {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
    },
    /// A provider could not delete a host: it goes back to ready.
    HostDeleteFailed {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
        /// The provider's sentence.
        reason: String,
    },
    /// A provider was asked whether a host may be deleted.
    HostDescribed {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
        /// Why it is not; none: it may be.
        kept: Option<String>,
    },
    /// A provider was asked for its hosts.
    ProviderHeard {
        /// A pool of its.
        pool: PoolName,
        /// Why it gives no answer; none: it does.
        trouble: Option<String>,
    },
}

/// What an operator does to a pool besides setting its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolOrder {
    /// All scaling rests.
    Pause,
    /// It goes on by the policy alone: no pause, neither an operator's nor for failed hosts, and no size of its own.
    Resume,
    /// So many hosts, whatever the policy says, up to its maximum.
    Scale {
        /// So many.
        size: u32,
        /// Until then; none: until it is resumed.
        until: Option<Timestamp>,
    },
    /// Forget it; only if it is empty.
    Delete,
}

/// What a drain asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainOrder {
    /// Evict what is left then; none: wait for ever.
    pub deadline: Option<Timestamp>,
    /// What follows.
    pub then: DrainThen,
    /// The agent may refuse while it holds work (scale-in).
    pub refusable: bool,
    /// Who asks.
    pub actor: Actor,
    /// Why.
    pub reason: String,
}

/// What follows a drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainThen {
    /// The agent stays connected, closed to work.
    #[default]
    Nothing,
    /// The agent exits and stays down.
    Stop,
    /// The spawner powers the host off.
    Poweroff,
    /// The provider deletes the host.
    Delete,
}

impl DrainThen {
    /// The word of the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Stop => "stop",
            Self::Poweroff => "poweroff",
            Self::Delete => "delete",
        }
    }
}

/// What a node says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Tells a reboot from silence.
    pub boot_id: String,
    /// Grows at each start of the agent: what an older one was sent and does not hold was never started.
    pub agent_start: u64,
    /// Counts the streams that this start of the agent has opened: what it held at an older one says nothing about
    /// now. 0: its version does not count them.
    pub stream: u64,
    /// Random per installation: with `boot_id` it tells a cloned disk from a restart.
    pub instance: String,
    /// What it has.
    pub capacity: Resources,
    /// Operator's labels.
    pub labels: BTreeMap<String, String>,
    /// Fences that it can raise.
    pub fences: BTreeSet<String>,
    /// All that it holds.
    pub held: Vec<Held>,
    /// The last drain that it closed itself for.
    pub closed_for_drain: Revision,
    /// Shown only: "muster 0.1.0, Linux 6.1.0".
    pub version: String,
}

/// An attempt that a host holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The attempt.
    pub attempt: AttemptId,
    /// As it was ordered.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: HeldPhase,
}

/// How far a held attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldPhase {
    /// Received, not started.
    Queued,
    /// User code may run.
    Running,
    /// Being ended.
    Stopping,
    /// Ended; not yet acknowledged.
    Ended,
}

/// Host figures that rules read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSample {
    /// Busy thousandths of a core.
    pub cpu_used_milli: Option<u64>,
    /// Memory in use.
    pub memory_used_bytes: Option<u64>,
    /// Size of the disk that keeps its attempts' output.
    pub disk_total_bytes: Option<u64>,
    /// What is free of it.
    pub disk_available_bytes: Option<u64>,
    /// Thousandths of the last seconds in which some work stood still for want of CPU, memory or disk.
    pub pressure_permille: Option<u64>,
}
