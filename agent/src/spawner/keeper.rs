//! The keeper's loop: one thread, one epoll, no clock but the boot-time one.
//! It decides from what is: after every wake-up each attempt that something
//! happened to is looked at anew.

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
    attempt::{Attempt, Live, Reason, Stage, Word},
    policy::Policy,
    protocol::{
        AttemptKey, Collected, Ended, Event, NOTE_BYTES_MAX, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase, Request,
        START_BYTES_MAX, Start, Usage, Verdict,
    },
    socket::{self, Received},
};
use crate::sandbox::{
    cgroup,
    fences::Fences,
    files,
    init::{self, Plan},
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
            Request::StartInMemory => match read_start(&mut descriptors) {
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

    // --- Starting.

    fn start(&mut self, start: Start, descriptors: Vec<OwnedFd>) {
        let key = start.attempt;
        if let Err(reason) = self.check(&start, &descriptors) {
            return self.deny(Some(key), reason);
        }
        // Recorded before the clone: an id that may have run is never run again (FL-4).
        if !self.accepted.insert(key) {
            return self.deny(Some(key), "this attempt was accepted before");
        }
        let requested_us = sys::boottime_us();
        let refused = if self.stopping {
            Some(("spawner", "this spawner is stopping".to_owned()))
        } else if self.policy.allows(start.profile) {
            self.fences.lacking(&start)
        } else {
            Some(("profile", "spawner.toml does not allow so weak a profile".to_owned()))
        };
        let verdict = match refused {
            Some((fence, reason)) => Verdict::Refused { fence: fence.to_owned(), reason },
            None => match self.launch(&start, &descriptors, requested_us) {
                Ok(()) => return,
                // The host's shortage, not the job's fault: it is tried elsewhere or again.
                Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => {
                    Verdict::Refused { fence: "uid.own".to_owned(), reason: error.to_string() }
                }
                Err(error) => {
                    Verdict::StartFailed { step: "clone".into(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
                }
            },
        };
        self.keep_never_ran(start, verdict);
    }

    fn check(&self, start: &Start, descriptors: &[OwnedFd]) -> Result<(), String> {
        let missing = |index: u8| usize::from(index) >= descriptors.len();
        if start.arguments.is_empty() || start.arguments[0].is_empty() {
            return Err("there is no program to run".into());
        }
        let nul = |bytes: &Vec<u8>| bytes.contains(&0);
        if start.arguments.iter().any(nul)
            || start.environment.iter().any(|(name, value)| nul(name) || nul(value) || name.contains(&b'='))
        {
            return Err("an argument or variable has a NUL byte, or a name has `=`".into());
        }
        if start.attempt.task == u32::MAX || start.attempt.number == 0 {
            return Err("its task or attempt number is out of range".into());
        }
        if start.note.len() > NOTE_BYTES_MAX {
            return Err(format!("the note has more than {NOTE_BYTES_MAX} bytes"));
        }
        if start.stdin.is_some_and(missing) || start.inputs.iter().any(|input| missing(input.descriptor)) {
            return Err("a descriptor that it names is not beside it".into());
        }
        let escapes =
            |path: &[u8]| path.starts_with(b"/") || path.split(|byte| *byte == b'/').any(|part| part == b"..");
        if escapes(&start.working_folder)
            || start.inputs.iter().any(|input| input.path.is_empty() || escapes(&input.path))
        {
            return Err("a path leaves the working folder".into());
        }
        if self.attempts.len() >= self.policy.attempts_max {
            return Err(format!("{} attempts are held already", self.attempts.len()));
        }
        Ok(())
    }

    fn keep_never_ran(&mut self, start: Start, verdict: Verdict) {
        let Ok((stdout, _)) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC) else { return };
        let Ok(stderr) = stdout.try_clone() else { return };
        let ended = Ended { verdict, usage: Usage::default(), wall_ms: 0, fences: Vec::new(), start_us: 0 };
        let attempt = Attempt {
            key: start.attempt,
            note: start.note,
            grace_ms: 0,
            time_limit_ms: 0,
            exclusive: false,
            identity: None,
            fences: Vec::new(),
            stdout,
            stderr,
            requested_us: 0,
            folder_on_disk: None,
            stage: Stage::Over { ended, folder: None },
        };
        let event = attempt.ended_event();
        self.attempts.insert(start.attempt, attempt);
        if let Some(event) = event {
            self.tell(&event, Vec::new());
        }
    }

    /// All or nothing: what a start that failed had taken is given back.
    fn launch(&mut self, start: &Start, descriptors: &[OwnedFd], requested_us: u64) -> io::Result<()> {
        let key = start.attempt;
        let name = format!("{}.{}.{}.{}", key.job, key.task, key.number, key.term);
        let identity = if self.rootless { None } else { Some(self.take_uid()?) };
        let launched = self.launch_as(identity, &name, start, descriptors, requested_us);
        if launched.is_err() {
            if let Some(uid) = identity {
                self.uids_taken.remove(&uid);
            }
            if let Some(cgroups) = &self.cgroups {
                cgroups.remove_group(&name);
            }
            let _was_not_made = fs::remove_dir(self.state.join("work").join(&name));
        }
        launched
    }

    fn launch_as(
        &mut self,
        identity: Option<u32>,
        name: &str,
        start: &Start,
        descriptors: &[OwnedFd],
        requested_us: u64,
    ) -> io::Result<()> {
        let key = start.attempt;
        let fences = self.fences.granted(start);
        let group = self.cgroups.as_ref().map(|root| root.make_group(name, &start.limits)).transpose()?;
        let on_disk = !fences.contains(&"root.readonly");
        let folder = self.state.join("work").join(name);
        if on_disk {
            make_work_folder(&folder, identity)?;
        }
        let folder_c = CString::new(folder.clone().into_os_string().into_encoded_bytes()).map_err(io::Error::other)?;
        let cloexec = nix::fcntl::OFlag::O_CLOEXEC;
        let (stdout, stdout_write) = nix::unistd::pipe2(cloexec)?;
        let (stderr, stderr_write) = nix::unistd::pipe2(cloexec)?;
        if let Some(uid) = identity {
            // So that a job can open /dev/stdout.
            for pipe in [&stdout_write, &stderr_write] {
                sys::change_owner_of(pipe.as_fd(), uid, uid)?;
            }
        }
        let stdin = match start.stdin.and_then(|index| descriptors.get(usize::from(index))) {
            Some(fd) => fd.try_clone()?,
            None => fs::File::open("/dev/null")?.into(),
        };
        let (control, init_control) = socket::pair()?;
        let plan = Plan {
            start,
            descriptors,
            control: init_control,
            standard: [stdin.as_raw_fd(), stdout_write.as_raw_fd(), stderr_write.as_raw_fd()],
            identity,
            fences: &fences,
            root: &self.root,
            folder: &folder_c,
            lease: start.exclusive.then(|| self.lease.descriptor()),
        };
        // SAFETY: this process has one thread; the child leaves by exit_now.
        let (pid, pidfd) =
            match unsafe { sys::clone_process(self.flags(&fences), group.as_ref().map(cgroup::Group::directory)) }? {
                Cloned::Child => sys::exit_now(init::run(&plan)),
                Cloned::Parent { pid, pidfd } => (pid, pidfd),
            };
        drop(plan);
        let token = self.next_token;
        self.next_token += 1;
        if let Err(error) = self.release(pid, &pidfd, &control, group.as_ref(), &fences, token) {
            end_and_reap(&pidfd);
            return Err(error);
        }
        self.tokens.insert(token, key);
        self.token_of.insert(key, token);
        let live = Live {
            control,
            pidfd,
            pid: pid.cast_unsigned(),
            pid_start_ticks: start_ticks(pid),
            group,
            folder: None,
            started_us: None,
            ended_us: None,
            word: None,
            ending: None,
            kill_at_us: None,
            reaped: None,
        };
        let attempt = Attempt {
            key,
            note: start.note.clone(),
            grace_ms: start.grace_ms,
            time_limit_ms: start.time_limit_ms,
            exclusive: start.exclusive,
            identity,
            fences: fences.iter().map(|name| (*name).to_owned()).collect(),
            stdout,
            stderr,
            requested_us,
            folder_on_disk: on_disk.then_some(folder),
            stage: Stage::Live(Box::new(live)),
        };
        self.attempts.insert(key, attempt);
        Ok(())
    }

    /// Maps the init's uid, watches it, and lets it go on.
    fn release(
        &self,
        pid: i32,
        pidfd: &OwnedFd,
        control: &OwnedFd,
        group: Option<&cgroup::Group>,
        fences: &[&str],
        token: u64,
    ) -> io::Result<()> {
        if self.rootless && fences.contains(&"ns.pid") {
            crate::sandbox::fences::map_own_uid(pid)?;
        }
        set_nonblocking(control)?;
        self.watch(control.as_fd(), token, EpollFlags::EPOLLIN)?;
        self.watch(pidfd.as_fd(), token, EpollFlags::EPOLLIN)?;
        if let Some(group) = group {
            self.watch(group.events(), token, EpollFlags::EPOLLPRI)?;
        }
        nix::unistd::write(control, b"G")?;
        Ok(())
    }

    fn flags(&self, fences: &[&str]) -> i32 {
        let namespaces = crate::sandbox::fences::NAMESPACES
            .iter()
            .filter(|(name, _)| fences.contains(name))
            .fold(0, |flags, (_, flag)| flags | flag);
        if self.rootless && namespaces != 0 { namespaces | libc::CLONE_NEWUSER } else { namespaces }
    }

    fn take_uid(&mut self) -> io::Result<u32> {
        let range = self.policy.uid_first..=self.policy.uid_last;
        let free = range.into_iter().find(|uid| !self.uids_taken.contains(uid));
        let uid = free.ok_or_else(|| io::Error::new(io::ErrorKind::QuotaExceeded, "every uid for jobs is in use"))?;
        self.uids_taken.insert(uid);
        Ok(uid)
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

    // --- Outputs.

    fn collect(&mut self, key: AttemptKey, paths: Vec<Vec<u8>>, bytes_max: u64) {
        let Some(Attempt { stage: Stage::Over { folder, .. }, identity, .. }) = self.attempts.get(&key) else {
            return self.deny(Some(key), "outputs are collected when it is over");
        };
        let Some(folder) = folder else {
            let files = paths.into_iter().map(|path| (path, Collected::Skipped { reason: "missing".into() })).collect();
            return self.tell(&Event::Outputs { attempt: key, files, last: true }, Vec::new());
        };
        match collect_in_child(folder.as_fd(), *identity, &paths, bytes_max) {
            Ok((socket, pidfd)) => {
                let token = self.next_token;
                self.next_token += 1;
                if self.watch(socket.as_fd(), token, EpollFlags::EPOLLIN).is_ok() {
                    self.collecting.insert(token, Collecting { attempt: key, socket, pidfd, left: paths.len() });
                }
            }
            Err(error) => self.deny(Some(key), format!("outputs: {error}")),
        }
    }

    fn hear_collector(&mut self, token: u64) {
        loop {
            let Some(collecting) = self.collecting.get_mut(&token) else { return };
            let attempt = collecting.attempt;
            match socket::receive::<(Vec<u8>, Collected)>(collecting.socket.as_fd(), &mut self.buffer) {
                Ok(Received::Message(file, descriptors)) => {
                    collecting.left = collecting.left.saturating_sub(1);
                    self.tell(&Event::Outputs { attempt, files: vec![file], last: false }, descriptors);
                }
                Ok(Received::Nothing) => return,
                Ok(Received::Malformed(_) | Received::Closed) | Err(_) => {
                    if let Some(done) = self.collecting.remove(&token) {
                        self.unwatch(done.socket.as_fd());
                        let _reaped = sys::signal_pidfd(done.pidfd.as_fd(), libc::SIGKILL);
                        let _reaped = sys::wait_pidfd(done.pidfd.as_fd(), true);
                    }
                    self.tell(&Event::Outputs { attempt, files: Vec::new(), last: true }, Vec::new());
                    return;
                }
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

fn read_start(descriptors: &mut Vec<OwnedFd>) -> Result<Start, String> {
    if descriptors.is_empty() {
        return Err("there is no memory beside it".into());
    }
    let memory = fs::File::from(descriptors.remove(0));
    // Only a sealed memfd: a file on a hung mount would hold up every deadline.
    let seals = nix::fcntl::fcntl(&memory, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap_or(0);
    if seals & libc::F_SEAL_WRITE == 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err("it is not in a sealed memfd".into());
    }
    let length = memory.metadata().map_err(|error| error.to_string())?.len();
    if length > START_BYTES_MAX as u64 {
        return Err(format!("a start has at most {START_BYTES_MAX} bytes"));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|error| error.to_string())?];
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, 0).map_err(|error| error.to_string())?;
    postcard::from_bytes(&bytes).map_err(|error| error.to_string())
}

fn make_work_folder(folder: &Path, identity: Option<u32>) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().mode(0o700).create(folder)?;
    if let Some(uid) = identity {
        std::os::unix::fs::chown(folder, Some(uid), Some(uid))?;
    }
    Ok(())
}

/// An init that was not let go on: nothing of a job runs in it, so it ends at once.
fn end_and_reap(pidfd: &OwnedFd) {
    let _already_over = sys::signal_pidfd(pidfd.as_fd(), libc::SIGKILL);
    let mut polls = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
    while nix::poll::poll(&mut polls, nix::poll::PollTimeout::NONE) == Err(Errno::EINTR) {}
    let _reaped = sys::wait_pidfd(pidfd.as_fd(), true);
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Field 22 of /proc/PID/stat, after the name, which may hold anything.
fn start_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok()).unwrap_or(0)
}

/// A child with the job's uid opens the files and passes them over.
fn collect_in_child(
    folder: BorrowedFd<'_>,
    identity: Option<u32>,
    paths: &[Vec<u8>],
    bytes_max: u64,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socket::pair()?;
    // SAFETY: one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(0, None) }? {
        Cloned::Child => {
            if let Some(uid) = identity
                && sys::become_identity(uid, uid).is_err()
            {
                sys::exit_now(1);
            }
            for path in paths {
                let (collected, file) = files::open_output(folder, path, bytes_max);
                let borrowed: Vec<BorrowedFd<'_>> = file.iter().map(|fd| fd.as_fd()).collect();
                let sent = socket::encode(&(path, collected))
                    .and_then(|packet| socket::send(theirs.as_fd(), &packet, &borrowed));
                if sent.is_err() {
                    sys::exit_now(1);
                }
            }
            sys::exit_now(0)
        }
        Cloned::Parent { pidfd, .. } => {
            drop(theirs);
            set_nonblocking(&ours)?;
            Ok((ours, pidfd))
        }
    }
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
