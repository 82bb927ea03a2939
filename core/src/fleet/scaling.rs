//! Pools grow and shrink: the one writer of each pool's wanted size. The
//! numbers are gathered in `gauge`, the decision is `autoscale::decide`.

use alloc::{collections::BTreeSet, format, string::String, vec::Vec};

use super::{Fleet, Output, Timer, record, waking};
use crate::{
    autoscale::{self, Decision, PoolView},
    effect::{Effect, Sizes, Subject},
    end::{End, NodeLoss},
    event::{DrainOrder, DrainThen},
    ids::{Actor, HostRequestId, NodeId, PoolName},
    limits,
    node::{Liveness, SCALER},
    policy::{ProviderKind, Sleep},
    pool::Host,
    time::{Millis, Timestamp},
};

impl Fleet {
    /// Looks at pools that were not looked at within the last second. Comes after placement, so that what still
    /// waits found no room, and what is idle is idle: with placement it is one serialized decision (FL-8).
    pub(super) fn settle_pools(&mut self, now: Timestamp, out: &mut Output) {
        let mut due = BTreeSet::new();
        let mut later = Vec::new();
        for (name, pool) in &self.pools {
            if pool.next_look <= now {
                due.insert(name.clone());
            } else if !pool.is_fixed() {
                later.push((pool.next_look, name.clone()));
            }
        }
        for (at, name) in later {
            self.wake_at(at, Timer::Pool(name));
        }
        for name in &due {
            self.remind_provider(name, now, out);
        }
        // A pool that never scales is not counted: that would look at all its nodes for nothing.
        due.retain(|name| self.pools.get(name).is_some_and(|pool| !pool.is_fixed()));
        if due.is_empty() {
            return;
        }
        for (name, view) in self.gauge(&due, now, out) {
            let Some(pool) = self.pools.get_mut(&name) else { continue };
            pool.next_look = now + limits::POOL_LOOK;
            let decision = autoscale::decide(&pool.record.policy, &view);
            pool.view = view.clone();
            match decision {
                Decision::Hold { until: None } => {}
                Decision::Hold { until: Some(until) } => self.wake_at(until, Timer::Pool(name)),
                Decision::Out { keep, wake, create, reason } => {
                    self.scale_out(&name, &view, &keep, &wake, create, reason, now, out);
                }
                Decision::In { release, busy, reason } => {
                    self.scale_in(&name, &view, &release, busy, &reason, now, out);
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one decision's parts")]
    fn scale_out(
        &mut self,
        name: &PoolName,
        view: &PoolView,
        keep: &[NodeId],
        wake: &[NodeId],
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
        for node in wake {
            self.wake_host(name, *node, &reason, now, out);
        }
        let Some(pool) = self.pools.get_mut(name) else { return };
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
            self.timers.set(now + pool.record.policy.boot_deadline, Timer::Pool(name.clone()));
        }
        let change = create + u32::try_from(keep.len() + wake.len()).unwrap_or(0);
        if change > 0 {
            pool.record.last_out = Some(now);
            self.record_scaling(name, view, view.supply + change, reason, now, out);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one decision's parts")]
    fn scale_in(
        &mut self,
        name: &PoolName,
        view: &PoolView,
        release: &[NodeId],
        busy: Option<Millis>,
        reason: &str,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get(name) else { return };
        let then = match (pool.record.policy.provider, pool.record.policy.sleep) {
            (ProviderKind::Local | ProviderKind::Exec, _) => DrainThen::Delete,
            (ProviderKind::Static, Sleep::Stop) => DrainThen::Stop,
            (ProviderKind::Static, Sleep::Poweroff) => DrainThen::Poweroff,
        };
        let release = self.cleared(name, release, now, out);
        if release.is_empty() {
            return;
        }
        let to = view.supply - u32::try_from(release.len()).unwrap_or(0).min(view.supply);
        self.record_scaling(name, view, to, String::from(reason), now, out);
        for node in &release {
            let actor = Actor(String::from(SCALER));
            // Who is idle may refuse, should work have come meanwhile; a busy host was named by the policy.
            let has_work = self.nodes.get(node).is_some_and(|node| !node.attempts.is_empty());
            let deadline = busy.filter(|_| has_work).map(|within| now + within);
            let reason = String::from(reason);
            let order = DrainOrder { deadline, then, refusable: deadline.is_none(), actor, reason };
            // The node was seen live in this same settling: a drain of it is never denied.
            let _granted = self.drain(*node, order, now, out);
            self.settle_drain(*node, now, out);
        }
    }

    fn record_scaling(
        &mut self,
        name: &PoolName,
        view: &PoolView,
        to: u32,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) {
        let sizes = Some(Sizes { from: view.supply, to, inputs: autoscale::inputs(view) });
        let subject = Subject::Pool { name: name.clone(), sizes };
        record(out, now, subject, "scaled", reason, Some(&Actor(String::from(SCALER))));
        if let Some(pool) = self.pools.get_mut(name) {
            pool.record.last_scaled = Some(now);
            pool.next_look = now;
            out.touched.pools.insert(name.clone());
        }
        // The next decision follows from the new numbers; a pool at rest is not looked at again.
        self.wake_at(now, Timer::Pool(name.clone()));
    }

    /// Ends hosts that did not join in time, and asks again for deletions that were not confirmed.
    fn remind_provider(&mut self, name: &PoolName, now: Timestamp, out: &mut Output) {
        self.remind_of_waking(name, now, out);
        let Some(pool) = self.pools.get_mut(name) else { return };
        let policy = &pool.record.policy;
        let mut failed = 0;
        for (host, state) in &mut pool.record.hosts {
            match *state {
                Host::Requested(since) if now.since(since) >= policy.boot_deadline => {
                    failed += 1;
                    *state = Host::Deleting { node: None, told: now, since: Some(now) };
                    out.effects.push(Effect::DeleteHost { pool: name.clone(), host: *host, node: None });
                }
                Host::Deleting { node, told, since } if now.since(told) >= limits::DELETE_ASK_AGAIN => {
                    *state = Host::Deleting { node, told: now, since: since.or(Some(now)) };
                    out.touched.pools.insert(name.clone());
                    out.effects.push(Effect::DeleteHost { pool: name.clone(), host: *host, node });
                    self.timers.set(now + limits::DELETE_ASK_AGAIN, Timer::Pool(name.clone()));
                }
                Host::Requested(_) | Host::Joined(_) | Host::Deleting { .. } | Host::Waking { .. } => {}
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
                        self.timers.set(*since + policy.boot_deadline, Timer::Pool(name.clone()));
                    }
                    Host::Deleting { told, .. } => {
                        let due = (*told + limits::DELETE_ASK_AGAIN).max(now);
                        self.timers.set(due, Timer::Pool(name.clone()));
                    }
                    Host::Waking { node, since, told } => {
                        *told = now;
                        out.touched.pools.insert(name.clone());
                        out.effects.push(Effect::WakeHost { pool: name.clone(), host: *host, node: *node });
                        self.timers.set(waking::next_look(*since, now, policy), Timer::Pool(name.clone()));
                    }
                    Host::Joined(_) => {}
                }
            }
        }
    }

    pub(super) fn count_failure(&mut self, name: &PoolName, reason: &str, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        pool.record.failures += 1;
        let subject = Subject::Pool { name: name.clone(), sizes: None };
        record(out, now, subject.clone(), "host_failed", String::from(reason), None);
        if let Some(again) = pool.record.failures.checked_sub(pool.record.policy.boot_failures) {
            let doubled = limits::PAUSE_MIN.0.saturating_mul(1 << again.min(16));
            let rest = Millis(doubled).min(limits::PAUSE_MAX);
            let sentence = format!("{} hosts in a row failed, the last: {reason}", pool.record.failures);
            let told = format!("{sentence}; one is tried in {rest}");
            record(out, now, subject, "paused", told, None);
            pool.record.paused = Some(sentence);
            pool.record.paused_until = Some(now + rest);
            self.timers.set(now + rest, Timer::Pool(name.clone()));
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
        match pool.record.hosts.get(&host).copied() {
            Some(Host::Waking { node, .. }) => self.waking_failed(name, host, node, reason, now, out),
            Some(Host::Requested(_) | Host::Deleting { .. }) => {
                pool.record.hosts.remove(&host);
                self.count_failure(name, reason, now, out);
            }
            // Its agent has said hello, so it was made: only the provider's lists tell when it is gone.
            Some(Host::Joined(_)) | None => {}
        }
    }

    /// Silence holds scale-in (FL-12); each change of it is told.
    pub(super) fn provider_heard(
        &mut self,
        name: &PoolName,
        trouble: Option<String>,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let subject = Subject::Pool { name: name.clone(), sizes: None };
        match (&pool.provider_trouble, &trouble) {
            (None, Some(trouble)) => record(out, now, subject, "provider_silent", trouble.clone(), None),
            (Some(_), None) => record(out, now, subject, "provider_heard", String::from("it answers again"), None),
            (None, None) | (Some(_), Some(_)) => {}
        }
        if pool.provider_trouble != trouble {
            pool.provider_trouble = trouble;
            pool.next_look = now;
            self.wake_at(now, Timer::Pool(name.clone()));
        }
    }

    pub(super) fn host_gone(&mut self, name: &PoolName, host: HostRequestId, now: Timestamp, out: &mut Output) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        // What is told before the order to delete it is sent is not its answer: forgotten now, the host would come
        // back with a new hello, get work, and the order would end both. The answer to the order says it again.
        if pool.record.hosts.get(&host).is_some_and(|state| state.is_untold(now)) {
            return;
        }
        // Should it speak all the same, what was said of it before is out of date.
        pool.preflights.remove(&host);
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
        self.close_session(id, "the provider says that this host is gone", out);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.record.liveness = Liveness::Gone(now);
            node.record.idle_since = None;
            // Its name is free again; the record stays for those who ask.
            if self.names.get(&node.record.name) == Some(&id) {
                self.names.remove(&node.record.name);
            }
        }
        record(out, now, Subject::Node(id), "gone", String::from("the provider confirmed that its host is gone"), None);
        out.touched.nodes.insert(id);
        self.leave_rolling(id, "it is gone", None, now, out);
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
        let Some(state) = pool.record.hosts.get(&host).copied() else { return };
        let Host::Deleting { node: Some(node), .. } = state else { return };
        // This speaks of an earlier order.
        if state.is_untold(now) {
            return;
        }
        pool.record.hosts.insert(host, Host::Joined(node));
        out.touched.pools.insert(name.clone());
        record(out, now, Subject::Node(node), "delete_failed", reason, None);
        self.restore_duty(node, out);
    }
}

#[cfg(test)]
mod tests {
    use alloc::{collections::BTreeMap, vec::Vec};

    use super::*;
    use crate::{
        event::Event,
        fleet::Image,
        policy::{HostTemplate, PoolPolicy},
        pool::PoolRecord,
    };

    #[test]
    fn what_is_told_of_a_deletion_before_its_order_is_sent_is_of_an_earlier_one() {
        let (name, host) = (PoolName("spot".into()), HostRequestId(1));
        let template = HostTemplate { cpu_milli: 1, memory_bytes: 1, disk_bytes: 1, labels: BTreeMap::new() };
        let policy = PoolPolicy::fixed(name.clone(), ProviderKind::Exec, 0, 1, template);
        let deleting = Host::Deleting { node: Some(NodeId(7)), told: Timestamp(50), since: None };
        let pool = PoolRecord { hosts: BTreeMap::from([(host, deleting)]), ..PoolRecord::new(policy) };
        let restored = || {
            let image = Image { pools: Vec::from([(name.clone(), pool.clone())]), ..Image::default() };
            Fleet::restore(image).expect("it agrees with itself")
        };
        let gone = || Event::HostGone { pool: name.clone(), host };
        let failed = || Event::HostDeleteFailed { pool: name.clone(), host, reason: "busy".into() };
        let state = |fleet: &Fleet| fleet.pool(&name).and_then(|pool| pool.hosts.get(&host).copied());
        for (told, then) in [(failed(), Some(Host::Joined(NodeId(7)))), (gone(), None)] {
            let mut fleet = restored();
            fleet.apply(told.clone(), Timestamp(50), &mut Output::default());
            assert_eq!(state(&fleet), Some(deleting));
            fleet.apply(told, Timestamp(51), &mut Output::default());
            assert_eq!(state(&fleet), then);
        }
    }
}
