//! Making and ending a pool's hosts, behind one trait.
//!
//! The core decides and remembers every request; a provider only carries out.
//! Orders are idempotent by their request, so that one may be lost or repeated.

pub mod exec;
pub mod local;
pub mod local_lines;
pub mod program;
mod static_hosts;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use muster_core::{
    event::Event,
    ids::{HostRequestId, NodeId, PoolName},
    limits,
    policy::{HostTemplate, ProviderKind},
    time::Millis,
};
use tokio::sync::mpsc;

pub use self::static_hosts::StaticHosts;
use crate::{driver::Handle, leadership::Leadership, orders::HostOrder, tokens::Tokens};

/// Orders that wait for one provider.
const ORDERS_MAX: usize = 1_024;

/// What a provider is asked.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Make a host that joins as this node.
    Create(NewHost),
    /// Wake a host that sleeps.
    Wake(Sleeper),
    /// Say whether a host may be deleted.
    Describe {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
    },
    /// End a host.
    Delete {
        /// The pool.
        pool: PoolName,
        /// The request that made it.
        host: HostRequestId,
    },
}

/// A host to be made.
#[derive(Clone, Debug)]
pub struct NewHost {
    /// The pool.
    pub pool: PoolName,
    /// The stored request.
    pub host: HostRequestId,
    /// What it is to have.
    pub template: HostTemplate,
}

/// A host to be woken.
#[derive(Clone, Debug)]
pub struct Sleeper {
    /// The pool.
    pub pool: PoolName,
    /// The stored request.
    pub host: HostRequestId,
    /// The node that it is.
    pub node: NodeId,
    /// That one's name.
    pub name: String,
    /// That one's labels.
    pub labels: BTreeMap<String, String>,
}

/// Makes and ends hosts. Answers come as events to the driver.
pub trait Provider: Send {
    /// Carries out orders until there are no more to come.
    fn run(self: Box<Self>, asks: mpsc::Receiver<Ask>) -> futures_util::future::BoxFuture<'static, ()>;
}

/// What providers have in common: the driver to answer, and tokens for their hosts.
#[derive(Clone, Debug)]
pub struct Links {
    /// Told what became of each order.
    pub handle: Handle,
    /// Makes the token that binds a host to its request.
    pub tokens: Tokens,
    /// Where hosts dial.
    pub coordinator: String,
    /// Asked before a host is made or ended.
    pub leadership: Leadership,
}

impl Links {
    /// An order of a pool that had another provider when it was given.
    async fn cannot_wake(&self, pool: PoolName, host: HostRequestId) {
        let reason = "hosts of this pool's provider are made and ended, and never woken".to_owned();
        self.tell(Event::HostFailed { pool, host, reason }).await;
    }

    async fn tell(&self, event: Event) {
        // The driver is stopping: the next one asks for the list and finds out.
        let _ = self.handle.event(event).await;
    }

    /// A one-time token bound to pool and request, good until the pool's boot deadline.
    async fn token(&self, host: &NewHost) -> Result<String, String> {
        let name = host.pool.clone();
        let boot = self.handle.query(move |fleet, _| fleet.pool(&name).map(|pool| pool.policy.boot_deadline)).await;
        let life = boot.ok().flatten().unwrap_or(limits::TOKEN_LIFE).max(Millis::from_secs(60));
        let expires = self.handle.now() + life;
        let (tokens, pool, request) = (self.tokens.clone(), host.pool.clone(), host.host);
        let made = tokio::task::spawn_blocking(move || tokens.create(&pool, Some(request), expires)).await;
        match made {
            Ok(Ok(token)) => Ok(token),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the token could not be made".to_owned()),
        }
    }
}

/// Where providers find what they need.
#[derive(Clone, Debug)]
pub struct Places {
    /// The program that makes local hosts listens there.
    pub local_socket: Option<PathBuf>,
    /// Operators' programs that make hosts.
    pub programs: PathBuf,
    /// Of the fleet's CA: what an operator's program tells this fleet's hosts by.
    pub fingerprint: String,
}

/// Hands each order to the provider of its pool.
pub async fn run(mut orders: mpsc::Receiver<HostOrder>, links: Links, places: Places) {
    let (handle, leadership) = (links.handle.clone(), links.leadership.clone());
    let mut providers: BTreeMap<&'static str, mpsc::Sender<Ask>> = BTreeMap::new();
    let mut start = |name: &'static str, provider: Box<dyn Provider>| {
        let (asks, received) = mpsc::channel(ORDERS_MAX);
        tokio::spawn(provider.run(received));
        providers.insert(name, asks);
    };
    let fleet = fleet_name(&places.fingerprint);
    start("static", Box::new(StaticHosts::new(links.clone(), places.programs.clone(), fleet.clone())));
    start("exec", Box::new(exec::ExecHosts::new(links.clone(), places.programs, fleet)));
    if let Some(socket) = places.local_socket {
        start("local", Box::new(local::LocalHosts::new(links.clone(), socket)));
    }
    while let Some(order) = orders.recv().await {
        let (pool, host) = match &order {
            HostOrder::Create { pool, host, .. }
            | HostOrder::Wake { pool, host, .. }
            | HostOrder::Describe { pool, host }
            | HostOrder::Delete { pool, host, .. } => (pool.clone(), *host),
        };
        let name = pool.clone();
        let kind = handle.query(move |fleet, _| fleet.pool(&name).map(|pool| pool.policy.provider)).await;
        let Ok(Some(kind)) = kind else { continue };
        // The one who leads now has the same order in its store.
        if !leadership.holds() {
            return;
        }
        let provider = match kind {
            ProviderKind::Static => providers.get("static"),
            ProviderKind::Local => providers.get("local"),
            ProviderKind::Exec => providers.get("exec"),
        };
        let (ask, creates) = match order {
            HostOrder::Create { pool, host, template } => (Ask::Create(NewHost { pool, host, template }), true),
            HostOrder::Wake { pool, host, node, name, labels } => {
                (Ask::Wake(Sleeper { pool, host, node, name, labels }), true)
            }
            HostOrder::Describe { pool, host } => (Ask::Describe { pool, host }, false),
            HostOrder::Delete { pool, host, .. } => (Ask::Delete { pool, host }, false),
        };
        match provider {
            Some(provider) => {
                if provider.try_send(ask).is_err() {
                    tracing::warn!(%pool, "the provider does not keep up; an order was dropped and will be repeated");
                }
            }
            None => {
                let reason = "no program that makes local hosts is connected; `muster up` is one".to_owned();
                let event = if creates {
                    Event::HostFailed { pool, host, reason }
                } else {
                    Event::HostDeleteFailed { pool, host, reason }
                };
                links.tell(event).await;
            }
        }
    }
}

/// What a new host is told to dial, if that can be dialled.
fn dialled(coordinator: &str) -> Result<String, String> {
    let listens_everywhere = |address: SocketAddr| address.ip().is_unspecified();
    if coordinator.parse().is_ok_and(listens_everywhere) {
        return Err(format!(
            "a new host cannot dial {coordinator}, where this coordinator listens; set `advertise` in its settings, or \
             `coordinators`"
        ));
    }
    Ok(coordinator.to_owned())
}

/// The beginning of each request, so that several fleets can share one account. `fingerprint` is that of the fleet's CA.
fn fleet_name(fingerprint: &str) -> String {
    format!("muster-{}", &fingerprint[..fingerprint.len().min(12)])
}

/// How a host of a pool is named.
#[must_use]
pub fn host_name(pool: &PoolName, host: HostRequestId) -> String {
    format!("{pool}-{}", host.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_host_is_made_that_could_not_find_the_coordinator() {
        for address in ["0.0.0.0:7420", "[::]:7420"] {
            assert!(dialled(address).unwrap_err().contains("advertise"), "{address}");
        }
        for address in ["127.0.0.1:7420", "fleet.example:7420", "a:7420,b:7420"] {
            assert_eq!(dialled(address).as_deref(), Ok(address));
        }
    }
}
