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
    end::End,
    ids::{AttemptId, JobId, NodeId, TaskIndex},
    job::JobRecord,
    node::Liveness,
    spec::Delivery,
    time::Timestamp,
};

impl Image {
    /// Makes it whole, and says what that took, a sentence each.
    pub fn mend(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        self.mend_attempts(&mut said);
        self.mend_names(&mut said);
        self.mend_rollings(&mut said);
        let mut live: BTreeMap<JobId, BTreeSet<TaskIndex>> = BTreeMap::new();
        for (id, _) in &self.attempts {
            live.entry(id.job).or_default().insert(id.task);
        }
        for (id, job) in &mut self.jobs {
            mend_tasks(*id, job, live.get(id).unwrap_or(&BTreeSet::new()), &mut said);
        }
        self.mend_counters();
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

    /// Numbers that were given out are not given out again.
    fn mend_counters(&mut self) {
        if let Some((last, _)) = self.jobs.iter().max_by_key(|(id, _)| *id) {
            self.meta.next_job = self.meta.next_job.max(last.next());
        }
        if let Some((last, _)) = self.nodes.iter().max_by_key(|(id, _)| *id) {
            self.meta.next_node = self.meta.next_node.max(last.next());
        }
        let hosts = self.pools.iter().flat_map(|(_, pool)| pool.hosts.keys());
        if let Some(last) = hosts.max() {
            self.meta.next_host = self.meta.next_host.max(last.next());
        }
        let rollings = self.nodes.iter().filter_map(|(_, node)| node.rolling).chain(self.meta.rollings.keys().copied());
        if let Some(last) = rollings.max() {
            self.meta.next_rolling = self.meta.next_rolling.max(last.next());
        }
        let term = self.attempts.iter().map(|(_, attempt)| attempt.term).max().unwrap_or_default();
        self.meta.term = self.meta.term.max(term);
    }
}

/// Each task is in exactly one place: it has ended, or is live, or waits.
fn mend_tasks(id: JobId, job: &mut JobRecord, live: &BTreeSet<TaskIndex>, said: &mut Vec<String>) {
    let counted: u64 = job.ended.values().map(|tasks| u64::from(tasks.len())).sum::<u64>()
        + u64::from(job.waiting.len())
        + job.delayed.len() as u64
        + live.len() as u64;
    let elsewhere = |task: &TaskIndex| job.waiting.contains(*task) || job.end_of(*task).is_some();
    if counted == u64::from(job.spec.tasks) && !live.iter().any(elsewhere) {
        return;
    }
    let delayed: BTreeSet<TaskIndex> = job.delayed.iter().map(|(_, task)| *task).collect();
    let (mut waiting, mut lost) = (0u32, 0u32);
    for task in 0..job.spec.tasks {
        if live.contains(&task) || job.end_of(task).is_some() {
            job.waiting.remove(task);
            job.delayed.retain(|(_, other)| *other != task);
            if live.contains(&task) {
                for tasks in job.ended.values_mut() {
                    tasks.remove(task);
                }
            }
        } else if !job.waiting.contains(task) && !delayed.contains(&task) {
            // It was live, and its attempt is gone.
            if job.spec.delivery == Delivery::AtMostOnce {
                job.ended.entry(End::SpawnerLost.summary()).or_default().insert(task);
                lost += 1;
            } else {
                job.waiting.insert(task);
                waiting += 1;
            }
        }
    }
    if !job.waiting.is_empty() || !job.delayed.is_empty() || !live.is_empty() {
        job.finished = None;
    } else if job.finished.is_none() {
        job.finished = Some(job.submitted);
    }
    said.push(format!("job {id}: {waiting} of its tasks wait again and {lost} have ended, their attempts being gone"));
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;
    use core::num::NonZeroU32;

    use super::*;
    use crate::{
        fleet::Fleet,
        ids::{Actor, Incarnation, Term},
        invariants, limits,
        range_set::RangeSet,
        spec::{JobSpec, OnDrain, Retries},
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
        assert_eq!(image.mend(), Vec::<String>::new());
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
        let said = image.mend();
        assert_eq!(said.len(), 5, "{said:#?}");
        assert!(image.attempts.is_empty());
        assert_eq!(image.jobs[0].1.waiting, RangeSet::from_range(0..4));
        assert_eq!(image.jobs[1].1.waiting, RangeSet::from_range(2..4));
        assert_eq!(image.jobs[1].1.end_of(0), Some("spawner_lost"), "it never starts twice");
        assert_ne!(image.jobs[1].1.key, "key");
        assert_eq!(image.meta.next_job, JobId(1031));
        let fleet = Fleet::restore(image).expect("it agrees with itself");
        assert_eq!(invariants::check(&fleet), Ok(()));
    }
}
