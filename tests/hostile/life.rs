//! Life and death: P37 to P40 and P45.

use std::time::{Duration, Instant};

use muster_agent::spawner::protocol::{Request, Start, Verdict};

use crate::{
    case::{Attempt, Body, Case, Control, Place, exact, no_facts, refused, value, works},
    stage::Stage,
};

/// Longer than any grace here, and far from a hang.
const PROMPTLY: Duration = Duration::from_secs(120);
/// Jobs that end within their first millisecond, one after the other.
const REPEATS: u32 = 1_000;
/// The same in an emulated guest.
const REPEATS_IN_GUEST: u32 = 100;

fn deaf(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let start = stage.spawner.order(&["deaf"]);
    let key = stage.spawner.begin(start, None, &[])?;
    stage.spawner.wait_for_output(key, "deaf")?;
    let since = Instant::now();
    stage.spawner.ask(&Request::Stop { attempt: key, grace_ms: 300 }, &[]);
    let stopped = stage.live_through(key)?;
    println!("       I8: {} ms from the stop with a grace of 300 ms to its end", since.elapsed().as_millis());
    let mut start = stage.spawner.order(&["deaf"]);
    (start.time_limit_ms, start.grace_ms) = (500, 300);
    let key = stage.spawner.begin(start, None, &[])?;
    let timed = stage.live_through(key)?;
    Ok(vec![
        Attempt::compare("stopped", &stopped.end.verdict, &Verdict::Stopped),
        Attempt::compare("timed-out", &timed.end.verdict, &Verdict::TimedOut),
        Attempt::holds("promptly", since.elapsed() < PROMPTLY, since.elapsed()),
    ])
}

fn limited(start: &mut Start) {
    (start.time_limit_ms, start.grace_ms) = (1_000, 200);
}

fn every_end(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let mut tries = Vec::new();
    for code in [0, 1, 2, 126, 127, 128, 255] {
        let found = end_of(stage, &[&format!("code={code}")])?;
        tries.push(Attempt::compare(format!("code-{code}"), &found, &Verdict::Exited(code)));
        let found = end_of(stage, &[&format!("code={code}"), "close=yes"])?;
        tries.push(Attempt::compare(format!("closed-{code}"), &found, &Verdict::Exited(code)));
    }
    // Every signal whose default is to end (signal(7)).
    for signal in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 25, 26, 27, 29, 30, 31, 34, 64] {
        let found = end_of(stage, &[&format!("signal={signal}")])?;
        tries.push(Attempt::compare(format!("signal-{signal}"), &found, &Verdict::Signaled(signal)));
    }
    let repeats = if stage.tools.destructive { REPEATS_IN_GUEST } else { REPEATS };
    let mut wrong = 0;
    for round in 0..repeats {
        let code = i32::try_from(round % 200).expect("small");
        let mut start = stage.spawner.order(&[]);
        start.arguments = ["/bin/sh", "-c", &format!("exit {code}")].map(|word| word.as_bytes().to_vec()).into();
        let key = stage.spawner.begin(start, None, &[])?;
        let life = stage.spawner.end(key, PROMPTLY)?;
        stage.spawner.forget(key);
        wrong += u32::from(life.ends != 1 || life.end.verdict != Verdict::Exited(code));
    }
    tries.push(Attempt::compare(format!("{repeats}-at-once"), &wrong, &0));
    Ok(tries)
}

fn end_of(stage: &mut Stage, facts: &[&str]) -> Result<Verdict, String> {
    let words: Vec<&str> = std::iter::once(&"end").chain(facts).copied().collect();
    let start = stage.spawner.order(&words);
    let key = stage.spawner.begin(start, None, &[])?;
    Ok(stage.live_through(key)?.end.verdict)
}

fn init(stage: &Stage, place: Place) -> Vec<String> {
    match place {
        Place::Inside => vec!["pid=1".into()],
        // The victim, and no signal that would end it.
        Place::Outside => vec![
            format!("pid={}", stage.outside.victim_pid()),
            format!("address={}", stage.outside.victim_address),
            "signals=no".into(),
        ],
    }
}

pub static CASES: [Case; 5] = [
    Case {
        id: "P37",
        title: "ignores SIGTERM, blocks every signal",
        destructive: false,
        needs: &[],
        body: Body::Acts(deaf),
        control: Control::None("it is killed where it could not be asked to go"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P38",
        title: "stops itself and all its children",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "stopped", facts: no_facts, shape: limited },
        control: Control::None("outside it would stay stopped for ever"),
        ends: &["timeout"],
        rules: &[works("ready")],
    },
    Case {
        id: "P39",
        title: "leaves a daemon behind and ends well",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "daemon", facts: no_facts, shape: crate::case::as_it_is },
        control: Control::None("outside the daemon would stay; here no process with the job's uid is left"),
        ends: &["exited(0)"],
        rules: &[value("daemon", "exit 0", |text, _| text == "exit 0")],
    },
    Case {
        id: "P40",
        title: "every exit code and signal; 1,000 ends at once",
        destructive: false,
        needs: &[],
        body: Body::Acts(every_end),
        control: Control::None("the verdicts are compared with what the job was told to do"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P45",
        title: "attacks pid 1 of its sandbox",
        destructive: false,
        needs: &["ns.pid"],
        body: Body::Probe { command: "attack-init", facts: init, shape: crate::case::as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value("orphans", "all of them, so the init reaps", |text, _| text == "500"),
            // A pidfd of a process that is seen anyway gives no right to it: what it is good for is tried below.
            crate::case::Rule {
                tries: "init-pidfd",
                wants: crate::case::Wants::RefusedOr(&["EPERM", "ENOSYS"], "a pidfd", |text, _| text.is_empty()),
            },
            refused("init-*", &["EPERM", "EACCES", "ESRCH", "ENOENT"]),
        ],
    },
];
