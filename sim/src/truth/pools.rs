//! Pools: who may go, when, and how many are left; judged by what the fleet asked for and what providers said.

use std::collections::BTreeMap;

use muster_core::{
    autoscale::FRESH_PERCENT,
    effect::{Effect, HistoryEntry, Subject},
    event::{DrainThen, Event},
    fleet::{Fleet, Output},
    ids::{HostRequestId, NodeId, PoolName},
    limits,
    node::{Drain, Duty, Liveness, NodeRecord},
    policy::ProviderKind,
    pool::{Host, PoolRecord},
    time::{Millis, Timestamp},
};

use super::{Truth, Violation, broken, surely};

/// What providers were told and have said.
#[derive(Debug, Default)]
pub(super) struct Providers {
    /// Told to end these, first then, and no word since.
    told: BTreeMap<(PoolName, HostRequestId), Timestamp>,
    /// Kept or not, and when this leader heard it.
    described: BTreeMap<(PoolName, HostRequestId), (bool, Timestamp)>,
    /// In this batch.
    heard: Vec<((PoolName, HostRequestId), Option<bool>)>,
}

impl Providers {
    pub(super) fn begin(&mut self) {
        self.heard.clear();
    }

    /// A new leader has to ask again.
    pub(super) fn led(&mut self) {
        self.described.clear();
    }

    /// The store lost some of what was told.
    pub(super) fn forget(&mut self) {
        self.told.clear();
    }

    pub(super) fn hear(&mut self, event: &Event) {
        match event {
            Event::HostDescribed { pool, host, kept } => {
                self.heard.push(((pool.clone(), *host), Some(kept.is_some())));
            }
            Event::HostGone { pool, host }
            | Event::HostFailed { pool, host, .. }
            | Event::HostDeleteFailed { pool, host, .. } => self.heard.push(((pool.clone(), *host), None)),
            _other => {}
        }
    }

    /// The batch is committed: what it heard counts, and what it tells is told.
    fn note(&mut self, fleet: &Fleet, out: &Output, now: Timestamp) {
        for (host, word) in self.heard.drain(..) {
            let state = fleet.pool(&host.0).and_then(|pool| pool.hosts.get(&host.1));
            match word {
                // Of one that goes already nobody asks.
                Some(_) if !matches!(state, Some(Host::Joined(_))) => {}
                Some(is_kept) => {
                    self.described.insert(host, (is_kept, now));
                }
                None => {
                    self.told.remove(&host);
                }
            }
        }
        for effect in &out.effects {
            // What was said of it in the same batch may have come after that order.
            if let Effect::DeleteHost { pool, host, .. } = effect
                && matches!(fleet.pool(pool).and_then(|pool| pool.hosts.get(host)), Some(Host::Deleting { .. }))
            {
                self.told.entry((pool.clone(), *host)).or_insert(now);
            }
        }
    }

    /// It has surely said nothing for too long of a host that it was told to end.
    /// `led` is when this leader began: its clock is not the one before's.
    fn is_silent(&self, name: &PoolName, pool: &PoolRecord, led: Timestamp, now: Timestamp) -> bool {
        let is_told = |host: &HostRequestId| self.told.get(&(name.clone(), *host)).copied();
        let deleting = pool.hosts.iter().filter(|(_, state)| matches!(state, Host::Deleting { .. }));
        let mut since = deleting.filter_map(|(host, _)| is_told(host));
        since.any(|since| now.since(since.max(led)) > amply(limits::PROVIDER_SILENT))
    }
}

/// Longer than this by any clock.
fn amply(span: Millis) -> Millis {
    Millis(span.0 * (100 + super::DRIFT_PERCENT) / 100 + 1_000)
}

impl Truth {
    pub(super) fn note_providers(&mut self, fleet: &Fleet, out: &Output, now: Timestamp) {
        self.providers.note(fleet, out, now);
    }

    /// The scaler begins to drain this node.
    pub(super) fn check_scale_in(
        &self,
        fleet: &Fleet,
        id: NodeId,
        node: &NodeRecord,
        now: Timestamp,
    ) -> Result<(), Violation> {
        let name = &node.name;
        if fleet.attempts_on(id).next().is_some() {
            return broken("FL-8", format!("scale-in takes node {name}, which has work"));
        }
        if now < self.brake_until {
            return broken("FL-12", format!("scale-in takes node {name} although the brake holds"));
        }
        let Some(pool) = fleet.pool(&node.pool) else { return Ok(()) };
        if pool.stopped.is_some() {
            return broken("FL-1", format!("scale-in takes node {name}, and its pool is paused"));
        }
        if self.providers.is_silent(&node.pool, pool, self.led, now) {
            return broken("FL-12", format!("scale-in takes node {name}, and its provider is silent"));
        }
        self.check_may_go(node, pool, now)?;
        self.check_heard(fleet, id, node, now)?;
        check_minimum(fleet, node, pool)
    }

    /// Its provider has said lately that it may be deleted.
    fn check_may_go(&self, node: &NodeRecord, pool: &PoolRecord, now: Timestamp) -> Result<(), Violation> {
        let Some(host) = node.host.filter(|_| pool.policy.provider == ProviderKind::Exec) else { return Ok(()) };
        let word = self.providers.described.get(&(node.pool.clone(), host));
        match word {
            Some((false, at)) if now.since(*at) <= amply(limits::PREFLIGHT_CLEARED) => Ok(()),
            said => broken("case 31", format!("scale-in takes node {}, of which is known: {said:?}", node.name)),
        }
    }

    /// Most of its pool was heard lately.
    fn check_heard(&self, fleet: &Fleet, id: NodeId, node: &NodeRecord, now: Timestamp) -> Result<(), Violation> {
        let counts = |(other, row): &(NodeId, &NodeRecord)| {
            let is_there = matches!(row.liveness, Liveness::Live | Liveness::Silent(_));
            // Those that go with it worked until now.
            let is_alike =
                |(one, this): (&Drain, &Drain)| one.requested == this.requested && one.order.actor == this.order.actor;
            let goes_too = row.drain().zip(node.drain()).is_some_and(is_alike);
            let works = matches!(row.duty, Duty::Eligible | Duty::Cordoned(_)) || *other == id || goes_too;
            row.pool == node.pool && is_there && works
        };
        let (mut expected, mut unheard) = (0u64, 0u64);
        for (other, _) in fleet.nodes().filter(counts) {
            let heard = self.heard.get(&other).copied().unwrap_or_default().max(self.led);
            expected += 1;
            unheard += u64::from(now.since(heard) > amply(limits::SAMPLE_FRESH));
        }
        if (expected - unheard) * 100 < expected * FRESH_PERCENT {
            let name = &node.name;
            return broken("FL-12", format!("scale-in takes node {name}, and {unheard} of {expected} are not heard"));
        }
        Ok(())
    }

    /// A lost host that its provider is told to end: it was given the time for a person to look at it.
    pub(super) fn check_given_back(
        &self,
        entry: &HistoryEntry,
        fleet: &Fleet,
        now: Timestamp,
    ) -> Result<(), Violation> {
        let (Subject::Node(id), "given_back") = (&entry.subject, entry.kind.as_str()) else { return Ok(()) };
        let name = fleet.node(*id).map_or("?", |node| node.name.as_str());
        let quiet = now.since(self.heard.get(id).copied().unwrap_or_default().max(self.led));
        if quiet < surely(limits::LOST_AFTER + limits::LOST_HOST_KEPT) {
            return broken("FL-12", format!("the host of {name} is given back {quiet} after it was heard"));
        }
        if now < self.brake_until {
            return broken("FL-12", format!("the host of {name} is given back although the brake holds"));
        }
        if fleet.node(*id).is_some_and(is_set_aside) {
            return broken("FL-1", format!("the host of {name} is given back, and a person has set it aside"));
        }
        Ok(())
    }
}

/// A person wants to look at it, or to have it back.
fn is_set_aside(node: &NodeRecord) -> bool {
    match &node.duty {
        Duty::Cordoned(_) => true,
        Duty::Draining(drain) | Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } => {
            drain.order.then != DrainThen::Delete && drain.order.actor.0 == "operator"
        }
        Duty::Eligible => false,
    }
}

/// As many are left as there are to be at least.
fn check_minimum(fleet: &Fleet, node: &NodeRecord, pool: &PoolRecord) -> Result<(), Violation> {
    let is_supply = |row: &NodeRecord| {
        let is_there = matches!(row.liveness, Liveness::Live | Liveness::Silent(_));
        row.pool == node.pool && is_there && row.duty == Duty::Eligible
    };
    // A size that a person gave takes the place of both bounds; one with a time may be over by the leader's clock.
    let min = match &pool.pin {
        Some(pin) if pin.until.is_none() => pin.size,
        Some(pin) => pin.size.min(pool.policy.min),
        None => pool.policy.min,
    };
    let booting = pool.hosts.values().filter(|host| matches!(host, Host::Requested(_))).count();
    let left = booting + fleet.nodes().filter(|(_, row)| is_supply(row)).count();
    if left < usize::try_from(min).unwrap_or(usize::MAX) {
        let name = &node.name;
        return broken(
            "FL-8",
            format!("scale-in takes node {name}, which leaves {left}, and at least {min} are to be"),
        );
    }
    Ok(())
}
