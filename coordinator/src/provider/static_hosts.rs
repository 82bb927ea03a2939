//! Hosts that join by themselves: nobody can make one, and one that is to go
//! has been told by its release already. One that went to sleep is woken by the
//! program that its pool's policy names.

use std::{collections::BTreeSet, path::PathBuf};

use futures_util::{FutureExt as _, future::BoxFuture};
use muster_core::{
    event::Event,
    ids::{HostRequestId, PoolName},
};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    Ask, Links, Provider, Sleeper,
    program::{Error, Operation, PROGRAMS_MAX, Program, Wake, Woken, patiently},
};

/// The provider of static pools.
#[derive(Clone, Debug)]
pub struct StaticHosts {
    links: Links,
    folder: PathBuf,
    /// The beginning of each request.
    fleet: String,
}

impl StaticHosts {
    /// Programs are in `folder`; `fleet` is the beginning of each request.
    #[must_use]
    pub const fn new(links: Links, folder: PathBuf, fleet: String) -> Self {
        Self { links, folder, fleet }
    }

    async fn serve(self, mut asks: mpsc::Receiver<Ask>) {
        let (mut tasks, mut waking) = (JoinSet::new(), BTreeSet::new());
        loop {
            tokio::select! {
                ask = asks.recv(), if waking.len() < PROGRAMS_MAX => match ask {
                    Some(Ask::Wake(sleeper)) => {
                        // One that is asked for again while its program still runs is being answered.
                        if waking.insert(sleeper.host) {
                            let this = self.clone();
                            tasks.spawn(async move {
                                let host = sleeper.host;
                                this.wake(sleeper).await;
                                host
                            });
                        }
                    }
                    Some(other) => self.links.tell(refused(other)).await,
                    None => return,
                },
                Some(done) = tasks.join_next() => match done {
                    Ok(host) => {
                        waking.remove(&host);
                    }
                    Err(error) => tracing::error!("asking a program to wake a host failed: {error}"),
                },
            }
        }
    }

    async fn wake(&self, sleeper: Sleeper) {
        let Sleeper { pool, host, node, name, labels } = sleeper;
        let Some(program) = self.program_of(&pool, host).await else { return };
        let question = Wake {
            request: format!("{}-{}", self.fleet, host.0),
            fleet: self.fleet.clone(),
            pool: pool.0.clone(),
            node: node.to_string(),
            name,
            labels,
        };
        let woken: Result<Woken, Error> = patiently(|| program.ask(Operation::Wake, &question)).await;
        match woken {
            Ok(Woken {}) => tracing::info!(%pool, %node, "its program wakes a host"),
            Err(error) => self.links.tell(Event::HostFailed { pool, host, reason: error.to_string() }).await,
        }
    }

    async fn program_of(&self, pool: &PoolName, host: HostRequestId) -> Option<Program> {
        let name = pool.clone();
        let wake = self.links.handle.query(move |fleet, _| fleet.pool(&name).map(|pool| pool.policy.wake.clone()));
        match wake.await {
            Ok(Some(Some(program))) => Some(Program::new(&self.folder, &program)),
            Ok(Some(None)) => {
                let reason = "the policy has no `wake` any more".to_owned();
                self.links.tell(Event::HostFailed { pool: pool.clone(), host, reason }).await;
                None
            }
            // The pool is gone, or the driver is stopping.
            Ok(None) | Err(_) => None,
        }
    }
}

/// What cannot be asked of hosts that join by themselves.
fn refused(ask: Ask) -> Event {
    match ask {
        Ask::Create(new) => Event::HostFailed {
            pool: new.pool,
            host: new.host,
            reason: "hosts of a static pool join by themselves, with a token".to_owned(),
        },
        Ask::Wake(sleeper) => Event::HostFailed {
            pool: sleeper.pool,
            host: sleeper.host,
            reason: "it is woken by its pool's program alone".to_owned(),
        },
        // Nobody deletes it, so nobody keeps it either.
        Ask::Describe { pool, host } => Event::HostDescribed { pool, host, kept: None },
        Ask::Delete { pool, host } => Event::HostDeleteFailed {
            pool,
            host,
            reason: "hosts of a static pool cannot be deleted; drain with --then stop or poweroff".to_owned(),
        },
    }
}

impl Provider for StaticHosts {
    fn run(self: Box<Self>, asks: mpsc::Receiver<Ask>) -> BoxFuture<'static, ()> {
        (*self).serve(asks).boxed()
    }
}
