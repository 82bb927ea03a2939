//! A fleet in virtual time round the real core: arrivals become jobs, hosts boot and go, tasks run as long as the
//! trace says. Nothing fails here; what is measured is the rule that decides on the pool's size.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
};

use muster_core::{
    effect::{HistoryEntry, Subject},
    event::Event,
    fleet::{Fleet, Output},
    ids::{Actor, AttemptId, Epoch, FIRST_JOB, HostRequestId, JobId, NodeId, RequestId, Revision, SessionId, Term},
    policy::{PoolPolicy, ProviderKind},
    resources::Resources,
    spec::{Delivery, JobSpec, OnDrain, Retries},
    time::{Millis, Timestamp},
};

use super::{
    measure::{Direction, Figures, Meter, Point},
    rules::{Rule, TICK, Windows},
    workload::Workload,
};
use crate::rng::Rng;

/// How hosts come and go, and how the result is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// From a host's order to its first hello, on average.
    pub boot: Millis,
    /// A boot takes between `boot` less and `boot` plus this many thousandths of it, each length alike likely.
    pub boot_spread_permille: u64,
    /// From the order to end a host until it is gone.
    pub stop: Millis,
    /// Seeds the boot times.
    pub seed: u64,
    /// Where the trace is divided into a first and a second part, in thousandths of its span.
    pub split_permille: u64,
    /// A moment of the week for the trace's begin.
    pub begins: Timestamp,
}

impl Conditions {
    /// Where a trace of this span is divided.
    #[must_use]
    pub const fn split_of(&self, span: Millis) -> Millis {
        let permille = if self.split_permille < 1_000 { self.split_permille } else { 1_000 };
        Millis(span.0 / 1_000 * permille + span.0 % 1_000 * permille / 1_000)
    }
}

/// A rule's figures: of the first part, the second, and the whole; and its plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Up to the split.
    pub first: Figures,
    /// From there.
    pub second: Figures,
    /// All.
    pub whole: Figures,
    /// Over the whole span.
    pub points: Vec<Point>,
    /// What the core said about each change of size; empty for other rules.
    pub decisions: Vec<HistoryEntry>,
}

/// Hosts tell that they live this often: within the time that their figures count, and seldom enough that months take seconds.
const HEARTBEAT: Millis = Millis::from_secs(9);
/// Decisions that are kept.
const DECISIONS_MAX: usize = 100_000;
/// Settlings without the end in sight. A rule that never serves some task would go on for ever.
const OVERTIME: Millis = Millis::from_secs(7 * 24 * 3_600);

/// Thousandths of a trace: all of it was played, and all of its tasks.
pub const WHOLE: u64 = 1_000;

/// Plays a workload under a rule. Tells `progress` each thousandth of the trace's span, and [`WHOLE`] at the end alone.
///
/// # Errors
/// A sentence: a task fits no host, or some task is never served.
pub fn play(
    workload: &Workload,
    policy: &PoolPolicy,
    rule: &Rule,
    conditions: Conditions,
    progress: &dyn Fn(u64),
) -> Result<Outcome, String> {
    let mut world = World::new(workload, policy, rule, conditions);
    world.begin();
    let mut told = None;
    while let Some(now) = world.next_moment() {
        let played = world.played(now);
        if told.replace(played) != Some(played) {
            progress(played);
        }
        world.step(now)?;
    }
    progress(WHOLE);
    world.finish()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    HostUp(HostRequestId),
    TaskDone { node: NodeId, attempt: AttemptId },
    HostGone(HostRequestId),
    Heartbeats,
    Tick,
}

/// A host that was ordered and is not gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    Booting,
    Up(NodeId),
    Ending(Option<NodeId>),
}

/// A host's agent: starts what it is sent in order, as far as there is room.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) host: HostRequestId,
    pub(super) session: SessionId,
    pub(super) free: Resources,
    pub(super) running: BTreeMap<AttemptId, (Epoch, Timestamp)>,
    pub(super) queued: VecDeque<(AttemptId, Epoch)>,
    /// A drain that asked for a proof which could not be given yet.
    pub(super) asked: Option<Revision>,
    pub(super) closed: bool,
    pub(super) idle_since: Timestamp,
}

pub(super) struct World<'a> {
    pub(super) workload: &'a Workload,
    pub(super) policy: &'a PoolPolicy,
    pub(super) rule: &'a Rule,
    pub(super) conditions: Conditions,
    /// Of the trace, without waits.
    pub(super) span: Millis,
    pub(super) windows: Option<Windows>,
    pub(super) fleet: Fleet,
    pub(super) meter: Meter,
    pub(super) rng: Rng,
    pub(super) agenda: BinaryHeap<Reverse<(Timestamp, u64, Action)>>,
    pub(super) sequence: u64,
    pub(super) now: Timestamp,
    pub(super) inbox: Vec<Event>,
    pub(super) next_arrival: usize,
    pub(super) machines: BTreeMap<HostRequestId, Machine>,
    /// Requests of a rule outside of the core.
    pub(super) next_own: u64,
    pub(super) agents: BTreeMap<NodeId, Agent>,
    pub(super) enrolling: BTreeMap<RequestId, HostRequestId>,
    pub(super) next_request: u64,
    pub(super) next_session: u64,
    /// What waiting and running tasks take: of the trace, and of hosts.
    pub(super) asked: Resources,
    pub(super) used: Resources,
    pub(super) unfinished: u64,
    pub(super) finished: BTreeSet<JobId>,
    pub(super) decisions: Vec<HistoryEntry>,
    pub(super) refused: Option<String>,
}

impl<'a> World<'a> {
    fn new(workload: &'a Workload, policy: &'a PoolPolicy, rule: &'a Rule, conditions: Conditions) -> Self {
        let span = workload.span();
        let split = conditions.split_of(span);
        let windows = match rule {
            Rule::Concurrency(rule) => Some(Windows::new(*rule)),
            Rule::Policy(_) | Rule::Fixed(_) => None,
        };
        Self {
            workload,
            policy,
            rule,
            conditions,
            span,
            windows,
            fleet: Fleet::default(),
            meter: Meter::new(span, split),
            rng: Rng::new(conditions.seed),
            agenda: BinaryHeap::new(),
            sequence: 0,
            now: conditions.begins,
            inbox: Vec::new(),
            next_arrival: 0,
            machines: BTreeMap::new(),
            next_own: 1,
            agents: BTreeMap::new(),
            enrolling: BTreeMap::new(),
            next_request: 1,
            next_session: 1,
            asked: Resources::default(),
            used: Resources::default(),
            unfinished: workload.tasks(),
            finished: BTreeSet::new(),
            decisions: Vec::new(),
            refused: None,
        }
    }

    /// The trace's time as the fleet's clock has it.
    fn clock(&self, at: Millis) -> Timestamp {
        self.conditions.begins + at
    }

    pub(super) fn trace_time(&self, now: Timestamp) -> Millis {
        now.since(self.conditions.begins)
    }

    /// Thousandths of the span that are over; tasks may be left even when all are.
    fn played(&self, now: Timestamp) -> u64 {
        let (since, span) = (u128::from(self.trace_time(now).0), u128::from(self.span.0.max(1)));
        u64::try_from(since * u128::from(WHOLE) / span).map_or(WHOLE - 1, |played| played.min(WHOLE - 1))
    }

    pub(super) fn at(&mut self, at: Timestamp, action: Action) {
        self.sequence += 1;
        self.agenda.push(Reverse((at, self.sequence, action)));
    }

    fn begin(&mut self) {
        let now = self.conditions.begins;
        let policy = match self.rule {
            Rule::Policy(policy) => PoolPolicy {
                name: self.policy.name.clone(),
                provider: ProviderKind::Local,
                host: self.policy.host.clone(),
                ..(**policy).clone()
            },
            // Rules outside of the core order their hosts by themselves.
            Rule::Fixed(_) | Rule::Concurrency(_) => PoolPolicy {
                placement: self.policy.placement,
                ..PoolPolicy::fixed(
                    self.policy.name.clone(),
                    ProviderKind::Static,
                    0,
                    self.policy.max,
                    self.policy.host.clone(),
                )
            },
        };
        self.inbox.push(Event::Led { term: Term(1) });
        let request = self.request();
        self.inbox.push(Event::SetPool { request, policy: Box::new(policy), actor: Actor("replay".into()) });
        match self.rule {
            Rule::Policy(_) => {}
            Rule::Concurrency(_) => self.at(now, Action::Tick),
            Rule::Fixed(hosts) => {
                for _ in 0..*hosts {
                    let host = self.own_host();
                    self.order_for(host, now);
                }
            }
        }
        self.at(now, Action::Heartbeats);
    }

    pub(super) const fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    /// When something happens next; none when all tasks are done and the trace is over.
    fn next_moment(&self) -> Option<Timestamp> {
        // What effects led to at once belongs to the same moment.
        if !self.inbox.is_empty() {
            return Some(self.now);
        }
        let end = self.clock(self.span);
        let arrival = self.workload.arrivals.get(self.next_arrival).map(|arrival| self.clock(arrival.at));
        let action = self.agenda.peek().map(|Reverse((at, ..))| *at);
        let next = [arrival, action, self.fleet.next_wake()].into_iter().flatten().min()?;
        (next <= end || self.unfinished > 0).then_some(next)
    }

    fn step(&mut self, now: Timestamp) -> Result<(), String> {
        let since = self.trace_time(now);
        if since.0 > self.span.0.saturating_add(OVERTIME.0) {
            return Err(format!(
                "{} tasks were not served a week after the trace's end: is the pool's max too small, or does it not grow?",
                self.unfinished
            ));
        }
        self.now = now;
        self.meter.advance(since);
        while let Some(Reverse((at, _, action))) = self.agenda.peek().copied()
            && at <= now
        {
            self.agenda.pop();
            self.act(action, now);
        }
        self.arrive(now);
        let mut out = Output::default();
        for event in std::mem::take(&mut self.inbox) {
            self.fleet.apply(event, now, &mut out);
        }
        self.fleet.settle(now, &mut out);
        for effect in out.effects {
            self.carry_out(effect, now);
        }
        self.note_decisions(out.touched.history, since);
        self.forget_finished();
        self.meter.uses(self.permille(&self.used));
        self.refused.take().map_or(Ok(()), Err)
    }

    /// Thousandths of one host.
    pub(super) fn permille(&self, taken: &Resources) -> u64 {
        let host = self.policy.host.capacity();
        let part = |taken: u64, have: u64| (taken * 1_000).checked_div(have).unwrap_or(0);
        part(taken.cpu_milli, host.cpu_milli).max(part(taken.memory_bytes >> 10, host.memory_bytes >> 10))
    }

    fn act(&mut self, action: Action, now: Timestamp) {
        match action {
            Action::HostUp(host) => self.host_up(host),
            Action::HostGone(host) => self.host_gone(host),
            Action::TaskDone { node, attempt } => self.task_done(node, attempt, now),
            Action::Heartbeats => {
                self.heartbeats();
                self.at(now + HEARTBEAT, Action::Heartbeats);
            }
            Action::Tick => {
                self.tick(now);
                self.at(now + TICK, Action::Tick);
            }
        }
    }

    fn arrive(&mut self, now: Timestamp) {
        while let Some(arrival) = self.workload.arrivals.get(self.next_arrival)
            && self.clock(arrival.at) <= now
        {
            let number = self.next_arrival as u64;
            self.next_arrival += 1;
            self.asked = self.asked.plus(&times(&arrival.request(), arrival.tasks));
            let spec = JobSpec {
                name: String::new(),
                owner: Actor(String::new()),
                pool: Some(self.policy.name.clone()),
                priority: 0,
                tasks: arrival.tasks,
                request: arrival.request(),
                fences: BTreeSet::new(),
                constraints: BTreeMap::new(),
                delivery: Delivery::AtLeastOnce,
                on_drain: OnDrain::Finish,
                retries: Retries { failed: 0, lost: u32::MAX, drained: u32::MAX },
                time_limit: None,
                grace: Millis(0),
            };
            let request = self.request();
            self.inbox.push(Event::Submit { request, key: number.to_string(), digest: [0; 32], spec });
        }
    }

    /// The arrival that a job was made of: jobs are numbered in the order of their submission.
    pub(super) fn arrival_of(&self, job: JobId) -> super::workload::Arrival {
        let number = usize::try_from(job.0 - FIRST_JOB.0).unwrap_or(usize::MAX);
        self.workload.arrivals[number]
    }

    fn note_decisions(&mut self, history: Vec<HistoryEntry>, since: Millis) {
        for entry in history {
            if let Subject::Pool { sizes: Some(sizes), .. } = &entry.subject {
                let direction = if sizes.to > sizes.from { Direction::Out } else { Direction::In };
                self.meter.changed(direction, since);
                if self.decisions.len() < DECISIONS_MAX {
                    self.decisions.push(entry);
                }
            }
        }
    }

    /// Nobody will ask for them: a long trace must not fill the memory, nor the fleet's limit of jobs.
    fn forget_finished(&mut self) {
        for job in std::mem::take(&mut self.finished) {
            self.fleet.forget_job(job);
        }
    }

    fn finish(self) -> Result<Outcome, String> {
        if self.unfinished > 0 {
            return Err(format!("{} tasks were never served: the pool does not grow for them", self.unfinished));
        }
        let ([first, second, whole], points) = self.meter.figures();
        Ok(Outcome { first, second, whole, points, decisions: self.decisions })
    }
}

fn times(one: &Resources, count: u32) -> Resources {
    let count = u64::from(count);
    Resources {
        cpu_milli: one.cpu_milli * count,
        memory_bytes: one.memory_bytes * count,
        disk_bytes: one.disk_bytes * count,
    }
}
