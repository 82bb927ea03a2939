//! Every thing the rules of one host can ask its agent to do, in order.

use alloc::vec::Vec;

use crate::{
    end::End,
    event::DrainThen,
    ids::{AttemptId, Epoch, Revision},
    time::Millis,
};

use super::Boottime;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEffect {
    /// Hand the attempt to the spawner, with its inputs.
    /// Answered by `Started` and `Ended`, or by `Ended` alone.
    Start {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Note the reason so that it outlives this agent, then tell the spawner
    /// (or stop preparing). Answered by `Ended`.
    Stop {
        /// The attempt.
        attempt: AttemptId,
        /// To be noted.
        reason: crate::effect::StopReason,
        /// SIGTERM, this long, then the whole group; zero: at once.
        grace: Millis,
        /// Before that this signal, and as long a grace to save.
        first: Option<u8>,
    },
    /// Take what it left: output files and the rest of its log. Answered by `Sealed`.
    Seal {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Tell the coordinator that user code runs.
    ReportStarted {
        /// The attempt.
        attempt: AttemptId,
        /// As it was ordered.
        epoch: Epoch,
    },
    /// Tell the coordinator the end; repeated on each new stream until stored.
    ReportEnded {
        /// The attempt.
        attempt: AttemptId,
        /// As it was ordered.
        epoch: Epoch,
        /// How.
        end: End,
    },
    /// The end is stored there: drop all that is kept of it, here and in the spawner.
    Forget {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Tell the coordinator that these never started and never will; drop what to run.
    GiveBack {
        /// In the order in which they were given back.
        attempts: Vec<AttemptId>,
    },
    /// The node's lease ends then, and never earlier than said before.
    RenewLease {
        /// For the spawner's timer.
        deadline: Boottime,
    },
    /// Make it durable that this host is closed for this drain (none: open).
    /// Answered by `ClosurePersisted`.
    PersistClosure {
        /// The drain.
        revision: Option<Revision>,
    },
    /// Connect to the spawner anew, so that it lists all that it holds: the
    /// proof rests on its word, not on our record. Answered by `SpawnerListed`.
    ListSpawner,
    /// Nothing is left; sent only when that is true (FL-7).
    ProveDrained {
        /// The drain.
        revision: Revision,
    },
    /// Refuse a drain that may be refused.
    RefuseDrain {
        /// The drain.
        revision: Revision,
        /// The sentence.
        reason: alloc::string::String,
    },
    /// Leave for good, or stay closed.
    Release {
        /// How.
        then: DrainThen,
    },
    /// An order was not followed, and nothing else will be said about it: for the log.
    Ignore {
        /// What it named.
        attempt: AttemptId,
        /// Why not.
        reason: &'static str,
    },
}
