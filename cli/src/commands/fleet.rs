//! The fleet as a whole: status, events, tokens, versions.

use std::{io::Write, process::ExitCode, time::Duration};

use muster_core::resources::{Bytes, Cores};
use muster_proto::v1::{CreateTokenRequest, EventsRequest, FleetEvent, StatusRequest};
use serde_json::{Value, json};

use super::{Context, show, watch::Breaks};
use crate::{
    args::Events,
    client::Client,
    escape,
    exit::{Exit, Result},
    output::{API_VERSION, Format, List, time_value},
};

/// `muster status`.
pub async fn status(context: &Context) -> Result<ExitCode> {
    let client = context.connect().await?;
    let status = client.fleet().status(client.ask(StatusRequest::default())).await?.into_inner();
    let (have, taken) = (status.capacity.unwrap_or_default(), status.allocated.unwrap_or_default());
    let mut text = format!(
        "coordinator  {} at {}, term {}, up since {}\nnodes        {} of {} ready\ntasks        {} running, {} waiting\n\
         cpu          {} of {} taken\nmemory       {} of {} taken\n",
        escape::text(&status.coordinator_version),
        client.server,
        status.term,
        context.output.time(status.started_ms),
        status.nodes_ready,
        status.nodes,
        status.tasks_running,
        status.tasks_waiting,
        Cores(taken.cpu_milli),
        Cores(have.cpu_milli),
        Bytes(taken.memory_bytes),
        Bytes(have.memory_bytes),
    );
    for alarm in &status.alarms {
        text.push_str(&format!("ALARM        {}\n", escape::text(alarm)));
    }
    let value = json!({
        "coordinator_version": status.coordinator_version, "term": status.term,
        "started_at": time_value(Some(status.started_ms)), "nodes": status.nodes, "nodes_ready": status.nodes_ready,
        "tasks_waiting": status.tasks_waiting, "tasks_running": status.tasks_running, "revision": status.revision,
        "alarms": status.alarms, "capacity": show::resources(status.capacity.as_ref()),
        "allocated": show::resources(status.allocated.as_ref()),
    });
    context.output.one("Status", &value, &text, &status.coordinator_version)?;
    Ok(Exit::Ok.into())
}

/// `muster events`.
pub async fn events(context: &Context, events: Events) -> Result<ExitCode> {
    let client = context.connect().await?;
    let request = EventsRequest {
        after: events.after,
        follow: events.follow,
        subject: events.subject.unwrap_or_default(),
        limit: events.limit,
    };
    show_events(context, &client, request).await
}

/// Shows events, as they come with `follow`.
pub async fn show_events(context: &Context, client: &Client, request: EventsRequest) -> Result<ExitCode> {
    if request.follow {
        let all = follow_events(context, client, request);
        return context.wait("the fleet", "`muster events -f` comes back to it.", all).await;
    }
    let all = async {
        let mut events = client.fleet().events(request).await?.into_inner();
        let mut list = List::new("EventList", &["REVISION", "TIME", "SUBJECT", "KIND", "ACTOR", "REASON"]);
        while let Some(event) = events.message().await? {
            let row = vec![
                event.revision.to_string().into(),
                context.output.time(event.time_ms).into(),
                (&event.subject).into(),
                (&event.kind).into(),
                (&event.actor).into(),
                (&event.reason).into(),
            ];
            list.push(row, show::event(&event));
        }
        context.output.list(&list)?;
        Ok(Exit::Ok.into())
    };
    context.wait("the fleet", "`muster events` can be asked again.", all).await
}

/// Over breaks of the stream, each event once: a stream that is opened again goes on after the last one shown.
async fn follow_events(context: &Context, client: &Client, mut request: EventsRequest) -> Result<ExitCode> {
    let mut breaks = Breaks::default();
    loop {
        let error = match client.fleet().events(request.clone()).await {
            Err(status) => status,
            Ok(events) => {
                let mut events = events.into_inner();
                loop {
                    match events.message().await {
                        Ok(Some(event)) => {
                            breaks.works();
                            // The newest few were asked for once.
                            (request.after, request.limit) = (event.revision, 0);
                            show_line(context, &event)?;
                        }
                        Ok(None) => break tonic::Status::unavailable("the coordinator ended the stream"),
                        Err(status) => break status,
                    }
                }
            }
        };
        breaks.wait(client, error).await?;
    }
}

fn show_line(context: &Context, event: &FleetEvent) -> Result<()> {
    let line = match context.output.format {
        Format::Json | Format::Jsonl => {
            let mut value = show::event(event);
            value["apiVersion"] = json!(API_VERSION);
            value.to_string()
        }
        Format::Name => escape::text(&event.subject),
        Format::Table | Format::Wide => show::event_line(event, &context.output),
    };
    let mut out = std::io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush())?;
    Ok(())
}

/// `muster token create`.
pub async fn create_token(context: &Context, valid: Option<Duration>, pool: String) -> Result<ExitCode> {
    let client = context.connect().await?;
    let valid_ms = valid.map(|valid| u64::try_from(valid.as_millis()).unwrap_or(u64::MAX));
    let token = client.fleet().create_token(client.ask(CreateTokenRequest { valid_ms, pool })).await?.into_inner();
    let value = json!({ "token": token.token, "expires_at": time_value(Some(token.expires_ms)) });
    context.output.one("Token", &value, &format!("{}\n", escape::text(&token.token)), &token.token)?;
    Ok(Exit::Ok.into())
}

/// `muster version`: the coordinator's is left out when there is none.
pub async fn version(context: &Context) -> Result<ExitCode> {
    let own = env!("CARGO_PKG_VERSION");
    let coordinator = match context.connect().await {
        Ok(client) => {
            let status = client.fleet().status(client.ask(StatusRequest::default())).await?.into_inner();
            Value::String(status.coordinator_version)
        }
        Err(failure) if failure.exit == Exit::Unreachable && context.global.server.is_none() => Value::Null,
        Err(failure) => return Err(failure),
    };
    let mut text = format!("muster       {own}\n");
    if let Value::String(version) = &coordinator {
        text.push_str(&format!("coordinator  {}\n", escape::text(version)));
    }
    context.output.one("Version", &json!({ "muster": own, "coordinator": coordinator }), &text, own)?;
    Ok(Exit::Ok.into())
}
