//! What the agent and the spawner say to each other, over a real socket, and
//! what the spawner makes of a start before any kernel call sees it.

use std::{
    cell::RefCell,
    os::fd::{AsFd as _, OwnedFd},
};

use muster_agent::{
    sandbox::order::{Order, Strings},
    spawner::{
        protocol::{
            AttemptKey, Collected, DESCRIPTORS_MAX, Ended, Event, Input, Limits, Network, PACKET_BYTES_MAX,
            PROTOCOL_VERSION, Phase, Profile, Request, Running, Start, StartPhases, Usage, Verdict,
        },
        socket::{self, Received},
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::target::{Shape, Signs, Target};

pub(super) const REQUEST: Target = Target {
    name: "spawner_request",
    shape: Shape::Binary,
    words: &["PATH", "/bin/sh", "..", "a/b", "="],
    inputs_in_ci: 20_000,
    take: request,
    seeds: requests,
};

pub(super) const EVENT: Target = Target {
    name: "spawner_event",
    shape: Shape::Binary,
    words: &["ns.pid", "limits.memory", "exec"],
    inputs_in_ci: 20_000,
    take: event,
    seeds: events,
};

fn request(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let (packet, memory) = split_memory(input);
    match received::<Request>(packet, signs)? {
        Some(Request::Start(start)) => start_taken(&start, signs),
        Some(Request::StartInMemory) => {
            let start = postcard::from_bytes::<Start>(memory);
            signs.result("memory", &start);
            start.map_or(Ok(()), |start| start_taken(&start, signs))
        }
        Some(other) => same_again(&other),
        None => Ok(()),
    }
}

fn event(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    received::<Event>(input, signs)?.map_or(Ok(()), |event| same_again(&event))
}

/// What follows the packet of a `StartInMemory` is its memory.
fn split_memory(input: &[u8]) -> (&[u8], &[u8]) {
    let packet = socket::encode(&Request::StartInMemory).unwrap_or_default();
    if input.starts_with(&packet) { input.split_at(packet.len()) } else { (input, &[]) }
}

thread_local! {
    static PAIR: RefCell<Option<(OwnedFd, OwnedFd)>> = const { RefCell::new(None) };
}

/// The packet through a real socket, as the other side takes it.
fn received<T: DeserializeOwned + std::fmt::Debug>(packet: &[u8], signs: &mut Signs) -> Result<Option<T>, String> {
    PAIR.with_borrow_mut(|pair| {
        if pair.is_none() {
            *pair = Some(socket::pair().map_err(|error| error.to_string())?);
        }
        let Some((one, other)) = pair.as_ref() else { return Ok(None) };
        socket::send(one.as_fd(), packet, &[]).map_err(|error| format!("cannot send: {error}"))?;
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        match socket::receive::<T>(other.as_fd(), &mut buffer).map_err(|error| error.to_string())? {
            Received::Message(message, _) => {
                signs.accepted = true;
                signs.variant("message", &message);
                Ok(Some(message))
            }
            Received::Malformed(sentence) => {
                signs.note("malformed", &sentence);
                Ok(None)
            }
            // An empty packet reads like the end of the stream.
            Received::Closed if packet.is_empty() => Ok(None),
            Received::Closed | Received::Nothing => Err("a packet that was sent did not arrive".into()),
        }
    })
}

/// A start that passes the checks becomes an order that says the same.
fn start_taken(start: &Start, signs: &mut Signs) -> Result<(), String> {
    same_again(start)?;
    let descriptors = usize::from(start.note.first().copied().unwrap_or(u8::MAX)).min(DESCRIPTORS_MAX);
    let checked = start.check(descriptors);
    signs.result("start", &checked);
    if checked.is_err() {
        return Ok(());
    }
    let strings = Strings::of(start);
    let (packet, memory) = strings.order(start).encode();
    let bytes = memory.as_deref().unwrap_or(&packet[1..]);
    let Some(order) = Order::decode(bytes) else { return Err("its own order does not read".into()) };
    let arguments: Vec<&[u8]> = order.arguments.split(|byte| *byte == 0).collect();
    let (last, arguments) = arguments.split_last().ok_or("an order without arguments")?;
    if !last.is_empty() || !arguments.iter().eq(start.arguments.iter()) {
        return Err("the order has other arguments than the start".into());
    }
    if order.environment.iter().filter(|byte| **byte == 0).count() != start.environment.len() {
        return Err("the order has other variables than the start".into());
    }
    let named = order.inputs.iter().map(|input| input.descriptor).chain(order.stdin);
    if named.max().is_some_and(|highest| usize::from(highest) >= descriptors) {
        return Err("the order names a descriptor that is not there".into());
    }
    Ok(())
}

/// What was read is what it is written as.
fn same_again<T: Serialize + DeserializeOwned + PartialEq>(message: &T) -> Result<(), String> {
    let bytes = postcard::to_stdvec(message).map_err(|error| format!("what was read cannot be written: {error}"))?;
    match postcard::from_bytes::<T>(&bytes) {
        Ok(again) if again == *message => Ok(()),
        Ok(_) => Err("what was written reads as something else".into()),
        Err(error) => Err(format!("what was written does not read: {error}")),
    }
}

const KEY: AttemptKey = AttemptKey { job: 1_024, task: 3, number: 2, term: 7 };

/// A start with something of everything.
pub(super) fn start() -> Start {
    Start {
        attempt: KEY,
        note: vec![250, 1, 2, 3],
        owner: b"ana".to_vec(),
        arguments: vec![b"sh".to_vec(), b"-c".to_vec(), b"exit 7".to_vec()],
        environment: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec()), (b"EMPTY".to_vec(), Vec::new())],
        working_folder: b"a/b".to_vec(),
        profile: Profile::Strict,
        without: vec!["limits.io".to_owned()],
        network: Network::None,
        limits: Limits { cpu_milli: 500, memory_bytes: 64 << 20, disk_bytes: 1 << 20, pids: 64 },
        time_limit_ms: 60_000,
        grace_ms: 1_000,
        exclusive: true,
        stdin: Some(0),
        inputs: vec![Input { path: b"in/data".to_vec(), descriptor: 1, offset: 0, length: 10, executable: true }],
    }
}

fn requests() -> Vec<(&'static str, Vec<u8>)> {
    let packet = |request: &Request| socket::encode(request).unwrap_or_default();
    let small = Start { environment: Vec::new(), without: Vec::new(), stdin: None, inputs: Vec::new(), ..start() };
    let memory = [packet(&Request::StartInMemory), postcard::to_stdvec(&start()).unwrap_or_default()].concat();
    vec![
        ("attach", packet(&Request::Attach { attempt: KEY })),
        ("checkpoint", packet(&Request::Checkpoint { attempt: KEY, signal: 10, grace_ms: 5_000 })),
        (
            "collect",
            packet(&Request::Collect {
                attempt: KEY,
                paths: vec![b"out".to_vec(), b"b/c".to_vec()],
                file_bytes_max: 9,
            }),
        ),
        ("drained", packet(&Request::Drained)),
        ("forget", packet(&Request::Forget { attempt: KEY })),
        ("hello", packet(&Request::Hello { version: PROTOCOL_VERSION })),
        ("notice_drain", packet(&Request::NoticeDrain { deadline_unix_s: Some(1_795_804_200) })),
        ("notice_no_drain", packet(&Request::NoticeNoDrain)),
        ("poweroff", packet(&Request::Poweroff)),
        ("renew_lease", packet(&Request::RenewLease { deadline_boottime_ms: 123_456_789 })),
        ("start", packet(&Request::Start(Box::new(start())))),
        ("start_in_memory", memory),
        ("start_small", packet(&Request::Start(Box::new(small)))),
        ("stop", packet(&Request::Stop { attempt: KEY, grace_ms: 5_000 })),
    ]
}

fn events() -> Vec<(&'static str, Vec<u8>)> {
    let phases = StartPhases { prepared: true, cgroup_us: 10, ..StartPhases::default() };
    let fences = vec!["ns.pid".to_owned(), "limits.memory".to_owned()];
    let running = Running {
        fences: fences.clone(),
        start_us: 1_500,
        cgroup: Some(b"muster/jobs/7".to_vec()),
        init_pid: 4_711,
        init_start_ticks: 555,
        cpu_before_us: 0,
        memory_peak_before_bytes: 0,
        started_boottime_ms: 99_000,
        phases,
    };
    let end = |verdict| Ended {
        verdict,
        usage: Usage { cpu_ms: 12, memory_peak_bytes: 1 << 20, approximate: true },
        wall_ms: 34,
        fences: fences.clone(),
        start_us: 1_500,
        phases,
    };
    let events = [
        (
            "welcome",
            Event::Welcome {
                version: PROTOCOL_VERSION,
                boot_id: "3f1c".into(),
                spawner_id: [7; 16],
                fences: fences.clone(),
                missing: vec![("ns.net".into(), "this kernel has none".into())],
                poweroff: false,
            },
        ),
        ("held", Event::Held { attempt: KEY, note: vec![1, 2], phase: Phase::Running(running.clone()) }),
        ("held_all", Event::HeldAll),
        ("held_ended", Event::Held { attempt: KEY, note: Vec::new(), phase: Phase::Ended(end(Verdict::TimedOut)) }),
        ("started", Event::Started { attempt: KEY, running }),
        ("attached", Event::Attached { attempt: KEY }),
        ("ended", Event::Ended { attempt: KEY, end: end(Verdict::Exited(7)) }),
        (
            "ended_memory",
            Event::Ended { attempt: KEY, end: end(Verdict::OutOfMemory { limit_bytes: 9, peak_bytes: 9 }) },
        ),
        (
            "start_failed",
            Event::Ended { attempt: KEY, end: end(Verdict::StartFailed { step: "exec".into(), errno: 2 }) },
        ),
        (
            "outputs",
            Event::Outputs {
                attempt: KEY,
                files: vec![
                    (b"out".to_vec(), Collected::File { length: 5 }),
                    (b"b".to_vec(), Collected::Skipped { reason: "missing".into() }),
                ],
                last: true,
            },
        ),
        ("stuck", Event::Stuck { attempt: KEY }),
        ("denied", Event::Denied { attempt: Some(KEY), reason: "this attempt was accepted before".into() }),
        ("leaving", Event::Leaving { within_ms: 90_000 }),
    ];
    events.into_iter().map(|(name, event)| (name, socket::encode(&event).unwrap_or_default())).collect()
}
