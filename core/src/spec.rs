//! What a job asks, as far as the rules need it. What it runs (arguments,
//! files, environment) is the shell's business and never comes in here.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{Actor, PoolName, TaskIndex},
    resources::Resources,
    time::Millis,
};

/// How often a task may be started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// Work on a lost node is placed again; the first result counts.
    #[default]
    AtLeastOnce,
    /// Never placed again once a start may have happened (FL-4).
    AtMostOnce,
    /// Placed again only after the old lease has provably ended (FL-3).
    Exclusive,
}

/// What a drain does to a running attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDrain {
    /// It may finish inside the drain's deadline.
    #[default]
    Finish,
    /// SIGTERM, grace, and the task is placed elsewhere.
    Requeue,
    /// Its own signal and its grace to save what it has done; then as [`Self::Requeue`], at no budget.
    Checkpoint {
        /// The signal's number, one of [`CHECKPOINT_SIGNALS`].
        signal: u8,
    },
}

/// Signals that may ask a job to save, by name and Linux's number; the first is what is not said.
pub const CHECKPOINT_SIGNALS: [(&str, u8); 7] =
    [("USR1", 10), ("USR2", 12), ("TERM", 15), ("INT", 2), ("HUP", 1), ("QUIT", 3), ("CONT", 18)];

/// Retries by cause: one cause never uses up another's budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retries {
    /// After a failure of the job's own.
    pub failed: u32,
    /// After a lost node or spawner, or a refusal of the host. Ignored for at-most-once.
    pub lost: u32,
    /// After a drain or a preemption evicted it.
    pub drained: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self { failed: 0, lost: 3, drained: 16 }
    }
}

/// The part of a job that decisions are made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Shown only.
    pub name: String,
    /// The identity that submitted it.
    pub owner: Actor,
    /// Only nodes of this pool; any if absent.
    pub pool: Option<PoolName>,
    /// Higher goes first.
    pub priority: i32,
    /// Members of the array, at least one.
    pub tasks: TaskIndex,
    /// What one attempt takes.
    pub request: Resources,
    /// Fences that its host must have (profile less `--without`).
    pub fences: BTreeSet<String>,
    /// Labels that its node must carry.
    pub constraints: BTreeMap<String, String>,
    /// How often a task may be started.
    pub delivery: Delivery,
    /// What a drain does to it.
    pub on_drain: OnDrain,
    /// Retries by cause.
    pub retries: Retries,
    /// Longest time an attempt may run; the host holds it.
    pub time_limit: Option<Millis>,
    /// Between SIGTERM and the end of the whole group.
    pub grace: Millis,
}
