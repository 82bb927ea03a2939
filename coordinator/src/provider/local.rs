//! Agents on this machine, made by `muster up` or `muster demo`, which serve the
//! socket that we dial, again and again; what is said is in `local_lines.rs`.
//!
//! After each connect we ask for the list and bring both sides together: what
//! the fleet wants and they lack is made again, what they have and the fleet
//! does not know is deleted, and a node whose host they lost is gone.

use std::{collections::BTreeSet, io, path::PathBuf, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::{FutureExt as _, future::BoxFuture};
use muster_core::{
    event::Event,
    fleet::Fleet,
    ids::{HostRequestId, PoolName},
    policy::{HostTemplate, ProviderKind},
    pool::Host,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};

use super::{
    Ask, Links, NewHost, Provider, Sleeper, host_name,
    local_lines::{Create, Op, Told},
};

/// One line, at most.
const LINE_MAX: u64 = 1 << 20;

/// The provider of local pools.
#[derive(Debug)]
pub struct LocalHosts {
    links: Links,
    socket: PathBuf,
}

impl LocalHosts {
    /// Dials `socket`.
    #[must_use]
    pub const fn new(links: Links, socket: PathBuf) -> Self {
        Self { links, socket }
    }

    async fn serve(self, mut asks: mpsc::Receiver<Ask>) {
        loop {
            let Some(stream) = self.dial(&mut asks).await else { return };
            let (read, write) = stream.into_split();
            match self.talk(read, write, &mut asks).await {
                Ok(()) => return,
                Err(error) => tracing::warn!("the program that makes local hosts went away: {error}"),
            }
        }
    }

    /// Orders that come meanwhile are let go: the list tells what is still open.
    async fn dial(&self, asks: &mut mpsc::Receiver<Ask>) -> Option<UnixStream> {
        let mut waits = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(20))
            .with_max_delay(Duration::from_secs(1))
            .without_max_times()
            .with_jitter()
            .build();
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket).await {
                return Some(stream);
            }
            let wait = tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1)));
            tokio::pin!(wait);
            loop {
                tokio::select! {
                    () = &mut wait => break,
                    ask = asks.recv() => { ask?; }
                }
            }
        }
    }

    async fn talk(
        &self,
        read: OwnedReadHalf,
        mut write: OwnedWriteHalf,
        asks: &mut mpsc::Receiver<Ask>,
    ) -> io::Result<()> {
        // A task of its own reads: a line that is half read must not be dropped.
        let (lines, mut told) = mpsc::channel(64);
        let reader = tokio::spawn(read_lines(read, lines));
        say(&mut write, &Op::List).await?;
        let ended = loop {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.carry_out(&mut write, ask).await?,
                    None => break Ok(()),
                },
                line = told.recv() => match line {
                    Some(line) => self.hear(&mut write, line?).await?,
                    None => break Err(io::ErrorKind::UnexpectedEof.into()),
                },
            }
        };
        reader.abort();
        ended
    }

    async fn carry_out(&self, write: &mut OwnedWriteHalf, ask: Ask) -> io::Result<()> {
        let new = match ask {
            Ask::Delete { host, .. } => return say(write, &Op::Delete { host: host.0 }).await,
            // Our own parent ends what it made.
            Ask::Describe { .. } => return Ok(()),
            Ask::Wake(Sleeper { pool, host, .. }) => {
                self.links.cannot_wake(pool, host).await;
                return Ok(());
            }
            Ask::Create(new) => new,
        };
        match self.links.token(&new).await {
            Ok(token) => {
                let name = host_name(&new.pool, new.host);
                let HostTemplate { cpu_milli, memory_bytes, disk_bytes, labels } = new.template;
                let create = Create {
                    host: new.host.0,
                    pool: new.pool.0,
                    name,
                    cpu_milli,
                    memory_bytes,
                    disk_bytes,
                    labels,
                    token,
                    coordinator: self.links.coordinator.clone(),
                };
                say(write, &Op::Create(create)).await
            }
            Err(reason) => {
                self.links.tell(Event::HostFailed { pool: new.pool, host: new.host, reason }).await;
                Ok(())
            }
        }
    }

    async fn hear(&self, write: &mut OwnedWriteHalf, told: Told) -> io::Result<()> {
        match told {
            // The host's own join says more than this.
            Told::Created { .. } => {}
            Told::Failed { host, reason } => {
                self.tell_of(host, |pool, host| Event::HostFailed { pool, host, reason }).await;
            }
            Told::Gone { host } => self.tell_of(host, |pool, host| Event::HostGone { pool, host }).await,
            Told::DeleteFailed { host, reason } => {
                self.tell_of(host, |pool, host| Event::HostDeleteFailed { pool, host, reason }).await;
            }
            Told::Hosts { hosts } => {
                let there = hosts.into_iter().map(HostRequestId).collect();
                let Ok(plan) = self.links.handle.query(move |fleet, _| Plan::build(fleet, &there)).await else {
                    return Ok(());
                };
                for (pool, host) in plan.gone {
                    self.links.tell(Event::HostGone { pool, host }).await;
                }
                for ask in plan.asks {
                    self.carry_out(write, ask).await?;
                }
            }
        }
        Ok(())
    }

    async fn tell_of(&self, host: u64, event: impl FnOnce(PoolName, HostRequestId) -> Event) {
        let host = HostRequestId(host);
        let pool = self.links.handle.query(move |fleet, _| pool_of(fleet, host)).await;
        // Not one of ours, or confirmed gone already.
        if let Ok(Some(pool)) = pool {
            self.links.tell(event(pool, host)).await;
        }
    }
}

impl Provider for LocalHosts {
    fn run(self: Box<Self>, asks: mpsc::Receiver<Ask>) -> BoxFuture<'static, ()> {
        (*self).serve(asks).boxed()
    }
}

fn pool_of(fleet: &Fleet, host: HostRequestId) -> Option<PoolName> {
    fleet.pools().find(|(_, pool)| pool.hosts.contains_key(&host)).map(|(name, _)| name.clone())
}

/// What brings the fleet's record and the provider's list together.
#[derive(Debug, Default)]
struct Plan {
    gone: Vec<(PoolName, HostRequestId)>,
    asks: Vec<Ask>,
}

impl Plan {
    fn build(fleet: &Fleet, there: &BTreeSet<HostRequestId>) -> Self {
        let mut plan = Self::default();
        let mut known = BTreeSet::new();
        for (name, pool) in fleet.pools().filter(|(_, pool)| pool.policy.provider == ProviderKind::Local) {
            for (host, state) in &pool.hosts {
                known.insert(*host);
                let (pool_name, host) = (name.clone(), *host);
                match (state, there.contains(&host)) {
                    (Host::Requested(_), _) => {
                        let template = pool.policy.host.clone();
                        plan.asks.push(Ask::Create(NewHost { pool: pool_name, host, template }));
                    }
                    (Host::Joined(_), true) | (Host::Waking { .. }, _) => {}
                    (Host::Deleting { .. }, true) => plan.asks.push(Ask::Delete { pool: pool_name, host }),
                    (Host::Joined(_) | Host::Deleting { .. }, false) => plan.gone.push((pool_name, host)),
                }
            }
        }
        // Nobody asked for these any more: deleted by name, whatever pool they were of.
        let strays = there.difference(&known);
        plan.asks.extend(strays.map(|host| Ask::Delete { pool: PoolName(String::new()), host: *host }));
        plan
    }
}

async fn say(write: &mut OwnedWriteHalf, op: &Op) -> io::Result<()> {
    let mut line = serde_json::to_vec(op)?;
    line.push(b'\n');
    write.write_all(&line).await
}

async fn read_lines(read: OwnedReadHalf, lines: mpsc::Sender<io::Result<Told>>) {
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let told = match (&mut read).take(LINE_MAX).read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => serde_json::from_slice(&line).map_err(io::Error::from),
            Err(error) => Err(error),
        };
        let failed = told.is_err();
        if lines.send(told).await.is_err() || failed {
            return;
        }
    }
}
