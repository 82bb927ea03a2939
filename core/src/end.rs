//! The closed table of how an attempt ends.

use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::resources::Bytes;

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Exit code 0.
    Succeeded,
    /// Another exit code.
    Exited(i32),
    /// A signal that was not ours.
    Signaled(i32),
    /// By `memory.events` of its own cgroup.
    OutOfMemory {
        /// The limit it ran into.
        limit_bytes: u64,
        /// The most it used.
        peak_bytes: u64,
    },
    /// The job's time limit.
    TimedOut,
    /// A limit other than time and memory.
    Limit(Limit),
    /// Asked for by an operator.
    Cancelled,
    /// A drain evicted it.
    Drained,
    /// Work of higher priority evicted it.
    Preempted,
    /// Its node was given up: presumed by the coordinator.
    NodeLost(NodeLoss),
    /// The host's spawner died, and the attempt with it.
    SpawnerLost,
    /// The host lacks this fence, or its policy refuses.
    Refused(String),
    /// It never ran: the step of the recipe and its errno.
    StartFailed {
        /// As in docs/sandbox.md: "exec", "mount.root".
        step: String,
        /// errno(3).
        errno: i32,
    },
    /// It ended, and its output could not be kept.
    OutputLost,
}

/// A limit other than time and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The working folder's.
    Disk,
    /// Of bytes written to stdout and stderr.
    Output,
}

/// Why a node was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeLoss {
    /// Nothing heard for longer than `lost_after`.
    Silent,
    /// It came back with another boot id.
    Rebooted,
}

/// Whose budget an end draws on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// None: the task is done.
    Nobody,
    /// The job's own failures.
    Job,
    /// The node's faults.
    Node,
    /// Drains and preemptions.
    Operator,
    /// Someone asked for exactly this; never retried.
    Requested,
}

impl End {
    /// Whose retry budget this end draws on.
    #[must_use]
    pub const fn blame(&self) -> Blame {
        match self {
            Self::Succeeded => Blame::Nobody,
            Self::Exited(_)
            | Self::Signaled(_)
            | Self::OutOfMemory { .. }
            | Self::TimedOut
            | Self::Limit(_)
            | Self::StartFailed { .. } => Blame::Job,
            Self::NodeLost(_) | Self::SpawnerLost | Self::Refused(_) | Self::OutputLost => Blame::Node,
            Self::Drained | Self::Preempted => Blame::Operator,
            Self::Cancelled => Blame::Requested,
        }
    }
}

/// Steps of a start that fail by what the job asked for.
const JOBS_OWN_STEPS: [&str; 5] = ["exec", "working_folder", "inputs", "note", "order"];

impl End {
    /// The host, or its spawner, was lost while the attempt ran: by chance, or through it.
    #[must_use]
    pub const fn takes_the_host_along(&self) -> bool {
        match self {
            Self::NodeLost(_) | Self::SpawnerLost => true,
            Self::Succeeded
            | Self::Exited(_)
            | Self::Signaled(_)
            | Self::OutOfMemory { .. }
            | Self::TimedOut
            | Self::Limit(_)
            | Self::Cancelled
            | Self::Drained
            | Self::Preempted
            | Self::Refused(_)
            | Self::StartFailed { .. }
            | Self::OutputLost => false,
        }
    }

    /// Speaks against the host too, whoever pays for the retry. A program that cannot be executed, a working folder
    /// that is not there, inputs that do not fit or do not go together, and an order that is too long for a host are
    /// their job's own fault, which would fail on every host alike; every other step of a start is the host's.
    #[must_use]
    pub fn speaks_against_the_host(&self) -> bool {
        match self {
            Self::StartFailed { step, .. } => !JOBS_OWN_STEPS.contains(&step.as_str()),
            other => other.blame() == Blame::Node,
        }
    }

    /// The name under which alike ends are counted: without figures that differ from one to the next.
    #[must_use]
    pub fn summary(&self) -> String {
        match self {
            Self::OutOfMemory { .. } => String::from("out_of_memory"),
            Self::Succeeded
            | Self::Exited(_)
            | Self::Signaled(_)
            | Self::TimedOut
            | Self::Limit(_)
            | Self::Cancelled
            | Self::Drained
            | Self::Preempted
            | Self::NodeLost(_)
            | Self::SpawnerLost
            | Self::Refused(_)
            | Self::StartFailed { .. }
            | Self::OutputLost => alloc::format!("{self}"),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Succeeded => f.write_str("succeeded"),
            Self::Exited(code) => write!(f, "exited({code})"),
            Self::Signaled(signal) => write!(f, "signaled({signal})"),
            Self::OutOfMemory { limit_bytes, peak_bytes } => {
                write!(f, "out_of_memory(limit {}, peak {})", Bytes(*limit_bytes), Bytes(*peak_bytes))
            }
            Self::TimedOut => f.write_str("timed_out"),
            Self::Limit(Limit::Disk) => f.write_str("limit(disk)"),
            Self::Limit(Limit::Output) => f.write_str("limit(output)"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Drained => f.write_str("drained"),
            Self::Preempted => f.write_str("preempted"),
            Self::NodeLost(NodeLoss::Silent) => f.write_str("node_lost(silent)"),
            Self::NodeLost(NodeLoss::Rebooted) => f.write_str("node_lost(rebooted)"),
            Self::SpawnerLost => f.write_str("spawner_lost"),
            Self::Refused(fence) => write!(f, "refused({fence})"),
            Self::StartFailed { step, errno } => write!(f, "start_failed({step}, errno {errno})"),
            Self::OutputLost => f.write_str("output_lost"),
        }
    }
}
