//! A store that is behind what hosts have seen: its last writes are lost.
//!
//! From then on nothing is placed, made or taken away until an operator says
//! so, and nothing that runs is ended for being unknown. What runs of a job
//! that is still known is adopted under its newer epoch rather than run again.

use alloc::{format, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use super::{Attempt, Fleet, Output, record};
use crate::{
    effect::{AttemptRecord, Reply, Subject},
    end::End,
    event::Held,
    ids::{Actor, AttemptId, Epoch, NodeId},
    time::Timestamp,
    timeline::Seen,
};

/// The store lost writes that were answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// When it was noticed.
    pub noticed: Timestamp,
    /// Which host has seen what.
    pub reason: String,
}

impl Fleet {
    /// What a host was told last, by whichever leader.
    pub(super) fn host_saw(&mut self, id: NodeId, seen: Seen, now: Timestamp, out: &mut Output) {
        if self.meta.timeline.contradicts(seen) {
            let what = format!("has seen commit {} of term {}", seen.commit, seen.term.0);
            self.note_loss(id, &what, now, out);
        }
    }

    fn note_loss(&mut self, id: NodeId, what: &str, now: Timestamp, out: &mut Output) {
        if self.meta.loss.is_some() {
            return;
        }
        let name = self.nodes.get(&id).map_or_else(|| format!("{id}"), |node| node.record.name.clone());
        let reason = format!(
            "node {name} {what}, which this store does not know: it is older than what was answered, by a restored \
             backup or a failover that lost writes; nothing is placed until `muster state accept-loss`"
        );
        record(out, now, Subject::Fleet, "behind", reason.clone(), None);
        self.meta.loss = Some(Loss { noticed: now, reason });
        out.touched.meta = true;
    }

    /// After a loss: adopts what a host holds and this store does not know.
    pub(super) fn reconcile(&mut self, id: NodeId, held: &[Held], now: Timestamp, out: &mut Output) {
        if self.meta.loss.is_none() {
            return;
        }
        for held in held {
            let known = self.attempts.get(&held.attempt).is_some_and(|known| known.record.term == held.epoch.term);
            if !known {
                self.adopt_attempt(id, held.attempt, held.epoch, now, out);
            }
        }
    }

    /// A number that was given out is not given out again, also when its job is lost.
    fn pass_by(&mut self, attempt: AttemptId, out: &mut Output) {
        if attempt.job >= self.meta.next_job {
            self.meta.next_job = attempt.job.next();
            out.touched.meta = true;
        }
    }

    /// The same of a node's: a certificate names it, so it was given out, whether or not this store knows.
    pub(super) fn pass_by_node(&mut self, node: NodeId, out: &mut Output) {
        if node >= self.meta.next_node {
            self.meta.next_node = node.next();
            out.touched.meta = true;
        }
    }

    /// Its number was given out, and is over: it has ended here, or never began.
    pub(super) fn is_known_to_be_over(&self, id: AttemptId) -> bool {
        self.jobs.get(&id.job).is_some_and(|job| id.number.get() <= job.numbers_used(id.task))
    }

    /// A host holds attempts that this store never gave out: it has lost that it did. Their numbers are not given
    /// out again: the host would take the new order for the one that it holds, and nobody would start it.
    pub(super) fn pass_by_held(&mut self, held: &[Held], out: &mut Output) {
        for held in held {
            self.pass_by_attempt(held.attempt, out);
        }
    }

    fn pass_by_attempt(&mut self, id: AttemptId, out: &mut Output) {
        if self.jobs.get_mut(&id.job).is_some_and(|job| job.pass_by(id.task, id.number)) {
            out.touched.jobs.insert(id.job);
        }
    }

    fn adopt_attempt(&mut self, node: NodeId, id: AttemptId, epoch: Epoch, now: Timestamp, out: &mut Output) {
        self.pass_by(id, out);
        // It is not one of those that the store forgot: its result is evidence (FL-2).
        if self.is_known_to_be_over(id) {
            return;
        }
        // Placed before this job was accepted: of another, which is lost, and whose number was given out again.
        if self.jobs.get(&id.job).is_some_and(|job| epoch.term < job.accepted_by) {
            self.pass_by_attempt(id, out);
            return;
        }
        let live = self.jobs.get(&id.job).and_then(|job| job.live.get(&id.task).copied());
        match live {
            Some(number) if number >= id.number => return,
            // The lost writes had its end, or it would have no successor.
            Some(number) => self.end_attempt(AttemptId { number, ..id }, End::SpawnerLost, true, Vec::new(), now, out),
            None => {}
        }
        let Some(job) = self.jobs.get_mut(&id.job) else { return };
        let Some(host) = self.nodes.get_mut(&node) else { return };
        if !job.adopt(id.task, id.number) {
            return;
        }
        let attempt = AttemptRecord {
            node,
            incarnation: host.record.incarnation,
            term: epoch.term,
            placement_reason: String::from("adopted: it was there when the store had lost its last writes"),
            placed: now,
            started: None,
            stopping: None,
            ended: None,
        };
        host.record.idle_since = None;
        host.attempts.insert(id);
        // As one that was sent ahead; what runs is noted as started next, and holds capacity from then on.
        host.prefilled.push_back(id);
        out.touched.attempts.insert(id, attempt.clone());
        out.touched.jobs.insert(id.job);
        out.touched.nodes.insert(node);
        self.attempts.insert(id, Attempt { record: attempt, prefilled: true, counted: None });
        record(out, now, Subject::Job(id.job), "adopted", format!("attempt {id} goes on on {node}"), None);
        self.requeue(id.job);
        self.reindex(node);
    }

    /// The operator knows that answered requests are gone: the fleet goes on from what there is.
    pub(super) fn accept_loss(&mut self, actor: &Actor, reason: &str, now: Timestamp, out: &mut Output) -> Reply {
        let Some(loss) = self.meta.loss.take() else { return Reply::LossAccepted { lost: false } };
        self.meta.timeline.accept();
        out.touched.meta = true;
        let sentence = format!("placing again after {}: {reason}", now.since(loss.noticed));
        record(out, now, Subject::Fleet, "loss_accepted", sentence, Some(actor));
        self.queue.unblock_all();
        self.freed.extend(self.nodes.keys().copied());
        self.unsettled.extend(self.nodes.keys().copied());
        Reply::LossAccepted { lost: true }
    }
}
