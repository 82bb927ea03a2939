//! From an order to a clone: checked, recorded, granted its fences, and let go on only when all is in place.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{errno::Errno, sys::epoll::EpollFlags};

use super::{Keeper, set_nonblocking};
use crate::{
    sandbox::{
        cgroup,
        init::{self, Plan},
        sys::{self, Cloned},
    },
    spawner::{
        attempt::{Attempt, Live, Stage},
        protocol::{Ended, NOTE_BYTES_MAX, START_BYTES_MAX, Start, Usage, Verdict},
        socket,
    },
};

impl Keeper {
    pub(super) fn start(&mut self, start: Start, descriptors: Vec<OwnedFd>) {
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
}

pub(super) fn read_start(descriptors: &mut Vec<OwnedFd>) -> Result<Start, String> {
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

/// Field 22 of /proc/PID/stat, after the name, which may hold anything.
fn start_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok()).unwrap_or(0)
}
