//! From `kill -9` of the leading coordinator to the first dispatch by another:
//! `cargo bench -p muster-tests --bench failover [-- RUNS]`, after `cargo build -p muster`.
//! Three coordinators on one PostgreSQL, a node that runs a job meanwhile. Printed: until the
//! standby answers a submit, and until the job that was submitted has run; median and worst.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark may panic")]

use std::time::Instant;

use muster_proto::v1;
use muster_tests::{Client, HighlyAvailable, NodeOptions, WAIT, client::fresh_key, eventually};

/// The same key at every coordinator that is left: whichever leads takes it.
async fn submit(clients: Vec<Client>, template: &v1::JobTemplate) -> (Client, u64) {
    let key = fresh_key();
    let asks = clients.into_iter().map(|client| {
        let (key, template) = (key.clone(), template.clone());
        Box::pin(async move {
            let taken = async || client.try_submit(&key, template.clone()).await.ok();
            let job = eventually("the coordinator takes a job", WAIT, taken).await.job;
            (client, job)
        })
    });
    futures_util::future::select_all(asks).await.0
}

#[tokio::main]
async fn main() {
    let runs = std::env::args().find_map(|argument| argument.parse::<usize>().ok()).unwrap_or(20);
    let Some(mut ha) = HighlyAvailable::start(3).await else {
        println!("PostgreSQL is not installed");
        return;
    };
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let running = ha.fleet.client.submit(ha.fleet.script("while :; do sleep 1; done")).await;
    ha.fleet.client.running(running, 1).await;
    let template = ha.fleet.script("echo here");
    let (mut answered, mut dispatched) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        let leader = ha.leader().await;
        let others = ha.members.iter().enumerate().filter(|(number, _)| *number != leader);
        let clients = others.map(|(_, member)| member.client.clone()).collect();
        let killed = Instant::now();
        ha.kill(leader);
        let (client, job) = submit(clients, &template).await;
        let answer = killed.elapsed();
        client.watch_to_end(job).await;
        let done = killed.elapsed();
        println!("run {run}: answered after {answer:.2?}, dispatched and run after {done:.2?}");
        answered.push(answer);
        dispatched.push(done);
        ha.launch(leader).await;
    }
    ha.leader().await;
    let tasks = ha.fleet.client.tasks(running).await;
    assert_eq!(tasks[0].attempts.len(), 1, "the job that ran all the time is the same one");
    assert!(tasks[0].attempts[0].end.is_none(), "and it still runs");
    for (name, spans) in [("answered", &mut answered), ("dispatched and run", &mut dispatched)] {
        spans.sort();
        println!("{name}: median {:.2?}, worst {:.2?} of {runs}", spans[spans.len() / 2], spans[spans.len() - 1]);
    }
}
