//! Real conversations between a fleet, its agents and its operators: what the
//! fleet orders is what its agents then report.

use muster_core::{effect::Effect, ids::NodeId};
use muster_proto::v1::{self, agent_message::Message as FromAgent, attempt_report::Change, end::Reason};
use prost::Message as _;

use super::fleet::{Frame, POOLS, World};
use crate::{
    protobuf::{self, Field, Value},
    target::Signs,
};

pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let plays: [(&str, Conversation); 9] = [
        ("array", array),
        ("cancelled", cancelled),
        ("drained", drained),
        ("elastic", elastic),
        ("exclusive_lost", exclusive_lost),
        ("failover", failover),
        ("given_back", given_back),
        ("retried", retried),
        ("stuck_and_removed", stuck_and_removed),
    ];
    plays
        .into_iter()
        .map(|(name, play)| {
            let mut conversation =
                Play { world: World::new().expect("a fleet that nobody spoke to"), frames: Vec::new() };
            play(&mut conversation);
            (name, protobuf::write(&conversation.frames))
        })
        .collect()
}

type Conversation = fn(&mut Play);

struct Play {
    world: World,
    frames: Vec<Field>,
}

type Started = (v1::AttemptId, v1::Epoch);

impl Play {
    fn frame(&mut self, number: u64, value: Value) {
        let field = Field { number, value };
        self.world.frame(&field, &mut Signs::default()).expect("a seed keeps all promises");
        self.frames.push(field);
    }

    fn agent(&mut self, node: u64, message: FromAgent) {
        self.frame(node, Value::Bytes(v1::AgentMessage { message: Some(message) }.encode_to_vec()));
    }

    fn ask(&mut self, frame: Frame, message: &impl prost::Message) {
        self.frame(frame as u64, Value::Bytes(message.encode_to_vec()));
    }

    fn pass(&mut self, seconds: u64) {
        self.frame(Frame::Time as u64, Value::Varint(seconds * 1_000));
    }

    fn hello(&mut self, node: u64, held: Vec<v1::HeldAttempt>) {
        let hello = v1::Hello {
            protocol_version: 1,
            agent_version: "0.1.0".into(),
            boot_id: format!("boot-{node}"),
            agent_start: 1,
            capacity: Some(v1::Resources { cpu_milli: 4_000, memory_bytes: 8 << 30, disk_bytes: 1 << 30 }),
            labels: [("zone".to_owned(), "north".to_owned())].into(),
            fences: muster_core::fence::ALL.iter().map(|fence| (*fence).to_owned()).collect(),
            held,
            instance: format!("instance-{node}"),
            host_name: format!("host-{node}"),
            kernel: "6.1.0".into(),
            seen_term: 1,
            stream: 1,
            ..v1::Hello::default()
        };
        self.agent(node, FromAgent::Hello(hello));
    }

    fn beat(&mut self, node: u64, held: Vec<v1::HeldAttempt>) {
        let metrics = v1::HostMetrics {
            cpu_core_milli: vec![100, 900],
            cpu_used_milli: Some(1_000),
            memory_used_bytes: Some(1 << 30),
            memory_total_bytes: Some(8 << 30),
            cpu_pressure: Some(120),
            ..v1::HostMetrics::default()
        };
        let beat = v1::Heartbeat { sequence: 1, metrics: Some(metrics), usage: Vec::new(), held };
        self.agent(node, FromAgent::Heartbeat(beat));
    }

    /// What this node was ordered by the last frame.
    fn started(&self, node: u64) -> Vec<Started> {
        let orders = self.world.effects.iter().filter_map(|effect| match effect {
            Effect::Start { node: at, attempts, .. } if *at == NodeId(node) => Some(attempts),
            _other => None,
        });
        orders.flatten().map(|(attempt, epoch)| ((*attempt).into(), (*epoch).into())).collect()
    }

    fn submit(&mut self, key: &str, tasks: u32, change: impl FnOnce(&mut v1::JobBody)) {
        let mut body = v1::JobBody {
            arguments: vec!["/bin/sh".into(), "-c".into(), "exit 0".into()],
            environment: vec![v1::EnvironmentVariable { name: "HOME".into(), value: "/work".into() }],
            request: Some(v1::Resources { cpu_milli: 1_000, memory_bytes: 1 << 30, disk_bytes: 1 << 20 }),
            network: v1::Network::None.into(),
            profile: v1::Profile::Strict.into(),
            delivery: v1::Delivery::AtLeastOnce.into(),
            on_drain: v1::OnDrain::Finish.into(),
            checkpoint_signal: 0,
            grace_ms: 1_000,
            output_limit_bytes: 1 << 20,
            pids_limit: 64,
            ..v1::JobBody::default()
        };
        change(&mut body);
        let template = v1::JobTemplate { name: key.to_owned(), body: Some(body), tasks, ..v1::JobTemplate::default() };
        let request = v1::SubmitRequest { idempotency_key: key.to_owned(), template: Some(template) };
        self.ask(Frame::Submit, &request);
    }

    fn report(&mut self, node: u64, of: &[Started], change: &Change) {
        let reports = of.iter().map(|(attempt, epoch)| v1::AttemptReport {
            attempt: Some(*attempt),
            epoch: Some(*epoch),
            change: Some(change.clone()),
        });
        self.agent(node, FromAgent::Reports(v1::AttemptReports { reports: reports.collect() }));
    }
}

fn began() -> Change {
    Change::Started(v1::AttemptStarted { fences: vec!["ns.pid".into()], start_us: 1_500, phases: None })
}

fn ended(reason: Reason) -> Change {
    Change::Ended(v1::AttemptEnded {
        end: Some(v1::End { reason: Some(reason) }),
        wall_ms: 1_234,
        tails: vec![v1::LogTail { stream: v1::Stream::Stderr.into(), offset: 0, data: "end\n".into() }],
        ..v1::AttemptEnded::default()
    })
}

fn held(of: &[Started]) -> Vec<v1::HeldAttempt> {
    let phase = v1::held_attempt::Phase::Running.into();
    of.iter().map(|(attempt, epoch)| v1::HeldAttempt { attempt: Some(*attempt), epoch: Some(*epoch), phase }).collect()
}

fn selector(node: u64) -> Option<v1::NodeSelector> {
    Some(v1::NodeSelector { nodes: vec![format!("node-{node}")], ..v1::NodeSelector::default() })
}

fn array(play: &mut Play) {
    play.hello(1, Vec::new());
    play.beat(1, Vec::new());
    play.submit("array", 6, |_| {});
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    play.beat(1, held(&tasks));
    play.report(1, &tasks, &ended(Reason::Succeeded(v1::Empty {})));
    play.pass(3);
    play.beat(1, Vec::new());
}

fn cancelled(play: &mut Play) {
    play.hello(1, Vec::new());
    play.submit("cancelled", 8, |body| body.time_limit_ms = 60_000);
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    play.ask(Frame::Cancel, &v1::CancelRequest { job: 1_024, tasks: vec![0, 7], reason: "a mistake".into() });
    play.ask(Frame::Cancel, &v1::CancelRequest { job: 1_024, tasks: Vec::new(), reason: "all of it".into() });
    play.report(1, &tasks, &ended(Reason::Cancelled(v1::Empty {})));
}

fn drained(play: &mut Play) {
    play.hello(1, Vec::new());
    play.hello(2, Vec::new());
    play.submit("drained", 4, |body| body.on_drain = v1::OnDrain::Requeue.into());
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    let drain = |node, then: &str| v1::DrainRequest {
        selector: selector(node),
        reason: "new kernel".into(),
        deadline_ms: Some(60_000),
        then: then.into(),
        dry_run: false,
        at_once: None,
    };
    play.ask(Frame::Cordon, &v1::CordonRequest { selector: selector(2), reason: "a look".into() });
    play.ask(Frame::Uncordon, &v1::CordonRequest { selector: selector(2), reason: "looked".into() });
    play.ask(Frame::Drain, &drain(1, "stop"));
    play.report(1, &tasks, &ended(Reason::Drained(v1::Empty {})));
    play.pass(1);
    let revisions: Vec<u64> = play.world.effects.iter().filter_map(asked).collect();
    for revision in revisions.into_iter().chain([1, 2]) {
        play.agent(1, FromAgent::DrainProof(v1::DrainProof { revision }));
    }
    play.ask(Frame::Drain, &drain(2, "nothing"));
    play.agent(2, FromAgent::DrainRefused(v1::DrainRefused { revision: 2, reason: "busy".into() }));
    play.ask(Frame::Resume, &v1::CordonRequest { selector: selector(2), reason: "not now".into() });
    play.agent(2, FromAgent::StopNotice(v1::StopNotice { reason: "power".into(), within_ms: Some(30_000) }));
}

fn asked(effect: &Effect) -> Option<u64> {
    match effect {
        Effect::AskDrained { revision, .. } => Some(revision.0),
        _other => None,
    }
}

fn elastic(play: &mut Play) {
    play.ask(Frame::SetPool, &v1::SetPoolRequest { policy: POOLS[1].to_owned() });
    play.submit("elastic", 30, |_| {});
    for word in [4, 5, 6, 7] {
        play.pass(3);
        play.frame(Frame::Provider as u64, Value::Varint(word));
    }
    play.pass(3_600);
    play.ask(Frame::AcceptLoss, &v1::AcceptLossRequest { reason: "it was a test".into() });
}

fn exclusive_lost(play: &mut Play) {
    play.hello(1, Vec::new());
    play.hello(2, Vec::new());
    play.submit("exclusive", 2, |body| body.delivery = v1::Delivery::Exclusive.into());
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    play.frame(Frame::Disconnect as u64, Value::Varint(1));
    for _ in 0..5 {
        play.pass(30);
        play.beat(2, Vec::new());
    }
    // It comes back with what was given up, and its result is late.
    play.hello(1, held(&tasks));
    play.report(1, &tasks, &ended(Reason::Exited(3)));
}

fn failover(play: &mut Play) {
    play.hello(1, Vec::new());
    play.submit("once", 3, |body| body.delivery = v1::Delivery::AtMostOnce.into());
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    play.frame(Frame::Led as u64, Value::Varint(40));
    play.hello(1, held(&tasks));
    play.beat(1, held(&tasks));
    play.report(1, &tasks, &ended(Reason::Signaled(9)));
    let lost = Reason::NodeLost(v1::NodeLost { cause: v1::node_lost::Cause::Rebooted.into() });
    play.report(1, &tasks, &ended(lost));
}

fn given_back(play: &mut Play) {
    play.hello(1, Vec::new());
    play.submit("ahead", 20, |_| {});
    let tasks = play.started(1);
    let attempts = tasks.iter().rev().take(3).map(|(attempt, _)| *attempt).collect();
    play.agent(1, FromAgent::GivenBack(v1::GivenBack { attempts }));
    play.hello(2, Vec::new());
    play.pass(20);
}

fn retried(play: &mut Play) {
    play.ask(
        Frame::Table,
        &v1::TaskTable { tasks: vec![v1::TaskParameters { item: Some("a".into()), inputs: Vec::new() }; 2] },
    );
    play.hello(1, Vec::new());
    play.submit("retried", 2, |_| {});
    let reasons = [
        Reason::Exited(7),
        Reason::StartFailed(v1::StartFailed { step: "exec".into(), errno: 2 }),
        Reason::Refused("ns.pid".into()),
        Reason::OutOfMemory(v1::OutOfMemory { limit_bytes: 9, peak_bytes: 9 }),
    ];
    for reason in reasons {
        let tasks = play.started(1);
        play.report(1, &tasks, &began());
        play.report(1, &tasks, &ended(reason));
        play.ask(Frame::Retry, &v1::RetryRequest { job: 1_024 });
    }
}

fn stuck_and_removed(play: &mut Play) {
    play.hello(1, Vec::new());
    play.submit("stuck", 2, |_| {});
    let tasks = play.started(1);
    play.report(1, &tasks, &began());
    play.agent(1, FromAgent::Stuck(v1::Stuck { attempt: tasks.first().map(|(attempt, _)| *attempt) }));
    let remove = |force| v1::RemoveNodeRequest { node: "node-1".into(), force, reason: "gone".into() };
    play.ask(Frame::Remove, &remove(false));
    play.ask(Frame::Remove, &remove(true));
    play.report(1, &tasks, &ended(Reason::TimedOut(v1::Empty {})));
}
