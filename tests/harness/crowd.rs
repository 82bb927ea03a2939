//! Many agents in one process: the real connection, certificates and rules of
//! one host (`muster_core::host`), with a spawner that is a table. An attempt
//! "runs" until the crowd is told to end it, or for as long as its crowd says.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use muster_agent::{
    connection::{self, Addresses, Again, Reconnect, Session},
    identity::Identity,
    order, tls,
};
use muster_core::{
    end::End,
    host::{Boottime, Host, HostEffect, HostEvent, StartOrder, Verdict},
    ids::{AttemptId, Epoch, Revision, Term},
    resources::Resources,
    time::Millis,
};
use muster_proto::{
    convert,
    v1::{self, agent_message::Message, attempt_report::Change},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{Fleet, host::boot_ms, until};

/// Agents that join at the same time.
const JOINS_AT_ONCE: usize = 16;
/// The one life of each agent's table.
const SPAWNER: [u8; 16] = [7; 16];

/// What an agent is and where.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The node's name.
    pub name: String,
    /// As /proc/sys/kernel/random/boot_id would say it.
    pub boot_id: String,
    /// Random per installation.
    pub instance: String,
    /// How often its agent was started.
    pub agent_start: u64,
    /// What the node has.
    pub capacity: Resources,
}

/// What all agents of a crowd have seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// How often each attempt was started, by who started it.
    pub starts: BTreeMap<(String, AttemptId), u32>,
    /// Attempts that a coordinator told to stop.
    pub stopped: BTreeSet<AttemptId>,
    /// Ends that a coordinator has stored.
    pub stored: BTreeSet<AttemptId>,
    /// The longest that a heartbeat waited for its answer.
    pub slowest_answer: Duration,
    /// Agents whose lease ran out, and by how much.
    pub lease_gaps: BTreeMap<String, Duration>,
    /// Why streams ended or could not be opened, and how often.
    pub broken: BTreeMap<String, u32>,
}

/// The agents.
#[derive(Debug)]
pub struct Crowd {
    /// What they have seen.
    pub seen: Arc<Mutex<Seen>>,
    connected: Arc<AtomicU64>,
    orders: watch::Sender<Order>,
    tasks: Vec<JoinHandle<()>>,
    folder: tempfile::TempDir,
    life: Option<Life>,
}

/// How long an attempt runs, unless it is told to end before.
pub type Life = fn(AttemptId) -> Duration;

/// What the crowd was told last.
#[derive(Clone, Copy, Debug, Default)]
struct Order {
    /// Tasks with an index below this end, once they run.
    end_below: u32,
}

/// The code with which a task of a crowd ends.
#[must_use]
pub const fn code_of(task: u32) -> i32 {
    // At most 240: a code, and never 0.
    (task % 240) as i32 + 1
}

impl Crowd {
    /// So many agents of a fleet, each with this capacity, joined and connecting.
    ///
    /// # Panics
    /// If one cannot join.
    pub async fn join(fleet: &Fleet, count: usize, capacity: Resources) -> Self {
        Self::join_for(fleet, count, capacity, None).await
    }

    /// The same, with attempts that end by themselves.
    ///
    /// # Panics
    /// If one cannot join.
    pub async fn join_for(fleet: &Fleet, count: usize, capacity: Resources, life: Option<Life>) -> Self {
        let folder = tempfile::Builder::new().prefix("muster-crowd-").tempdir().expect("a temporary folder");
        let mut crowd = Self {
            seen: Arc::default(),
            connected: Arc::default(),
            orders: watch::channel(Order::default()).0,
            tasks: Vec::new(),
            folder,
            life,
        };
        let claims = (0..count).map(|number| Self::claim(number, capacity));
        let joins = claims.map(|claim| {
            let state = crowd.folder.path().join(&claim.name);
            async move { (join(fleet, &state, &claim.name).await, claim) }
        });
        let joined: Vec<_> = stream::iter(joins).buffered(JOINS_AT_ONCE).collect().await;
        for (identity, claim) in joined {
            crowd.add(fleet, identity, claim);
        }
        crowd
    }

    /// One more agent, which joins as this with a token that somebody else was given.
    ///
    /// # Panics
    /// If it cannot join.
    pub async fn join_with(&mut self, fleet: &Fleet, claim: Claim, token: &str) {
        let state = self.folder.path().join(&claim.name);
        let identity = join_by(fleet, &state, &claim.name, token).await;
        self.add(fleet, identity, claim);
    }

    fn add(&mut self, fleet: &Fleet, identity: Identity, claim: Claim) {
        let agent = Agent {
            host: listed(Host::new(claim.capacity, None)),
            claim,
            seen: Arc::clone(&self.seen),
            connected: Arc::clone(&self.connected),
            orders: self.orders.subscribe(),
            running: BTreeMap::new(),
            life: self.life,
            lease_end: None,
            sent: BTreeMap::new(),
            is_ending: false,
        };
        let address = fleet.address.split(',').map(str::to_owned).collect();
        self.tasks.push(tokio::spawn(agent.run(identity, address)));
    }

    /// Ends the agent that was added so many-th, as the loss of its host would.
    pub async fn kill(&mut self, number: usize) {
        let task = &mut self.tasks[number];
        task.abort();
        // Its stream is closed when it is over.
        let _ = task.await;
    }

    /// One more agent with the identity of one that joined.
    ///
    /// # Panics
    /// If there is none of this name.
    pub fn add_as(&mut self, fleet: &Fleet, claim: Claim) {
        let identity = Identity::load(&self.folder.path().join(&claim.name)).expect("its files read");
        self.add(fleet, identity.expect("it has joined"), claim);
    }

    /// What the agent that joined so many-th says of itself.
    #[must_use]
    pub fn claim(number: usize, capacity: Resources) -> Claim {
        Claim {
            name: format!("crowd-{number}"),
            boot_id: format!("boot-{number}"),
            instance: format!("instance-{number}"),
            agent_start: 1,
            capacity,
        }
    }

    /// Agents with a stream that was welcomed.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.connected.load(Ordering::Relaxed)
    }

    /// All tasks of any job with a lower index end with [`code_of`] it, also those that start later.
    pub fn end_below(&self, task: u32) {
        self.orders.send_modify(|order| order.end_below = task);
    }

    /// What was seen so far.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// An identity for a node of this name.
async fn join(fleet: &Fleet, state: &Path, name: &str) -> Identity {
    join_by(fleet, state, name, &fleet.token("").await).await
}

async fn join_by(fleet: &Fleet, state: &Path, name: &str, token: &str) -> Identity {
    std::fs::create_dir_all(state).expect("a folder in our own");
    let addresses: Vec<String> = fleet.address.split(',').map(str::to_owned).collect();
    Identity::join(state, &addresses, token, name).await.expect("a fresh token joins")
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    // What a panicking agent has written is as true as before.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> Boottime {
    Boottime(u64::try_from(boot_ms()).unwrap_or_default())
}

/// Its spawner answers, and holds nothing.
fn listed(mut host: Host) -> Host {
    let effects = host.apply(HostEvent::SpawnerListed { spawner: SPAWNER, held: Vec::new() }, now());
    assert!(effects.is_empty(), "a host that holds nothing owes nothing: {effects:?}");
    host
}

struct Agent {
    host: Host,
    claim: Claim,
    seen: Arc<Mutex<Seen>>,
    connected: Arc<AtomicU64>,
    orders: watch::Receiver<Order>,
    /// With when each ends by itself.
    running: BTreeMap<AttemptId, Option<Instant>>,
    life: Option<Life>,
    /// When the node's lease ends; none: it never had one.
    lease_end: Option<Instant>,
    /// When heartbeats were sent that have no answer yet.
    sent: BTreeMap<u64, Instant>,
    /// Its provider is told to end its host.
    is_ending: bool,
}

/// Why a stream is over.
type Broken = String;

impl Agent {
    async fn run(mut self, identity: Identity, addresses: Vec<String>) {
        let config = tls::config_of(&identity).expect("an identity that was just made");
        let (mut addresses, mut reconnect) = (Addresses::new(addresses), Reconnect::new());
        loop {
            // What ends while nobody listens is owed until somebody has stored it.
            for (attempt, verdict) in self.take_due() {
                let _ = self.apply(HostEvent::Ended { attempt, verdict });
            }
            match connection::open(addresses.dial(), Arc::clone(&config), self.hello()).await {
                Ok(session) => {
                    addresses.worked(&session.address);
                    let spread = Duration::from_millis(session.welcome.reconnect_spread_ms.into());
                    reconnect = Reconnect::within(spread);
                    self.connected.fetch_add(1, Ordering::Relaxed);
                    let broken = self.serve(session).await;
                    self.connected.fetch_sub(1, Ordering::Relaxed);
                    self.note(broken);
                    let _ = self.apply(HostEvent::Disconnected);
                    if self.is_ending {
                        // The host went with its agent.
                        return;
                    }
                    until(Instant::now() + reconnect.next_wait()).await;
                }
                Err(error) => {
                    self.note(error.to_string());
                    let wait = match addresses.failed(&error) {
                        Again::AtOnce => Duration::ZERO,
                        Again::Soon => reconnect.short_wait(),
                        Again::Later => reconnect.next_wait(),
                    };
                    until(Instant::now() + wait).await;
                }
            }
        }
    }

    fn note(&self, broken: String) {
        *lock(&self.seen).broken.entry(broken).or_default() += 1;
    }

    fn hello(&self) -> v1::Hello {
        v1::Hello {
            protocol_version: 1,
            agent_version: "crowd".to_owned(),
            boot_id: self.claim.boot_id.clone(),
            instance: self.claim.instance.clone(),
            agent_start: self.claim.agent_start,
            capacity: Some(self.claim.capacity.into()),
            held: self.host.held().map(order::held_to_wire).collect(),
            closed_for_drain: self.host.closed_for().map_or(0, |revision| revision.0),
            ..v1::Hello::default()
        }
    }

    async fn serve(&mut self, session: Session) -> Broken {
        let Session { outbound, mut inbound, welcome, channel: _channel, .. } = session;
        let (term, unknown) = (Term(welcome.term), ids(&welcome.unknown));
        self.sent.clear();
        if let Err(broken) = self.tell(&outbound, HostEvent::Connected { term, unknown }).await {
            return broken;
        }
        let mut beats = tokio::time::interval(Duration::from_millis(welcome.heartbeat_interval_ms.max(50).into()));
        let mut sequence = 0;
        loop {
            let next_end = self.running.values().flatten().min().copied();
            let done = tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(v1::CoordinatorMessage { message: Some(message) })) => self.obey(&outbound, message).await,
                    Ok(Some(_)) => Ok(()),
                    Ok(None) => Err("the coordinator closed it".to_owned()),
                    Err(status) => Err(format!("{:?}", status.code())),
                },
                _ = beats.tick() => {
                    sequence += 1;
                    self.beat(&outbound, sequence).await
                }
                () = until(next_end.unwrap_or_else(Instant::now)), if next_end.is_some() => {
                    self.end_what_is_due(&outbound).await
                }
                changed = self.orders.changed() => match changed {
                    Ok(()) => self.end_what_is_due(&outbound).await,
                    Err(_) => Err("the crowd is gone".to_owned()),
                },
            };
            if let Err(broken) = done {
                return broken;
            }
        }
    }

    async fn beat(&mut self, out: &mpsc::Sender<v1::AgentMessage>, sequence: u64) -> Result<(), Broken> {
        self.sent.insert(sequence, Instant::now());
        self.tell(out, HostEvent::HeartbeatSent { sequence }).await?;
        let held = self.host.held().map(order::held_to_wire).collect();
        say(out, Message::Heartbeat(v1::Heartbeat { sequence, held, ..v1::Heartbeat::default() })).await
    }

    async fn obey(
        &mut self,
        out: &mpsc::Sender<v1::AgentMessage>,
        message: v1::coordinator_message::Message,
    ) -> Result<(), Broken> {
        use v1::coordinator_message::Message as From;
        match message {
            From::Lease(lease) => {
                let (sequence, duration) = (lease.sequence, Millis(lease.duration_ms.into()));
                self.measure(sequence, Duration::from_millis(duration.0));
                self.tell(out, HostEvent::LeaseGranted { sequence, duration, unknown: ids(&lease.unknown) }).await
            }
            From::Start(start) => {
                let bodies: BTreeMap<u64, &v1::JobBody> = start.bodies.iter().map(|body| (body.job, body)).collect();
                for start in &start.attempts {
                    let body = start.attempt.as_ref().and_then(|id| bodies.get(&id.job)).expect("a start has its body");
                    let order = order::start_order(body, start).expect("a coordinator's order makes sense");
                    self.start(out, order).await?;
                }
                self.end_what_is_due(out).await
            }
            From::Stop(stop) => {
                for stop in &stop.attempts {
                    let order = order::stop_order(stop).expect("a coordinator's order makes sense");
                    self.tell(out, HostEvent::StopOrdered(order)).await?;
                }
                Ok(())
            }
            From::Stored(stored) => {
                let attempts = ids(&stored.attempts);
                lock(&self.seen).stored.extend(&attempts);
                self.tell(out, HostEvent::EndsStored { attempts }).await
            }
            From::Recall(recall) => self.tell(out, HostEvent::RecallOrdered { count: recall.count }).await,
            From::AskDrained(asked) => {
                let (revision, refusable) = (Revision(asked.revision), asked.refusable);
                self.tell(out, HostEvent::DrainAsked { revision, refusable }).await
            }
            From::Reopen(reopen) => {
                self.is_ending = false;
                self.tell(out, HostEvent::ReopenOrdered { revision: Revision(reopen.revision) }).await
            }
            // A crowd has no host to leave; a provider may end one.
            From::Release(release) => {
                self.is_ending = release.then() == v1::release::Then::Delete;
                Ok(())
            }
            From::Welcome(_) | From::DrainNotice(_) => Ok(()),
        }
    }

    fn measure(&mut self, sequence: u64, duration: Duration) {
        let Some(sent) = self.sent.remove(&sequence) else { return };
        let mut seen = lock(&self.seen);
        seen.slowest_answer = seen.slowest_answer.max(sent.elapsed());
        if let Some(gap) = self.lease_end.and_then(|end| Instant::now().checked_duration_since(end)) {
            seen.lease_gaps.insert(self.claim.name.clone(), gap);
        }
        self.lease_end = Some(sent + duration);
    }

    async fn start(&mut self, out: &mpsc::Sender<v1::AgentMessage>, order: StartOrder) -> Result<(), Broken> {
        self.tell(out, HostEvent::StartOrdered(order)).await
    }

    async fn end_what_is_due(&mut self, out: &mpsc::Sender<v1::AgentMessage>) -> Result<(), Broken> {
        for (attempt, verdict) in self.take_due() {
            self.tell(out, HostEvent::Ended { attempt, verdict }).await?;
        }
        Ok(())
    }

    /// What has been told to end and runs no longer.
    fn take_due(&mut self) -> Vec<(AttemptId, Verdict)> {
        let limit = self.orders.borrow_and_update().end_below;
        let now = Instant::now();
        let is_due =
            |attempt: &AttemptId, end: &Option<Instant>| attempt.task < limit || end.is_some_and(|end| end <= now);
        let due = self.running.extract_if(.., |attempt, end| is_due(attempt, end));
        let due: Vec<AttemptId> = due.map(|(attempt, _)| attempt).collect();
        due.into_iter().map(|attempt| (attempt, Verdict::Own(End::Exited(code_of(attempt.task))))).collect()
    }

    /// Applies an event and all that follows of it, and sends what is to be said.
    async fn tell(&mut self, out: &mpsc::Sender<v1::AgentMessage>, event: HostEvent) -> Result<(), Broken> {
        for message in self.apply(event) {
            say(out, message).await?;
        }
        Ok(())
    }

    /// What is to be said to a coordinator, if there is one.
    fn apply(&mut self, event: HostEvent) -> Vec<Message> {
        let (mut events, mut said) = (vec![event], Vec::new());
        while let Some(event) = events.pop() {
            for effect in self.host.apply(event, now()) {
                self.carry_out(effect, &mut events, &mut said);
            }
        }
        said
    }

    fn carry_out(&mut self, effect: HostEffect, events: &mut Vec<HostEvent>, said: &mut Vec<Message>) {
        match effect {
            HostEffect::Start { attempt } => {
                // Not when it is reported: what starts while no coordinator listens stands in the next hello.
                *lock(&self.seen).starts.entry((self.claim.name.clone(), attempt)).or_default() += 1;
                self.running.insert(attempt, self.life.map(|life| Instant::now() + life(attempt)));
                events.push(HostEvent::Started { attempt });
            }
            HostEffect::Stop { attempt, .. } => {
                lock(&self.seen).stopped.insert(attempt);
                self.running.remove(&attempt);
                events.push(HostEvent::Ended { attempt, verdict: Verdict::Stopped });
            }
            HostEffect::Seal { attempt } => events.push(HostEvent::Sealed { attempt, output_lost: false }),
            HostEffect::ReportStarted { attempt, epoch } => {
                said.push(report(attempt, epoch, Change::Started(v1::AttemptStarted::default())));
            }
            HostEffect::ReportEnded { attempt, epoch, end } => {
                let ended = v1::AttemptEnded { end: Some(convert::end_to_wire(&end)), ..v1::AttemptEnded::default() };
                said.push(report(attempt, epoch, Change::Ended(ended)));
            }
            HostEffect::GiveBack { attempts } => {
                let attempts = attempts.iter().map(|attempt| (*attempt).into()).collect();
                said.push(Message::GivenBack(v1::GivenBack { attempts }));
            }
            HostEffect::PersistClosure { revision } => events.push(HostEvent::ClosurePersisted { revision }),
            HostEffect::ListSpawner => {
                // Whoever asks for the list holds nothing, and what it has is what it says.
                assert!(self.running.is_empty(), "a host that proves itself empty runs {:?}", self.running);
                events.push(HostEvent::SpawnerListed { spawner: SPAWNER, held: Vec::new() });
            }
            HostEffect::ProveDrained { revision } => {
                said.push(Message::DrainProof(v1::DrainProof { revision: revision.0 }));
            }
            HostEffect::Forget { .. }
            | HostEffect::RenewLease { .. }
            | HostEffect::RefuseDrain { .. }
            | HostEffect::Release { .. }
            | HostEffect::Ignore { .. } => {}
        }
    }
}

fn report(attempt: AttemptId, epoch: Epoch, change: Change) -> Message {
    let report = v1::AttemptReport { attempt: Some(attempt.into()), epoch: Some(epoch.into()), change: Some(change) };
    Message::Reports(v1::AttemptReports { reports: vec![report] })
}

fn ids(wire: &[v1::AttemptId]) -> Vec<AttemptId> {
    wire.iter().map(|id| convert::attempt_id(Some(id)).expect("a coordinator names attempts")).collect()
}

async fn say(out: &mpsc::Sender<v1::AgentMessage>, message: Message) -> Result<(), Broken> {
    let sent = out.send(v1::AgentMessage { message: Some(message) }).await;
    sent.map_err(|_| "the stream is closed".to_owned())
}
