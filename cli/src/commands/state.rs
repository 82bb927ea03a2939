//! The fleet's stored state, when something happened to it, and before.

use std::{path::Path, process::ExitCode};

use muster_coordinator::upkeep::{self, Findings};
use muster_proto::v1::AcceptLossRequest;
use serde_json::json;

use super::Context;
use crate::{
    args::State,
    escape,
    exit::{Exit, Failure, Result},
};

/// `muster state`.
pub async fn run(context: &Context, state: State) -> Result<ExitCode> {
    match state {
        State::AcceptLoss { reason } => accept_loss(context, reason).await,
        State::Verify { folder, store, store_ca } => {
            verify(context, &folder.data, store.as_deref(), store_ca.as_deref())
        }
        State::Backup { folder, to } => {
            let findings = upkeep::backup(&folder.data, &to).map_err(refused)?;
            let text = format!("{}wrote {}\n", rows(&findings), escape::path(&to));
            context.output.one("Backup", &json!({ "folder": to, "rows": counts(&findings) }), &text, "ok")?;
            Ok(Exit::Ok.into())
        }
        State::Restore { folder, from } => restore(context, &from, &folder.data),
        State::Repair { folder } => repair(context, &folder.data),
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

fn verify(context: &Context, data: &Path, store: Option<&str>, ca: Option<&Path>) -> Result<ExitCode> {
    let findings = match store {
        Some(url) => upkeep::verify_postgres(url, ca),
        None => upkeep::verify(data),
    };
    let findings = findings.map_err(refused)?;
    let mut text = rows(&findings);
    for problem in &findings.problems {
        text.push_str(&format!("PROBLEM  {}\n", escape::text(problem)));
    }
    let whole = findings.problems.is_empty();
    text.push_str(if whole {
        "the store is whole\n"
    } else {
        "the store is damaged: restore a backup, or see what `muster state repair` can save\n"
    });
    let value = json!({ "whole": whole, "rows": counts(&findings), "problems": findings.problems });
    context.output.one("Findings", &value, &text, if whole { "whole" } else { "damaged" })?;
    Ok(if whole { Exit::Ok } else { Exit::Failed }.into())
}

fn restore(context: &Context, from: &Path, data: &Path) -> Result<ExitCode> {
    context.confirm(&format!(
        "the store in {} becomes that of {}; what was answered since then is lost",
        escape::path(data),
        escape::path(from)
    ))?;
    let kept = upkeep::restore(from, data).map_err(refused)?;
    let mut text = format!("restored {} from {}\n", escape::path(data), escape::path(from));
    if let Some(kept) = &kept {
        text.push_str(&format!("the store that was there is {}\n", escape::path(kept)));
    }
    text.push_str("start the coordinator; if hosts have seen later answers, `muster status` says so\n");
    context.output.one("Restored", &json!({ "kept": kept }), &text, "ok")?;
    Ok(Exit::Ok.into())
}

fn repair(context: &Context, data: &Path) -> Result<ExitCode> {
    let repaired = upkeep::repair(data).map_err(refused)?;
    let mut text = String::new();
    for sentence in &repaired.said {
        text.push_str(&format!("LOST  {}\n", escape::text(sentence)));
    }
    match &repaired.kept {
        Some(kept) => {
            text.push_str(&format!("{} opens again; the damaged one is {}\n", escape::path(data), escape::path(kept)))
        }
        None => text.push_str("the store is whole; nothing was changed\n"),
    }
    if !repaired.said.is_empty() {
        text.push_str("the coordinator places nothing until `muster state accept-loss`\n");
    }
    let value = json!({ "lost": repaired.said, "kept": repaired.kept });
    context.output.one("Repaired", &value, &text, if repaired.said.is_empty() { "whole" } else { "lost" })?;
    Ok(if repaired.said.is_empty() { Exit::Ok } else { Exit::Partial }.into())
}

fn rows(findings: &Findings) -> String {
    findings.rows.iter().map(|(table, count)| format!("{table:<14} {count}\n")).collect()
}

fn counts(findings: &Findings) -> serde_json::Value {
    findings
        .rows
        .iter()
        .map(|(table, count)| ((*table).to_owned(), json!(count)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn refused(error: upkeep::Error) -> Failure {
    let mut sentence = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(deeper) = cause {
        sentence.push_str(&format!(": {deeper}"));
        cause = deeper.source();
    }
    let exit = match &error {
        upkeep::Error::NoFleet { .. } => Exit::NotFound,
        upkeep::Error::InUse(_) | upkeep::Error::Exists { .. } | upkeep::Error::OtherFleet { .. } => Exit::Conflict,
        upkeep::Error::Folder(_) | upkeep::Error::Store(_) | upkeep::Error::Damaged { .. } => Exit::Failed,
    };
    Failure::new(exit, escape::text(&sentence)).caused_by(error)
}
