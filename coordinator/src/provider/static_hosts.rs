//! Hosts that join by themselves: nobody can make one, and one that is to go
//! has been told by its release already.

use futures_util::{FutureExt as _, future::BoxFuture};
use muster_core::event::Event;
use tokio::sync::mpsc;

use super::{Ask, Links, Provider};

/// The provider of static pools.
#[derive(Debug)]
pub struct StaticHosts {
    links: Links,
}

impl StaticHosts {
    /// Answers through these.
    #[must_use]
    pub const fn new(links: Links) -> Self {
        Self { links }
    }
}

impl Provider for StaticHosts {
    fn run(self: Box<Self>, mut asks: mpsc::Receiver<Ask>) -> BoxFuture<'static, ()> {
        async move {
            while let Some(ask) = asks.recv().await {
                let event = match ask {
                    Ask::Create(new) => Event::HostFailed {
                        pool: new.pool,
                        host: new.host,
                        reason: "hosts of a static pool join by themselves, with a token".to_owned(),
                    },
                    // Nobody deletes it, so nobody keeps it either.
                    Ask::Describe { pool, host } => Event::HostDescribed { pool, host, kept: None },
                    Ask::Delete { pool, host } => Event::HostDeleteFailed {
                        pool,
                        host,
                        reason: "hosts of a static pool cannot be deleted; drain with --then stop or poweroff"
                            .to_owned(),
                    },
                };
                self.links.tell(event).await;
            }
        }
        .boxed()
    }
}
