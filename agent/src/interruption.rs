//! Word from outside that this host goes soon: an operator's program that knows
//! (a spot notice of a cloud, a manager that shuts the host down) prints a line
//! of JSON, and the node drains in the time that is left.
//!
//! ```text
//! run ──► exits ──(every)──► run ...
//!  │  └─► over its time ──► killed ──(every)──► run ...
//!  └─ a line ──► the node drains ──► drained: its stdin closes, and it may go
//!                                        └─► nobody asks again before the node is open to work
//! ```

use std::{
    io,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

/// What a run may print; the rest is not read.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;
/// A longer line of its complaints is told in pieces.
const COMPLAINT_BYTES_MAX: u64 = 1 << 10;
/// After its end the rest of its complaints is waited for so long: what it left running may hold the pipe open.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a reason is told.
const REASON_CHARS_MAX: usize = 200;

/// How the program is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The program, without arguments.
    pub program: PathBuf,
    /// It is run again so long after it has ended.
    pub every: Duration,
    /// It is killed after so long; none: it watches, and ends when it likes.
    pub time_limit: Option<Duration>,
    /// Of the host's last time this is not the jobs' own: their grace, and telling how they ended.
    pub reserve: Duration,
}

/// This host goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interruption {
    /// What jobs may still run.
    pub within: Duration,
    /// Why.
    pub reason: String,
}

/// A line of the program.
#[derive(Debug, Deserialize)]
struct Line {
    /// Until this host is gone.
    within_seconds: u64,
    #[serde(default)]
    reason: String,
}

impl Settings {
    /// What a line says.
    ///
    /// # Errors
    /// It is no notice: the sentence.
    fn read(&self, line: &str) -> Result<Interruption, String> {
        let line: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let reason = if line.reason.is_empty() { "a notice came that this host goes" } else { &line.reason };
        Ok(Interruption {
            within: Duration::from_secs(line.within_seconds).saturating_sub(self.reserve),
            reason: reason.chars().filter(|letter| !letter.is_control()).take(REASON_CHARS_MAX).collect(),
        })
    }
}

/// Runs the program again and again, for as long as somebody listens. `drained`: this host is empty, and may go. While it
/// is, there is nothing to be told, and nothing to hold it up for.
pub async fn listen(settings: Settings, say: mpsc::Sender<Interruption>, mut drained: watch::Receiver<bool>) {
    // The same trouble is told once, and so is what the program itself says of it.
    let mut trouble = None;
    let complaint = Arc::default();
    while !say.is_closed() && drained.wait_for(|drained| !*drained).await.is_ok() {
        let found = run(&settings, &say, &mut drained, &complaint).await.err();
        if let Some(sentence) = found.as_ref().filter(|_| found != trouble) {
            tracing::warn!(program = %settings.program.display(), "no notice can be had: {sentence}");
        }
        trouble = found;
        sleep_until(Instant::now() + settings.every).await;
    }
}

/// One run; the sentence of what was wrong with it.
async fn run(
    settings: &Settings,
    say: &mpsc::Sender<Interruption>,
    drained: &mut watch::Receiver<bool>,
    complaint: &Arc<Mutex<String>>,
) -> Result<(), String> {
    let mut command = Command::new(&settings.program);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("it cannot be run: {error}"))?;
    let stderr = child.stderr.take().ok_or("its complaints are not to be had")?;
    let overheard = tokio::spawn(overhear(stderr, Arc::clone(complaint), |said| {
        tracing::warn!("the program that knows when this host goes says: {said}");
    }));
    let over = async {
        match settings.time_limit {
            Some(limit) => sleep_until(Instant::now() + limit).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        heard = hear(&mut child, settings, say, drained) => heard,
        () = over => {
            // Waited for, so that it is gone before the next is run.
            let killed = child.kill().await;
            Err(killed.map_or_else(|error| format!("it does not end: {error}"), |()| "it took too long".to_owned()))
        }
    };
    drop(timeout(LAST_WORDS, overheard).await);
    ended
}

/// Tells what the program says on its stderr, but a line that it says again and again once.
async fn overhear(stderr: impl AsyncRead + Unpin, last: Arc<Mutex<String>>, tell: impl Fn(&str)) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!((&mut stderr).take(COMPLAINT_BYTES_MAX).read_until(b'\n', &mut line).await, Ok(read) if read > 0) {
        let said: String =
            String::from_utf8_lossy(&line).trim().chars().filter(|letter| !letter.is_control()).collect();
        line.clear();
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if !said.is_empty() && said != *last {
            tell(&said);
            *last = said;
        }
    }
}

async fn hear(
    child: &mut Child,
    settings: &Settings,
    say: &mpsc::Sender<Interruption>,
    drained: &mut watch::Receiver<bool>,
) -> Result<(), String> {
    let stdin = child.stdin.take();
    let stdout = child.stdout.take().ok_or("its output is not to be had")?;
    let told = read_lines(stdout, settings, say);
    // Who holds the host up for us lets it go when this closes.
    let lets_go = async {
        drop(drained.wait_for(|drained| *drained).await);
        drop(stdin);
        std::future::pending::<()>().await;
    };
    let told = tokio::select! {
        told = told => told,
        () = lets_go => Ok(()),
    };
    let status = child.wait().await.map_err(|error| error.to_string())?;
    told?;
    if status.success() { Ok(()) } else { Err(format!("it ended with {status}")) }
}

/// A line that is no notice says nothing about the next.
async fn read_lines(
    stdout: impl AsyncRead + Unpin,
    settings: &Settings,
    say: &mpsc::Sender<Interruption>,
) -> Result<(), String> {
    let mut lines = BufReader::new(stdout.take(OUTPUT_BYTES_MAX)).lines();
    let mut wrong = Ok(());
    loop {
        let line = lines.next_line().await.or_else(|error: io::Error| match error.kind() {
            io::ErrorKind::InvalidData => Ok(Some(String::from("\u{fffd}"))),
            _ => Err(error.to_string()),
        })?;
        let Some(line) = line else { return wrong };
        if line.trim().is_empty() {
            continue;
        }
        match settings.read(&line) {
            Ok(interruption) => {
                if say.send(interruption).await.is_err() {
                    return wrong;
                }
            }
            Err(why) => wrong = Err(format!("it prints what is no notice: {why}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use super::*;

    fn settings(folder: &Path, script: &str) -> Settings {
        let program = folder.join("notice");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let (every, reserve) = (Duration::from_millis(1), Duration::from_secs(15));
        Settings { program, every, time_limit: Some(Duration::from_secs(20)), reserve }
    }

    #[test]
    fn a_line_says_when_and_why_and_the_reserve_is_not_the_jobs() {
        let settings = settings(tempfile::tempdir().unwrap().path(), "true");
        let read = |line: &str| settings.read(line).map(|told| (told.within.as_secs(), told.reason));
        assert_eq!(read(r#"{"within_seconds":120,"reason":"spot\nnotice"}"#), Ok((105, "spotnotice".into())));
        assert_eq!(read(r#"{"within_seconds":10,"action":"stop"}"#).map(|told| told.0), Ok(0), "other keys are theirs");
        assert!(
            read("soon").is_err() && read(r#"{"reason":"x"}"#).is_err() && read(r#"{"within_seconds":-1}"#).is_err()
        );
    }

    #[tokio::test]
    async fn each_run_is_asked_and_what_is_wrong_with_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let (say, mut heard) = mpsc::channel(8);
        let (_host, mut drained) = watch::channel(false);
        let mut ask = async |script: &str, limit: Duration| {
            let settings = Settings { time_limit: Some(limit), ..settings(folder.path(), script) };
            run(&settings, &say, &mut drained, &Arc::default()).await
        };
        let long = Duration::from_secs(20);
        assert_eq!(ask("exit 0", long).await, Ok(()));
        assert_eq!(ask("echo '{\"within_seconds\":30}'", long).await, Ok(()));
        assert_eq!(heard.recv().await.map(|told| told.within.as_secs()), Some(15));
        assert_eq!(ask("exit 3", long).await, Err("it ended with exit status: 3".into()));
        assert_eq!(ask("exec tail -f /dev/null", Duration::from_millis(50)).await, Err("it took too long".into()));
        let wrong = ask("echo soon; echo '{\"within_seconds\":60}'", long).await.unwrap_err();
        assert!(wrong.contains("no notice"), "{wrong}");
        assert_eq!(heard.recv().await.map(|told| told.within.as_secs()), Some(45), "the line after it counts");
        fs::remove_file(folder.path().join("notice")).unwrap();
        let absent = Settings { program: folder.path().join("notice"), ..settings(folder.path(), "true") };
        fs::remove_file(&absent.program).unwrap();
        assert!(run(&absent, &say, &mut drained, &Arc::default()).await.unwrap_err().contains("cannot be run"));
        assert!(heard.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_it_says_again_and_again_is_told_once() {
        let (last, told) = (Arc::default(), Mutex::new(Vec::new()));
        let hear =
            async |text: &[u8]| overhear(text, Arc::clone(&last), |said| told.lock().unwrap().push(said.len())).await;
        hear(b"no lock\n\nno lock\nno bus\x07\n").await;
        hear(b"no bus").await;
        hear(b"no lock\n").await;
        assert_eq!(*told.lock().unwrap(), [7, 6, 7]);
        hear(&[b'x'; 3_000]).await;
        assert_eq!(told.lock().unwrap()[3..], [1_024, 952], "a piece that is as the one before is not told");
    }

    #[tokio::test]
    async fn a_host_that_is_drained_is_not_asked_before_it_is_open_again() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path(), "echo '{\"within_seconds\":60}'");
        let (say, mut heard) = mpsc::channel(8);
        let (host, drained) = watch::channel(true);
        let (say_beside, mut heard_beside) = mpsc::channel(8);
        let (_open, never_drained) = watch::channel(false);
        let both = async {
            tokio::join!(listen(settings.clone(), say, drained), listen(settings.clone(), say_beside, never_drained))
        };
        let told = async {
            for _ in 0..5 {
                assert!(heard_beside.recv().await.is_some());
            }
            assert!(heard.try_recv().is_err(), "one beside it was asked five times meanwhile");
            host.send(false).unwrap();
            assert!(heard.recv().await.is_some());
        };
        tokio::select! { _ = both => {}, () = told => {} }
    }

    #[tokio::test]
    async fn a_watcher_is_let_go_when_the_host_is_drained() {
        let folder = tempfile::tempdir().unwrap();
        let script = "echo '{\"within_seconds\":60}'; cat >/dev/null; echo gone >\"${0%/*}/gone\"";
        let settings = Settings { time_limit: None, ..settings(folder.path(), script) };
        let (say, mut heard) = mpsc::channel(8);
        let (host, mut drained) = watch::channel(false);
        let watched = tokio::spawn(async move { run(&settings, &say, &mut drained, &Arc::default()).await });
        assert!(heard.recv().await.is_some());
        assert!(!folder.path().join("gone").exists(), "it holds the host up until then");
        host.send(true).unwrap();
        assert_eq!(watched.await.unwrap(), Ok(()));
        assert!(folder.path().join("gone").exists());
    }
}
