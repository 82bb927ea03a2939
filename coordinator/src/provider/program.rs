//! An operator's program that makes, ends or wakes hosts: how it is asked. It gets the
//! operation as its argument and one JSON object on stdin, and answers with one
//! JSON object on stdout; docs/providers.md is its manual.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable as _};
use muster_core::limits;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

/// Exit code of a program that could not now and may be asked again (EX_TEMPFAIL, sysexits(3)).
const TRY_AGAIN: i32 = 75;
/// Programs that one provider runs at once; further orders wait.
pub(super) const PROGRAMS_MAX: usize = 8;
/// Tries of one order before its failure is told.
const TRIES: usize = 3;
/// An answer, at most.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// Of what it says on stderr this much, from its end, is told.
const COMPLAINT_BYTES_MAX: usize = 2_000;

/// What is asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Make a host, or find the one that was made for this request.
    Create,
    /// End a host, and all that was made for it.
    Delete,
    /// All hosts of this fleet.
    List,
    /// What became of one host.
    Describe,
    /// Wake a host that sleeps; one that is awake stays so.
    Wake,
}

impl Operation {
    const fn word(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Delete => "delete",
            Self::List => "list",
            Self::Describe => "describe",
            Self::Wake => "wake",
        }
    }

    const fn time_limit(self) -> Duration {
        match self {
            Self::Create | Self::Delete | Self::Wake => Duration::from_millis(limits::PROVIDER_CHANGE_TIME.0),
            Self::List | Self::Describe => Duration::from_millis(limits::PROVIDER_LOOK_TIME.0),
        }
    }
}

/// To make a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Create {
    /// Of this request alone, in all fleets and for ever: the same request is the same host.
    pub request: String,
    /// The fleet, which is the beginning of every request of it.
    pub fleet: String,
    /// The pool.
    pub pool: String,
    /// The host's name, as the fleet will show it.
    pub name: String,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes for working folders.
    pub disk_bytes: u64,
    /// Labels of the pool's hosts.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Where its agent dials.
    pub coordinator: String,
    /// What its agent joins with, once; holds the CA's fingerprint.
    pub token: String,
}

/// Which host is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Which {
    /// The request that it was made for.
    pub request: String,
    /// The fleet.
    pub fleet: String,
    /// The pool; empty: of a host that the fleet does not know any more.
    pub pool: String,
    /// Its name.
    pub name: String,
}

/// Which host to wake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wake {
    /// Of this waking alone, in all fleets and for ever; it may be asked for more than once.
    pub request: String,
    /// The fleet, which is the beginning of every request of it.
    pub fleet: String,
    /// The pool.
    pub pool: String,
    /// The node's number, for ever: `n7`.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Its labels, as its agent told them last.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// It wakes the host, or has woken it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Woken {}

/// Whose hosts to list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Whose {
    /// The fleet.
    pub fleet: String,
}

/// It makes the host, or has made it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Created {
    /// What the program calls it.
    pub instance: Option<String>,
}

/// It ends the host, or has ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Deleted {
    /// How far it is.
    pub state: Going,
}

/// How far a host's end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Going {
    /// Nothing of it is left.
    Gone,
    /// Under way: the list tells when it is gone.
    Going,
}

/// All hosts of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Listed {
    /// Each that is not wholly gone.
    pub hosts: Vec<ListedHost>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ListedHost {
    /// The request that it was made for.
    pub request: String,
}

/// What became of a host, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Described {
    /// For people: a state, the last line of its console.
    pub summary: String,
    /// Why it must not be deleted now; none: it may.
    #[serde(default)]
    pub keep: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, or must not be trusted: it did not run.
    #[error("the provider's program {0}: {1}")]
    Unfit(String, String),
    /// It said no.
    #[error("{program} {operation}: {complaint}")]
    Refused {
        /// Its path.
        program: String,
        /// What it was asked.
        operation: &'static str,
        /// Its last words.
        complaint: String,
        /// It may be asked again soon.
        again: bool,
    },
    /// It took too long and was ended.
    #[error("{program} {operation}: no answer within {} s; it was ended", .limit.as_secs())]
    Silent {
        /// Its path.
        program: String,
        /// What it was asked.
        operation: &'static str,
        /// What it had.
        limit: Duration,
    },
    /// It answered something else.
    #[error("{program} {operation}: its answer is not as documented: {why}")]
    Answer {
        /// Its path.
        program: String,
        /// What it was asked.
        operation: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// Nothing can have come of it.
    #[must_use]
    pub const fn never_ran(&self) -> bool {
        matches!(self, Self::Unfit(..))
    }

    /// Worth another try soon.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Refused { again, .. } => *again,
            Self::Silent { .. } => true,
            Self::Unfit(..) | Self::Answer { .. } => false,
        }
    }
}

/// One provider's program.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
}

impl Program {
    /// The program of this name in the providers' folder.
    #[must_use]
    pub fn new(folder: &Path, name: &str) -> Self {
        Self { path: folder.join(name) }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// It runs with the coordinator's rights: whoever may write it is the coordinator.
    fn check(&self) -> Result<(), Error> {
        let unfit = |why: &str| Error::Unfit(self.name(), why.to_owned());
        let file = fs::metadata(&self.path).map_err(|error| unfit(&error.to_string()))?;
        // SAFETY: geteuid(2) takes nothing and cannot fail.
        let own = unsafe { libc::geteuid() };
        if !file.is_file() || file.permissions().mode() & 0o111 == 0 {
            Err(unfit("is not an executable file"))
        } else if file.uid() != 0 && file.uid() != own {
            Err(unfit("belongs neither to root nor to the coordinator's user"))
        } else if file.permissions().mode() & 0o022 != 0 {
            Err(unfit("may be written by others than its owner (chmod go-w)"))
        } else {
            Ok(())
        }
    }

    /// Asks once. When the time is over, the program and all that it has started in its process group are ended.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn ask<A: DeserializeOwned>(&self, operation: Operation, about: &impl Serialize) -> Result<A, Error> {
        self.ask_within(operation.time_limit(), operation, about).await
    }

    async fn ask_within<A: DeserializeOwned>(
        &self,
        limit: Duration,
        operation: Operation,
        about: &impl Serialize,
    ) -> Result<A, Error> {
        self.check()?;
        let word = operation.word();
        let mut running = Running(self.spawn(word)?);
        let question = serde_json::to_vec(about).expect("a table of plain values");
        let answer = tokio::time::timeout(limit, converse(&mut running.0, &question)).await;
        drop(running);
        let (status, stdout, stderr) = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                return Err(Error::Answer { program: self.name(), operation: word, why: error.to_string() });
            }
            Err(_elapsed) => return Err(Error::Silent { program: self.name(), operation: word, limit }),
        };
        if !status.success() {
            let again = status.code() == Some(TRY_AGAIN);
            let complaint = last_words(&stderr).unwrap_or_else(|| format!("ended with {status} and no word"));
            return Err(Error::Refused { program: self.name(), operation: word, complaint, again });
        }
        serde_json::from_slice(&stdout).map_err(|error| Error::Answer {
            program: self.name(),
            operation: word,
            why: error.to_string(),
        })
    }

    fn spawn(&self, word: &str) -> Result<Child, Error> {
        Command::new(&self.path)
            .arg(word)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Error::Unfit(self.name(), error.to_string()))
    }
}

/// A program that runs. One that is not waited for to its end, because its time is over or the coordinator stops, is
/// ended with its process group.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // None: it was reaped, and its number may be another's.
        if let Some(leader) = self.0.id() {
            // SAFETY: kill(2) takes no memory. Its leader is not reaped yet, so the group is still its own.
            unsafe { libc::kill(-leader.cast_signed(), libc::SIGKILL) };
        }
    }
}

async fn converse(child: &mut Child, question: &[u8]) -> io::Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>)> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let ask = async {
        if let Some(mut stdin) = stdin {
            // One that needs no question may close its stdin.
            let _not_read = stdin.write_all(question).await;
        }
    };
    let ((), stdout, stderr) = tokio::join!(ask, read_bounded(stdout), read_bounded(stderr));
    Ok((child.wait().await?, stdout?, stderr?))
}

async fn read_bounded(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let Some(stream) = stream else { return Ok(bytes) };
    stream.take(ANSWER_BYTES_MAX + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > ANSWER_BYTES_MAX {
        return Err(io::Error::other(format!("more than {ANSWER_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// The end of what it said on stderr, in one line.
fn last_words(stderr: &[u8]) -> Option<String> {
    let from = stderr.len().saturating_sub(COMPLAINT_BYTES_MAX);
    let text = String::from_utf8_lossy(&stderr[from..]);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join(" | ");
    (!last.is_empty()).then_some(last)
}

/// Asks again, with growing pauses, what may pass.
pub(super) async fn patiently<A, F: Future<Output = Result<A, Error>>>(ask: impl FnMut() -> F) -> Result<A, Error> {
    let waits = ExponentialBuilder::default()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(10))
        .with_max_times(TRIES - 1)
        .with_jitter();
    ask.retry(waits).when(Error::may_pass).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(script: &str) -> (tempfile::TempDir, Program) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p");
        // Written, closed and renamed, so that no other test's fork holds it open for writing (ETXTBSY, execve(2)).
        fs::write(folder.path().join("new"), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(folder.path().join("new"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        let program = Program::new(folder.path(), "p");
        (folder, program)
    }

    fn whose() -> Whose {
        Whose { fleet: "f".to_owned() }
    }

    #[tokio::test]
    async fn an_answer_is_read_and_the_question_is_told() {
        let (_folder, program) =
            program(r#"read q; [ "$1" = list ] && [ "$q" = '{"fleet":"f"}' ] && echo '{"hosts":[{"request":"f-1"}]}'"#);
        let listed: Listed = program.ask(Operation::List, &whose()).await.unwrap();
        assert_eq!(listed.hosts, [ListedHost { request: "f-1".to_owned() }]);
    }

    #[tokio::test]
    async fn a_refusal_has_its_last_words_and_says_whether_to_ask_again() {
        let (_folder, quota) = program("echo one >&2; echo quota exceeded >&2; exit 1");
        let error = quota.ask::<Listed>(Operation::List, &whose()).await.unwrap_err();
        assert!(error.to_string().ends_with("list: one | quota exceeded"), "{error}");
        assert!(!error.may_pass() && !error.never_ran());
        let (_folder, busy) = program("exit 75");
        assert!(busy.ask::<Listed>(Operation::List, &whose()).await.unwrap_err().may_pass());
    }

    #[tokio::test]
    async fn nonsense_is_no_answer() {
        let (_folder, program) = program("echo '{\"hosts\": 3}'");
        let error = program.ask::<Listed>(Operation::List, &whose()).await.unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{error}");
    }

    #[tokio::test]
    async fn one_that_hangs_is_ended_with_its_children() {
        let (folder, program) = program("sleep 3600 & echo $! > \"${0%/p}/pid\"; wait");
        let began = || folder.path().join("pid").metadata().is_ok_and(|file| file.len() > 0);
        // On a busy machine the script may need longer to begin than the limit: then it is asked again.
        while !began() {
            let error =
                program.ask_within::<Listed>(Duration::from_secs(1), Operation::List, &whose()).await.unwrap_err();
            assert!(matches!(error, Error::Silent { .. }), "{error}");
        }
        let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while Path::new(&format!("/proc/{}", pid.trim())).exists() && !is_zombie(pid.trim()) {
            assert!(std::time::Instant::now() < deadline, "its child lives on");
            tokio::task::yield_now().await;
        }
    }

    fn is_zombie(pid: &str) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    }

    #[tokio::test]
    async fn a_program_that_others_may_write_is_not_run() {
        let (folder, program) = program("echo '{\"hosts\": []}'");
        fs::set_permissions(folder.path().join("p"), fs::Permissions::from_mode(0o722)).unwrap();
        let error = program.ask::<Listed>(Operation::List, &whose()).await.unwrap_err();
        assert!(error.never_ran() && error.to_string().contains("chmod go-w"), "{error}");
        let missing = Program::new(folder.path(), "none").ask::<Listed>(Operation::List, &whose()).await.unwrap_err();
        assert!(missing.never_ran(), "{missing}");
    }
}
