//! The upgrade in place: this process executes the next program over itself and
//! so stays the parent of all its jobs. What it holds travels in a sealed memfd,
//! descriptors stay open under their numbers.
//!
//! The next program is asked first whether it reads this state; one that does not,
//! or does not answer, leaves everything as it was.

use std::{
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{ffi::OsStringExt as _, fs::FileExt as _},
    },
    path::PathBuf,
    process::{Command, Stdio},
    rc::Rc,
    time::Duration,
};

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};

use super::{Keeper, accepted::Accepted};
use crate::{
    sandbox::{
        fences::FenceSet,
        lease::LeasePage,
        sys::{self, Reaped},
    },
    spawner::{
        attempt::{Attempt, Live, Reason, Stage, Word},
        protocol::{AttemptKey, Ended, Limits, StartPhases},
        sandbox::{Before, Made, Sandbox, Shape},
    },
};

/// Raised when a spawner would misread what another has left.
pub const STATE_VERSION: u32 = 2;
/// For the next program to say which state it reads.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Names the descriptor of the state to the next program.
pub const RESUME: &str = "--resume-fd";
/// Asks a program for [`STATE_VERSION`].
pub const ASK_VERSION: &str = "--state-version";

/// What one program of a spawner leaves to the next.
#[derive(Debug, Serialize, Deserialize)]
pub struct Held {
    spawner_id: [u8; 16],
    next_token: u64,
    accepted: Accepted,
    lease: RawFd,
    listener: RawFd,
    parent: Option<RawFd>,
    helpers: Vec<RawFd>,
    attempts: Vec<HeldAttempt>,
}

#[derive(Debug, Serialize, Deserialize)]
struct HeldAttempt {
    key: AttemptKey,
    note: Vec<u8>,
    owner: Vec<u8>,
    grace_ms: u64,
    time_limit_ms: u64,
    fenced: bool,
    identity: Option<u32>,
    fences: Vec<String>,
    pipes: Vec<RawFd>,
    requested_us: u64,
    folder_on_disk: Option<PathBuf>,
    folder: Option<RawFd>,
    stage: HeldStage,
}

#[derive(Debug, Serialize, Deserialize)]
enum HeldStage {
    Live(HeldLive),
    Over(Ended),
}

#[derive(Debug, Serialize, Deserialize)]
struct HeldLive {
    token: u64,
    control: RawFd,
    pidfd: RawFd,
    pid: u32,
    pid_start_ticks: u64,
    group: Option<(String, Option<Limits>)>,
    disk_bytes: u64,
    sent_us: u64,
    phases: StartPhases,
    started_us: Option<u64>,
    ended_us: Option<u64>,
    word: Option<Word>,
    ending: Option<Reason>,
    kill_at_us: Option<u64>,
    look_again_at_us: Option<u64>,
    reaped: Option<Reaped>,
    before: Before,
}

/// Why the next program does not take over.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot find this program's file")]
    Program(#[source] io::Error),
    #[error("{} does not say which state it reads; if it refuses this host's settings, its words are above", program.display())]
    Silent {
        program: PathBuf,
        #[source]
        source: Option<io::Error>,
    },
    #[error("{} reads state {theirs}, and this spawner leaves {STATE_VERSION}: restart it when no job runs", program.display())]
    Version { program: PathBuf, theirs: String },
    #[error("cannot hand over what is held")]
    HandOver(#[source] io::Error),
}

impl Held {
    /// Reads what the former program of this process has left behind this descriptor.
    ///
    /// # Errors
    /// It is not there, or not of this version.
    pub fn read(memory: RawFd) -> io::Result<Self> {
        // SAFETY: the former program left it open for us, and named it.
        let memory = fs::File::from(unsafe { OwnedFd::from_raw_fd(memory) });
        let length = usize::try_from(memory.metadata()?.len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length];
        memory.read_exact_at(&mut bytes, 0)?;
        let held: Self = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
        for fd in held.descriptors() {
            sys::keep_over_exec(fd, false)?;
        }
        Ok(held)
    }

    /// The socket that agents connect to.
    pub fn listener(&self) -> OwnedFd {
        // SAFETY: as in `read`; taken once.
        unsafe { OwnedFd::from_raw_fd(self.listener) }
    }

    /// The cgroups of what runs.
    pub fn groups<'a>(&'a self) -> Vec<&'a str> {
        let group = |attempt: &'a HeldAttempt| match attempt {
            HeldAttempt { stage: HeldStage::Live(live), .. } => live.group.as_ref().map(|(name, _)| name.as_str()),
            HeldAttempt { stage: HeldStage::Over(_), .. } => None,
        };
        self.attempts.iter().filter_map(group).collect()
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let mut descriptors = vec![self.lease, self.listener];
        descriptors.extend(self.parent);
        descriptors.extend(&self.helpers);
        for attempt in &self.attempts {
            descriptors.extend(&attempt.pipes);
            descriptors.extend(attempt.folder);
            if let HeldStage::Live(live) = &attempt.stage {
                descriptors.extend([live.control, live.pidfd]);
            }
        }
        descriptors
    }
}

impl Keeper {
    /// When no sandbox is half made for a job: the next program takes over, or all stays as it is.
    pub(super) fn upgrade_if_settled(&mut self) {
        let half_made = |attempt: &Attempt| matches!(&attempt.stage, Stage::Live(live) if live.order.is_some());
        if self.attempts.values().any(half_made) {
            return;
        }
        self.upgrading = false;
        let error = self.upgrade();
        tracing::error!("the upgrade did not happen, and all goes on as before: {}", crate::chain(&error));
    }

    /// Returns only if it cannot.
    fn upgrade(&mut self) -> Error {
        let program = match program() {
            Ok(program) => program,
            Err(error) => return Error::Program(error),
        };
        if let Err(error) = ask_version(&program) {
            return error;
        }
        // They are made anew by the next program; nothing of a job is in them.
        self.end_spares_now();
        for collecting in std::mem::take(&mut self.collecting).into_values() {
            sys::end_and_reap(collecting.pidfd.as_fd());
        }
        self.rubbish.clear();
        tracing::info!(program = %program.display(), attempts = self.attempts.len(), "the next program takes over");
        match self.execute(&program) {
            Ok(never) => match never {},
            Err(error) => Error::HandOver(error),
        }
    }

    fn execute(&mut self, program: &std::path::Path) -> io::Result<std::convert::Infallible> {
        let held = self.held();
        let bytes = postcard::to_stdvec(&held).map_err(io::Error::other)?;
        let memory = crate::spawner_link::sealed_memfd(&bytes)?;
        let c = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
        let mut arguments = arguments_without_resume();
        arguments.extend([RESUME.into(), memory.as_raw_fd().to_string().into()]);
        let arguments: Vec<CString> = arguments.into_iter().map(c).collect::<Result<_, _>>()?;
        let program = c(program.as_os_str().to_owned())?;
        let kept = [held.descriptors(), vec![memory.as_raw_fd()]].concat();
        let keep = |over| kept.iter().try_for_each(|fd| sys::keep_over_exec(*fd, over));
        keep(true)?;
        let errno = nix::unistd::execv(&program, &arguments).expect_err("an exec that succeeds does not return");
        keep(false)?;
        Err(errno.into())
    }

    fn held(&self) -> Held {
        Held {
            spawner_id: self.spawner_id,
            next_token: self.next_token,
            accepted: self.accepted.clone(),
            lease: self.lease.memory().as_raw_fd(),
            listener: self.listener.as_raw_fd(),
            parent: self.parent.as_ref().map(|fd| fd.as_raw_fd()),
            helpers: self.helpers.iter().map(|fd| fd.as_raw_fd()).collect(),
            attempts: self.attempts.values().map(|attempt| self.held_attempt(attempt)).collect(),
        }
    }

    fn held_attempt(&self, attempt: &Attempt) -> HeldAttempt {
        let (folder, stage) = match &attempt.stage {
            Stage::Live(live) => (live.sandbox.folder.as_ref(), HeldStage::Live(held_live(live))),
            Stage::Over { ended, folder } => (folder.as_ref(), HeldStage::Over(ended.clone())),
        };
        HeldAttempt {
            key: attempt.key,
            note: attempt.note.clone(),
            owner: attempt.owner.bytes().to_vec(),
            grace_ms: attempt.grace_ms,
            time_limit_ms: attempt.time_limit_ms,
            fenced: self.fenced.contains(&attempt.key),
            identity: attempt.identity,
            fences: attempt.fences.clone(),
            pipes: attempt.pipes.iter().map(|fd| fd.as_raw_fd()).collect(),
            requested_us: attempt.requested_us,
            folder_on_disk: attempt.folder_on_disk.clone(),
            folder: folder.map(|fd| fd.as_raw_fd()),
            stage,
        }
    }

    /// Goes on with what the former program held.
    ///
    /// # Errors
    /// A group is gone, or a descriptor is not what it was.
    pub(super) fn take_over(&mut self, held: Held) -> io::Result<()> {
        // SAFETY: the former program left these open for us, each under its number, and this is the only taker.
        let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
        self.spawner_id = held.spawner_id;
        self.next_token = held.next_token;
        self.accepted = held.accepted;
        self.lease = LeasePage::over(own(held.lease))?;
        held.helpers.into_iter().map(own).for_each(|helper| self.reap_later(helper));
        for one in held.attempts {
            let key = one.key;
            one.identity.into_iter().for_each(|uid| self.uids.keep(uid));
            if one.fenced {
                self.fenced.insert(key);
            }
            let pipes = one.pipes.into_iter().map(|fd| Rc::new(own(fd))).collect();
            let folder = one.folder.map(own);
            let stage = match one.stage {
                HeldStage::Over(ended) => Stage::Over { ended, folder },
                HeldStage::Live(live) => {
                    let group = match (&self.cgroups, &live.group) {
                        (Some(root), Some((name, limits))) => Some(root.reopen_group(name, *limits)?),
                        (None, _) | (_, None) => None,
                    };
                    let shape = Shape {
                        fences: FenceSet::named(one.fences.iter().map(String::as_str)),
                        disk_bytes: live.disk_bytes,
                    };
                    let sandbox = Sandbox {
                        token: live.token,
                        shape,
                        control: own(live.control),
                        pidfd: own(live.pidfd),
                        pid: live.pid,
                        pid_start_ticks: live.pid_start_ticks,
                        group,
                        identity: one.identity,
                        folder,
                        folder_on_disk: None,
                        network: None,
                        made: Made::default(),
                        before: live.before,
                    };
                    self.watch_sandbox(&sandbox, live.reaped.is_some())?;
                    self.tokens.insert(live.token, key);
                    Stage::Live(Box::new(Live {
                        sandbox,
                        order: None,
                        sent_us: live.sent_us,
                        phases: live.phases,
                        started_us: live.started_us,
                        ended_us: live.ended_us,
                        word: live.word,
                        ending: live.ending,
                        kill_at_us: live.kill_at_us,
                        // One that was asked to save has its time until the kill, and no SIGTERM before it.
                        term_at_us: None,
                        look_again_at_us: live.look_again_at_us,
                        is_taken_over: true,
                        reaped: live.reaped,
                    }))
                }
            };
            let attempt = Attempt {
                key,
                note: one.note,
                owner: one.owner.into(),
                grace_ms: one.grace_ms,
                time_limit_ms: one.time_limit_ms,
                identity: one.identity,
                fences: one.fences,
                pipes,
                requested_us: one.requested_us,
                folder_on_disk: one.folder_on_disk,
                stage,
                timer_us: None,
            };
            self.attempts.insert(key, attempt);
            self.retime(key);
        }
        // What happened meanwhile: an init that ended, a group that emptied.
        let keys: Vec<AttemptKey> = self.attempts.keys().copied().collect();
        keys.into_iter().for_each(|key| self.look_at(key));
        Ok(())
    }

    fn watch_sandbox(&self, sandbox: &Sandbox, reaped: bool) -> io::Result<()> {
        self.watch(sandbox.control.as_fd(), sandbox.token, EpollFlags::EPOLLIN)?;
        if !reaped {
            return self.watch(sandbox.pidfd.as_fd(), sandbox.token, EpollFlags::EPOLLIN);
        }
        match &sandbox.group {
            Some(group) => self.watch(group.events(), sandbox.token, EpollFlags::EPOLLPRI),
            None => Ok(()),
        }
    }
}

fn held_live(live: &Live) -> HeldLive {
    let sandbox = &live.sandbox;
    HeldLive {
        token: sandbox.token,
        control: sandbox.control.as_raw_fd(),
        pidfd: sandbox.pidfd.as_raw_fd(),
        pid: sandbox.pid,
        pid_start_ticks: sandbox.pid_start_ticks,
        group: sandbox.group.as_ref().and_then(|group| Some((group.name()?, group.limits()))),
        disk_bytes: sandbox.shape.disk_bytes,
        sent_us: live.sent_us,
        phases: live.phases,
        started_us: live.started_us,
        ended_us: live.ended_us,
        word: live.word,
        ending: live.ending,
        kill_at_us: live.kill_at_us,
        look_again_at_us: live.look_again_at_us,
        reaped: live.reaped,
        before: sandbox.before,
    }
}

/// The file that this process was started from, which may be another by now.
fn program() -> io::Result<PathBuf> {
    let named = std::env::args_os().next().map(PathBuf::from).filter(|name| name.is_absolute());
    if let Some(named) = named {
        return Ok(named);
    }
    let link = fs::read_link("/proc/self/exe")?.into_os_string().into_vec();
    // What was replaced is shown so; the new file has the old one's name.
    let path = link.strip_suffix(b" (deleted)").unwrap_or(&link).to_vec();
    Ok(PathBuf::from(OsString::from_vec(path)))
}

/// As this process was called, without what an earlier upgrade added.
fn arguments_without_resume() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    while let Some(at) = arguments.iter().position(|argument| argument == RESUME) {
        arguments.drain(at..(at + 2).min(arguments.len()));
    }
    arguments
}

fn ask_version(program: &std::path::Path) -> Result<(), Error> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::unix::process::CommandExt as _;
    let silent = |source| Error::Silent { program: program.to_owned(), source };
    let arguments = arguments_without_resume();
    let (name, options) =
        arguments.split_first().map_or((OsString::new(), &[][..]), |(name, rest)| (name.clone(), rest));
    // The word that says which of the programs in one file is meant, if there is one.
    let (word, options) = match options.split_first() {
        Some((word, rest)) if word == "spawner" => (Some(word), rest),
        Some(_) | None => (None, options),
    };
    let mut child = Command::new(program)
        .arg0(name)
        .args(word)
        .arg(ASK_VERSION)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What it refuses, it says where this program says it.
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| silent(Some(error)))?;
    let mut answer = [0; 16];
    let mut length = 0;
    if let Some(stdout) = &child.stdout {
        let timeout = PollTimeout::try_from(ANSWER_TIMEOUT).unwrap_or(PollTimeout::MAX);
        if matches!(poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], timeout), Ok(1..)) {
            length = nix::unistd::read(stdout, &mut answer).unwrap_or(0);
        }
    }
    let _already_over = child.kill();
    let _reaped = child.wait();
    match std::str::from_utf8(&answer[..length]).map(str::trim) {
        Ok("") | Err(_) => Err(silent(None)),
        Ok(theirs) if theirs == STATE_VERSION.to_string() => Ok(()),
        Ok(theirs) => Err(Error::Version { program: program.to_owned(), theirs: theirs.to_owned() }),
    }
}
