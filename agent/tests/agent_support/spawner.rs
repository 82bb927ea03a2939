//! A spawner without processes: it answers as the protocol says, and a test
//! writes what a job would write and says how it ended.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IoSlice, Write as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use muster_agent::spawner::protocol::{
    AttemptKey, Collected, Ended, Event, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase, Request, Running, Start,
    StartPhases, Usage, Verdict,
};
use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept,
        bind, listen, recvmsg, sendmsg, socket,
    },
};

/// The fake; its thread ends with the process.
pub struct FakeSpawner {
    pub path: PathBuf,
    shared: Arc<Mutex<Shared>>,
    requests: mpsc::Receiver<Request>,
}

struct Shared {
    id: [u8; 16],
    connection: Option<Arc<OwnedFd>>,
    held: BTreeMap<AttemptKey, Held>,
    /// Content of each output file that a `Collect` finds.
    files: BTreeMap<Vec<u8>, Vec<u8>>,
}

struct Held {
    start: Start,
    stdin: Vec<OwnedFd>,
    readers: Vec<OwnedFd>,
    writers: Vec<File>,
    ended: Option<Ended>,
}

impl FakeSpawner {
    pub fn listen(folder: &Path) -> Self {
        let path = folder.join("spawner.sock");
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(8).unwrap()).unwrap();
        let shared = Arc::new(Mutex::new(Shared {
            id: [7; 16],
            connection: None,
            held: BTreeMap::new(),
            files: BTreeMap::new(),
        }));
        let (sender, requests) = mpsc::channel();
        let known = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok(connection) = accept(listener.as_raw_fd()) {
                // SAFETY: accept has just made it for us.
                let connection = Arc::new(unsafe { OwnedFd::from_raw_fd(connection) });
                known.lock().unwrap().connection = Some(Arc::clone(&connection));
                let (known, sender) = (Arc::clone(&known), sender.clone());
                std::thread::spawn(move || serve(&connection, &known, &sender));
            }
        });
        Self { path, shared, requests }
    }

    /// Waits for a request of this kind; what came before it is skipped.
    pub fn expect<T>(&self, what: &str, mut pick: impl FnMut(Request) -> Option<T>) -> T {
        loop {
            match self.requests.recv_timeout(Duration::from_secs(20)) {
                Ok(request) => {
                    if let Some(found) = pick(request) {
                        return found;
                    }
                }
                Err(_) => panic!("the agent never asked the spawner for {what}"),
            }
        }
    }

    /// All requests that came and nobody waited for.
    pub fn requests_so_far(&self) -> Vec<Request> {
        self.requests.try_iter().collect()
    }

    /// The job writes to its stdout.
    pub fn write(&self, key: AttemptKey, bytes: &[u8]) {
        let mut writer = self.shared.lock().unwrap().held[&key].writers[0].try_clone().unwrap();
        writer.write_all(bytes).unwrap();
    }

    /// What a `Collect` will find.
    pub fn put_file(&self, path: &str, content: &[u8]) {
        self.shared.lock().unwrap().files.insert(path.into(), content.into());
    }

    /// The job ends.
    pub fn end(&self, key: AttemptKey, verdict: Verdict) {
        let mut shared = self.shared.lock().unwrap();
        let held = shared.held.get_mut(&key).unwrap();
        held.writers.clear();
        let usage = Usage { cpu_ms: 3, memory_peak_bytes: 4_096, approximate: true };
        let end = Ended {
            verdict,
            usage,
            wall_ms: 5,
            fences: vec!["ns.pid".into()],
            start_us: 9,
            phases: StartPhases::default(),
        };
        held.ended = Some(end.clone());
        if let Some(connection) = &shared.connection {
            send(connection, &Event::Ended { attempt: key, end }, &[]);
        }
    }

    /// It dies with all its jobs, and another one answers.
    pub fn die(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.id = [8; 16];
        shared.held.clear();
        if let Some(connection) = shared.connection.take() {
            // The reading thread has it too: only this ends the connection.
            nix::sys::socket::shutdown(connection.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        }
    }

    pub fn start_of(&self, key: AttemptKey) -> Start {
        self.shared.lock().unwrap().held[&key].start.clone()
    }

    /// The content of the descriptor that became stdin.
    pub fn stdin_of(&self, key: AttemptKey) -> Vec<u8> {
        use std::io::Read as _;
        let descriptor = self.shared.lock().unwrap().held[&key].stdin[0].try_clone().unwrap();
        let mut content = Vec::new();
        File::from(descriptor).read_to_end(&mut content).unwrap();
        content
    }
}

fn serve(connection: &Arc<OwnedFd>, shared: &Mutex<Shared>, requests: &mpsc::Sender<Request>) {
    while let Some((request, descriptors)) = receive(connection) {
        let mut shared = shared.lock().unwrap();
        answer(connection, &mut shared, &request, descriptors);
        if requests.send(request).is_err() {
            return;
        }
    }
}

fn answer(connection: &OwnedFd, shared: &mut Shared, request: &Request, descriptors: Vec<OwnedFd>) {
    match request {
        Request::Hello { .. } => {
            let welcome = Event::Welcome {
                version: PROTOCOL_VERSION,
                boot_id: "boot-1".into(),
                spawner_id: shared.id,
                fences: vec!["ns.pid".into()],
                missing: vec![("limits.cpu".into(), "no controller".into())],
                poweroff: false,
            };
            send(connection, &welcome, &[]);
            for (attempt, held) in &shared.held {
                let phase = held.ended.clone().map_or_else(|| Phase::Running(running()), Phase::Ended);
                send(connection, &Event::Held { attempt: *attempt, note: held.start.note.clone(), phase }, &[]);
            }
            send(connection, &Event::HeldAll, &[]);
        }
        Request::Start(start) => {
            let (out, out_writer) = nix::unistd::pipe().unwrap();
            let (err, err_writer) = nix::unistd::pipe().unwrap();
            let event = Event::Started { attempt: start.attempt, running: running() };
            send(connection, &event, &[out.as_raw_fd(), err.as_raw_fd()]);
            let stdin = start.stdin.into_iter().map(|number| descriptors[usize::from(number)].try_clone().unwrap());
            let held = Held {
                start: (**start).clone(),
                stdin: stdin.collect(),
                readers: vec![out, err],
                writers: vec![out_writer.into(), err_writer.into()],
                ended: None,
            };
            shared.held.insert(start.attempt, held);
        }
        Request::Attach { attempt } => {
            let raw: Vec<RawFd> = shared.held[attempt].readers.iter().map(|reader| reader.as_raw_fd()).collect();
            send(connection, &Event::Attached { attempt: *attempt }, &raw);
        }
        Request::Collect { attempt, paths, .. } => {
            let (mut files, mut opened) = (Vec::new(), Vec::new());
            for path in paths {
                let collected = match shared.files.get(path) {
                    Some(content) => {
                        let mut file = tempfile::tempfile().unwrap();
                        file.write_all(content).unwrap();
                        std::io::Seek::rewind(&mut file).unwrap();
                        opened.push(file);
                        Collected::File { length: content.len() as u64 }
                    }
                    None => Collected::Skipped { reason: "missing".into() },
                };
                files.push((path.clone(), collected));
            }
            let raw: Vec<RawFd> = opened.iter().map(|file| file.as_raw_fd()).collect();
            send(connection, &Event::Outputs { attempt: *attempt, files, last: true }, &raw);
        }
        Request::Forget { attempt } => drop(shared.held.remove(attempt)),
        Request::StartInMemory
        | Request::Stop { .. }
        | Request::RenewLease { .. }
        | Request::Poweroff
        | Request::Drained
        | Request::Checkpoint { .. }
        | Request::NoticeDrain { .. }
        | Request::NoticeNoDrain => {}
    }
}

fn running() -> Running {
    Running {
        fences: vec!["ns.pid".into()],
        start_us: 9,
        cgroup: None,
        init_pid: std::process::id(),
        init_start_ticks: 0,
        cpu_before_us: 0,
        memory_peak_before_bytes: 0,
        started_boottime_ms: 1,
        phases: StartPhases::default(),
    }
}

fn send(connection: &OwnedFd, event: &Event, descriptors: &[RawFd]) {
    let bytes = postcard::to_stdvec(event).unwrap();
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    // An agent that has just left is no failure of the test.
    let _ = sendmsg::<UnixAddr>(connection.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
}

fn receive(connection: &OwnedFd) -> Option<(Request, Vec<OwnedFd>)> {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    let mut control = cmsg_space!([RawFd; 250]);
    let mut io = [std::io::IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(connection.as_raw_fd(), &mut io, Some(&mut control), MsgFlags::empty()).ok()?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let length = message.bytes;
    (length > 0).then(|| (postcard::from_bytes(&buffer[..length]).unwrap(), descriptors))
}
