//! The world: time, network, faults, clients. One seed, one run.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    effect::{Effect, Reply},
    end::End,
    event::{DrainOrder, DrainThen, Event, HostSample},
    host::{Boottime, HostEvent, StartOrder, Verdict},
    ids::{Actor, AttemptId, Epoch, JobId, NodeId, PoolName, RequestId, Revision, SessionId},
    limits,
    resources::Resources,
    spec::{Delivery, JobSpec, OnDrain, Retries},
    time::{Millis, Timestamp},
};

use crate::{
    coordinator::{Coordinator, Death},
    host::{Report, Sandbox, SimHost, Wish},
    rng::Rng,
    truth::{Truth, Violation},
};

/// The size of a run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Hosts, all of which join.
    pub hosts: usize,
    /// Jobs, of 1 to 6 tasks each.
    pub jobs: usize,
    /// Faults and clients act for this long; then all heals.
    pub span: Millis,
    /// Which faults occur.
    pub faults: Faults,
}

/// Faults, in thousandths of the steps at which they may occur.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// The coordinator dies in a batch.
    pub coordinator: u64,
    /// An agent dies; its spawner goes on.
    pub agent: u64,
    /// A spawner dies, and its processes with it.
    pub spawner: u64,
    /// Both die together, with no reboot: nothing on the host remembers.
    pub both: u64,
    /// A host reboots.
    pub reboot: u64,
    /// A stream breaks; what is under way is lost.
    pub cut: u64,
    /// A host is cut off for a while.
    pub partition: u64,
}

impl Default for Setup {
    fn default() -> Self {
        let faults = Faults { coordinator: 30, agent: 40, spawner: 15, both: 15, reboot: 15, cut: 80, partition: 40 };
        Self { hosts: 5, jobs: 40, span: Millis::from_secs(600), faults }
    }
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Steps of the world.
    pub steps: u64,
    /// Starts of user code.
    pub starts: u64,
    /// How often each fault, refusal and end occurred.
    pub counts: BTreeMap<String, u64>,
    /// Virtual time until all was done.
    pub elapsed: Millis,
}

/// What happens next.
#[derive(Debug)]
enum Action {
    CoordinatorStart,
    CoordinatorWake,
    ToCoordinator { host: usize, session: SessionId, report: Report },
    ToHost { host: usize, session: SessionId, message: Message },
    Connect { host: usize },
    Heartbeat { host: usize, session: SessionId },
    AgentStart { host: usize },
    ProcessEnds { host: usize, spawner: u64, attempt: AttemptId, verdict: Verdict },
    LeaseTimer { host: usize, spawner: u64 },
    Sealed { host: usize, agent_start: u64, attempt: AttemptId },
    Persisted { host: usize, agent_start: u64, revision: Option<Revision> },
    Listed { host: usize, agent_start: u64 },
    Client,
    Command { node: NodeId },
    Fault,
}

/// From the coordinator to an agent.
#[derive(Debug)]
enum Message {
    Welcome(Vec<AttemptId>),
    Lease { sequence: u64, duration: Millis, unknown: Vec<AttemptId> },
    Start(Vec<StartOrder>),
    Stop(Vec<muster_core::effect::StopOrder>),
    Stored(Vec<AttemptId>),
    Recall(u32),
    AskDrained(Revision, bool),
    Release(Revision, DrainThen),
    Reopen(Revision),
    Close,
}

/// Plays one seed.
///
/// # Errors
/// The first promise that was broken, or that something did not come to an end.
pub fn run(seed: u64, setup: Setup) -> Result<Outcome, Violation> {
    let mut world = World::new(seed, setup);
    world.begin()?;
    while !world.is_done() {
        let Some(((at, _), action)) = world.agenda.pop_first() else {
            return Err(Violation {
                promise: "liveness",
                detail: "nothing is left to happen, and work is open".into(),
            });
        };
        world.now = world.now.max(at);
        world.outcome.steps += 1;
        world.act(action)?;
        if world.now.since(START) > setup.span + GIVE_UP {
            return Err(Violation { promise: "liveness", detail: world.open_work() });
        }
    }
    world.outcome.starts = world.truth.starts_total;
    world.outcome.elapsed = world.now.since(START);
    Ok(world.outcome)
}

const START: Timestamp = Timestamp(1_000_000);
/// After all has healed, everything must end within this.
const GIVE_UP: Millis = Millis::from_secs(3_600);
const POOL: &str = "batch";

struct World {
    rng: Rng,
    setup: Setup,
    now: Timestamp,
    order: u64,
    agenda: BTreeMap<(Timestamp, u64), Action>,
    coordinator: Coordinator,
    hosts: Vec<SimHost>,
    by_node: BTreeMap<NodeId, usize>,
    /// Open streams: host and the earliest time at which the next message of each direction may arrive.
    sessions: BTreeMap<SessionId, (usize, Timestamp, Timestamp)>,
    next_session: u64,
    next_request: u64,
    /// Requests whose answer the client waits for.
    submits: BTreeMap<RequestId, Delivery>,
    enrols: BTreeMap<RequestId, usize>,
    /// Jobs still to be submitted.
    to_submit: usize,
    drained: BTreeSet<NodeId>,
    /// What to run, as the agents keep it until the start.
    orders: BTreeMap<AttemptId, StartOrder>,
    wake: Option<Timestamp>,
    truth: Truth,
    outcome: Outcome,
}

impl World {
    fn new(seed: u64, setup: Setup) -> Self {
        let mut rng = Rng::new(seed);
        let hosts = (0..setup.hosts)
            .map(|at| SimHost {
                name: format!("host-{at}"),
                node: NodeId(0),
                capacity: Resources {
                    cpu_milli: 1_000 * rng.between(1, 4),
                    memory_bytes: 8 << 30,
                    disk_bytes: 1 << 30,
                },
                agent: None,
                agent_start: 0,
                boot: 1,
                spawner: 1,
                session: None,
                sequence: 0,
                sandboxes: BTreeMap::new(),
                closed_for: None,
                lease: Boottime(0),
                left: false,
                partitioned_until: Timestamp(0),
                drift: i64::try_from(rng.between(0, 101)).unwrap_or(0) - 50,
                clock_offset: rng.between(0, 10_000_000),
            })
            .collect();
        Self {
            rng,
            setup,
            now: START,
            order: 0,
            agenda: BTreeMap::new(),
            coordinator: Coordinator::new(),
            hosts,
            by_node: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_session: 1,
            next_request: 1,
            submits: BTreeMap::new(),
            enrols: BTreeMap::new(),
            to_submit: setup.jobs,
            drained: BTreeSet::new(),
            orders: BTreeMap::new(),
            wake: None,
            truth: Truth::default(),
            outcome: Outcome::default(),
        }
    }

    fn begin(&mut self) -> Result<(), Violation> {
        self.start_coordinator()?;
        for host in 0..self.hosts.len() {
            let request = self.request();
            self.enrols.insert(request, host);
            let name = self.hosts[host].name.clone();
            let key = [u8::try_from(host % 251).unwrap_or(0) + 1; 32];
            self.tell(Event::Enroll { request, name, pool: PoolName(POOL.into()), host: None, key }, false)?;
            self.at(self.now, Action::AgentStart { host });
        }
        self.at(self.now + Millis(10), Action::Client);
        self.at(self.now + Millis(500), Action::Fault);
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.is_healed()
            && self.to_submit == 0
            && self.coordinator.fleet().is_some_and(|fleet| fleet.jobs().all(|(_, job)| job.finished.is_some()))
            && self.hosts.iter().all(|host| host.sandboxes.is_empty())
    }

    fn is_healed(&self) -> bool {
        self.now.since(START) > self.setup.span
    }

    fn open_work(&self) -> String {
        let jobs = self.coordinator.fleet().map(|fleet| {
            let open = fleet.jobs().filter(|(_, job)| job.finished.is_none());
            open.map(|(id, _)| format!("{id}: {:?}", fleet.explain_wait(*id))).collect::<Vec<_>>().join("; ")
        });
        let kept: Vec<_> =
            self.hosts.iter().map(|host| (host.name.clone(), host.sandboxes.len(), host.session)).collect();
        format!("an hour after all healed these are open: {jobs:?}; hosts keep {kept:?}")
    }

    fn at(&mut self, when: Timestamp, action: Action) {
        self.order += 1;
        self.agenda.insert((when, self.order), action);
    }

    fn after(&mut self, low: u64, high: u64, action: Action) {
        let when = self.now + Millis(self.rng.between(low, high));
        self.at(when, action);
    }

    fn count(&mut self, what: impl Into<String>) {
        *self.outcome.counts.entry(what.into()).or_default() += 1;
    }

    fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    fn act(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::CoordinatorStart => self.start_coordinator(),
            Action::CoordinatorWake => {
                self.wake = None;
                self.tell(Event::Tick, false)
            }
            Action::ToCoordinator { host, session, report } => self.hear(host, session, report),
            Action::ToHost { host, session, message } => self.deliver(host, session, message),
            Action::Connect { host } => {
                self.connect(host);
                Ok(())
            }
            Action::Heartbeat { host, session } => self.heartbeat(host, session),
            Action::AgentStart { host } => {
                if self.hosts[host].agent.is_none() && !self.hosts[host].left {
                    let wishes = self.hosts[host].start_agent(self.now);
                    self.after(0, 200, Action::Connect { host });
                    return self.grant(host, wishes);
                }
                Ok(())
            }
            Action::ProcessEnds { host, spawner, attempt, verdict } => {
                self.end_process(host, spawner, attempt, verdict)
            }
            Action::LeaseTimer { host, spawner } => self.check_lease(host, spawner),
            Action::Sealed { host, agent_start, attempt } => {
                let fresh = self.hosts[host].agent_start == agent_start;
                if fresh { self.apply(host, HostEvent::Sealed { attempt, output_lost: false }) } else { Ok(()) }
            }
            Action::Persisted { host, agent_start, revision } => {
                if self.hosts[host].agent_start != agent_start || self.hosts[host].agent.is_none() {
                    return Ok(());
                }
                self.hosts[host].closed_for = revision;
                self.apply(host, HostEvent::ClosurePersisted { revision })
            }
            Action::Listed { host, agent_start } => {
                if self.hosts[host].agent_start != agent_start {
                    return Ok(());
                }
                let wishes = self.hosts[host].list(self.now);
                self.grant(host, wishes)
            }
            Action::Client => self.client(),
            Action::Command { node } => self.command(node),
            Action::Fault => self.fault(),
        }
    }

    // --- The coordinator's side.

    fn start_coordinator(&mut self) -> Result<(), Violation> {
        self.truth.led(self.now);
        let effects = self.coordinator.start(self.now)?;
        self.after_batch(effects)
    }

    /// One event, one batch. `may_die`: this is a step at which the coordinator may crash.
    fn tell(&mut self, event: Event, may_die: bool) -> Result<(), Violation> {
        let death = match may_die && !self.is_healed() && self.rng.chance(self.setup.faults.coordinator / 10) {
            true if self.rng.chance(500) => Some(Death::BeforeCommit),
            true => Some(Death::AfterCommit),
            false => None,
        };
        let effects = self.coordinator.step(vec![event], self.now, death);
        if death.is_some() {
            self.count(format!("fault: coordinator died {death:?}"));
            self.drop_all_sessions();
            self.after(100, 20_000, Action::CoordinatorStart);
        }
        self.after_batch(effects)
    }

    fn after_batch(&mut self, effects: Vec<Effect>) -> Result<(), Violation> {
        for effect in effects {
            self.carry_out(effect)?;
        }
        let Some(fleet) = self.coordinator.fleet() else { return Ok(()) };
        // A committed job counts, also when a crash swallowed its answer: the client finds it by its key.
        self.truth.accept_new(fleet);
        self.truth.check(fleet, &self.by_node)?;
        if let Some(due) = fleet.next_wake() {
            let due = due.max(self.now);
            if self.wake.is_none_or(|wake| due < wake) {
                self.wake = Some(due);
                self.at(due, Action::CoordinatorWake);
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) -> Result<(), Violation> {
        match effect {
            Effect::Reply { request, reply } => self.answer(request, reply),
            Effect::Welcome { node, session, unknown, .. } => self.send(node, session, Message::Welcome(unknown)),
            Effect::GrantLease { node, session, sequence, duration, unknown } => {
                self.send(node, session, Message::Lease { sequence, duration, unknown });
            }
            Effect::Start { node, session, attempts } => {
                for (attempt, _) in &attempts {
                    self.truth.ordered(*attempt)?;
                }
                let orders = attempts.into_iter().map(|(attempt, epoch)| self.order_for(attempt, epoch)).collect();
                self.send(node, session, Message::Start(orders));
            }
            Effect::Stop { node, session, attempts } => self.send(node, session, Message::Stop(attempts)),
            Effect::Acknowledge { node, session, attempts } => self.send(node, session, Message::Stored(attempts)),
            Effect::Recall { node, session, count } => self.send(node, session, Message::Recall(count)),
            Effect::AskDrained { node, session, revision, refusable } => {
                self.send(node, session, Message::AskDrained(revision, refusable));
            }
            Effect::Release { node, session, revision, then } => {
                self.send(node, session, Message::Release(revision, then))
            }
            Effect::Reopen { node, session, revision } => self.send(node, session, Message::Reopen(revision)),
            Effect::CloseSession { node, session, .. } => {
                self.count("session closed by the coordinator");
                self.send(node, session, Message::Close);
            }
            Effect::CreateHost { .. } | Effect::DeleteHost { .. } => {}
        }
        Ok(())
    }

    fn answer(&mut self, request: RequestId, reply: Result<Reply, muster_core::denied::Denied>) {
        match reply {
            Ok(Reply::Submitted { job, .. }) => {
                if let Some(delivery) = self.submits.remove(&request) {
                    self.truth.accept(job, delivery);
                    self.to_submit = self.to_submit.saturating_sub(1);
                }
            }
            Ok(Reply::Enrolled { node }) => {
                if let Some(host) = self.enrols.remove(&request) {
                    self.hosts[host].node = node;
                    self.by_node.insert(node, host);
                }
            }
            Ok(
                Reply::Cancelled { .. }
                | Reply::Retried { .. }
                | Reply::NodeChanged
                | Reply::PoolSet
                | Reply::LossAccepted { .. },
            ) => {}
            Err(denied) => {
                self.count(format!("denied: {}", denied.to_string().split(' ').take(3).collect::<Vec<_>>().join(" ")));
                self.submits.remove(&request);
            }
        }
    }

    fn send(&mut self, node: NodeId, session: SessionId, message: Message) {
        let Some(host) = self.by_node.get(&node).copied() else { return };
        let delay = self.rng.between(1, 40);
        let Some((_, to_host, _)) = self.sessions.get_mut(&session) else { return };
        // A stream keeps its order, whatever the delays.
        *to_host = (self.now + Millis(delay)).max(*to_host);
        let when = *to_host;
        self.at(when, Action::ToHost { host, session, message });
    }

    fn hear(&mut self, host: usize, session: SessionId, report: Report) -> Result<(), Violation> {
        let still_open = self.sessions.contains_key(&session) && self.coordinator.fleet().is_some();
        if !still_open || self.is_cut_off(host) {
            return Ok(());
        }
        let node = self.hosts[host].node;
        if let Report::Ended(attempt, _, end) = &report {
            self.truth.check_reported_end(*attempt)?;
            self.count(format!("end: {}", end.summary()));
        }
        let event = match report {
            Report::Hello(hello) => Event::NodeConnected { node, session, hello: *hello },
            Report::Heartbeat { sequence, held } => {
                Event::Heartbeat { node, session, sequence, sample: HostSample::default(), held }
            }
            Report::Started(attempt, epoch) => Event::AttemptStarted { node, session, attempt, epoch },
            Report::Ended(attempt, epoch, end) => {
                Event::AttemptEnded { node, session, attempt, epoch, end, wall: None, detail: Vec::new() }
            }
            Report::GivenBack(attempts) => Event::GivenBack { node, session, attempts },
            Report::Proved(revision) => Event::DrainProved { node, session, revision },
            Report::Refused(revision, reason) => Event::DrainRefused { node, session, revision, reason },
        };
        self.tell(event, true)
    }

    // --- A host's side.

    fn is_cut_off(&self, host: usize) -> bool {
        self.hosts[host].partitioned_until > self.now
    }

    fn connect(&mut self, host: usize) {
        let reachable = self.coordinator.fleet().is_some() && !self.is_cut_off(host);
        if self.hosts[host].agent.is_none() || self.hosts[host].session.is_some() || self.hosts[host].left {
            return;
        }
        if !reachable {
            self.after(200, 4_000, Action::Connect { host });
            return;
        }
        let session = SessionId(self.next_session);
        self.next_session += 1;
        self.sessions.insert(session, (host, self.now, self.now));
        self.hosts[host].session = Some(session);
        self.hosts[host].sequence = 0;
        let hello = self.hosts[host].hello();
        self.say(host, hello);
    }

    fn say(&mut self, host: usize, report: Report) {
        let Some(session) = self.hosts[host].session else { return };
        let delay = self.rng.between(1, 40);
        let Some((_, _, to_coordinator)) = self.sessions.get_mut(&session) else { return };
        *to_coordinator = (self.now + Millis(delay)).max(*to_coordinator);
        let when = *to_coordinator;
        self.at(when, Action::ToCoordinator { host, session, report });
    }

    fn heartbeat(&mut self, host: usize, session: SessionId) -> Result<(), Violation> {
        if self.hosts[host].session != Some(session) || self.hosts[host].agent.is_none() {
            return Ok(());
        }
        if !self.sessions.contains_key(&session) {
            return self.lose_session(host);
        }
        self.hosts[host].sequence += 1;
        let sequence = self.hosts[host].sequence;
        self.apply(host, HostEvent::HeartbeatSent { sequence })?;
        let held = self.hosts[host].agent.as_ref().map(|agent| agent.held().collect()).unwrap_or_default();
        self.say(host, Report::Heartbeat { sequence, held });
        self.at(self.now + limits::HEARTBEAT_INTERVAL, Action::Heartbeat { host, session });
        Ok(())
    }

    /// The agent notices that its stream is dead.
    fn lose_session(&mut self, host: usize) -> Result<(), Violation> {
        if let Some(session) = self.hosts[host].session.take() {
            self.close_session(host, session)?;
            self.apply(host, HostEvent::Disconnected)?;
        }
        self.after(50, 3_000, Action::Connect { host });
        Ok(())
    }

    fn close_session(&mut self, host: usize, session: SessionId) -> Result<(), Violation> {
        if self.sessions.remove(&session).is_some() && !self.is_cut_off(host) {
            let node = self.hosts[host].node;
            return self.tell(Event::NodeDisconnected { node, session }, false);
        }
        Ok(())
    }

    fn drop_all_sessions(&mut self) {
        self.sessions.clear();
        for host in 0..self.hosts.len() {
            if let Some(session) = self.hosts[host].session {
                // Noticed at the next heartbeat at the latest.
                self.after(10, 1_000, Action::Heartbeat { host, session });
            }
        }
    }

    fn deliver(&mut self, host: usize, session: SessionId, message: Message) -> Result<(), Violation> {
        if self.hosts[host].session != Some(session) || self.is_cut_off(host) {
            return Ok(());
        }
        match message {
            Message::Welcome(unknown) => {
                let term = self.coordinator.fleet().map(|fleet| fleet.meta().term).unwrap_or_default();
                self.apply(host, HostEvent::Connected { term, unknown })?;
                self.heartbeat(host, session)
            }
            Message::Lease { sequence, duration, unknown } => {
                self.apply(host, HostEvent::LeaseGranted { sequence, duration, unknown })
            }
            Message::Start(orders) => orders.into_iter().try_for_each(|order| {
                self.orders.insert(order.attempt, order);
                self.apply(host, HostEvent::StartOrdered(order))
            }),
            Message::Stop(orders) => {
                orders.into_iter().try_for_each(|order| self.apply(host, HostEvent::StopOrdered(order)))
            }
            Message::Stored(attempts) => self.apply(host, HostEvent::EndsStored { attempts }),
            Message::Recall(count) => self.apply(host, HostEvent::RecallOrdered { count }),
            Message::AskDrained(revision, refusable) => self.apply(host, HostEvent::DrainAsked { revision, refusable }),
            Message::Release(revision, then) => self.apply(host, HostEvent::ReleaseOrdered { revision, then }),
            Message::Reopen(revision) => self.apply(host, HostEvent::ReopenOrdered { revision }),
            Message::Close => self.lose_session(host),
        }
    }

    /// What the coordinator's driver would add to the order from the job's body.
    fn order_for(&self, attempt: AttemptId, epoch: Epoch) -> StartOrder {
        let spec = self.coordinator.fleet().and_then(|fleet| fleet.job(attempt.job)).map(|job| &job.spec);
        StartOrder {
            attempt,
            epoch,
            request: spec.map(|spec| spec.request).unwrap_or_default(),
            exclusive: spec.is_some_and(|spec| spec.delivery == Delivery::Exclusive),
        }
    }

    fn apply(&mut self, host: usize, event: HostEvent) -> Result<(), Violation> {
        let wishes = self.hosts[host].apply(event, self.now);
        self.grant(host, wishes)
    }

    fn grant(&mut self, host: usize, wishes: Vec<Wish>) -> Result<(), Violation> {
        let agent_start = self.hosts[host].agent_start;
        let spawner = self.hosts[host].spawner;
        for wish in wishes {
            match wish {
                Wish::Say(report) => self.say(host, report),
                Wish::Begin(attempt) => self.begin_process(host, attempt)?,
                Wish::Terminate(attempt) => {
                    self.after(0, 3_000, Action::ProcessEnds { host, spawner, attempt, verdict: Verdict::Stopped });
                }
                Wish::Seal(attempt) => self.after(0, 50, Action::Sealed { host, agent_start, attempt }),
                Wish::Persist(revision) => self.after(0, 20, Action::Persisted { host, agent_start, revision }),
                Wish::List => self.after(0, 20, Action::Listed { host, agent_start }),
                Wish::Lease(deadline) => self.renew(host, deadline),
                Wish::Leave(then) => self.leave(host, then),
            }
        }
        Ok(())
    }

    fn begin_process(&mut self, host: usize, attempt: AttemptId) -> Result<(), Violation> {
        let Some(order) = self.orders.remove(&attempt) else { return Ok(()) };
        self.truth.started(attempt, host)?;
        self.hosts[host].sandboxes.insert(attempt, Sandbox { order, stopping: None, verdict: None });
        let spawner = self.hosts[host].spawner;
        let verdict = match self.rng.between(0, 10) {
            0 => Verdict::Own(End::Exited(1)),
            1 => Verdict::Own(End::Signaled(11)),
            _most => Verdict::Own(End::Succeeded),
        };
        let span = if self.rng.chance(200) { self.rng.between(5_000, 400_000) } else { self.rng.between(1, 2_000) };
        self.at(self.now + Millis(span), Action::ProcessEnds { host, spawner, attempt, verdict });
        self.apply(host, HostEvent::Started { attempt })
    }

    fn end_process(
        &mut self,
        host: usize,
        spawner: u64,
        attempt: AttemptId,
        verdict: Verdict,
    ) -> Result<(), Violation> {
        if self.hosts[host].spawner != spawner {
            return Ok(());
        }
        let Some(sandbox) = self.hosts[host].sandboxes.get_mut(&attempt).filter(|sandbox| sandbox.verdict.is_none())
        else {
            return Ok(());
        };
        sandbox.verdict = Some(verdict.clone());
        self.truth.ended(attempt);
        self.apply(host, HostEvent::Ended { attempt, verdict })
    }

    fn renew(&mut self, host: usize, deadline: Boottime) {
        if deadline > self.hosts[host].lease {
            self.hosts[host].lease = deadline;
            let when = self.hosts[host].when(deadline);
            let spawner = self.hosts[host].spawner;
            self.at(when, Action::LeaseTimer { host, spawner });
        }
    }

    /// The spawner's own timer ends exclusive work, whether or not an agent is there.
    fn check_lease(&mut self, host: usize, spawner: u64) -> Result<(), Violation> {
        if self.hosts[host].spawner != spawner || self.hosts[host].boottime(self.now) < self.hosts[host].lease {
            return Ok(());
        }
        let fenced: Vec<AttemptId> = self.hosts[host]
            .sandboxes
            .iter()
            .filter(|(_, sandbox)| sandbox.order.exclusive && sandbox.verdict.is_none())
            .map(|(attempt, _)| *attempt)
            .collect();
        for attempt in fenced {
            self.count("lease ended an exclusive attempt");
            self.end_process(host, spawner, attempt, Verdict::LeaseEnded)?;
        }
        Ok(())
    }

    fn leave(&mut self, host: usize, then: DrainThen) {
        self.count(format!("released: then {}", then.name()));
        if then != DrainThen::Nothing {
            self.hosts[host].agent = None;
            self.hosts[host].left = true;
            if let Some(session) = self.hosts[host].session.take() {
                self.sessions.remove(&session);
                let node = self.hosts[host].node;
                // The stream's end reaches the coordinator like any message.
                let effects = self.coordinator.step(vec![Event::NodeDisconnected { node, session }], self.now, None);
                for effect in effects {
                    // Nothing that follows from a departure can break a promise by itself.
                    let _carried = self.carry_out(effect);
                }
            }
            // An operator brings it back, so that work can go on.
            self.after(5_000, 60_000, Action::AgentStart { host });
            self.hosts[host].left = false;
            self.hosts[host].closed_for = None;
        }
    }

    // --- Clients and faults.

    fn client(&mut self) -> Result<(), Violation> {
        if self.coordinator.fleet().is_some() {
            if self.to_submit > self.submits.len() {
                self.submit()?;
            }
            if !self.is_healed() {
                self.operate()?;
            }
        }
        if self.is_healed() {
            self.resume_all()?;
        }
        if !self.is_healed() || self.to_submit > 0 || !self.drained.is_empty() {
            let pause = self.setup.span.0 / (self.setup.jobs as u64 + 1);
            self.after(1, pause.max(2) + 1, Action::Client);
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<(), Violation> {
        let request = self.request();
        let delivery = match self.rng.between(0, 4) {
            0 => Delivery::AtMostOnce,
            1 => Delivery::Exclusive,
            _most => Delivery::AtLeastOnce,
        };
        let spec = JobSpec {
            name: String::new(),
            owner: Actor("client".into()),
            pool: None,
            priority: i32::try_from(self.rng.between(0, 3)).unwrap_or(0),
            tasks: u32::try_from(self.rng.between(1, 7)).unwrap_or(1),
            request: Resources { cpu_milli: 500 * self.rng.between(1, 3), memory_bytes: 1 << 30, disk_bytes: 0 },
            fences: BTreeSet::new(),
            constraints: BTreeMap::new(),
            delivery,
            on_drain: if self.rng.chance(500) { OnDrain::Requeue } else { OnDrain::Finish },
            retries: Retries { failed: 2, lost: 50, drained: 50 },
            time_limit: None,
            grace: Millis::from_secs(1),
        };
        self.submits.insert(request, delivery);
        let key = format!("request-{}", request.0);
        self.tell(Event::Submit { request, key, digest: [0; 32], spec }, true)?;
        // An answer that a crash swallowed: a real client asks again with its key; here the job does not count.
        if self.coordinator.fleet().is_none() && self.submits.remove(&request).is_some() {
            self.count("submit without an answer");
            self.to_submit = self.to_submit.saturating_sub(1);
        }
        Ok(())
    }

    /// One command, or a hasty operator's several on one node.
    fn operate(&mut self) -> Result<(), Violation> {
        let nodes: Vec<NodeId> = self.by_node.keys().copied().collect();
        let Some(node) = self.rng.choose(&nodes).copied() else { return Ok(()) };
        self.command(node)?;
        if self.rng.chance(150) {
            for step in 1..self.rng.between(2, 8) {
                let when = self.now + Millis(step * self.rng.between(1, 30));
                self.at(when, Action::Command { node });
            }
        }
        Ok(())
    }

    fn command(&mut self, node: NodeId) -> Result<(), Violation> {
        if self.coordinator.fleet().is_none() || self.is_healed() {
            return Ok(());
        }
        let actor = Actor("operator".into());
        let request = self.request();
        match self.rng.between(0, 12) {
            0 | 1 => {
                let deadline = self.rng.chance(700).then(|| self.now + Millis(self.rng.between(100, 60_000)));
                let then = if self.rng.chance(300) { DrainThen::Stop } else { DrainThen::Nothing };
                let refusable = self.rng.chance(200);
                self.drained.insert(node);
                let order = DrainOrder { deadline, then, refusable, actor, reason: "kernel".into() };
                self.tell(Event::Drain { request, node, order }, true)
            }
            2 | 3 => self.tell(Event::Resume { request, node, actor, reason: "done".into() }, true),
            4 => {
                let jobs: Vec<JobId> = self.truth.accepted_jobs().collect();
                let Some(job) = self.rng.choose(&jobs).copied() else { return Ok(()) };
                self.count("cancel");
                self.tell(Event::Cancel { request, job, tasks: None, actor, reason: "no".into() }, true)
            }
            5 => self.tell(Event::Cordon { request, node, actor, reason: "look".into() }, true),
            6 => self.tell(Event::Uncordon { request, node, actor, reason: "fine".into() }, true),
            _nothing => Ok(()),
        }
    }

    fn resume_all(&mut self) -> Result<(), Violation> {
        if self.coordinator.fleet().is_none() {
            return Ok(());
        }
        let nodes: Vec<NodeId> = self.by_node.keys().copied().collect();
        for node in nodes {
            let actor = Actor("operator".into());
            let request = self.request();
            self.tell(Event::Resume { request, node, actor: actor.clone(), reason: "healed".into() }, false)?;
            let request = self.request();
            self.tell(Event::Uncordon { request, node, actor, reason: "healed".into() }, false)?;
        }
        self.drained.clear();
        Ok(())
    }

    fn fault(&mut self) -> Result<(), Violation> {
        if self.is_healed() {
            return Ok(());
        }
        self.after(100, 2_000, Action::Fault);
        let faults = self.setup.faults;
        let host = usize::try_from(self.rng.between(0, self.hosts.len() as u64)).unwrap_or(0);
        if self.rng.chance(faults.cut) {
            self.count("fault: stream cut");
            return self.lose_session(host);
        }
        if self.rng.chance(faults.partition) {
            self.count("fault: partition");
            let span =
                if self.rng.chance(300) { self.rng.between(60_000, 200_000) } else { self.rng.between(1_000, 30_000) };
            self.hosts[host].partitioned_until = self.now + Millis(span);
            if let Some(session) = self.hosts[host].session {
                // Neither side is told: each learns it from silence.
                self.at(self.now + Millis::from_secs(9), Action::Heartbeat { host, session });
                self.sessions.remove(&session);
            }
        }
        if self.rng.chance(faults.agent) {
            self.count("fault: agent died");
            self.kill_agent(host)?;
        }
        if self.rng.chance(faults.spawner) {
            self.count("fault: spawner died");
            self.kill_spawner(host)?;
            if self.hosts[host].agent.is_some() {
                self.apply(host, HostEvent::SpawnerGone)?;
                let agent_start = self.hosts[host].agent_start;
                self.after(10, 500, Action::Listed { host, agent_start });
            }
        }
        if self.rng.chance(faults.both) {
            self.count("fault: agent and spawner died together");
            self.kill_agent(host)?;
            self.kill_spawner(host)?;
        }
        if self.rng.chance(faults.reboot) {
            self.count("fault: reboot");
            self.kill_agent(host)?;
            self.kill_spawner(host)?;
            self.hosts[host].boot += 1;
            self.hosts[host].clock_offset = 0;
            self.hosts[host].lease = Boottime(0);
        }
        Ok(())
    }

    fn kill_agent(&mut self, host: usize) -> Result<(), Violation> {
        self.hosts[host].agent = None;
        if let Some(session) = self.hosts[host].session.take() {
            self.close_session(host, session)?;
        }
        self.after(200, 30_000, Action::AgentStart { host });
        Ok(())
    }

    /// Its processes die with it, and all that it kept.
    fn kill_spawner(&mut self, host: usize) -> Result<(), Violation> {
        self.hosts[host].spawner += 1;
        self.hosts[host].sandboxes.clear();
        self.truth.ended_on(host);
        Ok(())
    }
}
