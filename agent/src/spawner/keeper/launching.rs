//! From an order to a clone: checked, recorded, granted its fences, and let go on only when all is in place.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use nix::{fcntl::OFlag, sys::epoll::EpollFlags};

use super::{Keeper, set_nonblocking, spares::Folder};
use crate::{
    sandbox::{
        cgroup,
        fences::{Fence, FenceSet},
        init::{self, Blueprint},
        mounts::Template,
        order::{self, Strings},
        status::{Failure, Step},
        sys::{self, Cloned},
    },
    spawner::{
        attempt::{Attempt, Live, PendingOrder, Stage, Word},
        protocol::{AttemptKey, Ended, Limits, START_BYTES_MAX, Start, StartPhases, Usage, Verdict},
        sandbox::{Before, Made, Owner, Sandbox, Shape, between},
        socket,
    },
};

impl Keeper {
    pub(super) fn start(&mut self, mut start: Start, descriptors: Vec<OwnedFd>) {
        let key = start.attempt;
        if let Err(reason) = self.check(&start, &descriptors) {
            return self.deny(Some(key), reason);
        }
        self.name_notice(&mut start);
        // Recorded before the clone: an id that may have run is never run again (FL-4).
        let attempts = &self.attempts;
        let is_held = |(job, task)| {
            let of_task = |number, term| AttemptKey { job, task, number, term };
            attempts.range(of_task(0, 0)..=of_task(u32::MAX, u64::MAX)).next().is_some()
        };
        if !self.accepted.insert(key, is_held) {
            return self.deny(Some(key), "this attempt was accepted before");
        }
        let requested_us = sys::boottime_us();
        let refused = if self.stopping || self.leaving.is_some() {
            Some(("spawner", "this spawner is stopping".to_owned()))
        } else if self.policy.allows(start.profile) {
            self.fences.lacking(&start).or_else(|| self.too_weak(&start))
        } else {
            Some(("profile", "spawner.toml does not allow so weak a profile".to_owned()))
        };
        // Its inputs may have taken the agent longer than the lease: the task may be placed elsewhere by now (FL-3).
        let too_late = start.exclusive && self.lease.deadline_us() <= requested_us;
        let verdict = match refused {
            Some((fence, reason)) => Verdict::Refused { fence: fence.to_owned(), reason },
            None if too_late => Verdict::LeaseEnded,
            None => match self.launch(&start, descriptors, requested_us) {
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

    /// What a job can do without is the job's word; how weak it may be here is the owner's.
    fn too_weak(&self, start: &Start) -> Option<(&'static str, String)> {
        let has: std::collections::BTreeSet<&str> = self.fences.granted(start).names().collect();
        let fence = self.policy.misses(|name| has.contains(name))?;
        let reason = "a job without it is weaker than the weakest_profile of spawner.toml; may_lack can name what this host lacks";
        Some((fence, reason.to_owned()))
    }

    fn check(&self, start: &Start, descriptors: &[OwnedFd]) -> Result<(), String> {
        start.check(descriptors.len())?;
        if self.attempts.len() >= self.policy.attempts_max {
            return Err(format!("{} attempts are held already", self.attempts.len()));
        }
        Ok(())
    }

    fn keep_never_ran(&mut self, start: Start, verdict: Verdict) {
        let ended = Ended {
            verdict,
            usage: Usage::default(),
            wall_ms: 0,
            fences: Vec::new(),
            start_us: 0,
            phases: StartPhases::default(),
        };
        let attempt = Attempt {
            key: start.attempt,
            owner: Owner::of(&start),
            note: start.note,
            grace_ms: 0,
            time_limit_ms: 0,
            identity: None,
            fences: Vec::new(),
            pipes: Vec::new(),
            requested_us: 0,
            folder_on_disk: None,
            timer_us: None,
            stage: Stage::Over { ended, folder: None },
        };
        let event = attempt.ended_event();
        self.attempts.insert(start.attempt, attempt);
        if let Some(event) = event {
            self.tell(&event, Vec::new());
        }
    }

    /// All or nothing: what a start that failed had taken is given back.
    fn launch(&mut self, start: &Start, descriptors: Vec<OwnedFd>, requested_us: u64) -> io::Result<()> {
        let shape = self.shape_of(start);
        let order = pending_order(start, descriptors)?;
        let owner = Owner::of(start);
        let spare = self.take_spare(&owner, shape, start.limits);
        let prepared = spare.is_some();
        let mut sandbox = match spare {
            Some(sandbox) => sandbox,
            None => {
                let (network, folder) = self.left_by(shape, &owner);
                self.make(shape, network, folder, &start.limits)?
            }
        };
        let began_us = sys::boottime_us();
        if let (Some(cgroups), Some(group)) = (&self.cgroups, &mut sandbox.group)
            && let Err(error) = cgroups.limit(group, &start.limits)
        {
            sys::end_and_reap(sandbox.pidfd.as_fd());
            self.discard(sandbox);
            return Err(error);
        }
        let limits_us = between(began_us, sys::boottime_us());
        let made = sandbox.made;
        let phases = StartPhases {
            prepared,
            cgroup_us: if prepared { limits_us } else { made.cgroup_us + limits_us },
            clone_us: if prepared { 0 } else { made.clone_us },
            ..StartPhases::default()
        };
        self.keep(start, sandbox, order, phases, requested_us);
        if prepared {
            self.hand_over(start.attempt);
        }
        Ok(())
    }

    fn keep(
        &mut self,
        start: &Start,
        mut sandbox: Sandbox,
        order: PendingOrder,
        phases: StartPhases,
        requested_us: u64,
    ) {
        let key = start.attempt;
        self.tokens.insert(sandbox.token, key);
        if start.exclusive {
            self.fenced.insert(key);
        }
        let attempt = Attempt {
            key,
            note: start.note.clone(),
            owner: Owner::of(start),
            grace_ms: start.grace_ms,
            time_limit_ms: start.time_limit_ms,
            identity: sandbox.identity,
            fences: sandbox.shape.fences.names().map(str::to_owned).collect(),
            pipes: Vec::new(),
            requested_us,
            folder_on_disk: sandbox.folder_on_disk.take(),
            timer_us: None,
            stage: Stage::Live(Box::new(Live {
                sandbox,
                order: Some(order),
                sent_us: 0,
                phases,
                started_us: None,
                ended_us: None,
                word: None,
                ending: None,
                kill_at_us: None,
                term_at_us: None,
                look_again_at_us: None,
                is_taken_over: false,
                reaped: None,
            })),
        };
        self.attempts.insert(key, attempt);
    }

    /// The sandbox is ready: its init gets the order, and the pipes, which are made only now: no other sandbox was
    /// cloned while their write ends were here.
    pub(super) fn hand_over(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        let Some(order) = live.order.take() else { return };
        if !live.phases.prepared {
            live.phases.assemble_us = live.sandbox.made.assemble_us;
        }
        live.sent_us = sys::boottime_us();
        match send_order(&order, &live.sandbox) {
            Ok(pipes) => attempt.pipes = pipes.map(Rc::new).into(),
            Err((step, error)) => {
                // Nothing of the job has run; the init's end is seen like any other.
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                live.word = Some(Word::Failed(Failure { step, errno }));
                let _already_over = sys::signal_pidfd(live.sandbox.pidfd.as_fd(), libc::SIGKILL);
            }
        }
    }

    /// What must be the same for a sandbox to serve a start.
    pub(super) fn shape_of(&self, start: &Start) -> Shape {
        let fences = self.fences.granted(start);
        Shape { fences, disk_bytes: if fences.has(Fence::RootReadonly) { start.limits.disk_bytes } else { 0 } }
    }

    /// Makes a sandbox: all or nothing. It is ready when its init says so.
    pub(super) fn make(
        &mut self,
        shape: Shape,
        network: Option<Rc<OwnedFd>>,
        left: Option<Folder>,
        limits: &Limits,
    ) -> io::Result<Sandbox> {
        let (identity, left) = match left {
            Some(Folder { uid, path }) => (Some(uid), Some(path)),
            None if self.rootless => (None, None),
            None => (Some(self.take_uid()?), None),
        };
        let token = self.new_token();
        let name = format!("s{token}");
        let folder = left.clone().unwrap_or_else(|| self.state.join("work").join(&name));
        let made = self.make_as(identity, token, &name, shape, network, (&folder, left.is_some()), limits);
        if made.is_err() {
            if let Some(uid) = identity {
                self.uids.give_back(uid);
            }
            if let Some(cgroups) = &self.cgroups {
                cgroups.remove_group(&name);
            }
            let _was_not_made = fs::remove_dir(folder);
        }
        made
    }

    /// Those of sandboxes that only wait are for a job that is there.
    fn take_uid(&mut self) -> io::Result<u32> {
        if let Some(uid) = self.uids.take() {
            return Ok(uid);
        }
        self.end_spares_now();
        let none = || io::Error::new(io::ErrorKind::QuotaExceeded, "every uid for jobs is in use");
        self.uids.take().ok_or_else(none)
    }

    #[allow(clippy::too_many_arguments, reason = "what `make` has decided")]
    fn make_as(
        &self,
        identity: Option<u32>,
        token: u64,
        name: &str,
        shape: Shape,
        network: Option<Rc<OwnedFd>>,
        (folder, is_there): (&Path, bool),
        limits: &Limits,
    ) -> io::Result<Sandbox> {
        let began_us = sys::boottime_us();
        let mut group = self.cgroups.as_ref().map(|root| root.make_group(name)).transpose()?;
        if let (Some(cgroups), Some(group)) = (&self.cgroups, &mut group) {
            cgroups.limit(group, limits)?;
        }
        let cgroup_us = between(began_us, sys::boottime_us());
        let fences = self.fences.raised(shape.fences);
        let on_disk = !fences.has(Fence::RootReadonly);
        if on_disk && !is_there {
            make_work_folder(folder, identity)?;
        }
        let folder_c = CString::new(folder.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
        let (control, init_control) = socket::pair()?;
        let blueprint = Blueprint {
            fences,
            control: init_control,
            null: self.null.as_fd(),
            identity,
            rootless: self.rootless,
            template: self.template.as_ref().filter(|_| !on_disk).map(Template::namespace),
            network: network.as_deref().map(|fd| fd.as_fd()),
            root: &self.root,
            image: &self.policy.image,
            told: &self.told,
            disk_bytes: shape.disk_bytes,
            folder: &folder_c,
            lease: self.lease.descriptor(),
            filter: &self.filter,
            landlock_abi: self.fences.landlock_abi,
            oom_protected: self.oom_protected,
        };
        // In clock ticks of the kernel's interfaces, which are hundredths of a second wherever Linux runs today.
        let pid_start_ticks = sys::boottime_us() / 10_000;
        let cloning_us = sys::boottime_us();
        // SAFETY: this process has one thread; the child leaves by exit_now.
        let (pid, pidfd) =
            match unsafe { sys::clone_process(self.flags(fences), group.as_ref().map(cgroup::Group::directory)) }? {
                Cloned::Child => sys::exit_now(init::run(&blueprint)),
                Cloned::Parent { pid, pidfd } => (pid, pidfd),
            };
        drop(blueprint);
        let clone_us = between(cloning_us, sys::boottime_us());
        if let Err(error) = self.release(pid, &pidfd, &control, fences, token) {
            sys::end_and_reap(pidfd.as_fd());
            return Err(error);
        }
        Ok(Sandbox {
            token,
            shape,
            control,
            pidfd,
            pid: pid.cast_unsigned(),
            pid_start_ticks,
            group,
            identity,
            folder: None,
            folder_on_disk: on_disk.then(|| folder.to_owned()),
            network,
            made: Made { cgroup_us, clone_us, assemble_us: 0 },
            before: Before::default(),
        })
    }

    /// Watches the init, and as an ordinary user maps its uid and lets it go on.
    fn release(&self, pid: i32, pidfd: &OwnedFd, control: &OwnedFd, fences: FenceSet, token: u64) -> io::Result<()> {
        set_nonblocking(control)?;
        self.watch(control.as_fd(), token, EpollFlags::EPOLLIN)?;
        self.watch(pidfd.as_fd(), token, EpollFlags::EPOLLIN)?;
        if self.rootless {
            if self.flags(fences) & libc::CLONE_NEWUSER != 0 {
                crate::sandbox::fences::map_own_uid(pid)?;
            }
            nix::unistd::write(control, &[order::GO])?;
        }
        Ok(())
    }

    /// The others are made by the init itself, off this thread.
    fn flags(&self, fences: FenceSet) -> i32 {
        let pid = if fences.has(Fence::NsPid) { libc::CLONE_NEWPID } else { 0 };
        if self.rootless && fences.has(Fence::NsUser) { pid | libc::CLONE_NEWUSER } else { pid }
    }
}

/// The packet for the init, and what goes beside it but for the pipes.
fn pending_order(start: &Start, descriptors: Vec<OwnedFd>) -> io::Result<PendingOrder> {
    let strings = Strings::of(start);
    let (packet, memory) = strings.order(start).encode();
    let memory = memory.map(|memory| crate::spawner_link::sealed_memfd(&memory)).transpose()?;
    Ok(PendingOrder { packet, memory, descriptors })
}

/// Returns the read ends of the job's stdout and stderr.
fn send_order(order: &PendingOrder, sandbox: &Sandbox) -> Result<[OwnedFd; order::PIPES], (Step, io::Error)> {
    let (read, write) = pipes_of(sandbox.identity).map_err(|error| (Step::Pipes, error))?;
    let beside = order.memory.iter().chain(&write).chain(&order.descriptors);
    let borrowed: Vec<BorrowedFd<'_>> = beside.map(|fd| fd.as_fd()).collect();
    socket::send(sandbox.control.as_fd(), &order.packet, &borrowed).map_err(|error| (Step::Order, error))?;
    Ok(read)
}

/// Read ends and write ends; the job's own, so that it can open /dev/stdout.
fn pipes_of(identity: Option<u32>) -> io::Result<([OwnedFd; order::PIPES], [OwnedFd; order::PIPES])> {
    let (stdout, stdout_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, stderr_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let write = [stdout_write, stderr_write];
    if let Some(uid) = identity {
        write.iter().try_for_each(|pipe| sys::change_owner_of(pipe.as_fd(), uid, uid))?;
    }
    Ok(([stdout, stderr], write))
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
