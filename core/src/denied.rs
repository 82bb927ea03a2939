//! Expected refusals: each is a sentence for a person, and names what to do.

use alloc::string::String;
use core::fmt;

use crate::{
    ids::{JobId, NodeId, PoolName},
    rolling::RollingId,
};

/// Why a request was refused. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// The idempotency key belongs to another request.
    KeyConflict {
        /// The key.
        key: String,
        /// The job that it made.
        job: JobId,
    },
    /// No such job.
    UnknownJob(JobId),
    /// The job has no such task.
    UnknownTask {
        /// The job.
        job: JobId,
        /// The task.
        task: u32,
        /// How many it has.
        tasks: u32,
    },
    /// No such node.
    UnknownNode(NodeId),
    /// No such rolling drain, or it is over.
    UnknownRolling(RollingId),
    /// No such pool.
    UnknownPool(PoolName),
    /// No node and no pool's template could ever hold one task of it.
    NeverFits {
        /// The sentence: "the largest node has 24 GiB of memory, and it asks 32 GiB; no pool makes larger ones".
        reason: String,
    },
    /// The node's state forbids what was asked.
    NodeState {
        /// The node's name.
        node: String,
        /// Its state.
        state: String,
        /// What was asked.
        asked: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The job's state forbids what was asked.
    JobState {
        /// The job.
        job: JobId,
        /// Its state.
        state: &'static str,
        /// What was asked.
        asked: &'static str,
    },
    /// The pool's state forbids what was asked.
    PoolState {
        /// The pool.
        pool: PoolName,
        /// What was asked.
        asked: &'static str,
        /// What it is.
        state: String,
        /// What to do.
        advice: &'static str,
    },
    /// The name belongs to a live node with another key.
    NameTaken {
        /// The name.
        name: String,
    },
    /// The policy contradicts itself.
    BadPolicy {
        /// The sentence.
        reason: String,
    },
    /// A named limit is reached.
    LimitReached {
        /// The limit, with its number.
        limit: String,
    },
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyConflict { key, job } => {
                write!(f, "the idempotency key `{key}` belongs to job {job}, which was another request; use a new key")
            }
            Self::UnknownJob(job) => write!(f, "there is no job {job}; `muster job list` shows those that are kept"),
            Self::UnknownTask { job, task, tasks } => {
                write!(f, "job {job} has no task {task}; it has {tasks}, counted from 0")
            }
            Self::UnknownNode(node) => {
                write!(f, "there is no node {node}; `muster node list` shows those that are known")
            }
            Self::UnknownRolling(id) => {
                write!(f, "there is no rolling drain {id}, or it is over; `muster drain list` shows those that go on")
            }
            Self::UnknownPool(pool) => write!(f, "there is no pool `{pool}`; `muster pool list` shows them"),
            Self::NeverFits { reason } | Self::BadPolicy { reason } => f.write_str(reason),
            Self::NodeState { node, state, asked, advice } => {
                write!(f, "cannot {asked} node {node}: it is {state}; {advice}")
            }
            Self::PoolState { pool, asked, state, advice } => {
                write!(f, "cannot {asked} pool {pool}: it is {state}; {advice}")
            }
            Self::JobState { job, state, asked } => write!(f, "cannot {asked} job {job}: it is {state}"),
            Self::NameTaken { name } => {
                write!(
                    f,
                    "the node name `{name}` belongs to a live node with another key; choose another name or remove that node"
                )
            }
            Self::LimitReached { limit } => write!(f, "refused by a limit: {limit}"),
        }
    }
}

impl core::error::Error for Denied {}
