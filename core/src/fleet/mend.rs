//! Rows that contradict one another, made to agree: for a store of which a part
//! is lost. Nothing is invented: a task whose attempt is gone waits again, or,
//! where it may run only once, has ended without a result.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use super::{Image, Loss};
use crate::{
    effect::AttemptRecord,
    ids::{AttemptId, JobId, NodeId, TaskIndex},
    job::{JobRecord, Next},
    node::{Liveness, NodeRecord},
    pool::Host,
    time::Timestamp,
};

impl Image {
    /// Makes it whole, and says what that took, a sentence each.
    pub fn mend(&mut self, now: Timestamp) -> Vec<String> {
        let mut said = Vec::new();
        // From all that was read: an attempt that is dropped was given its job's number all the same.
        self.mend_counters();
        self.mend_attempts(&mut said);
        self.mend_names(&mut said);
        self.mend_rollings(&mut said);
        self.mend_hosts(now, &mut said);
        let mut live: BTreeMap<JobId, BTreeSet<TaskIndex>> = BTreeMap::new();
        for (id, _) in &self.attempts {
            live.entry(id.job).or_default().insert(id.task);
        }
        for (id, job) in &mut self.jobs {
            mend_tasks(*id, job, live.get(id).unwrap_or(&BTreeSet::new()), now, &mut said);
        }
        said
    }

    /// Nothing is placed before an operator has seen what is gone.
    pub fn mark_lost(&mut self, noticed: Timestamp, reason: String) {
        self.meta.loss = Some(Loss { noticed, reason });
    }

    /// Each has its job and node, and is the only one of its task.
    fn mend_attempts(&mut self, said: &mut Vec<String>) {
        let jobs: BTreeMap<JobId, u32> = self.jobs.iter().map(|(id, job)| (*id, job.spec.tasks)).collect();
        let nodes: BTreeSet<NodeId> = self.nodes.iter().map(|(id, _)| *id).collect();
        let mut kept: BTreeMap<(JobId, TaskIndex), (AttemptId, AttemptRecord)> = BTreeMap::new();
        for (id, record) in core::mem::take(&mut self.attempts) {
            if jobs.get(&id.job).is_none_or(|tasks| id.task >= *tasks) {
                said.push(format!("attempt {id}: its job is gone, so it is dropped"));
            } else if !nodes.contains(&record.node) {
                said.push(format!("attempt {id}: its node {} is gone, so it is dropped", record.node));
            } else if let Some((older, _)) = kept.insert((id.job, id.task), (id, record)) {
                said.push(format!("attempt {older}: {id} is live as well, so it is dropped"));
            }
        }
        self.attempts = kept.into_values().collect();
    }

    /// No two jobs have one key, no two nodes one name.
    fn mend_names(&mut self, said: &mut Vec<String>) {
        let mut keys = BTreeSet::new();
        for (id, job) in &mut self.jobs {
            if !keys.insert(job.key.clone()) {
                said.push(format!("job {id}: its key `{}` is another one's; its own is made up", job.key));
                job.key = format!("{}#{id}", job.key);
            }
        }
        let mut names = BTreeSet::new();
        for (id, node) in self.nodes.iter_mut().filter(|(_, node)| !matches!(node.liveness, Liveness::Gone(_))) {
            if !names.insert(node.name.clone()) {
                said.push(format!("node {id}: its name `{}` is another one's; its number is added", node.name));
                node.name = format!("{}-{id}", node.name);
            }
        }
    }

    /// A node waits in a rolling drain that is there.
    fn mend_rollings(&mut self, said: &mut Vec<String>) {
        let known = &self.meta.rollings;
        for (id, node) in &mut self.nodes {
            if let Some(rolling) = node.rolling.filter(|rolling| !known.contains_key(rolling)) {
                said.push(format!("node {id}: its rolling drain {rolling} is gone, so it waits in none"));
                node.rolling = None;
            }
        }
    }

    /// A host whose node is gone is there all the same, and counts: it has to join again, as one that boots.
    fn mend_hosts(&mut self, now: Timestamp, said: &mut Vec<String>) {
        let known: BTreeSet<NodeId> = self.nodes.iter().map(|(id, _)| *id).collect();
        for (name, pool) in &mut self.pools {
            pool.hosts.retain(|host, state| match state {
                Host::Joined(node) if !known.contains(node) => {
                    said.push(format!(
                        "pool {name}: node {node} of its host {} is gone, so it has to join again",
                        host.0
                    ));
                    *state = Host::Requested(now);
                    true
                }
                Host::Waking { node, .. } if !known.contains(node) => {
                    said.push(format!("pool {name}: node {node}, which is being woken, is gone, so it is not"));
                    false
                }
                Host::Deleting { node: node @ Some(_), .. } if node.is_some_and(|node| !known.contains(&node)) => {
                    said.push(format!("pool {name}: the node of its host {}, which is being ended, is gone", host.0));
                    *node = None;
                    true
                }
                Host::Requested(_) | Host::Joined(_) | Host::Waking { .. } | Host::Deleting { .. } => true,
            });
        }
    }

    /// Numbers that were given out are not given out again.
    fn mend_counters(&mut self) {
        let of_attempts = self.attempts.iter().map(|(id, _)| id.job);
        if let Some(last) = self.jobs.iter().map(|(id, _)| *id).chain(of_attempts).max() {
            self.meta.next_job = self.meta.next_job.max(last.next());
        }
        let of_attempts = self.attempts.iter().map(|(_, attempt)| attempt.node);
        if let Some(last) = self.nodes.iter().map(|(id, _)| *id).chain(of_attempts).max() {
            self.meta.next_node = self.meta.next_node.max(last.next());
        }
        let of_nodes = self.nodes.iter().filter_map(|(_, node)| node.host);
        if let Some(last) = self.pools.iter().flat_map(|(_, pool)| pool.hosts.keys().copied()).chain(of_nodes).max() {
            self.meta.next_host = self.meta.next_host.max(last.next());
        }
        let wait_or_drain =
            |(_, node): &(NodeId, NodeRecord)| [node.rolling, node.drain().and_then(|drain| drain.rolling)];
        let rollings = self.nodes.iter().flat_map(wait_or_drain).flatten().chain(self.meta.rollings.keys().copied());
        if let Some(last) = rollings.max() {
            self.meta.next_rolling = self.meta.next_rolling.max(last.next());
        }
        let term = self.attempts.iter().map(|(_, attempt)| attempt.term).max().unwrap_or_default();
        self.meta.term = self.meta.term.max(term);
    }
}

/// Each task is in exactly one place: it has ended, or is live, or is held, or waits.
fn mend_tasks(id: JobId, job: &mut JobRecord, live: &BTreeSet<TaskIndex>, now: Timestamp, said: &mut Vec<String>) {
    let counted: u64 = job.ended.values().map(|tasks| u64::from(tasks.len())).sum::<u64>()
        + u64::from(job.waiting.len())
        + (job.delayed.len() + job.held.len() + live.len()) as u64;
    let delayed: BTreeSet<TaskIndex> = job.delayed.iter().map(|(_, task)| *task).collect();
    let elsewhere = |task: &TaskIndex| {
        job.waiting.contains(*task) || delayed.contains(task) || job.held.contains(task) || job.end_of(*task).is_some()
    };
    if counted == u64::from(job.spec.tasks) && !live.iter().any(elsewhere) {
        return;
    }
    let (mut again, mut over) = (0u32, 0u32);
    for task in 0..job.spec.tasks {
        if live.contains(&task) {
            for tasks in job.ended.values_mut() {
                tasks.remove(task);
            }
            job.held.remove(&task);
            unqueue(job, task);
        } else if job.end_of(task).is_some() {
            job.held.remove(&task);
            unqueue(job, task);
        } else if job.held.contains(&task) {
            unqueue(job, task);
        } else if delayed.contains(&task) {
            job.waiting.remove(task);
        } else if !job.waiting.contains(task) {
            match job.lose_attempt(task, now) {
                Next::Ended => over += 1,
                Next::Waiting | Next::Delayed(_) | Next::Held => again += 1,
            }
        }
    }
    if !job.waiting.is_empty() || !job.delayed.is_empty() || !job.held.is_empty() || !live.is_empty() {
        job.finished = None;
    } else if job.finished.is_none() {
        job.finished = Some(now);
    }
    said.push(format!("job {id}: {again} of its tasks wait again and {over} have ended, their attempts being gone"));
}

fn unqueue(job: &mut JobRecord, task: TaskIndex) {
    job.waiting.remove(task);
    job.delayed.retain(|(_, other)| *other != task);
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;
    use core::num::NonZeroU32;

    use super::*;
    use crate::{
        event::Event,
        fleet::{Fleet, Output},
        ids::{Actor, HostRequestId, Incarnation, PoolName, Term},
        invariants, lease, limits,
        policy::{HostTemplate, PoolPolicy, ProviderKind},
        pool::PoolRecord,
        range_set::RangeSet,
        spec::{Delivery, JobSpec, OnDrain, Retries},
    };

    fn job(delivery: Delivery) -> JobRecord {
        let spec = JobSpec {
            name: "test".into(),
            owner: Actor("ana".into()),
            pool: None,
            priority: 0,
            tasks: 4,
            request: Default::default(),
            fences: BTreeSet::new(),
            constraints: BTreeMap::new(),
            delivery,
            on_drain: OnDrain::Finish,
            retries: Retries::default(),
            time_limit: None,
            grace: limits::GRACE,
        };
        JobRecord::accepted(spec, "key".into(), [0; 32], Timestamp(1))
    }

    fn attempt(job: u64, task: u32, node: u64) -> (AttemptId, AttemptRecord) {
        let id = AttemptId { job: JobId(job), task, number: NonZeroU32::MIN };
        let record = AttemptRecord {
            node: NodeId(node),
            incarnation: Incarnation(1),
            term: Term(9),
            placement_reason: String::new(),
            placed: Timestamp(2),
            started: None,
            stopping: None,
            ended: None,
        };
        (id, record)
    }

    #[test]
    fn what_is_whole_is_left_alone() {
        let mut image = Image { jobs: Vec::from([(JobId(1024), job(Delivery::AtLeastOnce))]), ..Image::default() };
        image.meta.next_job = JobId(1025);
        assert_eq!(image.mend(Timestamp(5)), Vec::<String>::new());
        assert_eq!(image.jobs, [(JobId(1024), job(Delivery::AtLeastOnce))]);
    }

    #[test]
    fn tasks_whose_attempts_are_gone_wait_or_have_ended_by_what_they_promised() {
        let (mut again, mut once) = (job(Delivery::AtLeastOnce), job(Delivery::AtMostOnce));
        // Two of four were live; the node and one attempt are lost, and the other has no node.
        again.waiting = RangeSet::from_range(2..4);
        once.waiting = RangeSet::from_range(2..4);
        let mut image = Image {
            jobs: Vec::from([(JobId(1024), again), (JobId(1030), once)]),
            attempts: Vec::from([attempt(1024, 0, 7), attempt(1099, 0, 7)]),
            ..Image::default()
        };
        let said = image.mend(Timestamp(5));
        assert_eq!(said.len(), 5, "{said:#?}");
        assert!(image.attempts.is_empty());
        assert_eq!(image.jobs[0].1.waiting, RangeSet::from_range(0..4));
        assert_eq!(image.jobs[1].1.waiting, RangeSet::from_range(2..4));
        assert_eq!(image.jobs[1].1.end_of(0), Some("spawner_lost"), "it never starts twice");
        assert_ne!(image.jobs[1].1.key, "key");
        assert_eq!(image.meta.next_job, JobId(1100), "an attempt that is dropped had a job");
        let fleet = Fleet::restore(image).expect("it agrees with itself");
        assert_eq!(invariants::check(&fleet), Ok(()));
    }

    #[test]
    fn held_tasks_stay_held_and_exclusive_ones_wait_for_the_lease_that_nobody_knows() {
        let (mut poison, mut exclusive, mut cancelled) =
            (job(Delivery::AtLeastOnce), job(Delivery::Exclusive), job(Delivery::AtLeastOnce));
        poison.waiting = RangeSet::from_range(1..4);
        poison.held = BTreeSet::from([0]);
        exclusive.waiting = RangeSet::from_range(1..4);
        exclusive.key = "other".into();
        cancelled.waiting = RangeSet::default();
        cancelled.ended = BTreeMap::from([("cancelled".into(), RangeSet::from_range(1..4))]);
        cancelled.cancelled_by = Some((Actor("ana".into()), "no".into()));
        cancelled.key = "third".into();
        let mut image = Image {
            jobs: Vec::from([(JobId(1024), poison), (JobId(1025), exclusive), (JobId(1026), cancelled)]),
            ..Image::default()
        };
        let said = image.mend(Timestamp(50));
        assert_eq!(said.len(), 2, "the one with a held task is whole: {said:#?}");
        let fleet = {
            let mut fleet = Fleet::restore(image).expect("it agrees with itself");
            let mut out = Output::default();
            fleet.apply(Event::Led { term: Term(3) }, Timestamp(60), &mut out);
            fleet
        };
        assert_eq!(invariants::check(&fleet), Ok(()));
        let job = |id| fleet.job(JobId(id)).expect("it is there");
        assert_eq!(job(1024).held, BTreeSet::from([0]));
        let lease = lease::ended_here(Timestamp(60));
        assert_eq!(job(1025).delayed, BTreeSet::from([(lease, 0)]), "its attempt may run until then");
        assert_eq!(job(1025).numbers_used(0), 1, "a number that was given out is not given out again");
        assert_eq!((job(1026).end_of(0), job(1026).finished), (Some("cancelled"), Some(Timestamp(50))));
    }

    #[test]
    fn hosts_whose_nodes_are_gone_count_and_have_to_join_again() {
        let gone = NodeId(7);
        let states = [
            Host::Joined(gone),
            Host::Waking { node: gone, since: Timestamp(1), told: Timestamp(1) },
            Host::Deleting { node: Some(gone), told: Timestamp(2), since: None },
            Host::Requested(Timestamp(3)),
        ];
        let name = PoolName("spot".into());
        let host = HostTemplate { cpu_milli: 1, memory_bytes: 1, disk_bytes: 1, labels: BTreeMap::new() };
        let policy = PoolPolicy::fixed(name.clone(), ProviderKind::Exec, 0, 4, host);
        let hosts = (1..).map(HostRequestId).zip(states).collect();
        let pool = PoolRecord { hosts, ..PoolRecord::new(policy) };
        let mut image = Image { pools: Vec::from([(name, pool)]), ..Image::default() };
        assert_eq!(image.mend(Timestamp(50)).len(), 3);
        let hosts: Vec<_> = image.pools[0].1.hosts.iter().map(|(host, state)| (host.0, *state)).collect();
        let deleting = Host::Deleting { node: None, told: Timestamp(2), since: None };
        let expected = [(1, Host::Requested(Timestamp(50))), (3, deleting), (4, Host::Requested(Timestamp(3)))];
        assert_eq!(hosts, expected);
        assert_eq!(image.meta.next_host, HostRequestId(5));
    }
}
