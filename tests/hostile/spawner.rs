//! A spawner of our own, with the suite as its agent: starts jobs, hears their
//! ends, keeps what they wrote. It judges nothing.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use muster_agent::spawner::{
    protocol::{
        AttemptKey, Collected, Ended, Event, Input, Limits, Network, PACKET_BYTES_MAX, PROTOCOL_VERSION, Profile,
        Request, Running, Start,
    },
    socket::{self, Received},
};
use muster_tests::{
    WAIT, eventually_blocking, host,
    part::{Part, Surroundings},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket as new_socket},
};
use tempfile::TempDir;

/// Of what a job wrote, this much is kept of each output; the rest is read and dropped.
const KEPT_BYTES: usize = 4 << 20;
/// Uids for the jobs of one spawner.
pub const UIDS: u32 = 64;
/// Of each job's working folder.
pub const DISK_BYTES: u64 = 16 << 20;
/// Processes and threads of each job.
pub const PIDS: u32 = 64;
/// What each job may write to each disk.
pub const DISK_WRITE_BYTES_PER_SECOND: u64 = 1 << 20;
/// Of each job.
pub const MEMORY_BYTES: u64 = 256 << 20;

/// A collected file's content, or why it was not taken.
pub type Content = Result<Vec<u8>, String>;

/// A job as it is heard of.
#[derive(Default)]
struct Record {
    running: Option<Running>,
    end: Option<Ended>,
    ends: usize,
    denied: Option<String>,
    outputs: Vec<Output>,
    collected: Vec<(Vec<u8>, Content)>,
    all_collected: bool,
}

/// One output of a job, read by a thread of its own.
struct Output {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

/// A job that is over.
#[derive(Debug)]
pub struct Life {
    pub end: Ended,
    /// How often its end was told.
    pub ends: usize,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub cgroup: Option<PathBuf>,
}

pub struct Spawner {
    pub part: Part,
    socket: OwnedFd,
    pub folder: TempDir,
    pub missing: Vec<String>,
    pub first_uid: u32,
    probe: PathBuf,
    records: BTreeMap<AttemptKey, Record>,
    next_task: u32,
    /// What ended jobs wrote since somebody looked.
    pub spoken: Vec<Vec<u8>>,
}

impl Spawner {
    /// Starts one; its environment has these variables more.
    pub fn start(
        probe: &Path,
        environment: Vec<(OsString, OsString)>,
        cgroup: Option<PathBuf>,
    ) -> Result<Self, String> {
        let folder = tempfile::Builder::new().prefix("muster-hostile-").tempdir().map_err(|error| error.to_string())?;
        let path = folder.path().join("spawner.sock");
        let node = folder.path().file_name().expect("a name").to_string_lossy().into_owned();
        // Each process of the suite has a slot of its own; a suite has one spawner at a time.
        let first_uid = 5_000_000 + (std::process::id() % 10_000) * UIDS;
        let state = folder.path().join("state");
        let policy = folder.path().join("spawner.toml");
        std::fs::write(&policy, format!("io_write_bytes_per_second = {DISK_WRITE_BYTES_PER_SECOND}\n"))
            .map_err(|error| error.to_string())?;
        let mut arguments: Vec<OsString> = vec!["spawner".into(), "--socket".into(), (&path).into(), "--state".into()];
        arguments.extend([state.into(), "--node-id".into(), (&node).into(), "--config".into(), policy.into()]);
        if host::is_root() {
            arguments.extend(["--uids".into(), format!("{first_uid}-{}", first_uid + UIDS - 1).into()]);
        }
        cgroup
            .as_deref()
            .map_or(Ok(()), take_controllers_back)
            .map_err(|error| format!("the unit's cgroup: {error}"))?;
        let surroundings = Surroundings { environment, cgroup, network: None };
        let mut part = Part::start_in("spawner", &folder.path().join("log"), &arguments, &surroundings);
        let dialled =
            eventually_blocking(WAIT, || dial(&path).map(Ok).or_else(|| (!part.is_running()).then_some(Err(()))));
        let Some(Ok(socket)) = dialled else { return Err(format!("the spawner does not listen: {}", part.log())) };
        let records = BTreeMap::new();
        let probe = probe.to_owned();
        let mut spawner = Self {
            part,
            socket,
            folder,
            missing: Vec::new(),
            first_uid,
            probe,
            records,
            next_task: 0,
            spoken: Vec::new(),
        };
        spawner.greet()?;
        Ok(spawner)
    }

    fn greet(&mut self) -> Result<(), String> {
        self.ask(&Request::Hello { version: PROTOCOL_VERSION }, &[]);
        loop {
            match self.hear(WAIT)? {
                (Event::Welcome { missing, .. }, _) => {
                    self.missing = missing.into_iter().map(|(name, _)| name).collect();
                }
                (Event::HeldAll, _) => return Ok(()),
                (other, _) => return Err(format!("not an answer to hello: {other:?}")),
            }
        }
    }

    pub fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) {
        let packet = socket::encode(request).expect("a request of the suite fits a packet");
        // A spawner that is gone is noticed by the next wait.
        let _gone = socket::send(self.socket.as_fd(), &packet, descriptors);
    }

    fn hear(&mut self, patience: Duration) -> Result<(Event, Vec<OwnedFd>), String> {
        let mut polls = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).expect("a poll timeout");
        if poll(&mut polls, timeout).map_err(|errno| errno.to_string())? == 0 {
            return Err(format!("the spawner says nothing for {patience:?}: {}", self.part.log()));
        }
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        match socket::receive(self.socket.as_fd(), &mut buffer).map_err(|error| error.to_string())? {
            Received::Message(event, descriptors) => Ok((event, descriptors)),
            other => Err(format!("the spawner is gone ({other:?}): {}", self.part.log())),
        }
    }

    /// Hears until `done` finds what it looks for in the job's record.
    fn until<T>(
        &mut self,
        key: AttemptKey,
        patience: Duration,
        done: impl Fn(&mut Record) -> Option<T>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = done(self.records.entry(key).or_default()) {
                return Ok(found);
            }
            let (event, descriptors) = self.hear(deadline.saturating_duration_since(Instant::now()))?;
            self.note(event, descriptors);
        }
    }

    fn note(&mut self, event: Event, descriptors: Vec<OwnedFd>) {
        match event {
            Event::Started { attempt, running } => {
                let record = self.records.entry(attempt).or_default();
                record.running = Some(running);
                record.outputs = descriptors.into_iter().map(|fd| Output::read(File::from(fd))).collect();
            }
            Event::Ended { attempt, end } => {
                let record = self.records.entry(attempt).or_default();
                record.ends += 1;
                record.end = Some(end);
            }
            Event::Denied { attempt: Some(attempt), reason } => {
                self.records.entry(attempt).or_default().denied = Some(reason);
            }
            Event::Outputs { attempt, files, last } => {
                let record = self.records.entry(attempt).or_default();
                let mut descriptors = descriptors.into_iter();
                for (path, collected) in files {
                    let content = match collected {
                        Collected::File { .. } => descriptors.next().map_or(Err("no descriptor".into()), read_all),
                        Collected::Skipped { reason } => Err(reason),
                    };
                    record.collected.push((path, content));
                }
                record.all_collected |= last;
            }
            Event::Denied { attempt: None, .. }
            | Event::Stuck { .. }
            | Event::Welcome { .. }
            | Event::Held { .. }
            | Event::HeldAll
            | Event::Leaving { .. }
            | Event::Attached { .. } => {}
        }
    }

    /// The probe as a job in profile strict, without what this host lacks. All jobs of the suite are made here.
    pub fn order(&mut self, words: &[&str]) -> Start {
        self.next_task += 1;
        let program = std::iter::once(&"./probe").chain(words);
        Start {
            attempt: AttemptKey { job: 666, task: self.next_task, number: 1, term: 1 },
            note: Vec::new(),
            owner: b"ana".to_vec(),
            arguments: program.map(|word| word.as_bytes().to_vec()).collect(),
            environment: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
            working_folder: Vec::new(),
            profile: Profile::Strict,
            without: self.missing.clone(),
            network: Network::None,
            limits: Limits { cpu_milli: 1_000, memory_bytes: MEMORY_BYTES, disk_bytes: DISK_BYTES, pids: PIDS },
            time_limit_ms: 0,
            grace_ms: 500,
            exclusive: false,
            stdin: None,
            inputs: Vec::new(),
        }
    }

    /// Sends a start; the probe is among its inputs if it runs that, with `files` beside it: name, content, executable.
    pub fn begin(
        &mut self,
        mut start: Start,
        stdin: Option<OwnedFd>,
        files: &[(&str, &[u8], bool)],
    ) -> Result<AttemptKey, String> {
        let told = |error: std::io::Error| error.to_string();
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        if start.arguments.first().is_some_and(|program| program == b"./probe") {
            let length = std::fs::metadata(&self.probe).map_err(told)?.len();
            start.inputs.push(Input { path: b"probe".to_vec(), descriptor: 0, offset: 0, length, executable: true });
            descriptors.push(File::open(&self.probe).map_err(told)?.into());
        }
        for (name, content, executable) in files {
            let file = tempfile::tempfile().map_err(told)?;
            std::os::unix::fs::FileExt::write_all_at(&file, content, 0).map_err(told)?;
            let descriptor = u8::try_from(descriptors.len()).expect("a few files");
            let (path, length) = (name.as_bytes().to_vec(), content.len() as u64);
            start.inputs.push(Input { path, descriptor, offset: 0, length, executable: *executable });
            descriptors.push(file.into());
        }
        if let Some(stdin) = stdin {
            start.stdin = Some(u8::try_from(descriptors.len()).expect("a few files"));
            descriptors.push(stdin);
        }
        let key = start.attempt;
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        self.ask(&Request::Start(Box::new(start)), &borrowed);
        Ok(key)
    }

    /// Waits until user code runs (or the attempt is over without).
    pub fn running(&mut self, key: AttemptKey) -> Result<Running, String> {
        self.until(key, WAIT, |record| match (&record.running, &record.end, &record.denied) {
            (Some(running), ..) => Some(Ok(running.clone())),
            (None, Some(end), _) => Some(Err(format!("it did not start: {:?}", end.verdict))),
            (None, None, Some(reason)) => Some(Err(format!("denied: {reason}"))),
            (None, None, None) => None,
        })?
    }

    /// Waits until the job has written this on its stdout.
    pub fn wait_for_output(&mut self, key: AttemptKey, text: &str) -> Result<(), String> {
        self.running(key)?;
        let kept = self.records[&key].outputs.first().map(|output| Arc::clone(&output.kept)).ok_or("no output")?;
        let holds = || String::from_utf8_lossy(&kept.lock().expect("readers do not panic")).contains(text);
        eventually_blocking(WAIT, || holds().then_some(())).ok_or_else(|| format!("the job never wrote {text:?}"))
    }

    /// What it has written on its stdout until now.
    pub fn output_so_far(&self, key: AttemptKey) -> String {
        let output = self.records.get(&key).and_then(|record| record.outputs.first());
        let kept = output.map(|output| output.kept.lock().expect("readers do not panic").clone());
        String::from_utf8_lossy(&kept.unwrap_or_default()).into_owned()
    }

    /// Waits for its end and all its output.
    pub fn end(&mut self, key: AttemptKey, patience: Duration) -> Result<Life, String> {
        let end = self.until(key, patience, |record| match (&record.end, &record.denied) {
            (Some(end), _) => Some(Ok(end.clone())),
            (None, Some(reason)) => Some(Err(format!("denied: {reason}"))),
            (None, None) => None,
        })??;
        let record = self.records.get_mut(&key).expect("it was just heard of");
        let mut outputs = record.outputs.drain(..).map(Output::finish);
        let (stdout, stderr) = (outputs.next().unwrap_or_default(), outputs.next().unwrap_or_default());
        drop(outputs);
        self.spoken.extend([stdout.clone(), stderr.clone()]);
        let cgroup = record.running.as_ref().and_then(|running| running.cgroup.clone());
        let cgroup = cgroup.zip(host::cgroup2()).map(|(path, mount)| {
            let path = String::from_utf8_lossy(&path).into_owned();
            mount.join(path.trim_start_matches('/'))
        });
        Ok(Life { end, ends: record.ends, stdout, stderr, cgroup })
    }

    /// Collects outputs of an ended attempt: content, or why not.
    pub fn collect(
        &mut self,
        key: AttemptKey,
        paths: &[&str],
        file_bytes_max: u64,
    ) -> Result<BTreeMap<String, Content>, String> {
        let paths = paths.iter().map(|path| path.as_bytes().to_vec()).collect();
        self.records.entry(key).or_default().all_collected = false;
        self.ask(&Request::Collect { attempt: key, paths, file_bytes_max }, &[]);
        self.until(key, WAIT, |record| record.all_collected.then_some(()))?;
        let collected = std::mem::take(&mut self.records.get_mut(&key).expect("it was just heard of").collected);
        Ok(collected
            .into_iter()
            .map(|(path, content)| (String::from_utf8_lossy(&path).into_owned(), content))
            .collect())
    }

    /// Drops the attempt.
    pub fn forget(&mut self, key: AttemptKey) {
        self.ask(&Request::Forget { attempt: key }, &[]);
    }

    /// How often each attempt that was heard of since the last call has ended; then only later news counts.
    pub fn settle(&mut self) -> Result<BTreeMap<AttemptKey, usize>, String> {
        // An attempt that cannot exist is denied: all that was sent before that answer has then been heard.
        let nobody = AttemptKey { job: 666, task: 0, number: u32::MAX, term: 0 };
        self.records.remove(&nobody);
        self.ask(&Request::Attach { attempt: nobody }, &[]);
        self.until(nobody, WAIT, |record| record.denied.clone())?;
        self.records.remove(&nobody);
        Ok(std::mem::take(&mut self.records).into_iter().map(|(key, record)| (key, record.ends)).collect())
    }
}

impl Output {
    fn read(mut file: File) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&kept);
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(length @ 1..) = file.read(&mut buffer) {
                let mut kept = shared.lock().expect("readers do not panic");
                let room = KEPT_BYTES.saturating_sub(kept.len()).min(length);
                kept.extend_from_slice(&buffer[..room]);
            }
        });
        Self { kept, reader }
    }

    fn finish(self) -> Vec<u8> {
        let _never_panics = self.reader.join();
        std::mem::take(&mut self.kept.lock().expect("readers do not panic"))
    }
}

/// A former spawner has given its jobs controllers; while that is so, no process can be born in the group itself.
fn take_controllers_back(group: &Path) -> std::io::Result<()> {
    let control = group.join("cgroup.subtree_control");
    let given = std::fs::read_to_string(&control)?;
    let back: Vec<String> = given.split_whitespace().map(|name| format!("-{name}")).collect();
    if back.is_empty() { Ok(()) } else { std::fs::write(&control, back.join(" ")) }
}

fn read_all(fd: OwnedFd) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    File::from(fd).read_to_end(&mut content).map_err(|error| error.to_string())?;
    Ok(content)
}

fn dial(path: &Path) -> Option<OwnedFd> {
    let socket = new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).ok()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
    Some(socket)
}
