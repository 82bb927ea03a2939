//! The world: one agenda, one source of chance, one run a seed.

use muster_core::{
    fleet::Output,
    ids::PoolName,
    resources::Resources,
    time::{Millis, Timestamp},
};

use crate::{
    agenda::{Action, Agenda},
    clients::{self, Jobs},
    coordinator::Member,
    coverage::Coverage,
    host::SimHost,
    network::Network,
    provider::Provider,
    rng::Rng,
    setup::Setup,
    store::Store,
    trace::Trace,
    truth::{Truth, Violation},
};

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Steps of the world.
    pub steps: u64,
    /// Starts of user code.
    pub starts: u64,
    /// How often each thing occurred.
    pub coverage: Coverage,
    /// Virtual time until all was done.
    pub elapsed: Millis,
}

pub struct World {
    pub seed: u64,
    pub rng: Rng,
    pub setup: Setup,
    pub now: Timestamp,
    pub agenda: Agenda,
    pub network: Network,
    pub members: Vec<Member>,
    pub store: Store,
    pub hosts: Vec<SimHost>,
    pub provider: Provider,
    pub jobs: Jobs,
    pub truth: Truth,
    pub coverage: Coverage,
    pub trace: Trace,
    pub batches: u64,
    pub clones: u64,
    steps: u64,
    /// Steps since time last passed.
    busy: u64,
    stage: Stage,
    tidied: Timestamp,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Faults and clients act.
    Faults,
    /// All has healed: every job has to end.
    Healing,
    /// Every drain has to end.
    Draining,
    Done,
}

const START: Timestamp = Timestamp(1_000_000);
/// One seed of so many has a time between the faults and the end in which nobody does anything.
const LULLS: u64 = 17;
/// Longer than a brake holds, and than a lost host is kept.
const LULL: Millis = Millis::from_secs(20 * 60);
/// After all has healed, everything must end within this, and what [`patience`] adds.
const GIVE_UP: Millis = Millis::from_secs(2 * 3_600);
/// So many steps at one moment: something wakes itself for ever.
const BUSY_MAX: u64 = 100_000;
/// How often an operator looks at what has not ended.
const LOOK: Millis = Millis::from_secs(20);
/// A clock's drift in thousandths, at most: both sides together are within the margin.
const DRIFT_MAX: u64 = 60;

/// What more work on fewer hosts than in the usual run takes: a minute for each job.
fn patience(setup: &Setup) -> Millis {
    let minutes = |jobs: usize, hosts: usize| (jobs / hosts.max(1)) as u64;
    let usual = Setup::default();
    let more = minutes(setup.jobs, setup.hosts).saturating_sub(minutes(usual.jobs, usual.hosts));
    Millis::from_secs(more * 60)
}

/// Plays one seed.
///
/// # Errors
/// The first promise that was broken, or that something did not come to an end.
pub fn run(seed: u64, setup: Setup) -> Result<Outcome, Violation> {
    play(seed, setup, Trace::off()).0
}

/// Plays one seed, and says what happened step by step.
pub(crate) fn play(seed: u64, setup: Setup, trace: Trace) -> (Result<Outcome, Violation>, Trace) {
    let mut world = World::new(seed, setup, trace);
    let result = world.play();
    let outcome = Outcome {
        steps: world.steps,
        starts: world.truth.starts_total,
        coverage: std::mem::take(&mut world.coverage),
        elapsed: world.now.since(START),
    };
    (result.map(|()| outcome), world.trace)
}

impl World {
    fn new(seed: u64, setup: Setup, trace: Trace) -> Self {
        let mut rng = Rng::new(seed);
        let drift = |rng: &mut Rng| rng.between(0, DRIFT_MAX * 2 + 1).cast_signed() - DRIFT_MAX.cast_signed();
        let hosts = (0..setup.hosts)
            .map(|at| {
                let capacity =
                    Resources { cpu_milli: 1_000 * rng.between(1, 5), memory_bytes: 8 << 30, disk_bytes: 1 << 30 };
                let pool = PoolName(clients::STATIC.into());
                let drift = drift(&mut rng);
                SimHost::new(format!("host-{at}"), pool, capacity, drift, rng.between(0, 10_000_000))
            })
            .collect();
        let coordinators = setup.coordinators.unwrap_or(1 + (seed % 2) as usize);
        let members = (0..coordinators.max(1)).map(|_| Member::new(drift(&mut rng))).collect();
        Self {
            seed,
            rng,
            setup,
            now: START,
            agenda: Agenda::default(),
            network: Network::default(),
            members,
            store: Store::default(),
            hosts,
            provider: Provider::default(),
            jobs: Jobs::default(),
            truth: Truth::default(),
            coverage: Coverage::default(),
            trace,
            batches: 0,
            clones: 0,
            steps: 0,
            busy: 0,
            stage: Stage::Faults,
            tidied: START,
        }
    }

    fn play(&mut self) -> Result<(), Violation> {
        self.begin();
        while self.stage != Stage::Done {
            let Some(due) = self.agenda.next() else {
                return Err(Violation::new("liveness", "nothing is left to happen, and work is open".into()));
            };
            self.busy = if due.at > self.now { 0 } else { self.busy + 1 };
            if self.busy > BUSY_MAX {
                let what = format!("{BUSY_MAX} steps, and no time has passed: {:?}", due.action);
                return Err(Violation::new("liveness", what));
            }
            self.now = self.now.max(due.at);
            self.steps += 1;
            self.trace.action(self.now.since(START), &due.action);
            match self.waits_for(&due.action) {
                Some(until) => self.agenda.put_off(until, due),
                None => self.act(due.action)?,
            }
            if self.is_healed() {
                self.finish()?;
            }
        }
        if let Some(fleet) = self.serving().and_then(|member| self.members[member].fleet()) {
            self.truth.check_accepted(fleet)?;
            self.store.check_equals(fleet)?;
        }
        Ok(())
    }

    fn begin(&mut self) {
        for member in 0..self.members.len() {
            self.at(self.now + Millis(member as u64), Action::MemberStarts { member });
        }
        for host in 0..self.hosts.len() {
            self.after(100, 3_000, Action::AgentStarts { host });
        }
        self.after(6_000, 8_000, Action::Client);
        self.after(5_000, 9_000, Action::Fault);
    }

    pub(crate) fn is_healed(&self) -> bool {
        let lull = if self.seed.is_multiple_of(LULLS) { LULL } else { Millis(0) };
        self.now.since(START) > self.setup.span + lull
    }

    /// No person and no new fault for a while: what only time brings, comes.
    pub(crate) fn is_lull(&self) -> bool {
        self.now.since(START) > self.setup.span && !self.is_healed()
    }

    /// Looks now and then, as an operator would, whether all has come to its end.
    fn finish(&mut self) -> Result<(), Violation> {
        if self.now.since(self.tidied) < LOOK {
            return Ok(());
        }
        self.tidied = self.now;
        if self.now.since(START) > self.setup.span + LULL + GIVE_UP + patience(&self.setup) {
            return Err(Violation::new("liveness", self.open_work()));
        }
        let Some(member) = self.serving() else { return Ok(()) };
        let Some(fleet) = self.members[member].fleet() else { return Ok(()) };
        match self.stage {
            Stage::Faults | Stage::Healing => {
                self.stage = Stage::Healing;
                let all_ended = fleet.jobs().all(|(_, job)| job.finished.is_some());
                let all_empty = self.hosts.iter().all(|host| host.is_gone || host.sandboxes.is_empty());
                if self.all_submitted() && all_ended && all_empty && self.truth.is_quiet() {
                    self.stage = Stage::Draining;
                    return self.drain_all();
                }
                self.tidy_up()
            }
            Stage::Draining => {
                let is_there = |host: &&SimHost| !host.is_gone && !host.is_clone;
                let nodes = self.hosts.iter().filter(is_there).filter_map(|host| host.node);
                let mut nodes = nodes.filter_map(|node| fleet.node(node));
                // A node that its provider took away, or that was removed, has nothing to prove.
                if nodes.all(|node| matches!(node.state(), "drained" | "stopping" | "gone" | "asleep")) {
                    self.stage = Stage::Done;
                    return Ok(());
                }
                self.drain_all()
            }
            Stage::Done => Ok(()),
        }
    }

    fn open_work(&self) -> String {
        let fleet = self.serving().and_then(|member| self.members[member].fleet());
        let jobs = fleet.map(|fleet| {
            let open = fleet.jobs().filter(|(_, job)| job.finished.is_none());
            let waits = open.map(|(id, job)| format!("{id}: {:?} live {:?}", fleet.explain_wait(*id), job.live));
            waits.collect::<Vec<_>>().join("; ")
        });
        let nodes = fleet.map(|fleet| {
            let nodes = fleet
                .nodes()
                .map(|(id, node)| format!("{id} {} {} {}", node.name, node.state(), fleet.attempts_on(id).count()));
            nodes.collect::<Vec<_>>().join("; ")
        });
        let kept: Vec<_> = self
            .hosts
            .iter()
            .filter(|host| !host.is_gone)
            .map(|host| format!("{} {:?} {} {:?}", host.name, host.node, host.sandboxes.len(), host.session))
            .collect();
        format!("long after all healed ({:?}) these are open: {jobs:?}; nodes {nodes:?}; hosts {kept:?}", self.stage)
    }

    pub(crate) fn at(&mut self, when: Timestamp, action: Action) {
        self.agenda.at(when, action);
    }

    pub(crate) fn after(&mut self, low: u64, high: u64, action: Action) {
        let when = self.now + Millis(self.rng.between(low, high));
        self.at(when, action);
    }

    pub(crate) fn count(&mut self, kind: &'static str, name: &'static str) {
        self.coverage.count(kind, name);
    }

    pub(crate) fn invent_drift(&mut self) -> i64 {
        self.rng.between(0, DRIFT_MAX * 2 + 1).cast_signed() - DRIFT_MAX.cast_signed()
    }

    /// What a batch did, for the trace and for those who must know of new jobs.
    pub(crate) fn trace_batch(&mut self, out: &Output) {
        if self.trace.is_on() {
            for entry in &out.touched.history {
                self.trace.line(|| format!("    {:?} {}: {}", entry.subject, entry.kind, entry.reason));
            }
            for effect in &out.effects {
                self.trace.line(|| format!("    => {effect:?}"));
            }
        }
    }

    /// An agent that is stopped looks at nothing.
    fn waits_for(&self, action: &Action) -> Option<Timestamp> {
        let host = match action {
            Action::Down { session, .. } => self.network.streams.get(session)?.host,
            Action::DownEnds { session } => self.network.streams.get(session)?.host,
            Action::Connect { host }
            | Action::WelcomeDue { host, .. }
            | Action::Heartbeat { host, .. }
            | Action::ToAgent { host, .. }
            | Action::Persisted { host, .. }
            | Action::SpawnerGone { host, .. }
            | Action::Relink { host, .. }
            | Action::List { host, .. } => *host,
            _of_others => return None,
        };
        let host = &self.hosts[host];
        (host.agent.is_some() && host.agent_paused > self.now).then_some(host.agent_paused)
    }

    fn act(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::MemberStarts { member } => self.start_member(member),
            Action::MemberWakes { member, life } => self.wake(member, life),
            Action::Effects { member, life, effects } => self.carry_out_late(member, life, effects),
            Action::Leadership { member, life } => self.look_at_leadership(member, life),
            Action::Renewed { member, life, sent } => {
                self.renewed(member, life, sent);
                Ok(())
            }
            Action::Up { session, report } => self.hear(session, report),
            Action::Down { session, message } => self.deliver(session, message),
            Action::UpEnds { session } => self.end_heard(session),
            Action::DownEnds { session } => match self.network.streams.get(&session).map(|stream| stream.host) {
                Some(host) => self.lose_stream(host, session),
                None => Ok(()),
            },
            Action::Connect { host } => self.connect(host),
            Action::WelcomeDue { host, session } => self.miss_welcome(host, session),
            Action::Heartbeat { host, session } => self.heartbeat(host, session),
            Action::AgentStarts { host } => self.start_agent(host),
            Action::ToAgent { host, agent_start, event } => {
                if self.hosts[host].agent_start == agent_start {
                    self.apply(host, event)
                } else {
                    Ok(())
                }
            }
            Action::Persisted { host, agent_start, revision } => self.persisted(host, agent_start, revision),
            Action::List { host, agent_start } => self.list(host, agent_start),
            Action::SpawnerGone { host, agent_start, spawner } => self.lose_link(host, agent_start, spawner),
            Action::Relink { host, agent_start } => self.relink(host, agent_start),
            Action::Spawn { host, spawner, agent_start, order } => self.spawn(host, spawner, agent_start, order),
            Action::Terminate { host, spawner, attempt, reason, grace } => {
                self.terminate(host, spawner, attempt, reason, grace)
            }
            Action::Exits { host, spawner, attempt, verdict } => self.exit(host, spawner, attempt, verdict),
            Action::Emptied { host, spawner, attempt, verdict } => self.empty(host, spawner, attempt, verdict),
            Action::LeaseTimer { host, spawner } => self.check_lease(host, spawner),
            Action::BroughtDown { host, spawner, reboots } => {
                self.brought_down(host, spawner, reboots);
                Ok(())
            }
            Action::WantedAgain { host } => {
                self.hosts[host].left = false;
                self.start_agent(host)
            }
            Action::CloneEnds { host } => {
                self.switch_off(host);
                Ok(())
            }
            Action::Client => self.client(),
            Action::Submit { job } => self.submit(job),
            Action::Command { node } => self.command(node),
            Action::Fault => self.fault(),
            Action::HostMade { pool, host } => {
                self.host_made(pool, host);
                Ok(())
            }
            Action::ProviderTells { event } => self.provider_tells(*event),
            Action::HostEnds { pool, host } => {
                self.host_ends(pool, host);
                Ok(())
            }
        }
    }
}
