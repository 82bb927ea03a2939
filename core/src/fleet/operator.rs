//! What operators ask: jobs, cordons, pools. Each is granted or denied, and
//! a denied one changes nothing.

use alloc::{collections::BTreeMap, format, string::String};

use super::{Fleet, Output, Timer, record};
use crate::{
    denied::Denied,
    effect::{Effect, Reply, StopReason, Subject},
    end::{End, NodeLoss},
    ids::{Actor, HostRequestId, JobId, NodeId, PoolName, RequestId, TaskIndex},
    job::JobRecord,
    limits,
    node::{Duty, Liveness, Mark},
    placement::{self, Unfit},
    policy::PoolPolicy,
    pool::{Host, Pool, PoolRecord},
    queue::Class,
    spec::JobSpec,
    time::Timestamp,
};

impl Fleet {
    pub(super) fn submit(
        &mut self,
        request: RequestId,
        key: String,
        digest: [u8; 32],
        spec: JobSpec,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        if let Some(job) = self.keys.get(&key).copied() {
            let known = self.jobs.get(&job).is_some_and(|record| record.digest == digest);
            return if known {
                Ok(Reply::Submitted { job, existed: true })
            } else {
                Err(Denied::KeyConflict { key, job })
            };
        }
        if let Some(pool) = spec.pool.as_ref().filter(|pool| !self.pools.contains_key(*pool)) {
            return Err(Denied::UnknownPool(pool.clone()));
        }
        let open = self.open_jobs;
        if open >= limits::OPEN_JOBS_MAX {
            return Err(Denied::LimitReached {
                limit: format!("{open} jobs are not finished, at most {} may be", limits::OPEN_JOBS_MAX),
            });
        }
        self.check_it_could_ever_run(&Class::of(&spec))?;
        let job = self.meta.next_job;
        self.meta.next_job = job.next();
        let noun = if spec.tasks == 1 { "task" } else { "tasks" };
        let sentence = format!("{} {noun} of {} CPU", spec.tasks, crate::resources::Cores(spec.request.cpu_milli));
        record(out, now, Subject::Job(job), "submitted", sentence, Some(&spec.owner));
        self.keys.insert(key.clone(), job);
        let record = JobRecord { accepted_by: self.meta.term, ..JobRecord::accepted(spec, key, digest, now) };
        self.jobs.insert(job, record);
        self.open_jobs += 1;
        self.requeue(job);
        out.touched.meta = true;
        out.touched.jobs.insert(job);
        out.touched.accepted.insert(job, request);
        Ok(Reply::Submitted { job, existed: false })
    }

    /// Refuses only what no node that we know and no host that a pool makes could ever hold.
    fn check_it_could_ever_run(&self, class: &Class) -> Result<(), Denied> {
        let in_pool = |pool: &PoolName| class.pool.as_ref().is_none_or(|wanted| wanted == pool);
        let known = || {
            self.nodes.values().filter(|node| {
                let is_away = matches!(node.record.liveness, Liveness::Joining | Liveness::Gone(_));
                in_pool(&node.record.pool) && (!is_away || node.record.is_asleep())
            })
        };
        let templates =
            || self.pools.values().filter(|pool| in_pool(&pool.record.policy.name) && pool.record.policy.max > 0);
        if known().any(|node| placement::feasible(class, node).is_ok()) {
            return Ok(());
        }
        let made = templates().any(|pool| class.request.fits_in(&pool.record.policy.host.capacity()));
        let lacks = known().find_map(|node| match placement::feasible(class, node) {
            Err(Unfit::Fences(fences)) => Some(fences),
            Ok(()) | Err(Unfit::OtherPool | Unfit::Label(_) | Unfit::TooSmall(_) | Unfit::State(_) | Unfit::Full) => {
                None
            }
        });
        if let Some(fences) = lacks {
            let only = known().all(|node| matches!(placement::feasible(class, node), Err(Unfit::Fences(_))));
            if only {
                return Err(Denied::NeverFits {
                    reason: format!(
                        "no node can raise {fences}; submit with `--without {}` or `--best-effort`",
                        fences.replace(", ", ",")
                    ),
                });
            }
        }
        let largest =
            known().map(|node| node.record.capacity).chain(templates().map(|pool| pool.record.policy.host.capacity()));
        let shortage = largest.max().and_then(|capacity| class.request.shortage(&capacity));
        match shortage {
            Some(shortage) if !made => {
                Err(Denied::NeverFits { reason: format!("the largest node has {shortage}; no pool makes larger ones") })
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn cancel(
        &mut self,
        id: JobId,
        tasks: Option<&[TaskIndex]>,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let job = self.jobs.get_mut(&id).ok_or(Denied::UnknownJob(id))?;
        if let Some(task) = tasks.into_iter().flatten().find(|task| **task >= job.spec.tasks) {
            return Err(Denied::UnknownTask { job: id, task: *task, tasks: job.spec.tasks });
        }
        if tasks.is_none() && job.finished.is_none() {
            job.cancelled_by = Some((actor.clone(), reason.clone()));
        }
        let grace = job.spec.grace;
        let (waiting, live, ended) = job.cancel(tasks);
        let stopping = u32::try_from(live.len()).unwrap_or(u32::MAX);
        let numbers: alloc::vec::Vec<_> = live.iter().filter_map(|task| Some((*task, *job.live.get(task)?))).collect();
        for (task, number) in numbers {
            let attempt = crate::ids::AttemptId { job: id, task, number };
            self.stop_attempt(attempt, StopReason::Cancelled, grace, now, out);
        }
        if waiting + stopping > 0 {
            record(out, now, Subject::Job(id), "cancelled", reason, Some(&actor));
        }
        out.touched.jobs.insert(id);
        self.requeue(id);
        self.finish_if_done(id, now, out);
        Ok(Reply::Cancelled { waiting, stopping, ended })
    }

    pub(super) fn retry(&mut self, id: JobId, actor: Actor, now: Timestamp, out: &mut Output) -> Result<Reply, Denied> {
        let job = self.jobs.get_mut(&id).ok_or(Denied::UnknownJob(id))?;
        if !job.may_retry() {
            let state = "at_most_once, and a task of it may have run; submit it as a new job";
            return Err(Denied::JobState { job: id, state, asked: "retry" });
        }
        let was_over = job.finished.is_some();
        let tasks = job.retry(now);
        if tasks > 0 {
            self.open_jobs += usize::from(was_over);
            record(out, now, Subject::Job(id), "retried", format!("{tasks} tasks wait again"), Some(&actor));
            out.touched.jobs.insert(id);
            if let Some((at, _)) = job.delayed.first().copied() {
                self.wake_at(at, Timer::Job(id));
            }
            self.requeue(id);
        }
        Ok(Reply::Retried { tasks })
    }

    pub(super) fn cordon(
        &mut self,
        id: NodeId,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let node = self.nodes.get_mut(&id).ok_or(Denied::UnknownNode(id))?;
        match &node.record.duty {
            Duty::Eligible | Duty::Cordoned(_) => {
                record(out, now, Subject::Node(id), "cordoned", reason.clone(), Some(&actor));
                node.record.duty = Duty::Cordoned(Mark { actor, reason, at: now });
                out.touched.nodes.insert(id);
                self.reindex(id);
            }
            // A draining node already gets nothing new; resume will come back to this cordon.
            Duty::Draining(_) | Duty::Drained { .. } | Duty::Stopping { .. } => {
                return Err(Denied::NodeState {
                    node: node.record.name.clone(),
                    state: String::from(node.record.state()),
                    asked: "cordon",
                    advice: "it already gets no new work; `muster node resume` cancels the drain first",
                });
            }
        }
        Ok(Reply::NodeChanged)
    }

    pub(super) fn uncordon(
        &mut self,
        id: NodeId,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let node = self.nodes.get_mut(&id).ok_or(Denied::UnknownNode(id))?;
        match &node.record.duty {
            Duty::Eligible => {}
            Duty::Cordoned(_) => {
                node.record.duty = Duty::Eligible;
                record(out, now, Subject::Node(id), "uncordoned", reason, Some(&actor));
                out.touched.nodes.insert(id);
                self.freed.insert(id);
                self.unsettled.insert(id);
                self.reindex(id);
            }
            Duty::Draining(_) | Duty::Drained { .. } | Duty::Stopping { .. } => {
                return Err(Denied::NodeState {
                    node: node.record.name.clone(),
                    state: String::from(node.record.state()),
                    asked: "uncordon",
                    advice: "`muster node resume` cancels a drain",
                });
            }
        }
        Ok(Reply::NodeChanged)
    }

    pub(super) fn remove_node(
        &mut self,
        id: NodeId,
        force: bool,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let node = self.nodes.get(&id).ok_or(Denied::UnknownNode(id))?;
        let in_use = matches!(node.record.liveness, Liveness::Live) || !node.attempts.is_empty();
        if in_use && !force {
            return Err(Denied::NodeState {
                node: node.record.name.clone(),
                state: String::from(node.record.state()),
                asked: "remove",
                advice: "drain it first, or use --force to end its attempts as lost",
            });
        }
        self.give_up_attempts(id, &End::NodeLost(NodeLoss::Silent), now, out);
        record(out, now, Subject::Node(id), "removed", reason, Some(&actor));
        self.forget_node(id, out);
        Ok(Reply::NodeChanged)
    }

    /// Drops a node's record. Its stream is closed, its host deleted.
    pub(super) fn forget_node(&mut self, id: NodeId, out: &mut Output) {
        let Some(node) = self.nodes.remove(&id) else { return };
        if let Some(index) = self.indexes.get_mut(&node.record.pool) {
            index.update(id, None);
        }
        if self.names.get(&node.record.name) == Some(&id) {
            self.names.remove(&node.record.name);
        }
        if let Some(session) = node.session {
            out.effects.push(Effect::CloseSession { node: id, session, reason: String::from("this node was removed") });
        }
        if let Some(host) = node.record.host
            && let Some(pool) = self.pools.get_mut(&node.record.pool)
            && let Some(state) = pool.record.hosts.get_mut(&host)
        {
            match state {
                Host::Joined(joined) if *joined == id => {
                    *state = Host::Deleting { node: None, told: Timestamp(0), since: None };
                    out.touched.pools.insert(node.record.pool.clone());
                }
                // Should the provider fail to delete it, there is no node that it could go back to.
                Host::Deleting { node: joined, .. } if *joined == Some(id) => {
                    *joined = None;
                    out.touched.pools.insert(node.record.pool.clone());
                }
                // An old record of a host that has joined anew goes without it.
                Host::Requested(_) | Host::Joined(_) | Host::Waking { .. } | Host::Deleting { .. } => {}
            }
        }
        if let Some(pool) = self.pools.get_mut(&node.record.pool) {
            pool.forget_sleeper(id, out);
        }
        self.freed.remove(&id);
        self.forget_member(id, &node.record);
        out.touched.nodes.insert(id);
    }

    pub(super) fn set_pool(
        &mut self,
        policy: PoolPolicy,
        actor: Actor,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        policy.check().map_err(|bad| Denied::BadPolicy { reason: format!("pool {}: {bad}", policy.name) })?;
        let name = policy.name.clone();
        let sentence = format!("min {}, max {}", policy.min, policy.max);
        let subject = Subject::Pool { name: name.clone(), sizes: None };
        record(out, now, subject, "policy_set", sentence, Some(&actor));
        let pool = match self.pools.remove(&name) {
            Some(mut pool) => {
                pool.record = PoolRecord { policy, failures: 0, paused: None, paused_until: None, ..pool.record };
                pool.forget_breaches();
                pool
            }
            None => {
                let hosts = self.known_hosts(&name);
                // A lost one may be given back to its provider now, and nothing else would look at it again.
                for node in hosts.values().filter_map(Host::joined) {
                    self.wake_at(now, Timer::Node(node));
                }
                Pool::new(PoolRecord { hosts, ..PoolRecord::new(policy) })
            }
        };
        self.pools.insert(name.clone(), pool);
        out.touched.pools.insert(name);
        Ok(Reply::PoolSet)
    }

    /// Hosts of a pool that a store has lost, and whose nodes it has: they are there, and count (FL-11).
    fn known_hosts(&self, name: &PoolName) -> BTreeMap<HostRequestId, Host> {
        let nodes = self.nodes.iter();
        nodes
            .filter(|(_, node)| node.record.pool == *name && !matches!(node.record.liveness, Liveness::Gone(_)))
            .filter_map(|(id, node)| Some((node.record.host?, Host::Joined(*id))))
            .collect()
    }
}
