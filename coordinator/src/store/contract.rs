//! What every store must pass, whatever it is made of.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    effect::{EndRecord, StopReason},
    end::End,
    fleet::Meta,
    ids::{Actor, Incarnation, Term},
    job::JobRecord,
    limits,
    policy::{HostTemplate, PoolPolicy, ProviderKind},
    spec::{Delivery, JobSpec, OnDrain, Retries},
};
use rusqlite::Connection;

use super::{
    postgres::{Campaign, Candidate, PostgresReader, PostgresStore, Target},
    *,
};
use crate::leadership::{Leadership, Role};

#[allow(dead_code, reason = "shared with the end-to-end tests, which also fail over from one server to another")]
#[path = "../../../tests/harness/postgres.rs"]
pub(super) mod server;

use server::{Cluster, Proxy, Road};

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

const FLEET: &str = "0123abcd";

/// The same on a real server; each opening is a leader of its own, as after a takeover.
fn postgres(test: fn(Open<'_>)) {
    let Some(cluster) = Cluster::start() else {
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        println!("SKIP {name}: PostgreSQL is not installed");
        return;
    };
    let target = Target::parse(&cluster.url(), None).unwrap();
    postgres::prepare(&target, FLEET, true).unwrap();
    test(&|| {
        let campaign = lead(&target);
        let Role::Leading { term } = *campaign.role.borrow() else { panic!("it leads") };
        let store = PostgresStore::open(&target, term, campaign.leadership.clone()).unwrap();
        let reader = PostgresReader::new(&target, term);
        campaign.resign();
        Opened { store: Box::new(store), reader: Box::new(reader) }
    });
}

pub(super) fn lead(target: &Target) -> Campaign {
    let candidate = Candidate { holder: "a test".into(), address: "a.example:1".into() };
    let mut campaign = postgres::campaign(target.clone(), candidate);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let leads = campaign.role.wait_for(|role| matches!(role, Role::Leading { .. }));
    let wait = async { tokio::time::timeout(std::time::Duration::from_secs(20), leads).await.map(|_| ()) };
    runtime.block_on(wait).expect("nobody else leads");
    campaign
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
    assert_eq!(opened.store.commits().unwrap(), 1);
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

fn rows_change_go_and_are_withdrawn(open: Open<'_>) {
    let mut opened = open();
    let node = |name: &str| NodeRecord {
        name: name.into(),
        pool: PoolName("local".into()),
        key: [1; 32],
        host: None,
        joined: Timestamp(1),
        incarnation: Incarnation(1),
        boot_id: String::new(),
        instance: String::new(),
        agent_start: 0,
        capacity: Default::default(),
        labels: BTreeMap::new(),
        fences: BTreeSet::new(),
        version: String::new(),
        liveness: muster_core::node::Liveness::Live,
        duty: muster_core::node::Duty::Eligible,
        hold: muster_core::node::Hold::None,
        faults: 0,
        attempts_total: 0,
        idle_since: None,
        drain_revision: Default::default(),
        rolling: None,
        disk_full: None,
    };
    let (mut first, one, two) = (job("key"), node("one"), node("two"));
    let ((kept, record), (gone, other)) = (attempt(0), attempt(1));
    let batch = Batch {
        templates: vec![(JobId(1024), Bytes::new())],
        jobs: vec![(JobId(1024), &first)],
        nodes: vec![(NodeId(1), Some(&one)), (NodeId(2), Some(&two))],
        attempts: vec![(kept, &record), (gone, &other)],
        ..Batch::default()
    };
    opened.store.commit(&batch).unwrap();

    first.finished = Some(Timestamp(8));
    let renamed = node("three");
    let batch = Batch {
        jobs: vec![(JobId(1024), &first)],
        nodes: vec![(NodeId(1), Some(&renamed)), (NodeId(2), None)],
        withdrawn: vec![gone],
        ..Batch::default()
    };
    opened.store.commit(&batch).unwrap();
    let (image, _) = open().store.load().unwrap();
    assert_eq!(image.jobs, [(JobId(1024), first)]);
    assert_eq!(image.nodes, [(NodeId(1), renamed)]);
    assert_eq!(image.attempts, [(kept, record)]);
}

fn pools_change_and_go_and_decisions_keep_what_they_were_made_of(open: Open<'_>) {
    let mut opened = open();
    let host = HostTemplate { cpu_milli: 1_000, memory_bytes: 1, disk_bytes: 1, labels: BTreeMap::new() };
    let pool = |name: &str, max| {
        PoolRecord::new(PoolPolicy::fixed(PoolName(name.into()), ProviderKind::Local, 0, max, host.clone()))
    };
    let (kept, gone) = (pool("kept", 1), pool("gone", 1));
    let both = vec![(&kept.policy.name, Some(&kept)), (&gone.policy.name, Some(&gone))];
    opened.store.commit(&Batch { pools: both, ..Batch::default() }).unwrap();

    let changed = pool("kept", 9);
    let inputs = String::from("supply 1 (0 booting), 2 tasks wait");
    let sizes = Some(Sizes { from: 1, to: 9, inputs });
    let history = [HistoryEntry {
        at: Timestamp(1),
        subject: Subject::Pool { name: PoolName("kept".into()), sizes: sizes.clone() },
        kind: "scaled".into(),
        reason: "a test".into(),
        actor: None,
    }];
    let pools = vec![(&changed.policy.name, Some(&changed)), (&gone.policy.name, None)];
    opened.store.commit(&Batch { pools, history: &history, ..Batch::default() }).unwrap();
    assert_eq!(open().store.load().unwrap().0.pools, [(PoolName("kept".into()), changed.clone())]);
    let told = opened.reader.history(&HistoryQuery { limit: 9, ..Default::default() }).unwrap();
    assert_eq!(told.into_iter().map(|entry| entry.sizes).collect::<Vec<_>>(), [sizes]);
}

macro_rules! contract {
    ($($test:ident),+ $(,)?) => {
        mod embedded_store {
            $(#[test]
            fn $test() {
                super::embedded(super::$test);
            })+
        }
        mod postgres_store {
            $(#[test]
            fn $test() {
                super::postgres(super::$test);
            })+
        }
    };
}

contract! {
    what_was_committed_is_there_after_a_reopen,
    a_failed_commit_leaves_nothing,
    a_token_belongs_to_the_first_key_that_uses_it,
    history_is_read_from_either_end,
    rows_change_go_and_are_withdrawn,
    pools_change_and_go_and_decisions_keep_what_they_were_made_of,
}

#[test]
fn a_later_schema_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fleet.db");
    EmbeddedStore::create(&file).unwrap();
    Connection::open(&file).unwrap().execute_batch("PRAGMA user_version = 3").unwrap();
    let error = EmbeddedStore::open(&file).unwrap_err();
    assert!(matches!(error, Error::NewerSchema { found: 3, known: 2 }), "{error}");
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

#[test]
fn a_postgres_leader_that_was_deposed_writes_nothing() {
    let Some(cluster) = Cluster::start() else {
        println!("SKIP a_postgres_leader_that_was_deposed_writes_nothing: PostgreSQL is not installed");
        return;
    };
    let target = Target::parse(&cluster.url(), None).unwrap();
    postgres::prepare(&target, FLEET, true).unwrap();
    let first = lead(&target);
    let Role::Leading { term } = *first.role.borrow() else { panic!("it leads") };
    // Its process believes that it leads, for ever.
    let mut old = PostgresStore::open(&target, term, Leadership::alone()).unwrap();
    let old_reader = PostgresReader::new(&target, term);
    let (old_job, new_job) = (job("old"), job("new"));
    let batch = |job| Batch {
        templates: vec![(JobId(1024), Bytes::new())],
        jobs: vec![(JobId(1024), job)],
        ..Batch::default()
    };
    first.resign();
    let second = lead(&target);
    let Role::Leading { term: later } = *second.role.borrow() else { panic!("it leads") };
    assert!(later > term);
    let error = old.commit(&batch(&old_job)).unwrap_err();
    assert!(matches!(error, Error::Deposed), "{error}");
    let token = TokenRecord {
        id: [1; 16],
        secret: [2; 32],
        pool: PoolName("local".into()),
        host: None,
        expires: Timestamp(99),
        used_by: None,
    };
    assert!(matches!(old_reader.add_token(&token), Err(Error::Deposed)));
    let mut new = PostgresStore::open(&target, later, second.leadership.clone()).unwrap();
    assert!(new.load().unwrap().0.jobs.is_empty());
    new.commit(&batch(&new_job)).unwrap();
    assert_eq!(new.load().unwrap().0.jobs, [(JobId(1024), new_job.clone())]);
    assert_eq!(postgres::read_state(&target).unwrap().jobs, [(JobId(1024), new_job)], "read beside the leader");
    second.resign();
}

#[test]
fn a_postgres_commit_whose_connection_breaks_is_stored_once() {
    let Some(cluster) = Cluster::start() else {
        println!("SKIP a_postgres_commit_whose_connection_breaks_is_stored_once: PostgreSQL is not installed");
        return;
    };
    let direct = Target::parse(&cluster.url(), None).unwrap();
    postgres::prepare(&direct, FLEET, true).unwrap();
    let campaign = lead(&direct);
    let Role::Leading { term } = *campaign.role.borrow() else { panic!("it leads") };
    let proxy = Proxy::to(&cluster);
    let target = Target::parse(&proxy.url(), None).unwrap();
    let mut store = PostgresStore::open(&target, term, campaign.leadership.clone()).unwrap();
    let reader = PostgresReader::new(&direct, term);
    let entry = |number: u64| HistoryEntry {
        at: Timestamp(number),
        subject: Subject::Fleet,
        kind: "test".into(),
        reason: number.to_string(),
        actor: None,
    };
    // The first commit prepares its statements; after it, a commit is one question and its answer.
    let roads = [Road::Open, Road::CutQuestion, Road::Open, Road::CutAnswer, Road::Open];
    for (revision, road) in (1u64..).zip(roads) {
        proxy.set(road);
        let history = [entry(revision)];
        assert_eq!(store.commit(&Batch { history: &history, ..Batch::default() }).unwrap(), revision, "{road:?}");
    }
    let all = reader.history(&HistoryQuery { limit: 100, ..Default::default() }).unwrap();
    let reasons: Vec<_> = all.iter().map(|entry| entry.reason.as_str()).collect();
    assert_eq!(reasons, ["1", "2", "3", "4", "5"]);

    campaign.leadership.end();
    proxy.set(Road::Closed);
    let history = [entry(6)];
    let error = store.commit(&Batch { history: &history, ..Batch::default() }).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "it does not try for ever: {error}");
}

#[test]
fn postgres_tables_of_another_fleet_or_a_later_version_are_refused() {
    let Some(cluster) = Cluster::start() else {
        println!("SKIP postgres_tables_of_another_fleet_or_a_later_version_are_refused: PostgreSQL is not installed");
        return;
    };
    let target = Target::parse(&cluster.url(), None).unwrap();
    let empty = postgres::prepare(&target, FLEET, false).unwrap_err();
    assert!(empty.to_string().contains("no tables"), "{empty}");
    postgres::prepare(&target, FLEET, true).unwrap();
    postgres::prepare(&target, FLEET, false).unwrap();
    lead(&target).resign();
    let other = postgres::prepare(&target, "ffff", true).unwrap_err();
    assert!(other.to_string().contains("0123abcd"), "{other}");
    let update = "UPDATE muster.meta SET value = '2' WHERE name = 'schema'";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&cluster.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute(update).await.unwrap();
    });
    let later = postgres::prepare(&target, FLEET, true).unwrap_err();
    assert!(matches!(later, Error::NewerSchema { found: 2, known: 1 }), "{later}");
}

#[test]
fn postgres_is_reached_by_tls_only_where_its_certificate_is_vouched_for() {
    let authority = || {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap(), rcgen::Issuer::new(params, key))
    };
    let ((ca, issuer), (other, _)) = (authority(), authority());
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Some(_cluster) = Cluster::start_tls(&server.pem(), &key.serialize_pem(), port) else {
        println!(
            "SKIP postgres_is_reached_by_tls_only_where_its_certificate_is_vouched_for: PostgreSQL is not installed"
        );
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours.pem"), folder.path().join("theirs.pem"));
    std::fs::write(&ours, ca.pem()).unwrap();
    std::fs::write(&theirs, other.pem()).unwrap();
    let url = format!("postgres://muster@localhost:{port}/postgres");
    postgres::prepare(&Target::parse(&url, Some(&ours)).unwrap(), FLEET, true).unwrap();
    let refused = postgres::prepare(&Target::parse(&url, Some(&theirs)).unwrap(), FLEET, true).unwrap_err();
    assert!(crate::chain(&refused).contains("certificate"), "{}", crate::chain(&refused));
    let unsaid = Target::parse(&format!("{url}?sslmode=require"), None).unwrap_err();
    assert!(unsaid.to_string().contains("store_ca"), "{unsaid}");
    let secret = Target::parse("postgres://muster:hunter2@:x/y?z", None).unwrap_err();
    assert!(!crate::chain(&secret).contains("hunter2"), "a password is not told: {}", crate::chain(&secret));
    let plain = Target::parse("postgres://muster:hunter2@db.example/fleet", None).unwrap();
    assert_eq!(format!("{plain} {plain:?}"), "db.example/fleet Target(db.example/fleet)");
}
