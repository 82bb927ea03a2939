//! Living on and dying in every way; and the suite's harmless jobs.

use std::{fs, io::Read as _};

use crate::{Facts, network, sys, tell::tell_value};

/// Blocks and ignores all that can be, and stays.
pub fn deaf(_: &Facts) {
    sys::block_all_signals();
    sys::ignore(libc::SIGTERM);
    let _its_child_is_deaf_too = sys::fork(0, || {
        let _own_session = sys::call_numbers(libc::SYS_setsid, []);
        sys::stay()
    });
    tell_value("ready", Ok("deaf"));
    sys::stay();
}

/// Stops its children and itself.
pub fn stopped(_: &Facts) {
    let stop = i64::from(libc::SIGSTOP);
    for _ in 0..3 {
        let _stopped = sys::fork(0, || {
            let _stops = sys::call_numbers(libc::SYS_kill, [i64::from(std::process::id()), stop]);
            sys::stay()
        });
    }
    tell_value("ready", Ok("stopping"));
    let _stops = sys::call_numbers(libc::SYS_kill, [i64::from(std::process::id()), stop]);
    sys::stay();
}

/// A daemon that has left session, group and parent; then a good end.
pub fn daemon(_: &Facts) {
    let left = sys::fork(0, || {
        let _own_session = sys::call_numbers(libc::SYS_setsid, []);
        let daemon = sys::fork(0, || {
            sys::block_all_signals();
            for fd in 0..3 {
                let _closed = sys::call_numbers(libc::SYS_close, [fd]);
            }
            sys::stay()
        });
        i32::from(daemon.is_err())
    });
    tell_value("daemon", left.and_then(sys::wait).map(sys::status_text));
}

/// Ends as it is told: `code`, or `signal`; `close=yes` closes both outputs first.
pub fn end(facts: &Facts) {
    if facts.text("say") == "euid" {
        println!("{}", sys::euid());
        return;
    }
    if facts.text("close") == "yes" {
        for fd in [1, 2] {
            let _closed = sys::call_numbers(libc::SYS_close, [fd]);
        }
    }
    let signal = facts.number("signal", 0);
    if signal != 0 {
        sys::restore(i32::try_from(signal).unwrap_or(0));
        let own = i64::from(std::process::id());
        let _ends_us = sys::call_numbers(libc::SYS_kill, [own, i64::try_from(signal).unwrap_or(0)]);
    }
    sys::exit_now(i32::try_from(facts.number("code", 0)).unwrap_or(0));
}

/// What others must not reach: its memory, whose address is told, and System V and POSIX objects (`key`, `name`). It
/// stays until its input ends.
pub fn victim(facts: &Facts) {
    static WORDS: [u8; 64] = [b'v'; 64];
    let planted = network::plant(facts);
    println!("{}", WORDS.as_ptr() as usize);
    let _until_it_ends = std::io::stdin().read_to_end(&mut Vec::new());
    planted.remove();
}

/// The harmless neighbour: works when its input ends, and says what came of it.
pub fn canary(_: &Facts) {
    println!("ready {}", sys::euid());
    let _until_it_ends = std::io::stdin().read_to_end(&mut Vec::new());
    let sum: u64 = (1..=1_000_000u64).fold(0, |sum, next| (sum + next * next) % 1_000_003);
    let written = fs::write("canary", sum.to_string()).and_then(|()| fs::read_to_string("canary"));
    println!("{}", written.unwrap_or_else(|error| error.to_string()));
}

/// As the kernel's handler of crashes (`core_pattern`): notes that it was called.
pub fn note_core(facts: &Facts) {
    let _noted = fs::write(facts.text("file"), b"called");
}
