//! `muster up`: a fleet on this machine until Ctrl-C. The first signal drains
//! all nodes and ends, the second makes the deadline now, the third ends at once.

use std::{io::Write, process::ExitCode, time::Duration};

use muster_core::policy::{PoolPolicy, ProviderKind};
use muster_proto::v1::{DrainRequest, EventsRequest, ListNodesRequest, Node, NodeSelector, SetPoolRequest};
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::sleep,
};

use super::{
    LocalFleet, Settings, children,
    policy::{self, Machine},
};
use crate::{
    args::Up,
    client::Client,
    commands::{Context, check_policy},
    escape,
    exit::{Exit, Failure, Result},
    output::now_ms,
};

/// A coordinator that was killed is asked again after this.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// SIGINT and SIGTERM as one.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From here on the two signals do not end the process.
    pub fn new() -> Result<Self> {
        let failed = |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot watch signals: {error}"));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
        })
    }

    /// The next of them.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// `muster up`.
pub async fn run(context: &Context, up: Up) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let policies = policies(&up)?;
    if let Some(data) = &up.data {
        std::fs::create_dir_all(data).map_err(|error| Failure::file("make the folder", data, error))?;
    }
    let data = up.data.map(std::path::absolute).transpose()?;
    let settings = Settings { data, logs: None, listen: up.listen, http: up.http, policies };
    let fleet = tokio::select! {
        // Dropping a start closes the pipe, and the children see it.
        () = signals.next() => return Ok(Exit::Interrupted.into()),
        fleet = LocalFleet::start(settings) => fleet?,
    };
    announce(context, &fleet)?;
    let ended = tokio::select! {
        why = fleet.given_up() => {
            let tails = fleet.log_tails().join("\n");
            Err(Failure::new(Exit::Failed, why).caused_by(anyhow::anyhow!(tails)))
        }
        () = signals.next() => {
            leave(context, &fleet, &mut signals).await;
            Ok(ExitCode::SUCCESS)
        }
    };
    fleet.end().await;
    ended
}

fn policies(up: &Up) -> Result<Vec<PoolPolicy>> {
    if up.policy.is_empty() {
        return Ok(vec![policy::fixed(up.nodes, &Machine::here(&std::env::temp_dir()))]);
    }
    up.policy
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read the policy", path, error))?;
            check_policy(&text).map_err(|why| Failure::usage(format!("the policy {}: {why}", escape::path(path))))
        })
        .collect()
}

fn announce(context: &Context, fleet: &LocalFleet) -> Result<()> {
    let socket = format!("unix:{}", escape::path(&fleet.socket));
    let mut out = std::io::stdout();
    if context.output.format == crate::output::Format::Json || context.output.format == crate::output::Format::Jsonl {
        let value = json!({
            "apiVersion": crate::output::API_VERSION, "kind": "Up", "server": socket, "address": fleet.address(),
            "pid": std::process::id(),
        });
        writeln!(out, "{value}")?;
    } else {
        writeln!(out, "MUSTER_SERVER={socket}")?;
    }
    out.flush()?;
    context.output.say(&format!(
        "A fleet runs on this machine, also at {}. In another terminal: muster run --best-effort -- uname -a\nCtrl-C drains it and ends.",
        fleet.address()
    ));
    Ok(())
}

/// Drains all nodes and waits; a second signal makes the deadline now, a third does not wait any more.
async fn leave(context: &Context, fleet: &LocalFleet, signals: &mut Signals) {
    context.output.say("Draining all nodes; once more ends what still runs, and once more does not wait.");
    tokio::select! {
        () = drain_all(context, fleet, None) => return,
        () = signals.next() => {}
        why = fleet.given_up() => {
            context.output.say(&format!("muster: {why}"));
            return;
        }
    }
    context.output.say("Deadline now.");
    tokio::select! {
        () = drain_all(context, fleet, Some(now_ms())) => {}
        () = signals.next() => {}
        _ = fleet.given_up() => {}
    }
}

/// Until there is no node left; over restarts of the coordinator.
async fn drain_all(context: &Context, fleet: &LocalFleet, deadline_ms: Option<u64>) {
    loop {
        match try_drain_all(context, fleet, deadline_ms).await {
            Ok(()) => return,
            Err(failure) => {
                if context.output.verbose {
                    context.output.say(&format!("muster: {failure}"));
                }
                sleep(ASK_AGAIN).await;
            }
        }
    }
}

async fn try_drain_all(context: &Context, fleet: &LocalFleet, deadline_ms: Option<u64>) -> Result<()> {
    let client = fleet.client().await?;
    // No new host while the old ones leave.
    for policy in fleet.policies().filter(|policy| policy.provider == ProviderKind::Local) {
        let closed = policy::closing(policy);
        fleet.keep_policy(&closed);
        let request = SetPoolRequest { policy: policy::to_toml(&closed) };
        client.pools().set(client.ask(request)).await?;
    }
    let request = EventsRequest { follow: true, limit: 1, ..EventsRequest::default() };
    let mut events = client.fleet().events(request).await?.into_inner();
    loop {
        drain_those_that_stay(context, &client, deadline_ms).await?;
        tokio::select! {
            biased;
            () = no_host(fleet) => return Ok(()),
            event = events.message() => if event?.is_none() {
                return Err(Failure::new(Exit::Unreachable, "the coordinator ended the stream of events"));
            },
        }
    }
}

/// A host's last process ends a moment after its node is drained.
async fn no_host(fleet: &LocalFleet) {
    while !fleet.has_no_host() {
        sleep(children::GLANCE).await;
    }
}

async fn drain_those_that_stay(context: &Context, client: &Client, deadline_ms: Option<u64>) -> Result<()> {
    let nodes = client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes;
    let stays = |node: &&Node| {
        let leaving = matches!(node.duty.as_str(), "draining" | "drained" | "stopping");
        let sooner = match (deadline_ms, node.drain.as_ref().and_then(|drain| drain.deadline_ms)) {
            (Some(asked), Some(has)) => asked < has,
            (Some(_), None) => true,
            (None, _) => false,
        };
        node.liveness != "gone" && (!leaving || (node.duty == "draining" && sooner))
    };
    let names: Vec<String> = nodes.iter().filter(stays).map(|node| node.name.clone()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let request = DrainRequest {
        selector: Some(NodeSelector { nodes: names, ..NodeSelector::default() }),
        reason: String::from("`muster up` ends"),
        deadline_ms,
        then: String::from("delete"),
        dry_run: false,
        at_once: None,
    };
    let done = client.nodes().drain(client.ask(request)).await?.into_inner();
    for sentence in &done.refused {
        context.output.say(&format!("muster: {}", escape::text(sentence)));
    }
    Ok(())
}
