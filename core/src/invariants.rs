//! The promises that a state must keep, by number: checked by the transcripts,
//! the property tests and the simulator after each step.

use alloc::{collections::BTreeMap, format, string::String};
use core::fmt;

use crate::{
    fleet::Fleet,
    ids::{AttemptId, NodeId},
    node::{Duty, Liveness},
    policy::ProviderKind,
    pool::Host,
};

/// A promise that a state breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// As in ARCHITECTURE.md: "FL-2".
    pub promise: &'static str,
    /// What is wrong.
    pub detail: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is broken: {}", self.promise, self.detail)
    }
}

/// Checks what can be seen in one state.
///
/// # Errors
/// The first promise that it breaks.
pub fn check(fleet: &Fleet) -> Result<(), Broken> {
    every_task_is_in_exactly_one_place(fleet)?;
    attempts_and_nodes_agree(fleet)?;
    a_proved_node_is_empty(fleet)?;
    pools_keep_their_maximum(fleet)
}

fn broken(promise: &'static str, detail: String) -> Result<(), Broken> {
    Err(Broken { promise, detail })
}

/// FL-2: a task waits, is tried once, or has one end.
fn every_task_is_in_exactly_one_place(fleet: &Fleet) -> Result<(), Broken> {
    for (id, job) in fleet.jobs() {
        let ended: u64 = job.ended.values().map(|tasks| u64::from(tasks.len())).sum();
        let total = u64::from(job.waiting.len()) + job.delayed.len() as u64 + job.live.len() as u64 + ended;
        if total != u64::from(job.spec.tasks) {
            return broken("FL-2", format!("job {id} has {} tasks and accounts for {total}", job.spec.tasks));
        }
        for task in job.live.keys() {
            if job.waiting.contains(*task) || job.end_of(*task).is_some() {
                return broken("FL-2", format!("task {id}.{task} is live and somewhere else"));
            }
        }
        if job.finished.is_some() != job.is_done() {
            return broken(
                "FL-2",
                format!("job {id} is finished: {}, done: {}", job.finished.is_some(), job.is_done()),
            );
        }
    }
    Ok(())
}

/// Each live attempt is on the node that its record names, and on no other.
fn attempts_and_nodes_agree(fleet: &Fleet) -> Result<(), Broken> {
    let mut placed: BTreeMap<AttemptId, NodeId> = BTreeMap::new();
    for (node, _) in fleet.nodes() {
        for (attempt, record) in fleet.attempts_on(node) {
            if record.node != node || placed.insert(attempt, node).is_some() {
                return broken("FL-3", format!("attempt {attempt} is on {node} and elsewhere"));
            }
        }
    }
    for (id, job) in fleet.jobs() {
        let live = fleet.attempts_of(*id).count();
        let on_nodes = placed.range(first_of(*id)..).take_while(|(attempt, _)| attempt.job == *id).count();
        if live != job.live.len() || on_nodes != live {
            return broken(
                "FL-3",
                format!("job {id} has {} live tasks, {live} attempts, {on_nodes} on nodes", job.live.len()),
            );
        }
    }
    Ok(())
}

fn first_of(job: crate::ids::JobId) -> AttemptId {
    AttemptId { job, task: 0, number: core::num::NonZeroU32::MIN }
}

/// FL-7: nothing is on record for a node that proved itself empty. FL-2: nor for one that was given up.
fn a_proved_node_is_empty(fleet: &Fleet) -> Result<(), Broken> {
    for (id, node) in fleet.nodes() {
        let held = fleet.attempts_on(id).count();
        let proved = matches!(node.duty, Duty::Drained { .. } | Duty::Stopping { .. });
        let given_up = matches!(node.liveness, Liveness::Lost(_) | Liveness::Gone(_));
        if held > 0 && (proved || given_up) {
            let promise = if proved { "FL-7" } else { "FL-2" };
            return broken(promise, format!("node {} is {} with {held} attempts on record", node.name, node.state()));
        }
    }
    Ok(())
}

/// FL-11: all hosts that were requested and are not confirmed gone are within the maximum.
fn pools_keep_their_maximum(fleet: &Fleet) -> Result<(), Broken> {
    for (name, pool) in fleet.pools() {
        let booting_or_joined = pool.hosts.values().filter(|host| !matches!(host, Host::Deleting { .. })).count();
        if pool.policy.provider == ProviderKind::Local && booting_or_joined > pool.policy.max as usize {
            return broken(
                "FL-11",
                format!("pool {} has {booting_or_joined} hosts, at most {}", name, pool.policy.max),
            );
        }
    }
    Ok(())
}
