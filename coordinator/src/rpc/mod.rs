//! gRPC: translate, hand to the driver, answer. One file a noun.

pub mod agent;
pub mod auth;
mod blobs;
pub mod door;
mod drains;
pub mod enrollment;
pub mod fleet;
pub mod jobs;
mod logs;
pub mod nodes;
pub mod pools;
mod shown;
pub mod status;
mod watch;

pub use shown::Detail;

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use muster_core::time::Timestamp;
use tokio::task;
use tonic::{Request, Status};

use crate::{
    blobs::Blobs,
    driver::Handle,
    identity::{Authority, Caller},
    logs::Logs,
    person::Role,
    room::Room,
    shared::{Members, Vitals},
    starts::Bodies,
    store::Reader,
    tokens::Tokens,
};

/// A stream of answers.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What every service works with.
pub struct Context {
    /// The driver.
    pub handle: Handle,
    /// Committed rows.
    pub reader: Arc<dyn Reader>,
    /// Content-addressed bytes.
    pub blobs: Arc<Blobs>,
    /// Output.
    pub logs: Logs,
    /// On the disks.
    pub room: Room,
    /// What jobs run.
    pub bodies: Arc<Bodies>,
    /// Known nodes.
    pub members: Arc<Members>,
    /// Last figures.
    pub vitals: Arc<Vitals>,
    /// Join tokens.
    pub tokens: Tokens,
    /// Certificates.
    pub authority: Arc<Authority>,
    /// When this process began to serve.
    pub started: Timestamp,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Who calls; the table of `auth` has let it pass.
pub(crate) fn caller<T>(request: &Request<T>) -> Arc<Caller> {
    request.extensions().get::<Arc<Caller>>().cloned().unwrap_or_else(|| Arc::new(Caller::Nobody))
}

/// The person who calls.
pub(crate) fn person<T>(request: &Request<T>) -> Result<(String, Role), Status> {
    match caller(request).as_ref() {
        Caller::Person { name, role } => Ok((name.clone(), *role)),
        Caller::Nobody | Caller::Stranger { .. } | Caller::Node { .. } | Caller::Unclear => {
            Err(Status::permission_denied("only a person may call this"))
        }
    }
}

/// Runs what blocks where it delays nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    match task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(Status::internal("the coordinator failed while it worked on this; see its log")),
    }
}
