//! The agent's connection: who may connect, what it asks, what it is told.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    rc::Rc,
};

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{AGENT, Keeper, launching};
use crate::sandbox::sys;
use crate::spawner::{
    attempt::{Attempt, Reason, Stage},
    protocol::{AttemptKey, Event, PROTOCOL_VERSION, Phase, Request},
    socket::{self, Received},
};

/// Events that wait for a slow agent; past them its connection is dropped, and nothing is lost.
const EVENTS_MAX: usize = 65_536;
/// Their bytes, apart from the greeting's, which `attempts_max` bounds.
const EVENTS_BYTES_MAX: usize = 16 << 20;
/// No coordinator leases a host for longer; a later end would be an agent's way to have `exclusive` jobs run for ever.
const LEASE_AHEAD_MAX_MS: u64 = 10 * 60 * 1_000;
/// Requests obeyed in a row: a flood of them must not delay deadlines.
const REQUESTS_AT_ONCE: usize = 64;

/// The one connected agent.
pub struct Agent {
    socket: OwnedFd,
    greeted: bool,
    queue: VecDeque<(Vec<u8>, Vec<Rc<OwnedFd>>)>,
    /// Bytes in the queue that are counted against [`EVENTS_BYTES_MAX`].
    queued_bytes: usize,
    /// Packets at its head that are the greeting's, and are not counted.
    greeting: usize,
    wants_write: bool,
}

impl Keeper {
    pub(super) fn accept(&mut self) {
        // SAFETY: accept4(2) without an address; the descriptor is new.
        let fd = unsafe {
            libc::accept4(
                self.listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        };
        if fd < 0 {
            return;
        }
        // SAFETY: as above.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let peer = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials);
        let allowed = [0, self.agent_uid, nix::unistd::geteuid().as_raw()];
        if !peer.is_ok_and(|peer| allowed.contains(&peer.uid())) {
            tracing::warn!("a process that is not the agent was refused");
            return;
        }
        self.drop_agent();
        if self.watch(socket.as_fd(), AGENT, EpollFlags::EPOLLIN).is_ok() {
            self.agent = Some(Agent {
                socket,
                greeted: false,
                queue: VecDeque::new(),
                queued_bytes: 0,
                greeting: 0,
                wants_write: false,
            });
        }
    }

    fn drop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.unwatch(agent.socket.as_fd());
        }
        // Who asked for these outputs is gone, and its successor would take them for its own.
        for collecting in std::mem::take(&mut self.collecting).into_values() {
            self.unwatch(collecting.socket.as_fd());
            let _gone = sys::signal_pidfd(collecting.pidfd.as_fd(), libc::SIGKILL);
            self.reap_later(collecting.pidfd);
        }
    }

    pub(super) fn hear_agent(&mut self) {
        for _ in 0..REQUESTS_AT_ONCE {
            let Some(agent) = &self.agent else { return };
            match socket::receive::<Request>(agent.socket.as_fd(), &mut self.buffer) {
                Ok(Received::Message(request, descriptors)) => self.obey(request, descriptors),
                Ok(Received::Nothing) => return,
                Ok(Received::Malformed(reason)) => self.deny(None, reason),
                Ok(Received::Closed) | Err(_) => return self.drop_agent(),
            }
        }
    }

    pub(super) fn deny(&mut self, attempt: Option<AttemptKey>, reason: impl Into<String>) {
        self.tell(&Event::Denied { attempt, reason: reason.into() }, Vec::new());
    }

    pub(super) fn tell(&mut self, event: &Event, descriptors: Vec<Rc<OwnedFd>>) {
        let Some(agent) = &mut self.agent else { return };
        // Before its greeting an agent hears refusals only: what else there is to tell is in `Held`.
        if !agent.greeted && !matches!(event, Event::Denied { .. }) {
            return;
        }
        let Ok(packet) = socket::encode(event) else { return };
        if agent.queue.len() >= EVENTS_MAX || agent.queued_bytes >= EVENTS_BYTES_MAX {
            tracing::warn!("the agent does not read; its connection is dropped");
            return self.drop_agent();
        }
        agent.queued_bytes += packet.len();
        agent.queue.push_back((packet, descriptors));
    }

    pub(super) fn flush(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        while let Some((packet, descriptors)) = agent.queue.front() {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|fd| fd.as_fd()).collect();
            match socket::send(agent.socket.as_fd(), packet, &borrowed) {
                Ok(()) => {
                    match agent.greeting.checked_sub(1) {
                        Some(left) => agent.greeting = left,
                        None => agent.queued_bytes -= packet.len(),
                    }
                    agent.queue.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.drop_agent(),
            }
        }
        let wants_write = !agent.queue.is_empty();
        if wants_write != agent.wants_write {
            agent.wants_write = wants_write;
            let flags = if wants_write { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let _gone = self.epoll.modify(&agent.socket, &mut EpollEvent::new(flags, AGENT));
        }
    }

    fn obey(&mut self, request: Request, mut descriptors: Vec<OwnedFd>) {
        let greeted = self.agent.as_ref().is_some_and(|agent| agent.greeted);
        if !greeted && !matches!(request, Request::Hello { .. }) {
            return self.deny(None, "the first message must be Hello");
        }
        match request {
            Request::Hello { version } => self.greet(version),
            Request::Start(start) => self.start(*start, descriptors),
            Request::StartInMemory => match launching::read_start(&mut descriptors) {
                Ok(start) => self.start(start, descriptors),
                Err(reason) => self.deny(None, reason),
            },
            Request::Stop { attempt, grace_ms } => self.end(attempt, Reason::Stopped, grace_ms),
            Request::Attach { attempt } => self.attach(attempt),
            Request::Collect { attempt, paths, file_bytes_max } => self.collect(attempt, paths, file_bytes_max),
            Request::Forget { attempt } => self.forget(attempt),
            Request::RenewLease { deadline_boottime_ms } => self.renew_lease(deadline_boottime_ms),
            Request::Poweroff => self.power_off(),
            Request::Drained => self.note_drained(),
            Request::Checkpoint { attempt, signal, grace_ms } => self.ask_to_save(attempt, signal, grace_ms),
            Request::NoticeDrain { deadline_unix_s } => self.notice_drain(Some(deadline_unix_s)),
            Request::NoticeNoDrain => self.notice_drain(None),
        }
    }

    fn greet(&mut self, version: u16) {
        if version != PROTOCOL_VERSION {
            return self.deny(None, format!("this spawner speaks protocol {PROTOCOL_VERSION}, not {version}"));
        }
        let leaving = self.leaving_event();
        let Some(agent) = &mut self.agent else { return };
        if agent.greeted {
            // Each greeting lists all that is held: repeated, it would fill memory.
            return self.deny(None, "Hello comes once in a connection");
        }
        agent.greeted = true;
        let welcome = Event::Welcome {
            version: PROTOCOL_VERSION,
            boot_id: self.boot_id.clone(),
            spawner_id: self.spawner_id,
            fences: self.fences.present.iter().map(|name| (*name).to_owned()).collect(),
            missing: self.fences.missing.iter().map(|(name, why)| ((*name).to_owned(), why.clone())).collect(),
            poweroff: self.policy.allow_poweroff,
        };
        let greeting =
            std::iter::once(welcome).chain(self.attempts.values().map(held)).chain([Event::HeldAll]).chain(leaving);
        let packets = greeting.filter_map(|event| socket::encode(&event).ok()).map(|packet| (packet, Vec::new()));
        agent.queue.extend(packets);
        (agent.greeting, agent.queued_bytes) = (agent.queue.len(), 0);
    }

    fn renew_lease(&mut self, deadline_ms: u64) {
        if deadline_ms > sys::boottime_us() / 1_000 + LEASE_AHEAD_MAX_MS {
            return self.deny(None, "a lease ends at most 10 minutes from now");
        }
        self.lease.extend(deadline_ms);
    }

    fn attach(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get(&key) else { return self.deny(Some(key), "no such attempt is held") };
        let pipes = attempt.pipes.clone();
        self.tell(&Event::Attached { attempt: key }, pipes);
    }

    fn power_off(&mut self) {
        if !self.policy.allow_poweroff {
            return self.deny(None, "power-off is not allowed here: set allow_poweroff in spawner.toml");
        }
        if let Err(error) = std::process::Command::new("systemctl").arg("poweroff").spawn() {
            self.deny(None, format!("systemctl poweroff: {error}"));
        }
    }
}

fn held(attempt: &Attempt) -> Event {
    let phase = match &attempt.stage {
        Stage::Live(live) if live.ending.is_some() => Phase::Stopping(attempt.running(live)),
        Stage::Live(live) => Phase::Running(attempt.running(live)),
        Stage::Over { ended, .. } => Phase::Ended(ended.clone()),
    };
    Event::Held { attempt: attempt.key, note: attempt.note.clone(), phase }
}
