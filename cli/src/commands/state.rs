//! The fleet's stored state, when something happened to it.

use std::process::ExitCode;

use muster_proto::v1::AcceptLossRequest;
use serde_json::json;

use super::Context;
use crate::{
    args::State,
    exit::{Exit, Result},
};

/// `muster state`.
pub async fn run(context: &Context, state: State) -> Result<ExitCode> {
    match state {
        State::AcceptLoss { reason } => accept_loss(context, reason).await,
    }
}

async fn accept_loss(context: &Context, reason: String) -> Result<ExitCode> {
    let client = context.connect().await?;
    context.confirm(
        "what was answered after the store's last write is gone: tasks that ended since run again, jobs submitted since are unknown and what runs of them is ended",
    )?;
    let answer = client.fleet().accept_loss(client.ask(AcceptLossRequest { reason })).await?.into_inner();
    let text = if answer.lost { "the fleet places again\n" } else { "no loss was noticed; nothing changed\n" };
    context.output.one("LossAccepted", &json!({ "lost": answer.lost }), text, text.trim())?;
    Ok(Exit::Ok.into())
}
