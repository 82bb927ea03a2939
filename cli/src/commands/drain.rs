//! Drains: `muster node drain` begins one, of all chosen nodes at once or in
//! turn, and `muster drain ...` shows and ends those that go in turn.

use std::process::ExitCode;

use muster_core::{ids::JobId, limits};
use muster_proto::v1::{
    Blocker, CancelRollingRequest, DrainRequest, DrainResponse, Elsewhere, EventsRequest, ListRollingRequest,
    ListRollingResponse, Node as Shown, OnDrain, RollingDrain,
};
use serde_json::{Value, json};
use tonic::Status;

use super::{
    Context,
    node::{all_nodes, exactly, targets, until},
    partial, show,
    watch::Breaks,
};
use crate::{
    args::{Drain, Drains, Then},
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    output::{List, now_ms, span, time_value},
};

/// Runs one command.
pub async fn run(context: &Context, command: Drains) -> Result<ExitCode> {
    match command {
        Drains::List => list(context).await,
        Drains::Show { drain } => show_one(context, drain).await,
        Drains::Cancel { drain, reason } => cancel(context, drain, reason).await,
    }
}

/// Drains nodes at once or in turn, or says what that would do.
pub async fn drain(context: &Context, request: Drain) -> Result<ExitCode> {
    let client = context.connect().await?;
    let nodes = targets(&client, &request.selector).await?;
    if request.reason.trim().is_empty() {
        return Err(Failure::usage("a drain needs a reason that others can read: --reason TEXT"));
    }
    let span_ms = request
        .deadline
        .map_or(limits::DRAIN_DEADLINE.0, |span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX / 2));
    // In turn it is a span of each node's own; at once a moment, so that a repeated request puts nothing off.
    let from = if request.max_parallel.is_some() { 0 } else { now_ms() };
    let deadline_ms = (!request.no_deadline).then(|| from.saturating_add(span_ms));
    let mut ask = DrainRequest {
        selector: exactly(&nodes),
        reason: request.reason.clone(),
        deadline_ms,
        then: String::from(match request.then {
            Then::Nothing => "nothing",
            Then::Stop => "stop",
            Then::Poweroff => "poweroff",
            Then::Delete => "delete",
        }),
        dry_run: true,
        at_once: request.max_parallel.map(|part| part.of(nodes.len())),
    };
    if request.dry_run || (nodes.len() > 1 && !context.global.yes) {
        let plan = client.nodes().drain(client.ask(ask.clone())).await?.into_inner();
        if request.dry_run {
            return show_plan(context, &nodes, &plan);
        }
        context.confirm(&effect(&nodes, &plan))?;
    }
    ask.dry_run = false;
    let at_once = ask.at_once;
    let done = client.nodes().drain(client.ask(ask)).await?.into_inner();
    if done.nodes.is_empty() {
        return partial(0, &done.refused, &context.output);
    }
    let names: Vec<String> = done.nodes.iter().map(|node| node.name.clone()).collect();
    let undo = match &done.rolling {
        Some(rolling) => format!("muster drain cancel r{}", rolling.rolling),
        None => format!("muster node resume {}", names.join(",")),
    };
    if request.wait {
        return wait_drained(context, &client, &done, &undo).await;
    }
    show_drains(context, &done.nodes, &done.blockers, at_once)?;
    context.output.say(&format!("The drain goes on; `{undo}` undoes it."));
    partial(done.nodes.len(), &done.refused, &context.output)
}

fn effect(nodes: &[Shown], plan: &DrainResponse) -> String {
    let requeued = plan.blockers.iter().filter(|blocker| blocker.on_drain() != OnDrain::Finish).count();
    let lost: u64 = plan
        .blockers
        .iter()
        .filter(|blocker| blocker.on_drain() == OnDrain::Requeue)
        .map(|blocker| blocker.running_ms)
        .sum();
    let ended = plan.blockers.iter().filter(|blocker| blocker.ended_by_deadline).count();
    format!(
        "This drains {} nodes with {} running tasks; {requeued} of them begin again elsewhere ({} of work lost), {ended} \
         more do if they still run at the deadline",
        nodes.len(),
        plan.blockers.len(),
        span(lost)
    )
}

fn show_plan(context: &Context, nodes: &[Shown], plan: &DrainResponse) -> Result<ExitCode> {
    show_drains(context, nodes, &plan.blockers, None)?;
    for place in &plan.elsewhere {
        context.output.say(&elsewhere_sentence(place));
    }
    for sentence in &plan.refused {
        context.output.say(&format!("muster: {}", escape::text(sentence)));
    }
    let pending = nodes.iter().any(|node| !matches!(node.duty.as_str(), "draining" | "drained" | "stopping"));
    Ok(if pending { Exit::Pending } else { Exit::Ok }.into())
}

fn elsewhere_sentence(place: &Elsewhere) -> String {
    let (job, reason) = (JobId(place.job), escape::text(&place.reason));
    match place.nodes {
        0 => format!("job {job}: no other node has room for a task of it now: {reason}"),
        1 => format!("job {job}: 1 other node has room for a task of it now, {reason}"),
        more => format!("job {job}: {more} other nodes have room for a task of it now, such as {reason}"),
    }
}

/// Each node with what it waits for; `at_once` is the budget of those that wait for their turn.
fn show_drains(context: &Context, nodes: &[Shown], blockers: &[Blocker], at_once: Option<u32>) -> Result<()> {
    let mut list = List::new("DrainList", &["NODE", "STATE", "RUNNING", "OLDEST", "WILL END BY", "NOTE"]);
    for node in nodes {
        let own: Vec<&Blocker> = blockers.iter().filter(|blocker| blocker.node == node.node).collect();
        let oldest = own.iter().max_by_key(|blocker| blocker.running_ms);
        let deadline = node.drain.as_ref().and_then(|drain| drain.deadline_ms);
        let last_end = own
            .iter()
            .map(|blocker| blocker.ends_by_ms.or(deadline))
            .try_fold(0, |last: u64, end| end.map(|end| last.max(end)));
        let expected =
            own.iter().map(|blocker| blocker.expected_ms).try_fold(0, |last: u64, at| at.map(|at| last.max(at)));
        list.push(
            vec![
                (&node.name).into(),
                context.output.state(&node.state),
                own.len().to_string().into(),
                oldest.map_or_else(|| String::from("-"), |blocker| span(blocker.running_ms)).into(),
                match (own.is_empty(), expected, last_end) {
                    (true, ..) => "-".into(),
                    (false, Some(ms), _) => format!("{} (est)", context_until(context, ms)).into(),
                    (false, None, Some(ms)) => context_until(context, ms).into(),
                    (false, None, None) => "no limit".into(),
                },
                note(node, oldest.copied(), at_once).into(),
            ],
            drain_value(node, &own),
        );
    }
    context.output.list(&list)
}

fn note(node: &Shown, oldest: Option<&Blocker>, at_once: Option<u32>) -> String {
    let waits = node.rolling.is_some() && node.drain.is_none();
    match (waits, at_once, oldest) {
        (true, Some(at_once), _) => format!("waits for its turn (at most {at_once} at once)"),
        (true, None, _) => String::from("waits for its turn"),
        (false, _, None) => String::new(),
        (false, _, Some(blocker)) => {
            let id = blocker.attempt.unwrap_or_default();
            let how = match (blocker.on_drain(), blocker.ended_by_deadline) {
                (OnDrain::Requeue, _) => "will be requeued",
                (OnDrain::Checkpoint, _) => "saves, and will be requeued",
                (_, true) => "may finish until the deadline",
                (_, false) => "may finish",
            };
            format!("task {}.{} {how}", JobId(id.job), id.task)
        }
    }
}

fn context_until(context: &Context, ms: u64) -> String {
    if context.output.terminal { until(ms) } else { crate::output::rfc3339(ms) }
}

fn drain_value(node: &Shown, blockers: &[&Blocker]) -> Value {
    let blockers: Vec<Value> = blockers
        .iter()
        .map(|blocker| {
            let id = blocker.attempt.unwrap_or_default();
            json!({
                "attempt": format!("{}.{}.{}", JobId(id.job), id.task, id.number), "running_ms": blocker.running_ms,
                "ends_by": time_value(blocker.ends_by_ms), "expected_end": time_value(blocker.expected_ms),
                "ended_by_deadline": blocker.ended_by_deadline,
                "on_drain": blocker.on_drain().as_str_name().trim_start_matches("ON_DRAIN_").to_lowercase(),
            })
        })
        .collect();
    let mut value = show::node(node);
    value["blockers"] = json!(blockers);
    value
}

fn is_drained(node: &Shown) -> bool {
    node.drain.as_ref().is_some_and(|drain| drain.proved_ms.is_some())
        || matches!(node.duty.as_str(), "drained" | "stopping")
        || node.liveness == "gone"
}

async fn wait_drained(context: &Context, client: &Client, done: &DrainResponse, undo: &str) -> Result<ExitCode> {
    let refused = done.refused.clone();
    let rolling = done.rolling.as_ref().map(|rolling| rolling.rolling);
    let is_waited = |node: &&Shown| rolling.is_none() || node.rolling == rolling || node.drain.is_some();
    let waited: Vec<String> = done.nodes.iter().filter(is_waited).map(|node| node.name.clone()).collect();
    let see = rolling
        .map_or_else(|| format!("muster node list {}", waited.join(",")), |id| format!("muster drain show r{id}"));
    let way_back = format!("`{see}` shows it; `{undo}` undoes it.");
    let all = async {
        // Every change of a node is an event: look at the nodes once, then after each.
        let request = EventsRequest { follow: true, limit: 1, ..EventsRequest::default() };
        let mut events = client.fleet().events(request.clone()).await?.into_inner();
        let mut breaks = Breaks::default();
        let mut left_before = usize::MAX;
        loop {
            let nodes = all_nodes(client).await?;
            let of_drain = |name: &String| nodes.iter().rev().find(|node| node.name == *name);
            let resumed = waited.iter().find(|name| of_drain(name).is_some_and(is_off));
            if let Some(name) = resumed {
                let sentence = format!("node {} was resumed; its drain is off", escape::text(name));
                return Err(Failure::new(Exit::Conflict, sentence));
            }
            let left: Vec<&String> =
                waited.iter().filter(|name| of_drain(name).is_some_and(|node| !is_drained(node))).collect();
            if left.is_empty() {
                return Ok(nodes.into_iter().filter(|node| waited.contains(&node.name)).collect::<Vec<_>>());
            }
            if left.len() != left_before {
                left_before = left.len();
                let estimate = match rolling {
                    Some(id) => one(client, id).await.ok().and_then(|(rolling, _)| rolling.time_left_ms),
                    None => None,
                };
                let (drained, all) = (waited.len() - left.len(), waited.len());
                context.output.say(&format!("{drained} of {all} nodes are drained{}", about(estimate)));
            }
            let mut broken = match events.message().await {
                Ok(Some(_)) => {
                    breaks.works();
                    continue;
                }
                Ok(None) => Status::unavailable("the coordinator ended the stream"),
                Err(status) => status,
            };
            // The drain goes on without us, also over a restart of the coordinator.
            events = loop {
                breaks.wait(client, broken).await?;
                match client.fleet().events(request.clone()).await {
                    Ok(events) => break events.into_inner(),
                    Err(status) => broken = status,
                }
            };
        }
    };
    let nodes = context.wait("the drain", &way_back, all).await?;
    show_drains(context, &nodes, &[], None)?;
    partial(waited.len(), &refused, &context.output)
}

/// It neither drains nor waits for its turn.
fn is_off(node: &Shown) -> bool {
    node.drain.is_none() && node.rolling.is_none() && node.liveness == "live"
}

fn about(left_ms: Option<u64>) -> String {
    left_ms.map(|ms| format!(", about {} left", span(ms))).unwrap_or_default()
}

async fn all(client: &Client) -> Result<ListRollingResponse> {
    Ok(client.nodes().list_rolling(client.ask(ListRollingRequest::default())).await?.into_inner())
}

/// A rolling drain that goes on, with its nodes.
async fn one(client: &Client, id: u64) -> Result<(RollingDrain, Vec<Shown>)> {
    let all = all(client).await?;
    let found = all.rolling.into_iter().find(|rolling| rolling.rolling == id);
    let missing = || format!("there is no rolling drain r{id}, or it is over; `muster events` has how it ended");
    let rolling = found.ok_or_else(|| Failure::new(Exit::NotFound, missing()))?;
    let nodes = all.nodes.into_iter().filter(|node| node.rolling == Some(id)).collect();
    Ok((rolling, nodes))
}

async fn list(context: &Context) -> Result<ExitCode> {
    let client = context.connect().await?;
    let columns = ["DRAIN", "DRAINED", "DRAINING", "WAITING", "AT ONCE", "LEFT", "AGE", "REASON"];
    let mut list = List::new("RollingDrainList", &columns);
    for rolling in all(&client).await?.rolling {
        list.push(
            vec![
                format!("r{}", rolling.rolling).into(),
                format!("{}/{}", rolling.drained, rolling.nodes).into(),
                rolling.draining.len().to_string().into(),
                rolling.waiting.len().to_string().into(),
                rolling.at_once.to_string().into(),
                rolling.time_left_ms.map_or_else(|| String::from("-"), |ms| format!("{} (est)", span(ms))).into(),
                span(context.output.now_ms.saturating_sub(rolling.requested_ms)).into(),
                format!("{} ({})", rolling.reason, rolling.actor).into(),
            ],
            rolling_value(&rolling),
        );
    }
    context.output.list(&list)?;
    Ok(Exit::Ok.into())
}

async fn show_one(context: &Context, id: u64) -> Result<ExitCode> {
    let client = context.connect().await?;
    let (rolling, nodes) = one(&client, id).await?;
    show_drains(context, &nodes, &rolling.blockers, Some(rolling.at_once))?;
    let (drained, all) = (rolling.drained, rolling.nodes);
    context.output.say(&format!(
        "{drained} of {all} nodes are drained{}: {} ({})",
        about(rolling.time_left_ms),
        escape::text(&rolling.reason),
        escape::text(&rolling.actor)
    ));
    Ok(Exit::Ok.into())
}

async fn cancel(context: &Context, id: u64, reason: String) -> Result<ExitCode> {
    let client = context.connect().await?;
    let request = CancelRollingRequest { rolling: id, reason };
    let done = client.nodes().cancel_rolling(client.ask(request)).await?.into_inner();
    context.output.say(&format!("r{id} is over; {} nodes stay in service", done.nodes.len()));
    Ok(Exit::Ok.into())
}

fn rolling_value(rolling: &RollingDrain) -> Value {
    json!({
        "drain": format!("r{}", rolling.rolling), "at_once": rolling.at_once, "within_ms": rolling.within_ms,
        "then": rolling.then, "reason": rolling.reason, "actor": rolling.actor,
        "requested_at": time_value(Some(rolling.requested_ms)), "nodes": rolling.nodes, "drained": rolling.drained,
        "draining": rolling.draining, "waiting": rolling.waiting, "time_left_ms": rolling.time_left_ms,
    })
}
