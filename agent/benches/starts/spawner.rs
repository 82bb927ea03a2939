//! A spawner of our own, asked over its own protocol, with this process as its agent.

use std::{
    cell::{Cell, RefCell},
    ffi::CStr,
    fs::{self, File},
    io::Read as _,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use muster_agent::spawner::{
    protocol::{
        AttemptKey, Event, Limits, Network, PACKET_BYTES_MAX, PROTOCOL_VERSION, Profile, Request, Start, Verdict,
    },
    socket::{self, Received},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket as new_socket};
use tempfile::TempDir;

use crate::{
    PAUSE, REST, Sample, Way, now_ns,
    program::{EXIT_CODE, Programs},
};

/// How long a spawner may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);
const USUAL_DISK_BYTES: u64 = 16 << 20;
const PAGE_BYTES: u64 = 4_096;

/// The spawner and the connection to it. It ends with this, and with this process.
pub struct Spawner {
    child: Child,
    lifeline: Option<OwnedFd>,
    socket: OwnedFd,
    missing: Vec<String>,
    buffer: RefCell<Vec<u8>>,
    next_task: Cell<u32>,
    _folder: TempDir,
}

/// What a start asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The same as all starts before, so that it can have been made ahead; of an owner who had no job yet.
    Usual,
    /// The same, always of one owner: a sandbox that was left as new serves again.
    Again,
    /// A size of the working folder that nobody has asked for yet.
    New,
}

/// Starts of one profile and shape, one at a time.
pub struct Starts<'a> {
    spawner: &'a Spawner,
    name: &'static str,
    profile: Profile,
    shape: Shape,
    /// Starts for which a sandbox stood ready.
    ahead: u32,
    starts: u32,
}

/// One start, in nanoseconds of CLOCK_MONOTONIC.
struct Life {
    begun: u64,
    started: u64,
    ended: u64,
    stdout: File,
    /// The sandbox stood ready.
    prepared: bool,
}

impl Spawner {
    /// # Panics
    /// If there is no executable, or it does not listen in time.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("muster-starts-").tempdir().unwrap();
        let path = folder.path().join("spawner.sock");
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).unwrap();
        let mut command = Command::new(executable());
        command.arg("spawner").arg("--socket").arg(&path).arg("--state").arg(folder.path().join("state"));
        command.arg("--node-id").arg(format!("starts-{}", std::process::id()));
        command.arg("--parent-fd").arg(read.as_raw_fd().to_string());
        let log = File::create(folder.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("the spawner starts");
        drop(read);
        let deadline = Instant::now() + PATIENCE;
        let socket = loop {
            if let Some(socket) = dial(&path) {
                break socket;
            }
            let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the spawner does not listen: {log}");
            thread::sleep(PAUSE);
        };
        let mut spawner = Self {
            child,
            lifeline: Some(write),
            socket,
            missing: Vec::new(),
            buffer: RefCell::new(vec![0; PACKET_BYTES_MAX]),
            next_task: Cell::new(0),
            _folder: folder,
        };
        spawner.greet();
        spawner
    }

    fn greet(&mut self) {
        self.ask(&Request::Hello { version: PROTOCOL_VERSION });
        loop {
            match self.hear().0 {
                Event::Welcome { missing, .. } => self.missing = missing.into_iter().map(|(name, _)| name).collect(),
                Event::HeldAll => return,
                other => panic!("not an answer to hello: {other:?}"),
            }
        }
    }

    /// What is measured, for the head of the output.
    pub fn description(&self) -> String {
        let without = if self.missing.is_empty() { "nothing".to_owned() } else { self.missing.join(", ") };
        format!("{}; this machine goes without {without}", executable().display())
    }

    /// Starts of this profile and shape.
    pub fn way(&self, name: &'static str, profile: Profile, shape: Shape) -> Starts<'_> {
        Starts { spawner: self, name, profile, shape, ahead: 0, starts: 0 }
    }

    /// How long so many starts take when so many are always under way.
    pub fn back_to_back(&self, profile: Profile, program: &CStr, tasks: usize, outstanding: usize) -> Duration {
        let begun = Instant::now();
        let (mut sent, mut ended) = (0, 0);
        while ended < tasks {
            while sent < tasks && sent - ended < outstanding {
                self.ask(&Request::Start(Box::new(self.order(profile, Shape::Again, program))));
                sent += 1;
            }
            if let (Event::Ended { attempt, end }, _) = self.hear() {
                assert_eq!(end.verdict, Verdict::Exited(EXIT_CODE));
                self.ask(&Request::Forget { attempt });
                ended += 1;
            }
        }
        begun.elapsed()
    }

    fn order(&self, profile: Profile, shape: Shape, program: &CStr) -> Start {
        let task = self.next_task.get();
        self.next_task.set(task + 1);
        let owner = if shape == Shape::Usual { format!("owner {task}") } else { "ana".to_owned() };
        let more = if shape == Shape::New { u64::from(task + 1) * PAGE_BYTES } else { 0 };
        Start {
            attempt: AttemptKey { job: 1, task, number: 1, term: 1 },
            note: Vec::new(),
            owner: owner.into_bytes(),
            arguments: vec![program.to_bytes().to_vec()],
            environment: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
            working_folder: Vec::new(),
            profile,
            without: self.missing.clone(),
            network: if profile == Profile::Strict { Network::None } else { Network::Host },
            limits: Limits {
                cpu_milli: 1_000,
                memory_bytes: 256 << 20,
                disk_bytes: USUAL_DISK_BYTES + more,
                pids: 256,
            },
            time_limit_ms: 0,
            grace_ms: 500,
            exclusive: false,
            stdin: None,
            inputs: Vec::new(),
        }
    }

    /// One start by itself, from before the request to the end.
    fn life(&self, order: Start) -> Life {
        let request = Request::Start(Box::new(order));
        let begun = now_ns();
        self.ask(&request);
        let (started, stdout) = match self.hear() {
            (Event::Started { .. }, pipes) => (now_ns(), File::from(pipes.into_iter().next().unwrap())),
            other => panic!("it did not start: {other:?}"),
        };
        let (attempt, end) = match self.hear().0 {
            Event::Ended { attempt, end } => (attempt, end),
            other => panic!("it did not end: {other:?}"),
        };
        let ended = now_ns();
        assert_eq!(end.verdict, Verdict::Exited(EXIT_CODE));
        self.ask(&Request::Forget { attempt });
        Life { begun, started, ended, stdout, prepared: end.phases.prepared }
    }

    fn ask(&self, request: &Request) {
        let packet = socket::encode(request).expect("it fits");
        socket::send(self.socket.as_fd(), &packet, &[]).expect("the spawner reads");
    }

    fn hear(&self) -> (Event, Vec<OwnedFd>) {
        match socket::receive(self.socket.as_fd(), &mut self.buffer.borrow_mut()).expect("a packet") {
            Received::Message(event, descriptors) => (event, descriptors),
            other => panic!("the spawner is gone: {other:?}"),
        }
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.lifeline = None;
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _gone = self.child.kill();
            }
            thread::sleep(PAUSE);
        }
    }
}

impl Starts<'_> {
    fn order(&mut self, program: &CStr) -> Start {
        thread::sleep(if self.shape == Shape::Usual { REST } else { PAUSE });
        self.starts += 1;
        self.spawner.order(self.profile, self.shape, program)
    }
}

impl Way for Starts<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn sample(&mut self, programs: &Programs) -> Sample {
        let order = self.order(&programs.tells_when);
        let mut life = self.spawner.life(order);
        self.ahead += u32::from(life.prepared);
        let mut when = [0; 8];
        life.stdout.read_exact(&mut when).unwrap();
        let (first, started) = (u64::from_le_bytes(when) - life.begun, life.started - life.begun);
        let order = self.order(&programs.exits);
        let life = self.spawner.life(order);
        self.ahead += u32::from(life.prepared);
        Sample { first, started: Some(started), exit: life.ended - life.begun }
    }

    fn remark(&self) -> Option<String> {
        let (name, ahead, starts) = (self.name, self.ahead, self.starts);
        (self.profile == Profile::Strict)
            .then(|| format!("{name}: a sandbox stood ready for {ahead} of {starts} starts, warm-up included"))
    }
}

/// MUSTER_BIN, else the release build beside this benchmark.
fn executable() -> PathBuf {
    if let Some(path) = std::env::var_os("MUSTER_BIN") {
        return PathBuf::from(path);
    }
    let own = std::env::current_exe().expect("a benchmark knows its own path");
    let path = own.ancestors().nth(2).expect("it lies in target/release/deps").join("muster");
    assert!(path.exists(), "no {}: run `cargo build --release -p muster` first", path.display());
    path
}

fn dial(path: &Path) -> Option<OwnedFd> {
    let socket = new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).ok()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
    Some(socket)
}
