//! Draining a node: place nothing new, let attempts finish, evict what is left
//! at the deadline, and believe only the host's proof.
//!
//! ```text
//! eligible or cordoned --request--> draining --proof--> drained --> stopping (then: stop, poweroff, delete)
//!         ^                            |                   |
//!         +---------- resume ----------+-------------------+
//! ```

use alloc::{format, string::String, vec::Vec};

use super::{Fleet, Output, Timer, record};
use crate::{
    denied::Denied,
    effect::{DrainNotice, Effect, Reply, StopReason, Subject},
    event::{DrainOrder, DrainThen, Hello},
    ids::{Actor, AttemptId, NodeId, Revision, SessionId},
    limits,
    mutation::{self, Mutation},
    node::{Drain, Duty, Liveness, Mark, NodeRecord},
    pool::Host,
    spec::OnDrain,
    time::{Millis, Timestamp},
};

impl Fleet {
    pub(super) fn drain(
        &mut self,
        id: NodeId,
        order: DrainOrder,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let node = self.nodes.get_mut(&id).ok_or(Denied::UnknownNode(id))?;
        if node.record.is_asleep() && order.then != DrainThen::Delete {
            return self.drain_asleep(id, order, now, out);
        }
        if let Liveness::Gone(_) = node.record.liveness {
            return Err(Denied::NodeState {
                node: node.record.name.clone(),
                state: String::from("gone"),
                asked: "drain",
                advice: "it has left the fleet; `muster node remove` forgets it",
            });
        }
        if order.then == DrainThen::Delete && node.record.host.is_none() {
            return Err(Denied::NodeState {
                node: node.record.name.clone(),
                state: String::from("of no provider"),
                asked: "drain and delete",
                advice: "nobody can delete it; drain it with --then stop or --then poweroff",
            });
        }
        let sentence = match order.deadline {
            Some(deadline) => {
                format!("{} (deadline in {}, then {})", order.reason, deadline.since(now), order.then.name())
            }
            None => format!("{} (no deadline, then {})", order.reason, order.then.name()),
        };
        let cordon_before = match &mut node.record.duty {
            Duty::Eligible => None,
            Duty::Cordoned(mark) => Some(mark.clone()),
            Duty::Draining(drain) => {
                // A later request may only shorten the drain: a machine about to be reclaimed must win.
                let deadline = drain.order.deadline;
                drain.order = join(&drain.order, order);
                if let Some(session) = node.session.filter(|_| drain.order.deadline != deadline) {
                    out.effects.push(Effect::NoticeDrain { node: id, session, notice: notice_of(drain, now) });
                }
                record(out, now, Subject::Node(id), "drain_requested", sentence, Some(&drain.order.actor));
                out.touched.nodes.insert(id);
                self.unsettled.insert(id);
                return Ok(Reply::NodeChanged);
            }
            // A drained node that is drained again, with another `then`, proves itself again under a new revision.
            Duty::Drained { drain, .. } => drain.cordon_before.clone(),
            Duty::Stopping { .. } => return Ok(Reply::NodeChanged),
        };
        node.record.drain_revision = node.record.drain_revision.next();
        record(out, now, Subject::Node(id), "drain_requested", sentence, Some(&order.actor));
        node.record.duty = Duty::Draining(Drain {
            order,
            revision: node.record.drain_revision,
            requested: now,
            cordon_before,
            rolling: None,
        });
        node.asked_drained = None;
        let recall = node.session.filter(|_| !node.attempts.is_empty());
        if let Some(session) = recall {
            if let Some(drain) = node.record.drain() {
                out.effects.push(Effect::NoticeDrain { node: id, session, notice: notice_of(drain, now) });
            }
            out.effects.push(Effect::Recall { node: id, session, count: u32::MAX });
        }
        out.touched.nodes.insert(id);
        self.unsettled.insert(id);
        self.reindex(id);
        Ok(Reply::NodeChanged)
    }

    /// Decides from what still runs, not from what changed, so a lost question or eviction is sent again.
    pub(super) fn settle_drain(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Duty::Draining(drain) = &node.record.duty else { return };
        let (revision, deadline, refusable) = (drain.revision, drain.order.deadline, drain.order.refusable);
        if node.attempts.is_empty() {
            let Some(session) = node.session else { return };
            if mutation::is_on(Mutation::DrainedInferred) {
                return self.drain_proved(id, session, revision, now, out);
            }
            let asked_lately = node.asked_drained.is_some_and(|asked| now.since(asked) < limits::DRAIN_ASK_AGAIN);
            if !asked_lately {
                node.asked_drained = Some(now);
                out.effects.push(Effect::AskDrained { node: id, session, revision, refusable });
            }
            let asked = node.asked_drained.unwrap_or(now);
            self.wake_at(asked + limits::DRAIN_ASK_AGAIN, Timer::Node(id));
            return;
        }
        let overdue = deadline.is_some_and(|deadline| now >= deadline);
        let evicts_all = overdue && !mutation::is_on(Mutation::DrainEvictsNobody);
        let again = self.evict_for_drain(id, evicts_all, now, out);
        match deadline {
            Some(deadline) if !overdue => self.wake_at(deadline, Timer::Node(id)),
            Some(_) | None => {}
        }
        if let Some(again) = again {
            self.wake_at(again, Timer::Node(id));
        }
    }

    /// Evicts what should go now. Says when to look again, because an order may be lost.
    fn evict_for_drain(&mut self, id: NodeId, overdue: bool, now: Timestamp, out: &mut Output) -> Option<Timestamp> {
        let held = self.nodes.get(&id).into_iter().flat_map(|node| node.attempts.iter());
        let leaving: Vec<(AttemptId, Millis, Option<Timestamp>)> = held
            .filter_map(|attempt| {
                let known = self.attempts.get(attempt)?;
                let job = self.jobs.get(&attempt.job)?;
                let goes = overdue
                    || match job.spec.on_drain {
                        OnDrain::Finish => false,
                        OnDrain::Requeue | OnDrain::Checkpoint { .. } => true,
                    };
                goes.then_some((*attempt, job.spec.grace, known.record.stopping.map(|(since, _)| since)))
            })
            .collect();
        let mut again = None;
        for (attempt, grace, told) in leaving {
            let due = told.map(|since| since + limits::DRAIN_ASK_AGAIN).filter(|due| *due > now);
            if due.is_none() {
                self.stop_attempt(attempt, StopReason::Drained, grace, now, out);
            }
            let due = due.unwrap_or(now + limits::DRAIN_ASK_AGAIN);
            again = Some(again.map_or(due, |again: Timestamp| again.min(due)));
        }
        again
    }

    pub(super) fn drain_proved(
        &mut self,
        id: NodeId,
        session: SessionId,
        revision: Revision,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.node_on(id, session) else { return };
        let Duty::Draining(drain) = &node.record.duty else { return };
        // A proof of an older drain proves nothing about this one; nor does one that contradicts our record.
        let is_other = drain.revision != revision && !mutation::is_on(Mutation::AnyProof);
        if is_other || !node.attempts.is_empty() {
            return;
        }
        let mut drain = drain.clone();
        let then = drain.order.then;
        self.count_drained(id, &drain, now, out);
        // Should the proof be void one day, it is proved again outside of any turn.
        drain.rolling = None;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let sentence =
            format!("the agent proved that nothing is left, {} after the request", now.since(drain.requested));
        record(out, now, Subject::Node(id), "drain_proved", sentence, None);
        node.record.duty = match then {
            DrainThen::Nothing => Duty::Drained { drain, proved: now },
            DrainThen::Stop | DrainThen::Poweroff | DrainThen::Delete => Duty::Stopping { drain, proved: now },
        };
        out.touched.nodes.insert(id);
        out.effects.push(Effect::Release { node: id, session, revision, then });
        if then == DrainThen::Delete {
            self.delete_host_of(id, now, out);
        }
        self.reindex(id);
    }

    fn delete_host_of(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get(&id) else { return };
        let Some(host) = node.record.host else { return };
        let name = node.record.pool.clone();
        let Some(pool) = self.pools.get_mut(&name) else { return };
        pool.record.hosts.insert(host, Host::Deleting { node: Some(id), told: now, since: Some(now) });
        out.touched.pools.insert(name.clone());
        out.effects.push(Effect::DeleteHost { pool: name.clone(), host, node: Some(id) });
        self.wake_at(now + limits::DELETE_ASK_AGAIN, Timer::Pool(name));
    }

    /// A lost host that a provider made counts against its pool's maximum until the provider confirms that it is
    /// gone, and nobody else may ask for that: it is given back, so that another can take its place. One that an
    /// operator has set aside is left to the operator, and so is every one while evictions rest (FL-12).
    pub(super) fn settle_lost(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get(&id) else { return };
        if !matches!(self.host_of(id), Some(Host::Joined(_))) || !may_be_given_back(&node.record) {
            return;
        }
        let kept = if mutation::is_on(Mutation::GivenBackAtOnce) { Millis(0) } else { limits::LOST_HOST_KEPT };
        let kept = node.heard + limits::LOST_AFTER + kept;
        let due = kept.max(self.meta.brake_until.unwrap_or_default());
        if due > now {
            self.wake_at(due, Timer::Node(id));
        } else if self.meta.loss.is_none() {
            let sentence = format!("nothing heard for {}: its provider is told to end it", now.since(node.heard));
            record(out, now, Subject::Node(id), "given_back", sentence, None);
            self.pause_after_brake(now, out);
            self.close_session(id, "the provider was told to end this host", out);
            self.delete_host_of(id, now, out);
        }
    }

    /// Should it speak all the same, it says hello first, and counts again.
    pub(super) fn close_session(&mut self, id: NodeId, reason: &str, out: &mut Output) {
        let session = self.nodes.get_mut(&id).and_then(|node| node.session.take());
        if let Some(session) = session {
            out.effects.push(Effect::CloseSession { node: id, session, reason: String::from(reason) });
        }
    }

    /// What its pool knows of the host that this node runs on; none: no provider made it, or it is gone.
    fn host_of(&self, id: NodeId) -> Option<Host> {
        let node = self.nodes.get(&id)?;
        self.pools.get(&node.record.pool)?.record.hosts.get(&node.record.host?).copied()
    }

    /// Its provider was told to end its host, and it speaks once more: it may hear again that it is to go, if that
    /// is what it waits for, and gets no work that would die with it. Another life of it proved nothing (FL-7): a
    /// hello names the drain also before the closure is on disk.
    pub(super) fn is_being_deleted(&self, id: NodeId, hello: &Hello) -> bool {
        let waits = self.nodes.get(&id).is_some_and(|node| {
            let is_told = |drain: &Drain| drain.revision == hello.closed_for_drain;
            node.record.boot_id == hello.boot_id
                && matches!(&node.record.duty, Duty::Stopping { drain, .. } if is_told(drain))
        });
        self.has_deletion(id) && !waits
    }

    pub(super) fn drain_refused(
        &mut self,
        id: NodeId,
        session: SessionId,
        revision: Revision,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.node_on(id, session) else { return };
        let Duty::Draining(drain) = &node.record.duty else { return };
        if drain.revision == revision && drain.order.refusable {
            record(out, now, Subject::Node(id), "drain_refused", reason, None);
            self.restore_duty(id, out);
        }
    }

    pub(super) fn resume(
        &mut self,
        id: NodeId,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let node = self.nodes.get(&id).ok_or(Denied::UnknownNode(id))?;
        match &node.record.duty {
            Duty::Eligible | Duty::Cordoned(_) => self.leave_rolling(id, &reason, Some(&actor), now, out),
            Duty::Draining(_) | Duty::Drained { .. } if self.has_deletion(id) => {
                return Err(Denied::NodeState {
                    node: node.record.name.clone(),
                    state: String::from("being deleted"),
                    asked: "resume",
                    advice: "its provider was told to end the host; it is back if the provider fails to",
                });
            }
            Duty::Draining(_) | Duty::Drained { .. } => {
                self.leave_rolling(id, &reason, Some(&actor), now, out);
                record(out, now, Subject::Node(id), "resumed", reason, Some(&actor));
                self.restore_duty(id, out);
            }
            Duty::Stopping { .. } => {
                return Err(Denied::NodeState {
                    node: node.record.name.clone(),
                    state: String::from("stopping"),
                    asked: "resume",
                    advice: "it was proved empty and told to go; start its agent again to bring it back",
                });
            }
        }
        Ok(Reply::NodeChanged)
    }

    fn has_deletion(&self, id: NodeId) -> bool {
        matches!(self.host_of(id), Some(Host::Deleting { .. }))
    }

    /// Back to the duty from before the drain, unless its host goes under it: a copy of the one that proved itself
    /// empty drains again, and whatever would end that drain must not bring work to it (FL-7).
    pub(super) fn restore_duty(&mut self, id: NodeId, out: &mut Output) {
        if self.has_deletion(id) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(drain) = node.record.drain() else { return };
        let (before, revision): (Option<Mark>, Revision) = (drain.cordon_before.clone(), drain.revision);
        let before = before.filter(|_| !mutation::is_on(Mutation::CordonBeforeForgotten));
        node.record.duty = before.map_or(Duty::Eligible, Duty::Cordoned);
        if let Some(session) = node.session {
            out.effects.push(Effect::Reopen { node: id, session, revision });
        }
        out.touched.nodes.insert(id);
        self.freed.insert(id);
        self.unsettled.insert(id);
        self.reindex(id);
    }

    /// A host that is being stopped by its own system drains itself in the time that it has.
    pub(super) fn stop_notice(
        &mut self,
        id: NodeId,
        session: SessionId,
        reason: String,
        within: Option<Millis>,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.node_on(id, session) else { return };
        let deadline = within.map(|within| now + within);
        let (actor, reason) = match &node.record.duty {
            Duty::Eligible | Duty::Cordoned(_) => (host_actor(&node.record.name), reason),
            Duty::Draining(_) if mutation::is_on(Mutation::DrainTakenOver) => (host_actor(&node.record.name), reason),
            // Somebody else's drain stays theirs: it holds on after the host has come back.
            Duty::Draining(drain) => (drain.order.actor.clone(), format!("{}; {reason}", drain.order.reason)),
            // Nothing runs there any more, and nothing new is placed.
            Duty::Drained { .. } | Duty::Stopping { .. } => return,
        };
        let order = DrainOrder { deadline, then: DrainThen::Nothing, refusable: false, actor, reason };
        // The node is known and connected, so it is not gone: a drain of it is never denied.
        let _granted = self.drain(id, order, now, out);
    }

    /// A host that was stopped by its own system and begins anew is as it was before. A person's drain is not undone.
    pub(super) fn end_own_drain(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get(&id) else { return };
        let actor = host_actor(&node.record.name);
        let (Duty::Draining(drain) | Duty::Drained { drain, .. }) = &node.record.duty else { return };
        if drain.order.actor == actor && drain.order.then == DrainThen::Nothing {
            record(out, now, Subject::Node(id), "resumed", String::from("it was started again"), Some(&actor));
            self.restore_duty(id, out);
        }
    }

    /// A host on which a killed process does not die is not trusted with more: it is cordoned, until a person
    /// says otherwise. The attempt stays `stopping`, because nothing proves that it is over (FL-5).
    pub(super) fn attempt_stuck(
        &mut self,
        id: NodeId,
        session: SessionId,
        attempt: AttemptId,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.node_on(id, session) else { return };
        // Whoever cordoned or drains it already has said why; that is not overwritten.
        if !matches!(node.record.duty, Duty::Eligible) {
            return;
        }
        let actor = host_actor(&node.record.name);
        let reason = format!("quarantined: attempt {attempt} does not end after SIGKILL");
        let _granted = self.cordon(id, actor, reason, now, out);
    }
}

/// Does nobody want to look at this host, should it be lost? Whoever cordoned it does, or drained it to have it back.
fn may_be_given_back(record: &NodeRecord) -> bool {
    match &record.duty {
        Duty::Eligible => true,
        Duty::Cordoned(_) => false,
        Duty::Draining(drain) | Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } => {
            drain.order.then == DrainThen::Delete || drain.order.actor == host_actor(&record.name)
        }
    }
}

/// What jobs are told of a drain.
pub(super) fn notice_of(drain: &Drain, now: Timestamp) -> DrainNotice {
    DrainNotice { within: drain.order.deadline.map(|deadline| deadline.since(now)) }
}

/// Whose word it is when a host speaks for itself.
pub(super) fn host_actor(name: &str) -> Actor {
    Actor(format!("host {name}"))
}

/// Two requests for one drain: the earlier deadline, the further `then`, the later words.
pub(super) fn join(old: &DrainOrder, new: DrainOrder) -> DrainOrder {
    DrainOrder {
        deadline: match (old.deadline, new.deadline) {
            (Some(_), Some(new)) if mutation::is_on(Mutation::DrainPutOff) => Some(new),
            (Some(old), Some(_)) if mutation::is_on(Mutation::ShorterDrainIgnored) => Some(old),
            (Some(old), Some(new)) => Some(old.min(new)),
            (one, other) => one.or(other),
        },
        then: if new.then == DrainThen::Nothing { old.then } else { new.then },
        // A person's request turns a scaler's into one that may not be refused.
        refusable: old.refusable && (new.refusable || mutation::is_on(Mutation::RefusalStays)),
        ..new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fleet::session::new_record, ids::PoolName};

    fn order(actor: &str, then: DrainThen, deadline: Option<u64>, refusable: bool) -> DrainOrder {
        let deadline = deadline.map(Timestamp);
        DrainOrder { deadline, then, refusable, actor: Actor(actor.into()), reason: String::from("because") }
    }

    #[test]
    fn two_drains_are_the_stricter_one() {
        let scaler = |deadline| order("scaler", DrainThen::Delete, deadline, true);
        let person = |deadline| order("ana", DrainThen::Nothing, deadline, false);
        let joined = |deadline, refusable| order("ana", DrainThen::Delete, deadline, refusable);
        assert_eq!(join(&scaler(None), person(Some(9))), joined(Some(9), false));
        assert_eq!(join(&scaler(Some(5)), person(Some(9))), joined(Some(5), false));
        assert_eq!(join(&scaler(Some(9)), person(Some(5))), joined(Some(5), false));
        assert_eq!(join(&scaler(Some(9)), person(None)), joined(Some(9), false));
        assert!(join(&scaler(None), scaler(None)).refusable);
        assert!(!join(&person(None), scaler(None)).refusable, "what a person asked for stays asked for");
    }

    #[test]
    fn a_lost_host_is_given_back_unless_a_person_set_it_aside() {
        let record = new_record("web-01".into(), PoolName("spot".into()), None, [7; 32], Timestamp(1));
        let given_back = |duty: Duty| may_be_given_back(&NodeRecord { duty, ..record.clone() });
        let by = |actor: &str, then| {
            let drain = Drain {
                order: order(actor, then, None, false),
                revision: Revision(1),
                requested: Timestamp(1),
                cordon_before: None,
                rolling: None,
            };
            [Duty::Draining(drain.clone()), Duty::Drained { drain: drain.clone(), proved: Timestamp(2) }]
        };
        assert!(given_back(Duty::Eligible));
        for (actor, then, expected) in [
            ("ana", DrainThen::Nothing, false),
            ("ana", DrainThen::Stop, false),
            ("ana", DrainThen::Delete, true),
            ("host web-01", DrainThen::Nothing, true),
            ("host web-02", DrainThen::Nothing, false),
        ] {
            for duty in by(actor, then) {
                assert_eq!(given_back(duty.clone()), expected, "{duty:?}");
            }
        }
    }
}
