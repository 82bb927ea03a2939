//! Nodes: drains that are proved, copies that are fenced, silence that is not held against them.

use muster_core::{
    effect::{HistoryEntry, Subject},
    fleet::Fleet,
    ids::NodeId,
    lease, limits,
    node::{Drain, Duty, Hold, Liveness, NodeRecord},
    spec::Delivery,
    time::Timestamp,
};

use super::{Truth, Violation, broken, surely};
use crate::host::SimHost;

impl Truth {
    pub(super) fn check_node(
        &mut self,
        fleet: &Fleet,
        id: NodeId,
        node: &NodeRecord,
        hosts: &[SimHost],
        now: Timestamp,
    ) -> Result<(), Violation> {
        let before = self.before.remove(&id);
        let was = before.as_ref().map(|(liveness, ..)| *liveness);
        let before = before.map(|(_, duty, _)| duty);
        self.words.check(id, node, was.zip(before.as_ref()))?;
        let heard = self.heard.get(&id).copied().unwrap_or_default();
        let quiet = now.since(heard.max(self.led));
        match (was, node.liveness) {
            (Some(Liveness::Live), Liveness::Silent(_)) => {
                if quiet < surely(lease::duration()) {
                    return broken("FL-12", format!("node {} counts as silent {quiet} after it was heard", node.name));
                }
                self.note_silence(fleet, id, now);
                self.check_fenced(id, node, hosts, fleet)?;
            }
            (Some(Liveness::Silent(_)), Liveness::Lost(_)) => {
                if quiet < surely(limits::LOST_AFTER) {
                    return broken("FL-12", format!("node {} was given up {quiet} after it was heard", node.name));
                }
                if now < self.brake_until {
                    let rest = self.brake_until.since(now);
                    return broken("FL-12", format!("node {} was given up although the brake holds {rest}", node.name));
                }
                let paused = now.since(self.given_up);
                if now < self.paced_until && paused < surely(limits::BRAKE_PAUSE) {
                    return broken("FL-12", format!("node {} was given up {paused} after another", node.name));
                }
                self.given_up = now;
                self.check_fenced(id, node, hosts, fleet)?;
            }
            (Some(Liveness::Live | Liveness::Joining), Liveness::Lost(_)) => {
                return broken("FL-12", format!("node {} was given up without having been silent", node.name));
            }
            _no_loss => {}
        }
        let is_proved = |duty: &Duty| matches!(duty, Duty::Drained { .. } | Duty::Stopping { .. });
        if let Some(drain) = node.drain().filter(|_| is_proved(&node.duty)) {
            self.had_turn.insert((id, drain.order.reason.clone()));
        }
        let began = |duty: &Duty| matches!(duty, Duty::Draining(_));
        // One that another life has to prove anew is the drain that it was.
        let is_the_same = |duty: &Duty, drain: &Drain| match duty {
            Duty::Draining(_) => true,
            Duty::Drained { drain: old, .. } | Duty::Stopping { drain: old, .. } => old.requested == drain.requested,
            Duty::Eligible | Duty::Cordoned(_) => false,
        };
        if let Duty::Draining(drain) = &node.duty
            && !before.as_ref().is_some_and(|before| is_the_same(before, drain))
            && drain.order.actor.0 == "scaler"
        {
            self.check_scale_in(fleet, id, node, now)?;
        }
        if let Duty::Draining(drain) = &node.duty
            && !before.as_ref().is_some_and(began)
        {
            self.check_drain_budget(fleet, &drain.order.reason)?;
        }
        if let (Some(Duty::Draining(old)), Duty::Draining(new)) = (&before, &node.duty)
            && old.revision == new.revision
            && let Some(deadline) = old.order.deadline
            && new.order.deadline.is_none_or(|later| later > deadline)
        {
            return broken("F7", format!("the drain of {} was put off by a later request", node.name));
        }
        if is_proved(&node.duty) && !before.as_ref().is_some_and(is_proved) {
            self.check_proved(id, node, hosts)?;
        }
        Ok(())
    }

    /// A host that cools down does so for its time, whatever it says meanwhile.
    pub(super) fn check_hold(&self, id: NodeId, node: &NodeRecord, time: Timestamp) -> Result<(), Violation> {
        match self.before.get(&id) {
            Some((_, _, Hold::Cooling { until, .. })) if node.hold == Hold::None && time < *until => {
                let left = until.since(time);
                broken("case 17", format!("node {} gets work again {left} before it has cooled down", node.name))
            }
            _other => Ok(()),
        }
    }

    /// Who is gone, or has proved that nothing is left, has had its turn, also if it speaks again in the same batch and
    /// has to prove it anew.
    pub(super) fn note_turn_over(&mut self, entry: &HistoryEntry, fleet: &Fleet) {
        if let (Subject::Node(id), "drain_proved") = (&entry.subject, entry.kind.as_str()) {
            self.words.note_proved(*id);
        }
        if let (Subject::Node(id), "gone" | "drain_proved") = (&entry.subject, entry.kind.as_str())
            && let Some(drain) = fleet.node(*id).and_then(NodeRecord::drain)
        {
            self.had_turn.insert((*id, drain.order.reason.clone()));
        }
    }

    /// No more nodes drain at once than the operator who drains them in turn has said.
    fn check_drain_budget(&self, fleet: &Fleet, reason: &str) -> Result<(), Violation> {
        let Some(at_once) = self.drain_budgets.get(reason) else { return Ok(()) };
        let drains = |row: &NodeRecord| matches!(&row.duty, Duty::Draining(drain) if drain.order.reason == reason);
        let counts = |id: NodeId| !self.had_turn.contains(&(id, reason.to_owned()));
        let drain_now = fleet.nodes().filter(|(id, row)| drains(row) && counts(*id)).count();
        if drain_now > usize::try_from(*at_once).unwrap_or(usize::MAX) {
            return broken("the drain budget", format!("{drain_now} nodes drain {reason}, and {at_once} may at once"));
        }
        Ok(())
    }

    /// FL-7: the host that spoke is closed on disk and holds nothing.
    pub(super) fn check_proved(&self, id: NodeId, node: &NodeRecord, hosts: &[SimHost]) -> Result<(), Violation> {
        let revision = node.drain().map(|drain| drain.revision);
        for (at, host) in spokesmen(id, node, hosts) {
            if !host.sandboxes.is_empty() || self.busy.get(&at).is_some_and(|busy| !busy.is_empty()) {
                return broken("FL-7", format!("node {} counts as drained and holds work", node.name));
            }
            if host.closed_for != revision {
                return broken("FL-7", format!("node {} counts as drained and is not closed", node.name));
            }
        }
        Ok(())
    }

    /// FL-3: when a node's lease has run out here, exclusive work is dead there.
    pub(super) fn check_fenced(
        &self,
        id: NodeId,
        node: &NodeRecord,
        hosts: &[SimHost],
        fleet: &Fleet,
    ) -> Result<(), Violation> {
        for (at, _) in spokesmen(id, node, hosts) {
            for attempt in self.busy.get(&at).into_iter().flatten() {
                let spec = fleet.job(attempt.job).map(|job| &job.spec).filter(|_| !self.is_doubtful(attempt.job));
                if spec.is_some_and(|spec| spec.delivery == Delivery::Exclusive) {
                    let state = node.state();
                    return broken("FL-3", format!("node {} is {state} and still runs {attempt}", node.name));
                }
            }
        }
        Ok(())
    }

    /// Counts for itself when much of the fleet fell silent at once.
    pub(super) fn note_silence(&mut self, fleet: &Fleet, id: NodeId, now: Timestamp) {
        // By our clock, which may be slower than the leader's: only what surely counts.
        let window = surely(lease::duration());
        self.silences.push((now, id));
        self.silences.retain(|(at, _)| now.since(*at) < window);
        let is = |node: NodeId, wanted: &str| fleet.node(node).is_some_and(|row| row.liveness.name() == wanted);
        let fresh = self.silences.iter().filter(|(_, node)| is(*node, "silent")).count();
        let live = fleet.nodes().filter(|(_, node)| node.liveness == Liveness::Live).count();
        if live + fresh >= limits::BRAKE_NODES_MIN && fresh * 3 > live + fresh {
            self.brake_until = now + surely(limits::BRAKE_HOLD);
        }
    }
}

/// The machines that speak as this node in its present life: never a copy that it was not told of.
pub(super) fn spokesmen<'a>(
    id: NodeId,
    node: &'a NodeRecord,
    hosts: &'a [SimHost],
) -> impl Iterator<Item = (usize, &'a SimHost)> + 'a {
    hosts
        .iter()
        .enumerate()
        .filter(move |(_, host)| host.node == Some(id) && host.key == node.key)
        .filter(move |(_, host)| !host.is_gone && host.boot_id() == node.boot_id)
}
