//! `muster demo` as a person runs it: all results right, the fleet grown and
//! shrunk, and nothing left on the machine, however it ends.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use muster_tests::{WAIT, eventually_blocking, host, part::muster_binary};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::Value;
use tempfile::TempDir;

const FILES: usize = 200;
const LONG: Duration = Duration::from_secs(240);

/// A folder of work, and a place of its own for all that the demo makes.
struct Stage {
    work: TempDir,
    temporary: TempDir,
    cgroups_before: BTreeSet<String>,
}

impl Stage {
    fn new(files: usize) -> Self {
        let folder = || tempfile::Builder::new().prefix("muster-e2e-").tempdir().expect("a temporary folder");
        let stage = Self { work: folder(), temporary: folder(), cgroups_before: demo_cgroups() };
        fill(stage.work.path(), files);
        stage
    }

    fn demo(&self) -> Child {
        Command::new(muster_binary())
            .args(["demo", "--json"])
            .arg(self.work.path())
            .env("TMPDIR", self.temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(self.stderr()).expect("a file"))
            .spawn()
            .expect("the demo starts")
    }

    fn stderr(&self) -> PathBuf {
        // Beside the demo's own files, and no part of its work.
        self.temporary.path().join("stderr")
    }

    fn marker(&self) -> &str {
        self.temporary.path().to_str().expect("a plain path")
    }

    /// Waits until several nodes work.
    fn in_the_middle(&self) {
        let agents = || host::processes_with(self.marker()).iter().filter(|(_, name)| name.contains(" run ")).count();
        let busy = eventually_blocking(WAIT, || (agents() >= 2).then_some(()));
        assert!(busy.is_some(), "the demo never had two nodes: {}", self.said());
    }

    fn said(&self) -> String {
        fs::read_to_string(self.stderr()).unwrap_or_default()
    }

    /// No process, mount, cgroup or file of the demo is left; waits for those that clean up after a kill.
    fn assert_nothing_is_left(&self) {
        let left = || {
            let mut left: Vec<String> = host::processes_with(self.marker())
                .into_iter()
                .map(|(pid, name)| format!("process {pid} {name}"))
                .collect();
            left.extend(host::mounts_with(self.marker()).into_iter().map(|mount| format!("mount {mount}")));
            left.extend(demo_cgroups().difference(&self.cgroups_before).map(|name| format!("cgroup {name}")));
            let files = fs::read_dir(self.temporary.path()).into_iter().flatten().flatten();
            let files = files.filter(|entry| entry.file_name() != "stderr");
            left.extend(files.map(|entry| format!("file {}", entry.path().display())));
            left
        };
        let clean = eventually_blocking(WAIT, || left().is_empty().then_some(()));
        assert!(clean.is_some(), "left behind:\n{}\n{}", left().join("\n"), self.said());
    }
}

/// Cgroups of fleets that are not the end-to-end harness's own.
fn demo_cgroups() -> BTreeSet<String> {
    host::muster_cgroups().into_iter().filter(|name| !name.contains("e2e-")).collect()
}

/// Files with the names and kinds that real folders have.
fn fill(folder: &Path, files: usize) {
    for number in 0..files {
        let below = folder.join(format!("d{}", number % 7));
        fs::create_dir_all(&below).expect("a folder");
        // From nothing to more than travels inline.
        let size = if number % 50 == 0 { 300_000 } else { number * 37 % 9_000 };
        let content: Vec<u8> = (0..size).map(|at| u8::try_from((at * 31 + number) % 251).expect("small")).collect();
        fs::write(below.join(format!("file {number}")), content).expect("a file");
    }
    let odd: [&[u8]; 6] = [b"with  spaces ", b"line\nbreak", b"not-utf8-\xff\xfe", b"-dash", b"{}", b"'quote\"$(x)"];
    for name in odd {
        fs::write(folder.join(OsStr::from_bytes(name)), name).expect("a file with an odd name");
    }
    fs::write(folder.join("unreadable"), "secret").expect("a file");
    let mut closed = fs::metadata(folder.join("unreadable")).expect("it was made").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut closed, 0);
    fs::set_permissions(folder.join("unreadable"), closed).expect("it is ours");
    mkfifo(&folder.join("fifo"), Mode::S_IRWXU).expect("a FIFO");
    std::os::unix::fs::symlink("/etc/passwd", folder.join("link")).expect("a link");
    std::os::unix::fs::symlink("nowhere", folder.join("dangling")).expect("a link");
}

fn wait(child: &mut Child, stage: &Stage) -> Option<i32> {
    let ended = eventually_blocking(LONG, || child.try_wait().ok().flatten());
    let Some(status) = ended else {
        // Our own child, not yet reaped.
        let _ = child.kill();
        panic!("the demo did not end: {}", stage.said());
    };
    status.code()
}

#[test]
fn the_demo_verifies_every_file_grows_shrinks_and_leaves_nothing() {
    let stage = Stage::new(FILES);
    let mut child = stage.demo();
    let mut stdout = child.stdout.take().expect("a pipe");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut text).map(|_| text)
    });
    let code = wait(&mut child, &stage);
    let text = reader.join().expect("the reader ends with the pipe").expect("UTF-8");
    assert_eq!(code, Some(0), "{text}\n{}", stage.said());
    let told: Value = serde_json::from_str(&text).expect("one JSON document on stdout");

    // 200 plain ones, six odd ones, and as root also the unreadable one.
    let tasks = FILES + 6 + usize::from(host::is_root());
    assert_eq!(told["tasks"], tasks, "{told:#}");
    assert_eq!(told["verified"], tasks, "{told:#}");
    assert_eq!((told["failed"].as_u64(), told["ok"].as_bool()), (Some(0), Some(true)), "{told:#}");
    let skipped = told["skipped_files"].as_array().expect("a list");
    for name in ["fifo", "link", "dangling"] {
        let named = skipped.iter().any(|file| file["path"].as_str().is_some_and(|path| path.ends_with(name)));
        assert!(named, "{name} is told as skipped: {skipped:?}");
    }
    assert!(skipped.iter().all(|file| file["reason"].as_str().is_some_and(|reason| !reason.is_empty())));

    let decisions = told["decisions"].as_array().expect("a list");
    let grown = decisions.iter().filter(|decision| decision["to"].as_u64() > decision["from"].as_u64()).count();
    assert!(grown >= 2, "two scale-outs at least: {decisions:?}");
    assert!(decisions.iter().any(|decision| decision["to"].as_u64() < decision["from"].as_u64()), "{decisions:?}");
    assert!(told["nodes_peak"].as_u64() >= Some(2) && told["nodes_end"] == 0, "{told:#}");
    let drained = told["drained"].as_array().expect("a list");
    assert!(
        drained.iter().all(|drain| drain["proved_at"].is_string() && drain["exited_at"].is_string()),
        "{drained:?}"
    );
    stage.assert_nothing_is_left();
}

#[test]
fn ctrl_c_in_the_middle_of_the_demo_leaves_nothing() {
    let stage = Stage::new(FILES);
    let mut child = stage.demo();
    stage.in_the_middle();
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGINT).expect("our own child");
    assert_eq!(wait(&mut child, &stage), Some(130), "{}", stage.said());
    stage.assert_nothing_is_left();
}

#[test]
fn kill_9_in_the_middle_of_the_demo_leaves_nothing() {
    let stage = Stage::new(FILES);
    let mut child = stage.demo();
    stage.in_the_middle();
    child.kill().expect("our own child");
    child.wait().expect("it is dead");
    stage.assert_nothing_is_left();
}
