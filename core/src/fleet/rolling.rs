//! Rolling drains: whose turn it is. A node begins to drain only while fewer
//! than the budget of its rolling drain do, whoever told those to.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::{String, ToString as _},
    vec::Vec,
};

use super::{Fleet, Output, Timer, record};
use crate::{
    denied::Denied,
    effect::{Reply, Subject},
    event::{DrainOrder, DrainThen},
    ids::{Actor, NodeId},
    limits,
    mutation::{self, Mutation},
    node::{Drain, Duty, Liveness, NodeRecord},
    rolling::{Members, Rolling, RollingId, RollingOrder},
    time::{Millis, Timestamp},
};

/// What is remembered of rolling drains, and rebuilt by a restart.
#[derive(Debug, Default)]
pub(super) struct Rollings {
    members: BTreeMap<RollingId, Members>,
    /// None of the waiting nodes could begin: they are not looked at again before.
    next_look: BTreeMap<RollingId, Timestamp>,
}

impl Rollings {
    /// The node's place follows from its record.
    pub(super) fn note(&mut self, id: NodeId, node: &NodeRecord) {
        let Some(rolling) = node.rolling else { return };
        self.members.entry(rolling).or_default().put(id, matches!(node.duty, Duty::Draining(_)));
    }

    pub(super) fn members(&self, id: RollingId) -> Option<&Members> {
        self.members.get(&id)
    }

    fn leave(&mut self, rolling: RollingId, node: NodeId) {
        if let Some(members) = self.members.get_mut(&rolling) {
            members.remove(node);
        }
    }
}

/// What a rolling drain does with a node whose turn could be now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Begin.
    Now,
    /// Not yet: it is not heard, so that its drain would hold a place for nothing.
    Later,
    /// It need not be drained any more.
    Over(&'static str),
}

impl Fleet {
    pub(super) fn drain_rolling(
        &mut self,
        nodes: &[NodeId],
        order: RollingOrder,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        if order.at_once == 0 {
            return Err(Denied::LimitReached { limit: String::from("a rolling drain needs at least 1 at once") });
        }
        let present = self.meta.rollings.len();
        if present >= limits::ROLLINGS_MAX {
            let limit = format!("{present} rolling drains go on, at most {} may", limits::ROLLINGS_MAX);
            return Err(Denied::LimitReached { limit });
        }
        let (mut fit, mut refused) = (BTreeSet::new(), Vec::new());
        for id in nodes {
            match self.may_roll(*id, &order) {
                Ok(()) => {
                    fit.insert(*id);
                }
                Err(denied) => refused.push(denied),
            }
        }
        let Ok(count @ 1..) = u32::try_from(fit.len()) else {
            let none = || Denied::LimitReached { limit: String::from("a rolling drain needs at least 1 node") };
            return Err(refused.into_iter().next().unwrap_or_else(none));
        };
        let id = self.meta.next_rolling;
        self.meta.next_rolling = id.next();
        let nodes = if count == 1 { "node" } else { "nodes" };
        let sentence =
            format!("{count} {nodes}, {} at once, then {}: {}", order.at_once, order.then.name(), order.reason);
        record(out, now, Subject::Fleet, "rolling_requested", format!("{id}: {sentence}"), Some(&order.actor));
        for node in &fit {
            self.wait_for_turn(*node, id, &order, now, out);
        }
        let rolling = Rolling { order, requested: now, nodes: count, drained: 0, took: Millis(0) };
        self.meta.rollings.insert(id, rolling);
        out.touched.meta = true;
        let refused = refused.iter().map(Denied::to_string).collect();
        Ok(Reply::Rolling { rolling: id, nodes: fit, refused })
    }

    fn may_roll(&self, id: NodeId, order: &RollingOrder) -> Result<(), Denied> {
        let node = &self.nodes.get(&id).ok_or(Denied::UnknownNode(id))?.record;
        let refuse = |state: &str, advice| {
            let (node, state) = (node.name.clone(), String::from(state));
            Err(Denied::NodeState { node, state, asked: "drain", advice })
        };
        match (&node.liveness, node.rolling, node.host) {
            (Liveness::Gone(_), ..) => refuse("gone", "it has left the fleet; `muster node remove` forgets it"),
            (_, Some(_), _) => refuse(
                "part of another rolling drain",
                "`muster drain list` shows it; `muster node resume` takes the node out of it",
            ),
            (_, None, None) if order.then == DrainThen::Delete => {
                refuse("of no provider", "nobody can delete it; drain it with --then stop or --then poweroff")
            }
            (_, None, _) => Ok(()),
        }
    }

    fn wait_for_turn(
        &mut self,
        id: NodeId,
        rolling: RollingId,
        order: &RollingOrder,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.record.rolling = Some(rolling);
        let sentence = format!("it waits for its turn in {rolling}, {} at once: {}", order.at_once, order.reason);
        record(out, now, Subject::Node(id), "drain_awaited", sentence, Some(&order.actor));
        out.touched.nodes.insert(id);
        self.reindex(id);
    }

    /// Begins drains while places are free. Comes before the nodes are settled, and so before placement: nothing is
    /// placed on a node whose turn has come.
    pub(super) fn settle_rollings(&mut self, now: Timestamp, out: &mut Output) {
        let ids: Vec<RollingId> = self.meta.rollings.keys().copied().collect();
        for id in ids {
            self.settle_rolling(id, now, out);
            self.end_rolling(id, now, out);
        }
    }

    fn settle_rolling(&mut self, id: RollingId, now: Timestamp, out: &mut Output) {
        let Some(rolling) = self.meta.rollings.get(&id) else { return };
        let Some(members) = self.rollings.members(id) else { return };
        let at_once = usize::try_from(rolling.order.at_once).unwrap_or(usize::MAX);
        let drain_now = members.draining.len();
        let free =
            if mutation::is_on(Mutation::DrainBudgetIgnored) { usize::MAX } else { at_once.saturating_sub(drain_now) };
        let rests = self.rollings.next_look.get(&id).is_some_and(|next| *next > now);
        if free == 0 || members.waiting.is_empty() || rests {
            return;
        }
        let order = rolling.order.clone();
        let (turns, over) = self.turns(&members.waiting, &order);
        for (node, why) in &over {
            self.leave_rolling(*node, why, None, now, out);
        }
        let begun = turns.len().min(free);
        for node in turns.into_iter().take(free) {
            self.begin_turn(node, id, &order, now, out);
        }
        if begun < free {
            // The others are not heard, or there are none: an event brings them back, and is not waited for.
            self.rollings.next_look.insert(id, now + limits::POOL_LOOK);
            self.wake_at(now + limits::POOL_LOOK, Timer::Rolling(id));
        }
    }

    /// Whose turn could be now, those first with which least work would go; and who is over.
    fn turns(&self, waiting: &BTreeSet<NodeId>, order: &RollingOrder) -> (Vec<NodeId>, Vec<(NodeId, &'static str)>) {
        let (mut turns, mut over) = (Vec::new(), Vec::new());
        for id in waiting {
            let Some(node) = self.nodes.get(id) else { continue };
            match turn_of(&node.record, order) {
                Turn::Now => turns.push((node.attempts.len(), *id)),
                Turn::Later => {}
                Turn::Over(why) => over.push((*id, why)),
            }
        }
        turns.sort_unstable();
        (turns.into_iter().map(|(_, id)| id).collect(), over)
    }

    fn begin_turn(&mut self, node: NodeId, id: RollingId, order: &RollingOrder, now: Timestamp, out: &mut Output) {
        let asked = DrainOrder {
            deadline: order.within.map(|within| now + within),
            then: order.then,
            refusable: false,
            actor: order.actor.clone(),
            reason: order.reason.clone(),
        };
        // It is live, and was looked at when it was asked for: a drain of it is never denied.
        let _granted = self.drain(node, asked, now, out);
        if let Some(node) = self.nodes.get_mut(&node)
            && let Duty::Draining(drain) = &mut node.record.duty
        {
            drain.rolling = Some(id);
        }
    }

    /// All its nodes have left.
    fn end_rolling(&mut self, id: RollingId, now: Timestamp, out: &mut Output) {
        if self.rollings.members(id).is_some_and(|members| !members.is_empty()) {
            return;
        }
        if let Some(rolling) = self.forget_rolling(id, out) {
            let (drained, nodes, took) = (rolling.drained, rolling.nodes, now.since(rolling.requested));
            let sentence = format!("{id}: {drained} of {nodes} nodes drained in {took}: {}", rolling.order.reason);
            record(out, now, Subject::Fleet, "rolling_done", sentence, Some(&rolling.order.actor));
        }
    }

    fn forget_rolling(&mut self, id: RollingId, out: &mut Output) -> Option<Rolling> {
        self.rollings.members.remove(&id);
        self.rollings.next_look.remove(&id);
        out.touched.meta = true;
        self.meta.rollings.remove(&id)
    }

    /// Those that wait stay as they are, those that drain for it are resumed, and those that are drained stay so.
    pub(super) fn cancel_rolling(
        &mut self,
        id: RollingId,
        actor: &Actor,
        reason: &str,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        if !self.meta.rollings.contains_key(&id) {
            return Err(Denied::UnknownRolling(id));
        }
        let members = self.rollings.members(id).cloned().unwrap_or_default();
        let why = "the rolling drain was cancelled";
        for node in &members.waiting {
            self.leave_rolling(*node, why, Some(actor), now, out);
        }
        let mut resumed = BTreeSet::new();
        for node in members.draining {
            let own = self.nodes.get(&node).and_then(|node| node.record.drain()).and_then(|drain| drain.rolling);
            self.leave_rolling(node, why, Some(actor), now, out);
            if own == Some(id) || mutation::is_on(Mutation::RollingResumesAll) {
                record(out, now, Subject::Node(node), "resumed", String::from(reason), Some(actor));
                self.restore_duty(node, out);
                resumed.insert(node);
            }
        }
        let waited = members.waiting.len();
        let sentence = format!("{id}: {waited} nodes stay, {} are resumed: {reason}", resumed.len());
        record(out, now, Subject::Fleet, "rolling_cancelled", sentence, Some(actor));
        self.forget_rolling(id, out);
        Ok(Reply::RollingCancelled { waited: members.waiting, resumed })
    }

    /// The node is no part of its rolling drain any more; nothing else changes for it.
    pub(super) fn leave_rolling(
        &mut self,
        id: NodeId,
        why: &str,
        actor: Option<&Actor>,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(rolling) = node.record.rolling.take() else { return };
        if let Duty::Draining(drain) = &mut node.record.duty {
            drain.rolling = None;
        }
        self.rollings.leave(rolling, id);
        record(out, now, Subject::Node(id), "left_rolling", format!("{rolling}: {why}"), actor);
        out.touched.nodes.insert(id);
    }

    /// Its drain is proved: its place is free.
    pub(super) fn count_drained(&mut self, id: NodeId, drain: &Drain, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        // Somebody else's drain that asks for less is not the one that it waits for.
        let Some(rolling) = node.record.rolling.filter(|rolling| drain.rolling == Some(*rolling)) else { return };
        node.record.rolling = None;
        self.rollings.leave(rolling, id);
        if let Some(known) = self.meta.rollings.get_mut(&rolling) {
            known.drained += 1;
            known.took = Millis(known.took.0.saturating_add(now.since(drain.requested).0));
            out.touched.meta = true;
        }
    }

    /// A record that is forgotten waits for nothing.
    pub(super) fn forget_member(&mut self, id: NodeId, record: &NodeRecord) {
        if let Some(rolling) = record.rolling {
            self.rollings.leave(rolling, id);
        }
    }
}

fn turn_of(node: &NodeRecord, order: &RollingOrder) -> Turn {
    match (&node.liveness, &node.duty) {
        (_, Duty::Stopping { .. }) => Turn::Over("it was drained and told to go"),
        (_, Duty::Drained { drain, .. }) if covers(drain, order, &node.name) => Turn::Over("it was drained already"),
        (Liveness::Joining | Liveness::Silent(_) | Liveness::Lost(_) | Liveness::Gone(_), _) => Turn::Later,
        (Liveness::Live, Duty::Eligible | Duty::Cordoned(_) | Duty::Drained { .. }) => Turn::Now,
        (Liveness::Live, Duty::Draining(_)) => Turn::Later,
    }
}

/// Somebody drained it for good, and nothing more is asked. What a host does for its own stop is over when it is back.
fn covers(drain: &Drain, order: &RollingOrder, name: &str) -> bool {
    order.then == DrainThen::Nothing && drain.order.actor != super::draining::host_actor(name)
}
