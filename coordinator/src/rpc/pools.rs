//! Pools: policies in force, and every scaling decision with its reason.

use std::sync::Arc;

use muster_core::{
    effect::Sizes,
    event::{Event, PoolOrder},
    fleet::Fleet,
    ids::{Actor, PoolName},
    policy::PoolPolicy,
    time::Millis,
};
use muster_proto::{convert, v1};
use tonic::{Request, Response, Status};

use super::{Context, blocking, person, shown, status};
use crate::store::HistoryQuery;

const HISTORY_MAX: u32 = 1_000;
const POLICY_BYTES_MAX: usize = 64 << 10;

/// The service.
#[derive(Debug)]
pub struct Pools(pub Arc<Context>);

#[tonic::async_trait]
impl v1::pools_server::Pools for Pools {
    async fn list(&self, _: Request<v1::ListPoolsRequest>) -> Result<Response<v1::ListPoolsResponse>, Status> {
        let read = |fleet: &Fleet, _| fleet.pools().filter_map(|(name, _)| shown::pool(fleet, name)).collect();
        let pools = self.0.handle.query(read).await.map_err(status::stopped)?;
        Ok(Response::new(v1::ListPoolsResponse { pools }))
    }

    async fn set(&self, request: Request<v1::SetPoolRequest>) -> Result<Response<v1::Pool>, Status> {
        let (actor, _) = person(&request)?;
        let text = request.into_inner().policy;
        if text.len() > POLICY_BYTES_MAX {
            return Err(Status::invalid_argument(format!("policy: has at most {POLICY_BYTES_MAX} bytes")));
        }
        let policy: Box<PoolPolicy> =
            toml::from_str(&text).map_err(|error| Status::invalid_argument(format!("policy: {error}")))?;
        let name = PoolName(convert::name("policy.name", &policy.name.0).map_err(status::rejected)?);
        let set = |request| Event::SetPool { request, policy, actor: Actor(actor) };
        self.0.handle.ask(set).await.map_err(status::stopped)?.map_err(status::denied)?;
        self.shown(name).await
    }

    async fn pause(&self, request: Request<v1::PoolRequest>) -> Result<Response<v1::Pool>, Status> {
        self.steer_as_told(request, PoolOrder::Pause).await
    }

    async fn resume(&self, request: Request<v1::PoolRequest>) -> Result<Response<v1::Pool>, Status> {
        self.steer_as_told(request, PoolOrder::Resume).await
    }

    async fn scale(&self, request: Request<v1::ScalePoolRequest>) -> Result<Response<v1::Pool>, Status> {
        let (actor, _) = person(&request)?;
        let request = request.into_inner();
        let (name, reason) = checked(&request.pool, &request.reason)?;
        let now = self.0.handle.query(|_, now| now).await.map_err(status::stopped)?;
        let until = request.hold_ms.map(|hold| now + Millis(hold));
        self.steer(&name, PoolOrder::Scale { size: request.size, until }, actor, reason).await?;
        self.shown(name).await
    }

    async fn delete(&self, request: Request<v1::PoolRequest>) -> Result<Response<v1::DeletePoolResponse>, Status> {
        let (actor, _) = person(&request)?;
        let request = request.into_inner();
        let (name, reason) = checked(&request.pool, &request.reason)?;
        self.steer(&name, PoolOrder::Delete, actor, reason).await?;
        Ok(Response::new(v1::DeletePoolResponse {}))
    }

    async fn history(
        &self,
        request: Request<v1::PoolHistoryRequest>,
    ) -> Result<Response<v1::PoolHistoryResponse>, Status> {
        let pool = request.into_inner().pool;
        let subject = format!("pool/{pool}");
        let query = HistoryQuery { subject, kind: "scaled".into(), limit: HISTORY_MAX, newest: true, after: 0 };
        let reader = self.0.reader.clone();
        let entries = blocking(move || reader.history(&query).map_err(status::store)).await?;
        let decisions = entries.into_iter().filter_map(|entry| {
            let Sizes { from, to, inputs } = entry.sizes?;
            Some(v1::ScalingDecision {
                time_ms: entry.at.0,
                pool: pool.clone(),
                from,
                to,
                reason: entry.reason,
                inputs,
            })
        });
        Ok(Response::new(v1::PoolHistoryResponse { decisions: decisions.collect() }))
    }
}

impl Pools {
    async fn shown(&self, name: PoolName) -> Result<Response<v1::Pool>, Status> {
        let pool = self.0.handle.query(move |fleet, _| shown::pool(fleet, &name)).await.map_err(status::stopped)?;
        pool.map(Response::new).ok_or_else(|| Status::not_found("the pool was removed meanwhile"))
    }

    async fn steer(&self, name: &PoolName, order: PoolOrder, actor: String, reason: String) -> Result<(), Status> {
        let pool = name.clone();
        let steer = |request| Event::SteerPool { request, pool, order, actor: Actor(actor), reason };
        self.0.handle.ask(steer).await.map_err(status::stopped)?.map_err(status::denied)?;
        Ok(())
    }

    async fn steer_as_told(
        &self,
        request: Request<v1::PoolRequest>,
        order: PoolOrder,
    ) -> Result<Response<v1::Pool>, Status> {
        let (actor, _) = person(&request)?;
        let request = request.into_inner();
        let (name, reason) = checked(&request.pool, &request.reason)?;
        self.steer(&name, order, actor, reason).await?;
        self.shown(name).await
    }
}

fn checked(pool: &str, reason: &str) -> Result<(PoolName, String), Status> {
    let name = PoolName(convert::name("pool", pool).map_err(status::rejected)?);
    Ok((name, convert::reason(reason).map_err(status::rejected)?))
}
