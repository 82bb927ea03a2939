//! Records as operators see them. Nothing here decides; it only says.

use std::collections::BTreeSet;

use muster_core::{
    autoscale,
    effect::{AttemptRecord, EndRecord},
    end::End,
    fleet::Fleet,
    ids::{AttemptId, JobId, NodeId},
    job::JobRecord,
    node::{Drain, Duty, Hold, Liveness, NodeRecord},
    pool::Host,
    time::Timestamp,
};
use muster_proto::{convert, v1};
use prost::Message as _;

use super::Context;
use crate::store::{Entry, StoredAttempt};

/// What is kept with an attempt's end: the report, and the start's figures.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Detail {
    #[prost(message, optional, tag = "1")]
    pub ended: Option<v1::AttemptEnded>,
    #[prost(message, optional, tag = "2")]
    pub started: Option<v1::AttemptStarted>,
}

impl Detail {
    /// What does not read is shown as if nothing had been kept.
    pub fn read(bytes: Option<&[u8]>) -> Self {
        bytes.and_then(|bytes| Self::decode(bytes).ok()).unwrap_or_default()
    }
}

/// A job in one line.
pub(super) fn summary(fleet: &Fleet, id: JobId, job: &JobRecord) -> v1::JobSummary {
    let ends = job.end_counts();
    let mut counts = v1::TaskCounts {
        total: job.spec.tasks,
        waiting: job.waiting.len() + u32::try_from(job.delayed.len()).unwrap_or(u32::MAX),
        succeeded: ends.succeeded,
        failed: ends.failed,
        cancelled: ends.cancelled,
        ..Default::default()
    };
    for (_, attempt) in fleet.attempts_of(id) {
        match (&attempt.stopping, attempt.started) {
            (Some(_), _) => counts.stopping += 1,
            (None, Some(_)) => counts.running += 1,
            (None, None) => counts.placed += 1,
        }
    }
    let reason = match (&job.cancelled_by, counts.waiting) {
        (Some((actor, reason)), _) => format!("cancelled by {actor}: {reason}"),
        (None, 0) if job.held.is_empty() => String::new(),
        (None, _) => fleet.explain_wait(id).unwrap_or_default(),
    };
    v1::JobSummary {
        job: id.0,
        name: job.spec.name.clone(),
        state: job.state().name().to_owned(),
        counts: Some(counts),
        submitted_ms: job.submitted.0,
        finished_ms: job.finished.map(|at| at.0),
        owner: job.spec.owner.0.clone(),
        priority: job.spec.priority,
        reason,
    }
}

/// The phase of an attempt in a word.
fn attempt_state(record: &AttemptRecord) -> String {
    match (&record.ended, &record.stopping, record.started) {
        (Some(end), _, _) => end.end.to_string(),
        (None, Some(_), _) => "stopping".to_owned(),
        (None, None, Some(_)) => "running".to_owned(),
        (None, None, None) => "placed".to_owned(),
    }
}

/// A live attempt, with the last figures of it.
pub(super) fn live_attempt(context: &Context, id: AttemptId, record: &AttemptRecord) -> v1::Attempt {
    let mut shown = attempt(context, id, record);
    let known =
        context.vitals.of(record.node, |vitals| (vitals.usage.get(&id).copied(), vitals.starts.get(&id).cloned()));
    let (usage, started) = known.unwrap_or_default();
    shown.usage = usage;
    if let Some(started) = started {
        show_start(&mut shown, started);
    }
    shown
}

/// An attempt as stored.
pub(super) fn stored_attempt(context: &Context, stored: &StoredAttempt) -> v1::Attempt {
    if stored.record.ended.is_none() {
        return live_attempt(context, stored.id, &stored.record);
    }
    let mut shown = attempt(context, stored.id, &stored.record);
    let detail = Detail::read(stored.detail.as_deref());
    if let Some(started) = detail.started {
        show_start(&mut shown, started);
    }
    if let Some(ended) = detail.ended {
        shown.usage = ended.usage;
        if !ended.fences.is_empty() {
            shown.fences = ended.fences;
        }
        shown.outputs = ended.outputs;
        shown.skipped_outputs = ended.skipped_outputs;
        shown.output_truncated = ended.output_truncated;
        shown.wall_ms = ended.wall_ms;
        // The report of the start may have been lost with a stream, or with an earlier coordinator.
        if ended.start_us > 0 {
            (shown.start_us, shown.start_phases) = (ended.start_us, ended.phases);
        }
    }
    shown
}

fn show_start(shown: &mut v1::Attempt, started: v1::AttemptStarted) {
    shown.fences = started.fences;
    (shown.start_us, shown.start_phases) = (started.start_us, started.phases);
}

fn attempt(context: &Context, id: AttemptId, record: &AttemptRecord) -> v1::Attempt {
    let end: Option<&EndRecord> = record.ended.as_ref();
    v1::Attempt {
        attempt: Some(id.into()),
        node: record.node.0,
        node_name: context.members.name(record.node),
        state: attempt_state(record),
        placement_reason: record.placement_reason.clone(),
        placed_ms: record.placed.0,
        started_ms: record.started.map(|at| at.0),
        ended_ms: end.map(|end| end.at.0),
        end: end.map(|end| convert::end_to_wire(&end.end)),
        presumed: end.is_some_and(|end| end.presumed),
        ..Default::default()
    }
}

/// How a task is, in a word, with the reason of its wait.
pub(super) fn task_state(job: &JobRecord, task: u32) -> (&str, bool) {
    if let Some(end) = job.end_of(task) {
        return (end, false);
    }
    if job.live.contains_key(&task) { ("placed", false) } else { ("waiting", true) }
}

/// A node.
pub(super) fn node(context: &Context, fleet: &Fleet, id: NodeId, record: &NodeRecord) -> v1::Node {
    let view = fleet.node_view(id);
    let (mut reason, mut actor, mut since) = why(record);
    if let (true, Some(turn)) = (reason.is_empty(), turn_of(fleet, record)) {
        (reason, actor, since) = turn;
    }
    let (metrics, metrics_ms, agent_version, kernel) = context
        .vitals
        .of(id, |vitals| {
            let at = vitals.metrics.is_some().then_some(vitals.at.0);
            (vitals.metrics.clone(), at, vitals.agent_version.clone(), vitals.kernel.clone())
        })
        .unwrap_or_default();
    let (stored_version, stored_kernel) = record.version.split_once(", ").unwrap_or((&record.version, ""));
    let or = |fresh: String, stored: &str| if fresh.is_empty() { stored.to_owned() } else { fresh };
    v1::Node {
        node: id.0,
        name: record.name.clone(),
        pool: record.pool.0.clone(),
        state: record.state().to_owned(),
        liveness: record.liveness.name().to_owned(),
        duty: record.duty.name().to_owned(),
        hold: record.hold.name().to_owned(),
        capacity: Some(record.capacity.into()),
        allocated: view.as_ref().map(|view| view.allocated.into()),
        running: view.as_ref().map_or(0, |view| view.running),
        queued: view.as_ref().map_or(0, |view| view.queued),
        joined_ms: record.joined.0,
        reason,
        actor,
        duty_since_ms: since,
        agent_version: or(agent_version, stored_version),
        metrics,
        metrics_ms,
        rolling: record.rolling.map(|rolling| rolling.0),
        drain: drain(record),
        labels: record.labels.clone().into_iter().collect(),
        fences: record.fences.iter().cloned().collect(),
        attempts_total: record.attempts_total,
        incarnation: record.incarnation.0,
        boot_id: record.boot_id.clone(),
        kernel: or(kernel, stored_kernel),
    }
}

/// Why a node is not simply ready: who, and since when.
fn why(record: &NodeRecord) -> (String, String, Option<u64>) {
    let of_drain = |drain: &Drain, since: u64| (drain.order.reason.clone(), drain.order.actor.0.clone(), Some(since));
    match (record.liveness, &record.duty, &record.hold) {
        (Liveness::Silent(at) | Liveness::Lost(at), _, _) => ("no heartbeat".to_owned(), String::new(), Some(at.0)),
        (_, Duty::Cordoned(mark), _) => (mark.reason.clone(), mark.actor.0.clone(), Some(mark.at.0)),
        (_, Duty::Draining(drain), _) => of_drain(drain, drain.requested.0),
        (_, Duty::Drained { drain, proved } | Duty::Stopping { drain, proved }, _) => of_drain(drain, proved.0),
        (_, Duty::Eligible, Hold::Cooling { reason, .. }) => (reason.clone(), String::new(), None),
        (Liveness::Gone(at), Duty::Eligible, Hold::None) => (String::new(), String::new(), Some(at.0)),
        (Liveness::Live, Duty::Eligible, Hold::None) if record.disk_full.is_some() => {
            ("its disk is nearly full".to_owned(), String::new(), record.disk_full.map(|at| at.0))
        }
        (Liveness::Joining | Liveness::Live, Duty::Eligible, Hold::None) => (String::new(), String::new(), None),
    }
}

/// Why a node that takes work is about to be drained.
fn turn_of(fleet: &Fleet, record: &NodeRecord) -> Option<(String, String, Option<u64>)> {
    let id = record.rolling?;
    let rolling = fleet.meta().rollings.get(&id)?;
    let reason = format!("waits for its turn in {id}: {}", rolling.order.reason);
    Some((reason, rolling.order.actor.0.clone(), Some(rolling.requested.0)))
}

fn drain(record: &NodeRecord) -> Option<v1::Drain> {
    let drain = record.drain()?;
    let proved_ms = match &record.duty {
        Duty::Drained { proved, .. } | Duty::Stopping { proved, .. } => Some(proved.0),
        Duty::Draining(_) | Duty::Eligible | Duty::Cordoned(_) => None,
    };
    Some(v1::Drain {
        revision: drain.revision.0,
        deadline_ms: drain.order.deadline.map(|at| at.0),
        then: convert::then_name(drain.order.then).to_owned(),
        reason: drain.order.reason.clone(),
        actor: drain.order.actor.0.clone(),
        requested_ms: drain.requested.0,
        proved_ms,
    })
}

/// A pool with its policy as text, as it was last looked at.
pub(super) fn pool(fleet: &Fleet, name: &muster_core::ids::PoolName) -> Option<v1::Pool> {
    let record = fleet.pool(name)?;
    let view = fleet.pool_view(name)?;
    let small = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let members = || fleet.nodes().filter(|(_, node)| node.pool == *name);
    let here = members().filter(|(_, node)| !matches!(node.liveness, Liveness::Gone(_) | Liveness::Lost(_)));
    let draining = members().filter(|(_, node)| node.drain().is_some() && !node.is_asleep());
    let waking: BTreeSet<NodeId> = record.hosts.values().filter_map(Host::waking).collect();
    let asleep = members().filter(|(id, node)| node.is_asleep() && !waking.contains(id));
    let own = members().filter(|(_, node)| node.host.is_none() && !matches!(node.liveness, Liveness::Gone(_)));
    let nodes = small(here.count());
    Some(v1::Pool {
        name: name.0.clone(),
        policy: toml::to_string(&record.policy).unwrap_or_default(),
        nodes,
        booting: small(fleet.booting(name)),
        draining: small(draining.count()),
        wanted: if view.at == Timestamp(0) { nodes } else { autoscale::wanted(&record.policy, view) },
        explanation: fleet.explain_pool(name),
        decided_ms: view.at.0,
        idle: small(view.idle.len()),
        asleep: small(asleep.count()),
        hosts: small(record.hosts.len() + own.count()),
        min: record.policy.min,
        max: record.policy.max,
        queue: view.readings.queue,
        paused: match (&record.stopped, &record.paused) {
            (Some(mark), _) => format!("{} ({})", mark.reason, mark.actor),
            (None, paused) => paused.clone().unwrap_or_default(),
        },
        pinned: view.pin_in_force().map(|pinned| pinned.size),
        spent_today_micros: record.policy.cost.map(|_| view.spent_today.0),
    })
}

/// A line of history; nodes by their names.
pub(super) fn event(context: &Context, entry: Entry) -> v1::FleetEvent {
    let node = entry.subject.strip_prefix("node/n").and_then(|id| id.parse().ok()).map(NodeId);
    let subject = node.map_or(entry.subject, |node| format!("node/{}", context.members.name(node)));
    v1::FleetEvent {
        revision: entry.revision,
        time_ms: entry.at.0,
        subject,
        kind: entry.kind,
        reason: entry.reason,
        actor: entry.actor.unwrap_or_default(),
    }
}

/// The end of a task that never had an attempt which ended.
pub(super) fn end_by_name(name: &str) -> Option<v1::End> {
    match name {
        "cancelled" => Some(convert::end_to_wire(&End::Cancelled)),
        "succeeded" => Some(convert::end_to_wire(&End::Succeeded)),
        _other => None,
    }
}
