//! What people have said of nodes: it holds until somebody takes it back, and no later word makes a drain longer.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    event::{DrainOrder, DrainThen, Event},
    ids::{NodeId, Revision},
    node::{Drain, Duty, Liveness, NodeRecord},
};

use super::{Violation, broken};

/// What people said, as far as a later word has not taken it back.
#[derive(Debug, Default)]
pub(super) struct Words {
    /// Commands of this batch.
    said: BTreeMap<NodeId, Vec<Command>>,
    /// Somebody ended rolling drains in this batch.
    rolling_ended: bool,
    /// Drains that were proved in this batch: who is told to go may be back in the same one, and begins anew.
    proved: BTreeSet<NodeId>,
    /// A provider could not delete a host, which goes back to what it was.
    delete_failed: bool,
    /// A provider said in this batch that a host is gone: a drain of it was denied, even if it is back by the batch's end.
    host_gone: bool,
    /// Drains that a person asked for, and that no host may refuse.
    firm: BTreeMap<NodeId, Revision>,
    /// Cordoned, or cordoned when their drain began.
    set_aside: BTreeSet<NodeId>,
}

#[derive(Debug)]
enum Command {
    Uncordon,
    Drain(DrainOrder),
    Other,
}

impl Words {
    pub(super) fn begin(&mut self) {
        self.said.clear();
        self.proved.clear();
        (self.rolling_ended, self.delete_failed, self.host_gone) = (false, false, false);
    }

    /// The store lost some of them.
    pub(super) fn forget(&mut self) {
        self.firm.clear();
        self.set_aside.clear();
    }

    pub(super) fn hear(&mut self, event: &Event) {
        let (node, command) = match event {
            Event::Uncordon { node, .. } => (*node, Command::Uncordon),
            Event::Drain { node, order, .. } => (*node, Command::Drain(order.clone())),
            Event::Cordon { node, .. } | Event::Resume { node, .. } | Event::RemoveNode { node, .. } => {
                (*node, Command::Other)
            }
            Event::CancelRolling { .. } => {
                self.rolling_ended = true;
                return;
            }
            Event::HostDeleteFailed { .. } => {
                self.delete_failed = true;
                return;
            }
            Event::HostGone { .. } => {
                self.host_gone = true;
                return;
            }
            _other => return,
        };
        self.said.entry(node).or_default().push(command);
    }

    pub(super) fn note_proved(&mut self, id: NodeId) {
        self.proved.insert(id);
    }

    /// FL-1 of what was said of this node, of which the batch changes something.
    pub(super) fn check(
        &mut self,
        id: NodeId,
        node: &NodeRecord,
        before: Option<(Liveness, &Duty)>,
    ) -> Result<(), Violation> {
        let was_gone = self.host_gone || matches!(before, Some((Liveness::Gone(_), _)));
        let before = before.map(|(_, duty)| duty);
        let said = self.said.remove(&id).unwrap_or_default();
        let was_aside = self.set_aside.contains(&id);
        let is_uncordoned = said.iter().any(|command| matches!(command, Command::Uncordon));
        // One that was told to go, and was brought back, begins anew.
        let is_back = matches!(before, Some(Duty::Stopping { .. }));
        let is_aside = match &node.duty {
            Duty::Cordoned(_) => true,
            Duty::Eligible => false,
            // Several words in one batch: what the record says of before counts.
            Duty::Draining(drain) | Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } => {
                drain.cordon_before.is_some() || (was_aside && !is_uncordoned && !is_back)
            }
        };
        if is_aside {
            self.set_aside.insert(id);
        } else {
            self.set_aside.remove(&id);
        }
        let firm = self.firm.get(&id).copied();
        self.note_firm(id, node, &said, was_gone);
        let Some(before) = before.filter(|_| !self.proved.contains(&id)) else { return Ok(()) };
        check_cordon(node, before, was_aside, &said)?;
        self.check_drain_holds(node, before, firm, &said)?;
        // Whoever was gone may have been drained before its hello of the same batch, and that was denied.
        if was_gone { Ok(()) } else { check_joined(node, before, &said) }
    }

    fn note_firm(&mut self, id: NodeId, node: &NodeRecord, said: &[Command], was_gone: bool) {
        match (&node.duty, said) {
            (Duty::Draining(drain), [Command::Drain(order)])
                if !order.refusable && !was_gone && drain.rolling.is_none() && !is_denied(order, node) =>
            {
                self.firm.insert(id, drain.revision);
            }
            (Duty::Eligible | Duty::Cordoned(_), _) => {
                self.firm.remove(&id);
            }
            (Duty::Draining(_) | Duty::Drained { .. } | Duty::Stopping { .. }, _) => {}
        }
    }

    /// A drain that a person asked for ends by its proof, or by a person.
    fn check_drain_holds(
        &self,
        node: &NodeRecord,
        before: &Duty,
        firm: Option<Revision>,
        said: &[Command],
    ) -> Result<(), Violation> {
        let (Duty::Draining(old) | Duty::Drained { drain: old, .. }) = before else { return Ok(()) };
        let is_off = matches!(node.duty, Duty::Eligible | Duty::Cordoned(_));
        let may_end = !said.is_empty() || self.delete_failed || (self.rolling_ended && old.rolling.is_some());
        if firm == Some(old.revision) && is_off && !may_end {
            return broken("FL-1", format!("the drain of node {} is off, which nobody has said", node.name));
        }
        Ok(())
    }
}

/// Who was set aside is so until a person says otherwise, through restarts and drains.
fn check_cordon(node: &NodeRecord, before: &Duty, was_aside: bool, said: &[Command]) -> Result<(), Violation> {
    let was_aside = match before {
        Duty::Cordoned(_) => true,
        Duty::Draining(_) | Duty::Drained { .. } => was_aside,
        Duty::Eligible | Duty::Stopping { .. } => false,
    };
    let is_uncordoned = said.iter().any(|command| matches!(command, Command::Uncordon));
    if was_aside && node.duty == Duty::Eligible && !is_uncordoned {
        return broken("FL-1", format!("node {} was cordoned, which nobody has taken back", node.name));
    }
    Ok(())
}

fn is_denied(order: &DrainOrder, node: &NodeRecord) -> bool {
    (order.then == DrainThen::Delete && node.host.is_none()) || matches!(node.liveness, Liveness::Gone(_))
}

/// Two requests for one drain: it is over no later than either says, and what is to follow does.
fn check_joined(node: &NodeRecord, before: &Duty, said: &[Command]) -> Result<(), Violation> {
    let ([Command::Drain(order)], Duty::Draining(drain)) = (said, &node.duty) else { return Ok(()) };
    // Who is part of a rolling drain is drained by that alone: what else asks for it is denied.
    let is_rolling = node.rolling.is_some() || drain.rolling.is_some();
    if is_rolling || is_denied(order, node) || matches!(before, Duty::Stopping { .. }) {
        return Ok(());
    }
    let later = |deadline| drain.order.deadline.is_none_or(|kept| kept > deadline);
    if order.deadline.is_some_and(later) {
        return broken("F7", format!("the drain of node {} lasts longer than was asked for", node.name));
    }
    let earlier = match before {
        Duty::Draining(old) if old.revision == drain.revision => old.order.then,
        // It ended and began anew in this batch, or a hello of a host that knows more has raised its number: who can tell?
        Duty::Draining(_) => return Ok(()),
        Duty::Drained { .. } | Duty::Stopping { .. } | Duty::Eligible | Duty::Cordoned(_) => DrainThen::Nothing,
    };
    let wanted = if order.then == DrainThen::Nothing { earlier } else { order.then };
    check_follows(node, drain, wanted)
}

fn check_follows(node: &NodeRecord, drain: &Drain, wanted: DrainThen) -> Result<(), Violation> {
    if drain.order.then != wanted {
        let (kept, wanted) = (drain.order.then.name(), wanted.name());
        return broken("FL-1", format!("after its drain node {} was to {wanted}, and is to {kept}", node.name));
    }
    Ok(())
}
