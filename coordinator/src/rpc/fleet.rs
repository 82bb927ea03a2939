//! The fleet as a whole: status, history, tokens.

use std::sync::Arc;

use muster_core::{
    effect::Reply,
    event::Event,
    fleet::Fleet,
    ids::{Actor, PoolName},
    limits,
    node::{Duty, Liveness, NodeRecord},
    resources::Resources,
    time::{Millis, Timestamp},
};
use muster_proto::{convert, v1};
use tonic::{Request, Response, Status};

use super::{Answers, Context, blocking, enrollment, nodes, person, shown, status, watch};
use crate::store::HistoryQuery;

/// A token that lives longer is a secret that someone forgets.
const TOKEN_LIFE_MAX: Millis = Millis::from_secs(30 * 86_400);
/// Pool of a token that names none.
const DEFAULT_POOL: &str = "default";

/// The service.
#[derive(Debug)]
pub struct FleetService(pub Arc<Context>);

#[tonic::async_trait]
impl v1::fleet_server::Fleet for FleetService {
    type EventsStream = Answers<v1::FleetEvent>;

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::FleetStatus>, Status> {
        let started = self.0.started;
        let read = move |fleet: &Fleet, now| status_of(fleet, started, now);
        let mut status = self.0.handle.query(read).await.map_err(status::stopped)?;
        status.alarms.extend(self.0.room.check().await.err().map(|lack| lack.to_string()));
        let reader = self.0.reader.clone();
        let last = HistoryQuery { limit: 1, newest: true, ..Default::default() };
        let entries = blocking(move || reader.history(&last).map_err(status::store)).await?;
        status.revision = entries.last().map_or(0, |entry| entry.revision);
        Ok(Response::new(status))
    }

    async fn events(&self, request: Request<v1::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let request = request.into_inner();
        let subject = subject(&self.0, &request.subject).await?;
        Ok(Response::new(watch::open(self.0.clone(), subject, request.after, request.limit, request.follow)))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let request = request.into_inner();
        let pool = convert::pool("pool", &request.pool).map_err(status::rejected)?;
        let life = request.valid_ms.map_or(limits::TOKEN_LIFE, Millis);
        if life.0 == 0 || life > TOKEN_LIFE_MAX {
            return Err(Status::invalid_argument(format!("valid_ms: is more than 0 and at most {TOKEN_LIFE_MAX}")));
        }
        let pool = match pool {
            Some(pool) => pool,
            None => self.only_pool().await?,
        };
        let expires = self.0.handle.now() + life;
        let tokens = self.0.tokens.clone();
        let token = blocking(move || tokens.create(&pool, None, expires).map_err(status::token)).await?;
        Ok(Response::new(v1::CreateTokenResponse { token, expires_ms: expires.0 }))
    }

    async fn accept_loss(
        &self,
        request: Request<v1::AcceptLossRequest>,
    ) -> Result<Response<v1::AcceptLossResponse>, Status> {
        let actor = Actor(person(&request)?.0);
        let reason = convert::reason(&request.into_inner().reason).map_err(status::rejected)?;
        let ask = |request| Event::AcceptLoss { request, actor, reason };
        let answer = self.0.handle.ask(ask).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::LossAccepted { lost } => Ok(Response::new(v1::AcceptLossResponse { lost })),
            other => Err(enrollment::unexpected(&other)),
        }
    }

    async fn release_brake(
        &self,
        request: Request<v1::ReleaseBrakeRequest>,
    ) -> Result<Response<v1::ReleaseBrakeResponse>, Status> {
        let actor = Actor(person(&request)?.0);
        let reason = convert::reason(&request.into_inner().reason).map_err(status::rejected)?;
        let ask = |request| Event::ReleaseBrake { request, actor, reason };
        let answer = self.0.handle.ask(ask).await.map_err(status::stopped)?;
        match answer.map_err(status::denied)? {
            Reply::BrakeReleased { held, silent } => Ok(Response::new(v1::ReleaseBrakeResponse { held, silent })),
            other => Err(enrollment::unexpected(&other)),
        }
    }
}

impl FleetService {
    /// Where there is one pool, it is the one that was meant.
    async fn only_pool(&self) -> Result<PoolName, Status> {
        let read = |fleet: &Fleet, _| fleet.pools().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let mut pools = self.0.handle.query(read).await.map_err(status::stopped)?;
        Ok(match pools.len() {
            1 => pools.remove(0),
            _several => PoolName(DEFAULT_POOL.to_owned()),
        })
    }
}

fn status_of(fleet: &Fleet, started: Timestamp, now: Timestamp) -> v1::FleetStatus {
    let (nodes, nodes_ready) = fleet.node_counts();
    let mut capacity = Resources::default();
    let mut allocated = Resources::default();
    let mut running = 0;
    let mut alarms: Vec<String> = fleet.meta().loss.iter().map(|loss| loss.reason.clone()).collect();
    for (id, record) in fleet.nodes() {
        let Some(view) = fleet.node_view(id) else { continue };
        running += u64::from(view.running);
        match record.liveness {
            Liveness::Live => {
                capacity = capacity.plus(&record.capacity);
                allocated = allocated.plus(&view.allocated);
                alarms.extend(trouble_of(record).map(|trouble| format!("node {} {trouble}", record.name)));
            }
            Liveness::Silent(at) | Liveness::Lost(at) => {
                alarms.push(format!("node {} is {} for {}", record.name, record.liveness.name(), now.since(at)));
            }
            Liveness::Joining | Liveness::Gone(_) => {}
        }
    }
    let paused = fleet.pools().filter_map(|(name, pool)| Some((name, pool.paused.as_ref()?)));
    alarms.extend(paused.map(|(name, reason)| format!("pool {name} is paused: {reason}")));
    if let Some(until) = fleet.meta().brake_until.filter(|until| *until > now) {
        let left = until.since(now);
        alarms.push(format!(
            "much of the fleet fell silent at once: no eviction and no scale-in for {left}; \
             `muster node release-brake` if those hosts are gone"
        ));
    }
    v1::FleetStatus {
        coordinator_version: env!("CARGO_PKG_VERSION").to_owned(),
        term: fleet.meta().term.0,
        started_ms: started.0,
        nodes,
        nodes_ready,
        tasks_waiting: fleet.tasks_waiting(),
        tasks_running: running,
        revision: 0,
        alarms,
        capacity: Some(capacity.into()),
        allocated: Some(allocated.into()),
    }
}

/// Why the fleet by itself gives a node that it hears no more work; what a person asked for is no alarm.
fn trouble_of(record: &NodeRecord) -> Option<String> {
    match &record.duty {
        Duty::Cordoned(mark) if mark.actor == Actor(format!("host {}", record.name)) => {
            Some(format!("is cordoned: {}", mark.reason))
        }
        Duty::Draining(drain) | Duty::Drained { drain, .. } if drain.order.actor == Actor("coordinator".to_owned()) => {
            Some(format!("was drained for its faults: {}", drain.order.reason))
        }
        Duty::Cordoned(_) | Duty::Draining(_) | Duty::Drained { .. } | Duty::Stopping { .. } | Duty::Eligible => {
            record.disk_full.map(|_| "has little room left on its disk: nothing new is placed there".to_owned())
        }
    }
}

/// History names nodes by number: a name may be taken over, a number never is.
async fn subject(context: &Context, asked: &str) -> Result<String, Status> {
    match asked.strip_prefix("node/") {
        Some(name) => Ok(format!("node/{}", nodes::number(context, name).await?)),
        None => Ok(asked.to_owned()),
    }
}

/// The last events about something.
pub(super) async fn history_of(
    context: &Arc<Context>,
    subject: String,
    limit: u32,
) -> Result<Vec<v1::FleetEvent>, Status> {
    let query = HistoryQuery { subject, limit, newest: true, ..Default::default() };
    let reader = context.reader.clone();
    let entries = blocking(move || reader.history(&query).map_err(status::store)).await?;
    Ok(entries.into_iter().map(|entry| shown::event(context, entry)).collect())
}
