//! `muster pool ...`: pools, their policies, and why they are as large as they are.

use std::process::ExitCode;

use muster_core::policy::PoolPolicy;
use muster_proto::v1::{ListPoolsRequest, Pool as Shown, PoolHistoryRequest, SetPoolRequest};
use serde_json::{Value, json};

use super::Context;
use crate::{
    args::Pool,
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    output::{List, time_value},
    template::toml_sentence,
};

/// Runs one command.
pub async fn run(context: &Context, command: Pool) -> Result<ExitCode> {
    match command {
        Pool::List => list(context).await,
        Pool::Show { pool } => {
            let pool = one(&context.connect().await?, &pool).await?;
            context.output.one("Pool", &value(&pool), &format!("{}\n", pool.policy.trim_end()), &pool.name)?;
            Ok(Exit::Ok.into())
        }
        Pool::Explain { pool } => {
            let pool = one(&context.connect().await?, &pool).await?;
            let mut text = format!(
                "pool {}  now {} nodes ({} booting, {} draining)  wants {}\n",
                escape::text(&pool.name),
                pool.nodes,
                pool.booting,
                pool.draining,
                pool.wanted
            );
            for line in &pool.explanation {
                text.push_str(&format!("  {}\n", escape::text(line)));
            }
            context.output.one("Pool", &value(&pool), &text, &pool.name)?;
            Ok(Exit::Ok.into())
        }
        Pool::Set { file } => {
            let text =
                std::fs::read_to_string(&file).map_err(|error| Failure::file("read the policy", &file, error))?;
            check_policy(&text).map_err(|why| Failure::usage(format!("the policy {}: {why}", escape::path(&file))))?;
            let client = context.connect().await?;
            let pool = client.pools().set(client.ask(SetPoolRequest { policy: text })).await?.into_inner();
            context.output.one("Pool", &value(&pool), &format!("{} set\n", escape::text(&pool.name)), &pool.name)?;
            Ok(Exit::Ok.into())
        }
        Pool::History { pool } => history(context, &pool).await,
    }
}

/// A policy's text is read here as the coordinator reads it, so that an error names its line.
pub fn check_policy(text: &str) -> std::result::Result<PoolPolicy, String> {
    toml::from_str(text).map_err(|error| toml_sentence(text, &error))
}

async fn pools(client: &Client) -> Result<Vec<Shown>> {
    Ok(client.pools().list(client.ask(ListPoolsRequest::default())).await?.into_inner().pools)
}

async fn one(client: &Client, name: &str) -> Result<Shown> {
    pools(client).await?.into_iter().find(|pool| pool.name == name).ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> Failure {
    Failure::new(Exit::NotFound, format!("there is no pool `{}`; `muster pool list` shows them", escape::text(name)))
}

fn value(pool: &Shown) -> Value {
    json!({
        "pool": pool.name, "policy": pool.policy, "nodes": pool.nodes, "booting": pool.booting,
        "draining": pool.draining, "wanted": pool.wanted, "explanation": pool.explanation,
    })
}

async fn list(context: &Context) -> Result<ExitCode> {
    let client = context.connect().await?;
    let mut list = List::new("PoolList", &["POOL", "NODES", "BOOTING", "DRAINING", "WANTED", "WHY"]);
    for pool in pools(&client).await? {
        list.push(
            vec![
                (&pool.name).into(),
                pool.nodes.to_string().into(),
                pool.booting.to_string().into(),
                pool.draining.to_string().into(),
                pool.wanted.to_string().into(),
                pool.explanation.first().map(String::as_str).unwrap_or_default().into(),
            ],
            value(&pool),
        );
    }
    context.output.list(&list)?;
    Ok(Exit::Ok.into())
}

async fn history(context: &Context, name: &str) -> Result<ExitCode> {
    let client = context.connect().await?;
    one(&client, name).await?;
    let request = PoolHistoryRequest { pool: name.to_owned() };
    let decisions = client.pools().history(client.ask(request)).await?.into_inner().decisions;
    let mut list = List::new("DecisionList", &["TIME", "POOL", "FROM", "TO", "REASON"]);
    for decision in &decisions {
        list.push(
            vec![
                context.output.time(decision.time_ms).into(),
                (&decision.pool).into(),
                decision.from.to_string().into(),
                decision.to.to_string().into(),
                (&decision.reason).into(),
            ],
            json!({
                "time": time_value(Some(decision.time_ms)), "pool": decision.pool, "from": decision.from,
                "to": decision.to, "reason": decision.reason, "inputs": decision.inputs,
            }),
        );
    }
    context.output.list(&list)?;
    Ok(Exit::Ok.into())
}
