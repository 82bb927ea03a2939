//! What really happened, and whether the fleet may have let it happen.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    fleet::Fleet,
    ids::{AttemptId, JobId, NodeId, TaskIndex},
    lease,
    node::{Duty, Liveness},
    spec::Delivery,
    time::Timestamp,
};

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// "FL-4".
    pub promise: &'static str,
    /// What happened.
    pub detail: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is broken: {}", self.promise, self.detail)
    }
}

/// A process that runs user code, wherever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    host: usize,
}

/// All that no part of the fleet can see at once.
#[derive(Debug, Default)]
pub struct Truth {
    running: BTreeMap<AttemptId, Run>,
    starts: BTreeMap<(JobId, TaskIndex), u32>,
    ordered: BTreeSet<AttemptId>,
    led: Timestamp,
    accepted: BTreeMap<JobId, Delivery>,
    pub starts_total: u64,
}

impl Truth {
    pub fn accept(&mut self, job: JobId, delivery: Delivery) {
        self.accepted.insert(job, delivery);
    }

    pub fn accept_new(&mut self, fleet: &Fleet) {
        let last = self.accepted.keys().next_back().copied();
        for (job, record) in fleet.jobs().rev().take_while(|(job, _)| last.is_none_or(|last| **job > last)) {
            self.accepted.insert(*job, record.spec.delivery);
        }
    }

    pub fn accepted_jobs(&self) -> impl Iterator<Item = JobId> + '_ {
        self.accepted.keys().copied()
    }

    /// A coordinator begins to lead.
    pub const fn led(&mut self, now: Timestamp) {
        self.led = now;
    }

    /// An order leaves the coordinator: the same attempt is never ordered twice.
    pub fn ordered(&mut self, attempt: AttemptId) -> Result<(), Violation> {
        if self.ordered.insert(attempt) {
            return Ok(());
        }
        Err(Violation { promise: "FL-4", detail: format!("attempt {attempt} was ordered twice") })
    }

    /// User code of this attempt begins on this host.
    pub fn started(&mut self, attempt: AttemptId, host: usize) -> Result<(), Violation> {
        let broken = |promise, detail| Err(Violation { promise, detail });
        if self.running.insert(attempt, Run { host }).is_some() {
            return broken("FL-4", format!("attempt {attempt} was started while it runs"));
        }
        self.starts_total += 1;
        let starts = self.starts.entry((attempt.job, attempt.task)).or_default();
        *starts += 1;
        let others: Vec<AttemptId> = self
            .running
            .keys()
            .filter(|other| (other.job, other.task) == (attempt.job, attempt.task) && **other != attempt)
            .copied()
            .collect();
        match self.accepted.get(&attempt.job) {
            None => broken("FL-1", format!("attempt {attempt} runs, and its job was never answered as accepted")),
            Some(Delivery::AtMostOnce) if *starts > 1 => {
                broken("FL-4", format!("task {}.{} was started {starts} times", attempt.job, attempt.task))
            }
            Some(Delivery::Exclusive) if !others.is_empty() => {
                broken("FL-3", format!("attempt {attempt} starts while {others:?} run"))
            }
            Some(Delivery::AtLeastOnce | Delivery::AtMostOnce | Delivery::Exclusive) => Ok(()),
        }
    }

    /// No process of this attempt runs any more.
    pub fn ended(&mut self, attempt: AttemptId) {
        self.running.remove(&attempt);
    }

    pub fn ended_on(&mut self, host: usize) {
        self.running.retain(|_, run| run.host != host);
    }

    /// The host says that an attempt is over.
    pub fn check_reported_end(&self, attempt: AttemptId) -> Result<(), Violation> {
        match self.running.get(&attempt) {
            Some(run) => Err(Violation {
                promise: "FL-5",
                detail: format!("attempt {attempt} was reported ended and runs on host {}", run.host),
            }),
            None => Ok(()),
        }
    }

    /// After each committed batch.
    pub fn check(&self, fleet: &Fleet, hosts: &BTreeMap<NodeId, usize>) -> Result<(), Violation> {
        muster_core::invariants::check(fleet)
            .map_err(|broken| Violation { promise: broken.promise, detail: broken.detail })?;
        if let Some(lost) = self.accepted.keys().find(|job| fleet.job(**job).is_none()) {
            return Err(Violation { promise: "FL-1", detail: format!("job {lost} was accepted and is not known") });
        }
        let busy: BTreeSet<usize> = self.running.values().map(|run| run.host).collect();
        for (id, node) in fleet.nodes() {
            // A new leader holds nobody silent before one full lease has passed (FL-12).
            if let Liveness::Silent(since) | Liveness::Lost(since) = node.liveness
                && since >= self.led
                && since.since(self.led) < lease::duration()
            {
                return Err(Violation {
                    promise: "FL-12",
                    detail: format!(
                        "node {} was given up {} after a new leader began",
                        node.name,
                        since.since(self.led)
                    ),
                });
            }
            let proved = matches!(node.duty, Duty::Drained { .. } | Duty::Stopping { .. });
            if proved && hosts.get(&id).is_some_and(|host| busy.contains(host)) {
                return Err(Violation {
                    promise: "FL-7",
                    detail: format!("node {} is {} and runs work", node.name, node.state()),
                });
            }
        }
        Ok(())
    }
}
