//! Real children under the rules, and without them.

use std::{
    ffi::{CStr, CString},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            net::{SocketAddr, UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::Command,
};

use super::{
    ALL, IOCTL_DEV, MAKE_BLOCK, MAKE_CHAR, Policy, READ, REFER, Rule, SCOPES_ABI, TRUNCATE, WRITE, WRITE_FILE, abi,
    fences_anything, handled, restrict, scoped,
};
use crate::sandbox::{seccomp::tests::children::cost_ns, sys};

/// Names the abstract socket that [`a_child_that_the_other_tests_start`] connects to.
const SOCKET: &str = "MUSTER_TEST_LANDLOCK_SOCKET";

/// The first version whose file rules are used.
const FILES_ABI: u32 = 2;

#[test]
fn rights_that_a_version_lacks_are_not_asked_for() {
    let strict = |abi| handled(abi, &Policy::STRICT);
    assert_eq!([strict(0), strict(1)], [0, 0]);
    assert_eq!(strict(2), ALL & !(TRUNCATE | IOCTL_DEV));
    assert_eq!([strict(3), strict(4)], [ALL & !IOCTL_DEV; 2]);
    assert_eq!([strict(5), strict(6), strict(99)], [ALL; 3]);
    assert_ne!(strict(2) & REFER, 0);
    assert_eq!([1, 2, 5, 6, 99].map(|abi| handled(abi, &Policy::SHARED)), [0; 5]);
    assert_eq!([5, 6, 7].map(scoped), [0, 3, 3]);
    assert!(fences_anything(2, &Policy::STRICT) && !fences_anything(1, &Policy::STRICT));
    assert!(fences_anything(6, &Policy::SHARED) && !fences_anything(5, &Policy::SHARED));
}

#[test]
fn no_rule_grants_making_a_device() {
    let rules = Policy::STRICT.files.unwrap();
    assert!(rules.iter().all(|(_, rights)| rights & (MAKE_CHAR | MAKE_BLOCK) == 0));
    let writable: Vec<&CStr> =
        rules.iter().filter(|(_, rights)| rights & WRITE == WRITE).map(|(path, _)| *path).collect();
    assert_eq!(writable, [c"/work", c"/tmp", c"/dev/shm"]);
}

/// A shell's exit code, under the rules or not.
fn shell(script: &str, folder: &Path, policy: Option<&Policy<'_>>) -> i32 {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).current_dir(folder);
    confine(&mut command, policy);
    let output = command.output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stderr));
    output.status.code().unwrap()
}

fn confine(command: &mut Command, policy: Option<&Policy<'_>>) {
    let Some(policy) = policy else { return };
    let version = abi().unwrap();
    // The command does not outlive the policy: it is spawned and waited for by our caller.
    let rules: Option<Vec<(CString, u64)>> =
        policy.files.map(|rules| rules.iter().map(|(path, rights)| ((*path).to_owned(), *rights)).collect());
    // SAFETY: the closure makes system calls; the one small list that it makes is after a fork, where glibc allocates safely.
    unsafe {
        command.pre_exec(move || {
            let rules: Option<Vec<Rule<'_>>> =
                rules.as_ref().map(|rules| rules.iter().map(|(path, rights)| (path.as_c_str(), *rights)).collect());
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
            Ok(restrict(version, &Policy { files: rules.as_deref() })?)
        })
    };
}

fn has(version: u32, test: &str) -> bool {
    let ours = abi().unwrap_or(0);
    if ours < version {
        println!("SKIP {test}: this kernel's Landlock has version {ours}, not {version}");
    }
    ours >= version
}

/// What the script does, its exit code without the rules and with them; 9 stands for "refused".
const SCRIPTS: &[(&str, i32, i32)] = &[
    ("echo x > inside/new && mkdir inside/d && mv inside/new inside/d/ && ln inside/d/new inside/l", 0, 0),
    ("mkfifo inside/f && ln -s x inside/s && rm inside/s && echo y > inside/old && cat inside/old > /dev/null", 0, 0),
    ("cat outside/old && ls outside && outside/program", 0, 0),
    ("(echo x > outside/old) || exit 9", 0, 9),
    ("(echo x >> outside/old) || exit 9", 0, 9),
    ("(echo x > outside/new) || exit 9", 0, 9),
    ("mkdir outside/d || exit 9", 0, 9),
    ("rm -f outside/old2 || exit 9", 0, 9),
    ("mv outside/old3 inside/ || exit 9", 0, 9),
    ("ln -s x outside/s || exit 9", 0, 9),
    ("ln outside/old inside/link || exit 9", 0, 9),
    ("echo 1 > /proc/self/comm", 0, 0),
];

#[test]
fn a_job_writes_only_where_it_may() {
    if !has(FILES_ABI, "a_job_writes_only_where_it_may") {
        return;
    }
    for (script, control, expected) in SCRIPTS {
        for restricted in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let prepare = "mkdir inside outside && echo o > inside/old && cd outside && echo o > old && cp old old2 && cp old old3 \
                && printf '#!/bin/sh\\n' > program && chmod +x program";
            assert_eq!(shell(prepare, folder.path(), None), 0);
            let inside = CString::new(folder.path().join("inside").to_str().unwrap()).unwrap();
            let rules: [Rule<'_>; 4] = [
                (c"/", READ),
                (&inside, READ | WRITE),
                (c"/dev", WRITE_FILE | IOCTL_DEV),
                (c"/proc", WRITE_FILE | TRUNCATE),
            ];
            let policy = Policy { files: Some(&rules) };
            let code = shell(script, folder.path(), restricted.then_some(&policy));
            assert_eq!(code, if restricted { *expected } else { *control }, "{script}, restricted: {restricted}");
        }
    }
}

#[test]
fn a_path_that_is_missing_fails_the_start() {
    if !has(FILES_ABI, "a_path_that_is_missing_fails_the_start") {
        return;
    }
    let mut command = Command::new("/bin/true");
    confine(&mut command, Some(&Policy { files: Some(&[(c"/missing", READ)]) }));
    assert_eq!(command.status().unwrap_err().raw_os_error(), Some(libc::ENOENT));
}

#[ignore = "the other tests start it"]
#[test]
fn a_child_that_the_other_tests_start() {
    let Ok(name) = std::env::var(SOCKET) else { return };
    let connected = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap());
    let refused = connected.err().and_then(|error| error.raw_os_error());
    assert_eq!(refused, None, "the socket is out of reach");
}

#[test]
fn signals_and_abstract_sockets_end_at_the_sandbox() {
    if !has(SCOPES_ABI, "signals_and_abstract_sockets_end_at_the_sandbox") {
        return;
    }
    let name = format!("muster-landlock-test-{}", std::process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let test = concat!(module_path!(), "::a_child_that_the_other_tests_start").split_once("::").unwrap().1;
    for (policy, reaches) in [(None, true), (Some(&Policy::SHARED), false)] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--ignored"]).env(SOCKET, &name);
        confine(&mut command, policy);
        let output = command.output().unwrap();
        assert_eq!(output.status.success(), reaches, "{output:?}");

        let folder = Path::new("/");
        assert_eq!(shell("kill -0 $PPID", folder, policy) == 0, reaches);
        assert_eq!(shell("read x < /proc/self/stat & kill -0 $! && wait", folder, policy), 0, "its own child");
    }
    drop(listener);
}

/// `cargo test -p muster-agent --lib what_restricting_costs -- --ignored --nocapture`
#[ignore = "a measurement"]
#[test]
fn what_restricting_costs() {
    const ROUNDS: usize = 500;
    let Some(version) = abi() else { return };
    // As many rules as a strict job has, with paths that every host has.
    let full: [Rule<'_>; 6] = [
        (c"/", READ),
        (c"/usr", READ | WRITE),
        (c"/tmp", READ | WRITE),
        (c"/var", READ | WRITE),
        (c"/dev", WRITE_FILE | IOCTL_DEV),
        (c"/proc", WRITE_FILE | TRUNCATE),
    ];
    for (name, policy) in [("six rules", Policy { files: Some(&full) }), ("scopes alone", Policy::SHARED)] {
        let mut costs_ns: Vec<u64> = (0..ROUNDS).map(|_| cost_ns(|| restrict(version, &policy).is_ok())).collect();
        costs_ns.sort_unstable();
        let us = |per_cent: usize| costs_ns[ROUNDS * per_cent / 100] as f64 / 1e3;
        println!("restrict, {name}: p5 {:.1} us, p50 {:.1} us, p95 {:.1} us", us(5), us(50), us(95));
    }
}
