//! Hosts that joined by themselves and that scale-in has sent to sleep are
//! woken by a program of their pool's policy.
//!
//! ```text
//! asleep --scale-out--> waking --hello--> as it was before its drain
//!   ^                     |
//!   +--- the program says no, or the boot deadline passes: it is tried last
//! ```

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use super::{Fleet, Output, Timer, draining::join, record};
use crate::{
    denied::Denied,
    effect::{Effect, Reply, Subject},
    event::DrainOrder,
    ids::{Actor, HostRequestId, NodeId, PoolName},
    limits,
    node::{Duty, SCALER},
    policy::PoolPolicy,
    pool::{Host, Pool},
    time::Timestamp,
};

/// Who is woken first: of those that no waking has failed for, the one that has slept for longest, because the one that
/// went just now may still be on its way down; then whose failure is longest ago.
pub(super) fn in_order(
    asleep: Vec<(Timestamp, NodeId)>,
    hosts: &BTreeMap<HostRequestId, Host>,
    unwoken: &BTreeMap<NodeId, Timestamp>,
) -> Vec<NodeId> {
    let waking: BTreeSet<NodeId> = hosts.values().filter_map(Host::waking).collect();
    let mut order: Vec<_> = asleep
        .into_iter()
        .filter(|(_, node)| !waking.contains(node))
        .map(|(since, node)| (unwoken.get(&node).copied(), since, node))
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(.., node)| node).collect()
}

/// When a waking that was asked for at `told` is looked at again.
pub(super) fn next_look(since: Timestamp, told: Timestamp, policy: &PoolPolicy) -> Timestamp {
    (since + policy.boot_deadline).min(told + limits::WAKE_ASK_AGAIN)
}

impl Pool {
    /// This node is removed: nobody wakes it any more.
    pub(super) fn forget_sleeper(&mut self, id: NodeId, out: &mut Output) {
        self.unwoken.remove(&id);
        if let Some(host) = self.record.waking_of(id) {
            self.record.hosts.remove(&host);
            out.touched.pools.insert(self.record.policy.name.clone());
        }
    }

    /// A host that was asked for at `since` is here: failures are over.
    pub(super) fn note_boot(&mut self, since: Timestamp, what: &str, now: Timestamp, out: &mut Output) {
        let name = &self.record.policy.name;
        self.record.failures = 0;
        self.record.paused_until = None;
        if self.record.paused.take().is_some() {
            let subject = Subject::Pool { name: name.clone(), sizes: None };
            record(out, now, subject, "unpaused", String::from(what), None);
        }
        self.record.boots.note(now.since(since));
        out.touched.pools.insert(name.clone());
    }
}

impl Fleet {
    /// The request under which this node is being woken.
    pub(super) fn waking_of(&self, id: NodeId) -> Option<HostRequestId> {
        self.pools.get(&self.nodes.get(&id)?.record.pool)?.record.waking_of(id)
    }

    pub(super) fn wake_host(&mut self, name: &PoolName, id: NodeId, reason: &str, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let host = self.meta.next_host;
        self.meta.next_host = host.next();
        out.touched.meta = true;
        pool.record.hosts.insert(host, Host::Waking { node: id, since: now, told: now });
        self.timers.set(next_look(now, now, &pool.record.policy), Timer::Pool(name.clone()));
        out.touched.pools.insert(name.clone());
        out.effects.push(Effect::WakeHost { pool: name.clone(), host, node: id });
        let scaler = Actor(String::from(SCALER));
        record(out, now, Subject::Node(id), "waking", String::from(reason), Some(&scaler));
    }

    /// Asks again for those that have not said a word, and gives up on those whose boot deadline has passed.
    pub(super) fn remind_of_waking(&mut self, name: &PoolName, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let mut failed = Vec::new();
        for (host, state) in &mut pool.record.hosts {
            let Host::Waking { node, since, told } = state else { continue };
            if now.since(*since) >= pool.record.policy.boot_deadline {
                failed.push((*host, *node));
            } else if now.since(*told) >= limits::WAKE_ASK_AGAIN {
                *told = now;
                out.touched.pools.insert(name.clone());
                out.effects.push(Effect::WakeHost { pool: name.clone(), host: *host, node: *node });
                self.timers.set(next_look(*since, now, &pool.record.policy), Timer::Pool(name.clone()));
            }
        }
        for (host, node) in failed {
            self.waking_failed(name, host, node, "it did not wake before its boot deadline", now, out);
        }
    }

    /// Nothing was made, so nothing has to be ended: it sleeps on.
    pub(super) fn waking_failed(
        &mut self,
        name: &PoolName,
        host: HostRequestId,
        node: NodeId,
        reason: &str,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        pool.record.hosts.remove(&host);
        pool.unwoken.insert(node, now);
        let known = self.nodes.get(&node).map(|node| node.record.name.as_str());
        let sentence = format!("`{}`: {reason}", known.unwrap_or("a node that was removed"));
        record(out, now, Subject::Node(node), "wake_failed", String::from(reason), None);
        self.count_failure(name, &sentence, now, out);
    }

    /// A host that sleeps and that a person drains is that person's: no scale-out wakes it.
    pub(super) fn drain_asleep(
        &mut self,
        id: NodeId,
        order: DrainOrder,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let is_waking = self.waking_of(id).is_some();
        let node = self.nodes.get_mut(&id).ok_or(Denied::UnknownNode(id))?;
        if is_waking {
            return Err(Denied::NodeState {
                node: node.record.name.clone(),
                state: String::from("being woken"),
                asked: "drain",
                advice: "wait until it is ready, or given up at the pool's boot deadline",
            });
        }
        if let Duty::Stopping { drain, .. } = &mut node.record.duty {
            let sentence = format!("{} (it sleeps, and is not woken any more)", order.reason);
            record(out, now, Subject::Node(id), "drain_requested", sentence, Some(&order.actor));
            drain.order = join(&drain.order, order);
            out.touched.nodes.insert(id);
        }
        Ok(Reply::NodeChanged)
    }

    /// It has said hello, and is a node like any other from now on.
    pub(super) fn settle_woken_host(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.nodes.get(&id).and_then(|node| self.pools.get_mut(&node.record.pool)) else { return };
        // Also one that a person has started.
        pool.unwoken.remove(&id);
        let Some(host) = pool.record.waking_of(id) else { return };
        if let Some(Host::Waking { since, .. }) = pool.record.hosts.remove(&host) {
            pool.note_boot(since, "a host has woken", now, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_did_not_wake_is_tried_last_and_the_one_that_failed_longest_ago_before_the_others() {
        let asleep = [(1, 1), (2, 2), (3, 3)].map(|(since, node)| (Timestamp(since), NodeId(node)));
        let unwoken = [(1, 9), (3, 8)].map(|(node, at)| (NodeId(node), Timestamp(at)));
        let order = in_order(asleep.into(), &BTreeMap::new(), &unwoken.into());
        assert_eq!(order, [NodeId(2), NodeId(3), NodeId(1)]);
    }
}
