//! The door before every service but health: it opens when this coordinator
//! leads. Until then each call is told who does; while nobody is known to, it
//! waits a little for what comes of it, so that a takeover costs a caller no
//! more than the takeover itself.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use muster_core::limits;
use muster_proto::LEADER_METADATA;
use tokio::sync::watch;
use tonic::{Status, body::Body, service::Routes};
use tower::{Layer, Service, ServiceExt as _};

use super::auth::{self, Auth, Need};
use crate::{identity::Caller, shared::Members};

/// What is behind the door.
pub type Services = Auth<Routes>;

/// Whether it is open.
#[derive(Clone, Debug)]
enum State {
    Closed { leader: Option<String> },
    Open(Services),
}

/// One for all connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Door(watch::Sender<State>);

impl Default for Door {
    fn default() -> Self {
        Self(watch::Sender::new(State::Closed { leader: None }))
    }
}

impl Door {
    /// This coordinator leads.
    pub fn open(&self, services: Services) {
        self.0.send_replace(State::Open(services));
    }

    /// It does not; told where the leader is dialled, if that is known.
    pub fn close(&self, leader: Option<String>) {
        self.0.send_replace(State::Closed { leader });
    }

    /// The sentence for a page or a log; none: it is open.
    #[must_use]
    pub fn standing_by(&self) -> Option<String> {
        match &*self.0.borrow() {
            State::Open(_) => None,
            State::Closed { leader } => Some(sentence(leader.as_deref())),
        }
    }
}

fn sentence(leader: Option<&str>) -> String {
    match leader {
        Some(leader) => format!("this coordinator is a standby; {leader} leads"),
        None => String::from("this coordinator is a standby, and none is known to lead at present; try again"),
    }
}

fn refusal(leader: Option<&str>) -> Status {
    let mut status = Status::unavailable(sentence(leader));
    if let Some(value) = leader.and_then(|leader| leader.parse().ok()) {
        status.metadata_mut().insert(LEADER_METADATA, value);
    }
    status
}

/// Who may be told at all: as the table says, but nodes are not known here.
fn admit(request: &Request<Body>) -> Result<(), Status> {
    let nobody = Caller::Nobody;
    let caller = request.extensions().get::<Arc<Caller>>().map_or(&nobody, AsRef::as_ref);
    let path = request.uri().path();
    match (auth::need(path), caller) {
        (Some(Need::Node), Caller::Node { .. }) => Ok(()),
        (_, _) => auth::check(path, caller, &Members::default()),
    }
}

impl<S> Layer<S> for Door {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, door: self.clone() }
    }
}

/// The health check, and all else behind the door.
#[derive(Clone, Debug)]
pub struct Guarded<S> {
    inner: S,
    door: Door,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if auth::need(request.uri().path()) == Some(Need::Open) && request.uri().path().starts_with(HEALTH) {
            return Box::pin(self.inner.call(request));
        }
        let state = self.door.0.borrow();
        if let State::Open(services) = &*state {
            return Box::pin(services.clone().oneshot(request));
        }
        drop(state);
        Box::pin(wait(self.door.0.subscribe(), request))
    }
}

const HEALTH: &str = "/grpc.health.v1.Health/";

async fn wait(mut state: watch::Receiver<State>, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    if let Err(status) = admit(&request) {
        return Ok(status.into_http());
    }
    let settled = |state: &State| !matches!(state, State::Closed { leader: None });
    let patience = Duration::from_millis(limits::LEADER_AWAITED.0);
    let settled = match tokio::time::timeout(patience, state.wait_for(settled)).await {
        Ok(Ok(state)) => state.clone(),
        // Still nobody, or this process is ending.
        Ok(Err(_)) | Err(_) => State::Closed { leader: None },
    };
    match settled {
        State::Open(services) => services.oneshot(request).await,
        State::Closed { leader } => Ok(refusal(leader.as_deref()).into_http()),
    }
}
