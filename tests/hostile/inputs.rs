//! Inputs and outputs: P41 to P44.

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

pub static CASES: [Case; 4] = [
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
];
