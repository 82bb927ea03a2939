//! Word from outside that a host goes: a probe of the operator's, the shipped one for EC2 with a stand-in for its
//! metadata service, and a watcher that holds the shutdown up, the shipped script with a stand-in for logind.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, NodeOptions, WAIT, eventually, eventually_blocking, fleet::selector, skip};

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
}

fn shipped(name: &str) -> PathBuf {
    let notices = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/notices");
    notices.join(name).canonicalize().expect("it is shipped")
}

fn asking(program: &Path, more: &[&str]) -> NodeOptions {
    let mut agent_flags: Vec<OsString> = vec!["--notice-program".into(), program.into()];
    agent_flags.extend(more.iter().map(OsString::from));
    NodeOptions { agent_flags, ..NodeOptions::default() }
}

/// Milliseconds until the node's deadline, as the coordinator has it.
fn within_ms(node: &v1::Node) -> u64 {
    let drain = node.drain.as_ref().expect("it drains");
    drain.deadline_ms.expect("it has until then") - drain.requested_ms
}

#[tokio::test]
async fn a_spot_notice_drains_the_host_in_the_time_that_it_leaves() {
    let mut fleet = Fleet::start().await;
    let (probe, notice) = (fleet.folder().join("probe"), fleet.folder().join("notice.json"));
    script(&probe, &format!("cat '{}' 2>/dev/null || true", notice.display()));
    fleet.add_node("n1", &asking(&probe, &["--notice-every-seconds", "1"])).await;
    let endless = fleet.script("[ \"${MUSTER_EPOCH#*.}\" = 1 ] || exit 0; trap 'exit 9' TERM; sleep 600 & wait");
    let (short, endless) =
        (fleet.client.submit(fleet.script("sleep 2; echo finished")).await, fleet.client.submit(endless).await);
    fleet.client.running(short, 1).await;
    fleet.client.running(endless, 1).await;

    // Whole or not there, as a metadata service answers.
    let new = fleet.folder().join("notice.new");
    fs::write(&new, "{\"within_seconds\": 20, \"reason\": \"spot notice\"}\n").expect("a notice");
    fs::rename(new, &notice).expect("its place");
    let node = fleet.client.node_in("n1", "draining").await;
    let drain = node.drain.clone().expect("a drain");
    assert_eq!((drain.actor.as_str(), drain.reason.as_str()), ("host n1", "spot notice"));
    let within = within_ms(&node);
    assert!((2_000..=5_000).contains(&within), "20 s but for the reserve of 15: {within} ms");

    // What can finish does; what cannot is elsewhere before the host is gone.
    let done = fleet.client.finished(short, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    fleet.client.node_in("n1", "drained").await;
    fleet.add_node("n2", &NodeOptions::default()).await;
    let done = fleet.client.finished(endless, WAIT).await;
    let first = done.tasks[0].attempts[0].end.clone().and_then(|end| end.reason);
    assert_eq!((first, done.last_attempt(0).node_name), (Some(Reason::Drained(v1::Empty {})), "n2".to_owned()));

    // The same notice, again and again, is one drain; without it a host that begins anew takes work.
    assert_eq!(fleet.client.node("n1").await.and_then(|node| node.drain).map(|drain| drain.revision), Some(1));
    fs::remove_file(&notice).expect("it was there");
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    fleet.start_agent("n1");
    fleet.client.node_in("n1", "ready").await;
}

#[tokio::test]
async fn a_notice_that_comes_again_with_less_time_brings_the_deadline_forward() {
    let mut fleet = Fleet::start().await;
    let (probe, notice) = (fleet.folder().join("probe"), fleet.folder().join("notice.json"));
    script(&probe, &format!("cat '{}' 2>/dev/null || true", notice.display()));
    let options = asking(&probe, &["--notice-every-seconds", "1", "--notice-reserve-seconds", "0"]);
    fleet.add_node("n1", &options).await;
    let job = fleet.client.submit(fleet.script("sleep 600")).await;
    fleet.client.running(job, 1).await;
    fs::write(&notice, "{\"within_seconds\": 3600}\n").expect("a notice");
    let later = within_ms(&fleet.client.node_in("n1", "draining").await);
    fs::write(&notice, "{\"within_seconds\": 600}\n").expect("a notice");
    let sooner = eventually("the deadline comes forward", WAIT, async || {
        Some(within_ms(&fleet.client.node("n1").await?)).filter(|within| *within < later)
    })
    .await;
    assert!((3_590_000..=3_600_500).contains(&later) && sooner < 660_000, "{later} ms, then {sooner} ms");
}

/// EC2's instance metadata, version 2, as its documentation has it: a token for the asking by PUT with its time to
/// live, nothing without a token, and 404 where there is nothing to be told.
struct Metadata {
    address: SocketAddr,
    /// Paths below `meta-data/` and what they hold.
    items: Arc<Mutex<Vec<(&'static str, String)>>>,
}

const TOKEN: &str = "AQAEAHyTg==";
const REBALANCE: &str = "events/recommendations/rebalance";
const ACTION: &str = "spot/instance-action";

impl Metadata {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its number");
        let items = Arc::new(Mutex::new(Vec::new()));
        let served = Arc::clone(&items);
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is no concern of others.
                drop(answer(stream, &served.lock().expect("nobody panicked")));
            }
        });
        Self { address, items }
    }

    fn hold(&self, items: &[(&'static str, String)]) {
        *self.items.lock().expect("nobody panicked") = items.to_vec();
    }

    /// The shipped program, as the agent runs it.
    fn ask(&self) -> Output {
        Command::new(shipped("spot-ec2")).env("METADATA", self.url()).output().expect("it runs")
    }

    fn url(&self) -> String {
        format!("http://{}/latest", self.address)
    }
}

fn answer(mut stream: TcpStream, items: &[(&'static str, String)]) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let header = |name: &str| headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str());
    let lives = header("x-aws-ec2-metadata-token-ttl-seconds").and_then(|text| text.parse::<u32>().ok());
    let mut words = request.split(' ');
    let (status, body) = match (words.next(), words.next().and_then(|path| path.strip_prefix("/latest/"))) {
        (Some("PUT"), Some("api/token")) if lives.is_some_and(|lives| (1..=21_600).contains(&lives)) => (200, TOKEN),
        (Some("PUT"), Some("api/token")) => (400, ""),
        (Some("GET"), _) if header("x-aws-ec2-metadata-token") != Some(TOKEN) => (401, ""),
        (Some("GET"), Some(path)) => {
            let held = items.iter().find(|(item, _)| path.strip_prefix("meta-data/") == Some(item));
            held.map_or((404, "<html>404 - Not Found</html>"), |(_, text)| (200, text.as_str()))
        }
        _ => (405, ""),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} \r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

/// So many seconds from now, as EC2 writes it.
fn from_now(seconds: i64) -> String {
    let date = Command::new("date").args(["-u", "-d", &format!("{seconds} seconds"), "+%FT%TZ"]).output();
    String::from_utf8(date.expect("date runs").stdout).expect("text").trim().to_owned()
}

fn action(time: &str) -> (&'static str, String) {
    (ACTION, format!("{{\"action\": \"terminate\", \"time\": \"{time}\"}}"))
}

fn rebalance() -> (&'static str, String) {
    (REBALANCE, format!("{{\"noticeTime\": \"{}\"}}", from_now(0)))
}

fn has_curl() -> bool {
    Command::new("curl").arg("--version").output().is_ok_and(|done| done.status.success())
}

#[test]
fn the_program_for_ec2_tells_its_notice_and_nothing_else() {
    if !has_curl() {
        skip!("no curl, by which the program asks");
    }
    let metadata = Metadata::start();
    let said = |done: &Output| (done.status.success(), String::from_utf8_lossy(&done.stdout).into_owned());
    assert_eq!(said(&metadata.ask()), (true, String::new()), "no notice");
    metadata.hold(&[rebalance()]);
    assert_eq!(said(&metadata.ask()), (true, String::new()), "a recommendation is no notice");

    let time = from_now(120);
    metadata.hold(&[rebalance(), action(&time)]);
    let (_, told) = said(&metadata.ask());
    let told: serde_json::Value = serde_json::from_str(&told).expect("a line of JSON");
    let within = told["within_seconds"].as_u64().expect("a number");
    assert!((60..=120).contains(&within), "{within} s of two minutes");
    assert_eq!(told["reason"], format!("spot notice: the cloud takes this host back at {time}"));
    metadata.hold(&[action(&from_now(-5))]);
    let (_, told) = said(&metadata.ask());
    assert!(told.starts_with("{\"within_seconds\": 0, "), "the time is over: {told}");

    // What nobody can ask, and what is no answer, is no notice either, but trouble that is told.
    metadata.hold(&[(ACTION, String::from("<html>"))]);
    assert_eq!(said(&metadata.ask()), (false, String::new()));
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port that is closed");
    let nowhere = Metadata { address: closed, items: Arc::default() };
    assert_eq!(said(&nowhere.ask()), (false, String::new()));
}

#[tokio::test]
async fn a_spot_notice_of_ec2_drains_the_host() {
    if !has_curl() {
        skip!("no curl, by which the program asks");
    }
    let metadata = Metadata::start();
    let mut fleet = Fleet::start().await;
    let program = fleet.folder().join("spot");
    script(&program, &format!("METADATA={} exec '{}'", metadata.url(), shipped("spot-ec2").display()));
    metadata.hold(&[rebalance()]);
    fleet.add_node("n1", &asking(&program, &["--notice-every-seconds", "1"])).await;
    let job = fleet.client.submit(fleet.script("sleep 2; echo finished")).await;
    fleet.client.running(job, 1).await;
    let time = from_now(120);
    metadata.hold(&[rebalance(), action(&time)]);
    let node = fleet.client.node_in("n1", "draining").await;
    let drain = node.drain.clone().expect("a drain");
    let reason = format!("spot notice: the cloud takes this host back at {time}");
    assert_eq!((drain.actor.as_str(), drain.reason.as_str()), ("host n1", reason.as_str()));
    let within = within_ms(&node);
    assert!((45_000..=105_000).contains(&within), "two minutes but for the reserve: {within} ms");
    fleet.client.node_in("n1", "drained").await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
}

/// Stand-ins for what comes with systemd, in a folder of their own: the lock is a file that is there while it is held.
fn stand_ins(folder: &Path) -> PathBuf {
    let bin = folder.join("bin");
    fs::create_dir(&bin).expect("a folder");
    let own = folder.display();
    script(
        &bin.join("busctl"),
        &format!("case $5 in PreparingForShutdown) cat '{own}/preparing' ;; *) echo t 60000000 ;; esac"),
    );
    script(
        &bin.join("systemd-inhibit"),
        &format!(
            "case \"$*\" in *--what=shutdown*--mode=delay*) ;; *) exit 1 ;; esac\n\
             while case $1 in --*) true ;; *) false ;; esac; do shift; done\n\
             echo >>'{own}/taken'; touch '{own}/lock'; \"$@\"; code=$?; rm '{own}/lock'; exit $code"
        ),
    );
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    bin
}

/// The shipped watcher with the stand-ins.
fn watcher(folder: &Path) -> NodeOptions {
    let (bin, program) = (stand_ins(folder), folder.join("logind"));
    script(&program, &format!("PATH='{}':$PATH exec '{}'", bin.display(), shipped("logind").display()));
    asking(&program, &["--notice-time-seconds", "0", "--notice-every-seconds", "1"])
}

#[tokio::test]
async fn a_shutdown_waits_until_the_node_is_drained() {
    let mut fleet = Fleet::start().await;
    let folder = fleet.folder().to_owned();
    let options = watcher(&folder);
    fleet.add_node("n1", &options).await;
    let lock = folder.join("lock");
    eventually("the lock is taken", WAIT, async || lock.exists().then_some(())).await;
    let job = fleet.client.submit(fleet.script("sleep 3; echo finished")).await;
    fleet.client.running(job, 1).await;

    fs::write(folder.join("preparing"), "b true\n").expect("a property");
    let node = fleet.client.node_in("n1", "draining").await;
    assert_eq!(node.drain.as_ref().map(|drain| drain.reason.as_str()), Some("this host is shut down"));
    let within = within_ms(&node);
    assert!((40_000..=45_000).contains(&within), "a minute but for the reserve: {within} ms");
    assert!(lock.exists(), "the shutdown waits while the job runs");
    fleet.client.node_in("n1", "drained").await;
    eventually("the lock is given back", WAIT, async || (!lock.exists()).then_some(())).await;
    let done = fleet.client.finished(job, WAIT).await;
    assert_eq!((done.end(0), done.tasks[0].attempts.len()), (Reason::Succeeded(v1::Empty {}), 1));
    // A host that is empty may be shut down: nobody holds it up before it is open to work again.
    fs::write(folder.join("preparing"), "b false\n").expect("a property");
    let request = v1::CordonRequest { selector: Some(selector("n1")), reason: String::from("a test") };
    fleet.client.nodes.clone().resume(request).await.expect("a resume");
    eventually("the lock is taken again", WAIT, async || lock.exists().then_some(())).await;
    let taken = fs::read_to_string(folder.join("taken")).expect("it was taken");
    assert_eq!(taken.lines().count(), 2, "once before the drain and once after it");
    // An agent that is killed holds nobody up: what it ran ends with it.
    fleet.node("n1").agent.as_mut().expect("an agent").kill9();
    assert!(eventually_blocking(Duration::from_secs(20), || (!lock.exists()).then_some(())).is_some());
}

/// A cloud of one host, which it ends by a shutdown: that takes as long as somebody holds it up.
fn cloud(folder: &Path) -> String {
    let host = folder.join("host");
    let host = host.display();
    format!(
        r#"asked=$(cat)
case $1 in
    create) echo "$asked" >'{host}.new'; mv '{host}.new' '{host}'; echo '{{}}' ;;
    delete) echo '{{"state":"going"}}' ;;
    describe) echo '{{"summary":"it runs"}}' ;;
    list) sed 's/.*\("request":"[^"]*"\).*/{{"hosts":[{{\1}}]}}/' '{host}' ;;
esac"#
    )
}

#[tokio::test]
async fn a_host_that_its_provider_shuts_down_is_not_held_up_by_its_own_lock() {
    let mut fleet = Fleet::start().await;
    let folder = fleet.folder().to_owned();
    fs::create_dir(fleet.providers()).expect("a folder");
    script(&fleet.providers().join("fake"), &cloud(&folder));
    let policy = "name = \"cloud\"\nprovider = \"exec\"\nprogram = \"fake\"\npreset = \"none\"\nmax = 1\n\
                  [host]\ncpu = \"1\"\nmemory = \"1GiB\"\ndisk = \"1GiB\"\n";
    let pools = fleet.client.pools.clone();
    pools.clone().set(v1::SetPoolRequest { policy: policy.to_owned() }).await.expect("the policy is good");
    let request = v1::ScalePoolRequest { pool: "cloud".into(), size: 1, hold_ms: None, reason: "a test".into() };
    pools.clone().scale(request).await.expect("within the maximum");
    let told = eventually("the host is made", WAIT, async || fs::read_to_string(folder.join("host")).ok()).await;
    let told: serde_json::Value = serde_json::from_str(&told).expect("what it was told");
    let text = |key: &str| told[key].as_str().expect("it is told").to_owned();
    let name = text("name");
    fleet.join_with_token(&name, &text("token"), &watcher(&folder)).await;
    let lock = folder.join("lock");
    eventually("the lock is taken", WAIT, async || lock.exists().then_some(())).await;

    fleet.drain(&name, None, "delete").await;
    fleet.client.node_in(&name, "stopping").await;
    eventually("the lock is given back", WAIT, async || (!lock.exists()).then_some(())).await;
}
