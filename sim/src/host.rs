//! A simulated host: the real `Host` as its agent's rules, with the agent's
//! shell round it. The agent may die or be stopped between any two effects.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    effect::StopReason,
    event::{DrainThen, Held, HeldPhase, Hello, HostSample},
    host::{Adopted, AdoptedPhase, Boottime, Host, HostEffect, HostEvent, SpawnerId, StartOrder, Verdict},
    ids::{AttemptId, HostRequestId, NodeId, PoolName, Revision, SessionId, Term},
    resources::Resources,
    time::{Millis, Timestamp},
    timeline::Seen,
};

use crate::{
    agenda::Action,
    clients::HOST_LABEL,
    network::{Link, Report},
    setup::Fault,
    truth::Violation,
    world::World,
};

/// A fence that one host cannot raise, and a few jobs ask.
pub const RARE_FENCE: &str = "landlock";
/// That host.
const OLDER_MAKE: &str = "host-1";

/// No life of a spawner: they count from 1.
const NO_SPAWNER: u64 = 0;

/// Of each host.
const DISK_BYTES: u64 = 1 << 30;
/// A disk that was full has enough room again only after this.
const DISK_SCANT: Millis = Millis::from_secs(5);

/// Between two notes on disk of what one leader says.
const SEEN_EVERY: Millis = Millis::from_secs(60);

/// What the spawner keeps of an attempt.
#[derive(Clone, Debug)]
pub struct Sandbox {
    pub order: StartOrder,
    /// The agent's note.
    pub stopping: Option<StopReason>,
    /// None: something of it runs.
    pub verdict: Option<Verdict>,
    /// Its main process is over, and what it left behind runs.
    pub is_leaving: bool,
}

#[derive(Debug)]
pub struct SimHost {
    pub name: String,
    pub pool: PoolName,
    /// The provider's request that it came from.
    pub request: Option<HostRequestId>,
    pub key: [u8; 32],
    pub instance: String,
    /// By its certificate; none: it has to enrol.
    pub node: Option<NodeId>,
    pub capacity: Resources,

    /// None while the agent is down.
    pub agent: Option<Host>,
    /// On disk.
    pub agent_start: u64,
    /// On disk.
    pub closed_for: Option<Revision>,
    /// Its agent is of an older version.
    pub is_old: bool,
    /// On disk: it was released, and stays down.
    pub left: bool,
    /// The last that a leader said it had committed.
    pub seen: Seen,
    /// What of that is on disk, and since when.
    seen_on_disk: (Seen, Timestamp),
    pub agent_paused: Timestamp,
    /// The spawner that the agent is connected to; what it says to a dead one is lost.
    talks_to: u64,
    /// What it was told to stop on this connection.
    told_to_stop: BTreeSet<AttemptId>,
    /// What the agent is to run, lost with it.
    orders: BTreeMap<AttemptId, StartOrder>,
    /// The stream as this side sees it.
    pub session: Option<SessionId>,
    /// The last one that it opened.
    pub last_stream: Option<SessionId>,
    /// Streams that this agent process has opened.
    pub streams_since_start: u32,
    pub is_welcome: bool,
    pub sequence: u64,
    pub answered: Timestamp,
    /// Counts its calls: it tries its coordinators in turn.
    pub dial: usize,
    pub link: Link,

    pub boot: u64,
    /// Which life of the spawner.
    pub spawner: u64,
    pub sandboxes: BTreeMap<AttemptId, Sandbox>,
    /// Ids that this life of the spawner has accepted.
    pub accepted: BTreeSet<AttemptId>,
    /// The spawner's own lease timer.
    pub lease: Boottime,
    /// The socket between agent and spawner keeps its order.
    socket_at: Timestamp,
    disk_at: Timestamp,

    pub disk_full: Timestamp,
    pub disk_slow: Timestamp,
    pub black_hole: Timestamp,
    pub unkillable: Timestamp,
    /// The machine does not exist any more.
    pub is_gone: bool,
    /// It is a copy of another's disk.
    pub is_clone: bool,
    /// Its clock runs this many thousandths fast.
    drift: i64,
    clock_offset: u64,
    booted: Timestamp,
}

impl SimHost {
    pub fn new(name: String, pool: PoolName, capacity: Resources, drift: i64, clock_offset: u64) -> Self {
        let mut key = [0; 32];
        for (at, byte) in name.bytes().take(32).enumerate() {
            key[at] = byte;
        }
        Self {
            instance: name.clone(),
            name,
            pool,
            request: None,
            key,
            node: None,
            capacity,
            agent: None,
            agent_start: 0,
            closed_for: None,
            is_old: false,
            left: false,
            seen: Seen::default(),
            seen_on_disk: (Seen::default(), Timestamp(0)),
            agent_paused: Timestamp(0),
            talks_to: NO_SPAWNER,
            told_to_stop: BTreeSet::new(),
            orders: BTreeMap::new(),
            session: None,
            last_stream: None,
            streams_since_start: 0,
            is_welcome: false,
            sequence: 0,
            answered: Timestamp(0),
            dial: 0,
            link: Link::default(),
            boot: 1,
            spawner: 1,
            sandboxes: BTreeMap::new(),
            accepted: BTreeSet::new(),
            lease: Boottime(0),
            socket_at: Timestamp(0),
            disk_at: Timestamp(0),
            disk_full: Timestamp(0),
            disk_slow: Timestamp(0),
            black_hole: Timestamp(0),
            unkillable: Timestamp(0),
            is_gone: false,
            is_clone: false,
            drift,
            clock_offset,
            booted: Timestamp(0),
        }
    }

    /// Another machine with a copy of this one's disk.
    pub fn clone_of(&self, boot: u64, now: Timestamp) -> Self {
        let mut copy = Self::new(self.name.clone(), self.pool.clone(), self.capacity, self.drift, 0);
        copy.request = self.request;
        copy.node = self.node;
        copy.agent_start = self.agent_start;
        copy.closed_for = self.closed_for;
        copy.left = self.left;
        copy.seen_on_disk = self.seen_on_disk;
        copy.boot = boot;
        copy.spawner = boot;
        copy.booted = now;
        copy.is_clone = true;
        copy
    }

    pub fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }

    /// This host's CLOCK_BOOTTIME.
    pub fn boottime(&self, now: Timestamp) -> Boottime {
        let elapsed = now.since(self.booted).0.cast_signed();
        Boottime(self.clock_offset + (elapsed + elapsed * self.drift / 1_000).cast_unsigned())
    }

    /// When this host's clock shows `deadline`.
    pub fn when(&self, deadline: Boottime) -> Timestamp {
        let shown = deadline.0.saturating_sub(self.clock_offset).cast_signed();
        self.booted + Millis((shown * 1_000 / (1_000 + self.drift) + 1).cast_unsigned())
    }

    pub fn reboot(&mut self, now: Timestamp) {
        // Never a number that a copy has had.
        self.boot += 1_000;
        self.clock_offset = 0;
        self.booted = now;
        self.lease = Boottime(0);
        self.unkillable = Timestamp(0);
    }

    pub fn hello(&self) -> Hello {
        let held = self.agent.as_ref().map(|agent| agent.held().collect()).unwrap_or_default();
        Hello {
            boot_id: self.boot_id(),
            agent_start: self.agent_start,
            stream: if self.is_old { 0 } else { u64::from(self.streams_since_start) },
            instance: self.instance.clone(),
            capacity: self.capacity,
            labels: self.labels(),
            fences: self.fences(),
            held,
            closed_for_drain: self.agent.as_ref().and_then(Host::closed_for).unwrap_or_default(),
            version: if self.is_old { "older" } else { "simulated" }.into(),
        }
    }

    /// What its operator says of it.
    pub fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(HOST_LABEL.to_owned(), self.name.clone())])
    }

    /// What it can raise: the second of the first hosts is of an older make.
    pub fn fences(&self) -> BTreeSet<String> {
        let newer = (self.name != OLDER_MAKE).then_some(RARE_FENCE);
        ["lease.timer"].into_iter().chain(newer).map(str::to_owned).collect()
    }

    /// Its figures. A disk that was full has a little room at first.
    pub fn sample(&self, now: Timestamp) -> HostSample {
        let available = if self.disk_full > now {
            0
        } else if now.since(self.disk_full) < DISK_SCANT {
            DISK_BYTES / 14
        } else {
            DISK_BYTES
        };
        HostSample {
            disk_total_bytes: Some(DISK_BYTES),
            disk_available_bytes: Some(available),
            ..HostSample::default()
        }
    }

    /// A leader said what it has committed; on disk at once when it is another leader, else now and then.
    pub fn note_seen(&mut self, told: Seen, now: Timestamp) {
        if told <= self.seen || self.is_old {
            return;
        }
        let (noted, at) = self.seen_on_disk;
        self.seen = told;
        if (told.term != noted.term || now.since(at) >= SEEN_EVERY) && self.disk_full <= now {
            self.seen_on_disk = (told, now);
        }
    }

    fn spawner_id(&self) -> SpawnerId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.spawner.to_le_bytes());
        id
    }

    /// All that the spawner holds.
    fn list(&self) -> HostEvent {
        let held = self.sandboxes.values().map(|sandbox| Adopted {
            order: sandbox.order,
            phase: match (&sandbox.verdict, sandbox.stopping) {
                (Some(verdict), _) => AdoptedPhase::Ended(verdict.clone()),
                (None, Some(_)) => AdoptedPhase::Stopping,
                (None, None) => AdoptedPhase::Running,
            },
            stopping: sandbox.stopping,
        });
        HostEvent::SpawnerListed { spawner: self.spawner_id(), held: held.collect() }
    }
}

impl World {
    /// A new agent process: it knows only what the disk and the spawner tell.
    pub(crate) fn start_agent(&mut self, host: usize) -> Result<(), Violation> {
        let is_old = self.occurs(Fault::OldAgent, 60);
        let known = &mut self.hosts[host];
        if known.agent.is_some() || known.left || known.is_gone {
            return Ok(());
        }
        known.agent_start += 1;
        known.is_old = is_old;
        known.agent = Some(Host::new(known.capacity, known.closed_for));
        known.orders.clear();
        known.seen = known.seen_on_disk.0;
        known.streams_since_start = 0;
        known.session = None;
        known.agent_paused = self.now;
        known.talks_to = known.spawner;
        let listed = known.list();
        self.after(0, 200, Action::Connect { host });
        self.apply(host, listed)
    }

    /// The same agent process, without what it knew of its attempts.
    pub(crate) fn begin_anew(&mut self, host: usize) -> Result<(), Violation> {
        let known = &mut self.hosts[host];
        known.agent = Some(Host::new(known.capacity, known.closed_for));
        known.orders.clear();
        known.talks_to = known.spawner;
        let listed = known.list();
        self.apply(host, listed)?;
        self.apply(host, HostEvent::Connected { term: Term(0), unknown: Vec::new() })
    }

    pub(crate) fn list(&mut self, host: usize, agent_start: u64) -> Result<(), Violation> {
        if self.hosts[host].agent_start != agent_start {
            return Ok(());
        }
        let known = &mut self.hosts[host];
        known.talks_to = known.spawner;
        let listed = known.list();
        self.apply(host, listed)
    }

    /// Only its own connection tells the agent anything: a spawner that came and went meanwhile it never knew.
    pub(crate) fn lose_link(&mut self, host: usize, agent_start: u64, spawner: u64) -> Result<(), Violation> {
        let known = &mut self.hosts[host];
        if known.agent_start != agent_start || known.talks_to != spawner {
            return Ok(());
        }
        known.talks_to = NO_SPAWNER;
        known.told_to_stop.clear();
        self.after(10, 2_500, Action::Relink { host, agent_start });
        self.apply(host, HostEvent::SpawnerGone)
    }

    pub(crate) fn relink(&mut self, host: usize, agent_start: u64) -> Result<(), Violation> {
        let known = &self.hosts[host];
        if known.talks_to != NO_SPAWNER || known.agent_start != agent_start {
            return Ok(());
        }
        self.list(host, agent_start)?;
        self.check_stops_told(host)
    }

    /// FL-1: a cancel that was answered is not lost with the connection that was to carry it.
    fn check_stops_told(&self, host: usize) -> Result<(), Violation> {
        let known = &self.hosts[host];
        let goes_on = |sandbox: &Sandbox| sandbox.verdict.is_none() && sandbox.stopping.is_none();
        let runs = |attempt| known.sandboxes.get(&attempt).is_some_and(goes_on);
        let held = known.agent.iter().flat_map(Host::held);
        let mut stopping = held.filter(|held| held.phase == HeldPhase::Stopping && runs(held.attempt));
        match stopping.find(|held| !known.told_to_stop.contains(&held.attempt)) {
            Some(Held { attempt, .. }) => {
                let detail = format!("attempt {attempt} on {} is to stop, and its spawner is not told", known.name);
                Err(Violation::new("FL-1", detail))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn kill_agent(&mut self, host: usize) {
        if let Some(session) = self.hosts[host].session {
            self.leave_stream(host, session);
        }
        self.hosts[host].agent = None;
        self.after(200, 30_000, Action::AgentStarts { host });
    }

    /// The spawner's word reaches the agent, unless it or the connection is down: then the next list has it.
    pub(crate) fn tell_agent(&mut self, host: usize, event: HostEvent) -> Result<(), Violation> {
        let known = &self.hosts[host];
        if known.talks_to == NO_SPAWNER {
            return Ok(());
        }
        if known.agent_paused > self.now {
            let agent_start = known.agent_start;
            self.at(known.agent_paused, Action::ToAgent { host, agent_start, event });
            return Ok(());
        }
        self.apply(host, event)
    }

    /// Tells the agent's rules, and carries out what they ask.
    pub(crate) fn apply(&mut self, host: usize, event: HostEvent) -> Result<(), Violation> {
        if let HostEvent::StartOrdered(order) = &event {
            // A second order of what is held changes nothing of what is held.
            self.hosts[host].orders.entry(order.attempt).or_insert(*order);
        }
        let boottime = self.hosts[host].boottime(self.now);
        let Some(agent) = &mut self.hosts[host].agent else { return Ok(()) };
        let effects = agent.apply(event, boottime);
        for effect in effects {
            if self.occurs(Fault::AgentDiesBetween, 1) {
                self.kill_agent(host);
                return Ok(());
            }
            self.follow(host, effect)?;
        }
        Ok(())
    }

    /// The socket to the spawner takes up to some milliseconds, in order.
    fn socket(&mut self, host: usize) -> Timestamp {
        let delay = Millis(self.rng.between(0, 4));
        let known = &mut self.hosts[host];
        known.socket_at = known.socket_at.max(self.now + delay);
        known.socket_at
    }

    fn disk(&mut self, host: usize) -> Timestamp {
        let slow = self.hosts[host].disk_slow > self.now;
        let delay = Millis(if slow { self.rng.between(100, 6_000) } else { self.rng.between(0, 20) });
        let known = &mut self.hosts[host];
        known.disk_at = known.disk_at.max(self.now + delay);
        known.disk_at
    }

    fn follow(&mut self, host: usize, effect: HostEffect) -> Result<(), Violation> {
        let (spawner, agent_start) = (self.hosts[host].talks_to, self.hosts[host].agent_start);
        match effect {
            HostEffect::Start { attempt } => {
                let Some(order) = self.hosts[host].orders.get(&attempt).copied() else { return Ok(()) };
                self.truth.handed(attempt, order, &self.hosts[host], &self.store, self.now)?;
                let at = self.socket(host);
                self.at(at, Action::Spawn { host, spawner, agent_start, order });
            }
            // A job here saves nothing: its grace is as long, and it ends when it likes.
            HostEffect::Stop { attempt, reason, grace, first: _ } => {
                if spawner != NO_SPAWNER {
                    self.hosts[host].told_to_stop.insert(attempt);
                }
                let at = self.socket(host);
                self.at(at, Action::Terminate { host, spawner, attempt, reason, grace });
            }
            HostEffect::Seal { attempt } => {
                let output_lost = self.hosts[host].disk_full > self.now;
                self.truth.sealed(attempt, output_lost);
                self.count("output", if output_lost { "lost" } else { "kept" });
                let at = self.disk(host);
                let event = HostEvent::Sealed { attempt, output_lost };
                self.at(at, Action::ToAgent { host, agent_start, event });
            }
            HostEffect::ReportStarted { attempt, epoch } => self.say(host, Report::Started(attempt, epoch)),
            HostEffect::ReportEnded { attempt, epoch, end } => {
                self.coverage.count("end reported", crate::coverage::end_name(&end));
                self.say(host, Report::Ended(attempt, epoch, Box::new(end)));
            }
            HostEffect::Forget { attempt } => {
                self.hosts[host].orders.remove(&attempt);
                self.hosts[host].sandboxes.remove(&attempt);
            }
            HostEffect::GiveBack { attempts } => {
                for attempt in &attempts {
                    self.hosts[host].orders.remove(attempt);
                }
                self.say(host, Report::GivenBack(attempts));
            }
            HostEffect::RenewLease { .. } if spawner == NO_SPAWNER => {}
            HostEffect::RenewLease { deadline } => self.renew_lease(host, deadline),
            HostEffect::PersistClosure { revision } => {
                let at = self.disk(host);
                self.at(at, Action::Persisted { host, agent_start, revision });
            }
            HostEffect::ListSpawner => {
                let at = self.socket(host);
                self.at(at, Action::List { host, agent_start });
            }
            HostEffect::ProveDrained { revision } => self.say(host, Report::Proved(revision)),
            HostEffect::RefuseDrain { revision, reason } => self.say(host, Report::Refused(revision, reason)),
            HostEffect::Release { then } => {
                self.truth.check_leaves(host, &self.hosts[host])?;
                self.leave_fleet(host, then);
            }
            HostEffect::Ignore { .. } => self.count("host", "ignored an order"),
        }
        Ok(())
    }

    pub(crate) fn persisted(
        &mut self,
        host: usize,
        agent_start: u64,
        revision: Option<Revision>,
    ) -> Result<(), Violation> {
        if self.hosts[host].agent_start != agent_start || self.hosts[host].agent.is_none() {
            return Ok(());
        }
        if self.hosts[host].disk_full > self.now {
            // Tried until there is room, in order.
            let at = self.hosts[host].disk_full;
            self.at(at, Action::Persisted { host, agent_start, revision });
            return Ok(());
        }
        self.hosts[host].closed_for = revision;
        self.apply(host, HostEvent::ClosurePersisted { revision })
    }

    /// It was told to go; in time somebody wants it again.
    fn leave_fleet(&mut self, host: usize, then: DrainThen) {
        self.count("released", then.name());
        if then == DrainThen::Nothing {
            return;
        }
        // As it goes it opens itself: who brings it back wants it to work.
        self.hosts[host].left = true;
        self.hosts[host].closed_for = None;
        self.kill_agent(host);
        if then == DrainThen::Poweroff {
            self.kill_spawner(host);
            self.hosts[host].reboot(self.now);
        }
        // Who sleeps is woken; a person comes by in the end all the same.
        let (soon, late) = if self.has_sleepers() { (60_000, 300_000) } else { (5_000, 60_000) };
        self.after(soon, late, Action::WantedAgain { host });
    }
}
