//! Every way one host's world can change, as its agent tells it to the rules.
//!
//! What comes from the coordinator comes in the order of its stream; what
//! comes from the spawner in the order of its socket. The shell never repeats
//! or reorders either.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    effect::{StopOrder, StopReason},
    end::End,
    event::DrainThen,
    ids::{AttemptId, Epoch, Revision, Term},
    resources::Resources,
    time::Millis,
};

/// Milliseconds of CLOCK_BOOTTIME: it counts suspend and is never set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Boottime(pub u64);

/// Random per life of a spawner: kept over its own upgrade, new after its death.
pub type SpawnerId = [u8; 16];

/// One change of a host's world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// The coordinator welcomed this agent on a new stream.
    Connected {
        /// Its leadership term.
        term: Term,
        /// Held here, unknown or ended there: to be ended here.
        unknown: Vec<AttemptId>,
    },
    /// The stream broke. Work goes on; ends are kept.
    Disconnected,
    /// A heartbeat is about to be handed to the stream; the lease counts from now.
    HeartbeatSent {
        /// Counts from 1 within a stream.
        sequence: u64,
    },
    /// The answer to a heartbeat.
    LeaseGranted {
        /// The heartbeat.
        sequence: u64,
        /// Counted from when that heartbeat was sent.
        duration: Millis,
        /// Held here, unknown or ended there: to be ended here.
        unknown: Vec<AttemptId>,
    },
    /// The coordinator ordered an attempt. The shell keeps what to run.
    StartOrdered(StartOrder),
    /// The coordinator ordered an attempt's end.
    StopOrdered(StopOrder),
    /// Give back what has not started, newest first.
    RecallOrdered {
        /// At most this many.
        count: u32,
    },
    /// The coordinator stored these ends.
    EndsStored {
        /// The attempts.
        attempts: Vec<AttemptId>,
    },
    /// Close yourself, and prove that nothing is left.
    DrainAsked {
        /// The drain.
        revision: Revision,
        /// May be refused while work is held.
        refusable: bool,
    },
    /// [`PersistClosure`](super::HostEffect::PersistClosure) is on disk.
    ClosurePersisted {
        /// The drain; none: open again.
        revision: Option<Revision>,
    },
    /// The drain is off.
    ReopenOrdered {
        /// The drain that is off.
        revision: Revision,
    },
    /// The drain was proved: go as told.
    ReleaseOrdered {
        /// The drain that was proved.
        revision: Revision,
        /// How to go.
        then: DrainThen,
    },
    /// A spawner answered hello and listed all that it holds.
    SpawnerListed {
        /// Which life of it.
        spawner: SpawnerId,
        /// All of it.
        held: Vec<Adopted>,
    },
    /// The connection to the spawner broke.
    SpawnerGone,
    /// User code runs.
    Started {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Nothing of the attempt runs any more (FL-5), or it never ran.
    Ended {
        /// The attempt.
        attempt: AttemptId,
        /// The spawner's word.
        verdict: Verdict,
    },
    /// Its outputs and its log are stored, or travel with the report.
    Sealed {
        /// The attempt.
        attempt: AttemptId,
        /// They could not be kept.
        output_lost: bool,
    },
}

/// An order to start, as far as the rules need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartOrder {
    /// The attempt.
    pub attempt: AttemptId,
    /// Fences it.
    pub epoch: Epoch,
    /// What it takes of the node's capacity.
    pub request: Resources,
    /// It may only run under a valid lease.
    pub exclusive: bool,
}

/// An attempt that a spawner holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// As it was ordered.
    pub order: StartOrder,
    /// How far it is.
    pub phase: AdoptedPhase,
    /// The stop that the agent's own notes tell of.
    pub stopping: Option<StopReason>,
}

/// How far an attempt is that a spawner holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdoptedPhase {
    /// It runs, and was not told to end.
    Running,
    /// It is being ended.
    Stopping,
    /// It is over.
    Ended(Verdict),
}

/// The spawner's word on how an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By itself or by a limit: this end stands whatever was ordered.
    Own(End),
    /// By our order to stop.
    Stopped,
    /// The host's own system stops it, and the coordinator was told: the time of that drain is over.
    Left,
    /// The node's lease ran out under an exclusive attempt.
    LeaseEnded,
    /// The spawner does not have it: it died with its spawner.
    Lost,
    /// The spawner refused the order: the sentence.
    Denied(String),
}
