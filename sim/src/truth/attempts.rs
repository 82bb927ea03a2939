//! Attempts and tasks: one end each, the right one, in its budget, and nothing that was withdrawn comes back.

use std::collections::BTreeMap;

use muster_core::{
    effect::{AttemptRecord, EndRecord, StopReason},
    effect::{HistoryEntry, Subject},
    end::{Blame, End, NodeLoss},
    fleet::{Fleet, Output},
    host::Verdict,
    ids::{AttemptId, JobId, NodeId, TaskIndex},
    job::JobRecord,
    limits,
    node::{Duty, Hold, Liveness},
    spec::{Delivery, JobSpec, OnDrain},
    time::Timestamp,
};

use super::{Truth, Violation, broken, nodes::spokesmen};
use crate::{host::SimHost, store::Store};

impl Truth {
    /// A retry is heard: what is over and has not succeeded is to be tried again, with fresh budgets.
    pub(super) fn note_renewed(&mut self, fleet: &Fleet, job: JobId) {
        let Some(record) = fleet.job(job) else { return };
        let is_over = |task: &TaskIndex| match record.end_of(*task) {
            Some(end) => end != "succeeded",
            None => record.held.contains(task),
        };
        self.renewed.extend((0..record.spec.tasks).filter(is_over).map(|task| (job, task)));
    }

    /// Those of which the retry was granted.
    pub(super) fn forget_budgets(&mut self, fleet: &Fleet) {
        for (job, task) in std::mem::take(&mut self.renewed) {
            let is_open = |row: &JobRecord| row.end_of(task).is_none() && !row.held.contains(&task);
            if let Some(known) = self.tasks.get_mut(&(job, task))
                && fleet.job(job).is_some_and(is_open)
            {
                (known.failed, known.lost, known.drained, known.end) = (0, 0, 0, None);
                known.brought_down.clear();
                known.falls = 0;
            }
        }
    }

    pub(super) fn check_attempt(
        &mut self,
        fleet: &Fleet,
        id: AttemptId,
        record: &AttemptRecord,
        time: Timestamp,
    ) -> Result<(), Violation> {
        let Some(job) = fleet.job(id.job) else {
            return broken("FL-1", format!("attempt {id} has no job"));
        };
        if record.placement_reason.is_empty() {
            return broken("FL-14", format!("attempt {id} was placed without a reason"));
        }
        if self.is_doubtful(id.job) {
            return Ok(());
        }
        let known = self.attempts.entry(id).or_default();
        if record.started.is_some() && !known.handed {
            return broken("FL-2", format!("attempt {id} counts as started, and no agent ever gave it to its spawner"));
        }
        if known.withdrawn {
            return broken("FL-2", format!("attempt {id} was taken back and is stored again"));
        }
        let goes_on = (1..id.number.get()).filter_map(std::num::NonZeroU32::new).find(|number| {
            let earlier = self.attempts.get(&AttemptId { number: *number, ..id });
            earlier.is_some_and(|known| known.placed && known.stored.is_none() && !known.withdrawn)
        });
        if let Some(number) = goes_on {
            return broken("FL-9", format!("attempt {id} was placed while attempt {number} of its task has no end"));
        }
        let known = self.attempts.entry(id).or_default();
        let is_new = !std::mem::replace(&mut known.placed, true);
        if is_new && job.cancelled_by.is_some() {
            return broken("FL-1", format!("attempt {id} was placed, and its job was cancelled"));
        }
        if let Some((_, StopReason::Drained)) = record.stopping
            && record.ended.is_none()
            && !self.stopping.contains(&id)
        {
            check_eviction(fleet, id, record, &job.spec, time)?;
        }
        let Some(end) = &record.ended else { return Ok(()) };
        if let Some(first) = known.stored.replace(end.end.clone()) {
            return broken("FL-2", format!("attempt {id} ended as {first} and again as {}", end.end));
        }
        let is_true = is_what_happened(&end.end, known.over.as_ref().map(|(_, verdict)| verdict))
            // Its spawner died with what it knew, or before the order reached it.
            || (end.end == End::SpawnerLost && (known.forgotten || (known.handed && known.over.is_none())));
        if !end.presumed && !is_true {
            let happened = format!("{:?}", known.over);
            return broken("FL-2", format!("attempt {id} is stored as {}, and what happened is {happened}", end.end));
        }
        if end.end == End::Cancelled && !self.cancels.contains(&id.job) {
            return broken("FL-2", format!("attempt {id} ended as cancelled, and nobody cancelled its job"));
        }
        let ordered = record.stopping.map(|(_, reason)| reason);
        if end.end == End::Drained && !matches!(ordered, Some(StopReason::Drained)) {
            return broken("FL-9", format!("attempt {id} ended as drained, and was to stop as {ordered:?}"));
        }
        if end.end == End::TimedOut && job.spec.time_limit.is_none() {
            return broken("FL-2", format!("attempt {id} timed out, and has no limit"));
        }
        self.check_task_end(fleet, id, record, &end.end)
    }

    /// FL-6: what runs on under its spawner is adopted, also when its agent or its stream is a new one.
    pub(super) fn check_presumed(
        &self,
        id: AttemptId,
        record: &AttemptRecord,
        fleet: &Fleet,
        hosts: &[SimHost],
    ) -> Result<(), Violation> {
        let Some(end) = record.ended.as_ref().filter(|end| end.presumed && end.end == End::SpawnerLost) else {
            return Ok(());
        };
        let Some(node) = fleet.node(record.node).filter(|_| !self.is_doubtful(id.job)) else { return Ok(()) };
        let runs = |(at, _): (usize, &SimHost)| self.busy.get(&at).is_some_and(|busy| busy.contains(&id));
        if spokesmen(record.node, node, hosts).any(runs) {
            return broken("FL-6", format!("attempt {id} is given up as {}, and runs on {}", end.end, node.name));
        }
        Ok(())
    }

    /// FL-12: what runs on a node is given up with the node, not before. FL-2: what no agent ever had is not lost, but
    /// was never there.
    pub(super) fn check_given_up(
        &self,
        id: AttemptId,
        record: &AttemptRecord,
        fleet: &Fleet,
        out: &Output,
    ) -> Result<(), Violation> {
        let Some(end) = record.ended.as_ref().filter(|end| end.presumed && !self.is_doubtful(id.job)) else {
            return Ok(());
        };
        let is_gone = |entry: &HistoryEntry| entry.subject == Subject::Node(record.node) && entry.kind == "gone";
        match (&end.end, fleet.node(record.node)) {
            (End::NodeLost(NodeLoss::Silent), Some(node))
                if !matches!(node.liveness, Liveness::Lost(_) | Liveness::Gone(_))
                    && !out.touched.history.iter().any(is_gone) =>
            {
                broken("FL-12", format!("attempt {id} is given up as lost, and its node is {}", node.state()))
            }
            (End::SpawnerLost, _) => {
                let was_handed = self.attempts.get(&id).is_some_and(|known| known.handed);
                let may_repeat = fleet.job(id.job).is_some_and(|job| job.spec.delivery == Delivery::AtLeastOnce);
                match may_repeat && !was_handed {
                    true => broken("FL-2", format!("attempt {id} counts as lost with a spawner that never had it")),
                    false => Ok(()),
                }
            }
            _other => Ok(()),
        }
    }

    /// F7: who has to leave a draining node is told so, at the latest at the deadline.
    pub(super) fn check_evicted(&self, fleet: &Fleet, id: NodeId, time: Timestamp) -> Result<(), Violation> {
        let Some(Duty::Draining(drain)) = fleet.node(id).map(|node| &node.duty) else { return Ok(()) };
        let is_overdue = drain.order.deadline.is_some_and(|deadline| deadline <= time);
        let stays = |(attempt, record): &(AttemptId, &AttemptRecord)| {
            let spec = fleet.job(attempt.job).map(|job| &job.spec);
            let leaves = is_overdue || spec.is_some_and(|spec| spec.on_drain != OnDrain::Finish);
            leaves && record.stopping.is_none() && !self.is_doubtful(attempt.job)
        };
        match fleet.attempts_on(id).find(stays) {
            Some((attempt, _)) => broken("F7", format!("attempt {attempt} is not told to leave {id}, which drains")),
            None => Ok(()),
        }
    }

    /// An attempt runs only where its job wants it. FL-13: never without a fence that it asks.
    pub(super) fn check_place(&self, id: AttemptId, on: &SimHost, store: &Store) -> Result<(), Violation> {
        let Some(spec) = store.job(id.job).map(|job| &job.spec).filter(|_| !self.is_doubtful(id.job)) else {
            return Ok(());
        };
        if let Some(fence) = spec.fences.iter().find(|fence| !on.fences().contains(*fence)) {
            return broken("FL-13", format!("attempt {id} is on {}, which cannot raise {fence}", on.name));
        }
        let labels = on.labels();
        let is_met = |(label, value): &(&String, &String)| labels.get(*label) == Some(*value);
        if spec.pool.as_ref().is_some_and(|pool| *pool != on.pool) || !spec.constraints.iter().all(|one| is_met(&one)) {
            return broken("placement", format!("attempt {id} is on {}, where its job does not want it", on.name));
        }
        Ok(())
    }

    /// A host that fails one start after another is set aside: it must not eat the queue.
    pub(super) fn check_faults(&mut self, fleet: &Fleet, out: &Output) -> Result<(), Violation> {
        let mut failed: BTreeMap<NodeId, u32> = BTreeMap::new();
        for record in out.touched.attempts.values() {
            let faulty = |end: &EndRecord| !end.presumed && end.end.speaks_against_the_host();
            if record.ended.as_ref().is_some_and(faulty) {
                *failed.entry(record.node).or_default() += 1;
            }
        }
        for (id, record) in &out.touched.attempts {
            if record.started.is_some() && !self.started_before.contains(id) {
                // In which order they came in this batch is not known here.
                self.faults.remove(&record.node);
                failed.remove(&record.node);
            }
        }
        for (id, count) in failed {
            // What comes while it cools down is not held against it.
            let Some(node) = fleet.node(id).filter(|_| !self.cooling.contains(&id)) else { continue };
            let faults = self.faults.entry(id).or_default();
            *faults += count;
            // An operator may have resumed it within the same batch: whoever does has looked at it.
            let is_drained =
                |entry: &HistoryEntry| entry.subject == Subject::Node(id) && entry.kind == "drain_requested";
            if node.duty != Duty::Eligible || out.touched.history.iter().any(is_drained) {
                *faults = 0;
            } else if *faults >= limits::FAULTS_BEFORE_COOLING && node.hold == Hold::None {
                return broken("case 17", format!("node {} had {faults} faults in a row, and gets work", node.name));
            }
        }
        Ok(())
    }

    /// A task ends once, by its own result, and is tried again only within its budgets.
    pub(super) fn check_task_end(
        &mut self,
        fleet: &Fleet,
        id: AttemptId,
        record: &AttemptRecord,
        end: &End,
    ) -> Result<(), Violation> {
        let Some(job) = fleet.job(id.job) else { return Ok(()) };
        let task = self.tasks.entry((id.job, id.task)).or_default();
        match end.blame() {
            Blame::Job => task.failed += 1,
            Blame::Node => task.lost += 1,
            // It was asked to save, and that costs it no try.
            Blame::Operator if matches!(job.spec.on_drain, OnDrain::Checkpoint { .. }) && *end == End::Drained => {}
            Blame::Operator => task.drained += 1,
            Blame::Nobody | Blame::Requested => {}
        }
        if record.started.is_some() && end.takes_the_host_along() {
            task.brought_down.insert(record.node);
            task.falls += 1;
        }
        let ended = job.end_of(id.task).map(str::to_owned);
        if self.retried.contains(&id.job) {
            // Before this end or after it, in the same batch.
            return Ok(());
        }
        if let Some(first) = &task.end {
            return broken("FL-2", format!("task {}.{} had ended as {first}", id.job, id.task));
        }
        if *end == End::Succeeded && ended.as_deref() != Some("succeeded") {
            return broken("FL-2", format!("attempt {id} succeeded, and its task is {ended:?}"));
        }
        if *end == End::Cancelled && ended.is_none() {
            return broken("FL-2", format!("attempt {id} was cancelled, and its task goes on"));
        }
        let retries = job.spec.retries;
        let used_up = task.failed > retries.failed || task.lost > retries.lost || task.drained > retries.drained;
        let once = job.spec.delivery == Delivery::AtMostOnce;
        let has_tries = match end.blame() {
            Blame::Job => task.failed <= retries.failed,
            Blame::Node => task.lost <= retries.lost,
            Blame::Operator => task.drained <= retries.drained,
            Blame::Nobody | Blame::Requested => false,
        };
        if ended.is_some() && has_tries && !once && !self.cancels.contains(&id.job) {
            return broken("FL-9", format!("task {}.{} ended after {end} although tries are left", id.job, id.task));
        }
        if ended.is_none() && (used_up || once) {
            return broken("FL-9", format!("task {}.{} goes on after {end} past its budget", id.job, id.task));
        }
        if ended.is_none() && (job.cancelled_by.is_some() || job.cancelled_tasks.contains(&id.task)) {
            return broken("FL-1", format!("task {}.{} goes on after {end}, and was cancelled", id.job, id.task));
        }
        let (count, falls) = (task.brought_down.len(), task.falls);
        let is_poison = count >= limits::POISON_NODES || falls >= limits::POISON_FALLS;
        if ended.is_none() && is_poison && !job.held.contains(&id.task) {
            let what = format!("task {}.{} brought down {count} nodes, {falls} times, and goes on", id.job, id.task);
            return broken("case 17", what);
        }
        if !is_poison && job.held.contains(&id.task) {
            let what = format!("task {}.{} is held, and brought down {count} nodes, {falls} times", id.job, id.task);
            return broken("case 17", what);
        }
        task.end = ended;
        Ok(())
    }

    pub(super) fn check_withdrawn(&mut self, fleet: &Fleet, id: AttemptId) -> Result<(), Violation> {
        if self.is_doubtful(id.job) {
            return Ok(());
        }
        let known = self.attempts.entry(id).or_default();
        known.withdrawn = true;
        let delivery = fleet.job(id.job).map(|job| job.spec.delivery);
        if known.started && delivery != Some(Delivery::AtLeastOnce) {
            return broken("FL-4", format!("attempt {id} was taken back as never started, and it was started"));
        }
        Ok(())
    }

    /// Its end was stored once, or that it never began; of what was lost nobody can say.
    pub(super) fn is_over(&self, id: AttemptId) -> bool {
        let known = self.attempts.get(&id);
        self.is_doubtful(id.job) || known.is_some_and(|known| known.stored.is_some() || known.withdrawn)
    }
}

pub(super) fn phase(record: &AttemptRecord) -> &'static str {
    match (record.ended.is_some(), record.stopping.is_some(), record.started.is_some()) {
        (true, _, _) => "ended",
        (false, true, _) => "stopping",
        (false, false, true) => "started",
        (false, false, false) => "placed",
    }
}

/// F7: nothing that may finish is evicted before the drain's deadline.
fn check_eviction(
    fleet: &Fleet,
    id: AttemptId,
    record: &AttemptRecord,
    spec: &JobSpec,
    time: Timestamp,
) -> Result<(), Violation> {
    let Some(Duty::Draining(drain)) = fleet.node(record.node).map(|node| &node.duty) else {
        return broken("F7", format!("attempt {id} is evicted from a node that is not draining"));
    };
    let is_overdue = drain.order.deadline.is_some_and(|deadline| deadline <= time);
    if spec.on_drain == OnDrain::Finish && !is_overdue {
        return broken("F7", format!("attempt {id} may finish, and is evicted before the deadline"));
    }
    Ok(())
}

/// Could this stored end be what the host saw?
fn is_what_happened(end: &End, over: Option<&Verdict>) -> bool {
    match over {
        None => false,
        Some(Verdict::Own(own)) => own == end || (*own == End::Succeeded && *end == End::OutputLost),
        Some(Verdict::Stopped | Verdict::Left) => {
            matches!(end, End::Cancelled | End::Drained | End::Preempted)
        }
        Some(Verdict::Lost) => *end == End::SpawnerLost,
        Some(Verdict::LeaseEnded) => matches!(end, End::NodeLost(_)),
        Some(Verdict::Denied(reason)) => *end == End::Refused(reason.clone()),
    }
}
