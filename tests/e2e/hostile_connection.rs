//! The spawner against an agent that somebody has taken over, and its connection:
//! packets that are no messages, messages out of turn, floods, and silence. What
//! single requests may ask is in [`super::hostile_agent`].

use std::{collections::BTreeMap, fs, io::ErrorKind, os::fd::AsFd as _, time::Instant};

use muster_agent::spawner::{
    protocol::{AttemptKey, Event, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase, Request, Start, Verdict},
    socket::{self, Received},
};
use muster_tests::{WAIT, eventually_blocking};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::{
    hostile_agent::{STRICT_AS_FAR_AS_THERE, file, nobodys},
    spawner::{Spawner, dial},
};

/// More than the spawner lets wait for a slow agent.
const MORE_THAN_WAIT: usize = 80_000;

impl Spawner {
    /// A new connection. As the agent does, it begins again if news of a job came before the greeting.
    fn back(&mut self) -> BTreeMap<AttemptKey, Phase> {
        let path = self.path();
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        loop {
            self.socket = eventually_blocking(WAIT, || dial(&path)).expect("the spawner listens");
            self.ask(&Request::Hello { version: PROTOCOL_VERSION }, &[]);
            let mut held = BTreeMap::new();
            while let Received::Message(event, _) = socket::receive(self.socket.as_fd(), &mut buffer).expect("a packet")
            {
                match event {
                    Event::Welcome { .. } => {}
                    Event::Held { attempt, phase, .. } => drop(held.insert(attempt, phase)),
                    Event::HeldAll => return held,
                    Event::Started { .. }
                    | Event::Attached { .. }
                    | Event::Ended { .. }
                    | Event::Outputs { .. }
                    | Event::Stuck { .. }
                    | Event::Leaving { .. }
                    | Event::Denied { .. } => break,
                }
            }
        }
    }

    fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.part.pid())).expect("a process of ours").count()
    }

    /// Answers to whatever garbage meant, up to the one to a request that we know.
    fn hear_all_until_denied(&mut self) {
        self.ask(&Request::Attach { attempt: nobodys() }, &[]);
        loop {
            match self.hear().0 {
                Event::Denied { attempt: Some(attempt), .. } if attempt == nobodys() => return,
                Event::Ended { attempt, .. } => self.ask(&Request::Forget { attempt }, &[]),
                Event::Welcome { .. }
                | Event::Held { .. }
                | Event::HeldAll
                | Event::Started { .. }
                | Event::Attached { .. }
                | Event::Outputs { .. }
                | Event::Stuck { .. }
                | Event::Leaving { .. }
                | Event::Denied { .. } => {}
            }
        }
    }
}

#[test]
fn packets_beyond_the_protocol_are_denied_and_leak_no_descriptor() {
    // Sandboxes made ahead come and go, and hold descriptors of their own.
    let mut spawner = Spawner::start_with("prepared_max = 0", 64);
    let before = spawner.open_descriptors();
    let too_large = "the packet is larger than the protocol allows";
    socket::send(spawner.socket.as_fd(), &vec![1; PACKET_BYTES_MAX + 1], &[]).expect("sent");
    assert_eq!(spawner.denied(), too_large);
    let plain = file();
    let many = vec![plain.as_fd(); 253];
    let hello = socket::encode(&Request::Poweroff).expect("it fits");
    // More than the protocol allows, as many as the kernel takes.
    for _ in 0..4 {
        socket::send(spawner.socket.as_fd(), &hello, &many).expect("sent");
        assert_eq!(spawner.denied(), too_large);
    }
    socket::send(spawner.socket.as_fd(), &[0xff; 8], &many[..200]).expect("sent");
    assert!(spawner.denied().starts_with("not a message of this protocol"));
    // Descriptors beside a request that names none are let go.
    spawner.ask(&Request::Attach { attempt: nobodys() }, &many[..200]);
    assert_eq!(spawner.denied(), "no such attempt is held");
    spawner.works_as_before();
    let back = eventually_blocking(WAIT, || (spawner.open_descriptors() <= before).then_some(()));
    assert!(back.is_some(), "{before} descriptors before, {} now", spawner.open_descriptors());
}

#[test]
fn nothing_is_obeyed_before_a_greeting_in_the_right_version() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    spawner.socket = dial(&spawner.path()).expect("the spawner listens");
    let start = spawner.script("exit 0");
    let requests = [
        Request::Start(Box::new(start)),
        Request::StartInMemory,
        Request::Stop { attempt: held, grace_ms: 0 },
        Request::Attach { attempt: held },
        Request::Collect { attempt: held, paths: vec![b"x".to_vec()], file_bytes_max: 1 },
        Request::Forget { attempt: held },
        Request::RenewLease { deadline_boottime_ms: u64::MAX },
        Request::Poweroff,
        Request::Drained,
    ];
    for request in &requests {
        spawner.ask(request, &[]);
        assert_eq!(spawner.denied(), "the first message must be Hello", "{request:?}");
    }
    for version in [0, PROTOCOL_VERSION + 1, u16::MAX] {
        spawner.ask(&Request::Hello { version }, &[]);
        assert_eq!(spawner.denied(), format!("this spawner speaks protocol {PROTOCOL_VERSION}, not {version}"));
        spawner.ask(&Request::Attach { attempt: held }, &[]);
        assert_eq!(spawner.denied(), "the first message must be Hello");
    }
    let held_now = spawner.greet();
    assert!(matches!(held_now.get(&held), Some(Phase::Running(_))), "{held_now:?}");
    spawner.ends_by_itself(held, &release);
    spawner.works_as_before();
}

#[test]
fn garbage_in_every_form_is_survived() {
    let mut spawner = Spawner::start_with(STRICT_AS_FAR_AS_THERE, 8);
    let start = spawner.script("exit 0");
    let good = socket::encode(&Request::Start(Box::new(start))).expect("it fits");
    let mut random = 1_u64;
    let mut next = |below: usize| {
        // Knuth's MMIX generator: the same garbage in every run.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).expect("31 bits") % below
    };
    for round in 0..600 {
        let packet: Vec<u8> = match round % 3 {
            0 => (0..=next(300)).map(|_| u8::try_from(next(256)).expect("a byte")).collect(),
            1 => good[..1 + next(good.len() - 1)].to_vec(),
            _ => {
                let mut changed = good.clone();
                for _ in 0..=next(3) {
                    changed[next(good.len())] ^= 1 << next(8);
                }
                changed
            }
        };
        socket::send(spawner.socket.as_fd(), &packet, &[]).expect("the spawner reads");
        spawner.hear_all_until_denied();
    }
    // Some of it meant a job, which may still run.
    let over = eventually_blocking(WAIT, || {
        let held = spawner.back();
        let (ended, running): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|(_, phase)| matches!(phase, Phase::Ended(_)));
        for (attempt, _) in ended {
            spawner.ask(&Request::Forget { attempt }, &[]);
        }
        for (attempt, _) in &running {
            spawner.ask(&Request::Stop { attempt: *attempt, grace_ms: 0 }, &[]);
        }
        running.is_empty().then_some(())
    });
    assert!(over.is_some(), "what garbage started does not end");
    spawner.works_as_before();
}

#[test]
fn a_packet_of_nothing_ends_the_connection_and_no_job() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    socket::send(spawner.socket.as_fd(), &[], &[]).expect("sent");
    let held_now = spawner.reconnect();
    assert!(matches!(held_now.get(&held), Some(Phase::Running(_))), "{held_now:?}");
    spawner.ends_by_itself(held, &release);
    spawner.works_as_before();
}

#[test]
fn a_deadline_is_met_under_a_flood_of_requests() {
    let mut spawner = Spawner::start();
    let mut start = spawner.script("trap '' TERM; while :; do sleep 1; done");
    (start.time_limit_ms, start.grace_ms) = (200, 100);
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    drop(spawner.started(key));
    let deadline = Instant::now() + WAIT;
    // As fast as the socket takes them, and never a pause until the end is told.
    fcntl(&spawner.socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("ours");
    let flood = [
        socket::encode(&Request::Attach { attempt: nobodys() }).expect("it fits"),
        socket::encode(&Request::Collect { attempt: nobodys(), paths: vec![b"x".to_vec()], file_bytes_max: 1 })
            .expect("it fits"),
        socket::encode(&Request::Hello { version: PROTOCOL_VERSION }).expect("it fits"),
        vec![0xff; 64],
    ];
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    let mut requests = 0_u64;
    let verdict = 'flood: loop {
        assert!(Instant::now() < deadline, "no end after {requests} requests");
        for packet in flood.iter().cycle().take(256) {
            match socket::send(spawner.socket.as_fd(), packet, &[]) {
                Ok(()) => requests += 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}: {}", spawner.part.log()),
            }
        }
        while let Received::Message(event, _) =
            socket::receive::<Event>(spawner.socket.as_fd(), &mut buffer).expect("a packet")
        {
            if let Event::Ended { attempt, end } = event
                && attempt == key
            {
                break 'flood end.verdict;
            }
        }
    };
    assert_eq!(verdict, Verdict::TimedOut);
    assert!(requests > 256, "only {requests} requests are no flood");
    spawner.back();
    spawner.works_as_before();
}

#[test]
fn an_agent_that_does_not_read_loses_its_connection_and_no_job() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    let mut timed = spawner.script("kill -STOP $$");
    (timed.time_limit_ms, timed.grace_ms) = (200, 100);
    let timed_key = timed.attempt;
    spawner.ask(&Request::Start(Box::new(timed)), &[]);
    let packet = socket::encode(&Request::Attach { attempt: nobodys() }).expect("it fits");
    let dropped = (0..MORE_THAN_WAIT).find_map(|_| socket::send(spawner.socket.as_fd(), &packet, &[]).err());
    let error = dropped.expect("answers that nobody reads are not kept without a bound");
    assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    let ended = eventually_blocking(WAIT, || {
        let held_now = spawner.back();
        assert!(matches!(held_now.get(&held), Some(Phase::Running(_))), "{held_now:?}");
        match held_now.get(&timed_key) {
            Some(Phase::Ended(ended)) => Some(ended.verdict.clone()),
            Some(Phase::Running(_) | Phase::Stopping(_)) => None,
            None => panic!("it is not held"),
        }
    });
    assert_eq!(ended, Some(Verdict::TimedOut));
    spawner.ends_by_itself(held, &release);
    spawner.works_as_before();
}

#[test]
fn a_second_greeting_in_a_connection_is_denied() {
    let mut spawner = Spawner::start();
    spawner.ask(&Request::Hello { version: PROTOCOL_VERSION }, &[]);
    assert_eq!(spawner.denied(), "Hello comes once in a connection");
    spawner.works_as_before();
}

#[test]
fn news_of_jobs_wait_for_the_greeting() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    let Some(Phase::Running(running)) = spawner.reconnect().remove(&held) else { panic!("it does not run") };
    let init = running.init_pid;
    spawner.socket = dial(&spawner.path()).expect("the spawner listens");
    // Answered, so this connection is the agent's by now.
    spawner.ask(&Request::Poweroff, &[]);
    assert_eq!(spawner.denied(), "the first message must be Hello");
    nix::unistd::write(&release, b"go\n").expect("the job reads");
    let reaped = || fs::metadata(format!("/proc/{init}")).is_err().then_some(());
    eventually_blocking(WAIT, reaped).expect("the job ends, and its init is reaped");
    // Panics if anything comes before the greeting.
    let held_now = spawner.greet();
    assert!(matches!(held_now.get(&held), Some(Phase::Ended(_))), "{held_now:?}");
    spawner.works_as_before();
}

#[test]
fn answers_that_nobody_reads_are_bounded_by_their_bytes_too() {
    let mut spawner = Spawner::start();
    let start = spawner.script("exit 0");
    let key = start.attempt;
    let refused = Start { arguments: vec![b"/no/such".to_vec()], ..start };
    spawner.run(refused);
    let paths = vec![vec![b'x'; PACKET_BYTES_MAX - 1_000]];
    let packet = socket::encode(&Request::Collect { attempt: key, paths, file_bytes_max: 1 }).expect("it fits");
    // Far less than the number of answers that may wait, and more than their bytes.
    let dropped = (0..2_000).find_map(|_| socket::send(spawner.socket.as_fd(), &packet, &[]).err());
    let error = dropped.expect("250 MiB of answers are not kept");
    assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    spawner.back();
    spawner.works_as_before();
}

#[test]
fn an_answer_larger_than_a_packet_comes_in_pieces() {
    let mut spawner = Spawner::start();
    let start = spawner.script("exit 0");
    let key = start.attempt;
    spawner.run(Start { arguments: vec![b"/no/such".to_vec()], ..start });
    let asked = 14_000;
    let paths = vec![b"x".to_vec(); asked];
    spawner.ask(&Request::Collect { attempt: key, paths, file_bytes_max: 1 }, &[]);
    let mut answered = 0;
    loop {
        let Event::Outputs { files, last, .. } = spawner.hear().0 else { panic!("not the outputs") };
        answered += files.len();
        if last {
            break;
        }
    }
    assert_eq!(answered, asked);
    spawner.works_as_before();
}
