//! The promises that a state must keep, by number: checked by the transcripts,
//! the property tests and the simulator after each step.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
};
use core::fmt;

use crate::{
    effect::Touched,
    fleet::Fleet,
    ids::{JobId, NodeId},
    job::JobRecord,
    node::{Duty, Liveness, NodeRecord},
    rolling::RollingId,
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
    fleet.jobs().try_for_each(|(id, job)| check_job(fleet, *id, job))?;
    fleet.nodes().try_for_each(|(id, node)| check_node(fleet, id, node))?;
    check_rollings(fleet)?;
    let open = fleet.jobs().filter(|(_, job)| job.finished.is_none()).count();
    if open != fleet.open_jobs() {
        return broken("FL-1", format!("{open} jobs are not finished, and {} are counted", fleet.open_jobs()));
    }
    let on_nodes: usize = fleet.nodes().map(|(id, _)| fleet.attempts_on(id).count()).sum();
    let of_jobs: usize = fleet.jobs().map(|(_, job)| job.live.len()).sum();
    if on_nodes == of_jobs {
        Ok(())
    } else {
        broken("FL-3", format!("{on_nodes} attempts are on nodes, and jobs have {of_jobs}"))
    }
}

/// Checks what a batch touched; all else is as the batch before left it.
///
/// # Errors
/// The first promise that is broken.
pub fn check_touched(fleet: &Fleet, touched: &Touched) -> Result<(), Broken> {
    let jobs: BTreeSet<JobId> =
        touched.jobs.iter().copied().chain(touched.attempts.keys().map(|attempt| attempt.job)).collect();
    for id in jobs {
        if let Some(job) = fleet.job(id) {
            check_job(fleet, id, job)?;
        }
    }
    let nodes: BTreeSet<NodeId> =
        touched.nodes.iter().copied().chain(touched.attempts.values().map(|attempt| attempt.node)).collect();
    for id in nodes {
        if let Some(node) = fleet.node(id) {
            check_node(fleet, id, node)?;
        }
    }
    if fleet.meta().rollings.is_empty() { Ok(()) } else { check_rollings(fleet) }
}

fn broken(promise: &'static str, detail: String) -> Result<(), Broken> {
    Err(Broken { promise, detail })
}

/// FL-2: a task waits, is tried once, or has one end. FL-3: what is tried is on the node that its record names.
fn check_job(fleet: &Fleet, id: JobId, job: &JobRecord) -> Result<(), Broken> {
    let ended: u64 = job.ended.values().map(|tasks| u64::from(tasks.len())).sum();
    let elsewhere = (job.delayed.len() + job.held.len() + job.live.len()) as u64;
    let total = u64::from(job.waiting.len()) + elsewhere + ended;
    if total != u64::from(job.spec.tasks) {
        return broken("FL-2", format!("job {id} has {} tasks and accounts for {total}", job.spec.tasks));
    }
    for task in job.live.keys() {
        if job.waiting.contains(*task) || job.end_of(*task).is_some() {
            return broken("FL-2", format!("task {id}.{task} is live and somewhere else"));
        }
    }
    if job.finished.is_some() != job.is_done() {
        let (finished, done) = (job.finished.is_some(), job.is_done());
        return broken("FL-2", format!("job {id} is finished: {finished}, done: {done}"));
    }
    let mut tried = 0;
    for (attempt, record) in fleet.attempts_of(id) {
        tried += 1;
        if !fleet.is_on(attempt, record.node) {
            return broken("FL-3", format!("attempt {attempt} is not on {}, which its record names", record.node));
        }
    }
    if tried == job.live.len() {
        Ok(())
    } else {
        broken("FL-3", format!("job {id} has {} live tasks and {tried} attempts", job.live.len()))
    }
}

/// No more nodes drain for a rolling drain than it may have at once. FL-7: none waits in one that is over.
fn check_rollings(fleet: &Fleet) -> Result<(), Broken> {
    let mut drain: BTreeMap<RollingId, u32> = BTreeMap::new();
    for (_, node) in fleet.nodes() {
        if let Duty::Draining(now) = &node.duty
            && let Some(rolling) = now.rolling
        {
            *drain.entry(rolling).or_default() += 1;
        }
        if let Some(rolling) = node.rolling.filter(|rolling| !fleet.meta().rollings.contains_key(rolling)) {
            return broken("FL-7", format!("node {} waits in the rolling drain {rolling}, which is over", node.name));
        }
    }
    for (id, rolling) in &fleet.meta().rollings {
        let (now, most) = (drain.get(id).copied().unwrap_or_default(), rolling.order.at_once);
        if now > most {
            return broken("the drain budget", format!("{now} nodes drain for {id}, and {most} may at once"));
        }
    }
    Ok(())
}

/// FL-7: nothing is on record for a node that proved itself empty. FL-2: nor for one that was given up.
fn check_node(fleet: &Fleet, id: NodeId, node: &NodeRecord) -> Result<(), Broken> {
    let mut held = 0;
    for (attempt, record) in fleet.attempts_on(id) {
        held += 1;
        if record.node != id {
            return broken("FL-3", format!("attempt {attempt} is on {id} and, by its record, on {}", record.node));
        }
    }
    let proved = matches!(node.duty, Duty::Drained { .. } | Duty::Stopping { .. });
    let given_up = matches!(node.liveness, Liveness::Lost(_) | Liveness::Gone(_));
    if held > 0 && (proved || given_up) {
        let promise = if proved { "FL-7" } else { "FL-2" };
        return broken(promise, format!("node {} is {} with {held} attempts on record", node.name, node.state()));
    }
    Ok(())
}
