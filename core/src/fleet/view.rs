//! What the shell reads: records as they are, and why they are so.

use alloc::{collections::BTreeSet, format, string::String, vec::Vec};

use super::{Fleet, Meta, gauge};
use crate::{
    autoscale::{self, PoolView},
    effect::AttemptRecord,
    ids::{AttemptId, JobId, NodeId, PoolName},
    job::JobRecord,
    limits,
    node::{Liveness, NodeRecord},
    placement,
    pool::PoolRecord,
    queue::Class,
    resources::Resources,
    rolling::{self, Rolling, RollingId},
    spec::OnDrain,
    time::{Millis, Timestamp},
};

/// A node's figures beside its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Shown as STATE.
    pub state: &'static str,
    /// Taken by what holds capacity.
    pub allocated: Resources,
    /// Attempts that hold capacity.
    pub running: u32,
    /// Attempts that were sent ahead.
    pub queued: u32,
    /// A stream is open.
    pub is_connected: bool,
}

/// An attempt that a drain waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The attempt.
    pub attempt: AttemptId,
    /// Since its start, or its placement if it has not started.
    pub age: Millis,
    /// By its time limit or the drain's deadline, whichever comes first.
    pub ends_by: Option<Timestamp>,
    /// What the drain does to it.
    pub on_drain: OnDrain,
    /// By how long this node's last tasks ran; none: it has outlasted them, or there were none.
    pub expected: Option<Timestamp>,
}

/// A rolling drain with what it still has.
#[derive(Clone, Debug)]
pub struct RollingView<'a> {
    /// As it is stored.
    pub rolling: &'a Rolling,
    /// Whose turn has not come.
    pub waiting: BTreeSet<NodeId>,
    /// Who drains now.
    pub draining: BTreeSet<NodeId>,
    /// How long it goes on, if all goes as before; none: nothing tells.
    pub left: Option<Millis>,
}

impl Fleet {
    /// Counters and leadership.
    #[must_use]
    pub const fn meta(&self) -> &Meta {
        &self.meta
    }

    /// One job.
    #[must_use]
    pub fn job(&self, id: JobId) -> Option<&JobRecord> {
        self.jobs.get(&id)
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> impl DoubleEndedIterator<Item = (&JobId, &JobRecord)> {
        self.jobs.iter()
    }

    /// How many jobs are not finished.
    #[must_use]
    pub const fn open_jobs(&self) -> usize {
        self.open_jobs
    }

    /// One node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        self.nodes.get(&id).map(|node| &node.record)
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &NodeRecord)> {
        self.nodes.iter().map(|(id, node)| (*id, &node.record))
    }

    /// The node with this name.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// A node's figures.
    #[must_use]
    pub fn node_view(&self, id: NodeId) -> Option<NodeView> {
        let node = self.nodes.get(&id)?;
        let all = u32::try_from(node.attempts.len()).unwrap_or(u32::MAX);
        let queued = u32::try_from(node.prefilled.len()).unwrap_or(u32::MAX);
        Some(NodeView {
            state: node.record.state(),
            allocated: node.allocated,
            running: all - queued,
            queued,
            is_connected: node.session.is_some(),
        })
    }

    /// One pool.
    #[must_use]
    pub fn pool(&self, name: &PoolName) -> Option<&PoolRecord> {
        self.pools.get(name).map(|pool| &pool.record)
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = (&PoolName, &PoolRecord)> {
        self.pools.iter().map(|(name, pool)| (name, &pool.record))
    }

    /// One live attempt.
    #[must_use]
    pub fn attempt(&self, id: AttemptId) -> Option<&AttemptRecord> {
        self.attempts.get(&id).map(|attempt| &attempt.record)
    }

    /// Live attempts of a job, in task order.
    pub fn attempts_of(&self, job: JobId) -> impl Iterator<Item = (AttemptId, &AttemptRecord)> {
        let live = self.jobs.get(&job).into_iter().flat_map(|job| job.live.iter());
        live.filter_map(move |(task, number)| {
            let id = AttemptId { job, task: *task, number: *number };
            Some((id, &self.attempts.get(&id)?.record))
        })
    }

    /// Live attempts on a node.
    pub fn attempts_on(&self, node: NodeId) -> impl Iterator<Item = (AttemptId, &AttemptRecord)> {
        let ids = self.nodes.get(&node).into_iter().flat_map(|node| node.attempts.iter());
        ids.filter_map(|id| Some((*id, &self.attempts.get(id)?.record)))
    }

    /// Is this attempt among those on the node?
    #[must_use]
    pub fn is_on(&self, attempt: AttemptId, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.attempts.contains(&attempt))
    }

    /// Tasks that wait, in line or after a failure.
    #[must_use]
    pub fn tasks_waiting(&self) -> u64 {
        self.queue.tasks_where(|_| true)
    }

    /// Why the job's next task waits; none: nothing of it waits.
    #[must_use]
    pub fn explain_wait(&self, id: JobId) -> Option<String> {
        let job = self.jobs.get(&id)?;
        if job.waiting.is_empty() && job.delayed.is_empty() && !job.held.is_empty() {
            return Some(format!(
                "{} tasks are held: each brought down {} nodes, or fewer {} times; `muster job retry` tries them \
                 again, `muster job cancel` ends them",
                job.held.len(),
                limits::POISON_NODES,
                limits::POISON_FALLS
            ));
        }
        if job.waiting.is_empty() {
            let (at, _) = job.delayed.first()?;
            return Some(format!("{} tasks pause after a failure, the first until {}", job.delayed.len(), at.0));
        }
        let why = placement::explain(&Class::of(&job.spec), self.nodes.values());
        match self.queue.ahead_of(id, &job.spec) {
            0 => Some(why),
            ahead => Some(format!("{ahead} jobs of its kind are ahead; {why}")),
        }
    }

    /// Why the pool has the size that it has, a line a rule.
    #[must_use]
    pub fn explain_pool(&self, name: &PoolName) -> Vec<String> {
        let Some(pool) = self.pools.get(name) else { return Vec::new() };
        if pool.is_fixed() {
            return Vec::from([String::from("size        as it is: its policy has no preset, no rule and no minimum")]);
        }
        autoscale::explain(&pool.record.policy, &pool.view)
    }

    /// The pool as it was last looked at.
    #[must_use]
    pub fn pool_view(&self, name: &PoolName) -> Option<&PoolView> {
        self.pools.get(name).map(|pool| &pool.view)
    }

    /// Hosts of a pool that boot or are being woken.
    #[must_use]
    pub fn booting(&self, name: &PoolName) -> usize {
        self.pools.get(name).map_or(0, |pool| gauge::booting(&pool.record.hosts)) as usize
    }

    /// What a drain of the node waits for, longest first.
    #[must_use]
    pub fn blockers(&self, id: NodeId, now: Timestamp) -> Vec<Blocker> {
        let deadline = self.nodes.get(&id).and_then(|node| node.record.drain()).and_then(|drain| drain.order.deadline);
        let mean = self.nodes.get(&id).and_then(|node| node.mean_task);
        let mut blockers: Vec<Blocker> = self
            .attempts_on(id)
            .filter_map(|(attempt, record)| {
                let spec = &self.jobs.get(&attempt.job)?.spec;
                let since = record.started.unwrap_or(record.placed);
                let limit = spec.time_limit.map(|limit| since + limit);
                let ends_by = match (limit, deadline) {
                    (Some(limit), Some(deadline)) => Some(limit.min(deadline)),
                    (one, other) => one.or(other),
                };
                let usual = mean.map(|mean| since + mean).filter(|at| *at > now);
                let expected = match (spec.on_drain, usual, ends_by) {
                    (OnDrain::Requeue, ..) => Some(now + spec.grace),
                    (OnDrain::Checkpoint { .. }, ..) => Some(now + spec.grace + spec.grace),
                    (OnDrain::Finish, Some(usual), Some(most)) => Some(usual.min(most)),
                    (OnDrain::Finish, usual, _) => usual,
                };
                let (age, on_drain) = (now.since(since), spec.on_drain);
                Some(Blocker { attempt, age, ends_by, on_drain, expected })
            })
            .collect();
        blockers.sort_by_key(|blocker| core::cmp::Reverse(blocker.age));
        blockers
    }

    /// A rolling drain that goes on.
    #[must_use]
    pub fn rolling(&self, id: RollingId, now: Timestamp) -> Option<RollingView<'_>> {
        let rolling = self.meta.rollings.get(&id)?;
        let members = self.rollings.members(id).cloned().unwrap_or_default();
        let present = members.draining.iter().map(|node| self.drained_in(*node, now));
        let present = present.collect::<Option<Vec<Millis>>>().map(|all| all.into_iter().max().unwrap_or_default());
        let mean = rolling.took.0.checked_div(u64::from(rolling.drained)).map(Millis);
        let left = rolling::time_left(members.waiting.len() as u64, rolling.order.at_once, mean, present);
        Some(RollingView { rolling, waiting: members.waiting, draining: members.draining, left })
    }

    /// How long until nothing is left on a node, as far as it can be told.
    fn drained_in(&self, id: NodeId, now: Timestamp) -> Option<Millis> {
        let ends = self.blockers(id, now).into_iter().map(|blocker| blocker.expected.or(blocker.ends_by));
        let last = ends.collect::<Option<Vec<Timestamp>>>()?.into_iter().max();
        Some(last.map_or(Millis(0), |last| last.since(now)))
    }

    /// Where a task of the job could begin again now, were these nodes not there: how many have room, and which is
    /// one of them, or why there is none.
    #[must_use]
    pub fn elsewhere(&self, job: JobId, without: &BTreeSet<NodeId>) -> Option<(u32, String)> {
        let class = Class::of(&self.jobs.get(&job)?.spec);
        let others = || self.nodes.iter().filter(|(id, _)| !without.contains(id)).map(|(_, node)| node);
        let mut roomy = others().filter(|node| placement::fits_now(&class, node).is_ok());
        let Some(first) = roomy.next() else { return Some((0, placement::explain(&class, others()))) };
        let count = u32::try_from(roomy.count()).unwrap_or(u32::MAX).saturating_add(1);
        Some((count, first.record.name.clone()))
    }

    /// Nodes that are live, and those of them that may get work.
    #[must_use]
    pub fn node_counts(&self) -> (u32, u32) {
        let known = self.nodes.values().filter(|node| !matches!(node.record.liveness, Liveness::Gone(_)));
        let ready = self.nodes.values().filter(|node| node.is_placeable());
        (u32::try_from(known.count()).unwrap_or(u32::MAX), u32::try_from(ready.count()).unwrap_or(u32::MAX))
    }
}
