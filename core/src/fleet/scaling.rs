//! Pools grow and shrink: the one writer of each pool's wanted size. The
//! numbers are gathered here, the decision is `autoscale::decide`.

use alloc::{format, string::String, vec::Vec};

use super::{Fleet, Output, Timer, record};
use crate::{
    autoscale::{self, Decision, PoolView},
    effect::{Effect, Subject},
    end::{End, NodeLoss},
    event::{DrainOrder, DrainThen},
    ids::{Actor, HostRequestId, NodeId, PoolName},
    limits,
    mutation::{self, Mutation},
    node::{Duty, Liveness},
    policy::{PoolPolicy, ProviderKind},
    pool::Host,
    queue::Class,
    time::Timestamp,
};

/// Who drains for scale-in.
const SCALER: &str = "scaler";

impl Fleet {
    pub(super) fn settle_pools(&mut self, now: Timestamp, out: &mut Output) {
        let names: Vec<PoolName> = self.pools.keys().cloned().collect();
        for name in names {
            self.remind_provider(&name, now, out);
            // A pool that never scales is not counted: that would look at all its nodes for nothing.
            if self.pools.get(&name).is_some_and(|pool| pool.record.policy.is_fixed()) {
                continue;
            }
            let Some(view) = self.view_pool(&name, now) else { continue };
            let Some(pool) = self.pools.get(&name) else { continue };
            let decision = autoscale::decide(&pool.record.policy, &view, now);
            match (decision, self.braked_until(now)) {
                (Decision::Hold { until: None }, _) => {}
                // Silence of much of the fleet says nothing about how much of it is needed (FL-12).
                (Decision::Hold { until: Some(until) }, _) | (Decision::In { .. }, Some(until)) => {
                    self.wake_at(until, Timer::Pool(name));
                }
                (Decision::Out { keep, create, reason }, _) => {
                    self.scale_out(&name, &view, &keep, create, reason, now, out);
                }
                (Decision::In { release, reason }, None) => {
                    self.scale_in(&name, &view, &release, &reason, now, out);
                }
            }
        }
    }

    /// The pool as the decision sees it. Draining hosts are neither supply nor demand.
    pub(super) fn view_pool(&mut self, name: &PoolName, now: Timestamp) -> Option<PoolView> {
        let queue = self.waiting_for(name);
        let pool = self.pools.get_mut(name)?;
        for (rule, since) in pool.record.policy.scale_out.iter().zip(&mut pool.breached_since) {
            *since = autoscale::is_breached(rule, queue).then(|| since.unwrap_or(now));
        }
        let mut view = PoolView {
            queue,
            breached_since: pool.breached_since.clone(),
            last_scaled: pool.record.last_scaled,
            paused: pool.record.paused.clone(),
            hosts: u32::try_from(pool.record.hosts.len()).unwrap_or(u32::MAX),
            ..PoolView::default()
        };
        let booting = count(pool.record.hosts.values().filter(|host| matches!(host, Host::Requested(_))));
        view.supply += booting;
        if mutation::is_on(Mutation::CapIgnoresBooting) {
            view.supply -= booting;
            view.hosts -= booting;
        }
        for (id, node) in self.nodes.iter().filter(|(_, node)| node.record.pool == *name) {
            if node.record.host.is_none() && !matches!(node.record.liveness, Liveness::Gone(_)) {
                view.hosts += 1;
            }
            match (&node.record.liveness, &node.record.duty) {
                (Liveness::Live | Liveness::Silent(_), Duty::Eligible) => {
                    view.supply += 1;
                    if let (Some(since), true, Some(_)) =
                        (node.record.idle_since, node.attempts.is_empty(), node.session)
                    {
                        view.idle.push((*id, since));
                    }
                }
                (Liveness::Live, Duty::Draining(drain)) if drain.order.actor.0 == SCALER => view.draining.push(*id),
                (
                    Liveness::Joining | Liveness::Live | Liveness::Silent(_) | Liveness::Lost(_) | Liveness::Gone(_),
                    _any_duty,
                ) => {}
            }
        }
        view.idle.sort_by_key(|(id, since)| (*since, *id));
        Some(view)
    }

    /// Waiting tasks that a host of this pool could run; what was only sent ahead still waits.
    fn waiting_for(&self, name: &PoolName) -> u64 {
        let Some(pool) = self.pools.get(name) else { return 0 };
        let fits = |class: &Class| could_run(class, &pool.record.policy);
        let queued = self.queue.tasks_where(fits);
        let ahead =
            self.nodes.values().filter(|node| node.record.pool == *name).map(|node| node.prefilled.len() as u64);
        queued + ahead.sum::<u64>()
    }

    #[allow(clippy::too_many_arguments, reason = "one decision's parts")]
    fn scale_out(
        &mut self,
        name: &PoolName,
        view: &PoolView,
        keep: &[NodeId],
        create: u32,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) {
        for node in keep {
            record(
                out,
                now,
                Subject::Node(*node),
                "resumed",
                format!("its scale-in is cancelled: {reason}"),
                Some(&Actor(String::from(SCALER))),
            );
            self.restore_duty(*node, out);
        }
        let Some(pool) = self.pools.get_mut(name) else { return };
        // Hosts of a static pool join by themselves: only drains can be cancelled there.
        let create = if pool.record.policy.provider == ProviderKind::Static { 0 } else { create };
        for _ in 0..create {
            let host = self.meta.next_host;
            self.meta.next_host = HostRequestId(host.0 + 1);
            out.touched.meta = true;
            pool.record.hosts.insert(host, Host::Requested(now));
            out.effects.push(Effect::CreateHost {
                pool: name.clone(),
                host,
                template: pool.record.policy.host.clone(),
            });
            self.timers.set(now + pool.record.policy.boot_deadline_ms, Timer::Pool(name.clone()));
        }
        let change = create + u32::try_from(keep.len()).unwrap_or(0);
        if change > 0 {
            self.record_scaling(name, view.supply, view.supply + change, reason, now, out);
        }
    }

    fn scale_in(
        &mut self,
        name: &PoolName,
        view: &PoolView,
        release: &[NodeId],
        reason: &str,
        now: Timestamp,
        out: &mut Output,
    ) {
        let then = match self.pools.get(name).map(|pool| pool.record.policy.provider) {
            Some(ProviderKind::Local) => DrainThen::Delete,
            Some(ProviderKind::Static) => DrainThen::Stop,
            None => return,
        };
        let to = view.supply - u32::try_from(release.len()).unwrap_or(0).min(view.supply);
        self.record_scaling(name, view.supply, to, String::from(reason), now, out);
        for node in release {
            let actor = Actor(String::from(SCALER));
            let order = DrainOrder { deadline: None, then, refusable: true, actor, reason: String::from(reason) };
            // The node was seen live in this same settling: a drain of it is never denied.
            let _granted = self.drain(*node, order, now, out);
            self.settle_drain(*node, now, out);
        }
    }

    fn record_scaling(
        &mut self,
        name: &PoolName,
        from: u32,
        to: u32,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) {
        let subject = Subject::Pool { name: name.clone(), sizes: Some((from, to)) };
        record(out, now, subject, "scaled", reason, Some(&Actor(String::from(SCALER))));
        if let Some(pool) = self.pools.get_mut(name) {
            pool.record.last_scaled = Some(now);
            out.touched.pools.insert(name.clone());
        }
        // The next decision follows from the new numbers; a pool at rest is not looked at again.
        self.wake_at(now, Timer::Pool(name.clone()));
    }

    /// Ends hosts that did not join in time, and asks again for deletions that were not confirmed.
    fn remind_provider(&mut self, name: &PoolName, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let policy = &pool.record.policy;
        let mut failed = 0;
        for (host, state) in &mut pool.record.hosts {
            match *state {
                Host::Requested(since) if now.since(since) >= policy.boot_deadline_ms => {
                    failed += 1;
                    *state = Host::Deleting { node: None, told: now };
                    out.effects.push(Effect::DeleteHost { pool: name.clone(), host: *host, node: None });
                }
                Host::Deleting { node, told } if now.since(told) >= limits::DELETE_ASK_AGAIN => {
                    *state = Host::Deleting { node, told: now };
                    out.touched.pools.insert(name.clone());
                    out.effects.push(Effect::DeleteHost { pool: name.clone(), host: *host, node });
                    self.timers.set(now + limits::DELETE_ASK_AGAIN, Timer::Pool(name.clone()));
                }
                Host::Requested(_) | Host::Joined(_) | Host::Deleting { .. } => {}
            }
        }
        for _ in 0..failed {
            self.count_failure(name, "it did not join before its boot deadline", now, out);
            self.wake_at(now + limits::DELETE_ASK_AGAIN, Timer::Pool(name.clone()));
        }
    }

    /// A new leader: what was asked may have been lost with the last one. Orders are idempotent by their request.
    pub(super) fn ask_providers_again(&mut self, now: Timestamp, out: &mut Output) {
        for (name, pool) in &mut self.pools {
            let policy = &pool.record.policy;
            for (host, state) in &mut pool.record.hosts {
                match state {
                    Host::Requested(since) => {
                        out.effects.push(Effect::CreateHost {
                            pool: name.clone(),
                            host: *host,
                            template: policy.host.clone(),
                        });
                        self.timers.set(*since + policy.boot_deadline_ms, Timer::Pool(name.clone()));
                    }
                    Host::Deleting { told, .. } => {
                        let due = (*told + limits::DELETE_ASK_AGAIN).max(now);
                        self.timers.set(due, Timer::Pool(name.clone()));
                    }
                    Host::Joined(_) => {}
                }
            }
        }
    }

    fn count_failure(&mut self, name: &PoolName, reason: &str, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        pool.record.failures += 1;
        let subject = Subject::Pool { name: name.clone(), sizes: None };
        record(out, now, subject.clone(), "host_failed", String::from(reason), None);
        if pool.record.failures >= pool.record.policy.boot_failures && pool.record.paused.is_none() {
            let sentence = format!("{} hosts in a row failed, the last: {reason}", pool.record.failures);
            record(out, now, subject, "paused", sentence.clone(), None);
            pool.record.paused = Some(sentence);
        }
        out.touched.pools.insert(name.clone());
    }

    pub(super) fn host_failed(
        &mut self,
        name: &PoolName,
        host: HostRequestId,
        reason: &str,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        if pool.record.hosts.remove(&host).is_some() {
            self.count_failure(name, reason, now, out);
        }
    }

    pub(super) fn host_gone(&mut self, name: &PoolName, host: HostRequestId, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        if pool.record.hosts.remove(&host).is_none() {
            return;
        }
        out.touched.pools.insert(name.clone());
        let Some(id) = self
            .nodes
            .iter()
            .find(|(_, node)| node.record.host == Some(host) && node.record.pool == *name)
            .map(|(id, _)| *id)
        else {
            return;
        };
        self.give_up_attempts(id, &End::NodeLost(NodeLoss::Silent), now, out);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.record.liveness = Liveness::Gone(now);
            node.record.idle_since = None;
            // Should it speak all the same, it says hello first, and counts again.
            if let Some(session) = node.session.take() {
                let reason = String::from("the provider says that this host is gone");
                out.effects.push(Effect::CloseSession { node: id, session, reason });
            }
            // Its name is free again; the record stays for those who ask.
            if self.names.get(&node.record.name) == Some(&id) {
                self.names.remove(&node.record.name);
            }
        }
        record(out, now, Subject::Node(id), "gone", String::from("the provider confirmed that its host is gone"), None);
        out.touched.nodes.insert(id);
        self.reindex(id);
    }

    /// The provider could not delete it: it goes back to ready by itself.
    pub(super) fn host_delete_failed(
        &mut self,
        name: &PoolName,
        host: HostRequestId,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let Some(Host::Deleting { node: Some(node), .. }) = pool.record.hosts.get(&host).copied() else { return };
        pool.record.hosts.insert(host, Host::Joined(node));
        out.touched.pools.insert(name.clone());
        record(out, now, Subject::Node(node), "delete_failed", reason, None);
        self.restore_duty(node, out);
    }
}

/// Could a host of this policy run tasks of this class?
fn could_run(class: &Class, policy: &PoolPolicy) -> bool {
    class.pool.as_ref().is_none_or(|pool| *pool == policy.name)
        && class.request.fits_in(&policy.host.capacity())
        && class.constraints.iter().all(|(label, value)| policy.host.labels.get(label) == Some(value))
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}
