//! The spawner against an agent that somebody has taken over: whatever comes on
//! its socket is refused with a sentence, or is carried out within the policy
//! and the sandbox; jobs, deadlines and the spawner itself survive it.

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use muster_agent::spawner::{
    protocol::{AttemptKey, Collected, Event, Input, Limits, Profile, Request, START_BYTES_MAX, Start, Verdict},
    socket,
};
use muster_core::fence;
use muster_tests::{WAIT, host, skip};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::Mode,
    },
};

use crate::spawner::{Spawner, boottime_ms};

const NO_FILE: &str = "a descriptor beside it is neither a file nor a pipe";

impl Spawner {
    /// The sentence with which a request was denied.
    pub(super) fn denied(&mut self) -> String {
        match self.hear().0 {
            Event::Denied { reason, .. } => reason,
            other => panic!("not denied: {other:?}"),
        }
    }

    fn start_is_denied(&mut self, start: Start, descriptors: &[BorrowedFd<'_>]) -> String {
        let key = start.attempt;
        self.ask(&Request::Start(Box::new(start)), descriptors);
        match self.hear().0 {
            Event::Denied { attempt, reason } => {
                assert_eq!(attempt, Some(key), "{reason}");
                reason
            }
            other => panic!("not denied: {other:?}"),
        }
    }

    fn run_with(&mut self, start: Start, descriptors: &[BorrowedFd<'_>]) -> Verdict {
        let key = start.attempt;
        self.ask(&Request::Start(Box::new(start)), descriptors);
        let verdict = self.follow(key).end.verdict;
        self.ask(&Request::Forget { attempt: key }, &[]);
        verdict
    }

    /// It lives, nothing of what was said before is left on the wire, and jobs run.
    pub(super) fn works_as_before(&mut self) {
        assert!(self.part.is_running(), "{}", self.part.log());
        let start = self.script("exit 3");
        assert_eq!(self.run_with(start, &[]), Verdict::Exited(3));
    }

    /// A job that waits for a line, and where to write it.
    pub(super) fn waiting_job(&mut self, exclusive: bool) -> (AttemptKey, OwnedFd) {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let mut start = self.script("read line; exit 4");
        (start.stdin, start.exclusive) = (Some(0), exclusive);
        let key = start.attempt;
        self.ask(&Request::Start(Box::new(start)), &[read.as_fd()]);
        drop(self.started(key));
        (key, write)
    }

    pub(super) fn ends_by_itself(&mut self, key: AttemptKey, write: &OwnedFd) {
        nix::unistd::write(write, b"go\n").expect("the job reads");
        assert_eq!(self.ended(key).verdict, Verdict::Exited(4));
        self.ask(&Request::Forget { attempt: key }, &[]);
    }
}

pub(super) fn file() -> File {
    tempfile::tempfile().expect("a file")
}

pub(super) fn nobodys() -> AttemptKey {
    AttemptKey { job: 666, task: 0, number: 1, term: 1 }
}

fn input(path: &[u8], length: u64) -> Input {
    Input { path: path.to_vec(), descriptor: 0, offset: 0, length, executable: false }
}

fn sealed(bytes: &[u8], seals: SealFlag) -> OwnedFd {
    let memory = memfd_create(c"start", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
    let mut file = File::from(memory);
    file.write_all(bytes).expect("written");
    file.rewind().expect("a file");
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    file.into()
}

fn fully_sealed(bytes: &[u8]) -> OwnedFd {
    sealed(bytes, SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL)
}

/// On a host that lacks controllers its owner must say so; one that has them is no weaker for it.
pub(super) const STRICT_AS_FAR_AS_THERE: &str =
    "weakest_profile = \"strict\"\nmay_lack = [\"limits\", \"kill.cgroup\", \"uid.own\"]\n";

#[test]
fn a_job_that_does_without_more_than_the_owner_allows_is_refused_by_the_fences_name() {
    let mut spawner = Spawner::start_with("weakest_profile = \"strict\"\n", 8);
    let lacking = fence::STRICT.into_iter().find(|name| spawner.missing.iter().any(|missing| missing == name));
    let Some(lacking) = lacking else {
        println!(
            "SKIP a_job_that_does_without_more_than_the_owner_allows_is_refused_by_the_fences_name: this host lacks none"
        );
        return;
    };
    let mut start = spawner.script("exit 0");
    start.without = fence::ALL.map(str::to_owned).into();
    let Verdict::Refused { fence, reason } = spawner.run_with(start.clone(), &[]) else { panic!("it is refused") };
    assert_eq!(fence, lacking);
    assert!(reason.contains("weakest_profile") && reason.contains("may_lack"), "{reason}");
    // The weaker profile is refused as such, before any fence is looked at.
    start.attempt.task += 1_000;
    start.profile = Profile::Shared;
    let Verdict::Refused { fence, .. } = spawner.run_with(start, &[]) else { panic!("it is refused") };
    assert_eq!(fence, "profile");
}

#[test]
fn a_profile_that_the_policy_forbids_is_refused() {
    let mut spawner = Spawner::start_with(STRICT_AS_FAR_AS_THERE, 8);
    for profile in [Profile::Shared, Profile::None] {
        let mut start = spawner.script("exit 0");
        start.profile = profile;
        let reason = "spawner.toml does not allow so weak a profile".to_owned();
        assert_eq!(spawner.run_with(start, &[]), Verdict::Refused { fence: "profile".into(), reason }, "{profile:?}");
    }
    spawner.works_as_before();
}

#[test]
fn to_do_without_every_fence_takes_none_away_that_the_host_has() {
    let mut spawner = Spawner::start_with(STRICT_AS_FAR_AS_THERE, 8);
    let mut start = spawner.script("exit 0");
    start.without = fence::ALL.map(str::to_owned).into();
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    let end = spawner.follow(key).end;
    let there = fence::STRICT.into_iter().filter(|name| !spawner.missing.iter().any(|missing| missing == name));
    for name in there {
        assert!(end.fences.iter().any(|fence| fence == name), "{name} is not raised: {:?}", end.fences);
    }
    spawner.works_as_before();
}

#[test]
fn uids_of_jobs_are_never_shared_and_never_beyond_the_range() {
    if !host::is_root() {
        skip!("a spawner that is not root has one uid");
    }
    let mut spawner = Spawner::start_with("", 2);
    let (one, release_one) = spawner.waiting_job(false);
    let (two, release_two) = spawner.waiting_job(false);
    let start = spawner.script("exit 0");
    match spawner.run_with(start, &[]) {
        Verdict::Refused { fence, reason } => {
            assert_eq!((fence.as_str(), reason.as_str()), ("uid.own", "every uid for jobs is in use"));
        }
        other => panic!("{other:?}"),
    }
    spawner.ends_by_itself(one, &release_one);
    spawner.ends_by_itself(two, &release_two);
    spawner.works_as_before();
}

#[test]
fn paths_that_leave_the_folder_are_denied() {
    let mut spawner = Spawner::start();
    let empty = file();
    for path in [&b"../x"[..], b"a/../../x", b"/etc/x", b"a/..", b".."] {
        let mut start = spawner.script("exit 0");
        start.working_folder = path.to_vec();
        assert_eq!(spawner.start_is_denied(start, &[]), "a path leaves the working folder", "{path:?}");
        let mut start = spawner.script("exit 0");
        start.inputs = vec![input(path, 0)];
        assert_eq!(spawner.start_is_denied(start, &[empty.as_fd()]), "a path leaves the working folder", "{path:?}");
    }
    let mut start = spawner.script("exit 0");
    start.inputs = vec![input(b"", 0)];
    assert_eq!(spawner.start_is_denied(start, &[empty.as_fd()]), "a path leaves the working folder");
    spawner.works_as_before();
}

#[test]
fn names_that_no_file_can_have_end_the_start_at_its_step() {
    let mut spawner = Spawner::start();
    let empty = file();
    let failed = |step: &str, errno: Errno| Verdict::StartFailed { step: step.into(), errno: errno as i32 };
    let names: [(&[u8], Errno); 3] =
        [(b"a\0b", Errno::EINVAL), (&[b'a'; 300], Errno::ENAMETOOLONG), (b"./.", Errno::EISDIR)];
    for (name, errno) in names {
        let mut start = spawner.script("exit 0");
        start.inputs = vec![input(name, 0)];
        assert_eq!(spawner.run_with(start, &[empty.as_fd()]), failed("inputs", errno), "{name:?}");
    }
    let mut twice = spawner.script("exit 0");
    twice.inputs = vec![input(b"a", 0), input(b"a", 0)];
    assert_eq!(spawner.run_with(twice, &[empty.as_fd()]), failed("inputs", Errno::EEXIST));
    let mut start = spawner.script("exit 0");
    start.working_folder = b"a\0b".to_vec();
    assert_eq!(spawner.start_is_denied(start, &[]), "the working folder has a NUL byte");
    spawner.works_as_before();
}

/// What makes a good start one that must be denied.
type Change = fn(&mut Start);

#[test]
fn commands_that_cannot_be_are_denied() {
    let mut spawner = Spawner::start();
    let no_text = "an argument or variable has a NUL byte, or a name has `=`";
    let changes: [(&str, Change); 12] = [
        ("there is no program to run", |start| start.arguments.clear()),
        ("there is no program to run", |start| start.arguments[0].clear()),
        (no_text, |start| start.arguments[2].push(0)),
        (no_text, |start| start.environment.push((b"A\0".to_vec(), Vec::new()))),
        (no_text, |start| start.environment.push((b"A".to_vec(), b"\0".to_vec()))),
        (no_text, |start| start.environment.push((b"A=B".to_vec(), Vec::new()))),
        ("its task or attempt number is out of range", |start| start.attempt.task = u32::MAX),
        ("its task or attempt number is out of range", |start| start.attempt.number = 0),
        ("the note has more than 32768 bytes", |start| start.note = vec![7; 40_000]),
        ("a descriptor that it names is not beside it", |start| start.stdin = Some(0)),
        ("a descriptor that it names is not beside it", |start| start.stdin = Some(255)),
        ("a descriptor that it names is not beside it", |start| start.inputs = vec![input(b"x", 1)]),
    ];
    for (sentence, change) in changes {
        let mut start = spawner.script("exit 0");
        change(&mut start);
        assert_eq!(spawner.start_is_denied(start, &[]), sentence);
    }
    spawner.works_as_before();
}

#[test]
fn inputs_that_cannot_be_copied_end_the_start_and_hold_up_nothing() {
    let mut spawner = Spawner::start();
    let (pipe, _kept_open) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let (short, endless) = (file(), file());
    endless.set_len(1 << 40).expect("a hole");
    let kinds: [(&str, BorrowedFd<'_>, Errno); 3] = [
        ("a pipe that nobody writes to", pipe.as_fd(), Errno::ESPIPE),
        ("a file larger than the folder", endless.as_fd(), Errno::ENOSPC),
        ("a file that is too short", short.as_fd(), Errno::EIO),
    ];
    for (what, descriptor, errno) in kinds {
        let mut start = spawner.script("exit 0");
        start.inputs = vec![input(b"x", 1 << 40)];
        let failed = Verdict::StartFailed { step: "inputs".into(), errno: errno as i32 };
        assert_eq!(spawner.run_with(start, &[descriptor]), failed, "{what}");
    }
    let mut start = spawner.script("exit 0");
    start.inputs = vec![Input { offset: u64::MAX, ..input(b"x", u64::MAX) }];
    let failed = Verdict::StartFailed { step: "inputs".into(), errno: Errno::EINVAL as i32 };
    assert_eq!(spawner.run_with(start, &[short.as_fd()]), failed, "an offset that is none");
    spawner.works_as_before();
}

/// A folder on its stdin gave a job of profile strict the host's whole tree, `/proc/self/fd/0/var/log` for one.
#[test]
fn only_files_and_pipes_are_taken_from_an_agent() {
    let mut spawner = Spawner::start_with(STRICT_AS_FAR_AS_THERE, 8);
    let folder = File::open("/").expect("a folder");
    let path_only = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).expect("a folder");
    let (end, _other_end) = socket::pair().expect("a pair");
    let event = nix::sys::eventfd::EventFd::new().expect("an event");
    let (null, endless) = (File::open("/dev/null").expect("a device"), File::open("/dev/zero").expect("a device"));
    let kinds: [(&str, BorrowedFd<'_>); 6] = [
        ("a folder", folder.as_fd()),
        ("the path of a folder", path_only.as_fd()),
        ("a socket, over which folders may come", end.as_fd()),
        ("an event", event.as_fd()),
        ("a device", null.as_fd()),
        ("a device without an end", endless.as_fd()),
    ];
    let plain = file();
    for (what, descriptor) in kinds {
        let mut start = spawner.script("ls /proc/self/fd/0/");
        start.stdin = Some(0);
        spawner.ask(&Request::Start(Box::new(start.clone())), &[descriptor]);
        assert_eq!(spawner.denied(), NO_FILE, "{what} as stdin");
        (start.stdin, start.inputs) = (None, vec![input(b"x", 1)]);
        spawner.ask(&Request::Start(Box::new(start)), &[descriptor]);
        assert_eq!(spawner.denied(), NO_FILE, "{what} as an input");
        spawner.ask(&Request::StartInMemory, &[plain.as_fd(), descriptor]);
        assert_eq!(spawner.denied(), NO_FILE, "{what} beside another");
    }
    spawner.works_as_before();
}

#[test]
fn a_start_in_memory_that_its_sender_can_still_change_is_denied() {
    let mut spawner = Spawner::start();
    let start = spawner.script("exit 5");
    let bytes = socket::encode(&start).expect("it fits");
    let (pipe, _kept_open) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let mut unsealable = file();
    unsealable.write_all(&bytes).expect("written");
    let loose = [
        ("no seal", sealed(&bytes, SealFlag::empty())),
        ("no seal against writing", sealed(&bytes, SealFlag::F_SEAL_SHRINK)),
        ("no seal against shrinking", sealed(&bytes, SealFlag::F_SEAL_WRITE)),
        ("a file", unsealable.into()),
        ("a pipe", pipe),
    ];
    for (what, memory) in &loose {
        spawner.ask(&Request::StartInMemory, &[memory.as_fd()]);
        assert_eq!(spawner.denied(), "it is not in a sealed memfd", "{what}");
    }
    spawner.ask(&Request::StartInMemory, &[]);
    assert_eq!(spawner.denied(), "there is no memory beside it");
    let large = fully_sealed(&vec![0; START_BYTES_MAX + 1]);
    spawner.ask(&Request::StartInMemory, &[large.as_fd()]);
    assert_eq!(spawner.denied(), format!("a start has at most {START_BYTES_MAX} bytes"));
    for garbage in [&[][..], &[0xff; 4_096], &bytes[..bytes.len() / 2]] {
        spawner.ask(&Request::StartInMemory, &[fully_sealed(garbage).as_fd()]);
        spawner.denied();
    }
    // None of these was the attempt: it is still free to start, and once only.
    spawner.ask(&Request::StartInMemory, &[fully_sealed(&bytes).as_fd()]);
    assert_eq!(spawner.follow(start.attempt).end.verdict, Verdict::Exited(5));
    spawner.ask(&Request::StartInMemory, &[fully_sealed(&bytes).as_fd()]);
    assert_eq!(spawner.denied(), "this attempt was accepted before");
    spawner.works_as_before();
}

#[test]
fn a_command_of_megabytes_is_the_jobs_own_failure() {
    let mut spawner = Spawner::start();
    let mut start = spawner.script("exit 0");
    start.arguments.push(vec![b'x'; START_BYTES_MAX - (64 << 10)]);
    let memory = fully_sealed(&postcard::to_stdvec(&start).expect("plain data"));
    spawner.ask(&Request::StartInMemory, &[memory.as_fd()]);
    let failed = Verdict::StartFailed { step: "exec".into(), errno: Errno::E2BIG as i32 };
    assert_eq!(spawner.follow(start.attempt).end.verdict, failed);
    spawner.works_as_before();
}

#[test]
fn attempts_that_are_not_held_are_nobodys_to_end() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    let foreign = [
        nobodys(),
        AttemptKey { term: held.term + 1, ..held },
        AttemptKey { number: held.number + 1, ..held },
        AttemptKey { task: held.task + 1, ..held },
        AttemptKey { job: held.job + 1, ..held },
    ];
    for attempt in foreign {
        // These two have no answer of their own: what follows shows that they changed nothing.
        spawner.ask(&Request::Stop { attempt, grace_ms: 0 }, &[]);
        spawner.ask(&Request::Forget { attempt }, &[]);
        spawner.ask(&Request::Attach { attempt }, &[]);
        assert_eq!(spawner.denied(), "no such attempt is held");
        spawner.ask(&Request::Collect { attempt, paths: vec![b"x".to_vec()], file_bytes_max: 1 }, &[]);
        assert_eq!(spawner.denied(), "outputs are collected when it is over");
    }
    spawner.ask(&Request::Forget { attempt: held }, &[]);
    assert_eq!(spawner.denied(), "it is not over");
    spawner.ask(&Request::Collect { attempt: held, paths: Vec::new(), file_bytes_max: 1 }, &[]);
    assert_eq!(spawner.denied(), "outputs are collected when it is over");
    spawner.ends_by_itself(held, &release);
    spawner.ask(&Request::Stop { attempt: held, grace_ms: 0 }, &[]);
    spawner.works_as_before();
}

#[test]
fn an_attempt_starts_once_under_whatever_term_or_number() {
    let mut spawner = Spawner::start();
    let (held, release) = spawner.waiting_job(false);
    let again = |spawner: &mut Spawner, attempt| {
        let start = Start { attempt, ..spawner.script("exit 0") };
        spawner.start_is_denied(start, &[])
    };
    let sentence = "this attempt was accepted before";
    assert_eq!(again(&mut spawner, held), sentence);
    assert_eq!(again(&mut spawner, AttemptKey { term: held.term + 1, ..held }), sentence);
    let third = Start { attempt: AttemptKey { number: 3, ..held }, ..spawner.script("exit 0") };
    assert_eq!(spawner.run_with(third, &[]), Verdict::Exited(0));
    assert_eq!(again(&mut spawner, AttemptKey { number: 2, ..held }), sentence, "an older one than has run");
    assert_eq!(again(&mut spawner, AttemptKey { number: 3, ..held }), sentence);
    spawner.ends_by_itself(held, &release);
    assert_eq!(again(&mut spawner, held), sentence, "also after it is forgotten");
    spawner.works_as_before();
}

#[test]
fn a_lease_is_never_taken_back_and_one_without_end_is_denied() {
    let mut spawner = Spawner::start();
    spawner.ask(&Request::RenewLease { deadline_boottime_ms: boottime_ms() + 600_000 }, &[]);
    let (first, release_first) = spawner.waiting_job(true);
    for earlier in [0, 1, boottime_ms() - 1] {
        spawner.ask(&Request::RenewLease { deadline_boottime_ms: earlier }, &[]);
    }
    spawner.ends_by_itself(first, &release_first);
    for late in [u64::MAX / 1_000, u64::MAX - 1, u64::MAX] {
        spawner.ask(&Request::RenewLease { deadline_boottime_ms: late }, &[]);
        assert_eq!(spawner.denied(), "a lease ends at most 10 minutes from now");
    }
    let (key, _kept_open) = spawner.waiting_job(true);
    spawner.ask(&Request::Stop { attempt: key, grace_ms: u64::MAX }, &[]);
    spawner.ask(&Request::Stop { attempt: key, grace_ms: 0 }, &[]);
    assert_eq!(spawner.ended(key).verdict, Verdict::Stopped);
    spawner.ask(&Request::Forget { attempt: key }, &[]);
    spawner.works_as_before();
}

#[test]
fn a_longer_grace_does_not_put_off_a_stop() {
    let mut spawner = Spawner::start();
    let start = spawner.script("trap '' TERM; echo ready; while :; do sleep 1; done");
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    let [mut out, _err] = spawner.started(key);
    out.read_exact(&mut [0; 6]).expect("ready");
    spawner.ask(&Request::Stop { attempt: key, grace_ms: 200 }, &[]);
    spawner.ask(&Request::Stop { attempt: key, grace_ms: u64::MAX }, &[]);
    assert_eq!(spawner.ended(key).verdict, Verdict::Stopped);
    spawner.works_as_before();
}

#[test]
fn power_off_is_the_owners_to_allow() {
    let mut spawner = Spawner::start();
    spawner.ask(&Request::Poweroff, &[]);
    assert_eq!(spawner.denied(), "power-off is not allowed here: set allow_poweroff in spawner.toml");
    spawner.works_as_before();
}

#[test]
fn a_stop_of_the_host_is_not_the_agents_to_claim_or_to_hasten() {
    let mut spawner = Spawner::start_with("drain_at_stop_seconds = 600\n", 8);
    spawner.ask(&Request::Drained, &[]);
    assert_eq!(spawner.denied(), "nobody has told this host to stop");
    let (held, release) = spawner.waiting_job(false);
    spawner.part.signal(nix::sys::signal::Signal::SIGTERM);
    let Event::Leaving { within_ms } = spawner.hear().0 else { panic!("the agent is told") };
    assert!(within_ms > 0 && within_ms <= 600_000, "{within_ms}");
    // What runs does not end by the agent's word, and nothing new begins.
    spawner.ask(&Request::Drained, &[]);
    let late = spawner.script("exit 0");
    let key = late.attempt;
    spawner.ask(&Request::Start(Box::new(late)), &[]);
    let Verdict::Refused { fence, .. } = spawner.ended(key).verdict else { panic!("it is refused") };
    assert_eq!(fence, "spawner");
    spawner.ends_by_itself(held, &release);
    assert!(spawner.part.is_running(), "an end is held");
    spawner.ask(&Request::Forget { attempt: key }, &[]);
    assert!(spawner.part.wait(WAIT).success(), "it ends by itself: {}", spawner.part.log());
}

#[test]
fn no_more_attempts_are_held_than_the_policy_allows() {
    let mut spawner = Spawner::start_with("attempts_max = 2\n", 8);
    let (one, release_one) = spawner.waiting_job(false);
    let ended = spawner.script("exit 0");
    spawner.run(ended.clone());
    let start = spawner.script("exit 0");
    assert_eq!(spawner.start_is_denied(start.clone(), &[]), "2 attempts are held already");
    spawner.ask(&Request::Forget { attempt: ended.attempt }, &[]);
    // What was denied was not accepted: it may start now.
    assert_eq!(spawner.run_with(start, &[]), Verdict::Exited(0));
    spawner.ends_by_itself(one, &release_one);
    spawner.works_as_before();
}

#[test]
fn limits_beyond_all_measure_harm_only_the_job() {
    let mut spawner = Spawner::start();
    let most = Limits { cpu_milli: u64::MAX, memory_bytes: u64::MAX, disk_bytes: 1 << 40, pids: u32::MAX };
    let none = Limits { cpu_milli: 0, memory_bytes: 0, disk_bytes: 0, pids: 0 };
    for limits in [most, none] {
        let mut start = spawner.script("exit 0");
        (start.limits, start.time_limit_ms, start.grace_ms) = (limits, u64::MAX, u64::MAX);
        // What the kernel makes of them differs; that it ends at all is the point.
        spawner.run_with(start, &[]);
    }
    spawner.works_as_before();
}

#[test]
fn outputs_are_asked_for_in_vain_outside_of_the_folder() {
    let mut spawner = Spawner::start();
    let start = spawner.script("ln -s /etc/passwd link; ln -s / root; mkfifo pipe; echo x > file; echo 12345 > large");
    let key = start.attempt;
    spawner.run(start);
    let asked: [(&[u8], &str); 12] = [
        (b"/etc/passwd", "it leaves the working folder"),
        (b"../etc/passwd", "it leaves the working folder"),
        (b"a/../../etc/passwd", "missing"),
        (b"link", "a symbolic link"),
        (b"root/etc/passwd", "a symbolic link"),
        (b"pipe", "not a regular file"),
        (b".", "not a regular file"),
        (b"", "missing"),
        (b"a\0b", "its name has a NUL byte"),
        (b"none", "missing"),
        (b"/proc/self/mem", "it leaves the working folder"),
        (b"large", "larger than the limit of 4 bytes"),
    ];
    let paths = asked.iter().map(|(path, _)| path.to_vec()).chain([b"file".to_vec()]).collect();
    spawner.ask(&Request::Collect { attempt: key, paths, file_bytes_max: 4 }, &[]);
    let mut answers = Vec::new();
    loop {
        let (event, _descriptors) = spawner.hear();
        let Event::Outputs { files, last, .. } = event else { panic!("{event:?}") };
        answers.extend(files);
        if last {
            break;
        }
    }
    assert_eq!(answers.len(), asked.len() + 1);
    for ((path, reason), (answered, collected)) in asked.iter().zip(&answers) {
        assert_eq!((path, collected), (&answered.as_slice(), &Collected::Skipped { reason: (*reason).to_owned() }));
    }
    assert_eq!(answers.last().map(|(_, collected)| collected), Some(&Collected::File { length: 2 }));
    spawner.works_as_before();
}
