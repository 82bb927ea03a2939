//! `muster demo`: a fleet on this machine does real work. One task for each
//! regular file below a folder hashes and compresses it in a sandbox; the queue
//! makes the pool grow, its end makes it shrink; every result is checked by
//! other means; nothing is left behind.
//!
//! Nothing here is staged: it waits for what the coordinator tells, and the
//! policy that is printed is the one that decides.

mod display;
mod policy;
mod summary;
mod verify;
mod work;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use muster_core::{ids::JobId, policy::PoolPolicy};
use muster_proto::v1::{
    EventsRequest, FleetEvent, JobProgress, JobTemplate, ListNodesRequest, Node, PoolHistoryRequest, SetPoolRequest,
    SubmitRequest,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};

use crate::{
    args,
    client::Client,
    commands::{self, Context},
    escape,
    exit::{Exit, Failure, Result},
    fences,
    local::{LocalFleet, Settings, policy::Machine, up::Signals},
    output::{Format, now_ms},
    template::{Draft, Profile},
};
use display::Display;
use summary::Summary;
use work::Source;

/// What each task runs: the sum on stdout, the packed bytes in a file.
const SCRIPT: &str = "sha256sum <input && exec gzip -9nc <input >out.gz";
/// Events on their way to the display.
const EVENTS_AHEAD: usize = 1_024;
/// After the last node's drain its processes end within this.
const LAST_EXIT: Duration = Duration::from_secs(30);
/// Between two looks at what makes no event.
const GLANCE: Duration = Duration::from_millis(10);

/// `muster demo`.
pub async fn run(context: &Context, demo: args::Demo) -> Result<ExitCode> {
    let (started, started_ms) = (Instant::now(), now_ms());
    let mut signals = Signals::new()?;
    let folder = checked_folder(demo.folder.as_deref())?;
    let (data, logs) = kept_folders(demo.keep.as_deref())?;
    let mut source = Source { folder, only_sources: demo.folder.is_none(), run: PathBuf::new(), largest: 0 };
    let looked = source.clone();
    source.largest = tokio::select! {
        () = signals.next() => return Err(interrupted()),
        largest = tokio::task::spawn_blocking(move || work::largest(&looked)) => largest.unwrap_or_default(),
    };
    let policy = policy::for_the_work(&Machine::here(&std::env::temp_dir()), source.largest);
    let settings = Settings {
        data,
        logs,
        listen: String::from("127.0.0.1:0"),
        http: None,
        policies: vec![policy::before_the_work(&policy)],
    };
    let fleet = tokio::select! {
        // A start that is dropped closes the pipe, and the children see it.
        () = signals.next() => return Err(interrupted()),
        fleet = LocalFleet::start(settings) => fleet?,
    };
    source.run = fleet.folder().to_path_buf();
    let display = Display::new(context.output.quiet, started_ms);
    let acted = tokio::select! {
        biased;
        () = signals.next() => Err(interrupted()),
        why = fleet.given_up() => Err(Failure::new(Exit::Failed, why)),
        summary = act(&fleet, &policy, source, display) => summary,
    };
    // A failure is explained by the logs, and they go with the run.
    let acted = acted.map_err(|failure| with_logs(failure, &fleet));
    fleet.end().await;
    let mut summary = acted?;
    summary.wall_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let json = demo.json || matches!(context.output.format, Format::Json | Format::Jsonl);
    let text = if json { format!("{:#}\n", summary.value()) } else { summary.text() };
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
    Ok(if summary.is_good() { Exit::Ok } else { Exit::Failed }.into())
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, "interrupted; all that the demo made is ended and removed")
}

fn with_logs(failure: Failure, fleet: &LocalFleet) -> Failure {
    if failure.exit == Exit::Interrupted {
        return failure;
    }
    let tails = fleet.log_tails();
    Failure { sentence: format!("{}\nThe logs end with:\n  {}", failure.sentence, tails.join("\n  ")), ..failure }
}

fn checked_folder(folder: Option<&Path>) -> Result<PathBuf> {
    let folder = folder.unwrap_or(Path::new("."));
    let found = std::fs::metadata(folder).map_err(|error| Failure::file("look into", folder, error))?;
    if !found.is_dir() {
        return Err(Failure::usage(format!("{} is no folder; the demo takes one", escape::path(folder))));
    }
    std::fs::read_dir(folder).map_err(|error| Failure::file("look into", folder, error))?;
    Ok(folder.to_path_buf())
}

/// The coordinator's data and the logs, when they are to be kept.
fn kept_folders(keep: Option<&Path>) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
    let Some(keep) = keep else { return Ok((None, None)) };
    let keep = std::path::absolute(keep).map_err(|error| Failure::file("use", keep, error))?;
    std::fs::create_dir_all(&keep).map_err(|error| Failure::file("make the folder", &keep, error))?;
    Ok((Some(keep.join("coordinator")), Some(keep.join("log"))))
}

/// The demo itself, on a fleet that runs.
async fn act(fleet: &LocalFleet, policy: &PoolPolicy, source: Source, mut display: Display) -> Result<Summary> {
    let client = fleet.client().await?;
    display.say(&format!("a coordinator serves at {}; the first node starts", fleet.address()));
    let mut events = follow_events(&client).await?;

    // The files are read and sent while the first node starts.
    let (work, first) = tokio::join!(work::send(&client, source), first_live_node(&client, &events));
    let (work, first) = (work?, first?);
    catch_up(&mut events, &mut display);
    display.say(&format!(
        "{} files are sent ({} skipped); node {} is ready",
        work.files.len(),
        work.skipped.len(),
        escape::text(&first.name)
    ));
    let without = fences::lacking(Profile::Strict, std::iter::once(&first));
    if !without.is_empty() {
        display.say(&format!("this host lacks these fences; the job is submitted --without {}", without.join(",")));
    }
    display.block(&format!("-- the pool's policy\n{}--", crate::local::policy::to_toml(policy)));

    let mut summary = Summary {
        tasks: work.files.len() as u64,
        bytes: work.files.iter().map(|file| file.bytes).sum(),
        skipped: work.skipped.clone(),
        without: without.clone(),
        ..Summary::default()
    };
    // The work is there before the policy is: it is the queue that makes the pool grow.
    let job = if work.files.is_empty() { None } else { Some(submit(&client, policy, &work, without).await?) };
    fleet.keep_policy(policy);
    set_pool(&client, policy).await?;
    if let Some(job) = job {
        display.say(&format!("job {} is submitted: {} tasks", JobId(job), work.files.len()));
        let last = watch_job(&client, job, &mut events, &mut display).await?;
        let times = last.summary.unwrap_or_default();
        summary.job_ms = times.finished_ms.unwrap_or(times.submitted_ms).saturating_sub(times.submitted_ms);
        display.say("all tasks have ended; each result is checked");
        let total = work.files.len() as u64;
        let verdict = verify::all(&client, job, &work.files, |checked| {
            catch_up(&mut events, &mut display);
            display.checked(checked, total);
        })
        .await?;
        (summary.verified, summary.wrong, summary.nodes) = (verdict.verified, verdict.wrong, verdict.nodes);
        display.clear();
        display.say(&format!("{} of {total} results are right", summary.verified));
    }
    until_no_node(fleet, &client, &mut events, &mut display).await?;
    read_the_store(fleet, &client, &mut summary).await?;
    summary.check();
    Ok(summary)
}

/// The stream of events, and the number of the last one for those who wait for any.
struct Told {
    events: mpsc::Receiver<FleetEvent>,
    nodes: watch::Receiver<u64>,
    seen: usize,
    /// Ends with this, so that the coordinator need not wait for a reader.
    _reader: JoinSet<()>,
}

async fn follow_events(client: &Client) -> Result<Told> {
    let request = EventsRequest { after: 0, follow: true, subject: String::new(), limit: 0 };
    let mut stream = client.fleet().events(request).await?.into_inner();
    let (sender, receiver) = mpsc::channel(EVENTS_AHEAD);
    let (count, counted) = watch::channel(0);
    let mut reader = JoinSet::new();
    reader.spawn(async move {
        // The end of the stream is the end of the coordinator, which others tell.
        while let Ok(Some(event)) = stream.message().await {
            let of_node = event.subject.starts_with("node/");
            let of_pool = event.subject.starts_with("pool/");
            if (of_node || of_pool) && sender.send(event).await.is_err() {
                return;
            }
            if of_node {
                count.send_modify(|count| *count += 1);
            }
        }
    });
    Ok(Told { events: receiver, nodes: counted, seen: 0, _reader: reader })
}

async fn first_live_node(client: &Client, told: &Told) -> Result<Node> {
    let mut changes = told.nodes.clone();
    loop {
        let nodes = client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes;
        if let Some(node) = nodes.into_iter().find(|node| node.state == "ready") {
            return Ok(node);
        }
        // A node that is ready was live, and that is an event.
        tokio::select! {
            changed = changes.changed() => {
                changed.map_err(|_| Failure::new(Exit::Unreachable, "the coordinator ended its stream of events"))?;
            }
            why = failed_pool(client) => return Err(why?),
        }
    }
}

/// Ready when the pool gave up making nodes.
async fn failed_pool(client: &Client) -> Result<Failure> {
    let subject = format!("pool/{}", crate::local::policy::POOL);
    let request = EventsRequest { after: 0, follow: true, subject, limit: 0 };
    let mut events = client.fleet().events(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if event.kind == "paused" {
            let why = format!("no node could be started: {}", escape::text(&event.reason));
            return Ok(Failure::new(Exit::Failed, why));
        }
    }
    Ok(Failure::new(Exit::Unreachable, "the coordinator ended its stream of events"))
}

async fn set_pool(client: &Client, policy: &PoolPolicy) -> Result<()> {
    let request = SetPoolRequest { policy: crate::local::policy::to_toml(policy) };
    client.pools().set(client.ask(request)).await?;
    Ok(())
}

async fn submit(client: &Client, policy: &PoolPolicy, work: &work::Work, without: Vec<String>) -> Result<u64> {
    let request = policy::task_request(policy);
    let draft = Draft {
        command: ["sh", "-c", SCRIPT].map(Into::into).into(),
        options: args::JobOptions {
            name: Some(String::from("demo")),
            cpu: Some(request.cpu_milli),
            memory: Some(request.memory_bytes),
            disk: Some(request.disk_bytes),
            pool: Some(policy.name.0.clone()),
            outputs: vec![verify::OUTPUT.into()],
            without,
            ..args::JobOptions::default()
        },
        ..Draft::default()
    };
    let mut template: JobTemplate = draft.template()?;
    commands::attach_table(client, work.table.clone(), &mut template).await?;
    let request = SubmitRequest { idempotency_key: commands::new_key(), template: Some(template) };
    Ok(commands::ask(client, request).await?.job)
}

/// Until the job has finished; shows what happens meanwhile.
async fn watch_job(client: &Client, job: u64, told: &mut Told, display: &mut Display) -> Result<JobProgress> {
    let request = muster_proto::v1::WatchJobRequest { job, follow: true };
    let mut steps = client.jobs().watch(request).await?.into_inner();
    loop {
        tokio::select! {
            event = told.events.recv() => match event {
                Some(event) => tell(told, &event, display),
                None => return Err(Failure::new(Exit::Unreachable, "the coordinator ended its stream of events")),
            },
            step = steps.message() => {
                let Some(step) = step? else {
                    return Err(Failure::new(Exit::Unreachable, "the coordinator ended its stream of progress"));
                };
                if let Some(counts) = step.summary.as_ref().and_then(|summary| summary.counts) {
                    display.tasks(&counts);
                }
                if step.finished {
                    display.clear();
                    return Ok(step);
                }
            }
        }
    }
}

/// What has happened since the last look, before anything is said that follows from it.
fn catch_up(told: &mut Told, display: &mut Display) {
    while let Ok(event) = told.events.try_recv() {
        tell(told, &event, display);
    }
}

/// One event for the person, if it is one that matters to them.
fn tell(told: &mut Told, event: &FleetEvent, display: &mut Display) {
    let (subject, reason) = (escape::text(&event.subject), escape::text(&event.reason));
    let line = match event.kind.as_str() {
        "connected" => {
            told.seen += 1;
            format!("{subject} has joined")
        }
        "gone" => {
            told.seen = told.seen.saturating_sub(1);
            format!("{subject} is gone")
        }
        "scaled" => format!("{subject} is scaled: {reason}"),
        "drain_requested" => format!("{subject} is drained: {reason}"),
        "drain_proved" => format!("{subject} has proved that nothing is left on it"),
        "host_failed" | "paused" | "lost" | "silent" | "drain_refused" | "delete_failed" => {
            format!("{subject}: {}: {reason}", event.kind)
        }
        _ => return,
    };
    display.nodes(told.seen);
    display.say_of(event.time_ms, &line);
}

/// Until the policy has drained all nodes and their processes have ended.
async fn until_no_node(fleet: &LocalFleet, client: &Client, told: &mut Told, display: &mut Display) -> Result<()> {
    loop {
        catch_up(told, display);
        let nodes = client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes;
        if nodes.iter().all(|node| node.liveness == "gone") {
            break;
        }
        match told.events.recv().await {
            Some(event) => tell(told, &event, display),
            None => return Err(Failure::new(Exit::Unreachable, "the coordinator ended its stream of events")),
        }
    }
    let ended = async {
        while !fleet.has_no_host() {
            sleep(GLANCE).await;
        }
    };
    let late = |_| Failure::new(Exit::Failed, "the processes of a drained node do not end");
    tokio::time::timeout(LAST_EXIT, ended).await.map_err(late)
}

/// All that the summary says of the fleet, as the store has it.
async fn read_the_store(fleet: &LocalFleet, client: &Client, summary: &mut Summary) -> Result<()> {
    let request = PoolHistoryRequest { pool: String::from(crate::local::policy::POOL) };
    summary.decisions = client.pools().history(client.ask(request)).await?.into_inner().decisions;
    let request = EventsRequest { after: 0, follow: false, subject: String::new(), limit: 0 };
    let mut stream = client.fleet().events(client.ask(request)).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        if event.subject.starts_with("node/") {
            events.push(event);
        }
    }
    let ever: BTreeSet<String>;
    (summary.nodes_peak, summary.drains, ever) = summary::from_history(&events, &fleet.exits());
    for node in ever {
        summary.nodes.entry(node).or_default();
    }
    let nodes = client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes;
    summary.nodes_end = nodes.iter().filter(|node| node.liveness != "gone").count();
    Ok(())
}
