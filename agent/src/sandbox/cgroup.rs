//! The jobs' cgroups: cgroup v2 only, found by file system type, held by
//! directory path below a root that this spawner made or was delegated.
//!
//! Foreign processes are never moved, v1 controllers never used. Sources:
//! cgroups(7), the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::{
    ffi::CStr,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::sys;
use crate::spawner::protocol::Limits;

/// The subtree below which each job has a group.
#[derive(Clone, Debug)]
pub struct Root {
    /// Holds one folder a job.
    jobs: PathBuf,
    /// What this spawner made and removes when it is empty.
    made: Vec<PathBuf>,
    controllers: Vec<String>,
    /// `MAJOR:MINOR rbps=N wbps=N` of each disk, as io.max wants it.
    io_max: Vec<String>,
}

/// One job's group.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    directory: OwnedFd,
    events: OwnedFd,
    limits: Option<Limits>,
    has_memory: bool,
}

/// What a group used in its life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// User and system time, microseconds.
    pub cpu_us: Option<u64>,
    /// The most memory at once.
    pub memory_peak_bytes: Option<u64>,
    /// Processes that the kernel killed for memory.
    pub oom_kills: u64,
}

/// Where the cgroup2 file system is mounted, if it is.
#[must_use]
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        // The type is asked of the mount itself: what the text says may be shadowed by another mount.
        .find(|path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC))
}

/// This process's own group, below the mount point.
fn own_group(mount: &Path) -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount.join(own))
}

/// The group of the systemd unit that this process is in, if it is in one.
fn delegated_group(mount: &Path) -> Option<PathBuf> {
    let own = std::env::var_os("INVOCATION_ID").and_then(|_| own_group(mount))?;
    // Where an earlier program of this process has moved it.
    let own = if own.ends_with(SUPERVISOR) { own.parent()?.to_owned() } else { own };
    own.extension().is_some_and(|kind| kind == "service").then_some(own)
}

/// Those of the controllers that limits are made of.
fn ours(controllers: &str) -> impl Iterator<Item = &str> {
    controllers.split_whitespace().filter(|name| ["cpu", "memory", "pids", "io"].contains(name))
}

/// The leaf of a delegated group that the spawner itself is in.
const SUPERVISOR: &str = "supervisor";
/// Holds the jobs' groups.
const JOBS: &str = "jobs";

impl Root {
    /// The delegated group of this systemd unit; else, as root, a group of our own; else none.
    ///
    /// `node_id` keeps several spawners apart, also those of one unit: two nodes that a demo has, in the unit of
    /// whatever runs it, share a delegated group.
    ///
    /// What else is in it is of a spawner that is gone, and is ended, but for `kept`: the groups of jobs that
    /// this process held under its former program.
    ///
    /// # Errors
    /// A group that should be usable is not.
    pub fn find(node_id: Option<&str>, kept: &[&str]) -> io::Result<Option<Self>> {
        let Some(mount) = mount_point() else { return Ok(None) };
        // As an ordinary user in somebody's unit, such as a session's: it is ours only if it was given to us.
        let writable = |own: &PathBuf| nix::unistd::access(own, nix::unistd::AccessFlags::W_OK).is_ok();
        let root = match delegated_group(&mount).filter(|own| nix::unistd::geteuid().is_root() || writable(own)) {
            Some(own) => Self::in_delegated(&own, node_id)?,
            None if nix::unistd::geteuid().is_root() => Self::of_our_own(&mount, node_id)?,
            None => return Ok(None),
        };
        root.empty_leftovers(kept)?;
        Ok(Some(root))
    }

    /// What [`Self::find`] would come to, by looking alone: nothing is made, moved or ended. `unit` is the
    /// group of another process, a spawner's systemd unit, that may not be there yet.
    #[must_use]
    pub fn foreseen(unit: Option<&Path>) -> Option<Self> {
        let mount = mount_point()?;
        let is_root = nix::unistd::geteuid().is_root();
        let (parent, grants) = match unit.map(Path::to_owned).or_else(|| delegated_group(&mount)) {
            Some(own) if own.exists() => (own.clone(), own.join("cgroup.controllers")),
            // systemd grants a delegated unit all that there is, when it starts.
            Some(_not_started) if is_root => (mount.clone(), mount.join("cgroup.controllers")),
            None if is_root => (mount.clone(), mount.join("cgroup.subtree_control")),
            Some(_) | None => return None,
        };
        nix::unistd::access(&parent, nix::unistd::AccessFlags::W_OK).ok()?;
        let controllers = ours(&fs::read_to_string(grants).unwrap_or_default()).map(str::to_owned).collect();
        Some(Self { jobs: parent.join(JOBS), made: Vec::new(), controllers, io_max: Vec::new() })
    }

    /// Processes live in leaves only: we move into one before controllers are enabled (else EBUSY).
    fn in_delegated(own: &Path, node_id: Option<&str>) -> io::Result<Self> {
        let supervisor = own.join(SUPERVISOR);
        make(&supervisor)?;
        fs::write(supervisor.join("cgroup.procs"), "0")?;
        let jobs = own.join(node_id.map_or_else(|| JOBS.to_owned(), |id| format!("{JOBS}-{id}")));
        Self::with_jobs_in(own, jobs.clone(), vec![jobs])
    }

    fn of_our_own(mount: &Path, node_id: Option<&str>) -> io::Result<Self> {
        let own = mount.join(format!("muster-{}", node_id.unwrap_or("node")));
        make(&own)?;
        let jobs = own.join(JOBS);
        Self::with_jobs_in(&own, jobs.clone(), vec![jobs, own.clone()])
    }

    fn with_jobs_in(parent: &Path, jobs: PathBuf, made: Vec<PathBuf>) -> io::Result<Self> {
        let controllers = enable_controllers(parent);
        make(&jobs)?;
        enable_controllers(&jobs);
        Ok(Self { jobs, made, controllers, io_max: Vec::new() })
    }

    /// What a former spawner left is ended before this node is ready (FL-5).
    fn empty_leftovers(&self, kept: &[&str]) -> io::Result<()> {
        for entry in fs::read_dir(&self.jobs)?.flatten() {
            let is_kept = kept.iter().any(|name| entry.file_name() == *name);
            if !is_kept && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let group = Group::open(entry.path(), false)?;
                group.kill()?;
                group.wait_until_empty(std::time::Duration::from_secs(5))?;
                group.remove();
            }
        }
        Ok(())
    }

    /// The kernel can limit this: "cpu", "memory", "pids", "io".
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }

    /// What each job may read from and write to each disk of this host, bytes a second; 0: no limit.
    pub fn limit_io(&mut self, read_bytes_per_second: u64, write_bytes_per_second: u64) {
        let rate = |bytes: u64| if bytes == 0 { "max".to_owned() } else { bytes.to_string() };
        if read_bytes_per_second == 0 && write_bytes_per_second == 0 {
            return self.leave_out("io");
        }
        let (read, write) = (rate(read_bytes_per_second), rate(write_bytes_per_second));
        self.io_max = disks().into_iter().map(|disk| format!("{disk} rbps={read} wbps={write}")).collect();
    }

    /// Writes no more limits of this controller, as if the kernel had none.
    pub fn leave_out(&mut self, controller: &str) {
        self.controllers.retain(|name| name != controller);
    }

    /// Makes a sandbox's group, before anything runs in it.
    ///
    /// # Errors
    /// The group could not be made: nothing must start.
    pub fn make_group(&self, name: &str) -> io::Result<Group> {
        let path = self.jobs.join(name);
        fs::create_dir(&path)?;
        Group::open(path, self.has("memory"))
    }

    /// The group that this process made under its former program.
    ///
    /// # Errors
    /// It is gone.
    pub fn reopen_group(&self, name: &str, limits: Option<Limits>) -> io::Result<Group> {
        let group = Group::open(self.jobs.join(name), self.has("memory"))?;
        Ok(Group { limits, ..group })
    }

    /// Writes a job's limits, before its first instruction; what is written already is not written again.
    ///
    /// # Errors
    /// A limit could not be set: the job must not start.
    pub fn limit(&self, group: &mut Group, limits: &Limits) -> io::Result<()> {
        if group.limits.as_ref() == Some(limits) {
            return Ok(());
        }
        group.limits = None;
        if self.has("cpu") {
            // Quota and period in microseconds: so many thousandths of a core.
            let quota = limits.cpu_milli.saturating_mul(100).max(1_000);
            group.write(c"cpu.max", &format!("{quota} 100000"))?;
        }
        if self.has("memory") {
            group.write(c"memory.max", &limits.memory_bytes.to_string())?;
            // Without swap accounting the file is absent, and there is no swap to take.
            match group.write(c"memory.swap.max", "0") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            group.write(c"memory.oom.group", "1")?;
        }
        if self.has("pids") {
            // One more for the init.
            group.write(c"pids.max", &(u64::from(limits.pids) + 1).to_string())?;
        }
        if self.has("io") {
            for line in &self.io_max {
                group.write(c"io.max", line)?;
            }
        }
        group.limits = Some(*limits);
        Ok(())
    }

    /// Removes a job's group that nothing was ever born in, if it is there.
    pub fn remove_group(&self, name: &str) {
        let _was_not_made = fs::remove_dir(self.jobs.join(name));
    }

    /// Removes what this spawner made, as far as it is empty.
    pub fn remove(&self) {
        // A group whose removal came a moment too early is still there.
        let _kept_if_it_does_not_empty = self.empty_leftovers(&[]);
        for path in &self.made {
            let _kept_if_not_empty = fs::remove_dir(path);
        }
    }
}

impl Group {
    fn open(path: PathBuf, has_memory: bool) -> io::Result<Self> {
        let directory: OwnedFd = fs::File::open(&path)?.into();
        let events = sys::open_at(directory.as_fd(), c"cgroup.events", libc::O_RDONLY)?;
        Ok(Self { path, directory, events, limits: None, has_memory })
    }

    /// For CLONE_INTO_CGROUP.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Polls with PRI when `populated` changes.
    #[must_use]
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Its name among the groups of jobs.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        Some(self.path.file_name()?.to_string_lossy().into_owned())
    }

    /// The limits that are written.
    #[must_use]
    pub const fn limits(&self) -> Option<Limits> {
        self.limits
    }

    /// Shown to the agent, to read usage from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, file: &CStr, value: &str) -> io::Result<()> {
        let file = sys::open_at(self.directory.as_fd(), file, libc::O_WRONLY)?;
        nix::unistd::write(&file, value.as_bytes())?;
        Ok(())
    }

    fn read_number(&self, file: &CStr, key: Option<&str>) -> Option<u64> {
        number_in(&sys::open_at(self.directory.as_fd(), file, libc::O_RDONLY).ok()?, key)
    }

    /// SIGKILL to all in it, forks in flight included.
    ///
    /// # Errors
    /// As write(2) to cgroup.kill.
    pub fn kill(&self) -> io::Result<()> {
        self.write(c"cgroup.kill", "1")
    }

    /// Nothing is in it or below it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        number_in(&self.events, Some("populated ")) == Some(0)
    }

    /// This process is in it, and no other.
    #[must_use]
    pub fn holds_only(&self, pid: u32) -> bool {
        self.read_number(c"cgroup.procs", None) == Some(pid.into())
    }

    fn wait_until_empty(&self, limit: std::time::Duration) -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let deadline = std::time::Instant::now() + limit;
        while !self.is_empty() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{} does not empty after cgroup.kill", self.path.display()),
                ));
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.events.as_fd(), PollFlags::POLLPRI)], timeout)?;
        }
        Ok(())
    }

    /// What it used, as far as controllers tell.
    #[must_use]
    pub fn used(&self) -> Used {
        Used {
            // cpu.stat's usage is there without the controller, too.
            cpu_us: self.read_number(c"cpu.stat", Some("usage_usec ")),
            memory_peak_bytes: self.has_memory.then(|| self.read_number(c"memory.peak", None)).flatten(),
            oom_kills: self
                .has_memory
                .then(|| self.read_number(c"memory.events", Some("oom_kill ")))
                .flatten()
                .unwrap_or(0),
        }
    }

    /// The memory limit, where there is one.
    #[must_use]
    pub fn memory_limit(&self) -> Option<u64> {
        self.limits.filter(|_| self.has_memory).map(|limits| limits.memory_bytes)
    }

    /// Removes it; it must be empty.
    pub fn remove(&self) {
        let _kept_if_not_empty = fs::remove_dir(&self.path);
    }
}

/// A small file of the kernel's: its one number, or the one after `key`.
fn number_in(file: &OwnedFd, key: Option<&str>) -> Option<u64> {
    let mut buffer = [0; 1_024];
    let length = nix::sys::uio::pread(file, &mut buffer, 0).ok()?;
    number_of(&buffer[..length], key)
}

/// The one number of such a text, or the one after `key`.
#[must_use]
pub fn number_of(text: &[u8], key: Option<&str>) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    match key {
        None => text.trim().parse().ok(),
        Some(key) => text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok()),
    }
}

/// Device numbers of the whole disks of this host: io.max knows no partitions, and loops and RAM are others' disks.
fn disks() -> Vec<String> {
    let blocks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    blocks
        .filter(|entry| {
            !["loop", "ram", "zram", "sr", "fd"]
                .iter()
                .any(|kind| entry.file_name().to_string_lossy().starts_with(kind))
        })
        .filter_map(|entry| fs::read_to_string(entry.path().join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Enables what the parent grants, one by one: one that is refused costs only itself.
fn enable_controllers(path: &Path) -> Vec<String> {
    let granted = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    ours(&granted)
        .filter(|name| fs::write(path.join("cgroup.subtree_control"), format!("+{name}")).is_ok())
        .map(str::to_owned)
        .collect()
}
