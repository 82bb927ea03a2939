//! Drains: of chosen nodes at once, or in turn, and what they wait for.

use std::collections::BTreeSet;

use muster_core::{
    effect::Reply,
    event::{DrainOrder, DrainThen, Event},
    fleet::Fleet,
    ids::{Actor, JobId, NodeId},
    rolling::{RollingId, RollingOrder},
    spec::OnDrain,
    time::{Millis, Timestamp},
};
use muster_proto::{convert, v1};
use tonic::Status;

use super::{Context, enrollment, shown, status};

/// A deadline below this is a span from now on, not a point in time: no clock of ours is in 1973.
const SPAN_MAX_MS: u64 = 100_000_000_000;
/// Jobs of which a dry run says where they could go.
const ELSEWHERE_MAX: usize = 100;

/// What is asked of each node.
struct Asked {
    within: Option<Millis>,
    deadline: Option<Timestamp>,
    then: DrainThen,
    actor: Actor,
    reason: String,
}

impl Asked {
    fn read(request: &v1::DrainRequest, actor: Actor, now: Timestamp) -> Result<Self, Status> {
        let deadline = request.deadline_ms.map(|at| if at < SPAN_MAX_MS { now + Millis(at) } else { Timestamp(at) });
        Ok(Self {
            within: deadline.map(|at| at.since(now)),
            deadline,
            then: convert::drain_then(&request.then).map_err(status::rejected)?,
            actor,
            reason: convert::reason(&request.reason).map_err(status::rejected)?,
        })
    }

    fn order(&self) -> DrainOrder {
        let (actor, reason) = (self.actor.clone(), self.reason.clone());
        DrainOrder { deadline: self.deadline, then: self.then, refusable: false, actor, reason }
    }

    fn rolling(&self, at_once: u32) -> RollingOrder {
        let (actor, reason) = (self.actor.clone(), self.reason.clone());
        RollingOrder { at_once, within: self.within, then: self.then, actor, reason }
    }
}

/// Drains the chosen nodes, or says what that would do.
pub(super) async fn drain(
    context: &std::sync::Arc<Context>,
    request: v1::DrainRequest,
    actor: Actor,
    chosen: Vec<NodeId>,
    mut refused: Vec<String>,
) -> Result<v1::DrainResponse, Status> {
    let asked = Asked::read(&request, actor, context.handle.now())?;
    let mut rolling = None;
    let mut begun = Vec::new();
    match (request.dry_run, request.at_once) {
        (true, _) => begun.clone_from(&chosen),
        (false, Some(at_once)) => {
            let (nodes, order) = (chosen.clone(), asked.rolling(at_once));
            let ask = |request| Event::DrainRolling { request, nodes, order };
            let reply = context.handle.ask(ask).await.map_err(status::stopped)?.map_err(status::denied)?;
            let Reply::Rolling { rolling: id, refused: others, nodes } = reply else {
                return Err(enrollment::unexpected(&reply));
            };
            rolling = Some(id);
            begun.extend(nodes);
            refused.extend(others);
        }
        (false, None) => {
            for node in &chosen {
                let order = asked.order();
                let drain = |request| Event::Drain { request, node: *node, order };
                match context.handle.ask(drain).await.map_err(status::stopped)? {
                    Ok(_) => begun.push(*node),
                    Err(denied) => refused.push(denied.to_string()),
                }
            }
        }
    }
    let (shown, dry_run) = (context.clone(), request.dry_run);
    let read = move |fleet: &Fleet, now| {
        let mut response = v1::DrainResponse { refused, ..Default::default() };
        for id in &begun {
            let Some(record) = fleet.node(*id) else { continue };
            response.nodes.push(shown::node(&shown, fleet, *id, record));
            response.blockers.extend(blockers(fleet, *id, asked.deadline, now));
        }
        if dry_run {
            response.elsewhere = elsewhere(fleet, &response.blockers, &chosen);
        }
        response.rolling = rolling.and_then(|id| self::rolling(fleet, id, now));
        response
    };
    context.handle.query(read).await.map_err(status::stopped)
}

/// Rolling drains that go on, with their nodes.
pub(super) async fn list(context: &std::sync::Arc<Context>) -> Result<v1::ListRollingResponse, Status> {
    let shown = context.clone();
    let read = move |fleet: &Fleet, now| {
        let ids = fleet.meta().rollings.keys();
        let rolling = ids.filter_map(|id| rolling(fleet, *id, now)).collect();
        let nodes = fleet.nodes().filter(|(_, record)| record.rolling.is_some());
        let nodes = nodes.map(|(id, record)| shown::node(&shown, fleet, id, record)).collect();
        v1::ListRollingResponse { rolling, nodes }
    };
    context.handle.query(read).await.map_err(status::stopped)
}

/// Ends a rolling drain.
pub(super) async fn cancel(
    context: &std::sync::Arc<Context>,
    request: v1::CancelRollingRequest,
    actor: Actor,
) -> Result<v1::NodesChanged, Status> {
    let reason = convert::reason(&request.reason).map_err(status::rejected)?;
    let rolling = RollingId(request.rolling);
    let ask = |request| Event::CancelRolling { request, rolling, actor, reason };
    let reply = context.handle.ask(ask).await.map_err(status::stopped)?.map_err(status::denied)?;
    let nodes: Vec<NodeId> = match reply {
        Reply::RollingCancelled { waited, resumed } => waited.into_iter().chain(resumed).collect(),
        other => return Err(enrollment::unexpected(&other)),
    };
    let shown = context.clone();
    let read = move |fleet: &Fleet, _| {
        let nodes = nodes.into_iter().filter_map(|id| Some(shown::node(&shown, fleet, id, fleet.node(id)?)));
        v1::NodesChanged { nodes: nodes.collect(), refused: Vec::new() }
    };
    context.handle.query(read).await.map_err(status::stopped)
}

fn rolling(fleet: &Fleet, id: RollingId, now: Timestamp) -> Option<v1::RollingDrain> {
    let view = fleet.rolling(id, now)?;
    let order = &view.rolling.order;
    Some(v1::RollingDrain {
        rolling: id.0,
        at_once: order.at_once,
        within_ms: order.within.map(|within| within.0),
        then: convert::then_name(order.then).to_owned(),
        reason: order.reason.clone(),
        actor: order.actor.0.clone(),
        requested_ms: view.rolling.requested.0,
        nodes: view.rolling.nodes,
        drained: view.rolling.drained,
        blockers: view.draining.iter().flat_map(|node| blockers(fleet, *node, None, now)).collect(),
        draining: view.draining.into_iter().map(|node| node.0).collect(),
        waiting: view.waiting.into_iter().map(|node| node.0).collect(),
        time_left_ms: view.left.map(|left| left.0),
    })
}

/// What a drain waits for, or for a dry run would wait for until `deadline`.
fn blockers(fleet: &Fleet, node: NodeId, deadline: Option<Timestamp>, now: Timestamp) -> Vec<v1::Blocker> {
    let in_force = fleet.node(node).and_then(|record| record.drain()).and_then(|drain| drain.order.deadline);
    let deadline = in_force.into_iter().chain(deadline).min();
    let blockers = fleet.blockers(node, now).into_iter().map(|blocker| {
        let ends_by = blocker.ends_by.into_iter().chain(deadline).min();
        let on_drain = match blocker.on_drain {
            OnDrain::Finish => v1::OnDrain::Finish,
            OnDrain::Requeue => v1::OnDrain::Requeue,
            OnDrain::Checkpoint { .. } => v1::OnDrain::Checkpoint,
        };
        v1::Blocker {
            node: node.0,
            attempt: Some(blocker.attempt.into()),
            running_ms: blocker.age.0,
            ends_by_ms: ends_by.map(|at| at.0),
            on_drain: on_drain.into(),
            expected_ms: blocker.expected.map(|at| at.0),
            ended_by_deadline: on_drain == v1::OnDrain::Finish && ends_by.is_some() && ends_by == deadline,
        }
    });
    blockers.collect()
}

/// Where what would leave could begin again.
fn elsewhere(fleet: &Fleet, blockers: &[v1::Blocker], drained: &[NodeId]) -> Vec<v1::Elsewhere> {
    let without: BTreeSet<NodeId> = drained.iter().copied().collect();
    let jobs: BTreeSet<u64> = blockers.iter().filter_map(|blocker| Some(blocker.attempt?.job)).collect();
    let places = jobs.into_iter().take(ELSEWHERE_MAX).filter_map(|job| {
        let (nodes, reason) = fleet.elsewhere(JobId(job), &without)?;
        Some(v1::Elsewhere { job, nodes, reason })
    });
    places.collect()
}
