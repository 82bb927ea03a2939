//! What does not survive a spawner, what it leaves behind however it ends, and
//! what it makes of what others left or still hold.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::PathBuf,
    time::{Duration, Instant},
};

use muster_agent::spawner::protocol::{Network, Profile, Request, Verdict};
use muster_tests::{
    WAIT, eventually_blocking, host,
    part::{Part, Surroundings},
};
use nix::sys::signal::Signal;

use crate::spawner::Spawner;

#[test]
fn kill_9_of_the_spawner_leaves_no_process_and_the_next_one_tidies_up() {
    let mut spawner = Spawner::start();
    let marker = format!("96{:07}", std::process::id());
    let start = spawner.script(&format!("(setsid sleep {marker} &); sleep {marker}"));
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    spawner.started(key);
    eventually_blocking(WAIT, || (Spawner::left(&marker).len() >= 2).then_some(())).expect("both sleep");
    spawner.part.kill9();
    eventually_blocking(WAIT, || Spawner::left(&marker).is_empty().then_some(())).expect("nothing is left");
    spawner.part = Part::start("spawner", &spawner.folder.path().join("log"), &spawner.arguments);
    assert_eq!(spawner.reconnect(), BTreeMap::new(), "a new spawner holds nothing");
    spawner.part.cut_lifeline();
    spawner.part.wait(WAIT);
    spawner.assert_no_cgroup();
}

/// Jobs on the host's own files, whatever else the host lacks.
const SHARED: &str = "weakest_profile = \"shared\"\nmay_lack = [\"limits\", \"kill.cgroup\", \"uid.own\"]\n";

/// A folder on a disk is not gone with the namespace of its job, and the next spawner names its sandboxes anew.
#[test]
fn a_folder_that_a_killed_spawner_left_is_in_nobodys_way_and_goes() {
    let mut spawner = Spawner::start_with(SHARED, 64);
    let shared = |spawner: &mut Spawner, script: &str| {
        let mut start = spawner.script(script);
        (start.profile, start.network) = (Profile::Shared, Network::Host);
        start
    };
    let start = shared(&mut spawner, "echo mine > kept; sleep 600");
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    spawner.started(key);
    let state = spawner.folder.path().join("state");
    let files = || {
        let folders = fs::read_dir(state.join("work")).into_iter().flatten().flatten();
        folders.filter(|folder| folder.path().join("kept").exists()).count()
    };
    eventually_blocking(WAIT, || (files() == 1).then_some(())).expect("it wrote a file");
    spawner.part.kill9();
    spawner.part = Part::start("spawner", &spawner.folder.path().join("log"), &spawner.arguments);
    spawner.reconnect();
    for _ in 0..3 {
        let again = shared(&mut spawner, "test ! -e kept");
        assert_eq!(spawner.run(again).end.verdict, Verdict::Exited(0));
    }
    let left = || {
        fs::read_dir(&state)
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"left-"))
    };
    eventually_blocking(WAIT, || (!left()).then_some(())).expect("it is removed");
    assert_eq!(files(), 0);
}

#[test]
fn the_parents_end_leaves_neither_processes_nor_a_cgroup() {
    let mut spawner = Spawner::start();
    let marker = format!("95{:07}", std::process::id());
    let start = spawner.script(&format!("trap '' TERM; sleep {marker}"));
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    spawner.started(key);
    spawner.part.cut_lifeline();
    spawner.part.wait(Duration::from_secs(20));
    assert_eq!(Spawner::left(&marker), []);
    spawner.assert_no_cgroup();
}

/// Between its cgroup and its first word there is a moment in which a stop finds nobody who listens.
#[test]
fn a_spawner_that_is_told_to_go_while_it_starts_leaves_no_cgroup() {
    let Some(mount) = host::cgroup2().filter(|_| host::is_root()) else {
        return eprintln!("as an ordinary user or without cgroup2 there is no group of its own");
    };
    for _ in 0..5 {
        let folder = tempfile::Builder::new().prefix("muster-spawner-").tempdir().expect("a folder");
        let (arguments, group) = Spawner::arguments(&folder, "", 64);
        let mut part = Part::start("spawner", &folder.path().join("log"), &arguments);
        let deadline = Instant::now() + WAIT;
        while !mount.join(&group).exists() {
            assert!(Instant::now() < deadline, "it makes no group: {}", part.log());
        }
        part.signal(Signal::SIGTERM);
        let status = part.wait(WAIT);
        assert!(status.success(), "{status}: {}", part.log());
        assert!(!mount.join(&group).exists(), "{}", part.log());
    }
}

/// A cgroup as systemd would make it for a unit; gone at the end.
struct Unit(PathBuf);

impl Drop for Unit {
    fn drop(&mut self) {
        let _nobody_moved_in = fs::remove_dir(self.0.join("supervisor"));
        let _left = fs::remove_dir(&self.0);
    }
}

/// The nodes of a demo are in the unit of whatever runs it. Each tidies up when it starts, and names its sandboxes
/// alike.
#[test]
fn two_spawners_of_one_unit_leave_each_others_jobs_alone() {
    let Some(mount) = host::cgroup2().filter(|_| host::is_root()) else {
        return eprintln!("as an ordinary user or without cgroup2 there is no unit to be in");
    };
    let unit = Unit(mount.join(format!("muster-e2e-{}.service", std::process::id())));
    fs::create_dir(&unit.0).expect("root makes a cgroup");
    let environment = vec![("INVOCATION_ID".into(), "0123456789abcdef".into())];
    let surroundings = Surroundings { environment, cgroup: Some(unit.0.clone()), network: None };
    let mut first = Spawner::start_in(&surroundings);
    let start = first.script("trap 'echo whole' TERM; echo ready; sleep 600 & wait");
    let key = start.attempt;
    first.ask(&Request::Start(Box::new(start)), &[]);
    let [mut out, _err] = first.started(key);
    out.read_exact(&mut [0; 6]).expect("ready");
    let mut second = Spawner::start_in(&surroundings);
    for spawner in [&mut first, &mut second] {
        for _ in 0..3 {
            let life = spawner.run_script("exit 0");
            assert_eq!(life.end.verdict, Verdict::Exited(0), "{life:?}: {}", spawner.part.log());
        }
    }
    first.ask(&Request::Stop { attempt: key, grace_ms: 5_000 }, &[]);
    assert_eq!(first.ended(key).verdict, Verdict::Stopped);
    let mut said = String::new();
    out.read_to_string(&mut said).expect("text");
    assert_eq!(said, "whole\n", "it lived until it was told to go");
    for mut spawner in [second, first] {
        spawner.part.cut_lifeline();
        spawner.part.wait(WAIT);
    }
    let left = fs::read_dir(&unit.0).expect("it is there").flatten().filter(|entry| entry.path().is_dir());
    let left: Vec<_> = left.map(|entry| entry.file_name()).filter(|name| name != "supervisor").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_spawner_that_cannot_start_leaves_no_cgroup() {
    let folder = tempfile::Builder::new().prefix("muster-spawner-").tempdir().expect("a folder");
    let (mut arguments, group) = Spawner::arguments(&folder, "", 64);
    let socket = arguments.iter().position(|word| word == "--socket").expect("it has one") + 1;
    arguments[socket] = folder.path().join("no such folder/spawner.sock").into_os_string();
    let mut part = Part::start("spawner", &folder.path().join("log"), &arguments);
    assert_eq!(part.wait(WAIT).code(), Some(1), "{}", part.log());
    assert!(part.log().contains("cannot listen at"), "{}", part.log());
    assert!(!host::muster_cgroups().contains(&group), "{}", part.log());
}
