//! Pools as an operator steers them: a real local fleet that follows its work,
//! and every command of `muster pool`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use muster_tests::{WAIT, eventually_blocking, host, part::muster_binary};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// Booting, working and shrinking again, on a machine with other work.
const LONG: Duration = Duration::from_secs(180);
const POLICY: &str = r#"
name = "small"
provider = "local"
max = 2
boot_deadline = "60s"

[host]
cpu = "400m"
memory = "96MiB"
disk = "64MiB"
"#;

/// `muster up` with one pool, in a folder of its own.
struct Up {
    folder: TempDir,
    child: Child,
    server: String,
}

impl Up {
    fn start(policy: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("muster-e2e-").tempdir().expect("a temporary folder");
        let file = folder.path().join("policy.toml");
        fs::write(&file, policy).expect("a file");
        let mut child = Command::new(muster_binary())
            .args(["up", "-o", "json", "--policy"])
            .arg(&file)
            .env("TMPDIR", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.path().join("stderr")).expect("a file"))
            .spawn()
            .expect("a fleet starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("it says where it is");
        let told: Value = serde_json::from_str(&line).unwrap_or_default();
        let server = told["server"].as_str().map(String::from);
        let said = || fs::read_to_string(folder.path().join("stderr")).unwrap_or_default();
        let server = server.unwrap_or_else(|| panic!("it did not start: {line} {}", said()));
        Self { folder, child, server }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("a file");
        path
    }

    /// Exit code, stdout and stderr of a command.
    fn muster(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(muster_binary())
            .args(arguments)
            .env("MUSTER_SERVER", &self.server)
            .stdin(Stdio::null())
            .output()
            .expect("it runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn told(&self, arguments: &[&str]) -> Value {
        let (code, out, err) = self.muster(&[arguments, &["-o", "json"]].concat());
        assert_eq!(code, Some(0), "{arguments:?}: {err}");
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {out}"))
    }

    fn pool(&self) -> Value {
        self.told(&["pool", "list"])["items"][0].clone()
    }

    fn explained(&self) -> String {
        self.muster(&["pool", "explain", "small"]).1
    }

    /// Waits until the pool has so many live nodes and none that boots or drains.
    fn has_nodes(&self, nodes: u64) {
        let settled = || {
            let pool = self.pool();
            let count = |key: &str| pool[key].as_u64().unwrap_or(u64::MAX);
            (count("nodes") == nodes && count("booting") == 0 && count("hosts") == nodes).then_some(())
        };
        assert!(eventually_blocking(LONG, settled).is_some(), "not {nodes} nodes:\n{}", self.explained());
    }

    fn end(mut self) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), Signal::SIGINT).expect("our own child");
        let ended = eventually_blocking(LONG, || self.child.try_wait().ok().flatten());
        assert!(ended.is_some_and(|status| status.success()), "it ends: {ended:?}");
        let marker = self.folder.path().to_str().expect("a plain path").to_owned();
        let clean = eventually_blocking(WAIT, || host::processes_with(&marker).is_empty().then_some(()));
        assert!(clean.is_some(), "left behind: {:?}", host::processes_with(&marker));
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // A test that failed: the kill of the parent ends all of its fleet.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_pool_grows_for_its_work_and_shrinks_to_nothing() {
    let up = Up::start(POLICY);
    assert_eq!((&up.pool()["nodes"], &up.pool()["wanted"]), (&Value::from(0), &Value::from(0)));
    // One node that tells what this host can fence.
    up.told(&["pool", "scale", "small", "1"]);
    up.has_nodes(1);
    let submit =
        ["job", "submit", "--array", "0-7", "--cpu", "200m", "--memory", "32M", "--disk", "16M", "--best-effort"];
    let (code, _, err) = up.muster(&[&submit[..], &["--", "sleep", "3"]].concat());
    assert_eq!(code, Some(0), "{err}");
    up.told(&["pool", "resume", "small"]);
    let (code, _, err) = up.muster(&["job", "wait", "@last", "--timeout", "170s"]);
    assert_eq!(code, Some(0), "{err}\n{}", up.explained());
    up.has_nodes(0);

    let decisions = up.told(&["pool", "history", "small"])["items"].as_array().cloned().expect("a list");
    let sizes = |decision: &Value| (decision["from"].as_u64(), decision["to"].as_u64());
    assert!(decisions.iter().any(|decision| sizes(decision).1 > sizes(decision).0), "{decisions:?}");
    assert!(decisions.iter().any(|decision| sizes(decision).1 < sizes(decision).0), "{decisions:?}");
    assert!(decisions.iter().all(|decision| sizes(decision).1 <= Some(2)), "FL-11: {decisions:?}");
    for decision in &decisions {
        let text = |key: &str| decision[key].as_str().unwrap_or_default().to_owned();
        assert!(!text("reason").is_empty(), "FL-14: {decision}");
        assert!(text("inputs").contains("hosts counted"), "{decision}");
    }
    up.end();
}

#[test]
fn an_operator_sets_a_size_pauses_resumes_and_deletes() {
    let up = Up::start(POLICY);
    let (code, _, err) = up.muster(&["pool", "scale", "small", "3"]);
    assert_eq!(code, Some(5), "more than max: {err}");
    assert!(err.contains("of max 2, and 3 are asked"), "{err}");
    up.told(&["pool", "scale", "small", "1", "--reason", "a test"]);
    up.has_nodes(1);
    assert_eq!(up.pool()["size_set"], 1);
    assert!(up.explained().contains("1 by an operator, until resumed"), "{}", up.explained());

    let (code, _, err) = up.muster(&["pool", "delete", "small"]);
    assert_eq!(code, Some(5), "it has a host: {err}");
    up.told(&["pool", "resume", "small"]);
    up.told(&["pool", "pause", "small", "--reason", "racks move"]);
    assert!(up.pool()["paused"].as_str().is_some_and(|paused| paused.starts_with("racks move")), "{}", up.pool());
    let paused = eventually_blocking(WAIT, || up.explained().contains("paused by an operator").then_some(()));
    assert!(paused.is_some(), "{}", up.explained());

    up.told(&["pool", "resume", "small"]);
    up.told(&["pool", "scale", "small", "0"]);
    up.has_nodes(0);
    let (code, _, err) = up.muster(&["pool", "delete", "small"]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(up.told(&["pool", "list"])["items"].as_array().map(Vec::len), Some(0));
    assert_eq!(up.muster(&["pool", "show", "small"]).0, Some(3));
    up.end();
}

#[test]
fn a_policy_is_refused_by_the_name_of_its_key_and_shown_as_it_is_written() {
    let up = Up::start(POLICY);
    for (keys, sentence) in [
        ("scale_out = [{ metric = \"wait_time\", above = 2 }]\n", "`scale_out[0].above` needs a unit"),
        ("shedule = []\n", "unknown field `shedule`"),
        ("min = 9\n", "`min` is 9, more than max 2"),
    ] {
        let file = up.file("bad.toml", &format!("{keys}{POLICY}"));
        let (code, _, err) = up.muster(&["pool", "set", "-f", file.to_str().expect("a plain path")]);
        assert_eq!(code, Some(2), "{keys}: {err}");
        assert!(err.contains(sentence), "{err}");
    }
    let shown = up.muster(&["pool", "show", "small"]).1;
    let again = up.file("again.toml", &shown);
    let set = up.told(&["pool", "set", "-f", again.to_str().expect("a plain path")]);
    assert_eq!(set["policy"].as_str().map(str::trim), Some(shown.trim()));
    assert!(shown.contains("preset = \"demand\"") && shown.contains("memory = \"96MiB\""), "{shown}");
    up.end();
}

#[test]
fn every_example_of_a_policy_is_one() {
    let up = Up::start(POLICY);
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/pools"));
    let mut examples = 0;
    for entry in fs::read_dir(folder).expect("the folder of examples").flatten() {
        let text = fs::read_to_string(entry.path()).expect("a file");
        // Nothing is to be made for it: the machine is smaller than an example's fleet.
        let file = up.file("example.toml", &text.replace("provider = \"local\"", "provider = \"static\""));
        let (code, _, err) = up.muster(&["pool", "set", "-f", file.to_str().expect("a plain path")]);
        assert_eq!(code, Some(0), "{}: {err}", entry.path().display());
        examples += 1;
    }
    assert!(examples >= 4, "{examples} examples");
    assert_eq!(up.told(&["pool", "list"])["items"].as_array().map(Vec::len), Some(examples + 1));
    up.end();
}
