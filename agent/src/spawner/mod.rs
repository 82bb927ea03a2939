//! The keeper and parent of all jobs of a host: single-threaded, no network.

mod attempt;
mod keeper;
pub mod policy;
pub mod protocol;
mod sandbox;
pub mod socket;

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use nix::sys::signalfd::SignalFd;

use crate::sandbox::{cgroup, fences::Fences};
use keeper::{ASK_VERSION, Farewell, Held, Keeper, Parts, STATE_VERSION};
use policy::Policy;

/// Keeper and parent of all jobs of this host.
#[derive(Debug, Parser)]
#[command(name = "muster-spawner", version)]
struct Options {
    /// Where the agent connects.
    #[arg(long)]
    socket: PathBuf,
    /// A folder of its own.
    #[arg(long)]
    state: PathBuf,
    /// What the host's owner allows.
    #[arg(long)]
    config: Option<PathBuf>,
    /// The agent's user; default: this one's.
    #[arg(long)]
    agent_uid: Option<u32>,
    /// Uids for jobs.
    #[arg(long, value_name = "FIRST-LAST")]
    uids: Option<String>,
    /// Names this node's cgroup, where a host has several spawners.
    #[arg(long, value_name = "ID")]
    node_id: Option<String>,
    /// Read end of a pipe that its parent holds.
    #[arg(long)]
    parent_fd: Option<i32>,
    /// Remove its folder at the parent's end.
    #[arg(long)]
    ephemeral: bool,
    /// What the former program of this process has left: set by an upgrade in place.
    #[arg(long, hide = true)]
    resume_fd: Option<i32>,
}

/// Why the spawner cannot run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Policy(#[from] policy::Error),
    #[error("--uids must be FIRST-LAST")]
    Uids,
    #[error("another spawner uses the folder {path}; each needs a folder of its own")]
    Taken { path: PathBuf },
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// Runs the spawner.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    if args.get(1).is_some_and(|word| word == ASK_VERSION) {
        return answer(args);
    }
    let options = match Options::try_parse_from(args) {
        Ok(options) => options,
        Err(error) => {
            let _closed = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    crate::start_log();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-spawner: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Asked by the former program of a spawner, before it lets this one take over: what would end this one at its start, with
/// all jobs of the host, is told now. An older one asks without its options.
fn answer(mut args: Vec<OsString>) -> ExitCode {
    args.remove(1);
    let checked = match args.len() {
        1 => Ok(()),
        _options => Options::try_parse_from(args)
            .map_err(|error| error.to_string())
            .and_then(|options| policy_of(&options).map(|_| ()).map_err(|error| error.to_string())),
    };
    match checked {
        Ok(()) => {
            println!("{STATE_VERSION}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("muster-spawner: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// What could not be done, and with which path.
fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

fn policy_of(options: &Options) -> Result<Policy, Error> {
    let policy = options.config.as_deref().map(Policy::load).transpose()?.unwrap_or_default();
    let Some(uids) = &options.uids else { return Ok(policy) };
    let (first, last) = uids
        .split_once('-')
        .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)))
        .ok_or(Error::Uids)?;
    Ok(policy.with_uids(first, last)?)
}

fn run(options: &Options) -> Result<(), Error> {
    let policy = policy_of(options)?;
    crate::descriptors::raise_limit();
    fs::create_dir_all(options.state.join("root")).map_err(io("make", &options.state))?;
    // Held until this process ends. Taken before any leftover is ended: it could be another spawner's living job.
    let lock = fs::File::create(options.state.join("lock")).map_err(io("make", &options.state))?;
    let _lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
        .map_err(|(_, _)| Error::Taken { path: options.state.clone() })?;
    // A stop in the middle of the start must not leave a cgroup behind.
    let signals = keeper::hold_signals().map_err(io("watch the signals of", &options.state))?;
    let held = options.resume_fd.map(Held::read).transpose().map_err(io("resume what was held in", &options.state))?;
    let kept = held.as_ref().map(Held::groups).unwrap_or_default();
    let cgroups =
        cgroup::Root::find(options.node_id.as_deref(), &kept).map_err(io("use the cgroup of", &options.state))?;
    let ended = keep(options, policy, cgroups.clone(), held, signals);
    // Also when the start failed half way: what it made is not left.
    if let Some(cgroups) = cgroups {
        cgroups.remove();
    }
    let farewell = ended?;
    let _gone = fs::remove_file(&options.socket);
    if options.ephemeral && farewell == Farewell::Orphaned {
        let _kept = fs::remove_dir_all(&options.state);
        if let Some(parent) = options.state.parent() {
            let _not_empty = fs::remove_dir(parent);
        }
    }
    Ok(())
}

/// Looks at what this host can do, listens, and keeps jobs until told to go.
fn keep(
    options: &Options,
    policy: Policy,
    mut cgroups: Option<cgroup::Root>,
    held: Option<Held>,
    signals: SignalFd,
) -> Result<Farewell, Error> {
    if let Some(cgroups) = &mut cgroups {
        cgroups.limit_io(policy.io_read_bytes_per_second, policy.io_write_bytes_per_second);
    }
    let root = std::ffi::CString::new(options.state.join("root").into_os_string().into_encoded_bytes())
        .expect("a path has no NUL");
    let fences = Fences::probe(!nix::unistd::geteuid().is_root(), cgroups.as_ref(), &root, &policy.image);
    if let Some(cgroups) = &mut cgroups {
        fences.broken_controllers().for_each(|controller| cgroups.leave_out(controller));
    }
    let listener = match &held {
        Some(held) => held.listener(),
        None => listen(&options.socket, options.agent_uid).map_err(io("listen at", &options.socket))?,
    };
    let agent_uid = options.agent_uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw());
    // SAFETY: our parent left this descriptor open for us, and named it.
    let parent = options.parent_fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let state = options.state.clone();
    let parts = Parts { policy, fences, cgroups, agent_uid, state, root, listener, parent, signals, held };
    let mut keeper = Keeper::new(parts).map_err(io("watch", &options.socket))?;
    let _no_systemd = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    crate::footprint::give_back_what_the_start_needed();
    keeper.run().map_err(io("watch", &options.socket))
}

fn listen(path: &Path, agent_uid: Option<u32>) -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    if let Some(uid) = agent_uid {
        std::os::unix::fs::chown(path, Some(uid), None)?;
    }
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}
