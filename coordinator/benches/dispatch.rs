//! Tasks a second through real gRPC, TLS, the durable store and the core, with
//! hosts that only pretend to run: `cargo bench -p muster-coordinator [-- TASKS HOSTS]`.
//! Beside it, in the same run, what one synced commit costs here: the limit that
//! batching works against.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark may panic")]

#[path = "../tests/support/mod.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod support;

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use muster_proto::v1::{self, jobs_client::JobsClient};
use support::{Coordinator, FakeHost, FakeSession, succeeded, template};

async fn pretend(mut session: FakeSession) {
    while let Ok(Some(order)) = session.hear.message().await {
        let Some(v1::coordinator_message::Message::Start(starts)) = order.message else { continue };
        let reports = starts.attempts.iter().flat_map(|start| {
            use v1::attempt_report::Change;
            let report =
                |change| v1::AttemptReport { attempt: start.attempt, epoch: start.epoch, change: Some(change) };
            let ended = v1::AttemptEnded { tails: Vec::new(), ..succeeded("") };
            [report(Change::Started(v1::AttemptStarted::default())), report(Change::Ended(ended))]
        });
        let reports = v1::AttemptReports { reports: reports.collect() };
        if session.say.send(support::message(v1::agent_message::Message::Reports(reports))).await.is_err() {
            return;
        }
    }
}

async fn run_job(jobs: &mut JobsClient<tonic::transport::Channel>, key: String, tasks: u32) -> (Duration, Duration) {
    let begun = Instant::now();
    let request = v1::SubmitRequest { idempotency_key: key, template: Some(template(tasks)) };
    let job = jobs.submit(request).await.unwrap().into_inner().job;
    let accepted = begun.elapsed();
    let mut progress = jobs.watch(v1::WatchJobRequest { job, follow: true }).await.unwrap().into_inner();
    while let Some(next) = progress.message().await.unwrap() {
        if next.finished {
            assert_eq!(next.summary.unwrap().counts.unwrap().succeeded, tasks);
            break;
        }
    }
    (accepted, begun.elapsed())
}

/// One append with a sync, over and over.
fn synced_write(folder: &std::path::Path) -> Duration {
    const ROUNDS: u32 = 200;
    let mut file = std::fs::File::create(folder.join("sync")).unwrap();
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        file.write_all(&[7; 4_096]).unwrap();
        file.sync_data().unwrap();
    }
    begun.elapsed() / ROUNDS
}

#[tokio::main]
async fn main() {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<u32>().ok());
    let (tasks, hosts) = (numbers.next().unwrap_or(50_000), numbers.next().unwrap_or(1));
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path()).await;
    for number in 0..hosts {
        let mut host = FakeHost::join(&coordinator, &format!("host-{number}")).await;
        tokio::spawn(pretend(host.connect(&coordinator, Vec::new()).await));
    }
    let mut jobs = JobsClient::new(coordinator.operator().await);
    run_job(&mut jobs, "warm".into(), 1_000).await;
    let (accepted, whole) = run_job(&mut jobs, "array".into(), tasks).await;
    let rate = f64::from(tasks) / whole.as_secs_f64();
    println!("array of {tasks} on {hosts} hosts: accepted in {accepted:.1?}, done in {whole:.2?}, {rate:.0} tasks/s");
    let mut alone: Vec<Duration> = Vec::new();
    for number in 0..200 {
        alone.push(run_job(&mut jobs, format!("alone-{number}"), 1).await.1);
    }
    alone.sort();
    let synced = synced_write(folder.path());
    println!(
        "one job after another: median {:.2?}, 95th {:.2?}; a synced write alone {synced:.2?}",
        alone[100], alone[190]
    );
    coordinator.stop().await;
}
