//! What every store must pass, whatever it is made of.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    effect::{EndRecord, StopReason},
    end::End,
    fleet::Meta,
    ids::{Actor, Incarnation, Term},
    job::JobRecord,
    limits,
    spec::{Delivery, JobSpec, OnDrain, Retries},
};
use rusqlite::Connection;

use super::*;

struct Opened {
    store: Box<dyn Store>,
    reader: Box<dyn Reader>,
}

/// Opens the same store again and again; the first time it is made.
type Open<'a> = &'a dyn Fn() -> Opened;

fn embedded(test: fn(Open<'_>)) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fleet.db");
    test(&|| {
        let store = if file.exists() { EmbeddedStore::open(&file) } else { EmbeddedStore::create(&file) }.unwrap();
        let reader = store.reader().unwrap();
        Opened { store: Box::new(store), reader: Box::new(reader) }
    });
}

fn job(key: &str) -> JobRecord {
    let spec = JobSpec {
        name: "test".into(),
        owner: Actor("ana".into()),
        pool: None,
        priority: 0,
        tasks: 2,
        request: Default::default(),
        fences: BTreeSet::new(),
        constraints: BTreeMap::new(),
        delivery: Delivery::AtLeastOnce,
        on_drain: OnDrain::Finish,
        retries: Retries::default(),
        time_limit: None,
        grace: limits::GRACE,
    };
    JobRecord::accepted(spec, key.into(), [7; 32], Timestamp(5))
}

fn attempt(task: u32) -> (AttemptId, AttemptRecord) {
    let id = AttemptId { job: JobId(1024), task, number: std::num::NonZeroU32::MIN };
    let record = AttemptRecord {
        node: NodeId(1),
        incarnation: Incarnation(1),
        term: Term(1),
        placement_reason: "least loaded".into(),
        placed: Timestamp(6),
        started: None,
        stopping: Some((Timestamp(7), StopReason::Drained)),
        ended: None,
    };
    (id, record)
}

fn what_was_committed_is_there_after_a_reopen(open: Open<'_>) {
    let job = job("key");
    let meta = Meta { next_job: JobId(1025), ..Meta::default() };
    let (first, record) = attempt(0);
    let (second, mut ended) = attempt(1);
    ended.ended = Some(EndRecord { end: End::Exited(3), at: Timestamp(9), presumed: false, detail: vec![1, 2, 3] });
    let history = [HistoryEntry {
        at: Timestamp(9),
        subject: Subject::Job(JobId(1024)),
        kind: "submitted".into(),
        reason: "2 tasks".into(),
        actor: Some(Actor("ana".into())),
    }];
    let batch = Batch {
        now: Timestamp(10),
        meta: Some(&meta),
        templates: vec![(JobId(1024), Bytes::from_static(b"body"))],
        jobs: vec![(JobId(1024), &job)],
        attempts: vec![(first, &record), (second, &ended)],
        history: &history,
        ..Batch::default()
    };
    assert_eq!(open().store.commit(&batch).unwrap(), 1);

    let mut opened = open();
    let (image, clock) = opened.store.load().unwrap();
    assert_eq!(clock, Timestamp(10));
    assert_eq!(image.meta, meta);
    assert_eq!(image.jobs, [(JobId(1024), job)]);
    assert_eq!(image.attempts, [(first, record)], "only live ones");
    assert_eq!(opened.reader.template(JobId(1024)).unwrap().unwrap().as_ref(), b"body");
    let attempts = opened.reader.attempts(JobId(1024), 0..10).unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[1].detail.as_deref(), Some([1, 2, 3].as_slice()));
    let entries = opened.reader.history(&HistoryQuery { limit: 10, subject: "job/100".into(), ..Default::default() });
    assert_eq!(entries.unwrap()[0].reason, "2 tasks");
}

fn a_failed_commit_leaves_nothing(open: Open<'_>) {
    let mut opened = open();
    let (one, two) = (job("same"), job("same"));
    let batch = Batch {
        templates: vec![(JobId(1024), Bytes::new()), (JobId(1025), Bytes::new())],
        jobs: vec![(JobId(1024), &one), (JobId(1025), &two)],
        ..Batch::default()
    };
    assert!(opened.store.commit(&batch).is_err(), "two jobs cannot share a key");
    assert!(opened.store.load().unwrap().0.jobs.is_empty());
}

fn a_token_belongs_to_the_first_key_that_uses_it(open: Open<'_>) {
    let opened = open();
    let token = TokenRecord {
        id: [1; 16],
        secret: [2; 32],
        pool: PoolName("local".into()),
        host: Some(HostRequestId(7)),
        expires: Timestamp(99),
        used_by: None,
    };
    opened.reader.add_token(&token).unwrap();
    assert_eq!(opened.reader.token([1; 16]).unwrap(), Some(token));
    assert_eq!(opened.reader.bind_token([1; 16], [3; 32]).unwrap(), Some([3; 32]));
    assert_eq!(opened.reader.bind_token([1; 16], [4; 32]).unwrap(), Some([3; 32]));
    assert_eq!(open().reader.bind_token([9; 16], [4; 32]).unwrap(), None);
}

fn history_is_read_from_either_end(open: Open<'_>) {
    let mut opened = open();
    let entry = |number: u64| HistoryEntry {
        at: Timestamp(number),
        subject: Subject::Fleet,
        kind: "test".into(),
        reason: number.to_string(),
        actor: None,
    };
    let history: Vec<_> = (1..=5).map(entry).collect();
    assert_eq!(opened.store.commit(&Batch { history: &history, ..Batch::default() }).unwrap(), 5);
    let ask = |newest, after| {
        let entries = opened.reader.history(&HistoryQuery { limit: 2, newest, after, ..Default::default() }).unwrap();
        entries.into_iter().map(|entry| entry.revision).collect::<Vec<_>>()
    };
    assert_eq!(ask(false, 0), [1, 2]);
    assert_eq!(ask(false, 3), [4, 5]);
    assert_eq!(ask(true, 0), [4, 5]);
}

#[test]
fn embedded_keeps_what_was_committed() {
    embedded(what_was_committed_is_there_after_a_reopen);
}

#[test]
fn embedded_commits_all_or_nothing() {
    embedded(a_failed_commit_leaves_nothing);
}

#[test]
fn embedded_binds_tokens() {
    embedded(a_token_belongs_to_the_first_key_that_uses_it);
}

#[test]
fn embedded_reads_history() {
    embedded(history_is_read_from_either_end);
}

#[test]
fn a_later_schema_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fleet.db");
    EmbeddedStore::create(&file).unwrap();
    Connection::open(&file).unwrap().execute_batch("PRAGMA user_version = 2").unwrap();
    let error = EmbeddedStore::open(&file).unwrap_err();
    assert!(matches!(error, Error::NewerSchema { found: 2, known: 1 }), "{error}");
}

#[test]
fn damage_is_refused_with_the_files_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fleet.db");
    drop(EmbeddedStore::create(&file).unwrap());
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.truncate(bytes.len() / 2);
    bytes[100..400].fill(0xff);
    std::fs::write(&file, &bytes).unwrap();
    let error = EmbeddedStore::open(&file).unwrap_err();
    assert!(error.to_string().contains("fleet.db"), "{error}");
    std::fs::write(&file, b"").unwrap();
    assert!(EmbeddedStore::open(&file).is_err(), "an emptied file is no empty fleet");
}
