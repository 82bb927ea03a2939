//! One real process of the fleet. It ends with its guard, also when the test
//! panics or is killed: it watches a pipe whose other end only we hold.

use std::{
    ffi::OsString,
    fs::File,
    io::Write as _,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe2},
};

use crate::{eventually_blocking, network};

/// A part that lost its parent must have cleaned up by then.
const CLEANUP: Duration = Duration::from_secs(20);

/// The `muster` executable under test: MUSTER_BIN, else the one beside the test's own binary.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn muster_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MUSTER_BIN") {
        return PathBuf::from(path);
    }
    let own = std::env::current_exe().expect("a test knows its own path");
    // A test lies in `deps/`, a program of ours beside it.
    let mut beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("muster"));
    match beside.find(|path| path.is_file()) {
        Some(path) => path,
        None => panic!("no muster executable: run `cargo build -p muster` first, or set MUSTER_BIN"),
    }
}

/// The executable as another user, who need not reach its folder: it is started through the file, which
/// must stay open until then. Only root may.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn muster_as(user: u32) -> (Command, File) {
    let file = File::open(muster_binary()).expect("the executable can be read");
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.uid(user).gid(user).current_dir("/");
    (command, file)
}

/// A running process of ours.
#[derive(Debug)]
pub struct Part {
    name: String,
    child: Child,
    lifeline: Option<OwnedFd>,
    log: PathBuf,
}

/// What a part has beside its arguments.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Added to our own environment.
    pub environment: Vec<(OsString, OsString)>,
    /// It is born there; none: in our own.
    pub cgroup: Option<PathBuf>,
    /// The network namespace that it is in; none: our own.
    pub network: Option<PathBuf>,
}

impl Part {
    /// Starts `muster ARGUMENTS... --parent-fd N` with its output in `log` (appended).
    ///
    /// # Panics
    ///
    /// If the process cannot be started.
    #[must_use]
    pub fn start(name: &str, log: &Path, arguments: &[OsString]) -> Self {
        Self::start_in(name, log, arguments, &Surroundings::default())
    }

    /// The same with an environment or a cgroup of its own.
    ///
    /// # Panics
    ///
    /// If the process cannot be started.
    #[must_use]
    pub fn start_in(name: &str, log: &Path, arguments: &[OsString], surroundings: &Surroundings) -> Self {
        Self::start_with(Command::new(muster_binary()), name, log, arguments, surroundings)
    }

    /// The same from another file.
    ///
    /// # Panics
    ///
    /// If the process cannot be started.
    #[must_use]
    pub fn start_from(program: &Path, name: &str, log: &Path, arguments: &[OsString]) -> Self {
        Self::start_with(Command::new(program), name, log, arguments, &Surroundings::default())
    }

    /// The same as another user; only root may.
    ///
    /// # Panics
    ///
    /// If the process cannot be started.
    #[must_use]
    pub fn start_as(user: u32, name: &str, log: &Path, arguments: &[OsString]) -> Self {
        let (command, _until_it_is_started) = muster_as(user);
        Self::start_with(command, name, log, arguments, &Surroundings::default())
    }

    fn start_with(
        mut command: Command,
        name: &str,
        log: &Path,
        arguments: &[OsString],
        surroundings: &Surroundings,
    ) -> Self {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let output = File::options().create(true).append(true).open(log).expect("a log file");
        command
            .args(arguments)
            .arg("--parent-fd")
            .arg(read.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle of the log"))
            .stderr(output)
            .env("RUST_BACKTRACE", "1")
            .envs(surroundings.environment.iter().map(|(name, value)| (name, value)));
        let group = surroundings.cgroup.as_ref().map(|path| {
            File::options().write(true).open(path.join("cgroup.procs")).expect("a cgroup that takes processes")
        });
        let number = read.as_raw_fd();
        let keep_open = move || {
            // SAFETY: `read` is dropped only after the spawn, so the child has it under this number.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            // 0 is whoever writes it.
            group.as_ref().map_or(Ok(()), |mut group| group.write_all(b"0"))
        };
        // SAFETY: between fork and exec only fcntl(2) and write(2) are called, which are async-signal-safe.
        unsafe { command.pre_exec(keep_open) };
        if let Some(path) = &surroundings.network {
            network::enter(&mut command, File::open(path).expect("a network namespace that is there"));
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        drop(read);
        Self { name: name.to_owned(), child, lifeline: Some(write), log: log.to_owned() }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits for it.
    pub fn kill9(&mut self) {
        // Our own unreaped child: its number cannot have been reused.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        let _ = kill(pid, signal);
    }

    /// SIGSTOP, and waits until each of its threads stands still: on a busy machine one that did not have to look at the
    /// signal goes on for a while.
    ///
    /// # Panics
    ///
    /// If it ends instead.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let stopped = eventually_blocking(CLEANUP, || self.stands_still().then_some(()));
        assert!(stopped.is_some(), "{} does not stop", self.name);
    }

    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let mut states = tasks.map(|task| std::fs::read_to_string(task.path().join("stat")).unwrap_or_default());
        // The name may hold blanks and brackets: the state comes after the last one (proc_pid_stat(5)).
        states.all(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')))
    }

    /// Closes our end of the pipe, as our death would.
    pub fn cut_lifeline(&mut self) {
        self.lifeline = None;
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// At the deadline.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let ended = eventually_blocking(deadline, || self.child.try_wait().ok().flatten());
        ended.unwrap_or_else(|| panic!("{} did not end within {deadline:?}\n{}", self.name, self.log_tail()))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// All it has printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.lifeline = None;
        // One that a test has stopped sees it only when it goes on.
        if self.is_running() {
            self.signal(Signal::SIGCONT);
        }
        let ended = eventually_blocking(CLEANUP, || self.child.try_wait().ok().flatten());
        if std::thread::panicking() {
            eprintln!("---- {} ({})\n{}", self.name, self.log.display(), self.log_tail());
        }
        if ended.is_none() {
            eprintln!("{} did not end after its parent's pipe closed; killing it", self.name);
            self.kill9();
        }
    }
}
