//! Network namespaces of a test's own: one for the coordinator and one for each
//! host, with a wire between the two that can be cut in either direction. All of
//! it is gone with its guard, also when the test is killed: a namespace lives
//! as long as a process in it, and that one ends with a pipe that only we hold.

use std::{
    fs::File,
    io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::host;

/// Which packets of a wire are lost, without a word to either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// None.
    Mended,
    /// The coordinator hears nothing of the host.
    ToCoordinator,
    /// The host hears nothing of the coordinator.
    FromCoordinator,
    /// Both.
    Both,
}

/// The coordinator's network and those of its hosts.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<Space>,
    coordinator: Space,
}

/// The address of coordinators, the same for every host.
pub const COORDINATOR: &str = "10.98.0.1";

#[derive(Debug)]
struct Space(Child);

impl Space {
    fn new() -> Self {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        // SAFETY: between fork and exec only unshare(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?)) };
        // It has been executed when this returns, so the namespace is there.
        let this = Self(command.spawn().expect("root makes a network namespace"));
        this.ip("link set lo up");
        this
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    /// Runs `ip` in it.
    fn ip(&self, arguments: &str) {
        self.run("ip", arguments).expect("a namespace of ours takes it");
    }

    /// Runs a program of iproute2 in it; an error is what that says.
    fn run(&self, program: &str, arguments: &str) -> Result<(), String> {
        let mut command = Command::new(program);
        command.args(arguments.split(' ')).stdin(Stdio::null());
        enter(&mut command, File::open(self.path()).expect("a namespace of ours"));
        let done = command.output().map_err(|error| format!("{program}: {error}"))?;
        let said = || format!("{program} {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim_end());
        done.status.success().then_some(()).ok_or_else(said)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The command will run in this network namespace.
pub(crate) fn enter(command: &mut Command, namespace: File) {
    let join = move || setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
    // SAFETY: between fork and exec only setns(2) is called, which is async-signal-safe.
    unsafe { command.pre_exec(join) };
}

impl Network {
    /// Without a host yet. None: only root may, and only with iproute2.
    #[must_use]
    pub fn new() -> Option<Self> {
        let may = host::is_root() && host::has_program("ip");
        may.then(|| {
            let coordinator = Space::new();
            coordinator.ip(&format!("addr add {COORDINATOR}/32 dev lo"));
            Self { hosts: Vec::new(), coordinator }
        })
    }

    /// The coordinator's namespace, for setns(2).
    #[must_use]
    pub fn coordinator(&self) -> PathBuf {
        self.coordinator.path()
    }

    /// How many hosts were added.
    #[must_use]
    pub const fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// One more host with its wire: its namespace, for setns(2).
    ///
    /// # Panics
    /// If the kernel has no veth.
    pub fn add_host(&mut self) -> PathBuf {
        let (number, space) = (self.hosts.len(), Space::new());
        let (here, there) = (hardware(number, 1), hardware(number, 2));
        self.coordinator.ip(&format!(
            "link add wire{number} address {here} type veth peer name wire address {there} netns {}",
            space.0.id()
        ));
        self.coordinator.ip(&format!("addr add 10.99.{number}.1/30 dev wire{number}"));
        self.coordinator.ip(&format!("link set wire{number} up"));
        space.ip(&format!("addr add 10.99.{number}.2/30 dev wire"));
        space.ip("link set wire up");
        space.ip(&format!("route add {COORDINATOR} via 10.99.{number}.1"));
        let place = space.path();
        self.hosts.push(space);
        self.cut(number, Cut::Mended);
        place
    }

    /// Delays, loses, doubles and reorders packets of the wire to a host, by the order in which hosts were added, both
    /// ways from now on: in the words of tc-netem(8).
    ///
    /// # Errors
    /// What tc says: that the kernel has no netem, or that it does not understand.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn disturb(&self, number: usize, netem: &str) -> Result<(), String> {
        self.coordinator.run("tc", &format!("qdisc replace dev wire{number} root netem {netem}"))?;
        self.hosts[number].run("tc", &format!("qdisc replace dev wire root netem {netem}"))
    }

    /// Loses packets of the wire to a host, by the order in which hosts were added, from now on: they go to a
    /// hardware address that nobody has, so neither side is told.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn cut(&self, number: usize, cut: Cut) {
        let end = |is_lost: bool, right: u8| hardware(number, if is_lost { 9 } else { right });
        let from = end(matches!(cut, Cut::FromCoordinator | Cut::Both), 2);
        let to = end(matches!(cut, Cut::ToCoordinator | Cut::Both), 1);
        self.coordinator.ip(&format!("neigh replace 10.99.{number}.2 lladdr {from} nud permanent dev wire{number}"));
        self.hosts[number].ip(&format!("neigh replace 10.99.{number}.1 lladdr {to} nud permanent dev wire"));
    }
}

fn hardware(number: usize, end: u8) -> String {
    format!("02:00:00:00:{number:02x}:{end:02x}")
}
