//! What a batch brings about, as a transcript says it.

use muster_core::{
    effect::{DrainNotice, Effect, Reply, StopReason, Subject},
    fleet::Output,
    ids::AttemptId,
};

/// Effects and history, a line each, in order.
pub fn describe(out: &Output) -> Vec<String> {
    let effects = out.effects.iter().map(effect);
    let history = out.touched.history.iter().map(|entry| {
        let subject = match &entry.subject {
            Subject::Fleet => "fleet".to_owned(),
            Subject::Job(job) => format!("job {job}"),
            Subject::Node(node) => format!("node {node}"),
            Subject::Pool { name, sizes: None } => format!("pool {name}"),
            Subject::Pool { name, sizes: Some(sizes) } => format!("pool {name} {} -> {}", sizes.from, sizes.to),
        };
        let actor = entry.actor.as_ref().map(|actor| format!(" ({actor})")).unwrap_or_default();
        format!("| {subject}: {} {}{actor}", entry.kind, entry.reason)
    });
    let evidence =
        out.touched.evidence.iter().map(|one| format!("| evidence {} {}: {}", one.attempt, one.end, one.reason));
    effects.chain(history).chain(evidence).collect()
}

fn effect(effect: &Effect) -> String {
    let list = |ids: &[AttemptId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    match effect {
        Effect::Reply { reply: Ok(Reply::Submitted { job, existed }), .. } => {
            format!("reply: job {job}{}", if *existed { " (existed)" } else { "" })
        }
        Effect::Reply { reply: Ok(reply), .. } => format!("reply: {reply:?}"),
        Effect::Reply { reply: Err(denied), .. } => format!("denied: {denied}"),
        Effect::Welcome { node, incarnation, unknown, drain, .. } => {
            let drains = match drain {
                Some(DrainNotice { within: Some(within) }) => format!(" drained within {within}"),
                Some(DrainNotice { within: None }) => String::from(" drained, no deadline"),
                None => String::new(),
            };
            format!("{node} <- welcome incarnation={} unknown=[{}]{drains}", incarnation.0, list(unknown))
        }
        Effect::GrantLease { node, duration, unknown, .. } => {
            format!("{node} <- lease {duration} unknown=[{}]", list(unknown))
        }
        Effect::Start { node, attempts, .. } => {
            format!("{node} <- start {}", list(&attempts.iter().map(|(id, _)| *id).collect::<Vec<_>>()))
        }
        Effect::Stop { node, attempts, .. } => {
            let orders: Vec<String> = attempts
                .iter()
                .map(|order| {
                    let (reason, grace) = (reason(order.reason), order.grace);
                    format!("{}({reason} within {grace}{})", order.attempt, asked(order.first))
                })
                .collect();
            format!("{node} <- stop {}", orders.join(" "))
        }
        Effect::Acknowledge { node, attempts, .. } => format!("{node} <- stored {}", list(attempts)),
        Effect::Recall { node, count, .. } => {
            format!("{node} <- recall {}", if *count == u32::MAX { "all".to_owned() } else { count.to_string() })
        }
        Effect::NoticeDrain { node, notice, .. } => match notice.within {
            Some(within) => format!("{node} <- notice: drained within {within}"),
            None => format!("{node} <- notice: drained, no deadline"),
        },
        Effect::AskDrained { node, revision, refusable, .. } => {
            format!("{node} <- ask_drained revision={}{}", revision.0, if *refusable { " refusable" } else { "" })
        }
        Effect::Release { node, revision, then, .. } => {
            format!("{node} <- release revision={} then={then:?}", revision.0)
        }
        Effect::Reopen { node, revision, .. } => format!("{node} <- reopen revision={}", revision.0),
        Effect::CloseSession { node, reason, .. } => format!("{node} <- close: {reason}"),
        Effect::CreateHost { pool, host, .. } => format!("provider: create host {} for {pool}", host.0),
        Effect::WakeHost { pool, host, node } => format!("provider: wake {node} of {pool} as host {}", host.0),
        Effect::AskHost { pool, host } => format!("provider: may host {} of {pool} be deleted?", host.0),
        Effect::DeleteHost { pool, host, .. } => format!("provider: delete host {} of {pool}", host.0),
    }
}

fn asked(first: Option<u8>) -> String {
    first.map(|signal| format!(", first signal {signal}")).unwrap_or_default()
}

fn reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Cancelled => "cancelled",
        StopReason::Drained => "drained",
        StopReason::Preempted => "preempted",
        StopReason::Superseded => "superseded",
    }
}
