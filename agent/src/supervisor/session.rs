//! The agent's stream: hello, heartbeats, orders in, reports out.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use muster_core::{
    event::DrainThen,
    host::HostEvent,
    ids::{AttemptId, Revision, Term},
    limits,
    time::Millis,
    timeline::Seen,
};
use muster_proto::{convert, v1};
use prost::Message as _;
use tokio::sync::mpsc::{self, error::TrySendError};
use tonic::{Status, Streaming};

use super::{Notice, Supervisor, notify};
use crate::{
    chain, config,
    connection::{self, Again, ConnectError, Reconnect, Session},
    hex,
    identity::{Certificate, IdentityError},
    jitter,
    job::Job,
    order, tls, usage,
};

/// A stream that stands.
pub struct Live {
    /// To the coordinator.
    pub outbound: mpsc::Sender<v1::AgentMessage>,
    /// When the next heartbeat is due.
    pub heartbeat_at: Instant,
    inbound: Streaming<v1::CoordinatorMessage>,
    interval: Duration,
    sequence: u64,
    /// When the coordinator last said anything.
    heard: Instant,
}

impl Live {
    /// Lets what was handed over reach the network, for so long at most.
    pub async fn close(mut self, within: Duration) {
        drop(self.outbound);
        let ended = async { while let Ok(Some(_)) = self.inbound.message().await {} };
        // Either way we leave.
        let _ = tokio::time::timeout(within, ended).await;
    }
}

/// The next message of the stream, if there is one.
pub async fn next(live: Option<&mut Live>) -> Result<Option<v1::CoordinatorMessage>, Status> {
    match live {
        Some(live) => live.inbound.message().await,
        None => std::future::pending().await,
    }
}

/// Returns when the stream takes one more message, or is broken, which its other half says.
pub async fn has_room(outbound: Option<mpsc::Sender<v1::AgentMessage>>) {
    match outbound {
        Some(outbound) => drop(outbound.reserve().await),
        None => std::future::pending().await,
    }
}

/// A report that nobody waits for is held back so long for others to go with it: each message
/// costs both sides more than what one report says, and each batch a synced write there.
const REPORTS_GATHER: Duration = Duration::from_millis(10);
/// Reports in one message; and its size, well below what a message may have.
const REPORTS_MAX: usize = 256;
const REPORT_BYTES_MAX: usize = limits::MESSAGE_BYTES_MAX / 4;
/// Bounds of what a coordinator may ask.
const INTERVAL_MIN: Duration = Duration::from_millis(50);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Heartbeats without an answer before the stream counts as dead.
const UNANSWERED_MAX: u32 = 4;
const RENEW_AGAIN: Duration = Duration::from_secs(60);
const PROTOCOL_VERSION: u32 = 1;

impl Supervisor {
    /// A task opens a stream to the next address.
    pub(super) fn connect(&mut self) {
        self.connect_at = None;
        if self.facts.is_none() {
            return;
        }
        // What a stream brings after the hello of the next one is built would run here without anybody knowing (FL-4).
        self.disconnect("the next one begins");
        let Some(facts) = &self.facts else { return };
        let config = match tls::config_of(&self.identity) {
            Ok(config) => config,
            Err(error) => {
                self.outcome = Some(Err(error.into()));
                return;
            }
        };
        self.streams += 1;
        let hello = v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: facts.boot_id.clone(),
            agent_start: self.state.agent_start(),
            stream: self.streams,
            capacity: Some(self.config.capacity.into()),
            labels: self.config.labels.clone().into_iter().collect(),
            fences: facts.fences.clone(),
            held: self.host.held().map(order::held_to_wire).collect(),
            closed_for_drain: self.host.closed_for().map_or(0, |revision| revision.0),
            instance: self.state.instance().to_owned(),
            seen_term: self.state.seen().seen.term.0,
            seen_commit: self.state.seen().seen.commit,
            seen_seal: hex::decode(&self.state.seen().seal).unwrap_or_default().into(),
            host_name: config::host_name(),
            kernel: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        let address = self.addresses.dial();
        let (stream, inbox) = (self.streams, self.inbox.clone());
        tokio::task::spawn_local(async move {
            let result = connection::open(address, config, hello).await;
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Connected(stream, Box::new(result))).await;
        });
    }

    /// A stream stands, or does not. One whose successor was begun meanwhile says nothing any more, whatever became of it.
    pub(super) fn on_connected(&mut self, stream: u64, result: Result<Session, ConnectError>) {
        if stream != self.streams {
            return;
        }
        let session = match result {
            Ok(session) => session,
            Err(error) => {
                let wait = match self.addresses.failed(&error) {
                    Again::AtOnce => Duration::ZERO,
                    Again::Soon => self.reconnect.short_wait(),
                    Again::Later => self.reconnect.next_wait(),
                };
                tracing::warn!(wait_ms = wait.as_millis() as u64, "{}; trying again", chain(&error));
                self.connect_at = Some(Instant::now() + wait);
                return;
            }
        };
        self.addresses.worked(&session.address);
        let welcome = &session.welcome;
        tracing::info!(address = session.address, node = welcome.node, incarnation = welcome.incarnation, "connected");
        self.reconnect = Reconnect::within(Duration::from_millis(welcome.reconnect_spread_ms.into()));
        let interval = Duration::from_millis(welcome.heartbeat_interval_ms.into()).clamp(INTERVAL_MIN, INTERVAL_MAX);
        let (term, unknown) = (Term(welcome.term), attempts_of(&welcome.unknown));
        let drain = welcome.drain;
        // Nobody has it open: a closed receiver only means that nothing waits for it.
        self.channel.send_replace(Some(session.channel));
        self.live = Some(Live {
            outbound: session.outbound,
            heartbeat_at: Instant::now(),
            inbound: session.inbound,
            interval,
            sequence: 0,
            heard: Instant::now(),
        });
        self.note_drain(drain);
        self.tell(HostEvent::Connected { term, unknown });
        self.settle();
        self.say_leaving();
        self.heartbeat();
        self.pump_uploads();
        notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("connected")]);
        // After the handshake, which needs more of the code than all that follows.
        crate::footprint::give_back_what_the_start_needed();
    }

    /// Drops the stream, if there is one; what was on its way goes again on the next.
    pub(super) fn disconnect(&mut self, why: &str) {
        if self.live.take().is_none() {
            return;
        }
        tracing::warn!(why, "the stream to the coordinator ended");
        notify(&[sd_notify::NotifyState::Status("not connected; jobs go on")]);
        self.outgoing.clear();
        self.say_at = None;
        self.ends_gathered = 0;
        self.channel.send_replace(None);
        self.close_upload();
        self.tell(HostEvent::Disconnected);
        self.settle();
    }

    fn on_broken(&mut self, why: &str) {
        self.disconnect(why);
        self.connect_at = Some(Instant::now() + self.reconnect.next_wait());
    }

    pub(super) fn heartbeat(&mut self) {
        let now = Instant::now();
        let Some(live) = &mut self.live else { return };
        if now.duration_since(live.heard) > live.interval * UNANSWERED_MAX {
            self.on_broken("the coordinator does not answer");
            return;
        }
        // Up to a tenth early, so that a fleet does not beat in step.
        let early = jitter::below(live.interval.as_millis() as u64 / 10 + 1);
        live.heartbeat_at = now + live.interval - Duration::from_millis(early);
        // Reports of what is over come before the heartbeat that no longer lists it as running.
        self.say_at = Some(now);
        if self.say_what_is_due().is_some() {
            // The network is behind; this heartbeat would be late anyway.
            return;
        }
        let Some(live) = &mut self.live else { return };
        live.sequence += 1;
        let sequence = live.sequence;
        self.tell(HostEvent::HeartbeatSent { sequence });
        self.settle();
        let heartbeat = self.take_figures(sequence, now);
        let message = v1::AgentMessage { message: Some(v1::agent_message::Message::Heartbeat(heartbeat)) };
        if let Some(live) = &self.live {
            // Full: as above. Closed: the inbound side says so.
            let _ = live.outbound.try_send(message);
        }
    }

    fn take_figures(&mut self, sequence: u64, now: Instant) -> v1::Heartbeat {
        for job in self.jobs.values_mut().filter(|job| job.ended.is_none()) {
            if let Some(running) = &job.running {
                self.attempt_reader.look(running, &mut job.meter, now);
            }
        }
        let live = self.jobs.iter().filter(|(_, job)| job.running.is_some() && job.ended.is_none());
        let sum = usage::Sum::of(live.clone().map(|(_, job)| &job.meter));
        v1::Heartbeat {
            sequence,
            metrics: Some(self.host_sampler.sample(&sum)),
            usage: usage::of_attempts(live.map(|(attempt, job)| (*attempt, &job.meter))),
            held: self.host.held().map(order::held_to_wire).collect(),
        }
    }

    pub(super) fn on_message(&mut self, message: Result<Option<v1::CoordinatorMessage>, Status>) {
        let message = match message {
            Ok(Some(message)) => message.message,
            Ok(None) => return self.on_broken("the coordinator closed it"),
            Err(status) => return self.on_broken(status.message()),
        };
        if let Some(live) = &mut self.live {
            live.heard = Instant::now();
            self.reconnect.reset();
        }
        match message {
            Some(message) => self.on_order(message),
            None => tracing::warn!("the coordinator sent a message that this agent does not know"),
        }
    }

    fn on_order(&mut self, message: v1::coordinator_message::Message) {
        use v1::coordinator_message::Message;
        match message {
            Message::Welcome(_) => self.on_broken("a second welcome came"),
            Message::Lease(lease) => {
                let seen = Seen { term: Term(lease.term), commit: lease.commit };
                if let Err(error) = self.state.note_seen(seen, &lease.seal) {
                    tracing::warn!("{}", chain(&error));
                }
                self.tell(HostEvent::LeaseGranted {
                    sequence: lease.sequence,
                    duration: Millis(lease.duration_ms.into()),
                    unknown: attempts_of(&lease.unknown),
                });
            }
            Message::Start(start) => self.on_start_ordered(start),
            Message::Stop(stop) => {
                for stop in &stop.attempts {
                    match order::stop_order(stop) {
                        Ok(order) => self.tell(HostEvent::StopOrdered(order)),
                        Err(error) => tracing::error!(%error, "a stop makes no sense"),
                    }
                }
            }
            Message::Stored(stored) => {
                self.tell(HostEvent::EndsStored { attempts: attempts_of(&stored.attempts) });
            }
            Message::Recall(recall) => self.tell(HostEvent::RecallOrdered { count: recall.count }),
            Message::AskDrained(asked) => {
                self.tell(HostEvent::DrainAsked { revision: Revision(asked.revision), refusable: asked.refusable })
            }
            Message::Release(release) => self.tell(HostEvent::ReleaseOrdered {
                revision: Revision(release.revision),
                then: match release.then() {
                    v1::release::Then::Unspecified | v1::release::Then::Nothing => DrainThen::Nothing,
                    v1::release::Then::Stop => DrainThen::Stop,
                    v1::release::Then::Poweroff => DrainThen::Poweroff,
                    v1::release::Then::Delete => DrainThen::Delete,
                },
            }),
            Message::Reopen(reopen) => {
                self.note_drain(None);
                self.stays();
                self.tell(HostEvent::ReopenOrdered { revision: Revision(reopen.revision) });
            }
            Message::DrainNotice(notice) => self.note_drain(Some(notice)),
        }
    }

    fn on_start_ordered(&mut self, start: v1::StartAttempts) {
        let bodies: std::collections::BTreeMap<u64, Rc<v1::JobBody>> =
            start.bodies.into_iter().map(|body| (body.job, Rc::new(body))).collect();
        for start in start.attempts {
            let job = start.attempt.as_ref().map_or(0, |attempt| attempt.job);
            let Some(body) = bodies.get(&job) else {
                tracing::error!(job, "a start came without its job");
                continue;
            };
            match order::start_order(body, &start) {
                Ok(order) => {
                    // A second order of what is held changes nothing of what is held.
                    self.jobs
                        .entry(order.attempt)
                        .or_insert_with(|| Job::ordered(&self.state, &order, Rc::clone(body), start));
                    self.tell(HostEvent::StartOrdered(order));
                }
                Err(error) => tracing::error!(%error, "a start makes no sense"),
            }
        }
    }

    /// Queues a message for the stream; without one it is dropped, and what matters is said again.
    pub(super) fn say(&mut self, message: v1::agent_message::Message) {
        if self.live.is_some() {
            self.outgoing.push_back(v1::AgentMessage { message: Some(message) });
            self.say_at = Some(Instant::now());
        }
    }

    /// Hands what is due to the stream. One that takes no more is given back, to be waited for.
    pub(super) fn say_what_is_due(&mut self) -> Option<mpsc::Sender<v1::AgentMessage>> {
        if self.say_at.is_none_or(|at| at > Instant::now()) {
            return None;
        }
        let live = self.live.as_ref()?;
        while let Some(message) = self.outgoing.pop_front() {
            match live.outbound.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.outgoing.push_front(message);
                    return Some(live.outbound.clone());
                }
                // The stream broke, and its other half says so.
                Err(TrySendError::Closed(_)) => {}
            }
        }
        self.say_at = None;
        self.ends_gathered = 0;
        None
    }

    /// Queues the report of a start: most have an end soon after, and the two go together.
    pub(super) fn report_start(&mut self, report: v1::AttemptReport) {
        self.report(report, Instant::now() + REPORTS_GATHER);
    }

    /// Queues the report of an end. Somebody may wait for it; but while more work than that is in
    /// line here, this host is busy with many short tasks, and their ends go together: by the time
    /// the coordinator has sent more, there is still something to do.
    pub(super) fn report_end(&mut self, report: v1::AttemptReport) {
        self.ends_gathered += 1;
        let now = Instant::now();
        let busy = self.host.queued() > self.ends_gathered;
        self.report(report, if busy { now + REPORTS_GATHER } else { now });
    }

    /// Queues a report behind the others, in as few messages as fit; it goes then, or with what goes earlier.
    fn report(&mut self, report: v1::AttemptReport, at: Instant) {
        if self.live.is_none() {
            return;
        }
        self.say_at = Some(self.say_at.map_or(at, |earlier| earlier.min(at)));
        let size = report.encoded_len();
        if let Some(v1::AgentMessage { message: Some(v1::agent_message::Message::Reports(last)) }) =
            self.outgoing.back_mut()
            && last.reports.len() < REPORTS_MAX
            && (size <= SMALL_REPORT_BYTES || last.encoded_len() + size <= REPORT_BYTES_MAX)
        {
            last.reports.push(report);
        } else {
            let reports = v1::agent_message::Message::Reports(v1::AttemptReports { reports: vec![report] });
            self.outgoing.push_back(v1::AgentMessage { message: Some(reports) });
        }
    }

    /// A task fetches a new certificate; the next stream uses it.
    pub(super) fn renew(&mut self) {
        self.renew_at = Instant::now() + RENEW_AGAIN;
        let Some(channel) = self.channel.borrow().clone() else { return };
        let (renewal, inbox) = (self.identity.renew(self.state.root().to_owned(), channel), self.inbox.clone());
        tokio::task::spawn_local(async move {
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Renewed(renewal.await)).await;
        });
    }

    pub(super) fn on_renewed(&mut self, result: Result<Certificate, IdentityError>) {
        match result {
            Ok(certificate) => {
                self.renew_at = Instant::now() + certificate.renew_in().max(RENEW_AGAIN);
                self.identity.certificate = certificate;
                tracing::info!("the certificate was renewed");
            }
            Err(error) => {
                self.renew_at = Instant::now() + RENEW_AGAIN;
                tracing::warn!("cannot renew the certificate: {}; trying again", chain(&error));
            }
        }
    }
}

/// So many of these fit into one message whatever they are.
const SMALL_REPORT_BYTES: usize = REPORT_BYTES_MAX / REPORTS_MAX;

fn attempts_of(wire: &[v1::AttemptId]) -> Vec<AttemptId> {
    wire.iter().filter_map(|attempt| convert::attempt_id(Some(attempt)).ok()).collect()
}
