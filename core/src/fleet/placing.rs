//! Waiting tasks go to nodes: the first in line of each class, as long as
//! there is room; then a little ahead, so that a host never waits for us.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};
use core::mem;

use super::{Attempt, Fleet, Output, Timer};
use crate::{
    effect::{AttemptRecord, Effect},
    ids::{AttemptId, Epoch, JobId, NodeId},
    limits, placement,
    policy::PlacementOrder,
    queue::{Class, Turn},
    time::{Millis, Timestamp},
};

/// Sent ahead for longer than this: the guess of its host's pace was wrong.
pub(super) const PREFILL_STALE: Millis = Millis::from_secs(1);
/// With more changed nodes than this, all are looked at in their order.
const FREED_MAX: usize = 64;

impl Fleet {
    pub(super) fn place(&mut self, now: Timestamp, out: &mut Output) {
        let freed = mem::take(&mut self.freed);
        if freed.len() > FREED_MAX {
            self.queue.unblock_all();
        }
        let mut orders = BTreeMap::new();
        // The heads of all classes in the order of their turns.
        let mut heads: BTreeSet<(Turn, Class, bool)> = self
            .queue
            .heads()
            .filter(|(_, _, blocked)| !blocked || !freed.is_empty())
            .map(|(turn, class, blocked)| (turn, class.clone(), blocked))
            .collect();
        while let Some((turn, class, blocked)) = heads.pop_first() {
            match self.choose(&class, blocked.then_some(&freed)) {
                Some((node, reason)) => {
                    self.place_first(turn.1, node, reason, false, now, &mut orders, out);
                    if let Some(turn) = self.queue.head(&class) {
                        heads.insert((turn, class, blocked));
                    }
                }
                None => self.queue.block(&class),
            }
        }
        for node in freed {
            self.prefill(node, now, &mut orders, out);
        }
        self.send(orders, out);
    }

    fn choose(&self, class: &Class, among: Option<&BTreeSet<NodeId>>) -> Option<(NodeId, String)> {
        let indexes = self.indexes.iter().filter(|(pool, _)| class.pool.as_ref().is_none_or(|wanted| wanted == *pool));
        let mut chosen = indexes.filter_map(|(pool, index)| {
            let order = self.pools.get(pool).map_or(PlacementOrder::default(), |pool| pool.record.policy.placement);
            match among {
                Some(among) => index.choose_among(order, class, among, &self.nodes),
                None => index.choose(order, class, &self.nodes),
            }
        });
        chosen.next()
    }

    /// Sends ahead as much as the node will have done within the horizon, at its measured pace (Little's law).
    fn prefill(&mut self, id: NodeId, now: Timestamp, orders: &mut Orders, out: &mut Output) {
        let Some(node) = self.nodes.get(&id).filter(|node| node.is_placeable()) else { return };
        let Some(mean) = node.mean_task else { return };
        let mut heads: Vec<(Turn, Class)> = self
            .queue
            .heads()
            .filter(|(_, class, _)| class.may_prefill && placement::feasible(class, node).is_ok())
            .map(|(turn, class, _)| (turn, class.clone()))
            .collect();
        heads.sort();
        for (_, class) in heads {
            while let Some(node) = self.nodes.get(&id)
                && (node.prefilled.len() as u64) < depth(node.record.capacity.count_of(&class.request), mean)
                && let Some((_, job)) = self.queue.head(&class)
            {
                let reason = format!("sent ahead: a task takes {mean} there");
                self.place_first(job, id, reason, true, now, orders, out);
            }
        }
    }

    /// Takes the job's first waiting task for this node.
    #[allow(clippy::too_many_arguments, reason = "one placement's parts")]
    fn place_first(
        &mut self,
        id: JobId,
        node_id: NodeId,
        reason: String,
        prefilled: bool,
        now: Timestamp,
        orders: &mut Orders,
        out: &mut Output,
    ) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(node) = self.nodes.get_mut(&node_id) else { return };
        let Some((task, number)) = job.place_next() else { return };
        let attempt = AttemptId { job: id, task, number };
        let term = self.meta.term;
        let incarnation = node.record.incarnation;
        let record = AttemptRecord {
            node: node_id,
            incarnation,
            term,
            placement_reason: reason,
            placed: now,
            started: None,
            stopping: None,
            ended: None,
        };
        self.placements += 1;
        node.last_placed = self.placements;
        node.record.attempts_total += 1;
        node.record.idle_since = None;
        node.attempts.insert(attempt);
        if prefilled {
            if node.prefilled.is_empty() {
                self.timers.set(now + PREFILL_STALE, Timer::Prefill(node_id));
            }
            node.prefilled.push_back(attempt);
        } else {
            node.allocated = node.allocated.plus(&job.spec.request);
        }
        out.touched.attempts.insert(attempt, record.clone());
        out.touched.jobs.insert(id);
        out.touched.nodes.insert(node_id);
        self.attempts.insert(attempt, Attempt { record, prefilled, counted: None });
        orders.entry(node_id).or_default().push((attempt, Epoch { term, attempt: number }));
        self.requeue(id);
        self.reindex(node_id);
    }

    fn send(&self, orders: Orders, out: &mut Output) {
        for (node, attempts) in orders {
            let Some(session) = self.nodes.get(&node).and_then(|node| node.session) else { continue };
            for attempts in attempts.chunks(limits::START_BATCH_MAX) {
                out.effects.push(Effect::Start { node, session, attempts: attempts.to_vec() });
            }
        }
    }
}

/// What is to be sent in this settling.
type Orders = BTreeMap<NodeId, Vec<(AttemptId, Epoch)>>;

fn depth(slots: u64, mean: Millis) -> u64 {
    (slots.saturating_mul(limits::PREFILL_HORIZON.0) / mean.0.max(limits::PREFILL_TASK_MIN.0))
        .min(u64::from(limits::PREFILL_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_much_is_sent_ahead_as_is_done_within_the_horizon() {
        assert_eq!(depth(4, limits::PREFILL_HORIZON), 4, "each slot ends one task in that time");
        assert_eq!(depth(4, Millis(limits::PREFILL_HORIZON.0 * 4)), 1);
        assert_eq!(depth(4, Millis::from_secs(60)), 0, "long tasks are not sent ahead");
        assert_eq!(depth(4, Millis(0)), depth(4, limits::PREFILL_TASK_MIN));
        assert_eq!(depth(1_000_000, Millis(1)), u64::from(limits::PREFILL_MAX));
    }
}
