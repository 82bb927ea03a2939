//! The spawner executes its next program in place: nothing that it holds is lost, and a program that cannot
//! take over changes nothing.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use muster_agent::spawner::protocol::{AttemptKey, Event, Phase, Request, Verdict};
use muster_tests::{WAIT, eventually_blocking, part::muster_binary};
use nix::sys::signal::Signal;

use crate::spawner::{Spawner, pipes_of};

/// A copy of the program, in a folder that goes with it.
fn copied() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::Builder::new().prefix("muster-upgrade-").tempdir().expect("a folder");
    let program = folder.path().join("muster");
    fs::copy(muster_binary(), &program).expect("a copy");
    (folder, program)
}

/// As packages do: another file under the same name.
fn replace(program: &Path, with: &Path) {
    let new = program.with_extension("new");
    fs::copy(with, &new).expect("a copy");
    fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).expect("ours");
    fs::rename(&new, program).expect("renamed");
}

fn file_of(pid: u32) -> String {
    fs::read_link(format!("/proc/{pid}/exe")).expect("it runs").display().to_string()
}

/// Until the new program answers; then what it holds.
fn upgraded(spawner: &mut Spawner, program: &Path) -> BTreeMap<AttemptKey, Phase> {
    let pid = spawner.part.pid();
    spawner.part.signal(Signal::SIGHUP);
    let own = program.display().to_string();
    eventually_blocking(WAIT, || (file_of(pid) == own).then_some(())).expect("the new program runs");
    assert_eq!(spawner.part.pid(), pid);
    spawner.reconnect()
}

#[test]
fn twenty_jobs_survive_an_upgrade_in_place_with_their_codes_and_whole_logs() {
    let (_folder, program) = copied();
    let mut spawner = Spawner::start_from(&program);
    let mut keys = Vec::new();
    for number in 0..20 {
        // Each goes on when its stdin, a pipe of ours, ends: after the upgrade.
        let mut start = spawner.script(&format!("seq 100; cat > /dev/null; seq 101 200; exit {number}"));
        start.stdin = Some(0);
        keys.push((start.attempt, number, start));
    }
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
    for (_, _, start) in &keys {
        spawner.ask(&Request::Start(Box::new(start.clone())), &[std::os::fd::AsFd::as_fd(&read)]);
    }
    drop(read);
    let mut running = 0;
    while running < keys.len() {
        if let (Event::Started { .. }, _) = spawner.hear() {
            running += 1;
        }
    }
    let over = spawner.script("exit 3");
    let over_key = over.attempt;
    assert_eq!(spawner.run(over).end.verdict, Verdict::Exited(3));

    // A second copy has the same name and is another file.
    replace(&program, &muster_binary());
    let held = upgraded(&mut spawner, &program);
    assert_eq!(held.len(), 21, "{held:?}");
    assert!(matches!(&held[&over_key], Phase::Ended(end) if end.verdict == Verdict::Exited(3)));
    assert!(keys.iter().all(|(key, _, _)| matches!(held[key], Phase::Running(_))), "{held:?}");

    drop(write);
    let mut ends = BTreeMap::new();
    while ends.len() < keys.len() {
        if let (Event::Ended { attempt, end }, _) = spawner.hear() {
            ends.insert(attempt, end.verdict);
        }
    }
    let whole: String = (1..=200).map(|line| format!("{line}\n")).collect();
    for (key, number, start) in &keys {
        assert_eq!(ends[key], Verdict::Exited(*number));
        spawner.ask(&Request::Attach { attempt: *key }, &[]);
        let (Event::Attached { .. }, pipes) = spawner.hear() else { panic!("no pipes") };
        let [mut out, _] = pipes_of(pipes);
        let mut log = String::new();
        out.read_to_string(&mut log).expect("text");
        assert_eq!(log, whole);
        // Remembered over the upgrade, too (FL-4).
        spawner.ask(&Request::Start(Box::new(start.clone())), &[]);
        let (Event::Denied { reason, .. }, _) = spawner.hear() else { panic!("it started twice") };
        assert!(reason.contains("descriptor") || reason.contains("accepted before"), "{reason}");
    }
    assert_eq!(spawner.run_script("exit 4").end.verdict, Verdict::Exited(4), "and new work goes on");
}

#[test]
fn an_exclusive_job_keeps_its_lease_over_an_upgrade_and_a_time_limit_holds() {
    let (_folder, program) = copied();
    let mut spawner = Spawner::start_from(&program);
    let mut fenced = spawner.script("sleep 600");
    fenced.exclusive = true;
    let mut limited = spawner.script("sleep 600");
    limited.time_limit_ms = 3_000;
    let (fenced_key, limited_key) = (fenced.attempt, limited.attempt);
    let now = crate::spawner::boottime_ms();
    spawner.ask(&Request::RenewLease { deadline_boottime_ms: now + 60_000 }, &[]);
    for start in [fenced, limited] {
        let key = start.attempt;
        spawner.ask(&Request::Start(Box::new(start)), &[]);
        drop(spawner.started(key));
    }
    replace(&program, &muster_binary());
    upgraded(&mut spawner, &program);
    assert_eq!(spawner.ended(limited_key).verdict, Verdict::TimedOut);
    // The new program writes on the page that the job's init has mapped from the old one: a renewal is seen.
    spawner.ask(&Request::RenewLease { deadline_boottime_ms: crate::spawner::boottime_ms() + 120_000 }, &[]);
    spawner.ask(&Request::Stop { attempt: fenced_key, grace_ms: 0 }, &[]);
    assert_eq!(spawner.ended(fenced_key).verdict, Verdict::Stopped);
}

/// The next program would end at its start, and all jobs with it.
#[test]
fn settings_that_the_next_program_would_refuse_change_nothing() {
    let (_folder, program) = copied();
    let mut spawner = Spawner::start_from(&program);
    let start = spawner.script("sleep 600");
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    drop(spawner.started(key));
    fs::write(spawner.folder.path().join("spawner.toml"), "attempts_maximum = 3\n").expect("written");
    spawner.part.signal(Signal::SIGHUP);
    eventually_blocking(WAIT, || spawner.part.log().contains("the upgrade did not happen").then_some(()))
        .expect("the refusal is told");
    assert!(spawner.part.log().contains("attempts_maximum"), "{}", spawner.part.log());
    assert_eq!(spawner.run_script("exit 5").end.verdict, Verdict::Exited(5));
    spawner.ask(&Request::Stop { attempt: key, grace_ms: 0 }, &[]);
    assert_eq!(spawner.ended(key).verdict, Verdict::Stopped);
}

#[test]
fn a_program_that_cannot_take_over_changes_nothing() {
    let (folder, program) = copied();
    let mut spawner = Spawner::start_from(&program);
    let start = spawner.script("sleep 600");
    let key = start.attempt;
    spawner.ask(&Request::Start(Box::new(start)), &[]);
    drop(spawner.started(key));
    let strange = folder.path().join("strange");
    for text in ["#!/bin/sh\necho 4711\n", "#!/bin/sh\nexit 1\n", "no program"] {
        fs::write(&strange, text).expect("written");
        let refused = spawner.part.log().matches("the upgrade did not happen").count();
        replace(&program, &strange);
        spawner.part.signal(Signal::SIGHUP);
        eventually_blocking(WAIT, || {
            (spawner.part.log().matches("the upgrade did not happen").count() > refused).then_some(())
        })
        .expect("the refusal is told");
    }
    assert_eq!(spawner.run_script("exit 5").end.verdict, Verdict::Exited(5));
    spawner.ask(&Request::Stop { attempt: key, grace_ms: 0 }, &[]);
    assert_eq!(spawner.ended(key).verdict, Verdict::Stopped);
}
