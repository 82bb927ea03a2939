//! What a leader lets out: orders to hosts and providers, and what it does while its store is behind.

use muster_core::{
    effect::Effect,
    fleet::{Fleet, Output},
    ids::{AttemptId, HostRequestId, NodeId, PoolName},
    node::{Duty, Liveness, NodeRecord},
    pool::{Host, PoolRecord},
};

use super::{Truth, Violation, broken};
use crate::store::Store;

impl Truth {
    /// FL-11: counted by what was asked and what providers said, not by the pool's own record.
    pub(super) fn check_pools(&mut self, fleet: &Fleet, out: &Output) -> Result<(), Violation> {
        for gone in &self.going {
            self.requested.remove(gone);
        }
        for effect in &out.effects {
            if let Effect::WakeHost { pool, host, node } = effect {
                self.check_waking(fleet, pool, *host, *node)?;
            }
            let Effect::CreateHost { pool, host, .. } = effect else { continue };
            if !self.requested.insert((pool.clone(), *host)) {
                continue;
            }
            let count = self.requested.iter().filter(|(name, _)| name == pool).count();
            let max = fleet.pool(pool).map_or(0, |row| row.policy.max);
            if count > max as usize {
                return broken("FL-11", format!("pool {pool} has asked for {count} hosts, at most {max} may be"));
            }
        }
        Ok(())
    }

    /// Who is woken was sent to sleep by the scaler, is woken once at a time, and there is room for it (FL-11).
    fn check_waking(
        &mut self,
        fleet: &Fleet,
        pool: &PoolName,
        host: HostRequestId,
        node: NodeId,
    ) -> Result<(), Violation> {
        let Some(row) = fleet.pool(pool) else { return Ok(()) };
        let is_it = |state: &&Host| matches!(state, Host::Waking { node: one, .. } if *one == node);
        // It may have said hello, or have failed, in the very batch in which it was asked for again.
        if !row.hosts.get(&host).as_ref().is_some_and(is_it) {
            return Ok(());
        }
        if row.hosts.values().filter(is_it).count() > 1 {
            return broken("FL-11", format!("{node} is woken twice at once"));
        }
        let asleep = fleet.node(node).is_some_and(|record| match &record.duty {
            Duty::Stopping { drain, .. } => drain.order.actor.0 == "scaler",
            Duty::Eligible | Duty::Cordoned(_) | Duty::Draining(_) | Duty::Drained { .. } => false,
        });
        if !asleep {
            return broken("FL-11", format!("{node} is woken, and scale-in did not send it away"));
        }
        let is_here = |record: &&NodeRecord| {
            record.pool == *pool && record.host.is_none() && !matches!(record.liveness, Liveness::Gone(_))
        };
        let count = row.hosts.len() + fleet.nodes().map(|(_, record)| record).filter(is_here).count();
        if self.woken.insert((pool.clone(), host)) && count > row.policy.max as usize {
            return broken("FL-11", format!("pool {pool} wakes {node}, and has {count} of at most {}", row.policy.max));
        }
        Ok(())
    }

    /// FL-11: a host that speaks is there, whatever its provider said of it.
    pub(super) fn note_speaks(&mut self, fleet: &Fleet, id: NodeId) {
        if let Some(node) = fleet.node(id)
            && let Some(host) = node.host
            && node.liveness == Liveness::Live
            && fleet.pool(&node.pool).is_some()
        {
            let asked_for = (node.pool.clone(), host);
            // What was said after its hello counts.
            if !self.going.contains(&asked_for) {
                self.requested.insert(asked_for);
            }
        }
    }

    /// A store that is behind is noticed as soon as a host tells of what is gone. Until somebody says so, nothing is
    /// placed or made, and nothing that runs is ended for being unknown.
    pub(super) fn check_loss(&mut self, fleet: &Fleet, out: &Output, store: &Store) -> Result<(), Violation> {
        if fleet.meta().term.0 != store.leader.term {
            return Ok(());
        }
        self.told_of_loss |= self.telling;
        if self.accepting && fleet.meta().loss.is_none() {
            self.lost.clear();
            self.told_of_loss = false;
        }
        if fleet.meta().loss.is_none() {
            return match self.told_of_loss {
                true => broken("FL-1", "a host told of lost writes, and work is placed as if there were none".into()),
                false => Ok(()),
            };
        }
        for effect in &out.effects {
            match effect {
                Effect::Start { .. } => return broken("FL-1", "work is placed although writes are lost".into()),
                // One that was answered earlier in the batch that brought the news cannot be taken back.
                Effect::Welcome { unknown, .. } | Effect::GrantLease { unknown, .. }
                    if self.knew_of_loss && !unknown.iter().all(|id| self.is_over(*id)) =>
                {
                    return broken("FL-12", format!("{unknown:?} are to end, and the store lost what it knew"));
                }
                _other => {}
            }
        }
        Ok(())
    }

    pub(super) fn check_effect(
        &self,
        fleet: &Fleet,
        out: &Output,
        effect: &Effect,
        store: &Store,
    ) -> Result<(), Violation> {
        match effect {
            Effect::Start { node, attempts, .. } => {
                let Some(record) = fleet.node(*node) else {
                    return broken("FL-7", format!("work is sent to {node}, which is not known"));
                };
                if self.disk_full.contains(node) {
                    return broken("case 16", format!("work is sent to {}, whose disk is full", record.name));
                }
                if record.state() != "ready" {
                    return broken("FL-7", format!("work is sent to {}, which is {}", record.name, record.state()));
                }
                let pool = fleet.pool(&record.pool);
                let host = record.host.and_then(|host| pool.and_then(|pool| pool.hosts.get(&host)));
                if matches!(host, Some(Host::Deleting { .. })) {
                    return broken("FL-7", format!("work is sent to {}, whose host is being deleted", record.name));
                }
                for (attempt, epoch) in attempts {
                    let stored = store.attempt(*attempt);
                    if stored.is_none_or(|row| row.node != *node || row.term != epoch.term) {
                        return broken("FL-4", format!("attempt {attempt} is sent before it is stored"));
                    }
                }
                Ok(())
            }
            Effect::Stop { attempts, .. } => {
                for order in attempts {
                    if fleet.job(order.attempt.job).is_some_and(|job| job.spec.grace != order.grace) {
                        let (attempt, grace) = (order.attempt, order.grace);
                        return broken("F7", format!("attempt {attempt} is to stop within {grace}, not its own grace"));
                    }
                    // One that ended in the same batch has no row any more.
                    let Some(row) = store.attempt(order.attempt) else { continue };
                    if row.stopping.is_none_or(|(_, reason)| reason != order.reason) {
                        let (attempt, reason) = (order.attempt, order.reason);
                        return broken(
                            "FL-9",
                            format!("attempt {attempt} is to stop as {reason:?}, which is not stored"),
                        );
                    }
                }
                Ok(())
            }
            Effect::DeleteHost { pool, host, .. } => {
                let is_its = |node: &NodeRecord| node.host == Some(*host) && node.pool == *pool;
                let mut nodes = fleet.nodes().filter(|(_, node)| is_its(node));
                match nodes.find(|(id, _)| fleet.attempts_on(*id).next().is_some()) {
                    Some((_, node)) => broken("FL-7", format!("the host of {} is deleted, and has work", node.name)),
                    None => Ok(()),
                }
            }
            Effect::Acknowledge { node, attempts, .. } => {
                let is_kept = |id: &AttemptId| {
                    let ends = out.touched.attempts.get(id).is_some_and(|record| record.ended.is_some());
                    ends || out.touched.evidence.iter().any(|one| one.attempt == *id && one.node == *node)
                };
                match attempts.iter().find(|id| !is_kept(id)) {
                    Some(lost) => broken("FL-2", format!("the end of {lost} is acknowledged and not kept")),
                    None => Ok(()),
                }
            }
            // One that has said hello in the same batch has no entry any more.
            Effect::WakeHost { pool, host, .. } if fleet.pool(pool).is_none_or(|row| !row.hosts.contains_key(host)) => {
                Ok(())
            }
            Effect::CreateHost { pool, host, .. } | Effect::WakeHost { pool, host, .. } => match store.pool(pool) {
                Some(row) if row.hosts.contains_key(host) => Ok(()),
                Some(_) | None => broken("FL-11", format!("a host of {pool} is asked for before it is stored")),
            },
            _other => Ok(()),
        }
    }
}

/// FL-11: with a new request, all that were ever requested and are not confirmed gone are within the maximum.
pub(super) fn check_requests(before: Option<&PoolRecord>, pool: &PoolRecord) -> Result<(), Violation> {
    let is_new = |host: &HostRequestId| before.is_none_or(|before| !before.hosts.contains_key(host));
    let requested = |(host, state): (&HostRequestId, &Host)| matches!(state, Host::Requested(_)) && is_new(host);
    let (count, max, name) = (pool.hosts.len(), pool.policy.max, &pool.policy.name);
    if pool.stopped.is_some() && pool.hosts.iter().any(requested) {
        return broken("FL-1", format!("pool {name} asks for another host, and is paused"));
    }
    if count > max as usize && pool.hosts.iter().any(requested) {
        return broken("FL-11", format!("pool {name} asks for another host, and has {count} of at most {max}"));
    }
    Ok(())
}
