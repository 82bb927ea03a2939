//! Inputs and outputs: P41 to P44, P47.

use std::{collections::BTreeMap, path::Path};

use muster_agent::spawner::protocol::Verdict;

use crate::{
    case::{Attempt, Body, Case, Control, exact},
    fleet,
    spawner::Content,
    stage::Stage,
};

const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// An ELF head of a 64-bit program for AArch64 (machine 183) and nothing behind it.
const OTHER_MACHINE: [u8; 20] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0";

fn cannot_be_run(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let files: [(&str, &[u8], bool); 4] = [
        ("empty", b"", true),
        ("interpreter", b"#!/no/such/interpreter\n", true),
        ("machine", &OTHER_MACHINE, true),
        ("closed", b"#!/bin/sh\n", false),
    ];
    let mut tries = Vec::new();
    for (program, errno) in [
        ("/no/such/program", 2),
        ("/etc", 13),
        ("./empty", 8),
        ("./interpreter", 2),
        ("./machine", 8),
        ("./closed", 13),
    ] {
        let mut start = stage.spawner.order(&[]);
        start.arguments = vec![program.as_bytes().to_vec()];
        let key = stage.spawner.begin(start, None, &files)?;
        let found = stage.live_through(key)?.end.verdict;
        tries.push(Attempt::compare(program, &found, &Verdict::StartFailed { step: "exec".into(), errno }));
    }
    Ok(tries)
}

/// A job that leaves what a collector must not take: what was collected, by path.
fn collect(
    stage: &mut Stage,
    files: &[(&str, &[u8], bool)],
    paths: &[&str],
) -> Result<BTreeMap<String, Content>, String> {
    let secret = format!("secret={}", stage.spawner.folder.path().join("state/secret").display());
    let start = stage.spawner.order(&["outputs+large-file", &secret]);
    let key = stage.spawner.begin(start, None, files)?;
    let life = stage.spawner.end(key, PATIENCE)?;
    if life.end.verdict != Verdict::Exited(0) {
        return Err(format!("{:?}: {}", life.end.verdict, String::from_utf8_lossy(&life.stderr)));
    }
    let collected = stage.spawner.collect(key, paths, OUTPUT_BYTES_MAX);
    stage.spawner.forget(key);
    collected
}

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

fn not_outputs(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let bad = [
        "link",
        "passwd",
        "root/etc/passwd",
        "pipe",
        "socket",
        "device",
        "folder",
        "swapped/passwd",
        "../work/before/passwd",
        "/etc/passwd",
        "folder/../../etc/passwd",
        "none",
        "sparse",
        "",
    ];
    let good = [("folder/deep/good", b"good".as_slice()), ("before/passwd", b"mine")];
    let paths: Vec<&str> = bad.into_iter().chain(good.iter().map(|(path, _)| *path)).collect();
    let collected = collect(stage, &[], &paths)?;
    let mut tries: Vec<Attempt> = bad
        .into_iter()
        .map(|path| match collected.get(path) {
            Some(Err(reason)) => Attempt::holds(format!("skipped-{path}"), !reason.is_empty(), reason),
            Some(Ok(content)) => {
                Attempt::holds(format!("skipped-{path}"), false, format!("{} bytes were taken", content.len()))
            }
            None => Attempt::holds(format!("skipped-{path}"), false, "it was not reported"),
        })
        .collect();
    for (path, content) in good {
        tries.push(Attempt::compare(format!("taken-{path}"), &collected.get(path), &Some(&Ok(content.to_vec()))));
    }
    Ok(tries)
}

/// How many outputs a job may name (core, `limits`).
const MANY: usize = 1_000;
/// Deeper than a path of 4,096 bytes can say.
const DEPTH: usize = 2_100;
/// Where the shallower leaf lies.
const SHALLOW: usize = 100;

/// What is collected is bounded by what a file says it holds and by what it holds, whatever it is called.
fn extreme_outputs(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let words = [format!("limit={OUTPUT_BYTES_MAX}"), format!("many={MANY}"), format!("depth={DEPTH}")];
    let mut command = vec!["extreme-outputs"];
    command.extend(words.iter().map(String::as_str));
    let start = stage.spawner.order(&command);
    let key = stage.spawner.begin(start, None, &[])?;
    let life = stage.spawner.end(key, PATIENCE)?;
    let made = crate::case::attempts(&life.stdout);
    let long = "n".repeat(255);
    let leaf = |depth: usize| format!("{}leaf", "d/".repeat(depth));
    let (shallow, deepest) = (leaf(SHALLOW), leaf(DEPTH));
    let one = [
        "holes",
        "large-holes",
        "room",
        "one",
        "other",
        "linked-passwd",
        "new\nline",
        "\u{1b}[2J",
        "-rf",
        &long,
        &shallow,
        &deepest,
    ];
    let found = stage.spawner.collect(key, &one, OUTPUT_BYTES_MAX)?;
    let names: Vec<String> = (0..MANY).map(|at| format!("many/{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let many = stage.spawner.collect(key, &names, OUTPUT_BYTES_MAX)?;
    stage.spawner.forget(key);
    let content = |path: &str| found.get(path).cloned();
    let refused = |path: &str| found.get(path).and_then(|content| content.as_ref().err()).cloned();
    let mut tries: Vec<Attempt> =
        ["holes-at-the-limit", "holes-past-the-limit", "room-behind-the-end", "hard", "odd-names", "many", "deep"]
            .into_iter()
            .map(|name| {
                let outcome = made.iter().find(|attempt| attempt.name == name).map(|attempt| attempt.outcome.is_ok());
                Attempt::compare(format!("made-{name}"), &outcome, &Some(true))
            })
            .collect();
    let too_large = Some(format!("larger than the limit of {OUTPUT_BYTES_MAX} bytes"));
    let zeros =
        content("holes").and_then(Result::ok).map(|bytes| (bytes.len() as u64, bytes.iter().all(|byte| *byte == 0)));
    tries.push(Attempt::compare("holes-count-as-bytes", &zeros, &Some((OUTPUT_BYTES_MAX, true))));
    tries.push(Attempt::compare("apparent-size", &refused("large-holes"), &too_large));
    tries.push(Attempt::compare("real-size", &refused("room"), &too_large));
    tries.push(Attempt::compare(
        "hard-links",
        &(content("one"), content("other")),
        &(Some(Ok(b"one".into())), Some(Ok(b"one".into()))),
    ));
    tries.push(Attempt::compare("hard-link-out", &refused("linked-passwd"), &Some("missing".to_owned())));
    for name in ["new\nline", "\u{1b}[2J", "-rf", &long] {
        tries.push(Attempt::compare(format!("name-{}", name.escape_default()), &content(name), &Some(Ok(name.into()))));
    }
    tries.push(Attempt::compare("deep", &content(&shallow), &Some(Ok(b"leaf".into()))));
    tries.push(Attempt::holds(
        "too-deep",
        refused(&deepest).is_some_and(|reason| !reason.is_empty()),
        content(&deepest),
    ));
    let taken = many.values().filter(|content| content.as_ref().is_ok_and(|bytes| bytes == b"x")).count();
    tries.push(Attempt::compare("many-files", &taken, &MANY));
    Ok(tries)
}

/// Muster unpacks nothing: an archive is a file like any other, as input and as output.
fn archives(stage: &mut Stage) -> Result<Vec<Attempt>, String> {
    let archive = [b"PK\x03\x04".as_slice(), &[0x50; 2_000]].concat();
    let collected = collect(
        stage,
        &[("in/given.zip", &archive, false)],
        &["in/given.zip", "escape.tar", "way", "way/hostile", "escaped"],
    )?;
    let returned = collected.get("escape.tar").and_then(|content| content.as_ref().ok());
    let members = returned.is_some_and(|bytes| bytes.starts_with(b"../../escaped\0") && bytes.len() % 512 == 0);
    let unpacked: Vec<&str> = ["way", "way/hostile", "escaped"]
        .into_iter()
        .filter(|path| collected.get(*path).is_none_or(Result::is_ok))
        .collect();
    Ok(vec![
        Attempt::compare("input-stays-a-file", &collected.get("in/given.zip"), &Some(&Ok(archive))),
        Attempt::holds("output-stays-a-file", members, returned.map(Vec::len)),
        Attempt::compare("nothing-is-unpacked-inside", &unpacked, &Vec::new()),
        Attempt::holds(
            "nothing-is-unpacked-outside",
            !Path::new("/tmp/hostile-absolute").exists(),
            "a file of the archive is in /tmp",
        ),
    ])
}

pub static CASES: [Case; 5] = [
    Case {
        id: "P41",
        title: "arguments: too long, empty, no text, option-like",
        destructive: false,
        needs: &[],
        body: Body::Fleet(fleet::arguments),
        control: Control::None("what arrives is compared with what was sent"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P42",
        title: "programs that cannot be run",
        destructive: false,
        needs: &[],
        body: Body::Acts(cannot_be_run),
        control: Control::None("the errno is execve(2)'s own"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P43",
        title: "outputs: links, pipes, sockets, devices, ..",
        destructive: false,
        needs: &[],
        body: Body::Acts(not_outputs),
        control: Control::None("two plain files of the same job are taken"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P44",
        title: "archives that leave their folder",
        destructive: false,
        needs: &[],
        body: Body::Acts(archives),
        control: Control::None("nothing in Muster unpacks an archive; its bytes come back as they were"),
        ends: &[],
        rules: &[exact("*")],
    },
    Case {
        id: "P47",
        title: "outputs: sparse, linked, deep, many, oddly named",
        destructive: false,
        needs: &["limits.disk"],
        body: Body::Acts(extreme_outputs),
        control: Control::None("the files are there, by the job's own word; what is plain among them is taken"),
        ends: &[],
        rules: &[exact("*")],
    },
];
