//! What one end and the placement that follows cost in the core, over fleet sizes and queue lengths.
//! The budget: at most twice as much with 10,000 nodes and 1,000,000 waiting tasks as with 100 and 1,000.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    time::Instant,
};

use muster_core::{
    effect::Effect,
    end::End,
    event::{Event, Hello},
    fleet::{Fleet, Output},
    ids::{Actor, AttemptId, Epoch, NodeId, PoolName, RequestId, Revision, SessionId, Term},
    policy::{HostTemplate, PoolPolicy, Preset, ProviderKind},
    resources::Resources,
    spec::{Delivery, JobSpec, OnDrain, Retries},
    time::{Millis, Timestamp},
};

const ROUNDS: u32 = 20_000;
/// Fewer seconds than a lease lasts.
const LOOKS: u32 = 12;

fn main() {
    let base = measure(100, 1_000);
    println!("{:>8} {:>10} {:>12} {:>8}", "nodes", "waiting", "ns a task", "ratio");
    for (nodes, waiting) in [(100, 1_000), (100, 1_000_000), (1_000, 1_000_000), (10_000, 1_000), (10_000, 1_000_000)] {
        let cost = measure(nodes, waiting);
        println!("{nodes:>8} {waiting:>10} {cost:>12.0} {:>8.2}", cost / base);
    }
    let memory = submit_cost();
    println!("submit of a 1,000,000-task array: {memory:.3} ms in the core");
    for nodes in [100, 1_000, 10_000] {
        println!("a look at a pool of {nodes} nodes, at most one a second: {:.3} ms", look_cost(nodes));
    }
}

/// Nanoseconds for one task: its start and end are told, and another is placed.
fn measure(nodes: u64, waiting: u32) -> f64 {
    let mut fleet = Fleet::default();
    let now = Timestamp(1_000_000);
    let mut running = Vec::new();
    apply(&mut fleet, Event::Led { term: Term(1) }, now, &mut running);
    for node in 1..=nodes {
        join(&mut fleet, node, now, &mut running);
    }
    let tasks = waiting + u32::try_from(nodes).expect("few nodes") + ROUNDS;
    apply(&mut fleet, submit(tasks), now, &mut running);
    let begun = Instant::now();
    for round in 0..ROUNDS {
        let (node, attempt) = running[round as usize];
        let (node, session) = (NodeId(node), SessionId(node));
        let epoch = Epoch { term: Term(1), attempt: NonZeroU32::MIN };
        apply(&mut fleet, Event::AttemptStarted { node, session, attempt, epoch }, now, &mut running);
        apply(
            &mut fleet,
            Event::AttemptEnded { node, session, attempt, epoch, end: End::Succeeded, wall: None, detail: Vec::new() },
            now + Millis(10_000),
            &mut running,
        );
    }
    begun.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
}

/// Milliseconds of a decision on a pool's size, with a long queue.
fn look_cost(nodes: u64) -> f64 {
    let mut fleet = Fleet::default();
    let mut now = Timestamp(1_000_000);
    let mut running = Vec::new();
    apply(&mut fleet, Event::Led { term: Term(1) }, now, &mut running);
    let host = HostTemplate { cpu_milli: 1_000, memory_bytes: 1 << 30, disk_bytes: 1 << 30, labels: BTreeMap::new() };
    let pool = PoolPolicy::fixed(PoolName("batch".into()), ProviderKind::Static, 0, 20_000, host);
    let policy = Box::new(PoolPolicy { preset: Preset::Demand, ..pool });
    let set = Event::SetPool { request: RequestId(1), policy, actor: Actor("bench".into()) };
    apply(&mut fleet, set, now, &mut running);
    for node in 1..=nodes {
        join(&mut fleet, node, now, &mut running);
    }
    apply(&mut fleet, submit(100_000), now, &mut running);
    let begun = Instant::now();
    for _ in 0..LOOKS {
        now = now + Millis::from_secs(1);
        apply(&mut fleet, Event::Tick, now, &mut running);
    }
    begun.elapsed().as_secs_f64() * 1_000.0 / f64::from(LOOKS)
}

fn submit_cost() -> f64 {
    let mut fleet = Fleet::default();
    let begun = Instant::now();
    apply(&mut fleet, submit(1_000_000), Timestamp(1), &mut Vec::new());
    begun.elapsed().as_secs_f64() * 1_000.0
}

fn apply(fleet: &mut Fleet, event: Event, now: Timestamp, running: &mut Vec<(u64, AttemptId)>) {
    let mut out = Output::default();
    fleet.apply(event, now, &mut out);
    fleet.settle(now, &mut out);
    for effect in out.effects {
        if let Effect::Start { node, attempts, .. } = effect {
            running.extend(attempts.into_iter().map(|(attempt, _)| (node.0, attempt)));
        }
    }
}

fn join(fleet: &mut Fleet, number: u64, now: Timestamp, running: &mut Vec<(u64, AttemptId)>) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    let enroll = Event::Enroll {
        request: RequestId(number),
        name: format!("node-{number}"),
        pool: PoolName("batch".into()),
        host: None,
        key,
        shown: NodeId(0),
    };
    apply(fleet, enroll, now, running);
    let hello = Hello {
        boot_id: "boot".into(),
        agent_start: 1,
        stream: 1,
        instance: "instance".into(),
        capacity: Resources { cpu_milli: 1_000, memory_bytes: 1 << 30, disk_bytes: 1 << 30 },
        labels: BTreeMap::new(),
        fences: BTreeSet::new(),
        held: Vec::new(),
        closed_for_drain: Revision(0),
        version: String::new(),
    };
    apply(fleet, Event::NodeConnected { node: NodeId(number), key, session: SessionId(number), hello }, now, running);
}

fn submit(tasks: u32) -> Event {
    let spec = JobSpec {
        name: String::new(),
        owner: Actor("bench".into()),
        pool: None,
        priority: 0,
        tasks,
        request: Resources { cpu_milli: 1_000, memory_bytes: 1 << 20, disk_bytes: 0 },
        fences: BTreeSet::new(),
        constraints: BTreeMap::new(),
        delivery: Delivery::AtLeastOnce,
        on_drain: OnDrain::Finish,
        retries: Retries::default(),
        time_limit: None,
        grace: Millis(1_000),
    };
    Event::Submit { request: RequestId(1), key: format!("key-{tasks}"), digest: [0; 32], spec }
}
