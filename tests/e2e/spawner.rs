//! The spawner by itself, with the test as its agent: what a job sees, how each
//! end is told, and what survives the agent.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use muster_agent::spawner::{
    protocol::{
        AttemptKey, Collected, Ended, Event, Input, Limits, Network, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase,
        Profile, Request, Start, Verdict,
    },
    socket::{self, Received},
};
use muster_tests::{
    WAIT, eventually_blocking, host,
    part::{Part, Surroundings},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::Signal,
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket as new_socket},
    },
};
use tempfile::TempDir;

/// A spawner and this test's connection to it.
pub(crate) struct Spawner {
    pub(crate) part: Part,
    pub(crate) socket: OwnedFd,
    /// Fences that this host lacks.
    pub(crate) missing: Vec<String>,
    pub(crate) folder: TempDir,
    pub(crate) arguments: Vec<OsString>,
    next_task: u32,
}

/// One job's whole life as the agent hears it.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) end: Ended,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Spawner {
    pub(crate) fn start() -> Self {
        Self::start_with("", 64)
    }

    /// From a file of its own, which a test may replace.
    pub(crate) fn start_from(program: &Path) -> Self {
        let start = |log: &_, arguments: &_| Part::start_from(program, "spawner", log, arguments);
        Self::start_by(start, "", 64)
    }

    /// With these lines in its policy, and this many uids for jobs.
    pub(crate) fn start_with(policy: &str, uids: u32) -> Self {
        Self::start_by(|log, arguments| Part::start("spawner", log, arguments), policy, uids)
    }

    pub(crate) fn start_in(surroundings: &Surroundings) -> Self {
        Self::start_by(|log, arguments| Part::start_in("spawner", log, arguments, surroundings), "", 64)
    }

    fn start_by(start: impl FnOnce(&Path, &[OsString]) -> Part, policy: &str, uids: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("muster-spawner-").tempdir().expect("a folder");
        let (arguments, _) = Self::arguments(&folder, policy, uids);
        let part = start(&folder.path().join("log"), &arguments);
        let path = folder.path().join("spawner.sock");
        let socket = eventually_blocking(WAIT, || dial(&path)).unwrap_or_else(|| panic!("no spawner: {}", part.log()));
        let mut spawner = Self { part, socket, missing: Vec::new(), folder, arguments, next_task: 0 };
        spawner.greet();
        spawner
    }

    /// Its command line, and the name of its cgroup.
    pub(crate) fn arguments(folder: &TempDir, policy: &str, uids: u32) -> (Vec<OsString>, String) {
        let node = format!("e2e-spawner-{}", folder.path().file_name().expect("a name").to_string_lossy());
        let first = 3_000_000 + (std::process::id() % 10_000) * 64;
        let config = folder.path().join("spawner.toml");
        fs::write(&config, policy).expect("written");
        fs::set_permissions(&config, PermissionsExt::from_mode(0o644)).expect("ours");
        let arguments: Vec<OsString> = [
            "spawner".into(),
            "--config".into(),
            config.into_os_string(),
            "--socket".into(),
            folder.path().join("spawner.sock").into_os_string(),
            "--state".into(),
            folder.path().join("state").into_os_string(),
            "--node-id".into(),
            node.clone().into(),
            "--uids".into(),
            format!("{first}-{}", first + uids - 1).into(),
        ]
        .into();
        (arguments, format!("muster-{node}"))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("spawner.sock")
    }

    /// Says hello; returns what is held.
    pub(crate) fn greet(&mut self) -> BTreeMap<AttemptKey, Phase> {
        self.ask(&Request::Hello { version: PROTOCOL_VERSION }, &[]);
        let mut held = BTreeMap::new();
        loop {
            match self.hear().0 {
                Event::Welcome { missing, .. } => self.missing = missing.into_iter().map(|(name, _)| name).collect(),
                Event::Held { attempt, phase, .. } => drop(held.insert(attempt, phase)),
                Event::HeldAll => return held,
                other => panic!("not an answer to hello: {other:?}"),
            }
        }
    }

    /// A new agent process in place of the old one.
    pub(crate) fn reconnect(&mut self) -> BTreeMap<AttemptKey, Phase> {
        let path = self.path();
        self.socket = eventually_blocking(WAIT, || dial(&path)).expect("the spawner listens");
        self.greet()
    }

    pub(crate) fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) {
        let packet = socket::encode(request).expect("it fits");
        socket::send(self.socket.as_fd(), &packet, descriptors).expect("the spawner reads");
    }

    pub(crate) fn hear(&mut self) -> (Event, Vec<OwnedFd>) {
        let mut polls = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(WAIT).expect("a poll timeout");
        assert!(poll(&mut polls, timeout).expect("poll") > 0, "the spawner says nothing: {}", self.part.log());
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        match socket::receive(self.socket.as_fd(), &mut buffer).expect("a packet") {
            Received::Message(event, descriptors) => (event, descriptors),
            other => panic!("{other:?}: {}", self.part.log()),
        }
    }

    /// A shell script in the strictest profile that this host can raise.
    pub(crate) fn script(&mut self, script: &str) -> Start {
        self.next_task += 1;
        Start {
            attempt: AttemptKey { job: 100, task: self.next_task, number: 1, term: 1 },
            note: b"a note".to_vec(),
            owner: b"ana".to_vec(),
            arguments: ["/bin/sh", "-c", script].map(|word| word.as_bytes().to_vec()).into(),
            environment: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
            working_folder: Vec::new(),
            profile: Profile::Strict,
            without: self.missing.clone(),
            network: Network::None,
            limits: Limits { cpu_milli: 1_000, memory_bytes: 256 << 20, disk_bytes: 16 << 20, pids: 256 },
            time_limit_ms: 0,
            grace_ms: 500,
            exclusive: false,
            stdin: None,
            inputs: Vec::new(),
        }
    }

    pub(crate) fn run(&mut self, start: Start) -> Life {
        let key = start.attempt;
        self.ask(&Request::Start(Box::new(start)), &[]);
        self.follow(key)
    }

    pub(crate) fn run_script(&mut self, script: &str) -> Life {
        let start = self.script(script);
        self.run(start)
    }

    pub(crate) fn started(&mut self, key: AttemptKey) -> [File; 2] {
        match self.hear() {
            (Event::Started { attempt, .. }, pipes) if attempt == key => pipes_of(pipes),
            other => panic!("it did not start: {other:?}"),
        }
    }

    /// Hears a start and its end, and reads both pipes to their end.
    pub(crate) fn follow(&mut self, key: AttemptKey) -> Life {
        let mut pipes = None;
        loop {
            match self.hear() {
                (Event::Started { attempt, .. }, descriptors) if attempt == key => pipes = Some(pipes_of(descriptors)),
                (Event::Ended { attempt, end }, _) if attempt == key => return life(end, pipes),
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    pub(crate) fn ended(&mut self, key: AttemptKey) -> Ended {
        match self.hear().0 {
            Event::Ended { attempt, end } if attempt == key => end,
            other => panic!("not the end: {other:?}"),
        }
    }

    pub(crate) fn assert_no_cgroup(&self) {
        let name = self.folder.path().file_name().expect("a name").to_string_lossy();
        assert!(host::muster_cgroups().iter().all(|group| !group.contains(&*name)));
    }

    /// Every process whose command line names this run's marker.
    pub(crate) fn left(marker: &str) -> Vec<(u32, String)> {
        host::processes_with(marker)
    }
}

pub(crate) fn dial(path: &std::path::Path) -> Option<OwnedFd> {
    let socket = new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).ok()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
    Some(socket)
}

pub(crate) fn pipes_of(descriptors: Vec<OwnedFd>) -> [File; 2] {
    let files: Vec<File> = descriptors.into_iter().map(File::from).collect();
    files.try_into().expect("stdout and stderr")
}

fn life(end: Ended, pipes: Option<[File; 2]>) -> Life {
    let [mut stdout, mut stderr] = [String::new(), String::new()];
    if let Some([mut out, mut err]) = pipes {
        out.read_to_string(&mut stdout).expect("text");
        err.read_to_string(&mut stderr).expect("text");
    }
    Life { end, stdout, stderr }
}

#[test]
fn every_exit_code_and_signal_is_told_exactly() {
    let mut spawner = Spawner::start();
    for code in [0, 1, 2, 126, 127, 128, 255] {
        assert_eq!(spawner.run_script(&format!("exit {code}")).end.verdict, Verdict::Exited(code));
    }
    for signal in [1, 6, 9, 11, 15] {
        assert_eq!(spawner.run_script(&format!("kill -{signal} $$")).end.verdict, Verdict::Signaled(signal));
    }
}

#[test]
fn two_hundred_jobs_of_a_millisecond_lose_no_end() {
    let mut spawner = Spawner::start();
    for round in 0..200 {
        let life = spawner.run_script(&format!("echo {round}; exit {}", round % 7));
        assert_eq!((life.end.verdict, life.stdout), (Verdict::Exited(round % 7), format!("{round}\n")));
        let attempt = AttemptKey { job: 100, task: spawner.next_task, number: 1, term: 1 };
        spawner.ask(&Request::Forget { attempt }, &[]);
    }
}

#[test]
fn what_cannot_be_run_names_the_step_and_the_reason() {
    let mut spawner = Spawner::start();
    let mut start = spawner.script("");
    start.arguments = vec![b"/no/such/program".to_vec()];
    assert_eq!(spawner.run(start).end.verdict, Verdict::StartFailed { step: "exec".into(), errno: 2 });
    let mut start = spawner.script("");
    start.arguments = vec![b"/etc".to_vec()];
    assert_eq!(spawner.run(start).end.verdict, Verdict::StartFailed { step: "exec".into(), errno: 13 });
    let mut start = spawner.script("");
    start.working_folder = b"not/there".to_vec();
    assert_eq!(spawner.run(start).end.verdict, Verdict::StartFailed { step: "working_folder".into(), errno: 2 });
}

#[test]
fn a_fence_that_the_host_lacks_is_refused_by_name() {
    let mut spawner = Spawner::start();
    let Some(lacking) =
        spawner.missing.iter().find(|name| ["limits.cpu", "uid.own", "kill.cgroup"].contains(&name.as_str())).cloned()
    else {
        println!("SKIP a_fence_that_the_host_lacks_is_refused_by_name: this host lacks none");
        return;
    };
    let mut start = spawner.script("true");
    start.without.retain(|name| *name != lacking);
    match spawner.run(start).end.verdict {
        Verdict::Refused { fence, .. } => assert_eq!(fence, lacking),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_attempt_that_was_accepted_once_is_refused_the_second_time() {
    let mut spawner = Spawner::start();
    let start = spawner.script("true");
    spawner.run(start.clone());
    spawner.ask(&Request::Forget { attempt: start.attempt }, &[]);
    spawner.ask(&Request::Start(Box::new(start.clone())), &[]);
    assert!(matches!(spawner.hear().0, Event::Denied { attempt: Some(denied), .. } if denied == start.attempt));
}

#[test]
fn a_job_sees_only_itself_without_rights_and_without_a_network() {
    let mut spawner = Spawner::start();
    let life = spawner.run_script(
        "grep -E '^(CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Groups):' /proc/self/status
         ls /proc/self/fd | wc -l
         ls -d /proc/[0-9]* | wc -l
         touch /usr/x /etc/x 2>/dev/null && echo WRITABLE
         ls /sys /root /home 2>/dev/null | wc -l
         cat /proc/net/dev | tail -n +3 | grep -v lo: | wc -l
         umask; pwd; id -u",
    );
    let lines: Vec<&str> = life.stdout.lines().collect();
    for name in ["CapPrm", "CapEff", "CapAmb"] {
        assert!(lines.contains(&format!("{name}:\t0000000000000000").as_str()), "{life:?}");
    }
    assert!(lines.contains(&"NoNewPrivs:\t1"), "{life:?}");
    assert!(!life.stdout.contains("WRITABLE"), "{life:?}");
    assert!(lines.contains(&"0077") && lines.contains(&"/work"), "{life:?}");
    assert_ne!(lines.last(), Some(&"0"), "never uid 0: {life:?}");
    // 0, 1, 2 and the one with which ls reads the folder; init, sh, sh's child and the pipeline's second.
    assert!(lines.contains(&"4"), "only three descriptors are inherited: {life:?}");
}

#[test]
fn a_daemon_of_a_job_that_ended_is_gone_when_the_end_is_told() {
    let mut spawner = Spawner::start();
    let marker = format!("98{:07}", std::process::id());
    let life = spawner.run_script(&format!("(setsid sleep {marker} & ) ; exit 0"));
    assert_eq!(life.end.verdict, Verdict::Exited(0));
    assert_eq!(Spawner::left(&marker), []);
}

#[test]
fn a_job_that_ignores_sigterm_is_killed_after_its_grace() {
    let mut spawner = Spawner::start();
    let start = spawner.script("trap '' TERM; echo ready; while :; do sleep 1; done");
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    let [mut out, _err] = spawner.started(key);
    out.read_exact(&mut [0; 6]).expect("ready");
    spawner.ask(&Request::Stop { attempt: key, grace_ms: 100 }, &[]);
    assert_eq!(spawner.ended(key).verdict, Verdict::Stopped);
}

#[test]
fn a_stopped_job_meets_its_time_limit_all_the_same() {
    let mut spawner = Spawner::start();
    let mut start = spawner.script("kill -STOP $$");
    (start.time_limit_ms, start.grace_ms) = (200, 100);
    assert_eq!(spawner.run(start).end.verdict, Verdict::TimedOut);
}

#[test]
fn a_new_agent_finds_pipes_ends_and_notes_of_the_old_one() {
    let mut spawner = Spawner::start();
    let running = spawner.script("echo one; read line; echo $line; exit 4");
    let (read, write) = nix::unistd::pipe().expect("a pipe");
    let mut start = running.clone();
    start.stdin = Some(0);
    spawner.ask(&Request::Start(Box::new(start)), &[read.as_fd()]);
    drop(read);
    let [mut out, _] = spawner.started(running.attempt);
    out.read_exact(&mut [0; 4]).expect("one");
    drop(out);
    let ended = spawner.script("exit 5");
    spawner.ask(&Request::Start(Box::new(ended.clone())), &[]);
    let held = {
        spawner.follow(ended.attempt);
        spawner.reconnect()
    };
    assert!(matches!(held.get(&running.attempt), Some(Phase::Running(_))), "{held:?}");
    assert!(
        matches!(held.get(&ended.attempt), Some(Phase::Ended(Ended { verdict: Verdict::Exited(5), .. }))),
        "{held:?}"
    );
    spawner.ask(&Request::Attach { attempt: running.attempt }, &[]);
    let [mut out, _] = match spawner.hear() {
        (Event::Attached { .. }, pipes) => pipes_of(pipes),
        other => panic!("{other:?}"),
    };
    nix::unistd::write(&write, b"two\n").expect("the job reads");
    assert_eq!(spawner.ended(running.attempt).verdict, Verdict::Exited(4));
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "two\n");
}

#[test]
fn inputs_arrive_and_only_regular_files_below_the_folder_come_back() {
    let mut spawner = Spawner::start();
    let content = b"first|second";
    let pack = tempfile::tempfile().expect("a file");
    std::os::unix::fs::FileExt::write_all_at(&pack, content, 0).expect("written");
    let mut start = spawner.script(
        "cat in/a > copied; ./run; ln -s /etc/passwd link; mkfifo pipe; mkdir folder; ln -s / root; printf x > folder/deep",
    );
    let script = b"#!/bin/sh\necho ran > ran\n";
    std::os::unix::fs::FileExt::write_all_at(&pack, script, 100).expect("written");
    start.inputs = vec![
        Input { path: b"in/a".to_vec(), descriptor: 0, offset: 6, length: 6, executable: false },
        Input { path: b"run".to_vec(), descriptor: 0, offset: 100, length: script.len() as u64, executable: true },
    ];
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[pack.as_fd()]);
    let life = spawner.follow(key);
    assert_eq!((&life.end.verdict, life.stderr.as_str()), (&Verdict::Exited(0), ""), "{life:?}");
    let names =
        ["copied", "ran", "folder/deep", "link", "pipe", "folder", "root/etc/passwd", "../x", "/etc/passwd", "none"];
    let paths = names.iter().map(|name| name.as_bytes().to_vec()).collect();
    spawner.ask(&Request::Collect { attempt: key, paths, file_bytes_max: 1 << 20 }, &[]);
    let mut got = BTreeMap::new();
    loop {
        let (event, mut descriptors) = spawner.hear();
        let Event::Outputs { files, last, .. } = event else { panic!("{event:?}") };
        for (path, collected) in files {
            let name = String::from_utf8(path).expect("text");
            if let Collected::File { .. } = collected {
                let mut text = String::new();
                File::from(descriptors.remove(0)).read_to_string(&mut text).expect("text");
                got.insert(name, text);
            }
        }
        if last {
            break;
        }
    }
    let expected = [("copied", "second"), ("folder/deep", "x"), ("ran", "ran\n")];
    assert_eq!(got.into_iter().collect::<Vec<_>>(), expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
}

#[test]
fn an_exclusive_job_is_dead_after_its_lease_although_agent_and_spawner_are_stopped() {
    let mut spawner = Spawner::start();
    let marker = format!("97{:07}", std::process::id());
    let mut start = spawner.script(&format!("sleep {marker}"));
    start.exclusive = true;
    let key = start.attempt;
    spawner.ask(&Request::RenewLease { deadline_boottime_ms: boottime_ms() + 2_000 }, &[]);
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    spawner.started(key);
    // In the midst of its exec it has no command line for a moment.
    eventually_blocking(WAIT, || (!Spawner::left(&marker).is_empty()).then_some(())).expect("it runs");
    spawner.part.signal(Signal::SIGSTOP);
    let gone = eventually_blocking(WAIT, || Spawner::left(&marker).is_empty().then_some(()));
    spawner.part.signal(Signal::SIGCONT);
    assert!(gone.is_some(), "the job outlived its lease");
    assert_eq!(spawner.ended(key).verdict, Verdict::LeaseEnded);
}

/// The grace of a time limit is none to run on without a lease, whoever ends it: the spawner, or with it stopped the init.
#[test]
fn an_exclusive_job_in_the_grace_of_its_time_limit_ends_with_its_lease_all_the_same() {
    for stopped in [false, true] {
        let mut spawner = Spawner::start();
        let marker = format!("96{}{:06}", u8::from(stopped), std::process::id() % 1_000_000);
        let mut start = spawner.script(&format!("trap '' TERM; exec sleep {marker}"));
        (start.exclusive, start.time_limit_ms, start.grace_ms) = (true, 500, 3_600_000);
        let key = start.attempt;
        spawner.ask(&Request::RenewLease { deadline_boottime_ms: boottime_ms() + 4_000 }, &[]);
        spawner.ask(&Request::Start(Box::new(start)), &[]);
        spawner.started(key);
        eventually_blocking(WAIT, || (!Spawner::left(&marker).is_empty()).then_some(())).expect("it runs");
        if stopped {
            spawner.part.signal(Signal::SIGSTOP);
        }
        let gone = eventually_blocking(WAIT, || Spawner::left(&marker).is_empty().then_some(()));
        spawner.part.signal(Signal::SIGCONT);
        assert!(gone.is_some(), "the job outlived its lease");
        assert_eq!(spawner.ended(key).verdict, Verdict::TimedOut);
    }
}

/// Many programs take a second one for "now".
#[test]
fn a_job_at_its_time_limit_is_told_once() {
    let mut spawner = Spawner::start();
    let mut start = spawner.script("trap 'echo told' TERM; while :; do sleep 0.1; done");
    (start.time_limit_ms, start.grace_ms) = (300, 3_000);
    let life = spawner.run(start);
    assert_eq!((life.end.verdict, life.stdout.as_str()), (Verdict::TimedOut, "told\n"));
}

/// Its agent was slow with its inputs, and the task may be placed elsewhere by now.
#[test]
fn an_exclusive_job_whose_lease_is_over_never_begins() {
    let mut spawner = Spawner::start();
    for earlier in [0, boottime_ms() - 1] {
        let mut start = spawner.script("echo ran");
        start.exclusive = true;
        let key = start.attempt;
        spawner.ask(&Request::RenewLease { deadline_boottime_ms: earlier }, &[]);
        spawner.ask(&Request::Start(Box::new(start)), &[]);
        let ended = spawner.ended(key);
        assert_eq!((ended.verdict, ended.start_us), (Verdict::LeaseEnded, 0));
    }
}

pub(crate) fn boottime_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("a clock");
    u64::try_from(now.tv_sec()).expect("after boot") * 1_000
        + u64::try_from(now.tv_nsec()).expect("positive") / 1_000_000
}

#[test]
fn garbage_and_requests_out_of_order_are_denied_and_change_nothing() {
    let mut spawner = Spawner::start();
    let fresh = dial(&spawner.path()).expect("the spawner listens");
    spawner.socket = fresh;
    spawner.ask(&Request::Poweroff, &[]);
    assert!(matches!(spawner.hear().0, Event::Denied { .. }), "hello comes first");
    spawner.greet();
    socket::send(spawner.socket.as_fd(), &[0xff; 64], &[]).expect("sent");
    assert!(matches!(spawner.hear().0, Event::Denied { .. }));
    spawner.ask(&Request::Poweroff, &[]);
    assert!(matches!(spawner.hear().0, Event::Denied { .. }), "power-off is off by default");
    let mut escaping = spawner.script("true");
    escaping.inputs = vec![Input { path: b"../x".to_vec(), descriptor: 0, offset: 0, length: 0, executable: false }];
    let null = File::open("/dev/null").expect("a null device");
    spawner.ask(&Request::Start(Box::new(escaping)), &[null.as_fd()]);
    assert!(matches!(spawner.hear().0, Event::Denied { .. }));
    assert_eq!(spawner.run_script("exit 3").end.verdict, Verdict::Exited(3));
    assert!(fs::metadata(spawner.path()).is_ok());
}
