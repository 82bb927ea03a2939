//! The named fences: which a profile asks for, which this host can raise.
//! Probed once, by really trying, so that no start finds out (FL-13).

use std::{
    collections::BTreeSet,
    os::fd::{AsFd as _, OwnedFd},
};

use muster_core::fence;

use super::{
    cgroup, landlock, mounts,
    seccomp::Filter,
    sys::{self, Cloned},
};
use crate::spawner::protocol::{Network, Profile, Start};

/// One named wall between a job and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fence {
    /// Its processes see and signal only each other.
    NsPid,
    /// Its mounts are its own.
    NsMount,
    /// System V IPC and message queues.
    NsIpc,
    /// The host name.
    NsUts,
    /// Network devices, addresses, ports, abstract sockets.
    NsNet,
    /// The cgroup tree begins at its own group.
    NsCgroup,
    /// Capabilities that it could ever gain count for nothing on the host.
    NsUser,
    /// The host's programs, read-only, and nothing else of its files.
    RootReadonly,
    /// /proc shows its own processes only, and no setting of the kernel.
    ProcSubset,
    /// A uid that no other live sandbox has.
    UidOwn,
    /// No capability in any set.
    CapsNone,
    /// An exec gains nothing.
    NoNewPrivs,
    /// Only listed system calls.
    Seccomp,
    /// Writes only below its private folders; no signal or abstract socket leaves it.
    Landlock,
    /// Resource limits of each process.
    Rlimits,
    /// Nothing is inherited but stdin, stdout and stderr.
    Descriptors,
    /// A session without a terminal.
    Session,
    /// A keyring of its own.
    Keyring,
    /// Pid 1 of the sandbox cannot be read or traced.
    Dumpable,
    /// cpu.max.
    LimitsCpu,
    /// memory.max, without swap, ended as a whole.
    LimitsMemory,
    /// pids.max.
    LimitsPids,
    /// io.max, as `spawner.toml` says.
    LimitsIo,
    /// The size of its private folders.
    LimitsDisk,
    /// Ended as a whole by cgroup.kill.
    KillCgroup,
    /// Ended as a whole with pid 1 of its namespace.
    KillPidns,
    /// Ended when the node's lease ends, also without agent and spawner.
    LeaseTimer,
}

/// All, in the order of their numbers in a [`FenceSet`].
pub const FENCES: [(Fence, &str); 27] = [
    (Fence::NsPid, "ns.pid"),
    (Fence::NsMount, "ns.mount"),
    (Fence::NsIpc, "ns.ipc"),
    (Fence::NsUts, "ns.uts"),
    (Fence::NsNet, "ns.net"),
    (Fence::NsCgroup, "ns.cgroup"),
    (Fence::NsUser, "ns.user"),
    (Fence::RootReadonly, "root.readonly"),
    (Fence::ProcSubset, "proc.subset"),
    (Fence::UidOwn, "uid.own"),
    (Fence::CapsNone, "caps.none"),
    (Fence::NoNewPrivs, "no_new_privs"),
    (Fence::Seccomp, "seccomp"),
    (Fence::Landlock, "landlock"),
    (Fence::Rlimits, "rlimits"),
    (Fence::Descriptors, "descriptors"),
    (Fence::Session, "session"),
    (Fence::Keyring, "keyring"),
    (Fence::Dumpable, "dumpable"),
    (Fence::LimitsCpu, "limits.cpu"),
    (Fence::LimitsMemory, "limits.memory"),
    (Fence::LimitsPids, "limits.pids"),
    (Fence::LimitsIo, "limits.io"),
    (Fence::LimitsDisk, "limits.disk"),
    (Fence::KillCgroup, "kill.cgroup"),
    (Fence::KillPidns, "kill.pidns"),
    (Fence::LeaseTimer, "lease.timer"),
];

/// Fences as bits: the key by which prepared sandboxes are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FenceSet(u32);

impl FenceSet {
    /// These.
    #[must_use]
    pub const fn of(fences: &[Fence]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < fences.len() {
            bits |= 1 << fences[at] as u32;
            at += 1;
        }
        Self(bits)
    }

    /// It is among them.
    #[must_use]
    pub const fn has(self, fence: Fence) -> bool {
        self.0 & (1 << fence as u32) != 0
    }

    /// Those of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that the other has too.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Without these.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Their names.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        FENCES.iter().filter(move |(fence, _)| self.has(*fence)).map(|(_, name)| *name)
    }

    /// Those with these names; a name that is not known counts for nothing.
    pub fn named<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        names
            .filter_map(|name| FENCES.iter().find(|(_, known)| *known == name))
            .fold(Self::default(), |set, (fence, _)| set.with(Self::of(&[*fence])))
    }
}

/// Fences that this host can raise, and why not the others.
#[derive(Clone, Debug, Default)]
pub struct Fences {
    /// Names.
    pub present: BTreeSet<&'static str>,
    /// Names, each with the sentence.
    pub missing: Vec<(&'static str, String)>,
    set: FenceSet,
    profiles: Profiles,
    /// The version of Landlock; 0: none.
    pub landlock_abi: u32,
    /// Claimed but not raised: to show that the hostile suite notices. Always empty but in builds made for that.
    broken: FenceSet,
}

const LIMITS: [(Fence, &str); 4] =
    [(Fence::LimitsCpu, "cpu"), (Fence::LimitsMemory, "memory"), (Fence::LimitsPids, "pids"), (Fence::LimitsIo, "io")];

/// What ends an attempt, and what no process of it may gain: raised for every profile, as far as the host has it.
/// Pid 1 takes its namespace along when the spawner dies or the lease ends, which a cgroup alone does not.
const ALWAYS: FenceSet = FenceSet::of(&[
    Fence::KillCgroup,
    Fence::KillPidns,
    Fence::NsPid,
    Fence::NoNewPrivs,
    Fence::CapsNone,
    Fence::UidOwn,
    Fence::Descriptors,
    Fence::Session,
    Fence::Keyring,
    Fence::Dumpable,
]);

/// The profiles' lists as sets.
#[derive(Clone, Copy, Debug, Default)]
struct Profiles {
    strict: FenceSet,
    shared: FenceSet,
    where_present: FenceSet,
    /// Less where an old Landlock knows only files, which this profile does not fence.
    shared_where_present: FenceSet,
}

impl Profiles {
    fn listed() -> Self {
        let set = |names: &[&'static str]| FenceSet::named(names.iter().copied());
        Self {
            strict: set(&fence::STRICT).without(FenceSet::of(&[Fence::NsNet])),
            shared: set(&fence::SHARED),
            where_present: set(&fence::WHERE_PRESENT),
            shared_where_present: set(&fence::WHERE_PRESENT),
        }
    }

    fn of(&self, start: &Start) -> FenceSet {
        let mut fences = match start.profile {
            Profile::Strict => self.strict.with(self.where_present),
            Profile::Shared => self.shared.with(self.shared_where_present),
            Profile::None => FenceSet::default(),
        };
        if start.profile == Profile::Strict && start.network == Network::None {
            fences = fences.with(FenceSet::of(&[Fence::NsNet]));
        }
        if start.exclusive {
            fences = fences.with(FenceSet::of(&[Fence::LeaseTimer]));
        }
        fences
    }

    /// Fences that a start must have.
    fn required(&self, start: &Start) -> FenceSet {
        let without = |name: &str| start.without.iter().any(|word| fence::covers(word, name));
        let dispensed = FenceSet::named(FENCES.iter().map(|(_, name)| *name).filter(|name| without(name)));
        self.of(start).without(self.where_present).without(dispensed)
    }
}

impl Fences {
    /// Tries each on this host. `rootless`: every try is in a user namespace of its own.
    /// `image`: whose folders the read-only root is made of.
    pub fn probe(
        rootless: bool,
        cgroups: Option<&cgroup::Root>,
        root: &std::ffi::CStr,
        image: &std::path::Path,
    ) -> Self {
        let mut fences = Self { profiles: Profiles::listed(), ..Self::default() };
        let user = if rootless { libc::CLONE_NEWUSER } else { 0 };
        for (fence, flag) in [
            (Fence::NsPid, libc::CLONE_NEWPID),
            (Fence::NsMount, libc::CLONE_NEWNS),
            (Fence::NsIpc, libc::CLONE_NEWIPC),
            (Fence::NsUts, libc::CLONE_NEWUTS),
            (Fence::NsNet, libc::CLONE_NEWNET),
            (Fence::NsCgroup, libc::CLONE_NEWCGROUP),
            (Fence::NsUser, libc::CLONE_NEWUSER),
        ] {
            fences.note(fence, try_child(user | flag, || 0));
        }
        let all = user | libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        let roots = |proc: mounts::Proc| {
            let (root, image) = (root.to_owned(), image.to_owned());
            let whole = move || {
                mounts::assemble(&root, &image, None, Some(proc)).and_then(|()| mounts::mount_private(1 << 20, None))
            };
            try_child(all, move || i32::from(whole().is_err()))
        };
        fences.note(Fence::RootReadonly, roots(mounts::Proc::Whole));
        fences.note(Fence::ProcSubset, roots(mounts::Proc::OwnOnly));
        let filter = Filter::strict();
        fences.note(
            Fence::Seccomp,
            try_child(0, move || {
                i32::from(sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).and_then(|()| filter.install()).is_err())
            }),
        );
        fences.landlock_abi = landlock::abi().unwrap_or(0);
        fences.note(Fence::Landlock, fences.has_landlock(&landlock::Policy::STRICT));
        if fences.has_landlock(&landlock::Policy::SHARED).is_err() {
            let landlock = FenceSet::of(&[Fence::Landlock]);
            fences.profiles.shared_where_present = fences.profiles.shared_where_present.without(landlock);
        }
        fences.raise(FenceSet::of(&[
            Fence::NoNewPrivs,
            Fence::CapsNone,
            Fence::Rlimits,
            Fence::Descriptors,
            Fence::Session,
            Fence::Keyring,
            Fence::Dumpable,
            Fence::LeaseTimer,
        ]));
        if rootless {
            fences.miss(Fence::UidOwn, "this spawner is not root and has one uid, which all its jobs share".into());
        } else {
            fences.raise(FenceSet::of(&[Fence::UidOwn]));
        }
        if fences.set.has(Fence::NsPid) {
            fences.raise(FenceSet::of(&[Fence::KillPidns]));
        } else {
            fences.miss(Fence::KillPidns, "there is no PID namespace that would end as a whole".into());
        }
        // The working folder's size is that of its tmpfs, which only a root of its own has.
        if fences.set.has(Fence::RootReadonly) {
            fences.raise(FenceSet::of(&[Fence::LimitsDisk]));
        } else {
            fences.miss(Fence::LimitsDisk, "a size has only the tmpfs of a root of its own".into());
        }
        fences.note_cgroups(cgroups);
        fences.broken = broken();
        fences
    }

    /// What another look at a host found.
    #[must_use]
    pub fn found(present: BTreeSet<&'static str>, missing: Vec<(&'static str, String)>) -> Self {
        let set = FenceSet::named(present.iter().copied());
        Self { present, missing, set, profiles: Profiles::listed(), ..Self::default() }
    }

    fn has_landlock(&self, policy: &landlock::Policy<'_>) -> Result<(), String> {
        if self.landlock_abi > 0 && landlock::fences_anything(self.landlock_abi, policy) {
            return Ok(());
        }
        Err("this kernel has no Landlock, or it is not in its list of security modules".to_owned())
    }

    fn note_cgroups(&mut self, cgroups: Option<&cgroup::Root>) {
        match cgroups {
            Some(_) => self.raise(FenceSet::of(&[Fence::KillCgroup])),
            None => self.miss(Fence::KillCgroup, "there is no cgroup v2 group that this spawner may use".into()),
        }
        for (fence, controller) in LIMITS {
            if cgroups.is_some_and(|root| root.has(controller)) {
                self.raise(FenceSet::of(&[fence]));
            } else {
                let unset = if fence == Fence::LimitsIo { ", or spawner.toml sets no rate" } else { "" };
                let why = format!("the cgroup v2 controller `{controller}` is not delegated to this spawner{unset}");
                self.miss(fence, why);
            }
        }
    }

    fn note(&mut self, fence: Fence, tried: Result<(), String>) {
        match tried {
            Ok(()) => self.raise(FenceSet::of(&[fence])),
            Err(why) => self.miss(fence, why),
        }
    }

    fn raise(&mut self, fences: FenceSet) {
        self.set = self.set.with(fences);
        self.present.extend(fences.names());
    }

    fn miss(&mut self, fence: Fence, why: String) {
        self.missing.extend(FenceSet::of(&[fence]).names().map(|name| (name, why.clone())));
    }

    /// The first fence that the start asks for and this host lacks.
    pub fn lacking(&self, start: &Start) -> Option<(&'static str, String)> {
        let name = self.profiles.required(start).without(self.set).names().next()?;
        let why = self.missing.iter().find(|(missing, _)| *missing == name);
        Some((name, why.map_or_else(|| "it is not known here".to_owned(), |(_, why)| why.clone())))
    }

    /// This host has it.
    #[must_use]
    pub const fn can_raise(&self, fence: Fence) -> bool {
        self.set.has(fence)
    }

    /// Fences that this attempt gets: all that its profile names and the host has.
    pub fn granted(&self, start: &Start) -> FenceSet {
        self.profiles.of(start).with(ALWAYS).common(self.set)
    }

    /// The controllers of broken limits, which are then written to no group.
    pub fn broken_controllers(&self) -> impl Iterator<Item = &'static str> {
        LIMITS.iter().filter(|(fence, _)| self.broken.has(*fence)).map(|(_, controller)| *controller)
    }

    /// Those of the granted that are really raised: all, in a build that does not break some on purpose.
    pub const fn raised(&self, granted: FenceSet) -> FenceSet {
        granted.without(self.broken)
    }
}

/// Fences to break on purpose, by the environment; compiled in only for the hostile suite's own test.
#[cfg(feature = "break-fences")]
fn broken() -> FenceSet {
    let names = std::env::var("MUSTER_BREAK_FENCE").unwrap_or_default();
    FenceSet::named(names.split(','))
}

#[cfg(not(feature = "break-fences"))]
const fn broken() -> FenceSet {
    FenceSet(0)
}

#[cfg(all(feature = "break-fences", not(debug_assertions)))]
compile_error!("break-fences is for the hostile suite alone, never for a release build");

/// A throw-away child in these namespaces, in a new user namespace with our own uid mapped.
fn try_child(flags: i32, work: impl FnOnce() -> i32) -> Result<(), String> {
    let told = |error: std::io::Error| error.to_string();
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map(|(read, write)| (write, read))
        .map_err(|errno| errno.desc().to_owned())?;
    // SAFETY: the spawner has one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(flags, None) } {
        Ok(Cloned::Child) => {
            drop(ours);
            // Until our parent has mapped our uid, files that we make would belong to nobody.
            let _closed = nix::unistd::read(&theirs, &mut [0]);
            sys::exit_now(work())
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            let mapped = if flags & libc::CLONE_NEWUSER == 0 { Ok(()) } else { map_own_uid(pid).map_err(told) };
            drop(ours);
            wait_for(&pidfd).and(mapped)
        }
        Err(errno) => Err(format!("clone3: {}", errno.desc())),
    }
}

fn wait_for(pidfd: &OwnedFd) -> Result<(), String> {
    loop {
        let mut polls = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
        let _interrupted = nix::poll::poll(&mut polls, nix::poll::PollTimeout::NONE);
        match sys::wait_pidfd(pidfd.as_fd(), true) {
            Ok(Some(reaped)) if reaped.raw_status == 0 => return Ok(()),
            Ok(Some(_)) => return Err("the kernel or this container forbids a step of it".into()),
            Ok(None) => {}
            Err(errno) => return Err(errno.desc().into()),
        }
    }
}

/// Our uid as itself, and no other: the child is ours and unreaped, so its number is its own.
///
/// # Errors
/// The kernel does not let us.
pub fn map_own_uid(pid: i32) -> std::io::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    std::fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    std::fs::write(format!("/proc/{pid}/uid_map"), format!("{uid} {uid} 1"))?;
    std::fs::write(format!("/proc/{pid}/gid_map"), format!("{gid} {gid} 1"))
}

/// Root, as which the init runs, and the job's own uid: as themselves, and no other. The child is ours and unreaped.
///
/// # Errors
/// The kernel does not let us.
pub fn map_job_uid(pid: i32, uid: u32) -> std::io::Result<()> {
    let map = format!("0 0 1\n{uid} {uid} 1\n");
    std::fs::write(format!("/proc/{pid}/uid_map"), &map)?;
    std::fs::write(format!("/proc/{pid}/gid_map"), &map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fence_has_a_bit_and_a_name_of_its_own() {
        for (number, (fence, name)) in FENCES.iter().enumerate() {
            assert_eq!(*fence as usize, number, "{name}");
            assert_eq!(FenceSet::named([*name].into_iter()), FenceSet::of(&[*fence]));
        }
    }
}
