//! Attempts on nodes: started, ended, given back, given up.

use alloc::{format, string::String, vec::Vec};

use super::{Attempt, Fleet, Output, Timer, gauge::part_of, moving_mean, record};
use crate::{
    effect::{AttemptRecord, Effect, EndRecord, Evidence, StopOrder, StopReason, Subject},
    end::End,
    event::{DrainOrder, DrainThen},
    ids::{Actor, AttemptId, Epoch, JobId, NodeId, SessionId},
    job::{Ending, Next},
    limits,
    mutation::{self, Mutation},
    node::{Duty, Hold},
    spec::OnDrain,
    time::{Millis, Timestamp},
};

impl Fleet {
    pub(super) fn attempt_started(
        &mut self,
        node: NodeId,
        session: SessionId,
        id: AttemptId,
        epoch: Epoch,
        now: Timestamp,
        out: &mut Output,
    ) {
        if self.node_on(node, session).is_none() {
            return;
        }
        self.note_started(id, node, epoch, now, out);
    }

    pub(super) fn note_started(&mut self, id: AttemptId, node: NodeId, epoch: Epoch, now: Timestamp, out: &mut Output) {
        let Some(attempt) = self.live_attempt(id, node, epoch) else { return };
        if attempt.record.started.is_some() {
            return;
        }
        attempt.record.started = Some(now);
        out.touched.attempts.insert(id, attempt.record.clone());
        self.hold_capacity(id);
        let Some(node) = self.nodes.get_mut(&node) else { return };
        node.record.faults = 0;
        if let (Some(pool), Some(job)) = (self.pools.get_mut(&node.record.pool), self.jobs.get(&id.job)) {
            pool.waits.note(now.since(job.submitted), now);
            pool.runs.started(now);
            if !pool.is_fixed() {
                let part = part_of(&job.spec.request, &pool.record.policy.host.capacity());
                pool.memory.started(part, job.submitted, now);
                if let Some(attempt) = self.attempts.get_mut(&id) {
                    attempt.counted = Some(part);
                }
            }
        }
    }

    /// A prefilled attempt takes capacity from now on.
    fn hold_capacity(&mut self, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(&id).filter(|attempt| attempt.prefilled) else { return };
        attempt.prefilled = false;
        let Some(node) = self.nodes.get_mut(&attempt.record.node) else { return };
        let Some(job) = self.jobs.get(&id.job) else { return };
        node.prefilled.retain(|waiting| *waiting != id);
        node.allocated = node.allocated.plus(&job.spec.request);
        let node = attempt.record.node;
        self.reindex(node);
    }

    fn live_attempt(&mut self, id: AttemptId, node: NodeId, epoch: Epoch) -> Option<&mut Attempt> {
        self.attempts.get_mut(&id).filter(|attempt| {
            (attempt.record.node == node && attempt.record.term == epoch.term && id.number == epoch.attempt)
                || mutation::is_on(Mutation::NoEpochOnResults)
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one event")]
    pub(super) fn attempt_ended(
        &mut self,
        node: NodeId,
        session: SessionId,
        id: AttemptId,
        epoch: Epoch,
        end: End,
        wall: Option<Millis>,
        detail: Vec<u8>,
        now: Timestamp,
        out: &mut Output,
    ) {
        if self.node_on(node, session).is_none() {
            return;
        }
        // Acknowledged also when it does not count: the host must be able to forget it.
        acknowledge(node, session, id, out);
        if self.live_attempt(id, node, epoch).is_none() {
            let reason = String::from("its task's attempt had ended, or belongs to another node or epoch");
            if mutation::is_on(Mutation::EvidenceDropped) {
                return;
            }
            out.touched.evidence.push(Evidence { attempt: id, node, epoch, end, at: now, reason });
            return;
        }
        let started = self.attempts.get(&id).and_then(|attempt| attempt.record.started);
        if let (Some(started), Some(node)) = (started, self.nodes.get_mut(&node)) {
            // Start and end may have been told together: only the host knows how far apart they were.
            let ran = wall.unwrap_or_else(|| now.since(started));
            node.mean_task = Some(moving_mean(node.mean_task, ran));
            if let (Some(pool), Some(job)) = (self.pools.get_mut(&node.record.pool), self.jobs.get(&id.job)) {
                pool.runs.ended(ran);
                if let Some(part) = self.attempts.get_mut(&id).and_then(|attempt| attempt.counted.take()) {
                    pool.memory.ended(part, job.submitted + ran, now);
                }
                pool.flow.ended(part_of(&job.spec.request, &pool.record.policy.host.capacity()), ran);
            }
        }
        if end.speaks_against_the_host() {
            self.blame_node(node, &end, now, out);
        }
        self.end_attempt(id, end, false, detail, now, out);
    }

    /// Faults in a row make a node cool down, and then drain it: one bad host must not eat the queue.
    fn blame_node(&mut self, id: NodeId, end: &End, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| matches!(node.record.hold, Hold::None)) else { return };
        if mutation::is_on(Mutation::BlackHole) {
            return;
        }
        node.record.faults += 1;
        out.touched.nodes.insert(id);
        if node.record.faults < limits::FAULTS_BEFORE_COOLING {
            return;
        }
        let reason = format!("{} faults in a row, the last: {end}", node.record.faults);
        if node.record.faults >= limits::FAULTS_BEFORE_DRAIN && matches!(node.record.duty, Duty::Eligible) {
            // Whoever resumes it has looked at it.
            node.record.faults = 0;
            let actor = Actor(String::from("coordinator"));
            let order = DrainOrder { deadline: None, then: DrainThen::Nothing, refusable: false, actor, reason };
            // The node has just spoken, so it is not gone: a drain of it is never denied.
            let _granted = self.drain(id, order, now, out);
            return;
        }
        record(out, now, Subject::Node(id), "cooling", reason.clone(), None);
        node.record.hold = Hold::Cooling { until: now + limits::COOLING, reason };
        self.wake_at(now + limits::COOLING, Timer::Node(id));
    }

    /// The one place where an attempt ends (FL-2).
    pub(super) fn end_attempt(
        &mut self,
        id: AttemptId,
        end: End,
        presumed: bool,
        detail: Vec<u8>,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(attempt) = self.detach(id, now) else { return };
        let Some(job) = self.jobs.get_mut(&id.job) else { return };
        let ending = Ending {
            end: &end,
            node: attempt.record.node,
            had_started: attempt.record.started.is_some(),
            // What the host itself tells of is over; what we presume of a lost node may still run under its lease.
            leased_until: (presumed && matches!(end, End::NodeLost(_)))
                .then(|| self.nodes.get(&attempt.record.node).map(|node| node.lease_end))
                .flatten(),
        };
        let next = job.end_attempt(id.task, &ending, now);
        if end != End::Succeeded {
            let then = match next {
                Next::Ended => "",
                Next::Waiting => "; it is placed again",
                Next::Delayed(_) => "; it is placed again after a pause",
                Next::Held => {
                    "; its task is held, because it brought down its nodes again and again: retry or cancel it"
                }
            };
            record(out, now, Subject::Job(id.job), "attempt_ended", format!("attempt {id}: {end}{then}"), None);
        }
        if let Next::Delayed(at) = next {
            self.wake_at(at, Timer::Job(id.job));
        }
        let ended = Some(EndRecord { end, at: now, presumed, detail });
        out.touched.attempts.insert(id, AttemptRecord { ended, ..attempt.record });
        out.touched.jobs.insert(id.job);
        self.requeue(id.job);
        self.finish_if_done(id.job, now, out);
    }

    /// Takes an attempt off its node. The node's room goes to what was sent ahead, then to the queue.
    fn detach(&mut self, id: AttemptId, now: Timestamp) -> Option<Attempt> {
        let attempt = self.attempts.remove(&id)?;
        let node_id = attempt.record.node;
        let Some(node) = self.nodes.get_mut(&node_id) else { return Some(attempt) };
        if let (Some(part), Some(pool)) = (attempt.counted, self.pools.get_mut(&node.record.pool)) {
            // Its host did not tell how long it ran.
            pool.memory.ended(part, now, now);
        }
        node.attempts.remove(&id);
        if attempt.prefilled {
            node.prefilled.retain(|waiting| *waiting != id);
        } else if let Some(job) = self.jobs.get(&id.job) {
            node.allocated = node.allocated.minus(&job.spec.request);
        }
        if node.attempts.is_empty() {
            node.record.idle_since = Some(now);
            // Not stored for each task: after a restart a node counts as idle from then on.
        }
        self.unsettled.insert(node_id);
        self.freed.insert(node_id);
        self.promote(node_id);
        self.reindex(node_id);
        Some(attempt)
    }

    /// The host starts what was sent ahead in order as soon as it has room: count it as it will be.
    pub(super) fn promote(&mut self, node_id: NodeId) {
        while let Some(node) = self.nodes.get(&node_id)
            && let Some(next) = node.prefilled.front().copied()
            && let Some(job) = self.jobs.get(&next.job)
            && job.spec.request.fits_in(&node.free())
        {
            self.hold_capacity(next);
        }
    }

    pub(super) fn finish_if_done(&mut self, id: JobId, now: Timestamp, out: &mut Output) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.finished.is_none() && job.is_done() {
            job.finished = Some(now);
            self.open_jobs -= 1;
            let counts = job.end_counts();
            let sentence =
                format!("{} succeeded, {} failed, {} cancelled", counts.succeeded, counts.failed, counts.cancelled);
            record(out, now, Subject::Job(id), "finished", sentence, None);
        }
    }

    pub(super) fn given_back(
        &mut self,
        node: NodeId,
        session: SessionId,
        ids: &[AttemptId],
        now: Timestamp,
        out: &mut Output,
    ) {
        if self.node_on(node, session).is_none() {
            return;
        }
        for id in ids {
            let theirs = self
                .attempts
                .get(id)
                .is_some_and(|attempt| attempt.record.node == node && attempt.record.started.is_none());
            if theirs {
                self.take_back(*id, now, out);
            }
        }
    }

    /// An attempt that provably never started: its task waits again, at no budget.
    pub(super) fn take_back(&mut self, id: AttemptId, now: Timestamp, out: &mut Output) {
        if self.detach(id, now).is_none() {
            return;
        }
        let Some(job) = self.jobs.get_mut(&id.job) else { return };
        job.give_back(id.task);
        // It is no attempt that ended: it never was one. Its number is not used again.
        out.touched.attempts.remove(&id);
        out.touched.withdrawn.insert(id);
        out.touched.jobs.insert(id.job);
        self.requeue(id.job);
        self.finish_if_done(id.job, now, out);
    }

    /// Presumes the end of all that is on a node.
    pub(super) fn give_up_attempts(&mut self, node: NodeId, end: &End, now: Timestamp, out: &mut Output) {
        let ids: Vec<AttemptId> =
            self.nodes.get(&node).into_iter().flat_map(|node| node.attempts.iter().copied()).collect();
        for id in ids {
            self.end_attempt(id, end.clone(), true, Vec::new(), now, out);
        }
    }

    /// Tells the host to end an attempt. May be called again: an order that was lost is sent again.
    pub(super) fn stop_attempt(
        &mut self,
        id: AttemptId,
        reason: StopReason,
        grace: Millis,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        // The first reason stays: a drain does not turn a cancelled attempt into one that starts again.
        let reason = match attempt.record.stopping {
            Some((_, first)) if !mutation::is_on(Mutation::StopReasonOverwritten) => first,
            Some(_) | None => {
                attempt.record.stopping = Some((now, reason));
                out.touched.attempts.insert(id, attempt.record.clone());
                reason
            }
        };
        let epoch = Epoch { term: attempt.record.term, attempt: id.number };
        let node = attempt.record.node;
        let first = (reason == StopReason::Drained).then(|| self.asked_to_save(id, node, now)).flatten();
        if let Some(session) = self.nodes.get(&node).and_then(|node| node.session) {
            push_stop(node, session, StopOrder { attempt: id, epoch, reason, grace, first }, out);
        }
    }

    /// The signal that asks an attempt to save, unless its node's time is over.
    fn asked_to_save(&self, id: AttemptId, node: NodeId, now: Timestamp) -> Option<u8> {
        let drain = self.nodes.get(&node)?.record.drain()?;
        let has_time = drain.order.deadline.is_none_or(|deadline| deadline > now);
        match self.jobs.get(&id.job)?.spec.on_drain {
            OnDrain::Checkpoint { signal } => has_time.then_some(signal),
            OnDrain::Finish | OnDrain::Requeue => None,
        }
    }

    pub(super) fn recall_stale_prefill(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(oldest) = node.prefilled.front().and_then(|attempt| self.attempts.get(attempt)) else { return };
        let due = oldest.record.placed + super::placing::PREFILL_STALE;
        if due > now {
            self.wake_at(due, Timer::Prefill(id));
            return;
        }
        // The tasks turned out longer than those before them: send nothing ahead until that is measured anew.
        node.mean_task = Some(limits::PREFILL_HORIZON + Millis::from_secs(1));
        let count = u32::try_from(node.prefilled.len()).unwrap_or(u32::MAX);
        if let Some(session) = node.session {
            out.effects.push(Effect::Recall { node: id, session, count });
        }
        self.wake_at(now + super::placing::PREFILL_STALE, Timer::Prefill(id));
    }
}

fn acknowledge(node: NodeId, session: SessionId, id: AttemptId, out: &mut Output) {
    // One message for a run of ends of one node.
    if let Some(Effect::Acknowledge { node: last_node, session: last_session, attempts }) = out.effects.last_mut()
        && *last_node == node
        && *last_session == session
    {
        attempts.push(id);
        return;
    }
    out.effects.push(Effect::Acknowledge { node, session, attempts: Vec::from([id]) });
}

fn push_stop(node: NodeId, session: SessionId, order: StopOrder, out: &mut Output) {
    if let Some(Effect::Stop { node: last_node, session: last_session, attempts }) = out.effects.last_mut()
        && *last_node == node
        && *last_session == session
    {
        attempts.push(order);
        return;
    }
    out.effects.push(Effect::Stop { node, session, attempts: Vec::from([order]) });
}
