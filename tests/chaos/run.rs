//! One run: a fleet, its load, its faults, its healing, its history, the verdict.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use muster_checker::{History, judge};
use muster_proto::v1::{self, end::Reason};
use muster_tests::{client::fresh_key, eventually_blocking, host, until};
use serde_json::{Value, json};

use crate::{
    Store,
    dice::Dice,
    faults::Faults,
    history::Writer,
    load::{Doors, Load, Planner},
    world::World,
};

/// All work has ended by then after the healing: a host that cools down after faults takes no work for a minute.
const HEALED: Duration = Duration::from_secs(150);
/// A process whose task has ended is gone by then: the kernel ends it, on a busy machine.
const GONE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(250);
/// Jobs looked at in one round.
const LOOKS: usize = 5;

/// A line about a run, or what is wrong with a folder that shows it. None: no PostgreSQL here.
pub type Outcome = Result<Option<String>, String>;

/// Plays a seed.
pub async fn run(store: Store, seed: u64, seconds: u64, netem: Option<String>) -> Outcome {
    let began = Instant::now();
    let folder = tempfile::Builder::new().prefix("muster-chaos-").tempdir().expect("a temporary folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("our own folder");
    let witness = folder.path().join("witness");
    fs::write(&witness, "").expect("our own folder");
    fs::set_permissions(&witness, fs::Permissions::from_mode(0o666)).expect("our own file");
    let history = Writer::create(&folder.path().join("history"));

    let nodes = 2 + seed % 2;
    let Some(mut world) = World::start(store, nodes).await else { return Ok(None) };
    if let Some(netem) = netem {
        world.disturb(&netem)?;
    }
    let mark = fresh_key();
    let load = Load {
        doors: Doors::new(world.clients()),
        history: history.clone(),
        jobs: std::sync::Arc::default(),
        mark: mark.clone(),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let planner = Planner::new(world.fleet(), &witness, seconds);
    let clients = tokio::task::spawn_local(load.clone().submit_until(planner, end, Dice::new(seed, 1)));
    let eyes = tokio::task::spawn_local(watch(load.clone(), Dice::new(seed, 2)));
    let mut faults = Faults::new(world.targets(nodes), history.clone(), Dice::new(seed, 3));
    faults.rage(&mut world, end).await;
    let healed = Instant::now();
    let unfinished = heal(&mut world, &mut faults, &load, clients).await;
    let settled = healed.elapsed();
    eyes.abort();

    record(&load).await.map_err(|status| format!("the fleet does not answer: {status}"))?;
    look_for_processes(&history, &mark);
    let folders = world.folders();
    keep_logs(&folders, folder.path());
    tokio::task::spawn_blocking(move || drop(world)).await.map_err(|error| error.to_string())?;
    look_for_parts(&history, &folders);
    history.append(&fs::read_to_string(&witness).expect("our own file"));
    history.write(&json!({"kind": "closed"}));

    let judged = History::read(&history.read()).map_err(|error| error.to_string());
    let (summary, mut wrong) = match &judged {
        Ok(judged) => (judged.summary(), judge(judged).iter().map(ToString::to_string).collect()),
        Err(error) => (String::new(), vec![error.clone()]),
    };
    wrong.extend(unfinished);
    let said = format!(
        "{} faults: {}; {summary}; settled in {:.1} s; {:.1} s",
        store.name(),
        faults.summary(),
        settled.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    if wrong.is_empty() {
        return Ok(Some(said));
    }
    let kept = folder.keep();
    Err(format!("{}\n{said}\nhistory and logs: {}", wrong.join("\n"), kept.display()))
}

/// Sees tasks now and then, ended ones too: their ends must stay.
async fn watch(load: Load, mut dice: Dice) {
    let mut known: BTreeMap<(u64, u32), String> = BTreeMap::new();
    loop {
        let jobs = load.jobs.lock().expect("no client panics").clone();
        for _ in 0..LOOKS {
            let Some(job) = dice.pick(&jobs).copied() else { break };
            let Ok(tasks) = tasks(&load.doors, job).await else { continue };
            for task in tasks {
                let seen = known.entry((job, task.index)).or_default();
                if *seen != task.state {
                    seen.clone_from(&task.state);
                    load.history.write(&json!({"kind": "seen", "job": job, "task": task.index, "state": task.state}));
                }
            }
        }
        until(Instant::now() + PAUSE).await;
    }
}

/// Waits for the clients and for all work, as an operator does who looks after held tasks and drained nodes.
async fn heal(
    world: &mut World,
    faults: &mut Faults,
    load: &Load,
    clients: tokio::task::JoinHandle<()>,
) -> Option<String> {
    let end = Instant::now() + HEALED;
    loop {
        faults.mend(world);
        if clients.is_finished() {
            match jobs(&load.doors).await {
                Ok(jobs) if jobs.iter().all(|job| job.finished_ms.is_some()) => return None,
                Ok(jobs) => {
                    for job in jobs.iter().filter(|job| job.reason.contains(" are held")) {
                        let _ = release(load, job.job).await;
                    }
                }
                Err(_away) => (),
            }
            let _ = resume(&load.doors).await;
        }
        if Instant::now() >= end {
            let jobs = jobs(&load.doors).await.unwrap_or_default();
            let open = jobs.iter().filter(|job| job.finished_ms.is_none());
            let open: Vec<String> = open.map(|job| format!("{} {}: {}", job.job, job.state, job.reason)).collect();
            return Some(format!("not over {HEALED:?} after all was healed: {open:?}"));
        }
        until(Instant::now() + PAUSE).await;
    }
}

/// Faults brought a task down on three hosts by chance: it is ended, and the history says so.
async fn release(load: &Load, job: u64) -> Result<(), tonic::Status> {
    for task in tasks(&load.doors, job).await?.iter().filter(|task| task.state == "waiting") {
        load.history.write(&json!({"kind": "cancelled", "job": job, "task": task.index}));
        let request = v1::CancelRequest { job, tasks: vec![task.index], reason: String::from("it is held") };
        load.doors.call(async |client| client.jobs.clone().cancel(request).await).await?;
    }
    Ok(())
}

/// Faults in a row drain a host: its owner knows better.
async fn resume(doors: &Doors) -> Result<(), tonic::Status> {
    let answer = doors.call(async |client| client.nodes.clone().list(v1::ListNodesRequest {}).await).await?;
    for node in answer.into_inner().nodes.into_iter().filter(|node| node.drain.is_some()) {
        let selector = v1::NodeSelector { nodes: vec![node.name], ..Default::default() };
        let request = v1::CordonRequest { selector: Some(selector), reason: String::from("it is sound") };
        doors.call(async |client| client.nodes.clone().resume(request).await).await?;
    }
    Ok(())
}

async fn jobs(doors: &Doors) -> Result<Vec<v1::JobSummary>, tonic::Status> {
    let request = v1::ListJobsRequest { state: String::new(), limit: 1_000, before: 0 };
    let answer = doors.call(async |client| client.jobs.clone().list(request).await).await?.into_inner();
    if answer.more { Err(tonic::Status::out_of_range("more jobs than one page")) } else { Ok(answer.jobs) }
}

async fn tasks(doors: &Doors, job: u64) -> Result<Vec<v1::Task>, tonic::Status> {
    let request = v1::ListTasksRequest { job, first: 0, limit: 1_000 };
    Ok(doors.call(async |client| client.jobs.clone().list_tasks(request).await).await?.into_inner().tasks)
}

/// What the fleet has in the end.
async fn record(load: &Load) -> Result<(), tonic::Status> {
    for job in jobs(&load.doors).await? {
        let total = job.counts.unwrap_or_default().total;
        load.history.write(&json!({"kind": "job", "job": job.job, "key": job.name, "tasks": total}));
        for task in tasks(&load.doors, job.job).await? {
            let attempts: Vec<Value> = task.attempts.iter().map(attempt).collect();
            load.history.write(&json!({
                "kind": "record", "job": job.job, "task": task.index, "state": task.state, "attempts": attempts
            }));
        }
    }
    Ok(())
}

fn attempt(attempt: &v1::Attempt) -> Value {
    let number = attempt.attempt.map_or(0, |id| id.number);
    let end = attempt.end.clone().and_then(|end| end.reason).map_or_else(String::new, word);
    json!({"number": number, "end": end, "presumed": attempt.presumed, "node": attempt.node_name})
}

/// An end in the word of a task's state.
fn word(end: Reason) -> String {
    match end {
        Reason::Succeeded(_) => String::from("succeeded"),
        Reason::Exited(code) => format!("exited({code})"),
        Reason::Signaled(signal) => format!("signaled({signal})"),
        Reason::OutOfMemory(_) => String::from("out_of_memory"),
        Reason::TimedOut(_) => String::from("timed_out"),
        Reason::Limit(kind) => format!("limit({kind})"),
        Reason::Cancelled(_) => String::from("cancelled"),
        Reason::Drained(_) => String::from("drained"),
        Reason::Preempted(_) => String::from("preempted"),
        Reason::NodeLost(loss) if loss.cause() == v1::node_lost::Cause::Rebooted => String::from("node_lost(rebooted)"),
        Reason::NodeLost(_) => String::from("node_lost(silent)"),
        Reason::SpawnerLost(_) => String::from("spawner_lost"),
        Reason::Refused(fence) => format!("refused({fence})"),
        Reason::StartFailed(failed) => format!("start_failed({}, errno {})", failed.step, failed.errno),
        Reason::OutputLost(_) => String::from("output_lost"),
    }
}

fn look_for_processes(history: &Writer, mark: &str) {
    let gone = eventually_blocking(GONE, || host::processes_with(mark).is_empty().then_some(()));
    if gone.is_none() {
        for (pid, command) in host::processes_with(mark) {
            history.write(&json!({"kind": "left", "what": format!("process {pid} of a job: {command}")}));
        }
    }
}

/// After the fleet's end nothing of it is there.
fn look_for_parts(history: &Writer, folders: &[std::path::PathBuf]) {
    for folder in folders {
        let path = folder.display().to_string();
        for (pid, command) in host::processes_with(&path) {
            history.write(&json!({"kind": "left", "what": format!("process {pid} of a part: {command}")}));
        }
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let node = name.trim_start_matches("muster-");
        for group in host::muster_cgroups().into_iter().filter(|group| group.contains(node)) {
            history.write(&json!({"kind": "left", "what": format!("cgroup {group}")}));
        }
    }
}

fn keep_logs(folders: &[std::path::PathBuf], into: &Path) {
    for entry in folders.iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten()) {
        if entry.path().extension().is_some_and(|kind| kind == "log") {
            let _ = fs::copy(entry.path(), into.join(entry.file_name()));
        }
    }
}
