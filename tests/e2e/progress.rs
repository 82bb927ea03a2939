//! How far `muster simulate` is: told to who watches a terminal, gone when the answer is there, and never told to a
//! pipe; what is answered is the same.

use std::{
    fs::File,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use muster_tests::part::muster_binary;
use nix::pty::{Winsize, openpty};

const COLUMNS: u16 = 48;
const SEEDS: [&str; 9] = ["simulate", "--seeds", "6", "--jobs", "4", "--span", "30s", "--fault-every", "10s"];

fn muster(arguments: &[&str]) -> Command {
    let mut command = Command::new(muster_binary());
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    command.env("TERM", "xterm").env("NO_COLOR", "1");
    command
}

/// Runs it with a terminal as its stderr. What it answered, and all that came to the terminal.
fn watched(mut command: Command) -> (String, String) {
    let size = Winsize { ws_row: 24, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = openpty(Some(&size), None).expect("a terminal");
    let child = command.stderr(terminal.slave).spawn().expect("muster starts");
    // It has the terminal's other end: with the child's own, that must be the last.
    drop(command);
    let mut ours = File::from(terminal.master);
    let shown = thread::spawn(move || {
        let mut shown = Vec::new();
        // A terminal that all others have closed ends with an error.
        drop(ours.read_to_end(&mut shown));
        String::from_utf8(shown).expect("text")
    });
    let done = child.wait_with_output().expect("it ends");
    let shown = shown.join().expect("the terminal is read");
    assert!(done.status.success(), "{}: {shown}", done.status);
    (String::from_utf8(done.stdout).expect("text"), shown)
}

/// Runs it with pipes. What it answered, and what it said.
fn piped(arguments: &[&str]) -> (String, String) {
    let done = muster(arguments).output().expect("muster runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    assert!(done.status.success(), "{}", done.status);
    (text(done.stdout), text(done.stderr))
}

/// What stands on the terminal in the end, line by line, without spaces at their ends.
fn standing(shown: &str) -> Vec<String> {
    let mut lines = vec![Vec::new()];
    let mut column = 0;
    for letter in shown.chars() {
        let line = lines.last_mut().expect("there is one");
        match letter {
            '\r' => column = 0,
            '\n' => lines.push(Vec::new()),
            other => {
                line.resize(line.len().max(column + 1), ' ');
                line[column] = other;
                column += 1;
            }
        }
    }
    lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned()).collect()
}

/// What was drawn over itself.
fn drawn<'a>(shown: &'a str, word: &str) -> Vec<&'a str> {
    let lines: Vec<&str> = shown.split(['\r', '\n']).filter(|line| line.contains(word)).collect();
    assert!(lines.iter().all(|line| line.chars().count() < usize::from(COLUMNS)), "{lines:?}");
    assert!(!shown.contains('\u{1b}'), "it needs no escape sequence: {shown:?}");
    lines
}

fn without_first_line(text: &str) -> &str {
    text.split_once('\n').expect("more than one line").1
}

#[test]
fn a_terminal_shows_how_many_seeds_are_played_and_is_left_as_it_was() {
    let (answer, shown) = watched(muster(&SEEDS));
    assert!(drawn(&shown, "seeds")[0].starts_with("0/6 seeds, "), "{shown:?}");
    assert_eq!(standing(&shown), [""], "{shown:?}");
    let (other, said) = piped(&SEEDS);
    // The first line tells how long it took.
    assert_eq!((without_first_line(&answer), said.as_str()), (without_first_line(&other), ""));
    assert!(answer.starts_with("6 seeds in "), "{answer}");
}

#[test]
fn a_terminal_shows_how_far_the_rules_are_on_a_trace() {
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/traces/pool.toml");
    let policy = policy.to_str().expect("a plain path");
    let replay = ["simulate", "--threads", "1", "--against", "fixed-peak", "--synthetic", "steps", "--policy", policy];
    let (answer, shown) = watched(muster(&replay));
    assert_eq!(drawn(&shown, " rules")[0], "0/2 rules: policy 0% of the trace", "{shown:?}");
    let (other, said) = piped(&replay);
    assert_eq!(answer, other);
    // What was said anyway stands there alone.
    assert_eq!(standing(&shown).join("\n").trim_end(), said.trim_end());
    assert!(said.contains("synthetic steps: ") && !said.contains(" rules"), "{said}");
}

#[test]
fn nothing_is_drawn_for_who_does_not_want_it() {
    let dumb = |name| {
        let mut command = muster(&SEEDS);
        command.env("TERM", name);
        command
    };
    let more = |option: &'static [&'static str]| muster(&[&SEEDS, option].concat());
    for command in [dumb("dumb"), dumb(""), more(&["--quiet"]), more(&["-o", "json"])] {
        let what = format!("{command:?}");
        assert_eq!(watched(command).1, "", "{what}");
    }
}
