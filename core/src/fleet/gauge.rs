//! The numbers that scaling decisions are made of: pools are looked at together,
//! in one pass over the nodes, and each at most once a second.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use super::{Fleet, Output, waking};
use crate::{
    autoscale::{
        BusyHost, FRESH_PERCENT, IdleHost, Need, Pinned, PoolView, Reading, Readings,
        packing::{self, Packed, Waiting},
    },
    ids::{HostRequestId, NodeId, PoolName},
    limits,
    mutation::{self, Mutation},
    node::{Duty, Liveness, Node, SCALER},
    policy::{Money, ProviderKind, WHOLE},
    pool::{Host, Pool},
    queue::Class,
    resources::Resources,
    time::{Millis, Timestamp},
};

/// Until it is known how long a pool's tasks run, the waiting ones ask for at most so many hosts.
const FIRST_HOSTS: u64 = 10;
/// A task that has waited for so many boot times was to have its turn by then.
const PATIENCE_BOOTS: u64 = 2;

/// A metric's sums over the nodes of a pool.
#[derive(Clone, Copy, Debug, Default)]
struct Gauge {
    fresh: u32,
    used: u64,
    capacity: u64,
}

impl Gauge {
    fn add(&mut self, used: Option<u64>, capacity: u64) {
        if let Some(used) = used {
            self.fresh += 1;
            self.used += used;
            self.capacity += capacity;
        }
    }

    /// Thousandths, if enough of the nodes were heard.
    fn reading(&self, of: u32) -> Reading {
        let enough = u64::from(self.fresh) * 100 >= u64::from(of) * FRESH_PERCENT;
        match (self.used * u64::from(WHOLE)).checked_div(self.capacity) {
            Some(permille) if enough => Reading::Value(permille.min(u64::from(WHOLE))),
            Some(_) | None => Reading::NoData { fresh: self.fresh, of },
        }
    }
}

/// What one pass over the nodes tells of a pool.
#[derive(Debug, Default)]
struct Tally {
    supply: u32,
    /// Of no provider.
    own: u32,
    draining: u32,
    cancellable: Vec<NodeId>,
    asleep: Vec<(Timestamp, NodeId)>,
    idle: Vec<IdleHost>,
    busy: Vec<BusyHost>,
    kept: Vec<String>,
    /// That should be heard, and that were lately.
    expected: u32,
    heard: u32,
    cpu: Gauge,
    memory: Gauge,
    pressure: Gauge,
    /// Thousandths of a host of the template that are taken.
    taken: u64,
    sent_ahead: u64,
}

impl Tally {
    fn add(&mut self, id: NodeId, node: &Node, capacity: &Resources, now: Timestamp) {
        if node.record.host.is_none() && !matches!(node.record.liveness, Liveness::Gone(_)) {
            self.own += 1;
        }
        self.sent_ahead += node.prefilled.len() as u64;
        match (&node.record.liveness, &node.record.duty) {
            (Liveness::Live | Liveness::Silent(_), Duty::Eligible) => {
                self.supply += 1;
                self.taken += part_of(&node.allocated, capacity);
                self.sample(node, now);
                if let (Some(since), true, Some(_)) = (node.record.idle_since, node.attempts.is_empty(), node.session) {
                    self.idle.push(IdleHost { node: id, since, joined: node.record.joined });
                }
            }
            (Liveness::Live | Liveness::Silent(_), Duty::Cordoned(_)) => self.sample(node, now),
            (Liveness::Live, Duty::Draining(drain)) => {
                self.draining += 1;
                if drain.order.actor.0 == SCALER {
                    self.cancellable.push(id);
                }
            }
            (
                Liveness::Live | Liveness::Silent(_),
                Duty::Draining(_) | Duty::Drained { .. } | Duty::Stopping { .. },
            ) => {
                self.draining += 1;
            }
            (Liveness::Gone(since), _any_duty) if node.record.is_asleep() => self.asleep.push((*since, id)),
            (Liveness::Joining | Liveness::Lost(_) | Liveness::Gone(_), _any_duty) => {}
        }
    }

    fn sample(&mut self, node: &Node, now: Timestamp) {
        self.expected += 1;
        if node.session.is_none() || now.since(node.heard) > limits::SAMPLE_FRESH {
            return;
        }
        self.heard += 1;
        self.cpu.add(node.sample.cpu_used_milli, node.record.capacity.cpu_milli);
        self.memory.add(node.sample.memory_used_bytes, node.record.capacity.memory_bytes);
        self.pressure.add(
            node.sample.pressure_permille.map(|permille| permille * node.record.capacity.cpu_milli / u64::from(WHOLE)),
            node.record.capacity.cpu_milli,
        );
    }
}

/// Thousandths of `whole` that the scarcest amount of `part` takes.
pub(super) fn part_of(part: &Resources, whole: &Resources) -> u64 {
    let permille = |part: u64, whole: u64| (part * u64::from(WHOLE)).checked_div(whole).unwrap_or(0);
    permille(part.cpu_milli, whole.cpu_milli)
        .max(permille(part.memory_bytes, whole.memory_bytes))
        .max(permille(part.disk_bytes, whole.disk_bytes))
}

impl Fleet {
    /// The numbers of these pools.
    pub(super) fn gauge(
        &mut self,
        names: &BTreeSet<PoolName>,
        now: Timestamp,
        out: &mut Output,
    ) -> BTreeMap<PoolName, PoolView> {
        let mut tallies: BTreeMap<&PoolName, (Tally, Resources, bool)> = names
            .iter()
            .filter_map(|name| {
                let pool = self.pools.get(name)?;
                let busy = pool.record.policy.in_rule().is_some_and(|rule| rule.busy.is_some());
                Some((name, (Tally::default(), usable(pool), busy)))
            })
            .collect();
        for (id, node) in &self.nodes {
            let Some((tally, capacity, busy)) = tallies.get_mut(&node.record.pool) else { continue };
            // One that is gone and whose name another has by now would not be let in, should it be woken.
            if self.names.get(&node.record.name).is_some_and(|owner| owner != id) {
                continue;
            }
            tally.add(*id, node, capacity, now);
            // Who is kept by its provider is supply like any other, and no victim.
            let pool = self.pools.get(&node.record.pool);
            // Nobody can delete one that joined by itself, and its pool would drain it again and again for that.
            let deletes = pool.is_some_and(|pool| pool.record.policy.provider != ProviderKind::Static);
            if deletes && node.record.host.is_none() {
                tally.idle.retain(|host| host.node != *id);
                continue;
            }
            if let Some(reason) = pool.and_then(|pool| pool.kept(node.record.host, now)) {
                tally.idle.retain(|host| host.node != *id);
                tally.kept.push(format!("{} ({reason})", node.record.name));
                continue;
            }
            if *busy && node.is_placeable() && !node.attempts.is_empty() {
                tally.busy.push(BusyHost { node: *id, work: self.work_on(node, now) });
            }
        }
        let waiting = self.share_waiting(names);
        let braked = self.braked_until(now);
        let mut views = BTreeMap::new();
        for (name, (tally, capacity, _)) in tallies {
            let queue = self.waiting_for(name) + tally.sent_ahead;
            let oldest = self.oldest_wait(name, now);
            let (Some(pool), Some(shared)) = (self.pools.get_mut(name), waiting.get(name)) else { continue };
            let mut view = tally.into_view(pool, now, out);
            view.readings.queue = queue;
            let started = pool.waits.p95(now).unwrap_or_default();
            view.readings.wait = Reading::Value(started.max(oldest).0);
            view.need = need_of(pool, &view, shared, &capacity, oldest);
            if pool.ongoing.note(view.need.now, &mut pool.record.pattern, now) {
                out.touched.pools.insert(name.clone());
            }
            view.silent = view.silent.or_else(|| unanswered(pool, now));
            if let Some(until) = braked {
                view.silent = Some((String::from("much of the fleet fell silent at once"), Some(until)));
            }
            pool.watch(&view.readings, now);
            view.breached_since.clone_from(&pool.breached_since);
            view.below_since.clone_from(&pool.below_since);
            views.insert(name.clone(), view);
        }
        views
    }

    /// How long the attempts of a node have run.
    fn work_on(&self, node: &Node, now: Timestamp) -> Millis {
        let ran = |id| self.attempts.get(id).and_then(|attempt| attempt.record.started);
        Millis(node.attempts.iter().filter_map(ran).map(|started| now.since(started).0).sum())
    }

    /// Waiting tasks that a host of this pool could run.
    fn waiting_for(&self, name: &PoolName) -> u64 {
        let Some(pool) = self.pools.get(name) else { return 0 };
        self.queue.tasks_where(|class| could_run(class, pool))
    }

    /// Age of the first task in line of the class that has waited for longest.
    fn oldest_wait(&self, name: &PoolName, now: Timestamp) -> Millis {
        let Some(pool) = self.pools.get(name) else { return Millis(0) };
        let heads = self.queue.heads().filter(|(_, class, _)| could_run(class, pool));
        let submitted = heads.filter_map(|((_, job), ..)| self.jobs.get(&job)).map(|job| job.submitted);
        submitted.min().map_or(Millis(0), |oldest| now.since(oldest))
    }

    /// Each waiting task counts as the need of one pool: of the cheapest that could make a host for it.
    fn share_waiting(&self, names: &BTreeSet<PoolName>) -> BTreeMap<PoolName, Vec<Waiting>> {
        let mut left: Vec<(&Class, u64)> = self.queue.classes().collect();
        let mut order: Vec<(Money, &PoolName, &Pool)> = self
            .pools
            .iter()
            .filter(|(_, pool)| !pool.is_fixed())
            .map(|(name, pool)| (pool.record.policy.cost.map_or(Money(0), |cost| cost.price_per_hour), name, pool))
            .collect();
        order.sort_by_key(|(price, name, _)| (*price, *name));
        let mut shared = BTreeMap::new();
        let last = order.len().saturating_sub(1);
        for (turn, (_, name, pool)) in order.into_iter().enumerate() {
            let usable_here: Vec<usize> =
                (0..left.len()).filter(|at| left.get(*at).is_some_and(|(class, _)| could_run(class, pool))).collect();
            let mine: Vec<Waiting> = usable_here
                .iter()
                .filter_map(|at| left.get(*at))
                .map(|(class, tasks)| Waiting { request: class.request, tasks: *tasks })
                .collect();
            if turn < last {
                let packed = takes(pool, &mine);
                for (at, rest) in usable_here.into_iter().zip(packed.left) {
                    if let Some((_, tasks)) = left.get_mut(at) {
                        *tasks = rest;
                    }
                }
            }
            if names.contains(name) {
                shared.insert(name.clone(), mine);
            }
        }
        shared
    }
}

/// What a host of this pool has: by its policy, or by the last one that was made if that had less.
fn usable(pool: &Pool) -> Resources {
    let asked = pool.record.policy.host.capacity();
    pool.record.made.as_ref().map_or(asked, |made| Resources {
        cpu_milli: asked.cpu_milli.min(made.capacity.cpu_milli),
        memory_bytes: asked.memory_bytes.min(made.capacity.memory_bytes),
        disk_bytes: asked.disk_bytes.min(made.capacity.disk_bytes),
    })
}

/// Could a host of this pool run tasks of this class?
fn could_run(class: &Class, pool: &Pool) -> bool {
    let policy = &pool.record.policy;
    let made = pool.record.made.as_ref();
    class.pool.as_ref().is_none_or(|name| *name == policy.name)
        && class.request.fits_in(&usable(pool))
        && class.constraints.iter().all(|(label, value)| policy.host.labels.get(label) == Some(value))
        && made.is_none_or(|made| class.fences.is_subset(&made.fences))
}

/// What the hosts that boot, and those that the pool may still make or wake, would take.
fn takes(pool: &Pool, waiting: &[Waiting]) -> Packed {
    let record = &pool.record;
    let hosts = u32::try_from(record.hosts.len()).unwrap_or(u32::MAX);
    let room = record.policy.max.saturating_sub(hosts);
    let most = match record.policy.provider {
        _ if record.paused.is_some() || record.stopped.is_some() => 0,
        ProviderKind::Static if record.policy.wake.is_none() => 0,
        ProviderKind::Static => room.min(u32::try_from(pool.view.asleep.len()).unwrap_or(u32::MAX)),
        ProviderKind::Local | ProviderKind::Exec => room,
    };
    packing::pack(waiting, &usable(pool), booting(&record.hosts), u64::from(most))
}

pub(super) fn booting(hosts: &BTreeMap<HostRequestId, Host>) -> u32 {
    let booting = hosts.values().filter(|host| matches!(host, Host::Requested(_) | Host::Waking { .. }));
    u32::try_from(booting.count()).unwrap_or(u32::MAX)
}

/// What runs and waits, and what has lately.
fn need_of(pool: &mut Pool, view: &PoolView, waiting: &[Waiting], capacity: &Resources, oldest: Millis) -> Need {
    let (runs, boot, now) = (pool.runs, view.boot, view.at);
    // Who waits for much longer than a host takes to come shows that these tasks are not as short as those before.
    let places = |tasks| if oldest.0 > boot.0 * PATIENCE_BOOTS { tasks } else { runs.places(tasks, boot) };
    let placed: Vec<Waiting> = waiting.iter().map(|class| Waiting { tasks: places(class.tasks), ..*class }).collect();
    let per_host = |class: &Waiting| capacity.count_of(&class.request).max(1);
    let queued: u64 = placed.iter().map(|class| (class.tasks * u64::from(WHOLE)).div_ceil(per_host(class))).sum();
    let mut need = (u64::from(view.need.now) + queued).div_ceil(u64::from(WHOLE));
    let mut missing = packing::pack(&placed, capacity, view.booting, limits::NODES_MAX as u64).new_hosts;
    if runs.is_unknown(now) {
        // A thousand tasks of a moment each must not make a thousand hosts: the first few tell how long they run.
        need = need.min(FIRST_HOSTS);
        missing = missing.min(FIRST_HOSTS.saturating_sub(u64::from(view.booting)));
    }
    let now_needed = u32::try_from(need).unwrap_or(u32::MAX);
    let taken = u64::from(view.need.now);
    let come: u64 = waiting.iter().map(|class| class.tasks * u64::from(WHOLE) / per_host(class)).sum();
    let rise = pool.flow.rise(taken, come, boot, now);
    let with_rise = (taken + queued + rise).div_ceil(u64::from(WHOLE));
    let rise = if runs.is_unknown(now) { 0 } else { with_rise.saturating_sub(need) };
    let rise = u32::try_from(rise).unwrap_or(u32::MAX);
    pool.memory.note(now_needed.saturating_add(rise), view.hosts, boot, now);
    let (recent, recent_until) = pool.memory.most(boot, now);
    let (pattern, pattern_until) = pool.record.pattern.floor(boot, now);
    Need {
        now: now_needed,
        missing: u32::try_from(missing).unwrap_or(u32::MAX),
        recent,
        window: pool.memory.window(boot),
        recent_until,
        rise,
        pattern,
        pattern_until,
    }
}

/// A provider that does not confirm what it was told says nothing about how many hosts there are.
fn unanswered(pool: &Pool, now: Timestamp) -> Option<(String, Option<Timestamp>)> {
    if mutation::is_on(Mutation::SilentProviderIgnored) {
        return None;
    }
    if let Some(trouble) = &pool.provider_trouble {
        return Some((format!("the provider does not say which hosts there are: {trouble}"), None));
    }
    let since = |host: &Host| match host {
        Host::Deleting { since: Some(since), .. } => Some(*since),
        Host::Deleting { since: None, .. } | Host::Requested(_) | Host::Joined(_) | Host::Waking { .. } => None,
    };
    let overdue =
        pool.record.hosts.values().filter_map(since).filter(|since| now.since(*since) >= limits::PROVIDER_SILENT);
    let oldest = overdue.clone().min()?;
    let sentence =
        format!("the provider has not confirmed {} deletions for up to {}", overdue.count(), now.since(oldest));
    Some((sentence, None))
}

impl Tally {
    fn into_view(mut self, pool: &mut Pool, now: Timestamp, out: &mut Output) -> PoolView {
        let record = &mut pool.record;
        let mut booting = booting(&record.hosts);
        let mut hosts = u32::try_from(record.hosts.len()).unwrap_or(u32::MAX).saturating_add(self.own);
        if mutation::is_on(Mutation::CapIgnoresBooting) {
            hosts -= booting;
            booting = 0;
        }
        let mut spent = record.spent;
        spent.count(hosts, now);
        if record.spent.hosts != hosts {
            record.spent = spent;
            out.touched.pools.insert(record.policy.name.clone());
        }
        let price = record.policy.cost.map_or(Money(0), |cost| cost.price_per_hour);
        self.idle.sort_by_key(|host| (host.since, host.node));
        let asleep = waking::in_order(core::mem::take(&mut self.asleep), &record.hosts, &pool.unwoken);
        let too_silent = u64::from(self.heard) * 100 < u64::from(self.expected) * FRESH_PERCENT
            && !mutation::is_on(Mutation::SilentPoolShrinks);
        let silent = too_silent.then(|| {
            (format!("only {} of {} nodes are heard ({FRESH_PERCENT} % are needed)", self.heard, self.expected), None)
        });
        PoolView {
            at: now,
            supply: self.supply.saturating_add(booting),
            booting,
            hosts,
            draining: self.draining,
            cancellable: self.cancellable,
            asleep,
            idle: self.idle,
            busy: self.busy,
            kept: self.kept,
            readings: Readings {
                cpu: self.cpu.reading(self.expected),
                memory: self.memory.reading(self.expected),
                pressure: self.pressure.reading(self.expected),
                ..Readings::default()
            },
            need: Need { now: u32::try_from(self.taken).unwrap_or(u32::MAX), ..Need::default() },
            boot: record.boots.usual(),
            last_scaled: record.last_scaled,
            last_out: record.last_out,
            paused: record.paused.clone(),
            trial_at: record.paused.as_ref().map(|_| record.paused_until.unwrap_or_default()),
            stopped: record.stopped.as_ref().map(|mark| format!("{} ({})", mark.reason, mark.actor)),
            pinned: record.pin.as_ref().map(|pin| Pinned { size: pin.size, until: pin.until }),
            silent,
            spent_today: price.of_host_time(spent.host_ms),
            ..PoolView::default()
        }
    }
}
