//! The keeper's loop: one thread, one epoll, no clock but the boot-time one.
//! It decides from what is: after every wake-up each attempt that something
//! happened to is looked at anew.

mod launching;
mod outputs;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::CString,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use super::{
    attempt::{Attempt, Reason, Stage, Word},
    policy::Policy,
    protocol::{AttemptKey, Ended, Event, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase, Request},
    socket::{self, Received},
};
use crate::sandbox::{
    cgroup,
    fences::Fences,
    lease::LeasePage,
    status::{self, Status},
    sys::{self, Cloned},
};

/// Events that wait for a slow agent; past them its connection is dropped, and nothing is lost.
const EVENTS_MAX: usize = 65_536;

/// Everything that the spawner holds.
pub struct Keeper {
    pub policy: Policy,
    pub fences: Fences,
    pub cgroups: Option<cgroup::Root>,
    pub rootless: bool,
    pub agent_uid: u32,
    pub state: PathBuf,
    root: CString,
    listener: OwnedFd,
    parent: Option<OwnedFd>,
    signals: nix::sys::signalfd::SignalFd,
    epoll: Epoll,
    agent: Option<Agent>,
    attempts: BTreeMap<AttemptKey, Attempt>,
    /// Every attempt ever accepted: refused the second time (FL-4).
    accepted: Accepted,
    uids_taken: BTreeSet<u32>,
    lease: LeasePage,
    spawner_id: [u8; 16],
    boot_id: String,
    /// Attempts by the tokens of their descriptors.
    tokens: BTreeMap<u64, AttemptKey>,
    next_token: u64,
    token_of: BTreeMap<AttemptKey, u64>,
    collecting: BTreeMap<u64, Collecting>,
    /// Children that remove folders, to be reaped.
    helpers: Vec<OwnedFd>,
    stopping: bool,
    buffer: Vec<u8>,
}

struct Agent {
    socket: OwnedFd,
    greeted: bool,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    wants_write: bool,
}

/// Attempt ids in little space: mostly first tries of arrays.
#[derive(Default)]
struct Accepted {
    first: BTreeMap<u64, muster_core::range_set::RangeSet>,
    later: BTreeMap<(u64, u32), u32>,
}

/// A child that opens outputs.
struct Collecting {
    attempt: AttemptKey,
    socket: OwnedFd,
    pidfd: OwnedFd,
    left: usize,
}

const LISTENER: u64 = 0;
const AGENT: u64 = 1;
const PARENT: u64 = 2;
const SIGNALS: u64 = 3;
const FIRST_TOKEN: u64 = 16;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// SIGTERM, and nothing runs any more.
    Terminated,
    /// The parent is gone, and nothing runs any more.
    Orphaned,
}

impl Accepted {
    fn insert(&mut self, key: AttemptKey) -> bool {
        if key.number == 1 {
            return self.first.entry(key.job).or_default().insert(key.task)
                && !self.later.contains_key(&(key.job, key.task));
        }
        let highest = self.later.entry((key.job, key.task)).or_default();
        let new = key.number > *highest;
        *highest = key.number.max(*highest);
        new
    }
}

impl Keeper {
    /// # Errors
    /// A descriptor could not be made.
    #[allow(clippy::too_many_arguments, reason = "the parts that main has built")]
    pub fn new(
        policy: Policy,
        fences: Fences,
        cgroups: Option<cgroup::Root>,
        agent_uid: u32,
        state: PathBuf,
        listener: OwnedFd,
        parent: Option<OwnedFd>,
    ) -> io::Result<Self> {
        use nix::sys::signalfd::{SfdFlags, SigSet, SignalFd};
        let mut mask = SigSet::empty();
        mask.add(nix::sys::signal::Signal::SIGTERM);
        mask.add(nix::sys::signal::Signal::SIGINT);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut spawner_id = [0; 16];
        getrandom::fill(&mut spawner_id).map_err(|error| io::Error::other(error.to_string()))?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        let root = state.join("root");
        fs::create_dir_all(&root)?;
        fs::create_dir_all(state.join("work"))?;
        let keeper = Self {
            rootless: !nix::unistd::geteuid().is_root(),
            policy,
            fences,
            cgroups,
            agent_uid,
            root: CString::new(root.into_os_string().into_encoded_bytes()).map_err(io::Error::other)?,
            state,
            listener,
            parent,
            signals,
            epoll,
            agent: None,
            attempts: BTreeMap::new(),
            accepted: Accepted::default(),
            uids_taken: BTreeSet::new(),
            lease: LeasePage::new()?,
            spawner_id,
            boot_id,
            tokens: BTreeMap::new(),
            next_token: FIRST_TOKEN,
            token_of: BTreeMap::new(),
            collecting: BTreeMap::new(),
            helpers: Vec::new(),
            stopping: false,
            buffer: vec![0; PACKET_BYTES_MAX],
        };
        keeper.watch(keeper.listener.as_fd(), LISTENER, EpollFlags::EPOLLIN)?;
        keeper.watch(keeper.signals.as_fd(), SIGNALS, EpollFlags::EPOLLIN)?;
        if let Some(parent) = &keeper.parent {
            keeper.watch(parent.as_fd(), PARENT, EpollFlags::EPOLLIN)?;
        }
        Ok(keeper)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64, flags: EpollFlags) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token))?)
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _not_watched = self.epoll.delete(fd);
    }

    /// Runs until told to end and nothing is left.
    ///
    /// # Errors
    /// epoll itself failed.
    pub fn run(&mut self) -> io::Result<Farewell> {
        let mut farewell = Farewell::Terminated;
        let mut events = [EpollEvent::empty(); 64];
        loop {
            if self.stopping && !self.attempts.values().any(|attempt| matches!(attempt.stage, Stage::Live(_))) {
                self.flush();
                return Ok(farewell);
            }
            let ready = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    LISTENER => self.accept(),
                    AGENT => self.hear_agent(),
                    PARENT => {
                        farewell = Farewell::Orphaned;
                        self.end_all(0);
                        if let Some(parent) = self.parent.take() {
                            self.unwatch(parent.as_fd());
                        }
                    }
                    SIGNALS => {
                        while let Ok(Some(_)) = self.signals.read_signal() {}
                        self.end_all(u64::MAX);
                    }
                    token if self.collecting.contains_key(&token) => self.hear_collector(token),
                    token => {
                        if let Some(key) = self.tokens.get(&token).copied() {
                            self.look_at(key);
                        }
                    }
                }
            }
            self.meet_deadlines();
            self.flush();
            self.helpers.retain(|helper| matches!(sys::wait_pidfd(helper.as_fd(), true), Ok(None)));
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let due = self.attempts.values().filter_map(Attempt::due_us).chain(self.lease_due_us()).min();
        let Some(due) = due else { return EpollTimeout::NONE };
        let left_ms = due.saturating_sub(sys::boottime_us()).div_ceil(1_000);
        EpollTimeout::try_from(i32::try_from(left_ms).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::NONE)
    }

    fn lease_due_us(&self) -> Option<u64> {
        let fenced = self
            .attempts
            .values()
            .any(|attempt| attempt.exclusive && matches!(&attempt.stage, Stage::Live(live) if live.ending.is_none()));
        fenced.then(|| self.lease.deadline_ms().saturating_mul(1_000))
    }

    /// Ends all that runs: with its own grace, or at most with this one.
    fn end_all(&mut self, grace_max_ms: u64) {
        self.stopping = true;
        let keys: Vec<AttemptKey> = self.attempts.keys().copied().collect();
        for key in keys {
            let grace = self.attempts.get(&key).map_or(0, |attempt| attempt.grace_ms.min(grace_max_ms));
            self.end(key, Reason::Stopped, grace);
        }
    }

    // --- The agent.

    fn accept(&mut self) {
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
            self.agent = Some(Agent { socket, greeted: false, queue: VecDeque::new(), wants_write: false });
        }
    }

    fn drop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.unwatch(agent.socket.as_fd());
        }
    }

    fn hear_agent(&mut self) {
        // Bounded, so that a flood of requests does not delay deadlines.
        for _ in 0..256 {
            let Some(agent) = &self.agent else { return };
            match socket::receive::<Request>(agent.socket.as_fd(), &mut self.buffer) {
                Ok(Received::Message(request, descriptors)) => self.obey(request, descriptors),
                Ok(Received::Nothing) => return,
                Ok(Received::Malformed(reason)) => self.deny(None, reason),
                Ok(Received::Closed) | Err(_) => return self.drop_agent(),
            }
        }
    }

    fn deny(&mut self, attempt: Option<AttemptKey>, reason: impl Into<String>) {
        self.tell(&Event::Denied { attempt, reason: reason.into() }, Vec::new());
    }

    fn tell(&mut self, event: &Event, descriptors: Vec<OwnedFd>) {
        let Some(agent) = &mut self.agent else { return };
        let Ok(packet) = socket::encode(event) else { return };
        if agent.queue.len() >= EVENTS_MAX {
            tracing::warn!("the agent does not read; its connection is dropped");
            return self.drop_agent();
        }
        agent.queue.push_back((packet, descriptors));
    }

    fn flush(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        while let Some((packet, descriptors)) = agent.queue.front() {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|fd| fd.as_fd()).collect();
            match socket::send(agent.socket.as_fd(), packet, &borrowed) {
                Ok(()) => {
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
            Request::RenewLease { deadline_boottime_ms } => self.lease.extend(deadline_boottime_ms),
            Request::Poweroff => self.power_off(),
        }
    }

    fn greet(&mut self, version: u16) {
        if version != PROTOCOL_VERSION {
            return self.deny(None, format!("this spawner speaks protocol {PROTOCOL_VERSION}, not {version}"));
        }
        if let Some(agent) = &mut self.agent {
            agent.greeted = true;
        }
        let welcome = Event::Welcome {
            version: PROTOCOL_VERSION,
            boot_id: self.boot_id.clone(),
            spawner_id: self.spawner_id,
            fences: self.fences.present.iter().map(|name| (*name).to_owned()).collect(),
            missing: self.fences.missing.iter().map(|(name, why)| ((*name).to_owned(), why.clone())).collect(),
            poweroff: self.policy.allow_poweroff,
        };
        self.tell(&welcome, Vec::new());
        let held: Vec<Event> = self.attempts.values().map(held).collect();
        for event in held {
            self.tell(&event, Vec::new());
        }
        self.tell(&Event::HeldAll, Vec::new());
    }

    fn attach(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get(&key) else { return self.deny(Some(key), "no such attempt is held") };
        let pipes: io::Result<Vec<OwnedFd>> =
            [&attempt.stdout, &attempt.stderr].into_iter().map(OwnedFd::try_clone).collect();
        match pipes {
            Ok(pipes) => self.tell(&Event::Attached { attempt: key }, pipes),
            Err(error) => self.deny(Some(key), error.to_string()),
        }
    }

    fn power_off(&mut self) {
        if !self.policy.allow_poweroff {
            return self.deny(None, "power-off is not allowed here: set allow_poweroff in spawner.toml");
        }
        if let Err(error) = std::process::Command::new("systemctl").arg("poweroff").spawn() {
            self.deny(None, format!("systemctl poweroff: {error}"));
        }
    }

    // --- Living and ending.

    /// Something happened to this attempt: reap its init, read what it told, see whether all is gone.
    fn look_at(&mut self, key: AttemptKey) {
        self.reap_init(key);
        // After the reaping: what an init that has ended told before is all there by then.
        self.hear_init(key);
        let Some(attempt) = self.attempts.get(&key) else { return };
        let Stage::Live(live) = &attempt.stage else { return };
        let Some(reaped) = live.reaped else { return };
        if live.group.as_ref().is_none_or(cgroup::Group::is_empty) {
            let ended = attempt.conclude(live, reaped);
            self.close(key, ended);
        }
    }

    fn reap_init(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        if live.reaped.is_some() {
            return;
        }
        if let Ok(Some(reaped)) = sys::wait_pidfd(live.pidfd.as_fd(), true) {
            live.reaped = Some(reaped);
            // A dead process stays readable for ever.
            let _not_watched = self.epoll.delete(live.pidfd.as_fd());
            if let Some(group) = &live.group {
                let _already_empty = group.kill();
            }
        }
    }

    fn close(&mut self, key: AttemptKey, ended: Ended) {
        if let Some(token) = self.token_of.remove(&key) {
            self.tokens.remove(&token);
        }
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = std::mem::replace(&mut attempt.stage, Stage::Over { ended, folder: None }) else {
            return;
        };
        if let Stage::Over { folder, .. } = &mut attempt.stage {
            *folder = live.folder;
        }
        for fd in [live.control.as_fd(), live.pidfd.as_fd()] {
            let _not_watched = self.epoll.delete(fd);
        }
        if let Some(group) = live.group {
            let _not_watched = self.epoll.delete(group.events());
            group.remove();
        }
        let event = attempt.ended_event();
        if let Some(event) = event {
            self.tell(&event, Vec::new());
        }
    }

    fn hear_init(&mut self, key: AttemptKey) {
        loop {
            let Some(attempt) = self.attempts.get_mut(&key) else { return };
            let Stage::Live(live) = &mut attempt.stage else { return };
            match status::receive(live.control.as_fd()) {
                status::Received::Status(Status::Started { boottime_us }, folder) => {
                    live.started_us = Some(boottime_us);
                    live.folder = folder;
                    let Stage::Live(live) = &attempt.stage else { return };
                    let running = attempt.running(live);
                    let pipes: io::Result<Vec<OwnedFd>> =
                        [&attempt.stdout, &attempt.stderr].into_iter().map(OwnedFd::try_clone).collect();
                    self.tell(&Event::Started { attempt: key, running }, pipes.unwrap_or_default());
                }
                status::Received::Status(Status::Failed(failure), _) => live.word = Some(Word::Failed(failure)),
                status::Received::Status(Status::Ended { raw_status, told, boottime_us }, _) => {
                    live.word = Some(Word::Own { raw_status, told });
                    live.ended_us = Some(boottime_us);
                }
                status::Received::Status(Status::LeaseEnded { .. }, _) => {
                    live.ending = live.ending.or(Some(Reason::LeaseEnded))
                }
                status::Received::Nothing | status::Received::Closed => return,
            }
        }
    }

    /// SIGTERM, the grace, then everything. A second order may only shorten the grace.
    fn end(&mut self, key: AttemptKey, reason: Reason, grace_ms: u64) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        let kill_at = sys::boottime_us().saturating_add(grace_ms.saturating_mul(1_000));
        live.kill_at_us = Some(live.kill_at_us.map_or(kill_at, |earlier| earlier.min(kill_at)));
        if live.ending.is_none() {
            live.ending = Some(reason);
            let _init_is_gone = nix::unistd::write(&live.control, &[status::TERMINATE]);
        }
        if grace_ms == 0 {
            self.kill(key);
        }
    }

    fn kill(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        live.kill_at_us = None;
        if let Some(group) = &live.group {
            let _empty = group.kill();
        }
        // Pid 1 takes its whole namespace with it.
        let _gone = sys::signal_pidfd(live.pidfd.as_fd(), libc::SIGKILL);
    }

    fn meet_deadlines(&mut self) {
        let now = sys::boottime_us();
        let due: Vec<(AttemptKey, u64)> = self
            .attempts
            .values()
            .filter(|attempt| attempt.due_us().is_some_and(|due| due <= now))
            .map(|attempt| (attempt.key, attempt.grace_ms))
            .collect();
        for (key, grace_ms) in due {
            let killing = matches!(self.attempts.get(&key).map(|attempt| &attempt.stage), Some(Stage::Live(live)) if live.kill_at_us.is_some_and(|at| at <= now));
            if killing {
                self.kill(key);
            } else {
                self.end(key, Reason::TimedOut, grace_ms);
            }
        }
        if self.lease_due_us().is_some_and(|due| due <= now) {
            let fenced: Vec<AttemptKey> =
                self.attempts.values().filter(|attempt| attempt.exclusive).map(|attempt| attempt.key).collect();
            for key in fenced {
                self.end(key, Reason::LeaseEnded, crate::sandbox::lease::TERM_MS);
            }
        }
    }

    fn forget(&mut self, key: AttemptKey) {
        match self.attempts.get(&key).map(|attempt| &attempt.stage) {
            Some(Stage::Over { .. }) => {}
            Some(Stage::Live(_)) => return self.deny(Some(key), "it is not over"),
            None => return,
        }
        let Some(attempt) = self.attempts.remove(&key) else { return };
        if let Some(uid) = attempt.identity {
            self.uids_taken.remove(&uid);
        }
        if let Some(folder) = attempt.folder_on_disk {
            // Mostly it is empty; only a tree is worth a child.
            if fs::remove_dir(&folder).is_err() {
                self.helpers.extend(remove_in_child(&folder));
            }
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

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Off the loop: a large tree takes time.
fn remove_in_child(folder: &Path) -> Option<OwnedFd> {
    // SAFETY: one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(0, None) } {
        Ok(Cloned::Child) => sys::exit_now(i32::from(fs::remove_dir_all(folder).is_err())),
        Ok(Cloned::Parent { pidfd, .. }) => Some(pidfd),
        Err(_) => None,
    }
}
