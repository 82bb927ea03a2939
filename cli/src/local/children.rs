//! Starts this executable again as one of its other programs: in a session of
//! its own, so that Ctrl-C reaches only the parent, with its log in a file.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::{Child, Command};

use super::pipes::{self, Inherited};

/// Between two looks at what makes no event.
pub const GLANCE: Duration = Duration::from_millis(10);
/// A log's last part that is shown when a child failed.
const TAIL_BYTES: u64 = 4_096;

/// Starts one program of this executable.
pub fn start(program: &str, args: &[OsString], env: &[(&str, &str)], log: &Path, fds: Inherited) -> io::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
    // The file that runs now, also when a new one was put in its place.
    let mut command = Command::new("/proc/self/exe");
    command.arg0(program).args(args);
    for name in ["MUSTER_SERVER", "MUSTER_CA", "MUSTER_CERT", "MUSTER_CERT_KEY", "MUSTER_TOKEN", "NOTIFY_SOCKET"] {
        command.env_remove(name);
    }
    command.envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
    // SAFETY: between fork and exec only setsid(2) and fcntl(2) are called,
    // both async-signal-safe; nothing allocates.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            pipes::keep_over_exec(fds.parent)?;
            pipes::keep_over_exec(fds.children)
        });
    }
    command.spawn()
}

/// SIGTERM. The child is ours and not reaped, so its number is still its own.
pub fn terminate(child: &Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // One that has just ended needs no signal.
        let _already_gone = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

/// Waits this long for the end, then kills.
pub async fn end_within(child: &mut Child, patience: Duration) -> io::Result<ExitStatus> {
    match tokio::time::timeout(patience, child.wait()).await {
        Ok(ended) => ended,
        Err(_late) => {
            child.start_kill()?;
            child.wait().await
        }
    }
}

/// The last lines of a log, for a person who asks why.
pub fn tail(log: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(5).collect();
    lines.into_iter().rev().map(crate::escape::text).collect::<Vec<_>>().join(" | ")
}

/// How a child ended, in words.
pub fn words(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// A folder that only its owner and those who know a name in it can use.
pub fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Waits before a child is started again: longer with each failure in a row.
#[derive(Debug)]
pub struct Backoff {
    failures: u32,
    started: tokio::time::Instant,
}

/// First wait; doubles up to the longest.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A child that lived this long starts the count anew.
const LIVED: Duration = Duration::from_secs(10);
/// After this many failures in a row it is given up.
const FAILURES_MAX: u32 = 10;

impl Backoff {
    /// For a child that starts now.
    pub fn new() -> Self {
        Self { failures: 0, started: tokio::time::Instant::now() }
    }

    /// The wait after this failure; none: give up.
    pub fn after_failure(&mut self) -> Option<Duration> {
        self.failures = if self.started.elapsed() > LIVED { 1 } else { self.failures + 1 };
        (self.failures <= FAILURES_MAX)
            .then(|| (BACKOFF_MIN * 2u32.saturating_pow(self.failures - 1).min(1_000)).min(BACKOFF_MAX))
    }

    /// It was started again.
    pub fn started(&mut self) {
        self.started = tokio::time::Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_grow_and_end() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = std::iter::from_fn(|| backoff.after_failure()).collect();
        assert_eq!(waits.len(), FAILURES_MAX as usize);
        assert_eq!((waits[0], waits[1], waits[9]), (BACKOFF_MIN, BACKOFF_MIN * 2, BACKOFF_MAX));
    }
}
