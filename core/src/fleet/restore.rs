//! The state from its stored rows. What contradicts itself is damage, never guessed at.

use alloc::{format, string::String, vec::Vec};
use core::fmt;

use super::{Attempt, Fleet, Meta, Timer};
use crate::{
    effect::AttemptRecord,
    ids::{AttemptId, JobId, NodeId, PoolName},
    job::JobRecord,
    node::{Liveness, Node, NodeRecord},
    pool::{Pool, PoolRecord},
    time::Timestamp,
};

/// All rows that the state is made of.
#[derive(Debug, Default)]
pub struct Image {
    /// Counters and leadership.
    pub meta: Meta,
    /// All jobs.
    pub jobs: Vec<(JobId, JobRecord)>,
    /// All nodes.
    pub nodes: Vec<(NodeId, NodeRecord)>,
    /// All pools.
    pub pools: Vec<(PoolName, PoolRecord)>,
    /// Attempts that have not ended.
    pub attempts: Vec<(AttemptId, AttemptRecord)>,
}

/// The rows contradict one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage(pub String);

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the stored state contradicts itself: {}", self.0)
    }
}

impl core::error::Error for Damage {}

impl Fleet {
    /// The state from its rows. The driver then applies [`Led`](crate::event::Event::Led).
    ///
    /// # Errors
    /// Names the first row that contradicts another.
    pub fn restore(image: Image) -> Result<Self, Damage> {
        let mut fleet = Self { meta: image.meta, ..Self::default() };
        for (id, record) in image.pools {
            fleet.pools.insert(id, Pool::new(record));
        }
        for (id, record) in image.nodes {
            fleet.restore_node(id, record)?;
        }
        fleet.name_who_is_away();
        for (id, record) in image.jobs {
            if fleet.keys.insert(record.key.clone(), id).is_some() {
                return Err(Damage(format!("job {id} shares its idempotency key `{}` with another", record.key)));
            }
            fleet.open_jobs += usize::from(record.finished.is_none());
            fleet.jobs.insert(id, record);
        }
        for (id, record) in image.attempts {
            fleet.restore_attempt(id, record)?;
        }
        let nodes: Vec<NodeId> = fleet.nodes.keys().copied().collect();
        for id in nodes {
            fleet.promote(id);
        }
        let ids: Vec<JobId> = fleet.jobs.keys().copied().collect();
        for id in ids {
            fleet.check_tasks(id)?;
            fleet.requeue(id);
            if let Some((at, _)) = fleet.jobs.get(&id).and_then(|job| job.delayed.first()) {
                let at = *at;
                fleet.wake_at(at, Timer::Job(id));
            }
        }
        Ok(fleet)
    }

    fn restore_node(&mut self, id: NodeId, record: NodeRecord) -> Result<(), Damage> {
        if !matches!(record.liveness, Liveness::Gone(_)) && self.names.insert(record.name.clone(), id).is_some() {
            return Err(Damage(format!("two nodes have the name `{}`", record.name)));
        }
        if let Some(rolling) = record.rolling {
            if !self.meta.rollings.contains_key(&rolling) {
                return Err(Damage(format!("node {id} waits in the rolling drain {rolling}, which is not there")));
            }
            self.rollings.note(id, &record);
        }
        self.nodes.insert(id, Node::new(record, Timestamp(0)));
        self.unsettled.insert(id);
        Ok(())
    }

    /// Who has left by itself keeps its name until another takes it: a person calls a host that sleeps by it. A
    /// provider's host does not come back, and its name goes to the next.
    fn name_who_is_away(&mut self) {
        // The later of two: an earlier release let a machine take the name of one that slept beside it.
        for (id, node) in self.nodes.iter().rev() {
            if matches!(node.record.liveness, Liveness::Gone(_)) && node.record.host.is_none() {
                self.names.entry(node.record.name.clone()).or_insert(*id);
            }
        }
    }

    fn restore_attempt(&mut self, id: AttemptId, record: AttemptRecord) -> Result<(), Damage> {
        let job = self.jobs.get_mut(&id.job).ok_or_else(|| Damage(format!("attempt {id} has no job")))?;
        if job.live.insert(id.task, id.number).is_some() {
            return Err(Damage(format!("task {}.{} has two live attempts", id.job, id.task)));
        }
        let node = self.nodes.get_mut(&record.node).ok_or_else(|| Damage(format!("attempt {id} has no node")))?;
        node.attempts.insert(id);
        // What has started holds capacity; what was only sent gets it as far as there is room.
        let prefilled = record.started.is_none();
        if prefilled {
            node.prefilled.push_back(id);
        } else {
            node.allocated = node.allocated.plus(&job.spec.request);
        }
        self.attempts.insert(id, Attempt { record, prefilled, counted: None });
        Ok(())
    }

    fn check_tasks(&self, id: JobId) -> Result<(), Damage> {
        let Some(job) = self.jobs.get(&id) else { return Ok(()) };
        let ended: u64 = job.ended.values().map(|tasks| u64::from(tasks.len())).sum();
        let counted =
            u64::from(job.waiting.len()) + job.delayed.len() as u64 + (job.held.len() + job.live.len()) as u64 + ended;
        if counted == u64::from(job.spec.tasks) {
            Ok(())
        } else {
            Err(Damage(format!("job {id} has {} tasks, but {counted} are accounted for", job.spec.tasks)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Actor,
        resources::Resources,
        spec::{Delivery, JobSpec, OnDrain, Retries},
        time::Millis,
    };

    #[test]
    fn a_task_that_is_nowhere_or_in_two_places_is_damage() {
        let spec = JobSpec {
            name: "job".into(),
            owner: Actor("ana".into()),
            pool: None,
            priority: 0,
            tasks: 3,
            request: Resources::default(),
            fences: Default::default(),
            constraints: Default::default(),
            delivery: Delivery::AtLeastOnce,
            on_drain: OnDrain::Finish,
            retries: Retries::default(),
            time_limit: None,
            grace: Millis(0),
        };
        let whole = JobRecord::accepted(spec, "key".into(), [0; 32], Timestamp(1));
        let restore = |record: JobRecord| {
            Fleet::restore(Image { jobs: [(JobId(100), record)].into(), ..Image::default() }).map(|_| ())
        };
        assert_eq!(restore(whole.clone()), Ok(()));
        let mut nowhere = whole.clone();
        nowhere.waiting.remove(1);
        assert!(restore(nowhere).unwrap_err().0.contains("2 are accounted for"));
        let mut twice = whole;
        twice.held.insert(1);
        assert!(restore(twice).unwrap_err().0.contains("4 are accounted for"));
    }
}
