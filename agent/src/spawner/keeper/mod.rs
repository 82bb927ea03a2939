//! The keeper's loop: one thread, one epoll, no clock but the boot-time one.
//! It decides from what is: after every wake-up each attempt that something
//! happened to is looked at anew.

mod accepted;
mod ending;
mod launching;
mod leaving;
mod notice;
mod outputs;
mod spares;
mod talking;
mod uids;
mod upgrade;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        signal::Signal,
        signalfd::{SfdFlags, SigSet, SignalFd},
    },
};

use super::{
    attempt::{Attempt, Reason, Stage},
    policy::Policy,
    protocol::{AttemptKey, PACKET_BYTES_MAX},
};
use crate::sandbox::{
    cgroup,
    fences::{Fence, Fences},
    lease::LeasePage,
    mounts::Template,
    seccomp::Filter,
    sys,
};
use accepted::Accepted;
use spares::Spares;
use talking::Agent;
use uids::Uids;
pub use upgrade::{ASK_VERSION, Held, STATE_VERSION};

/// Everything that the spawner holds.
pub struct Keeper {
    pub policy: Policy,
    pub fences: Fences,
    pub cgroups: Option<cgroup::Root>,
    pub rootless: bool,
    pub agent_uid: u32,
    /// The folder in which jobs find what they may know of this host.
    told: PathBuf,
    pub state: PathBuf,
    root: CString,
    /// The common half of every strict root; none: each assembles its own.
    template: Option<Template>,
    filter: Filter,
    null: OwnedFd,
    oom_protected: bool,
    listener: OwnedFd,
    parent: Option<OwnedFd>,
    signals: SignalFd,
    epoll: Epoll,
    agent: Option<Agent>,
    attempts: BTreeMap<AttemptKey, Attempt>,
    /// Attempts that were accepted are refused the second time (FL-4).
    accepted: Accepted,
    uids: Uids,
    lease: LeasePage,
    /// Attempts that end with the lease.
    fenced: BTreeSet<AttemptKey>,
    /// What is due of each attempt, the earliest first, in microseconds of CLOCK_BOOTTIME.
    timers: BTreeSet<(u64, AttemptKey)>,
    spawner_id: [u8; 16],
    boot_id: String,
    /// Attempts by the tokens of their descriptors.
    tokens: BTreeMap<u64, AttemptKey>,
    next_token: u64,
    spares: Spares,
    collecting: BTreeMap<u64, Collecting>,
    /// What is left of sandboxes that are over: taken apart when nothing more urgent is there.
    rubbish: Vec<ending::Rubbish>,
    /// Children that remove folders, to be reaped.
    helpers: Vec<OwnedFd>,
    stopping: bool,
    /// SIGTERM: what runs may finish first.
    leaving: Option<leaving::Leaving>,
    /// SIGHUP: the next program takes over as soon as no sandbox is half made for a job.
    upgrading: bool,
    buffer: Vec<u8>,
}

/// What the keeper is built of.
pub struct Parts {
    pub policy: Policy,
    pub fences: Fences,
    pub cgroups: Option<cgroup::Root>,
    pub agent_uid: u32,
    pub state: PathBuf,
    pub root: CString,
    pub listener: OwnedFd,
    pub parent: Option<OwnedFd>,
    /// From [`hold_signals`].
    pub signals: SignalFd,
    /// What the former program of this process held.
    pub held: Option<Held>,
}

/// A child that opens outputs.
struct Collecting {
    attempt: AttemptKey,
    socket: OwnedFd,
    pidfd: OwnedFd,
}

const LISTENER: u64 = 0;
const AGENT: u64 = 1;
const PARENT: u64 = 2;
const SIGNALS: u64 = 3;
/// Of helpers: their ends are seen after every turn.
const HELPERS: u64 = 4;
const FIRST_TOKEN: u64 = 16;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// SIGTERM, and nothing runs any more.
    Terminated,
    /// The parent is gone, and nothing runs any more.
    Orphaned,
}

/// From here on a stop or an upgrade waits until somebody reads it: nothing that is made after this
/// can be left by a signal that comes too early.
///
/// # Errors
/// signalfd(2) failed.
pub fn hold_signals() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    Ok(SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

impl Keeper {
    /// # Errors
    /// A descriptor could not be made, or the common root not be assembled.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let mut spawner_id = [0; 16];
        getrandom::fill(&mut spawner_id).map_err(|error| io::Error::other(error.to_string()))?;
        let left = if parts.held.is_none() { ending::set_aside_what_is_left(&parts.state)? } else { Vec::new() };
        fs::create_dir_all(parts.state.join("work"))?;
        let rootless = !nix::unistd::geteuid().is_root();
        let can_copy_root = !rootless && parts.fences.can_raise(Fence::RootReadonly);
        let told = notice::make_folder(&parts.state, parts.held.is_some())?;
        let template = match can_copy_root.then(|| Template::build(&parts.root, &parts.policy.image, &told)).transpose()
        {
            // With jobs of the former program it goes on: each sandbox assembles its own, or fails by itself.
            Err(error) if parts.held.is_some() => {
                tracing::error!("cannot assemble the root that sandboxes share: {error}");
                None
            }
            built => built?,
        };
        let oom_score = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let mut keeper = Self {
            rootless,
            template,
            filter: Filter::strict(),
            null: fs::OpenOptions::new().read(true).open("/dev/null")?.into(),
            oom_protected: oom_score.starts_with('-'),
            spares: Spares::new(&parts.policy),
            uids: Uids::new(parts.policy.uid_first, parts.policy.uid_last),
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
            policy: parts.policy,
            fences: parts.fences,
            cgroups: parts.cgroups,
            agent_uid: parts.agent_uid,
            told,
            state: parts.state,
            root: parts.root,
            listener: parts.listener,
            parent: parts.parent,
            signals: parts.signals,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            agent: None,
            attempts: BTreeMap::new(),
            accepted: Accepted::default(),
            lease: LeasePage::new()?,
            fenced: BTreeSet::new(),
            timers: BTreeSet::new(),
            spawner_id,
            tokens: BTreeMap::new(),
            next_token: FIRST_TOKEN,
            collecting: BTreeMap::new(),
            rubbish: Vec::new(),
            helpers: Vec::new(),
            stopping: false,
            leaving: None,
            upgrading: false,
            buffer: vec![0; PACKET_BYTES_MAX],
        };
        keeper.watch(keeper.listener.as_fd(), LISTENER, EpollFlags::EPOLLIN)?;
        keeper.watch(keeper.signals.as_fd(), SIGNALS, EpollFlags::EPOLLIN)?;
        if let Some(parent) = &keeper.parent {
            keeper.watch(parent.as_fd(), PARENT, EpollFlags::EPOLLIN)?;
        }
        if let Some(held) = parts.held {
            keeper.take_over(held)?;
        }
        left.iter().for_each(|folder| keeper.remove_folder(Some(folder)));
        Ok(keeper)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64, flags: EpollFlags) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token))?)
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _not_watched = self.epoll.delete(fd);
    }

    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Runs until told to end and nothing is left.
    ///
    /// # Errors
    /// epoll itself failed.
    pub fn run(&mut self) -> io::Result<Farewell> {
        let mut farewell = Farewell::Terminated;
        let mut events = [EpollEvent::empty(); 64];
        self.expect_the_usual();
        loop {
            if self.stopping && self.is_empty() && self.may_go() {
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
                    // Before an upgrade nothing new begins: what is asked waits in the socket, or is asked again.
                    AGENT if self.upgrading => {}
                    AGENT => self.hear_agent(),
                    PARENT => {
                        farewell = Farewell::Orphaned;
                        self.end_all(0);
                        if let Some(parent) = self.parent.take() {
                            self.unwatch(parent.as_fd());
                        }
                    }
                    SIGNALS => self.hear_signals(),
                    HELPERS => {}
                    token if self.collecting.contains_key(&token) => self.hear_collector(token),
                    token => match self.tokens.get(&token).copied() {
                        Some(key) => self.look_at(key),
                        None => self.look_at_spare(token),
                    },
                }
            }
            self.meet_deadlines();
            self.pursue_leaving();
            // The agent first: what it hears may bring the next job while we tidy up and make ready.
            self.flush();
            if self.upgrading && !self.stopping {
                self.upgrade_if_settled();
            }
            // Making one takes as long as a short job: it waits for a quiet moment while others are ready.
            if ready == 0 || self.spares.is_short() {
                self.prepare_one();
            }
            let useless = self.spares.useless();
            if useless > 0 && (ready == 0 || useless > USELESS_MAX) {
                self.spares.end_useless();
            }
            if ready == 0 || self.rubbish.len() > RUBBISH_MAX {
                self.rubbish.clear();
            }
            self.helpers.retain(|helper| matches!(sys::wait_pidfd(helper.as_fd(), true), Ok(None)));
        }
    }

    /// A child that works for us and needs no answer: it is waited for when it ends, which may be later than the next event.
    fn reap_later(&mut self, helper: OwnedFd) {
        // Not watched it is reaped all the same, at some later turn.
        let _watched = self.watch(helper.as_fd(), HELPERS, EpollFlags::EPOLLIN);
        self.helpers.push(helper);
    }

    fn hear_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo.cast_signed() != libc::SIGHUP {
                self.on_terminate();
            } else if self.leaving.is_none() {
                self.upgrading = true;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.spares.is_empty() && !self.attempts.values().any(|attempt| matches!(attempt.stage, Stage::Live(_)))
    }

    fn timeout(&self) -> EpollTimeout {
        if self.spares.is_short() {
            return EpollTimeout::ZERO;
        }
        let now = sys::boottime_us();
        let untidy = self.spares.wants_one() || self.spares.useless() > 0 || !self.rubbish.is_empty();
        let quiet = untidy.then_some(now + QUIET_MS * 1_000);
        let attempt = self.timers.first().map(|(due, _)| *due);
        let due = attempt
            .into_iter()
            .chain(self.lease_due_us())
            .chain(self.spares.due_us())
            .chain(self.leaving_due_us())
            .chain(quiet)
            .min();
        let Some(due) = due else { return EpollTimeout::NONE };
        let left_ms = due.saturating_sub(now).div_ceil(1_000);
        EpollTimeout::try_from(i32::try_from(left_ms).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::NONE)
    }

    /// Puts what is due of an attempt in its place among the timers; after every change of it.
    fn retime(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let due = attempt.due_us();
        if due == attempt.timer_us {
            return;
        }
        if let Some(before) = attempt.timer_us.take() {
            self.timers.remove(&(before, key));
        }
        attempt.timer_us = due;
        self.timers.extend(due.map(|due| (due, key)));
    }

    fn lease_due_us(&self) -> Option<u64> {
        (!self.fenced.is_empty()).then(|| self.lease.deadline_us())
    }

    /// Ends all that runs: with its own grace, or at most with this one.
    fn end_all(&mut self, grace_max_ms: u64) {
        self.stopping = true;
        self.end_spares();
        let keys: Vec<AttemptKey> = self.attempts.keys().copied().collect();
        for key in keys {
            let grace = self.attempts.get(&key).map_or(0, |attempt| attempt.grace_ms.min(grace_max_ms));
            self.end(key, Reason::Stopped, grace);
        }
    }
}

/// So long without an event, and there is time to tidy up and to make ready: longer than a short job takes, which
/// this would disturb on a small host.
const QUIET_MS: u64 = 3;
/// Sandboxes ended later at most: each is a process and holds a uid.
const USELESS_MAX: usize = 8;
/// Sandboxes taken apart later at most: each holds descriptors.
const RUBBISH_MAX: usize = 64;

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}
