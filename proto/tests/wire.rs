//! What other versions say: bytes that a version wrote once are kept for ever
//! and must mean the same, and what a later one may add must be no hindrance.
//!
//! `wire/VERSION.txt` holds a line for each message: its name and its bytes in hex.
//! A release adds a file of its own (`RECORD=VERSION cargo test -p muster-proto
//! --test wire`), and no file is ever changed.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

use std::{collections::BTreeMap, fs, path::PathBuf};

use muster_proto::{convert, v1};
use prost::Message;
use v1::{
    agent_message::Message as FromAgent, attempt_report::Change, coordinator_message::Message as FromCoordinator,
    end::Reason,
};

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/wire"].iter().collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

const fn attempt(number: u32) -> v1::AttemptId {
    v1::AttemptId { job: 1024, task: 3, number }
}

const EPOCH: v1::Epoch = v1::Epoch { term: 77, attempt: 2 };

fn held() -> v1::HeldAttempt {
    let phase = v1::held_attempt::Phase::Running.into();
    v1::HeldAttempt { attempt: Some(attempt(2)), epoch: Some(EPOCH), phase }
}

fn resources() -> v1::Resources {
    v1::Resources { cpu_milli: 4_000, memory_bytes: 8 << 30, disk_bytes: 16 << 20 }
}

fn body() -> v1::JobBody {
    v1::JobBody {
        arguments: vec!["/bin/sh".into(), "-c".into(), "exit 7".into()],
        environment: vec![v1::EnvironmentVariable { name: "HOME".into(), value: "/work".into() }],
        outputs: vec!["out/*".into()],
        request: Some(resources()),
        network: v1::Network::None.into(),
        profile: v1::Profile::Strict.into(),
        without: vec!["limits.io".into()],
        delivery: v1::Delivery::Exclusive.into(),
        on_drain: v1::OnDrain::Finish.into(),
        checkpoint_signal: 0,
        time_limit_ms: 60_000,
        grace_ms: 1_000,
        output_limit_bytes: 1 << 20,
        pids_limit: 64,
        tasks: 5,
        ..v1::JobBody::default()
    }
}

fn from_agent(message: FromAgent) -> v1::AgentMessage {
    v1::AgentMessage { message: Some(message) }
}

fn ended() -> v1::AttemptEnded {
    v1::AttemptEnded {
        end: Some(v1::End { reason: Some(Reason::Exited(7)) }),
        wall_ms: 1_234,
        tails: vec![v1::LogTail { stream: v1::Stream::Stderr.into(), offset: 10, data: "end\n".into() }],
        output_truncated: true,
        ..v1::AttemptEnded::default()
    }
}

/// What an agent says, with all that the first version had.
fn agent_messages() -> BTreeMap<&'static str, v1::AgentMessage> {
    let report = |change| v1::AttemptReport { attempt: Some(attempt(2)), epoch: Some(EPOCH), change: Some(change) };
    let started = v1::AttemptStarted { fences: vec!["ns.pid".into()], start_us: 900, phases: None };
    BTreeMap::from([
        (
            // As the release before the leaders' seals: without what it had seen.
            "agent hello",
            from_agent(FromAgent::Hello(v1::Hello {
                protocol_version: 1,
                agent_version: "0.1.0".into(),
                boot_id: "4af512e0-9644-42bd-97d4-2b4a5be5e119".into(),
                agent_start: 12,
                capacity: Some(resources()),
                labels: [("zone".to_owned(), "a".to_owned())].into(),
                fences: vec!["ns.pid".into(), "seccomp".into()],
                held: vec![held()],
                closed_for_drain: 3,
                instance: "an-instance".into(),
                host_name: "web-01".into(),
                kernel: "6.1.0".into(),
                ..v1::Hello::default()
            })),
        ),
        (
            "agent heartbeat",
            from_agent(FromAgent::Heartbeat(v1::Heartbeat {
                sequence: 5,
                metrics: Some(v1::HostMetrics { cpu_core_milli: vec![500, 0], ..v1::HostMetrics::default() }),
                usage: Vec::new(),
                held: vec![held()],
            })),
        ),
        (
            "agent reports",
            from_agent(FromAgent::Reports(v1::AttemptReports {
                reports: vec![report(Change::Started(started)), report(Change::Ended(ended()))],
            })),
        ),
        ("agent drain proof", from_agent(FromAgent::DrainProof(v1::DrainProof { revision: 9 }))),
        (
            "agent stop notice",
            from_agent(FromAgent::StopNotice(v1::StopNotice { reason: "halt".into(), within_ms: Some(20_000) })),
        ),
        ("agent given back", from_agent(FromAgent::GivenBack(v1::GivenBack { attempts: vec![attempt(1)] }))),
    ])
}

/// What a coordinator says.
fn coordinator_messages() -> BTreeMap<&'static str, v1::CoordinatorMessage> {
    let from = |message| v1::CoordinatorMessage { message: Some(message) };
    let start = v1::StartAttempt {
        attempt: Some(attempt(2)),
        epoch: Some(EPOCH),
        item: Some("line".into()),
        inputs: Vec::new(),
    };
    let stop = v1::StopAttempt {
        attempt: Some(attempt(2)),
        epoch: Some(EPOCH),
        reason: v1::StopReason::Drained.into(),
        grace_ms: 1_000,
        first_signal: 0,
    };
    BTreeMap::from([
        (
            "coordinator welcome",
            from(FromCoordinator::Welcome(v1::Welcome {
                node: 4,
                incarnation: 2,
                term: 77,
                heartbeat_interval_ms: 3_000,
                unknown: vec![attempt(1)],
                reconnect_spread_ms: 3_750,
                drain: None,
            })),
        ),
        (
            // As the release before the leaders' seals: without what is committed.
            "coordinator lease",
            from(FromCoordinator::Lease(v1::Lease { sequence: 5, duration_ms: 15_000, ..v1::Lease::default() })),
        ),
        (
            "coordinator start",
            from(FromCoordinator::Start(v1::StartAttempts {
                bodies: vec![v1::JobBody { job: 1024, ..body() }],
                attempts: vec![start],
            })),
        ),
        ("coordinator stop", from(FromCoordinator::Stop(v1::StopAttempts { attempts: vec![stop] }))),
        ("coordinator stored", from(FromCoordinator::Stored(v1::ReportsStored { attempts: vec![attempt(2)] }))),
        ("coordinator ask drained", from(FromCoordinator::AskDrained(v1::AskDrained { revision: 9, refusable: true }))),
        (
            "coordinator release",
            from(FromCoordinator::Release(v1::Release { revision: 9, then: v1::release::Then::Stop.into() })),
        ),
    ])
}

fn submit() -> v1::SubmitRequest {
    let retries = v1::RetryPolicy { failed: Some(1), lost: None, drained: Some(0) };
    let template = v1::JobTemplate {
        name: "a job".into(),
        body: Some(body()),
        tasks: 5,
        retries: Some(retries),
        ..v1::JobTemplate::default()
    };
    v1::SubmitRequest { idempotency_key: "key".into(), template: Some(template) }
}

/// All of them, encoded by this version.
fn now() -> BTreeMap<&'static str, Vec<u8>> {
    let agent = agent_messages().into_iter().map(|(name, message)| (name, message.encode_to_vec()));
    let coordinator = coordinator_messages().into_iter().map(|(name, message)| (name, message.encode_to_vec()));
    let mut all: BTreeMap<&str, Vec<u8>> = agent.chain(coordinator).collect();
    all.insert("operator submit", submit().encode_to_vec());
    all
}

/// Each stored version with its messages.
fn stored() -> Vec<(PathBuf, BTreeMap<String, Vec<u8>>)> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |file: PathBuf| {
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().map(|line| line.split_once(": ").unwrap());
        let messages = lines.map(|(name, hex)| (name.to_owned(), bytes_of(hex))).collect();
        (file, messages)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn what_an_earlier_version_wrote_means_the_same_as_ever() {
    if let Ok(version) = std::env::var("RECORD") {
        let lines: String = now().iter().map(|(name, bytes)| format!("{name}: {}\n", hex(bytes))).collect();
        let file = folder().join(format!("{version}.txt"));
        assert!(!file.exists(), "what a version wrote is never changed");
        fs::write(file, lines).unwrap();
    }
    let (agent, coordinator) = (agent_messages(), coordinator_messages());
    let versions = stored();
    assert!(!versions.is_empty());
    for (version, messages) in &versions {
        assert!(messages.len() >= 14, "{}", version.display());
        for (name, bytes) in messages {
            let context = format!("{}: {name}", version.display());
            match name.split(' ').next().unwrap() {
                "agent" => assert_eq!(v1::AgentMessage::decode(&bytes[..]).unwrap(), agent[name.as_str()], "{context}"),
                "coordinator" => {
                    let read = v1::CoordinatorMessage::decode(&bytes[..]).unwrap();
                    assert_eq!(read, coordinator[name.as_str()], "{context}");
                }
                "operator" => assert_eq!(v1::SubmitRequest::decode(&bytes[..]).unwrap(), submit(), "{context}"),
                other => panic!("{context}: nobody called {other} speaks"),
            }
        }
    }
}

#[test]
fn what_an_earlier_agent_leaves_out_is_not_asked_of_it() {
    for (_, messages) in stored() {
        let hello = v1::AgentMessage::decode(&messages["agent hello"][..]).unwrap();
        let Some(FromAgent::Hello(hello)) = hello.message else { panic!("a hello") };
        let read = convert::hello(&hello).unwrap();
        assert_eq!((read.agent_start, read.held.len(), read.closed_for_drain.0), (12, 1, 3));
        let reports = v1::AgentMessage::decode(&messages["agent reports"][..]).unwrap();
        let Some(FromAgent::Reports(reports)) = reports.message else { panic!("reports") };
        let Some(Change::Ended(ended)) = &reports.reports[1].change else { panic!("an end") };
        assert_eq!(convert::end(ended.end.as_ref()).unwrap(), muster_core::end::End::Exited(7));
        let submit = v1::SubmitRequest::decode(&messages["operator submit"][..]).unwrap();
        let owner = muster_core::ids::Actor("ana".into());
        let template = convert::template(submit.template.unwrap(), &owner, None).unwrap();
        assert_eq!((template.spec.tasks, template.spec.retries.failed), (5, 1));
    }
}

/// A varint and some bytes under numbers that no message has.
const LATER_FIELDS: &[u8] = &[0xc0, 0xbb, 0x01, 0x07, 0xca, 0xbb, 0x01, 0x03, b'n', b'e', b'w'];

#[test]
fn what_a_later_version_adds_is_no_hindrance() {
    for (name, message) in agent_messages() {
        let bytes = [message.encode_to_vec(), LATER_FIELDS.to_vec()].concat();
        assert_eq!(v1::AgentMessage::decode(&bytes[..]).unwrap(), message, "{name}");
    }
    // Also within, where later versions are more likely to add it.
    let Some(FromAgent::Hello(hello)) = agent_messages()["agent hello"].message.clone() else { panic!("a hello") };
    let bytes = [hello.encode_to_vec(), LATER_FIELDS.to_vec()].concat();
    assert_eq!(v1::Hello::decode(&bytes[..]).unwrap(), hello);
    // A whole message that this version does not know is one without content: it is passed over, and nothing breaks.
    assert_eq!(v1::CoordinatorMessage::decode(LATER_FIELDS).unwrap(), v1::CoordinatorMessage { message: None });
    // A value that an enumeration does not have is kept as a number, and never taken for another.
    let mut held = held();
    held.phase = 99;
    let read = v1::HeldAttempt::decode(&held.encode_to_vec()[..]).unwrap();
    assert_eq!((read.phase, read.phase()), (99, v1::held_attempt::Phase::Unspecified));
    assert!(convert::held(&[read]).is_err(), "what it is at cannot be guessed");
}
