//! The agent's loop: what comes in becomes events of the host's rules, and
//! their effects are carried out here, in order.
//!
//! Three parties: the spawner (one socket), the coordinator (one stream,
//! [`session`]) and this agent's own tasks, which answer through one bounded
//! inbox. What one attempt needs is in [`attempts`], what is known of this host's
//! end and of drains in [`leaving`].

mod attempts;
mod leaving;
mod session;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use muster_core::{
    effect::StopReason,
    host::{Host, HostEffect, HostEvent},
    ids::AttemptId,
};
use muster_proto::v1;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::sleep_until,
};
use tonic::transport::Channel;

use crate::{
    blob_cache::BlobCache,
    chain, clock,
    collect::Stored,
    config::Config,
    connection::{Addresses, ConnectError, Reconnect, Session, all_addresses},
    identity::{Certificate, Identity, IdentityError},
    inputs::{InputError, Inputs},
    interruption,
    job::{Dirty, Job},
    parent::Parent,
    spawner::protocol::{Event, Request},
    spawner_link::{Greeting, LinkError, SpawnerLink},
    state::{StateError, StateFolder},
    tls::TlsError,
    uploads::{Upload, UploadNotice},
    usage::{AttemptReader, HostSampler},
};
use session::Live;

/// Why the agent's loop returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// SIGTERM or SIGINT: jobs go on, the next agent adopts them.
    Asked,
    /// The parent process is gone.
    ParentEnded,
    /// The coordinator released this host for good.
    Released,
}

/// The agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// No spawner for too long at the start.
    #[error(transparent)]
    NoSpawner(LinkError),
    /// Its own folder failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cache folder failed.
    #[error("cannot open the blob cache")]
    Cache(#[source] io::Error),
    /// Signals cannot be watched.
    #[error("cannot watch signals")]
    Signals(#[source] io::Error),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The agent while it runs.
pub struct Supervisor {
    config: Config,
    state: StateFolder,
    identity: Identity,
    host: Host,
    jobs: BTreeMap<AttemptId, Job>,
    /// Events that wait for the rules, in order.
    events: VecDeque<HostEvent>,
    link: Option<SpawnerLink>,
    /// A task opens the link.
    linking: bool,
    facts: Option<Facts>,
    live: Option<Live>,
    /// Messages that wait for the stream, in order; bounded by what the host holds.
    outgoing: VecDeque<v1::AgentMessage>,
    /// When they go: reports may wait for company.
    say_at: Option<Instant>,
    /// Ends among them.
    ends_gathered: usize,
    connect_at: Option<Instant>,
    addresses: Addresses,
    /// Streams that were opened.
    streams: u64,
    reconnect: Reconnect,
    renew_at: Instant,
    upload: Option<Upload>,
    /// Log bytes on their way.
    in_flight: u64,
    upload_at: Option<Instant>,
    dirty: Rc<Dirty>,
    /// Attempts whose pipes nobody watches yet, in the order in which that is due.
    unwatched: VecDeque<(Instant, AttemptId)>,
    cache: BlobCache,
    channel: watch::Sender<Option<Channel>>,
    host_sampler: HostSampler,
    attempt_reader: AttemptReader,
    inbox: mpsc::Sender<Notice>,
    notices: Option<mpsc::Receiver<Notice>>,
    outcome: Option<Result<Left, SupervisorError>>,
    /// Of the spawner that we last spoke to.
    spawner_id: Option<[u8; 16]>,
    /// This host goes, and what runs then is ended.
    leaving: Option<leaving::Leaving>,
    /// The coordinator has taken the proof that this host is drained; whoever holds the host up for it may hear of it.
    drained: watch::Sender<bool>,
    /// What jobs are told of a drain, and until when by the Unix clock; none: there is none.
    drain: Option<Option<u64>>,
}

/// What the spawner said of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    boot_id: String,
    fences: Vec<String>,
}

/// What the agent's own tasks tell its loop.
enum Notice {
    Linked(Result<(SpawnerLink, Greeting), LinkError>),
    Connected(u64, Box<Result<Session, ConnectError>>),
    Renewed(Result<Certificate, IdentityError>),
    Fetched { attempt: AttemptId, inputs: Result<Inputs, InputError> },
    Collected { attempt: AttemptId, stored: Stored },
    Upload(UploadNotice),
}

const NOTICES_MAX: usize = 256;
const INTERRUPTIONS_MAX: usize = 4;
/// A spawner that does not answer at the start is waited for this long.
const SPAWNER_WAIT: Duration = Duration::from_secs(60);
const SPAWNER_AGAIN: Duration = Duration::from_millis(250);
/// Packets taken from the spawner before others have their turn.
const PACKETS_AT_ONCE: usize = 64;

impl Supervisor {
    /// An agent that has joined.
    ///
    /// # Errors
    /// Its folder cannot be used.
    pub fn new(config: Config, state: StateFolder, identity: Identity) -> Result<Self, SupervisorError> {
        let (inbox, notices) = mpsc::channel(NOTICES_MAX);
        let slice = config.slice.then_some(config.capacity);
        Ok(Self {
            host: Host::new(config.capacity, state.closed_for()?),
            cache: BlobCache::open(state.cache(), config.cache_bytes_max).map_err(SupervisorError::Cache)?,
            host_sampler: HostSampler::new("/proc".into(), state.root().to_owned(), slice),
            attempt_reader: AttemptReader::new("/proc".into()),
            renew_at: Instant::now() + identity.certificate.renew_in(),
            streams: 0,
            addresses: Addresses::new(all_addresses(&config.coordinators, &identity.certificate.coordinators)),
            config,
            state,
            identity,
            jobs: BTreeMap::new(),
            events: VecDeque::new(),
            link: None,
            linking: false,
            facts: None,
            live: None,
            outgoing: VecDeque::new(),
            say_at: None,
            ends_gathered: 0,
            connect_at: None,
            reconnect: Reconnect::new(),
            upload: None,
            in_flight: 0,
            upload_at: None,
            dirty: Rc::new(Dirty::default()),
            unwatched: VecDeque::new(),
            channel: watch::channel(None).0,
            inbox,
            notices: Some(notices),
            outcome: None,
            spawner_id: None,
            leaving: None,
            drained: watch::channel(false).0,
            drain: None,
        })
    }

    /// Runs until told to leave.
    ///
    /// # Errors
    /// The agent cannot go on.
    pub async fn run(mut self, parent: &Parent) -> Result<Left, SupervisorError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(SupervisorError::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(SupervisorError::Signals)?;
        let mut reload = signal(SignalKind::hangup()).map_err(SupervisorError::Signals)?;
        let mut notices = self.notices.take().expect("it is taken only here, once");
        let dirty = Rc::clone(&self.dirty);
        let give_up_at = Instant::now() + SPAWNER_WAIT;
        // These two live as long as the loop: made anew in each turn, they would be
        // registered with the kernel and the timer again and again.
        let mut leaving = pin!(async {
            tokio::select! {
                _ = terminate.recv() => Left::Asked,
                _ = interrupt.recv() => Left::Asked,
                () = parent.ended() => Left::ParentEnded,
            }
        });
        let mut alarm = pin!(sleep_until(Instant::now().into()));
        let (say, mut interruptions) = mpsc::channel(INTERRUPTIONS_MAX);
        if let Some(settings) = self.config.notice.clone() {
            tokio::task::spawn_local(interruption::listen(settings, say, self.drained.subscribe()));
        }
        self.open_link(Duration::ZERO);
        let mut turns = 0u32;
        while self.outcome.is_none() {
            let due = self.next_due().into();
            if alarm.deadline() != due {
                alarm.as_mut().reset(due);
            }
            let heard = self.live.is_some();
            let full = self.say_what_is_due();
            let blocked = full.is_some();
            tokio::select! {
                biased;
                left = &mut leaving => self.leave(left),
                _ = reload.recv() => self.reload(),
                () = &mut alarm => self.on_due(),
                message = session::next(self.live.as_mut()), if heard => self.on_message(message),
                event = next_event(self.link.as_mut()), if self.link.is_some() => self.on_packets(event),
                Some(notice) = notices.recv() => self.on_notice(notice, give_up_at),
                Some(told) = interruptions.recv() => self.on_interruption(told),
                () = dirty.notify.notified() => self.on_dirty(),
                // The next turn says what waits.
                () = session::has_room(full), if blocked => {}
            }
            self.settle();
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(16) {
                // Ready work without end must not hold up the tasks beside this loop.
                tokio::task::yield_now().await;
            }
        }
        notify(&[sd_notify::NotifyState::Stopping]);
        self.say_last_words().await;
        self.outcome.take().expect("the loop ends only with an outcome")
    }

    /// When the loop must turn although nothing came.
    fn next_due(&self) -> Instant {
        let heartbeat_at = self.live.as_ref().map(|live| live.heartbeat_at);
        // What is overdue and could not be said yet waits for room, not for the clock.
        let say_at = self.say_at.filter(|at| *at > Instant::now());
        let watch_at = self.unwatched.front().map(|(at, _)| *at);
        let others = [heartbeat_at, self.connect_at, self.upload_at, say_at, watch_at];
        others.into_iter().flatten().fold(self.renew_at, Instant::min)
    }

    fn on_due(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.live.as_ref().map(|live| live.heartbeat_at)) {
            self.heartbeat();
        }
        if is_due(self.connect_at) {
            self.connect();
        }
        if is_due(Some(self.renew_at)) {
            self.renew();
        }
        if is_due(self.upload_at) {
            self.on_upload_due();
        }
        self.watch_those_that_still_run(now);
    }

    /// Hands an event to the rules; it is applied before the next thing is waited for.
    fn tell(&mut self, event: HostEvent) {
        self.events.push_back(event);
    }

    fn settle(&mut self) {
        while let Some(event) = self.events.pop_front() {
            for effect in self.host.apply(event, clock::boottime()) {
                self.carry_out(effect);
            }
        }
    }

    fn carry_out(&mut self, effect: HostEffect) {
        match effect {
            HostEffect::Start { attempt } => self.start(attempt),
            HostEffect::Stop { attempt, reason, grace, first } => self.stop(attempt, reason, grace.0, first),
            HostEffect::Seal { attempt } => self.begin_sealing(attempt),
            HostEffect::ReportStarted { attempt, epoch } => self.report_started(attempt, epoch),
            HostEffect::ReportEnded { attempt, epoch, end } => self.report_ended(attempt, epoch, &end),
            HostEffect::Forget { attempt } => self.forget(attempt),
            HostEffect::GiveBack { attempts } => self.give_back(&attempts),
            HostEffect::RenewLease { deadline } => {
                self.ask_spawner(&Request::RenewLease { deadline_boottime_ms: deadline.0 });
            }
            HostEffect::PersistClosure { revision } => match self.state.set_closed_for(revision) {
                Ok(()) => self.tell(HostEvent::ClosurePersisted { revision }),
                // A disk that failed a sync cannot be trusted with a second try.
                Err(error) => self.outcome = Some(Err(error.into())),
            },
            HostEffect::ListSpawner => {
                self.drop_link();
                self.open_link(Duration::ZERO);
            }
            HostEffect::ProveDrained { revision } => {
                tracing::info!(revision = revision.0, "drained: nothing is left here");
                self.say(v1::agent_message::Message::DrainProof(v1::DrainProof { revision: revision.0 }));
            }
            HostEffect::RefuseDrain { revision, reason } => {
                self.say(v1::agent_message::Message::DrainRefused(v1::DrainRefused { revision: revision.0, reason }));
            }
            HostEffect::Release { then } => self.release(then),
            HostEffect::Ignore { attempt, reason } => tracing::debug!(%attempt, reason, "an order was not followed"),
        }
    }

    fn leave(&mut self, left: Left) {
        if self.outcome.is_none() {
            tracing::info!(?left, running = self.host.running().count(), "leaving; jobs go on under the spawner");
            self.outcome = Some(Ok(left));
        }
    }

    fn reload(&mut self) {
        match self.config.reload() {
            Ok(()) => {
                tracing::info!("settings read again");
                // Labels travel in hello only.
                self.disconnect("settings changed");
                self.connect_at = Some(Instant::now());
            }
            Err(error) => tracing::error!("settings stay as they were: {}", chain(&error)),
        }
    }

    fn on_notice(&mut self, notice: Notice, give_up_at: Instant) {
        match notice {
            Notice::Linked(result) => self.on_linked(result, give_up_at),
            Notice::Connected(stream, result) => self.on_connected(stream, *result),
            Notice::Renewed(result) => self.on_renewed(result),
            Notice::Fetched { attempt, inputs } => self.on_fetched(attempt, inputs),
            Notice::Collected { attempt, stored } => self.on_collected(attempt, stored),
            Notice::Upload(notice) => self.on_upload(notice),
        }
    }

    /// A task connects to the spawner, after a pause.
    fn open_link(&mut self, pause: Duration) {
        if std::mem::replace(&mut self.linking, true) {
            return;
        }
        let (path, inbox) = (self.config.spawner.clone(), self.inbox.clone());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(pause).await;
            let result = SpawnerLink::open(&path).await;
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Linked(result)).await;
        });
    }

    fn drop_link(&mut self) {
        if self.link.take().is_some() {
            self.tell(HostEvent::SpawnerGone);
        }
    }

    fn on_linked(&mut self, result: Result<(SpawnerLink, Greeting), LinkError>, give_up_at: Instant) {
        self.linking = false;
        let (link, greeting) = match result {
            Ok(linked) => linked,
            Err(error) if self.facts.is_none() && Instant::now() > give_up_at => {
                self.outcome = Some(Err(SupervisorError::NoSpawner(error)));
                return;
            }
            Err(error) => {
                tracing::warn!("{}; trying again", chain(&error));
                self.open_link(SPAWNER_AGAIN);
                return;
            }
        };
        self.link = Some(link);
        let facts = Facts { boot_id: greeting.boot_id.clone(), fences: greeting.fences.clone() };
        let first = self.facts.is_none();
        if first {
            for (fence, reason) in &greeting.missing {
                tracing::info!(fence, reason, "this host lacks a fence");
            }
            self.sweep_spool(&greeting);
        }
        let is_new = self.spawner_id.replace(greeting.spawner_id) != Some(greeting.spawner_id);
        if is_new && self.leaving.take_if(|leaving| leaving.spawner_waits).is_some() {
            // Stopped and started again, and we with it: the coordinator undoes that drain for a host that begins anew.
            match self.state.count_start() {
                Ok(()) => self.disconnect("the node begins anew"),
                Err(error) => self.outcome = Some(Err(error.into())),
            }
            self.connect_at = Some(Instant::now());
        }
        if self.drain.is_some() {
            self.tell_drain();
        }
        let changed = self.facts.replace(facts.clone()).is_none_or(|before| before != facts);
        self.take_over(greeting, is_new);
        if changed {
            self.disconnect("the spawner changed what this host has");
            self.connect_at = Some(Instant::now());
        }
    }

    fn on_link_failed(&mut self, error: &LinkError) {
        tracing::warn!("{}; connecting again", chain(error));
        self.drop_link();
        self.open_link(SPAWNER_AGAIN);
    }

    fn ask_spawner(&mut self, request: &Request) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = link.send(request, Vec::new()) {
            self.on_link_failed(&error);
        }
    }

    fn on_packets(&mut self, first: Result<(Event, Vec<std::os::fd::OwnedFd>), LinkError>) {
        let mut next = first.map(Some);
        for _ in 0..PACKETS_AT_ONCE {
            match next {
                Ok(Some((event, descriptors))) => self.on_spawner_event(event, descriptors),
                Ok(None) => return,
                Err(error) => {
                    self.on_link_failed(&error);
                    return;
                }
            }
            self.settle();
            let Some(link) = &mut self.link else { return };
            next = link.try_next();
        }
        // The last packet taken above must not be lost.
        match next {
            Ok(Some((event, descriptors))) => self.on_spawner_event(event, descriptors),
            Ok(None) => {}
            Err(error) => self.on_link_failed(&error),
        }
    }

    /// What is on its way to the coordinator gets a moment; all of it is kept by the spawner anyway.
    async fn say_last_words(&mut self) {
        let Some(live) = self.live.take() else { return };
        for message in self.outgoing.drain(..) {
            if live.outbound.try_send(message).is_err() {
                return;
            }
        }
        live.close(LAST_WORDS).await;
    }
}

/// For what was handed to the stream to reach the network.
const LAST_WORDS: Duration = Duration::from_millis(200);

async fn next_event(link: Option<&mut SpawnerLink>) -> Result<(Event, Vec<std::os::fd::OwnedFd>), LinkError> {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}

/// Tells the service manager, if there is one.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager does not listen");
    }
}

/// Shown in logs.
const fn word_of(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Cancelled => "cancelled",
        StopReason::Drained => "drained",
        StopReason::Preempted => "preempted",
        StopReason::Superseded => "superseded",
    }
}
