//! Streams between hosts and coordinators: in order, delayed, cut one way or
//! both, lost with what is under way. Two streams of one host know no order.

use std::collections::HashMap;

use muster_core::{
    effect::{Effect, StopOrder},
    end::End,
    event::{DrainThen, Event, Held, HeldPhase, Hello, HostSample},
    host::{HostEvent, StartOrder},
    ids::{AttemptId, Epoch, NodeId, Revision, SessionId, Term},
    node::{Liveness, NodeRecord},
    time::{Millis, Timestamp},
    timeline::Seen,
};

use crate::{agenda::Action, setup::Fault, truth::Violation, world::World};

/// What an agent says to the coordinator.
#[derive(Clone, Debug)]
pub enum Report {
    Hello(Box<Hello>, Seen),
    Heartbeat { sequence: u64, sample: HostSample, held: Vec<Held> },
    Started(AttemptId, Epoch),
    Ended(AttemptId, Epoch, Box<End>),
    GivenBack(Vec<AttemptId>),
    Proved(Revision),
    Refused(Revision, String),
    Stopping { within: Option<Millis> },
    Stuck(AttemptId),
}

/// From the coordinator to an agent.
#[derive(Clone, Debug)]
pub enum Message {
    Welcome(Term, Vec<AttemptId>),
    Lease {
        sequence: u64,
        duration: Millis,
        unknown: Vec<AttemptId>,
        told: Seen,
    },
    Start(Vec<StartOrder>),
    Stop(Vec<StopOrder>),
    Stored(Vec<AttemptId>),
    Recall(u32),
    AskDrained(Revision, bool),
    Release(Revision, DrainThen),
    Reopen(Revision),
    /// The reason; and whether the node has to enrol anew.
    Close {
        is_unknown: bool,
    },
}

/// One stream; each side learns of its end for itself.
#[derive(Debug)]
pub struct Stream {
    pub host: usize,
    pub node: NodeId,
    pub member: usize,
    /// Which life of that process.
    pub life: u64,
    /// Its agent is of an older version.
    pub is_old: bool,
    /// The coordinator's end is open.
    pub is_heard: bool,
    /// What is under way is lost.
    pub is_lost: bool,
    /// A stream keeps its order: nothing arrives before what was sent before it.
    pub up_at: Timestamp,
    pub down_at: Timestamp,
}

/// How well a host reaches the coordinator, and is reached.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    pub up_cut: Timestamp,
    pub down_cut: Timestamp,
    pub slow: Timestamp,
}

#[derive(Debug, Default)]
pub struct Network {
    pub streams: HashMap<SessionId, Stream>,
    next: u64,
}

/// What a host says that lost its mind: no end that a simulated process has by itself.
pub const STRAY: End = End::Exited(99);

/// An agent that gets no answer for this long gives its stream up.
const SILENCE: Millis = Millis::from_secs(10);

impl World {
    fn delay(&mut self, host: usize) -> Millis {
        if self.hosts[host].link.slow > self.now {
            return Millis(self.rng.between(1_000, 9_000));
        }
        Millis(self.rng.between(1, 40))
    }

    /// When a message arrives that is sent now; none: it is lost, and its stream with it.
    fn arrival(&mut self, session: SessionId, host: usize, upwards: bool) -> Option<Timestamp> {
        if self.occurs(Fault::MessageLost, 1) {
            self.break_stream(session);
            return None;
        }
        let delay = self.delay(host);
        let link = self.hosts[host].link;
        // What a cut swallows is sent again when it ends, unless the stream is given up before.
        let cut = if upwards { link.up_cut } else { link.down_cut };
        let stream = self.network.streams.get_mut(&session)?;
        let latest = if upwards { &mut stream.up_at } else { &mut stream.down_at };
        *latest = (self.now.max(cut) + delay).max(*latest);
        Some(*latest)
    }

    pub(crate) fn say(&mut self, host: usize, report: Report) {
        let Some(session) = self.hosts[host].session else { return };
        if let Some(at) = self.arrival(session, host, true) {
            self.agenda.at(at, Action::Up { session, report });
        }
    }

    pub(crate) fn send(&mut self, session: SessionId, message: Message) {
        let Some(stream) = self.network.streams.get(&session).filter(|stream| stream.is_heard) else { return };
        let host = stream.host;
        let closes = matches!(message, Message::Close { .. });
        let again = match &message {
            Message::Start(_) if self.occurs(Fault::StartRepeated, 10) => Some(message.clone()),
            _other => None,
        };
        for message in [Some(message), again].into_iter().flatten() {
            if let Some(at) = self.arrival(session, host, false) {
                self.agenda.at(at, Action::Down { session, message });
            }
        }
        if closes && let Some(stream) = self.network.streams.get_mut(&session) {
            stream.is_heard = false;
        }
    }

    /// Both ends learn of it later, each for itself.
    pub(crate) fn break_stream(&mut self, session: SessionId) {
        let Some(stream) = self.network.streams.get_mut(&session) else { return };
        stream.is_lost = true;
        self.after(0, 1_500, Action::UpEnds { session });
        self.after(0, 1_500, Action::DownEnds { session });
    }

    /// All streams of a coordinator that died or no longer leads.
    pub(crate) fn close_streams_of(&mut self, member: usize) {
        let mut sessions: Vec<SessionId> = self
            .network
            .streams
            .iter()
            .filter(|(_, stream)| stream.member == member && stream.is_heard)
            .map(|(session, _)| *session)
            .collect();
        sessions.sort_unstable();
        for session in sessions {
            if let Some(stream) = self.network.streams.get_mut(&session) {
                stream.is_heard = false;
                stream.is_lost = true;
            }
            self.after(1, 1_500, Action::DownEnds { session });
        }
    }

    pub(crate) fn connect(&mut self, host: usize) -> Result<(), Violation> {
        let known = &self.hosts[host];
        if known.agent.is_none() || known.session.is_some() || known.left || known.is_gone {
            return Ok(());
        }
        self.hosts[host].dial += 1;
        let member = self.hosts[host].dial % self.members.len();
        let link = self.hosts[host].link;
        let answers = self.members[member].answers(self.now);
        if !answers || link.up_cut > self.now || link.down_cut > self.now {
            self.after(200, 3_000, Action::Connect { host });
            return Ok(());
        }
        self.stand_at_door(host, member);
        if self.hosts[host].node.is_none() {
            self.after(100, 1_500, Action::Connect { host });
            return self.enroll(host, member);
        }
        self.open_stream(host, member);
        Ok(())
    }

    /// The door looks at number and key by what is committed: whom it turns away enrols anew. A hello may be on its
    /// way past it while that changes, so the rules look once more.
    fn stand_at_door(&mut self, host: usize, member: usize) {
        let Some(node) = self.hosts[host].node else { return };
        let fleet = self.members[member].fleet();
        let is_known = match fleet.and_then(|fleet| fleet.node(node)) {
            Some(row) => row.key == self.hosts[host].key,
            None if self.rng.chance(500) => {
                self.members[member].note_shown(node);
                false
            }
            None => true,
        };
        if !is_known {
            self.hosts[host].node = None;
        }
    }

    fn open_stream(&mut self, host: usize, member: usize) {
        let Some(node) = self.hosts[host].node else { return };
        self.network.next += 1;
        let session = SessionId(self.network.next);
        let stream = Stream {
            host,
            node,
            member,
            life: self.members[member].life,
            is_old: self.hosts[host].is_old,
            is_heard: true,
            is_lost: false,
            up_at: self.now,
            down_at: self.now,
        };
        self.network.streams.insert(session, stream);
        if self.occurs(Fault::LateHello, 15)
            && let Some(stream) = self.network.streams.get_mut(&session)
        {
            stream.up_at = self.now + SILENCE + Millis(8_000);
        }
        let known = &mut self.hosts[host];
        known.session = Some(session);
        known.last_stream = Some(session);
        known.sequence = 0;
        known.streams_since_start += 1;
        known.is_welcome = false;
        known.answered = self.now;
        let seen = if known.is_old { Seen::default() } else { known.seen };
        let hello = known.hello();
        self.say(host, Report::Hello(Box::new(hello), seen));
        self.at(self.now + SILENCE, Action::WelcomeDue { host, session });
    }

    /// The coordinator hears.
    pub(crate) fn hear(&mut self, session: SessionId, report: Report) -> Result<(), Violation> {
        let Some(stream) = self.network.streams.get(&session) else { return Ok(()) };
        let (node, member, host) = (stream.node, stream.member, stream.host);
        let is_open = stream.is_heard && !stream.is_lost && self.members[member].life == stream.life;
        if !is_open {
            return Ok(());
        }
        if let Report::Ended(attempt, _, end) = &report
            && **end != STRAY
        {
            self.truth.check_reported_end(*attempt, host, end)?;
        }
        if matches!(report, Report::Hello(..)) && self.is_stale_hello(host, session) {
            return Ok(());
        }
        let event = match report {
            Report::Hello(hello, seen) => {
                let key = self.hosts[host].key;
                let connected = Event::NodeConnected { node, key, session, hello: *hello };
                return self.tell_all(member, vec![Event::HostSaw { node, seen }, connected]);
            }
            Report::Heartbeat { sequence, sample, held } => Event::Heartbeat { node, session, sequence, sample, held },
            Report::Started(attempt, epoch) => Event::AttemptStarted { node, session, attempt, epoch },
            Report::Ended(attempt, epoch, end) => {
                Event::AttemptEnded { node, session, attempt, epoch, end: *end, wall: None, detail: Vec::new() }
            }
            Report::GivenBack(attempts) => Event::GivenBack { node, session, attempts },
            Report::Proved(revision) => Event::DrainProved { node, session, revision },
            Report::Refused(revision, reason) => Event::DrainRefused { node, session, revision, reason },
            Report::Stopping { within } => {
                Event::StopNotice { node, session, reason: "the system shuts down".into(), within }
            }
            Report::Stuck(attempt) => Event::AttemptStuck { node, session, attempt },
        };
        self.tell(member, event)
    }

    /// A hello that arrives when its host has opened another stream. An agent of an older version does not number
    /// its streams, so the rules could not tell which is newer: not played.
    fn is_stale_hello(&mut self, host: usize, session: SessionId) -> bool {
        let is_late = self.hosts[host].last_stream != Some(session);
        let is_old = self.network.streams.get(&session).is_some_and(|stream| stream.is_old);
        if is_late && !is_old {
            self.count("hello", "late");
        }
        is_late && is_old
    }

    /// The coordinator's end closes.
    pub(crate) fn end_heard(&mut self, session: SessionId) -> Result<(), Violation> {
        let Some(stream) = self.network.streams.get_mut(&session) else { return Ok(()) };
        if !std::mem::replace(&mut stream.is_heard, false) {
            return Ok(());
        }
        let (node, member, life) = (stream.node, stream.member, stream.life);
        if self.members[member].life != life {
            return Ok(());
        }
        self.tell(member, Event::NodeDisconnected { node, session })
    }

    /// The host's end closes; what it has sent still arrives, in most cases.
    pub(crate) fn leave_stream(&mut self, host: usize, session: SessionId) {
        if self.hosts[host].session != Some(session) {
            return;
        }
        self.hosts[host].session = None;
        let is_lost = self.rng.chance(300);
        if let Some(stream) = self.network.streams.get_mut(&session) {
            stream.is_lost |= is_lost;
            let cut = self.hosts[host].link.up_cut;
            let at = stream.up_at.max(self.now).max(cut);
            // A coordinator that never hears of it learns of it from the next hello.
            if !is_lost {
                self.at(at + Millis(40), Action::UpEnds { session });
            }
        }
    }

    pub(crate) fn lose_stream(&mut self, host: usize, session: SessionId) -> Result<(), Violation> {
        if self.hosts[host].session != Some(session) {
            return Ok(());
        }
        self.leave_stream(host, session);
        self.after(10, 4_000, Action::Connect { host });
        self.apply(host, HostEvent::Disconnected)
    }

    /// An agent that is not even welcomed gives up.
    pub(crate) fn miss_welcome(&mut self, host: usize, session: SessionId) -> Result<(), Violation> {
        if self.hosts[host].is_welcome { Ok(()) } else { self.lose_stream(host, session) }
    }

    pub(crate) fn heartbeat(&mut self, host: usize, session: SessionId) -> Result<(), Violation> {
        let known = &self.hosts[host];
        if known.session != Some(session) || known.agent.is_none() {
            return Ok(());
        }
        if self.now.since(known.answered) >= SILENCE {
            return self.lose_stream(host, session);
        }
        self.hosts[host].sequence += 1;
        let sequence = self.hosts[host].sequence;
        self.apply(host, HostEvent::HeartbeatSent { sequence })?;
        let Some(agent) = &self.hosts[host].agent else { return Ok(()) };
        let held = agent.held().collect();
        let sample = self.hosts[host].sample(self.now);
        self.say(host, Report::Heartbeat { sequence, sample, held });
        let jitter = self.rng.between(0, 300);
        self.at(
            self.now + Millis(muster_core::limits::HEARTBEAT_INTERVAL.0 + jitter),
            Action::Heartbeat { host, session },
        );
        Ok(())
    }

    /// The agent hears.
    pub(crate) fn deliver(&mut self, session: SessionId, message: Message) -> Result<(), Violation> {
        let Some(stream) = self.network.streams.get(&session).filter(|stream| !stream.is_lost) else { return Ok(()) };
        let host = stream.host;
        if self.hosts[host].session != Some(session) {
            return Ok(());
        }
        match message {
            Message::Welcome(term, unknown) => {
                self.hosts[host].is_welcome = true;
                self.hosts[host].answered = self.now;
                self.apply(host, HostEvent::Connected { term, unknown })?;
                self.heartbeat(host, session)
            }
            Message::Lease { sequence, duration, unknown, told } => {
                self.hosts[host].answered = self.now;
                self.hosts[host].note_seen(told, self.now);
                self.apply(host, HostEvent::LeaseGranted { sequence, duration, unknown })
            }
            Message::Start(orders) => {
                orders.into_iter().try_for_each(|order| self.apply(host, HostEvent::StartOrdered(order)))
            }
            Message::Stop(orders) => {
                orders.into_iter().try_for_each(|order| self.apply(host, HostEvent::StopOrdered(order)))
            }
            Message::Stored(attempts) => self.apply(host, HostEvent::EndsStored { attempts }),
            Message::Recall(count) => {
                self.note_recall(host, count);
                self.apply(host, HostEvent::RecallOrdered { count })
            }
            Message::AskDrained(revision, refusable) => self.apply(host, HostEvent::DrainAsked { revision, refusable }),
            Message::Release(revision, then) => self.apply(host, HostEvent::ReleaseOrdered { revision, then }),
            Message::Reopen(revision) => self.apply(host, HostEvent::ReopenOrdered { revision }),
            Message::Close { is_unknown } => {
                if is_unknown {
                    self.hosts[host].node = None;
                }
                self.lose_stream(host, session)
            }
        }
    }

    /// Of a part of them nobody else knows which are the newest.
    fn note_recall(&mut self, host: usize, count: u32) {
        let Some(agent) = self.hosts[host].agent.as_ref().filter(|agent| agent.queued() <= count as usize) else {
            return;
        };
        let queued = agent.held().filter(|held| held.phase == HeldPhase::Queued).map(|held| held.attempt);
        self.truth.recalled(queued);
    }

    /// An effect as it travels; none: it is not for a host.
    pub(crate) fn message_of(&self, member: usize, effect: Effect) -> Option<(SessionId, Message)> {
        Some(match effect {
            Effect::Welcome { session, unknown, .. } => {
                (session, Message::Welcome(Term(self.members[member].term()), unknown))
            }
            Effect::GrantLease { session, sequence, duration, unknown, .. } => {
                (session, Message::Lease { sequence, duration, unknown, told: self.members[member].told() })
            }
            Effect::Start { session, attempts, .. } => {
                let orders = attempts.into_iter().map(|(attempt, epoch)| self.order_for(attempt, epoch)).collect();
                (session, Message::Start(orders))
            }
            Effect::Stop { session, attempts, .. } => (session, Message::Stop(attempts)),
            Effect::Acknowledge { session, attempts, .. } => (session, Message::Stored(attempts)),
            Effect::Recall { session, count, .. } => (session, Message::Recall(count)),
            Effect::AskDrained { session, revision, refusable, .. } => {
                (session, Message::AskDrained(revision, refusable))
            }
            Effect::Release { session, revision, then, .. } => (session, Message::Release(revision, then)),
            Effect::Reopen { session, revision, .. } => (session, Message::Reopen(revision)),
            Effect::CloseSession { node, session, .. } => {
                let fleet = self.members[member].fleet();
                let known = fleet.and_then(|fleet| fleet.node(node));
                let key = self.network.streams.get(&session).map(|stream| self.hosts[stream.host].key);
                let is_other = |row: &NodeRecord| key.is_some_and(|key| key != row.key);
                let is_unknown = known.is_none_or(|row| matches!(row.liveness, Liveness::Gone(_)) || is_other(row));
                (session, Message::Close { is_unknown })
            }
            // Only jobs care for it.
            Effect::NoticeDrain { .. }
            | Effect::Reply { .. }
            | Effect::WakeHost { .. }
            | Effect::AskHost { .. }
            | Effect::CreateHost { .. }
            | Effect::DeleteHost { .. } => return None,
        })
    }
}
