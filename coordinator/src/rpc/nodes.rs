//! Nodes: see, cordon, drain, remove.

use std::sync::Arc;

use muster_core::{
    event::Event,
    fleet::Fleet,
    ids::{Actor, NodeId, RequestId},
};
use muster_proto::{convert, v1};
use tonic::{Request, Response, Status};

use super::{Context, drains, fleet::history_of, person, shown, status};

const EVENTS_SHOWN: u32 = 50;

/// The service.
#[derive(Debug)]
pub struct Nodes(pub Arc<Context>);

/// Chosen nodes, and a sentence for each that was named and is not there.
type Chosen = (Vec<NodeId>, Vec<String>);

/// By name, else by number, with or without its `n`.
fn find(fleet: &Fleet, text: &str) -> Option<NodeId> {
    if let Some(id) = fleet.node_named(text) {
        return Some(id);
    }
    let id = NodeId(text.strip_prefix('n').unwrap_or(text).parse().ok()?);
    fleet.node(id).map(|_| id)
}

fn select(fleet: &Fleet, selector: &v1::NodeSelector) -> Chosen {
    let (mut chosen, mut refused) = (Vec::new(), Vec::new());
    for name in &selector.nodes {
        match find(fleet, name) {
            Some(id) => chosen.push(id),
            None => refused.push(format!(
                "there is no node `{}`; `muster node list` shows those that are known",
                name.escape_default()
            )),
        }
    }
    if !selector.labels.is_empty() || !selector.pool.is_empty() {
        let matches = fleet.nodes().filter(|(_, node)| {
            (selector.pool.is_empty() || node.pool.0 == selector.pool)
                && selector.labels.iter().all(|(key, value)| node.labels.get(key) == Some(value))
        });
        chosen.extend(matches.map(|(id, _)| id));
    }
    chosen.sort_unstable();
    chosen.dedup();
    (chosen, refused)
}

#[tonic::async_trait]
impl v1::nodes_server::Nodes for Nodes {
    async fn list(&self, _: Request<v1::ListNodesRequest>) -> Result<Response<v1::ListNodesResponse>, Status> {
        let context = self.0.clone();
        let read = move |fleet: &Fleet, _| {
            fleet.nodes().map(|(id, record)| shown::node(&context, fleet, id, record)).collect()
        };
        let nodes = self.0.handle.query(read).await.map_err(status::stopped)?;
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn inspect(&self, request: Request<v1::InspectNodeRequest>) -> Result<Response<v1::NodeDetail>, Status> {
        let name = request.into_inner().node;
        let (context, wanted) = (self.0.clone(), name.clone());
        let read = move |fleet: &Fleet, _| {
            let id = find(fleet, &wanted)?;
            let node = shown::node(&context, fleet, id, fleet.node(id)?);
            let attempts = fleet.attempts_on(id).map(|(id, record)| shown::live_attempt(&context, id, record));
            Some((id, node, attempts.collect()))
        };
        let found = self.0.handle.query(read).await.map_err(status::stopped)?;
        let Some((id, node, attempts)) = found else { return Err(no_node(&name)) };
        let events = history_of(&self.0, format!("node/{id}"), EVENTS_SHOWN).await?;
        Ok(Response::new(v1::NodeDetail { node: Some(node), attempts, events }))
    }

    async fn cordon(&self, request: Request<v1::CordonRequest>) -> Result<Response<v1::NodesChanged>, Status> {
        self.change(request, |request, node, actor, reason| Event::Cordon { request, node, actor, reason }).await
    }

    async fn uncordon(&self, request: Request<v1::CordonRequest>) -> Result<Response<v1::NodesChanged>, Status> {
        self.change(request, |request, node, actor, reason| Event::Uncordon { request, node, actor, reason }).await
    }

    async fn resume(&self, request: Request<v1::CordonRequest>) -> Result<Response<v1::NodesChanged>, Status> {
        self.change(request, |request, node, actor, reason| Event::Resume { request, node, actor, reason }).await
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let (name, _) = person(&request)?;
        let request = request.into_inner();
        let (chosen, refused) = self.choose(request.selector.clone().unwrap_or_default()).await?;
        drains::drain(&self.0, request, Actor(name), chosen, refused).await.map(Response::new)
    }

    async fn list_rolling(
        &self,
        _: Request<v1::ListRollingRequest>,
    ) -> Result<Response<v1::ListRollingResponse>, Status> {
        drains::list(&self.0).await.map(Response::new)
    }

    async fn cancel_rolling(
        &self,
        request: Request<v1::CancelRollingRequest>,
    ) -> Result<Response<v1::NodesChanged>, Status> {
        let (name, _) = person(&request)?;
        drains::cancel(&self.0, request.into_inner(), Actor(name)).await.map(Response::new)
    }

    async fn remove(&self, request: Request<v1::RemoveNodeRequest>) -> Result<Response<v1::NodesChanged>, Status> {
        let (name, _) = person(&request)?;
        let request = request.into_inner();
        let reason = convert::reason(&request.reason).map_err(status::rejected)?;
        let wanted = request.node.clone();
        let found = self.0.handle.query(move |fleet, _| find(fleet, &wanted)).await.map_err(status::stopped)?;
        let Some(node) = found else { return Err(no_node(&request.node)) };
        let force = request.force;
        let remove = |request| Event::RemoveNode { request, node, force, actor: Actor(name), reason };
        self.0.handle.ask(remove).await.map_err(status::stopped)?.map_err(status::denied)?;
        Ok(Response::new(v1::NodesChanged::default()))
    }
}

impl Nodes {
    async fn choose(&self, selector: v1::NodeSelector) -> Result<Chosen, Status> {
        if selector.nodes.is_empty() && selector.labels.is_empty() && selector.pool.is_empty() {
            return Err(Status::invalid_argument("selector: name nodes, labels or a pool"));
        }
        let alone = selector.nodes.len() == 1 && selector.labels.is_empty() && selector.pool.is_empty();
        let chosen = self.0.handle.query(move |fleet, _| select(fleet, &selector)).await.map_err(status::stopped)?;
        match (&chosen.0[..], &chosen.1[..]) {
            // One node was meant and is not there: that is an error, not a partial success.
            ([], [sentence]) if alone => Err(Status::not_found(sentence.clone())),
            _chosen => Ok(chosen),
        }
    }

    /// One event a node; a single refusal is the call's own.
    async fn change(
        &self,
        request: Request<v1::CordonRequest>,
        event: fn(RequestId, NodeId, Actor, String) -> Event,
    ) -> Result<Response<v1::NodesChanged>, Status> {
        let (name, _) = person(&request)?;
        let request = request.into_inner();
        let reason = convert::reason(&request.reason).map_err(status::rejected)?;
        let (chosen, mut refused) = self.choose(request.selector.unwrap_or_default()).await?;
        let mut changed = Vec::new();
        for node in &chosen {
            let ask = |request| event(request, *node, Actor(name.clone()), reason.clone());
            match self.0.handle.ask(ask).await.map_err(status::stopped)? {
                Ok(_) => changed.push(*node),
                Err(denied) if chosen.len() == 1 => return Err(status::denied(denied)),
                Err(denied) => refused.push(denied.to_string()),
            }
        }
        let context = self.0.clone();
        let read = move |fleet: &Fleet, _| {
            let nodes = changed.into_iter().filter_map(|id| Some(shown::node(&context, fleet, id, fleet.node(id)?)));
            v1::NodesChanged { nodes: nodes.collect(), refused }
        };
        self.0.handle.query(read).await.map(Response::new).map_err(status::stopped)
    }
}

fn no_node(name: &str) -> Status {
    let name = name.escape_default();
    Status::not_found(format!("there is no node `{name}`; `muster node list` shows those that are known"))
}

/// For the other services: a node's number by its name.
pub(super) async fn number(context: &Context, name: &str) -> Result<NodeId, Status> {
    let wanted = name.to_owned();
    let found = context.handle.query(move |fleet, _| find(fleet, &wanted)).await.map_err(status::stopped)?;
    found.ok_or_else(|| no_node(name))
}
