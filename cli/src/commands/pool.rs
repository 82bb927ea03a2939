//! `muster pool ...`: pools, their policies, and why they are as large as they are.

use std::process::ExitCode;

use muster_core::policy::{Money, PoolPolicy};
use muster_proto::v1::{
    ListPoolsRequest, Pool as Shown, PoolHistoryRequest, PoolRequest, ScalePoolRequest, SetPoolRequest,
};
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
            context.output.one("Pool", &value(&pool), &explanation(context, &pool), &pool.name)?;
            Ok(Exit::Ok.into())
        }
        Pool::Scale { pool, size, hold, reason } => {
            let hold_ms = hold.map(|hold| u64::try_from(hold.as_millis()).unwrap_or(u64::MAX));
            let client = context.connect().await?;
            let request = ScalePoolRequest { pool, size, hold_ms, reason };
            let pool = client.pools().scale(client.ask(request)).await?.into_inner();
            told(context, &pool, &format!("has {size} hosts asked for it"))
        }
        Pool::Pause { pool, reason } => {
            let client = context.connect().await?;
            let pool = client.pools().pause(client.ask(PoolRequest { pool, reason })).await?.into_inner();
            told(context, &pool, "scales no more until it is resumed")
        }
        Pool::Resume { pool, reason } => {
            let client = context.connect().await?;
            let pool = client.pools().resume(client.ask(PoolRequest { pool, reason })).await?.into_inner();
            told(context, &pool, "scales by its policy")
        }
        Pool::Delete { pool, reason } => {
            let client = context.connect().await?;
            client.pools().delete(client.ask(PoolRequest { pool: pool.clone(), reason })).await?;
            context.output.say(&format!("pool {} is deleted", escape::text(&pool)));
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
        "draining": pool.draining, "idle": pool.idle, "asleep": pool.asleep, "hosts": pool.hosts, "wanted": pool.wanted,
        "min": pool.min, "max": pool.max, "queue": pool.queue,
        "paused": (!pool.paused.is_empty()).then_some(&pool.paused), "size_set": pool.pinned,
        "spent_today": pool.spent_today_micros.map(|micros| Money(micros).to_string()),
        "decided": time_value(Some(pool.decided_ms).filter(|at| *at > 0)), "explanation": pool.explanation,
    })
}

fn told(context: &Context, pool: &Shown, what: &str) -> Result<ExitCode> {
    let name = escape::text(&pool.name);
    context.output.one("Pool", &value(pool), &format!("pool {name} {what}\n"), &pool.name)?;
    Ok(Exit::Ok.into())
}

fn explanation(context: &Context, pool: &Shown) -> String {
    let name = escape::text(&pool.name);
    let Shown { nodes, booting, draining, wanted, .. } = pool;
    let mut text = format!("pool {name}  now {nodes} nodes ({booting} booting, {draining} draining)  wants {wanted}");
    if pool.asleep > 0 {
        text.push_str(&format!("  {} asleep", pool.asleep));
    }
    if pool.decided_ms > 0 {
        text.push_str(&format!("  decided {}", context.output.time(pool.decided_ms)));
    }
    text.push('\n');
    for line in &pool.explanation {
        text.push_str(&format!("  {}\n", escape::text(line)));
    }
    text
}

/// Why a pool does not scale as it would, or who set its size.
fn note(pool: &Shown) -> String {
    match (pool.paused.as_str(), pool.pinned) {
        ("", Some(size)) => format!("{size} hosts by an operator"),
        ("", None) if pool.asleep > 0 => format!("{} asleep", pool.asleep),
        ("", None) => String::new(),
        (paused, _) => format!("paused: {paused}"),
    }
}

async fn list(context: &Context) -> Result<ExitCode> {
    let client = context.connect().await?;
    let columns = ["POOL", "NODES", "BOOTING", "DRAINING", "IDLE", "WANTED", "MIN", "MAX", "QUEUE", "NOTE"];
    let mut list = List::new("PoolList", &columns);
    for pool in pools(&client).await? {
        let number = |number: u32| number.to_string().into();
        list.push(
            vec![
                (&pool.name).into(),
                number(pool.nodes),
                number(pool.booting),
                number(pool.draining),
                number(pool.idle),
                number(pool.wanted),
                number(pool.min),
                number(pool.max),
                pool.queue.to_string().into(),
                note(&pool).into(),
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
    let mut list = List::new("DecisionList", &["TIME", "POOL", "FROM", "TO", "REASON", "+INPUTS"]);
    for decision in &decisions {
        list.push(
            vec![
                context.output.time(decision.time_ms).into(),
                (&decision.pool).into(),
                decision.from.to_string().into(),
                decision.to.to_string().into(),
                (&decision.reason).into(),
                (&decision.inputs).into(),
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
