//! The named fences: which a profile asks for, which this host can raise.
//! Probed once, by really trying, so that no start finds out (FL-13).

use std::{
    collections::BTreeSet,
    os::fd::{AsFd as _, OwnedFd},
};

use super::{
    cgroup, mounts,
    sys::{self, Cloned},
};
use crate::spawner::protocol::{Network, Profile, Start};

/// Fences that this host can raise, and why not the others.
#[derive(Clone, Debug, Default)]
pub struct Fences {
    /// Names.
    pub present: BTreeSet<&'static str>,
    /// Names, each with the sentence.
    pub missing: Vec<(&'static str, String)>,
}

/// The clone flags of the namespaces of one attempt.
pub const NAMESPACES: [(&str, i32); 6] = [
    ("ns.pid", libc::CLONE_NEWPID),
    ("ns.mount", libc::CLONE_NEWNS),
    ("ns.ipc", libc::CLONE_NEWIPC),
    ("ns.uts", libc::CLONE_NEWUTS),
    ("ns.net", libc::CLONE_NEWNET),
    ("ns.cgroup", libc::CLONE_NEWCGROUP),
];

const LIMITS: [(&str, &str); 4] =
    [("limits.cpu", "cpu"), ("limits.memory", "memory"), ("limits.pids", "pids"), ("limits.io", "io")];

impl Fences {
    /// Tries each on this host. `rootless`: every try is in a user namespace of its own.
    pub fn probe(rootless: bool, cgroups: Option<&cgroup::Root>, root_folder: &std::ffi::CStr) -> Self {
        let mut fences = Self::default();
        let user = if rootless { libc::CLONE_NEWUSER } else { 0 };
        for (name, flag) in NAMESPACES {
            fences.note(name, try_child(user | flag, || 0));
        }
        fences.note("ns.user", try_child(libc::CLONE_NEWUSER, || 0));
        let all = user | libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        let folder = root_folder.to_owned();
        fences.note(
            "root.readonly",
            try_child(all, move || i32::from(mounts::assemble(&folder, 1 << 20, 0, 0).is_err())),
        );
        for name in ["no_new_privs", "caps.none", "lease.timer"] {
            fences.present.insert(name);
        }
        if rootless {
            fences
                .missing
                .push(("uid.own", "this spawner is not root and has one uid, which all its jobs share".into()));
        } else {
            fences.present.insert("uid.own");
        }
        if fences.present.contains("ns.pid") {
            fences.present.insert("kill.pidns");
        }
        // The working folder's size is that of its tmpfs, which only a root of its own has.
        if fences.present.contains("root.readonly") {
            fences.present.insert("limits.disk");
        }
        fences.note_cgroups(cgroups);
        fences
    }

    fn note_cgroups(&mut self, cgroups: Option<&cgroup::Root>) {
        match cgroups {
            Some(_) => {
                self.present.insert("kill.cgroup");
            }
            None => self.missing.push(("kill.cgroup", "there is no cgroup v2 group that this spawner may use".into())),
        }
        for (fence, controller) in LIMITS {
            if cgroups.is_some_and(|root| root.has(controller)) {
                self.present.insert(fence);
            } else {
                let why = format!("the cgroup v2 controller `{controller}` is not delegated to this spawner");
                self.missing.push((fence, why));
            }
        }
    }

    fn note(&mut self, name: &'static str, tried: Result<(), String>) {
        match tried {
            Ok(()) => {
                self.present.insert(name);
            }
            Err(why) => self.missing.push((name, why)),
        }
    }

    /// The first fence that the start asks for and this host lacks.
    pub fn lacking(&self, start: &Start) -> Option<(&'static str, String)> {
        let wanted = required(start);
        let name = wanted.iter().find(|name| !self.present.contains(*name))?;
        let why = self.missing.iter().find(|(missing, _)| missing == name);
        Some((name, why.map_or_else(|| "it is not known here".to_owned(), |(_, why)| why.clone())))
    }

    /// Fences that this attempt gets: all that its profile names and the host has.
    pub fn granted(&self, start: &Start) -> Vec<&'static str> {
        let mut granted: BTreeSet<&'static str> =
            profile(start).into_iter().filter(|name| self.present.contains(name)).collect();
        // What ends an attempt is raised for every profile, as far as the host has it: pid 1 takes
        // its namespace along when the spawner dies or the lease ends, which a cgroup alone does not.
        let ending = ["kill.cgroup", "kill.pidns", "ns.pid", "no_new_privs", "caps.none", "uid.own"];
        granted.extend(ending.iter().filter(|name| self.present.contains(*name)));
        granted.into_iter().collect()
    }
}

/// Fences that a start must have.
fn required(start: &Start) -> Vec<&'static str> {
    let without = |name: &str| {
        start
            .without
            .iter()
            .any(|done| done == name || name.strip_prefix(done.as_str()).is_some_and(|rest| rest.starts_with('.')))
    };
    profile(start).into_iter().filter(|name| !without(name)).collect()
}

fn profile(start: &Start) -> Vec<&'static str> {
    let mut names = match start.profile {
        Profile::Strict => vec![
            "ns.pid",
            "ns.mount",
            "ns.ipc",
            "ns.uts",
            "root.readonly",
            "no_new_privs",
            "caps.none",
            "uid.own",
            "limits.cpu",
            "limits.memory",
            "limits.pids",
            "limits.disk",
            "kill.cgroup",
        ],
        Profile::Shared => {
            vec!["uid.own", "no_new_privs", "ns.pid", "limits.cpu", "limits.memory", "limits.pids", "kill.cgroup"]
        }
        Profile::None => Vec::new(),
    };
    if start.profile == Profile::Strict && start.network == Network::None {
        names.push("ns.net");
    }
    if start.exclusive {
        names.push("lease.timer");
    }
    names
}

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
