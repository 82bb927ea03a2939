//! What passes between the spawner and one init: the steps by their names, the
//! init's word on the start and on the end, and one order in the other direction.
//! It travels on a SEQPACKET pair that no job can reach.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use serde::{Deserialize, Serialize};

/// A step of docs/sandbox.md, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Make its cgroup and write its limits.
    Cgroup,
    /// Its private folder, where it has no tmpfs.
    Folder,
    /// Pipes, and the pair to its init.
    Pipes,
    /// Clone the init.
    Clone,
    /// Tie its life to the spawner's.
    Parent,
    /// Close what it inherited.
    Descriptors,
    /// Map its one uid.
    UserMap,
    /// The other namespaces.
    Namespaces,
    /// Hide its memory and descriptors from the job.
    Dumpable,
    /// Raise the loopback.
    Loopback,
    /// Name the host.
    Hostname,
    /// The root it will have.
    MountRoot,
    /// The private folders.
    MountWork,
    /// /proc.
    MountProc,
    /// Enter the root, let the host's go.
    Pivot,
    /// A keyring of its own.
    Keyring,
    /// The page with the lease's end.
    Lease,
    /// Drop capabilities.
    Capabilities,
    /// Copy the inputs in.
    Inputs,
    /// Landlock rules.
    Landlock,
    /// A user namespace below the host's.
    UserNamespace,
    /// The filter over system calls.
    Seccomp,
    /// Hear what to run.
    Order,
    /// Clone the job.
    Job,
    /// A session of its own.
    Session,
    /// stdin, stdout, stderr.
    Standard,
    /// Resource limits.
    Limits,
    /// Its own uid and gid.
    Identity,
    /// No new privileges.
    NoNewPrivileges,
    /// The working folder.
    WorkingFolder,
    /// execve(2).
    Exec,
    /// It took longer than any start may take.
    Timeout,
}

impl Step {
    /// As operators read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Folder => "folder",
            Self::Pipes => "pipes",
            Self::Clone => "clone",
            Self::Parent => "parent",
            Self::Descriptors => "descriptors",
            Self::UserMap => "user.map",
            Self::Namespaces => "namespaces",
            Self::Dumpable => "dumpable",
            Self::Loopback => "loopback",
            Self::Hostname => "hostname",
            Self::MountRoot => "mount.root",
            Self::MountWork => "mount.work",
            Self::MountProc => "mount.proc",
            Self::Pivot => "pivot",
            Self::Keyring => "keyring",
            Self::Lease => "lease",
            Self::Capabilities => "capabilities",
            Self::Inputs => "inputs",
            Self::Landlock => "landlock",
            Self::UserNamespace => "user.namespace",
            Self::Seccomp => "seccomp",
            Self::Order => "order",
            Self::Job => "job",
            Self::Session => "session",
            Self::Standard => "standard",
            Self::Limits => "limits",
            Self::Identity => "identity",
            Self::NoNewPrivileges => "no_new_privs",
            Self::WorkingFolder => "working_folder",
            Self::Exec => "exec",
            Self::Timeout => "timeout",
        }
    }
}

/// The step that failed, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}: {}", step.name(), Errno::from_raw(*errno))]
pub struct Failure {
    /// Which step.
    pub step: Step,
    /// errno(3).
    pub errno: i32,
}

impl Failure {
    /// This step, for this reason.
    #[must_use]
    pub const fn new(step: Step, errno: Errno) -> Self {
        Self { step, errno: errno as i32 }
    }

    /// For `map_err`.
    pub const fn at(step: Step) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { step, errno: errno as i32 }
    }
}

/// What a job leaves behind in its sandbox, as its init sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Remains {
    /// Nothing: the sandbox is as it was, and its init waits for another order.
    Nothing,
    /// No process, but files or other objects: the init ends, and they are let go with it.
    Traces,
    /// Processes: the init ends, and takes them along.
    Processes,
}

/// From an init, or from a job that has none before its exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// User code never ran.
    Failed(Failure),
    /// The sandbox is ready and waits for its job. Beside it: the working folder, and a network namespace that it made.
    Parked {
        /// It is in the network namespace that was offered, not in a new one.
        network_joined: bool,
        /// Microseconds from the clone until now.
        assemble_us: u32,
    },
    /// The job runs. All in microseconds of CLOCK_BOOTTIME.
    Started {
        /// The order had arrived.
        received_us: u64,
        /// The inputs were there.
        inputs_us: u64,
        /// The exec was done.
        started_us: u64,
    },
    /// The job's own process is over.
    Ended {
        /// As wait(2) returned it.
        raw_status: i32,
        /// It had been told to end by then.
        told: bool,
        /// When, in microseconds of CLOCK_BOOTTIME.
        boottime_us: u64,
        /// What is left of it.
        remains: Remains,
        /// User and system time of all that was reaped, microseconds.
        cpu_us: u64,
        /// The most memory that one of them held.
        memory_peak_bytes: u64,
    },
    /// The node's lease ran out before the job ended: init ends it without asking.
    LeaseEnded {
        /// When, in microseconds of CLOCK_BOOTTIME.
        boottime_us: u64,
    },
    /// The job's time was over and the spawner had not said so: init ends it without asking.
    TimeLimitEnded {
        /// When, in microseconds of CLOCK_BOOTTIME.
        boottime_us: u64,
    },
}

const STATUS_BYTES_MAX: usize = 64;

/// Sends a status; a spawner that is gone reads none, and ends us anyway.
///
/// # Errors
/// As sendmsg(2).
pub fn send(socket: BorrowedFd<'_>, status: &Status, beside: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut buffer = [0; STATUS_BYTES_MAX];
    let bytes = postcard::to_slice(status, &mut buffer).map_err(|_| Errno::EMSGSIZE)?;
    let descriptors: Vec<RawFd> = beside.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let control = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// What [`receive`] found.
pub enum Received {
    /// A status, and the descriptors beside it.
    Status(Status, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The other side is gone, or spoke nonsense, which ends it as well.
    Closed,
}

/// Takes the next status without blocking.
pub fn receive(socket: BorrowedFd<'_>) -> Received {
    let mut buffer = [0; STATUS_BYTES_MAX];
    let mut control = nix::cmsg_space!([RawFd; 2]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut beside = Vec::new();
    let bytes = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Ok(message) => {
                for part in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(descriptors) = part {
                        // SAFETY: the kernel made these descriptors for this message.
                        beside.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                message.bytes
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return Received::Nothing,
            Err(_) => return Received::Closed,
        }
    };
    match postcard::from_bytes(&buffer[..bytes]) {
        Ok(status) if bytes > 0 => Received::Status(status, beside),
        Ok(_) | Err(_) => Received::Closed,
    }
}
