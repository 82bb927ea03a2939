//! Who asks: people and programs that submit, cancel, drain and change their
//! minds. A client that gets no answer asks again with its key.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    denied::Denied,
    effect::Reply,
    event::{DrainOrder, DrainThen, Event, PoolOrder},
    ids::{Actor, JobId, NodeId, PoolName, RequestId},
    job::JobRecord,
    node::{Duty, Liveness, NodeRecord},
    policy::{
        Below, Change, HostTemplate, Metric, PlacementOrder, PoolPolicy, Preset, ProviderKind, ScaleIn, ScaleOut, Sleep,
    },
    resources::Resources,
    rolling::{RollingId, RollingOrder},
    spec::{Delivery, JobSpec, OnDrain, Retries},
    time::{Millis, Timestamp},
};

use crate::{
    agenda::Action,
    host::RARE_FENCE,
    truth::{Asked, Violation},
    world::World,
};

/// The name of jobs that do not end by themselves.
pub const ENDLESS: &str = "endless";
/// Each host's own name.
pub const HOST_LABEL: &str = "host";
/// The pool of hosts that join by themselves.
pub const STATIC: &str = "batch";
/// The pool that a provider makes hosts for.
pub const ELASTIC: &str = "elastic";

/// All jobs that clients want done.
#[derive(Debug, Default)]
pub struct Jobs {
    wanted: Vec<Wanted>,
    /// Jobs that bring down their hosts.
    pub poison: BTreeSet<JobId>,
    /// Questions under way.
    asked: BTreeMap<RequestId, (Asked, Option<usize>)>,
    next_request: u64,
}

#[derive(Debug)]
struct Wanted {
    spec: JobSpec,
    poison: bool,
    answered: Option<JobId>,
    refused: bool,
}

impl Jobs {
    /// A job that is stored may run before its client hears of it.
    pub(crate) fn note_poison(&mut self, job: JobId, key: &str) {
        let wanted = key.strip_prefix("key-").and_then(|at| at.parse::<usize>().ok());
        if wanted.and_then(|at| self.wanted.get(at)).is_some_and(|wanted| wanted.poison) {
            self.poison.insert(job);
        }
    }
}

impl World {
    /// Clients whose jobs went with lost writes find that out, and submit them again.
    pub(crate) fn note_lost_jobs(&mut self) {
        let mut again = Vec::new();
        for (at, wanted) in self.jobs.wanted.iter_mut().enumerate() {
            if wanted.answered.is_some_and(|job| self.store.job(job).is_none_or(|row| row.key != key_of(at))) {
                wanted.answered = None;
                again.push(at);
            }
        }
        for (asked, job) in self.jobs.asked.values_mut() {
            if let (Asked::Submit { known }, Some(job)) = (asked, *job) {
                *known = self.jobs.wanted[job].answered;
            }
        }
        self.jobs.poison.retain(|job| self.store.job(*job).is_some());
        for job in again {
            self.after(1_000, ASK_AGAIN.0 * 4, Action::Submit { job });
        }
    }
}

fn key_of(job: usize) -> String {
    format!("key-{job}")
}

/// A client without an answer asks again.
const ASK_AGAIN: Millis = Millis::from_secs(8);

fn operator() -> Actor {
    Actor("operator".into())
}

impl World {
    pub(crate) fn request(&mut self, asked: Asked, job: Option<usize>) -> RequestId {
        self.jobs.next_request += 1;
        let request = RequestId(self.jobs.next_request);
        if !matches!(asked, Asked::Other) {
            self.jobs.asked.insert(request, (asked, job));
        }
        request
    }

    /// All jobs have an answer.
    pub(crate) fn all_submitted(&self) -> bool {
        self.jobs.wanted.len() == self.setup.jobs
            && self.jobs.wanted.iter().all(|wanted| wanted.answered.is_some() || wanted.refused)
    }

    /// In a quarter of the seeds the hosts that join by themselves sleep when nothing is to be done, and are woken.
    pub(crate) const fn has_sleepers(&self) -> bool {
        self.seed / 4 % 4 == 3
    }

    pub(crate) fn set_pools(&mut self, member: usize) -> Result<(), Violation> {
        let policy = |name: &str, provider, max| {
            let host =
                HostTemplate { cpu_milli: 4_000, memory_bytes: 8 << 30, disk_bytes: 1 << 30, labels: BTreeMap::new() };
            PoolPolicy {
                boot_deadline: Millis::from_secs(60),
                boot_failures: 4,
                ..PoolPolicy::fixed(PoolName(name.into()), provider, 0, max, host)
            }
        };
        let rule = ScaleOut {
            metric: Metric::QueueLength,
            above: 0,
            hold: Millis::from_secs(2),
            change: Change::Step(2),
            cooldown: Some(Millis::from_secs(3)),
        };
        let fewer = ScaleIn {
            when: vec![Below { metric: Metric::QueueLength, below: 4, hold: Millis(0) }],
            cooldown: Some(Millis::from_secs(2)),
            ..ScaleIn::one_by_one(Millis::from_secs(8))
        };
        let fixed = if self.has_sleepers() {
            // One host more than may be there has joined by itself: the maximum is felt.
            let max = u32::try_from(self.setup.hosts.saturating_sub(1)).unwrap_or(u32::MAX).max(1);
            PoolPolicy {
                sleep: if (self.seed / 16).is_multiple_of(2) { Sleep::Stop } else { Sleep::Poweroff },
                wake: Some("wake".into()),
                placement: PlacementOrder::BinPack,
                // Hosts go while work waits elsewhere, and come soon after: many sleep and wake.
                scale_out: vec![ScaleOut { above: 6, ..rule }],
                scale_in: Some(ScaleIn {
                    when: vec![Below { metric: Metric::QueueLength, below: 6, hold: Millis(0) }],
                    idle: Millis::from_secs(2),
                    ..fewer.clone()
                }),
                ..policy(STATIC, ProviderKind::Static, max)
            }
        } else {
            policy(STATIC, ProviderKind::Static, 100)
        };
        let request = self.request(Asked::Other, None);
        self.tell(member, Event::SetPool { request, policy: Box::new(fixed), actor: operator() })?;
        // One that can be asked whether a host may go, and one that is not: by the seed, as all below.
        let provider = if (self.seed / 4).is_multiple_of(2) { ProviderKind::Local } else { ProviderKind::Exec };
        let elastic = PoolPolicy {
            placement: PlacementOrder::BinPack,
            min: u32::from((self.seed / 8).is_multiple_of(2)).min(self.setup.pool_max),
            ..policy(ELASTIC, provider, self.setup.pool_max)
        };
        let elastic = if (self.seed / 2).is_multiple_of(2) {
            PoolPolicy { preset: Preset::Demand, ..elastic }
        } else {
            PoolPolicy { scale_out: vec![rule], scale_in: Some(fewer), ..elastic }
        };
        let request = self.request(Asked::Other, None);
        self.tell(member, Event::SetPool { request, policy: Box::new(elastic), actor: operator() })
    }

    /// The clients' next step.
    pub(crate) fn client(&mut self) -> Result<(), Violation> {
        if self.jobs.wanted.is_empty()
            && let Some(member) = self.serving()
        {
            self.set_pools(member)?;
        }
        if self.jobs.wanted.len() < self.setup.jobs {
            let (spec, poison) = self.invent_job();
            self.jobs.wanted.push(Wanted { spec, poison, answered: None, refused: false });
            self.submit(self.jobs.wanted.len() - 1)?;
        }
        let acts = !self.is_healed() && !self.is_lull();
        if acts {
            self.operate()?;
        }
        if self.jobs.wanted.len() < self.setup.jobs || acts {
            let pause = self.setup.span.0 / (self.setup.jobs as u64 + 1);
            self.after(1, pause.max(2) * 3 / 2 + 1, Action::Client);
        }
        Ok(())
    }

    fn invent_job(&mut self) -> (JobSpec, bool) {
        let mix = self.setup.mix;
        let roll = self.rng.between(0, 1_000);
        let delivery = if roll < mix.at_most_once {
            Delivery::AtMostOnce
        } else if roll < mix.at_most_once + mix.exclusive {
            Delivery::Exclusive
        } else {
            Delivery::AtLeastOnce
        };
        let pool = match self.rng.between(0, 10) {
            0 => Some(PoolName(STATIC.into())),
            1 if self.setup.pool_max > 0 => Some(PoolName(ELASTIC.into())),
            _any => None,
        };
        let poison = self.rng.chance(mix.poison);
        // Some can run on one host alone, and have budget enough to bring it down again and again.
        let is_pinned = poison && self.rng.chance(600);
        let host = format!("host-{}", self.rng.between(0, self.setup.hosts.max(1) as u64));
        let limited = self.rng.chance(mix.limited);
        let name = if self.rng.chance(mix.endless) { ENDLESS } else { "" };
        let spec = JobSpec {
            name: name.into(),
            owner: Actor("client".into()),
            pool: pool.filter(|_| !is_pinned),
            priority: i32::try_from(self.rng.between(0, 3)).unwrap_or(0),
            tasks: if poison { 1 } else { u32::try_from(self.rng.between(1, 7)).unwrap_or(1) },
            request: Resources { cpu_milli: 500 * self.rng.between(1, 3), memory_bytes: 1 << 30, disk_bytes: 0 },
            fences: (!is_pinned && self.rng.chance(100)).then(|| RARE_FENCE.to_owned()).into_iter().collect(),
            constraints: is_pinned.then(|| (HOST_LABEL.to_owned(), host)).into_iter().collect(),
            delivery: if is_pinned { Delivery::AtLeastOnce } else { delivery },
            on_drain: match self.rng.between(0, 10) {
                0..=3 => OnDrain::Requeue,
                4 => OnDrain::Checkpoint { signal: 10 },
                _most => OnDrain::Finish,
            },
            retries: Retries {
                failed: u32::try_from(self.rng.between(0, 3)).unwrap_or(0),
                lost: match self.rng.chance(500) {
                    _any if is_pinned => 12,
                    true => 3,
                    false => 1,
                },
                drained: if self.rng.chance(500) { 16 } else { 1 },
            },
            time_limit: limited.then(|| Millis(self.rng.between(1_000, 60_000))),
            grace: Millis(self.rng.between(0, 5_000)),
        };
        (spec, poison)
    }

    pub(crate) fn submit(&mut self, job: usize) -> Result<(), Violation> {
        let wanted = &self.jobs.wanted[job];
        if wanted.answered.is_some() && self.rng.chance(950) || wanted.refused {
            return Ok(());
        }
        let (known, spec) = (wanted.answered, wanted.spec.clone());
        self.after(ASK_AGAIN.0, ASK_AGAIN.0 * 2, Action::Submit { job });
        let Some(member) = self.serving() else { return Ok(()) };
        let request = self.request(Asked::Submit { known }, Some(job));
        self.tell(member, Event::Submit { request, key: key_of(job), digest: [0; 32], spec })
    }

    /// A client hears.
    pub(crate) fn answer(&mut self, request: RequestId, reply: Result<Reply, Denied>) -> Result<(), Violation> {
        let Some((asked, job)) = self.jobs.asked.remove(&request) else { return Ok(()) };
        let reply = match reply {
            Ok(reply) => reply,
            Err(denied) => {
                self.coverage.count("denied", denied_name(&denied));
                if let Some(job) = job {
                    self.jobs.wanted[job].refused = true;
                }
                return Ok(());
            }
        };
        // The reply may be lost on its way to the client.
        if self.rng.chance(20) {
            return Ok(());
        }
        self.truth.check_answer(&reply, &asked, &self.store)?;
        match (reply, asked) {
            (Reply::Submitted { job: id, .. }, Asked::Submit { .. }) => {
                if let Some(wanted) = job.and_then(|job| self.jobs.wanted.get_mut(job)) {
                    wanted.answered = Some(id);
                }
            }
            (Reply::Enrolled { node }, Asked::Enroll { host }) => self.hosts[host].node = Some(node),
            _nothing_to_note => {}
        }
        Ok(())
    }

    pub(crate) fn enroll(&mut self, host: usize, member: usize) -> Result<(), Violation> {
        let known = &self.hosts[host];
        let (name, pool, from, key) = (known.name.clone(), known.pool.clone(), known.request, known.key);
        let shown = self.members[member].shown;
        let request = self.request(Asked::Enroll { host }, None);
        self.tell(member, Event::Enroll { request, name, pool, host: from, key, shown })
    }

    fn some_node(&mut self) -> Option<NodeId> {
        let nodes: Vec<NodeId> = self.hosts.iter().filter(|host| !host.is_gone).filter_map(|host| host.node).collect();
        self.rng.choose(&nodes).copied()
    }

    fn some_job(&mut self) -> Option<JobId> {
        // Most commands are about something recent.
        let jobs: Vec<JobId> = self.truth.accepted().collect();
        let recent = &jobs[jobs.len().saturating_sub(20)..];
        self.rng.choose(recent).copied()
    }

    /// An operator sees the alarm in time, looks, and says to go on.
    fn answer_loss(&mut self) -> Result<(), Violation> {
        let Some(member) = self.serving() else { return Ok(()) };
        let is_lost = self.members[member].fleet().is_some_and(|fleet| fleet.meta().loss.is_some());
        if !is_lost {
            return Ok(());
        }
        let request = self.request(Asked::Other, None);
        self.tell(member, Event::AcceptLoss { request, actor: operator(), reason: "what is gone is gone".into() })
    }

    /// An operator sees that evictions rest, looks, and finds the silent hosts gone: rightly, or not.
    fn answer_brake(&mut self) -> Result<(), Violation> {
        let Some(member) = self.serving() else { return Ok(()) };
        let time = self.members[member].time(self.now);
        let until = self.members[member].fleet().and_then(|fleet| fleet.meta().brake_until);
        if until.is_none_or(|until| until <= time) {
            return Ok(());
        }
        let request = self.request(Asked::Other, None);
        self.tell(member, Event::ReleaseBrake { request, actor: operator(), reason: "they are gone".into() })
    }

    /// One command, or a hasty operator's several on one node.
    fn operate(&mut self) -> Result<(), Violation> {
        if self.rng.chance(80) {
            self.answer_loss()?;
        }
        if self.rng.chance(15) {
            self.answer_brake()?;
        }
        let Some(node) = self.some_node() else { return Ok(()) };
        self.command(node)?;
        if self.rng.chance(100) {
            for step in 1..self.rng.between(2, 8) {
                let when = self.now + Millis(step * self.rng.between(1, 30));
                self.at(when, Action::Command { node });
            }
        }
        Ok(())
    }

    pub(crate) fn command(&mut self, node: NodeId) -> Result<(), Violation> {
        let Some(member) = self.serving().filter(|_| !self.is_healed()) else { return Ok(()) };
        let actor = operator();
        let event = match self.rng.between(0, 60) {
            0..=4 => {
                let time = self.members[member].time(self.now);
                let order = self.invent_drain(time);
                let request = self.request(Asked::Drain { node }, None);
                Event::Drain { request, node, order }
            }
            5..=14 => {
                let request = self.request(Asked::Other, None);
                Event::Resume { request, node, actor, reason: "done".into() }
            }
            15..=18 => {
                let Some(job) = self.some_job() else { return Ok(()) };
                let whole = self.rng.chance(700);
                let asked = if whole { Asked::Cancel { job } } else { Asked::Other };
                let tasks = (!whole).then(|| vec![0]);
                let request = self.request(asked, None);
                Event::Cancel { request, job, tasks, actor, reason: "no".into() }
            }
            19..=21 => {
                let Some(job) = self.some_job() else { return Ok(()) };
                let request = self.request(Asked::Other, None);
                Event::Retry { request, job, actor }
            }
            22 | 23 => {
                let request = self.request(Asked::Other, None);
                Event::Cordon { request, node, actor, reason: "look".into() }
            }
            24..=29 => {
                let request = self.request(Asked::Other, None);
                Event::Uncordon { request, node, actor, reason: "fine".into() }
            }
            30 | 31 => {
                let request = self.request(Asked::Other, None);
                let force = self.rng.chance(700);
                self.tell(member, Event::RemoveNode { request, node, force, actor, reason: "broken".into() })?;
                self.take_over_ahead(member);
                return Ok(());
            }
            32 => return self.set_pools(member),
            33 => {
                // It is to go, and was set aside before.
                let request = self.request(Asked::Other, None);
                self.tell(member, Event::Cordon { request, node, actor: actor.clone(), reason: "old".into() })?;
                let order = DrainOrder {
                    deadline: None,
                    then: DrainThen::Delete,
                    refusable: false,
                    actor,
                    reason: "old".into(),
                };
                let request = self.request(Asked::Drain { node }, None);
                Event::Drain { request, node, order }
            }
            34 => return self.drain_in_turn(member),
            35 => return self.end_rollings(member, 500),
            36 => return self.steer(member, PoolOrder::Pause),
            37 | 38 => return self.steer(member, PoolOrder::Resume),
            39 => {
                let time = self.members[member].time(self.now);
                let until = self.rng.chance(600).then(|| time + Millis(self.rng.between(1_000, 200_000)));
                // Now and then more than the policy allows.
                let size = u32::try_from(self.rng.between(0, 5)).unwrap_or(0);
                return self.steer(member, PoolOrder::Scale { size, until });
            }
            _nothing => return Ok(()),
        };
        self.tell(member, event)
    }

    /// The elastic pool's scaling rests, or goes on, or has a size of its own.
    fn steer(&mut self, member: usize, order: PoolOrder) -> Result<(), Violation> {
        let request = self.request(Asked::Other, None);
        let (pool, reason) = (PoolName(ELASTIC.into()), "a person looks at it".into());
        self.tell(member, Event::SteerPool { request, pool, order, actor: operator(), reason })
    }

    /// Some nodes in turn; the judge knows the budget by its reason.
    fn drain_in_turn(&mut self, member: usize) -> Result<(), Violation> {
        let mut nodes = Vec::new();
        for _ in 0..self.rng.between(2, 8) {
            nodes.extend(self.some_node());
        }
        let at_once = u32::try_from(self.rng.between(1, 3)).unwrap_or(1);
        let then = match self.rng.between(0, 10) {
            0 => DrainThen::Stop,
            1 => DrainThen::Delete,
            _most => DrainThen::Nothing,
        };
        let within = self.rng.chance(800).then(|| Millis(self.rng.between(100, 60_000)));
        let request = self.request(Asked::Other, None);
        let reason = self.truth.set_drain_budget(request, at_once);
        let order = RollingOrder { at_once, within, then, actor: operator(), reason };
        self.tell(member, Event::DrainRolling { request, nodes, order })
    }

    /// So many of a thousand rolling drains are ended.
    fn end_rollings(&mut self, member: usize, permille: u64) -> Result<(), Violation> {
        let Some(fleet) = self.members[member].fleet() else { return Ok(()) };
        let ids: Vec<RollingId> = fleet.meta().rollings.keys().copied().collect();
        for rolling in ids {
            if self.rng.chance(permille) {
                let request = self.request(Asked::Other, None);
                let reason = "not now".into();
                self.tell(member, Event::CancelRolling { request, rolling, actor: operator(), reason })?;
            }
        }
        Ok(())
    }

    fn invent_drain(&mut self, time: Timestamp) -> DrainOrder {
        let deadline = self.rng.chance(700).then(|| time + Millis(self.rng.between(100, 60_000)));
        let then = match self.rng.between(0, 10) {
            0 | 1 => DrainThen::Stop,
            2 => DrainThen::Poweroff,
            3 => DrainThen::Delete,
            _most => DrainThen::Nothing,
        };
        let refusable = self.rng.chance(200);
        DrainOrder { deadline, then, refusable, actor: operator(), reason: "kernel".into() }
    }

    /// After all has healed, an operator takes back what was done to nodes and jobs.
    pub(crate) fn tidy_up(&mut self) -> Result<(), Violation> {
        self.answer_loss()?;
        let Some(member) = self.serving() else { return Ok(()) };
        self.end_rollings(member, 1_000)?;
        self.steer(member, PoolOrder::Resume)?;
        let Some(fleet) = self.members[member].fleet() else { return Ok(()) };
        let is_kept = |node: &NodeRecord| !matches!(node.duty, Duty::Eligible);
        let nodes: Vec<NodeId> = fleet.nodes().filter(|(_, node)| is_kept(node)).map(|(id, _)| id).collect();
        // Whoever sent a provider's host away and left it so takes it out, or it counts for ever.
        let is_left = |node: &NodeRecord| {
            node.host.is_some() && matches!((node.liveness, &node.duty), (Liveness::Lost(_), Duty::Stopping { .. }))
        };
        let left: Vec<NodeId> = fleet.nodes().filter(|(_, node)| is_left(node)).map(|(id, _)| id).collect();
        for node in left {
            let request = self.request(Asked::Other, None);
            let (actor, reason) = (operator(), "it was sent away".into());
            self.tell(member, Event::RemoveNode { request, node, force: true, actor, reason })?;
        }
        for node in nodes {
            let request = self.request(Asked::Other, None);
            self.tell(member, Event::Resume { request, node, actor: operator(), reason: "healed".into() })?;
            let request = self.request(Asked::Other, None);
            self.tell(member, Event::Uncordon { request, node, actor: operator(), reason: "healed".into() })?;
        }
        let Some(fleet) = self.members[member].fleet() else { return Ok(()) };
        // What was cancelled before is not cancelled again: that order is the fleet's to keep.
        let is_over = |job: &JobRecord| job.finished.is_some() || job.cancelled_by.is_some();
        let is_unwanted = |job: &JobRecord| !job.held.is_empty() || (job.spec.name == ENDLESS && !is_over(job));
        let unwanted: Vec<JobId> = fleet.jobs().filter(|(_, job)| is_unwanted(job)).map(|(id, _)| *id).collect();
        for job in unwanted {
            let request = self.request(Asked::Other, None);
            let reason = "it is poison, or does not end".into();
            self.tell(member, Event::Cancel { request, job, tasks: None, actor: operator(), reason })?;
        }
        self.set_pools(member)
    }

    /// At the very end each node is drained, and has to prove it.
    pub(crate) fn drain_all(&mut self) -> Result<(), Violation> {
        let Some(member) = self.serving() else { return Ok(()) };
        let time = self.members[member].time(self.now);
        let nodes: Vec<NodeId> =
            self.hosts.iter().filter(|host| !host.is_gone && !host.is_clone).filter_map(|host| host.node).collect();
        for node in nodes {
            let order = DrainOrder {
                deadline: Some(time + Millis::from_secs(5)),
                then: DrainThen::Nothing,
                refusable: false,
                actor: operator(),
                reason: "the end".into(),
            };
            let request = self.request(Asked::Drain { node }, None);
            self.tell(member, Event::Drain { request, node, order })?;
        }
        Ok(())
    }
}

const fn denied_name(denied: &Denied) -> &'static str {
    match denied {
        Denied::KeyConflict { .. } => "key conflict",
        Denied::UnknownJob(_) => "unknown job",
        Denied::UnknownTask { .. } => "unknown task",
        Denied::UnknownNode(_) => "unknown node",
        Denied::UnknownPool(_) => "unknown pool",
        Denied::UnknownRolling(_) => "unknown rolling drain",
        Denied::NeverFits { .. } => "never fits",
        Denied::NodeState { .. } => "node state",
        Denied::JobState { .. } => "job state",
        Denied::PoolState { .. } => "pool state",
        Denied::NameTaken { .. } => "name taken",
        Denied::BadPolicy { .. } => "bad policy",
        Denied::LimitReached { .. } => "limit reached",
    }
}
