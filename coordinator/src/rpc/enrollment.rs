//! Join: a token and a key in, a certificate out. The only call besides health
//! that needs no certificate, so nothing of the request is trusted before the
//! token is.

use std::sync::Arc;

use muster_core::{effect::Reply, event::Event, fleet::Fleet, ids::NodeId, limits, time::Millis};
use muster_proto::{convert, v1};
use tonic::{Request, Response, Status};

use super::{Context, blocking, status};
use crate::identity::NodeKeyRequest;

/// The service.
#[derive(Debug)]
pub struct Enrollment(pub Arc<Context>);

#[tonic::async_trait]
impl v1::enrollment_server::Enrollment for Enrollment {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let request = request.into_inner();
        let context = &self.0;
        let key = NodeKeyRequest::read(&request.csr).map_err(status::identity)?;
        let (tokens, digest, now) = (context.tokens.clone(), key.digest, context.handle.now());
        let token = blocking(move || tokens.redeem(&request.token, digest, now).map_err(status::token)).await?;
        let name = convert::name("node_name", &request.node_name).map_err(status::rejected)?;
        let (pool, host, shown) = (token.pool, token.host, context.members.shown());
        let enrol = |request| Event::Enroll { request, name, pool, host, key: digest, shown };
        let answer = context.handle.ask(enrol).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::Enrolled { node } => certificate(context, &key, node).await,
            other => Err(unexpected(&other)),
        }
    }
}

/// A signed certificate with all that a host needs to use it.
pub(super) async fn certificate(
    context: &Context,
    key: &NodeKeyRequest,
    node: NodeId,
) -> Result<Response<v1::JoinResponse>, Status> {
    let life = context.handle.query(move |fleet, _| life_of(fleet, node)).await.map_err(status::stopped)?;
    let leaf = context.authority.sign_node(key, node, life).map_err(status::identity)?;
    let ca = context.authority.ca();
    Ok(Response::new(v1::JoinResponse {
        node: node.0,
        certificate_chain: vec![leaf.to_vec().into(), ca.to_vec().into()],
        ca: ca.to_vec().into(),
        // By the driver's clock, in whose time ends are told.
        not_after_ms: (context.handle.now() + life).0,
        coordinators: context.tokens.coordinators().to_vec(),
    }))
}

/// A host that sleeps cannot renew: its certificate outlasts its sleep. Whoever is removed is refused at once all the same.
fn life_of(fleet: &Fleet, node: NodeId) -> Millis {
    let pool = fleet.node(node).and_then(|record| fleet.pool(&record.pool));
    match pool.and_then(|pool| pool.policy.wake.as_ref()) {
        Some(_program) => limits::SLEEPER_CERTIFICATE_LIFE,
        None => limits::NODE_CERTIFICATE_LIFE,
    }
}

/// The core answered another question: a bug, told as one.
pub(super) fn unexpected(reply: &Reply) -> Status {
    tracing::error!(?reply, "the core answered another question than was asked");
    Status::internal("the coordinator answered another question; see its log")
}
