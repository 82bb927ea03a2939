//! A driver that leads, and one that leads no more.

use muster_core::{
    event::HostSample,
    ids::{Actor, PoolName},
    resources::Resources,
};
use muster_proto::v1::coordinator_message;

use super::*;
use crate::{blobs::Blobs, store::EmbeddedStore};

fn hello() -> Hello {
    Hello {
        boot_id: "boot".into(),
        agent_start: 1,
        stream: 1,
        instance: "instance".into(),
        capacity: Resources { cpu_milli: 1_000, memory_bytes: 1 << 30, disk_bytes: 1 << 30 },
        labels: Default::default(),
        fences: Default::default(),
        held: Vec::new(),
        closed_for_drain: Default::default(),
        version: "test".into(),
    }
}

/// The driver of a new fleet with one node, its end, and what it needs to live.
async fn leading(
    folder: &std::path::Path,
    leadership: &Leadership,
) -> (Handle, oneshot::Receiver<Result<(), Failed>>, NodeId) {
    let store = EmbeddedStore::create(&folder.join("fleet.db")).unwrap();
    let reader = Arc::new(store.reader().unwrap());
    let blobs = Arc::new(Blobs::open(&folder.join("blobs")).unwrap());
    let (hosts, _) = mpsc::channel(1);
    let setup = Setup {
        fleet: Fleet::default(),
        store: Box::new(store),
        leadership: leadership.clone(),
        term: Term(7),
        commits: 0,
        seal: Seal::new(b"secret"),
        clock: Clock::after(Timestamp(0)),
        members: Arc::default(),
        vitals: Arc::default(),
        bodies: Arc::new(Bodies::new(reader, blobs)),
        metrics: Arc::default(),
        hosts,
    };
    let (handle, end) = start(setup);
    let enrol = |request| Event::Enroll {
        request,
        name: "web-01".into(),
        pool: PoolName("local".into()),
        host: None,
        key: [1; 32],
        shown: NodeId(0),
    };
    let Ok(Reply::Enrolled { node }) = handle.ask(enrol).await.unwrap() else { panic!("it is enrolled") };
    (handle, end, node)
}

async fn deposed(end: oneshot::Receiver<Result<(), Failed>>) {
    let end = tokio::time::timeout(std::time::Duration::from_secs(20), end).await.expect("it ends");
    assert!(matches!(end.unwrap(), Err(Failed::Deposed)));
}

#[tokio::test]
async fn a_heartbeat_is_answered_by_a_leader_alone() {
    let folder = tempfile::tempdir().unwrap();
    let leadership = Leadership::alone();
    let (handle, end, node) = leading(folder.path(), &leadership).await;
    let (outbox, mut orders) = mpsc::channel(16);
    let session = handle.connect(node, [1; 32], hello(), Seen::default(), outbox).await.unwrap();
    let beat = |sequence| Event::Heartbeat { node, session, sequence, sample: HostSample::default(), held: Vec::new() };
    handle.event(beat(1)).await.unwrap();
    let mut last = None;
    while !matches!(last, Some(Order::Message(coordinator_message::Message::Lease(_)))) {
        last = orders.recv().await;
        assert!(last.is_some(), "the stream stands until it was answered");
    }
    // Nothing is to be stored for the second one: no fence of the store would stop its answer.
    leadership.end();
    handle.event(beat(2)).await.unwrap();
    deposed(end).await;
    assert!(orders.recv().await.is_none(), "no lease, and nothing else");
}

#[tokio::test]
async fn a_deposed_leader_answers_neither_a_change_nor_a_question() {
    let folder = tempfile::tempdir().unwrap();
    let leadership = Leadership::alone();
    let (handle, end, node) = leading(folder.path(), &leadership).await;
    leadership.end();
    let asked = handle.query(|fleet, _| fleet.node_counts());
    let cordon = |request| Event::Cordon { request, node, actor: Actor("ana".into()), reason: String::new() };
    assert!(asked.await.is_err(), "what it knows may be old");
    assert!(handle.ask(cordon).await.is_err());
    deposed(end).await;
}

/// A data base refuses a message of a gigabyte, and would again and again.
#[test]
fn a_commit_has_an_end_and_takes_one_job_at_least() {
    let most = limits::COMMIT_BYTES_MAX;
    assert_eq!(enough_for_one_commit([0, most, 0]), None);
    assert_eq!(enough_for_one_commit([most, 0, 1, 5]), Some(3));
    assert_eq!(enough_for_one_commit([most * 2, 1]), Some(1));
}
