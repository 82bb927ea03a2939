//! `muster doctor` as a person runs it: what it says of the fences is what a
//! spawner of the same user tells its agent, and it leaves nothing behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    os::{
        fd::AsFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Output},
};

use muster_agent::spawner::{
    protocol::{Event, PACKET_BYTES_MAX, PROTOCOL_VERSION, Request},
    socket::{self, Received},
};
use muster_core::fence;
use muster_tests::{
    WAIT, eventually_blocking, host,
    part::{Part, muster_as, muster_binary},
    skip,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

/// An ordinary user that every Linux has.
const NOBODY: u32 = 65_534;

/// What a spawner tells: its fences, and those that it lacks with the reason.
struct Told {
    fences: BTreeSet<String>,
    missing: BTreeMap<String, String>,
}

fn ask_spawner(user: Option<u32>) -> Told {
    let folder = tempfile::Builder::new().prefix("muster-doctor-e2e-").tempdir().expect("a folder");
    let socket = folder.path().join("spawner.sock");
    let node = format!("doctor-{}", folder.path().file_name().expect("a name").to_string_lossy());
    let arguments: Vec<OsString> = [
        "spawner".into(),
        "--socket".into(),
        socket.clone().into_os_string(),
        "--state".into(),
        folder.path().join("state").into_os_string(),
        "--node-id".into(),
        node.into(),
    ]
    .into();
    let log = folder.path().join("log");
    let part = match user {
        Some(user) => {
            std::os::unix::fs::chown(folder.path(), Some(user), Some(user)).expect("root may give a folder away");
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("ours until now");
            Part::start_as(user, "spawner", &log, &arguments)
        }
        None => Part::start("spawner", &log, &arguments),
    };
    let connection = eventually_blocking(WAIT, || crate::spawner::dial(&socket))
        .unwrap_or_else(|| panic!("no spawner: {}", part.log()));
    let hello = socket::encode(&Request::Hello { version: PROTOCOL_VERSION }).expect("it fits");
    socket::send(connection.as_fd(), &hello, &[]).expect("the spawner reads");
    let timeout = PollTimeout::try_from(WAIT).expect("a poll timeout");
    assert!(poll(&mut [PollFd::new(connection.as_fd(), PollFlags::POLLIN)], timeout).expect("poll") > 0);
    match socket::receive(connection.as_fd(), &mut vec![0; PACKET_BYTES_MAX]).expect("a packet") {
        Received::Message(Event::Welcome { fences, missing, .. }, _) => {
            Told { fences: fences.into_iter().collect(), missing: missing.into_iter().collect() }
        }
        other => panic!("{other:?}: {}", part.log()),
    }
}

fn doctor(user: Option<u32>, temporary: &Path, arguments: &[&str]) -> Output {
    let (mut command, _until_it_is_started) = match user {
        Some(user) => {
            let (command, file) = muster_as(user);
            (command, Some(file))
        }
        None => (Command::new(muster_binary()), None),
    };
    command.arg0("muster").arg("doctor").args(arguments).env("TMPDIR", temporary).output().expect("the doctor starts")
}

/// Each finding by its check.
fn findings(output: &Output) -> BTreeMap<String, Value> {
    let document: Value = serde_json::from_slice(&output.stdout).expect("one document");
    assert_eq!((&document["apiVersion"], &document["kind"]), (&"muster.v1".into(), &"FindingList".into()));
    let items = document["items"].as_array().expect("a list").clone();
    items.into_iter().map(|item| (item["check"].as_str().expect("a name").to_owned(), item)).collect()
}

fn assert_that_they_agree(user: Option<u32>) -> BTreeMap<String, Value> {
    let told = ask_spawner(user);
    let temporary = tempfile::tempdir().expect("a folder");
    if let Some(user) = user {
        std::os::unix::fs::chown(temporary.path(), Some(user), Some(user)).expect("root may give a folder away");
    }
    let groups_before = host::muster_cgroups();
    let output = doctor(user, temporary.path(), &["-o", "json"]);
    let found = findings(&output);
    for name in &told.fences {
        assert_eq!(found[name]["state"], "ok", "{name}: the spawner has it");
    }
    for (name, why) in &told.missing {
        let asked = fence::STRICT.contains(&name.as_str());
        assert_eq!(found[name]["state"], if asked { "missing" } else { "warn" }, "{name}: the spawner lacks it");
        assert_eq!(found[name]["seen"], **why, "{name}");
        assert!(found[name]["mend"].as_str().is_some_and(|mend| !mend.is_empty()), "{name}");
    }
    let known: BTreeSet<&str> = fence::ALL.into_iter().collect();
    let said: BTreeSet<&str> = found.keys().map(String::as_str).filter(|name| known.contains(name)).collect();
    let heard: BTreeSet<&str> = told.fences.iter().chain(told.missing.keys()).map(String::as_str).collect();
    assert_eq!(said, heard, "it says no more of fences, and no less");
    let missing = found.values().any(|finding| finding["state"] == "missing");
    assert_eq!(output.status.code(), Some(i32::from(missing)), "{}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = fs::read_dir(temporary.path()).expect("still there").collect();
    assert!(left.is_empty(), "it leaves {left:?}");
    assert!(host::muster_cgroups().iter().all(|group| groups_before.contains(group) || !group.contains("doctor")));
    found
}

#[test]
fn the_doctor_and_the_spawner_say_the_same_of_this_host() {
    let found = assert_that_they_agree(None);
    if host::is_root() {
        assert_eq!(found["user.caller"]["state"], "ok");
        assert!(found.contains_key("user.uid_range"));
    }
}

#[test]
fn the_doctor_and_the_spawner_say_the_same_to_an_ordinary_user() {
    if !host::is_root() {
        skip!("only root becomes another user; the other test has run as an ordinary one");
    }
    let found = assert_that_they_agree(Some(NOBODY));
    assert_eq!(found["uid.own"]["state"], "missing");
    assert!(found["user.caller"]["seen"].as_str().is_some_and(|seen| seen.contains("share this uid")));
}

#[test]
fn a_person_gets_a_table_and_below_it_what_mends() {
    let temporary = tempfile::tempdir().expect("a folder");
    let config = temporary.path().join("spawner.toml");
    fs::write(&config, "uid_frist = 7\n").expect("written");
    let output = doctor(None, temporary.path(), &["--spawner-config", config.to_str().expect("a plain path")]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.lines().next().is_some_and(|names| names.starts_with("CHECK") && names.contains("STATE")), "{text}");
    if host::is_root() {
        assert_eq!(output.status.code(), Some(1), "a spawner that cannot start runs no job");
        assert!(text.contains("uid_frist") && text.contains("\nuser.spawner_config:\n  mend "), "{text}");
    }
    let refused = doctor(None, temporary.path(), &["--no-such-option"]);
    assert_eq!(refused.status.code(), Some(2));
}

#[tokio::test]
async fn the_doctor_compares_this_clock_with_the_coordinators() {
    let fleet = muster_tests::Fleet::with_node().await;
    let temporary = tempfile::tempdir().expect("a folder");
    let state = fleet.folder().join("n1/agent");
    let arguments =
        ["-o", "json", "--coordinator", &fleet.address, "--agent-state", state.to_str().expect("a plain path")];
    let found = findings(&doctor(None, temporary.path(), &arguments));
    let drift = &found["clock.drift"];
    assert_eq!(drift["state"], "ok", "both are this machine's: {drift}");
    assert!(drift["seen"].as_str().is_some_and(|seen| seen.contains("the coordinator, within 0.")), "{drift}");
    let silent = ["-o", "json", "--coordinator", "127.0.0.1:1", "--agent-state", state.to_str().expect("a plain path")];
    let found = findings(&doctor(None, temporary.path(), &silent));
    assert_eq!(found["clock.drift"]["state"], "unknown", "{}", found["clock.drift"]);
}
