//! `muster node ...`: see, cordon, drain and remove nodes. What touches more
//! than one node, and any `--force`, first says its effect and asks.

use std::process::ExitCode;

use muster_core::{
    ids::JobId,
    resources::{Bytes, Cores},
};
use muster_proto::v1::{
    Attempt, CordonRequest, EventsRequest, InspectNodeRequest, ListNodesRequest, Node as Shown, NodeSelector,
    ReleaseBrakeRequest, RemoveNodeRequest,
};
use serde_json::json;

use super::{Context, drain, fleet, partial, show};
use crate::{
    args::{Node, Selector},
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    hostlist,
    output::{List, now_ms, span},
};

/// Runs one command.
pub async fn run(context: &Context, command: Node) -> Result<ExitCode> {
    match command {
        Node::List { selector } => list(context, &selector).await,
        Node::Inspect { node } => inspect(context, &node).await,
        Node::Cordon { selector, reason } => change(context, &selector, &reason, Verb::Cordon).await,
        Node::Uncordon { selector, reason } => change(context, &selector, &reason, Verb::Uncordon).await,
        Node::Resume { selector, reason } => change(context, &selector, &reason, Verb::Resume).await,
        Node::Drain(request) => drain::drain(context, request).await,
        Node::Remove { selector, force, reason } => remove(context, &selector, force, &reason).await,
        Node::ReleaseBrake { reason } => release_brake(context, reason).await,
        Node::Events { node, follow } => {
            let client = context.connect().await?;
            let name = client
                .nodes()
                .inspect(client.ask(InspectNodeRequest { node }))
                .await?
                .into_inner()
                .node
                .unwrap_or_default()
                .name;
            let request = EventsRequest { subject: format!("node/{name}"), follow, ..EventsRequest::default() };
            fleet::show_events(context, &client, request).await
        }
    }
}

async fn release_brake(context: &Context, reason: String) -> Result<ExitCode> {
    let client = context.connect().await?;
    let silent: Vec<Shown> = all_nodes(&client).await?.into_iter().filter(|node| node.liveness == "silent").collect();
    let tasks: u32 = silent.iter().map(|node| node.running).sum();
    let names: Vec<&str> = silent.iter().map(|node| node.name.as_str()).collect();
    context.confirm(&format!(
        "{} silent nodes are given up, with {tasks} running tasks, which may still run there: {}",
        silent.len(),
        names.join(", ")
    ))?;
    let answer = client.fleet().release_brake(client.ask(ReleaseBrakeRequest { reason })).await?.into_inner();
    let text = match answer.held {
        true => format!("{} silent nodes are given up, one after the other\n", answer.silent),
        false => String::from("no eviction rested; nothing changed\n"),
    };
    let value = json!({ "held": answer.held, "silent": answer.silent });
    context.output.one("BrakeReleased", &value, &text, text.trim())?;
    Ok(Exit::Ok.into())
}

pub(super) async fn all_nodes(client: &Client) -> Result<Vec<Shown>> {
    Ok(client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes)
}

/// Names of a selector; each part is a host list.
fn names(selector: &Selector) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for text in &selector.nodes {
        names.extend(hostlist::expand(text).map_err(Failure::usage)?);
    }
    Ok(names)
}

fn is_selected(node: &Shown, names: &[String], selector: &Selector) -> bool {
    (names.is_empty() || names.contains(&node.name) || names.contains(&node.node.to_string()))
        && selector.label.iter().all(|(key, value)| node.labels.get(key) == Some(value))
        && selector.pool.as_ref().is_none_or(|pool| *pool == node.pool)
}

/// The nodes that a command touches: every named one must exist.
pub(super) async fn targets(client: &Client, selector: &Selector) -> Result<Vec<Shown>> {
    let names = names(selector)?;
    if names.is_empty() && selector.label.is_empty() && selector.pool.is_none() {
        return Err(Failure::usage("name the nodes: web-01, web-[01-03], --label KEY=VALUE or --pool POOL"));
    }
    let nodes = all_nodes(client).await?;
    all_known(&names, &nodes)?;
    let found: Vec<Shown> = nodes.into_iter().filter(|node| is_selected(node, &names, selector)).collect();
    if found.is_empty() {
        return Err(Failure::new(Exit::NotFound, "no node is selected by these labels and this pool"));
    }
    Ok(found)
}

/// Every named node must exist.
fn all_known(names: &[String], nodes: &[Shown]) -> Result<()> {
    let is_known = |name: &String| nodes.iter().any(|node| node.name == *name || node.node.to_string() == *name);
    match names.iter().find(|name| !is_known(name)) {
        None => Ok(()),
        Some(missing) => Err(Failure::new(
            Exit::NotFound,
            format!("there is no node {}; `muster node list` shows those that are known", escape::text(missing)),
        )),
    }
}

/// Exactly the nodes that were shown, not those that the labels would name a moment later.
pub(super) fn exactly(nodes: &[Shown]) -> Option<NodeSelector> {
    Some(NodeSelector { nodes: nodes.iter().map(|node| node.name.clone()).collect(), ..NodeSelector::default() })
}

fn node_list() -> List {
    List::new(
        "NodeList",
        &["NODE", "POOL", "STATE", "CPU", "MEM", "TASKS", "AGE", "+AGENT", "+FENCES", "+LABELS", "REASON"],
    )
}

fn push_node(list: &mut List, node: &Shown, context: &Context) {
    let (have, taken) = (node.capacity.unwrap_or_default(), node.allocated.unwrap_or_default());
    let mut why = node.reason.clone();
    if !why.is_empty() && !node.actor.is_empty() {
        let since = node.duty_since_ms.map(|ms| format!(", {}", context.output.time(ms))).unwrap_or_default();
        why.push_str(&format!(" ({}{since})", node.actor));
    }
    let labels: std::collections::BTreeMap<_, _> = node.labels.iter().collect();
    let queued = if node.queued > 0 { format!("+{}", node.queued) } else { String::new() };
    list.push(
        vec![
            (&node.name).into(),
            (&node.pool).into(),
            context.output.state(&node.state),
            format!("{}/{}", Cores(taken.cpu_milli), Cores(have.cpu_milli)).into(),
            format!("{}/{}", Bytes(taken.memory_bytes), Bytes(have.memory_bytes)).into(),
            format!("{}{queued}", node.running).into(),
            if node.joined_ms == 0 {
                "-".into()
            } else {
                span(context.output.now_ms.saturating_sub(node.joined_ms)).into()
            },
            (&node.agent_version).into(),
            node.fences.join(",").into(),
            labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",").into(),
            why.into(),
        ],
        show::node(node),
    );
}

async fn list(context: &Context, selector: &Selector) -> Result<ExitCode> {
    let client = context.connect().await?;
    let names = names(selector)?;
    let mut list = node_list();
    let nodes = all_nodes(&client).await?;
    all_known(&names, &nodes)?;
    for node in nodes.iter().filter(|node| is_selected(node, &names, selector)) {
        push_node(&mut list, node, context);
    }
    context.output.list(&list)?;
    Ok(Exit::Ok.into())
}

async fn inspect(context: &Context, name: &str) -> Result<ExitCode> {
    let client = context.connect().await?;
    let request = InspectNodeRequest { node: name.to_owned() };
    let detail = client.nodes().inspect(client.ask(request)).await?.into_inner();
    let node = detail.node.unwrap_or_default();
    let mut value = show::node(&node);
    value["attempts"] = detail.attempts.iter().map(show::attempt).collect();
    value["events"] = detail.events.iter().map(show::event).collect();
    let mut text = inspect_text(context, &node);
    for attempt in &detail.attempts {
        text.push_str(&format!("{}\n", running_line(context, attempt)));
    }
    for event in &detail.events {
        text.push_str(&format!("{}\n", show::event_line(event, &context.output)));
    }
    context.output.one("Node", &value, &text, &node.name)?;
    Ok(Exit::Ok.into())
}

fn inspect_text(context: &Context, node: &Shown) -> String {
    let (have, taken) = (node.capacity.unwrap_or_default(), node.allocated.unwrap_or_default());
    let mut text = format!(
        "node      {} (n{}) in pool {}\nstate     {}: {}, {}, hold {}\ncapacity  {} CPU ({} taken), {} memory ({} taken), \
         {} disk\ntasks     {} running, {} waiting on it, {} ever\njoined    {}, incarnation {}\nagent     {}, {}\nfences    {}\n",
        escape::text(&node.name),
        node.node,
        escape::text(&node.pool),
        escape::text(&node.state),
        escape::text(&node.liveness),
        escape::text(&node.duty),
        escape::text(&node.hold),
        Cores(have.cpu_milli),
        Cores(taken.cpu_milli),
        Bytes(have.memory_bytes),
        Bytes(taken.memory_bytes),
        Bytes(have.disk_bytes),
        node.running,
        node.queued,
        node.attempts_total,
        context.output.time(node.joined_ms),
        node.incarnation,
        escape::text(&node.agent_version),
        escape::text(&node.kernel),
        escape::text(&node.fences.join(" ")),
    );
    if !node.reason.is_empty() {
        text.push_str(&format!("reason    {} ({})\n", escape::text(&node.reason), escape::text(&node.actor)));
    }
    if let Some(drain) = &node.drain {
        let deadline =
            drain.deadline_ms.map_or_else(|| String::from("no deadline"), |ms| format!("deadline {}", until(ms)));
        let proved =
            drain.proved_ms.map(|ms| format!(", proved empty {}", context.output.time(ms))).unwrap_or_default();
        text.push_str(&format!(
            "drain     {}, then {}, by {}: {}{proved}\n",
            deadline,
            escape::text(&drain.then),
            escape::text(&drain.actor),
            escape::text(&drain.reason)
        ));
    }
    text
}

fn running_line(context: &Context, attempt: &Attempt) -> String {
    let id = attempt.attempt.unwrap_or_default();
    format!(
        "task      {}.{}.{} {} {}: {}",
        JobId(id.job),
        id.task,
        id.number,
        escape::text(&attempt.state),
        context.output.time(attempt.started_ms.unwrap_or(attempt.placed_ms)),
        escape::text(&attempt.placement_reason),
    )
}

/// How long until then.
pub(super) fn until(ms: u64) -> String {
    let now = now_ms();
    if ms > now { format!("in {}", span(ms - now)) } else { String::from("now") }
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Cordon,
    Uncordon,
    Resume,
}

async fn change(context: &Context, selector: &Selector, reason: &str, verb: Verb) -> Result<ExitCode> {
    let client = context.connect().await?;
    let nodes = targets(&client, selector).await?;
    let word = match verb {
        Verb::Cordon => "cordons",
        Verb::Uncordon => "uncordons",
        Verb::Resume => "resumes",
    };
    if nodes.len() > 1 {
        let running: u32 = nodes.iter().map(|node| node.running).sum();
        context.confirm(&format!("This {word} {} nodes with {running} running tasks", nodes.len()))?;
    }
    let request = client.ask(CordonRequest { selector: exactly(&nodes), reason: reason.to_owned() });
    let done = match verb {
        Verb::Cordon => client.nodes().cordon(request).await,
        Verb::Uncordon => client.nodes().uncordon(request).await,
        Verb::Resume => client.nodes().resume(request).await,
    }?
    .into_inner();
    show_changed(context, &done.nodes, &done.refused)
}

fn show_changed(context: &Context, nodes: &[Shown], refused: &[String]) -> Result<ExitCode> {
    let mut list = node_list();
    for node in nodes {
        push_node(&mut list, node, context);
    }
    context.output.list(&list)?;
    partial(nodes.len(), refused, &context.output)
}

async fn remove(context: &Context, selector: &Selector, force: bool, reason: &str) -> Result<ExitCode> {
    let client = context.connect().await?;
    let nodes = targets(&client, selector).await?;
    if nodes.len() > 1 || force {
        let running: u32 = nodes.iter().map(|node| node.running).sum();
        let lost = if force { format!("; {running} running tasks end as node_lost") } else { String::new() };
        context.confirm(&format!("This removes {} nodes and revokes their certificates{lost}", nodes.len()))?;
    }
    let (mut removed, mut refused) = (Vec::new(), Vec::new());
    let mut first_failure = None;
    let all = nodes.len();
    for node in &nodes {
        let request = RemoveNodeRequest { node: node.name.clone(), force, reason: reason.to_owned() };
        match client.nodes().remove(client.ask(request)).await {
            Ok(done) => {
                refused.extend(done.into_inner().refused);
                removed.push(node.clone());
            }
            Err(status) if all == 1 => return Err(status.into()),
            Err(status) => {
                refused.push(status.message().to_owned());
                first_failure.get_or_insert(Failure::from(status));
            }
        }
    }
    match first_failure {
        Some(failure) if removed.is_empty() => Err(failure),
        Some(_) | None => {
            context.output.say(&format!("{} of {all} removed", removed.len()));
            partial(removed.len(), &refused, &context.output)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_pool_must_all_hold() {
        let node = Shown {
            name: "web-01".into(),
            node: 7,
            pool: "batch".into(),
            labels: [("zone".to_owned(), "north".to_owned())].into(),
            ..Shown::default()
        };
        let selector = |names: &[&str], label: Option<(&str, &str)>, pool: Option<&str>| Selector {
            nodes: names.iter().map(|name| (*name).to_owned()).collect(),
            label: label.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect(),
            pool: pool.map(str::to_owned),
        };
        for (chosen, expected) in [
            (selector(&["web-[01-03]"], None, None), true),
            (selector(&["7"], None, None), true),
            (selector(&["web-02"], None, None), false),
            (selector(&[], Some(("zone", "north")), Some("batch")), true),
            (selector(&[], Some(("zone", "south")), None), false),
            (selector(&["web-01"], None, Some("other")), false),
        ] {
            let names = names(&chosen).unwrap();
            assert_eq!(is_selected(&node, &names, &chosen), expected, "{chosen:?}");
        }
    }
}
