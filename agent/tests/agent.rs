//! The real agent between a coordinator and a spawner that a test plays.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "agent_support/coordinator.rs"]
mod coordinator;
#[path = "agent_support/spawner.rs"]
mod spawner;

use std::{fs::File, thread::JoinHandle};

use clap::Parser as _;
use coordinator::FakeCoordinator;
use muster_agent::{
    config::{Command, CommandLine, Config},
    identity::Identity,
    parent::Parent,
    spawner::protocol::{AttemptKey, Request, Verdict},
    state::StateFolder,
    supervisor::{Left, Supervisor},
};
use muster_proto::v1::{
    self, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent, held_attempt::Phase,
};
use spawner::FakeSpawner;
use tempfile::TempDir;

/// Dropped in this order: the agent leaves first.
struct World {
    agent: Option<RunningAgent>,
    coordinator: FakeCoordinator,
    spawner: FakeSpawner,
    folder: TempDir,
}

/// An agent on a thread of its own, which leaves when its parent's pipe ends.
struct RunningAgent {
    parent: Option<File>,
    thread: Option<JoinHandle<Left>>,
}

impl RunningAgent {
    fn wait(&mut self) -> Left {
        self.thread.take().expect("it is waited for once").join().unwrap()
    }
}

impl Drop for RunningAgent {
    fn drop(&mut self) {
        self.parent.take();
        if let Some(thread) = self.thread.take() {
            // A failed test must not hang, and has said more already.
            let _ = thread.join();
        }
    }
}

impl World {
    /// A node of one core whose agent has said hello.
    fn new() -> (Self, v1::Hello) {
        let folder = tempfile::tempdir().unwrap();
        let spawner = FakeSpawner::listen(folder.path());
        let mut world = Self { agent: None, coordinator: FakeCoordinator::serve(), spawner, folder };
        let hello = world.start_agent();
        (world, hello)
    }

    fn config(&self) -> Config {
        let path = |name: &str| self.folder.path().join(name).to_str().unwrap().to_owned();
        let line = [
            "muster-agent".to_owned(),
            "run".to_owned(),
            format!("--state={}", path("state")),
            format!("--coordinator={}", self.coordinator.address),
            format!("--spawner={}", self.spawner.path.display()),
            format!("--token={}", self.coordinator.token),
            "--cpu=1".to_owned(),
            "--memory=1G".to_owned(),
            "--disk=1G".to_owned(),
            "--label=zone=a".to_owned(),
        ];
        match CommandLine::try_parse_from(line).unwrap().command {
            Command::Run(args) | Command::Join(args) => Config::resolve(&args).unwrap(),
        }
    }

    fn start_agent(&mut self) -> v1::Hello {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let config = self.config();
        let thread = std::thread::spawn(move || {
            let raw = std::os::fd::IntoRawFd::into_raw_fd(reader);
            let parent = Parent::adopt(Some(raw)).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async {
                let state = StateFolder::open(&config.state).unwrap();
                let identity = match Identity::load(&config.state).unwrap() {
                    Some(identity) => identity,
                    None => {
                        let token = config.token.clone().unwrap();
                        Identity::join(&config.state, &config.coordinators, &token, &config.name).await.unwrap()
                    }
                };
                Supervisor::new(config, state, identity).unwrap().run(&parent).await.unwrap()
            })
        });
        self.agent = Some(RunningAgent { parent: Some(writer.into()), thread: Some(thread) });
        self.coordinator.hello()
    }

    /// The agent goes away at once; its jobs go on.
    fn stop_agent(&mut self) {
        self.agent = None;
    }

    fn order(&self, tasks: std::ops::Range<u32>, body: v1::JobBody) {
        let request = Some(v1::Resources { cpu_milli: 1_000, memory_bytes: 1, disk_bytes: 0 });
        let body = v1::JobBody { job: JOB, arguments: vec!["true".into()], request, tasks: 9, ..body };
        let attempts = tasks.map(|task| v1::StartAttempt {
            attempt: Some(attempt(task)),
            epoch: Some(v1::Epoch { term: 1, attempt: 1 }),
            ..Default::default()
        });
        let start = v1::StartAttempts { bodies: vec![body], attempts: attempts.collect() };
        self.coordinator.say(ToAgent::Start(start));
    }

    fn wait_for_start(&self, task: u32) {
        self.spawner.expect("a start", |request| match request {
            Request::Start(start) => (start.attempt == key(task)).then_some(()),
            _ => None,
        });
    }

    fn store(&self, task: u32) {
        self.coordinator.say(ToAgent::Stored(v1::ReportsStored { attempts: vec![attempt(task)] }));
    }

    /// Two heartbeats more; true if a proof came before the second.
    fn proved_within_two_heartbeats(&self) -> bool {
        let mut beats = 0;
        self.coordinator.expect("two heartbeats", |message| match message {
            FromAgent::DrainProof(_) => Some(true),
            FromAgent::Heartbeat(_) => {
                beats += 1;
                (beats == 2).then_some(false)
            }
            _ => None,
        })
    }
}

const JOB: u64 = 1024;

fn attempt(task: u32) -> v1::AttemptId {
    v1::AttemptId { job: JOB, task, number: 1 }
}

fn key(task: u32) -> AttemptKey {
    AttemptKey { job: JOB, task, number: 1, term: 1 }
}

fn succeeded(ended: &v1::AttemptEnded) -> bool {
    matches!(ended.end.as_ref().and_then(|end| end.reason.as_ref()), Some(v1::end::Reason::Succeeded(_)))
}

#[test]
fn it_joins_says_hello_and_its_lease_counts_from_the_heartbeat() {
    let (world, hello) = World::new();
    assert_eq!((hello.agent_start, hello.closed_for_drain), (1, 0));
    assert_eq!(hello.labels["zone"], "a");
    assert_eq!(hello.fences, ["ns.pid"]);
    assert_eq!(hello.capacity.unwrap().cpu_milli, 1_000);
    let before = muster_agent::clock::boottime().0;
    let deadline = world.spawner.expect("a lease", |request| match request {
        Request::RenewLease { deadline_boottime_ms } => Some(deadline_boottime_ms),
        _ => None,
    });
    let now = muster_agent::clock::boottime().0;
    assert!(deadline <= now + 15_000 && deadline + 2_000 > before + 15_000, "{deadline} at {now}");
}

#[test]
fn the_spawner_forgets_only_what_the_coordinator_stored() {
    let (world, _) = World::new();
    let stdin = v1::file_content::Source::Inline("in".into());
    let body = v1::JobBody {
        stdin: Some(v1::FileContent { source: Some(stdin) }),
        outputs: vec!["result".into(), "absent".into()],
        ..Default::default()
    };
    world.spawner.put_file("result", b"42");
    world.order(0..1, body);
    world.wait_for_start(0);
    assert_eq!(world.spawner.stdin_of(key(0)), b"in");
    let environment = world.spawner.start_of(key(0)).environment;
    assert!(environment.contains(&(b"MUSTER_ATTEMPT".to_vec(), b"100.0.1".to_vec())));
    world.spawner.write(key(0), b"hello");
    world.spawner.end(key(0), Verdict::Exited(0));
    let (of, ended) = world.coordinator.ended();
    assert!(of == attempt(0) && succeeded(&ended));
    assert_eq!(&ended.tails[0].data[..], b"hello");
    let source = ended.outputs[0].content.clone().unwrap().source;
    assert_eq!(source, Some(v1::file_content::Source::Inline("42".into())));
    assert_eq!(ended.skipped_outputs[0].reason, "missing");
    let forgotten = |request: &Request| matches!(request, Request::Forget { .. });
    assert!(!world.spawner.requests_so_far().iter().any(forgotten));
    world.store(0);
    world.spawner.expect("to forget", |request| forgotten(&request).then_some(()));
    let spool = world.folder.path().join("state/spool");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
}

#[test]
fn a_new_agent_adopts_a_running_job_with_all_its_output() {
    let (mut world, _) = World::new();
    world.order(0..1, v1::JobBody::default());
    world.wait_for_start(0);
    world.spawner.write(key(0), b"one ");
    world.stop_agent();
    world.spawner.write(key(0), b"two ");
    let hello = world.start_agent();
    assert_eq!(hello.agent_start, 2);
    assert_eq!(hello.held.len(), 1);
    assert_eq!(hello.held[0].phase(), Phase::Running);
    world.spawner.write(key(0), b"three");
    world.spawner.end(key(0), Verdict::Exited(3));
    let (_, ended) = world.coordinator.ended();
    assert_eq!(ended.end.unwrap().reason, Some(v1::end::Reason::Exited(3)));
    let text: Vec<u8> = ended.tails.iter().flat_map(|tail| tail.data.to_vec()).collect();
    // What was uploaded live is not repeated in the tail.
    let uploaded = world.coordinator.log_of(JOB);
    let offset = ended.tails.first().map_or(uploaded.len(), |tail| usize::try_from(tail.offset).unwrap());
    assert_eq!([&uploaded[..offset], &text[..]].concat(), b"one two three");
}

#[test]
fn an_end_that_came_while_no_agent_ran_is_reported_with_the_noted_reason() {
    let (mut world, _) = World::new();
    world.order(0..1, v1::JobBody::default());
    world.wait_for_start(0);
    let stop = v1::StopAttempt {
        attempt: Some(attempt(0)),
        epoch: Some(v1::Epoch { term: 1, attempt: 1 }),
        reason: v1::StopReason::Drained.into(),
        grace_ms: 1_000,
        first_signal: 0,
    };
    world.coordinator.say(ToAgent::Stop(v1::StopAttempts { attempts: vec![stop] }));
    world.spawner.expect("a stop", |request| match request {
        Request::Stop { grace_ms, .. } => (grace_ms == 1_000).then_some(()),
        _ => None,
    });
    world.stop_agent();
    world.spawner.end(key(0), Verdict::Stopped);
    let hello = world.start_agent();
    assert_eq!(hello.held[0].phase(), Phase::Ended);
    let (_, ended) = world.coordinator.ended();
    assert!(matches!(ended.end.unwrap().reason, Some(v1::end::Reason::Drained(_))));
}

#[test]
fn an_end_that_was_not_stored_is_reported_again_on_the_next_stream() {
    let (world, _) = World::new();
    world.order(0..1, v1::JobBody::default());
    world.wait_for_start(0);
    world.spawner.end(key(0), Verdict::Exited(0));
    let first = world.coordinator.ended();
    world.coordinator.hang_up();
    let hello = world.coordinator.hello();
    assert_eq!(hello.held[0].phase(), Phase::Ended);
    assert_eq!(world.coordinator.ended(), first);
}

#[test]
fn output_that_does_not_fit_a_report_is_uploaded_first() {
    let (world, _) = World::new();
    world.order(0..1, v1::JobBody::default());
    world.wait_for_start(0);
    let text: Vec<u8> = (0..300_000u32).map(|byte| byte.to_le_bytes()[0]).collect();
    world.spawner.write(key(0), &text);
    world.spawner.end(key(0), Verdict::Exited(0));
    let (_, ended) = world.coordinator.ended();
    let mut found = world.coordinator.log_of(JOB);
    for tail in &ended.tails {
        found.truncate(usize::try_from(tail.offset).unwrap());
        found.extend_from_slice(&tail.data);
    }
    assert!(found == text && !ended.output_truncated);
}

#[test]
fn large_inputs_are_fetched_and_large_outputs_stored_as_blobs() {
    let (world, _) = World::new();
    let content = vec![7; 100_000];
    let digest = world.coordinator.put_blob(&content);
    let blob = v1::BlobRef { digest: digest.into(), offset: 10, length: 20 };
    let content_of = |source| Some(v1::FileContent { source: Some(source) });
    let input = v1::InputFile {
        path: "in".into(),
        content: content_of(v1::file_content::Source::Blob(blob)),
        executable: true,
    };
    let result = vec![9; 200_000];
    world.spawner.put_file("out", &result);
    world.order(0..1, v1::JobBody { inputs: vec![input], outputs: vec!["out".into()], ..Default::default() });
    world.wait_for_start(0);
    let start = world.spawner.start_of(key(0));
    assert_eq!((start.inputs[0].offset, start.inputs[0].length), (10, 20));
    world.spawner.end(key(0), Verdict::Exited(0));
    let (_, ended) = world.coordinator.ended();
    let stored = world.coordinator.blob(&ended.outputs[0].digest).expect("it was stored before the report");
    assert!(stored == result);
}

#[test]
fn drained_is_proved_only_when_nothing_is_left_and_then_it_stays_down() {
    let (mut world, _) = World::new();
    world.order(0..1, v1::JobBody::default());
    world.wait_for_start(0);
    let ask = |refusable| ToAgent::AskDrained(v1::AskDrained { revision: 5, refusable });
    world.coordinator.say(ask(true));
    let refused = world.coordinator.expect("a refusal", |message| match message {
        FromAgent::DrainRefused(refused) => Some(refused),
        _ => None,
    });
    assert!(refused.reason.contains("1 running"), "{}", refused.reason);
    world.coordinator.say(ask(false));
    assert!(!world.proved_within_two_heartbeats());
    world.order(1..2, v1::JobBody::default());
    let back = world.coordinator.expect("that it gives back", |message| match message {
        FromAgent::GivenBack(back) => Some(back.attempts),
        _ => None,
    });
    assert_eq!(back, [attempt(1)]);
    world.spawner.end(key(0), Verdict::Exited(0));
    let _ = world.coordinator.ended();
    assert!(!world.proved_within_two_heartbeats());
    world.store(0);
    let proof = world.coordinator.expect("a proof", |message| match message {
        FromAgent::DrainProof(proof) => Some(proof.revision),
        _ => None,
    });
    assert_eq!(proof, 5);
    let release = v1::Release { revision: 5, then: v1::release::Then::Stop.into() };
    world.coordinator.say(ToAgent::Release(release));
    assert_eq!(world.agent.as_mut().unwrap().wait(), Left::Released);
    assert!(muster_agent::state::released(&world.folder.path().join("state")).is_some());
}

#[test]
fn a_recall_gives_back_the_newest_that_has_not_started() {
    let (world, _) = World::new();
    world.order(0..3, v1::JobBody::default());
    world.wait_for_start(0);
    world.coordinator.say(ToAgent::Recall(v1::Recall { count: 1 }));
    let back = world.coordinator.expect("that it gives back", |message| match message {
        FromAgent::GivenBack(back) => Some(back.attempts),
        _ => None,
    });
    assert_eq!(back, [attempt(2)]);
    world.spawner.end(key(0), Verdict::Exited(0));
    world.wait_for_start(1);
}

#[test]
fn jobs_of_a_spawner_that_died_end_as_spawner_lost_and_work_goes_on() {
    let (world, _) = World::new();
    world.order(0..2, v1::JobBody::default());
    world.wait_for_start(0);
    world.spawner.die();
    let (of, ended) = world.coordinator.ended();
    assert_eq!(of, attempt(0));
    assert!(matches!(ended.end.unwrap().reason, Some(v1::end::Reason::SpawnerLost(_))));
    world.wait_for_start(1);
}

#[test]
fn a_token_of_another_fleet_joins_nothing() {
    let (ours, theirs) = (FakeCoordinator::serve(), FakeCoordinator::serve());
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let joined = runtime.block_on(Identity::join(folder.path(), &[ours.address.to_string()], &theirs.token, "n"));
    let error = muster_agent::chain(&joined.unwrap_err());
    assert!(error.contains("not the one that the join token names"), "{error}");
    assert!(Identity::load(folder.path()).unwrap().is_none());
}
