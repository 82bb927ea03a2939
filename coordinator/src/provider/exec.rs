//! Hosts made and ended by operators' programs: each pool names one in the
//! providers' folder. `program.rs` is how one is asked.
//!
//! Every answer may be missing, late or wrong. So a host that could not be made
//! is deleted before it counts as failed; and what the list says is compared with
//! the fleet's record and with the agents' leases: a host that is listed as absent
//! while its agent speaks is not believed to be gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use muster_core::{
    event::Event,
    fleet::Fleet,
    ids::{HostRequestId, PoolName},
    limits,
    policy::{HostTemplate, ProviderKind},
    pool::Host,
};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    Ask, Links, NewHost, Provider, Sleeper, dialled, host_name,
    program::{
        Create, Created, Deleted, Described, Error, Going, Listed, Operation, PROGRAMS_MAX, Program, Which, Whose,
        patiently,
    },
};

/// Lists in a row in which a host must be missing, or be there though nobody wants it, before that is acted on: what
/// lists hosts is often a little behind what makes them.
const LISTS_TO_BELIEVE: u8 = 2;

/// The provider of pools whose hosts a program makes.
#[derive(Clone, Debug)]
pub struct ExecHosts {
    links: Links,
    folder: PathBuf,
    /// The beginning of each request, so that several fleets can share one account.
    fleet: String,
}

/// What a task has come to.
enum Done {
    /// One order, carried out or not; what became of it is told already.
    Order(HostRequestId),
    /// One list, of the program of this name.
    List(String, Result<Listed, Error>),
}

/// What the lists of one program said lately.
#[derive(Debug, Default)]
struct Heard {
    /// Hosts of the record that are missing, in how many lists in a row.
    missing: BTreeMap<HostRequestId, u8>,
    /// Hosts that the record does not have, alike.
    strays: BTreeMap<HostRequestId, u8>,
}

/// What is under way.
#[derive(Default)]
struct Work {
    tasks: JoinSet<Done>,
    orders: BTreeSet<HostRequestId>,
    /// By the program's name, as is the next.
    lists: BTreeSet<String>,
    heard: BTreeMap<String, Heard>,
}

impl ExecHosts {
    /// Programs are in `folder`; `fleet` is the beginning of each request.
    #[must_use]
    pub const fn new(links: Links, folder: PathBuf, fleet: String) -> Self {
        Self { links, folder, fleet }
    }

    async fn serve(self, mut asks: mpsc::Receiver<Ask>) {
        let mut work = Work::default();
        let mut every = tokio::time::interval(Duration::from_millis(limits::PROVIDER_LIST_EVERY.0));
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ask = asks.recv(), if work.orders.len() < PROGRAMS_MAX => match ask {
                    Some(ask) => self.begin(&mut work, ask).await,
                    None => return,
                },
                Some(done) = work.tasks.join_next() => match done {
                    Ok(Done::Order(host)) => {
                        work.orders.remove(&host);
                    }
                    Ok(Done::List(name, listed)) => {
                        work.lists.remove(&name);
                        self.hear(&mut work, name, listed).await;
                    }
                    Err(error) => tracing::error!("asking a provider's program failed: {error}"),
                },
                _ = every.tick() => self.begin_lists(&mut work).await,
            }
        }
    }

    /// An order for a host that another is under way for is let go: the fleet repeats what is still open.
    async fn begin(&self, work: &mut Work, ask: Ask) {
        let (pool, host) = match &ask {
            Ask::Create(new) => (new.pool.clone(), new.host),
            Ask::Wake(sleeper) => (sleeper.pool.clone(), sleeper.host),
            Ask::Describe { pool, host } | Ask::Delete { pool, host } => (pool.clone(), *host),
        };
        let Some(program) = self.program_of(&pool).await else { return };
        if work.orders.insert(host) {
            let this = self.clone();
            work.tasks.spawn(async move {
                match ask {
                    Ask::Create(new) => this.create(&program, new).await,
                    Ask::Wake(Sleeper { pool, host, .. }) => this.links.cannot_wake(pool, host).await,
                    Ask::Describe { pool, host } => this.describe(&program, pool, host).await,
                    Ask::Delete { pool, host } => this.delete(&program, pool, host).await,
                }
                Done::Order(host)
            });
        }
    }

    async fn begin_lists(&self, work: &mut Work) {
        if !self.links.leadership.holds() {
            return;
        }
        let programs = self.links.handle.query(|fleet, _| pools_by_program(fleet)).await.unwrap_or_default();
        for name in programs.into_keys() {
            let (program, whose) = (Program::new(&self.folder, &name), Whose { fleet: self.fleet.clone() });
            if work.lists.insert(name.clone()) {
                work.tasks.spawn(async move {
                    let listed = program.ask(Operation::List, &whose).await;
                    Done::List(name, listed)
                });
            }
        }
    }

    async fn program_of(&self, pool: &PoolName) -> Option<Program> {
        let name = pool.clone();
        let program =
            self.links.handle.query(move |fleet, _| fleet.pool(&name).map(|pool| pool.policy.program().to_owned()));
        program.await.ok().flatten().map(|name| Program::new(&self.folder, &name))
    }

    fn which(&self, pool: &PoolName, host: HostRequestId) -> Which {
        let (request, fleet) = (self.request(host), self.fleet.clone());
        Which { request, fleet, pool: pool.0.clone(), name: host_name(pool, host) }
    }

    fn request(&self, host: HostRequestId) -> String {
        format!("{}-{}", self.fleet, host.0)
    }

    fn host_of(&self, request: &str) -> Option<HostRequestId> {
        request.strip_prefix(&self.fleet)?.strip_prefix('-')?.parse().ok().map(HostRequestId)
    }

    async fn create(&self, program: &Program, new: NewHost) {
        let told = async { Ok((dialled(&self.links.coordinator)?, self.links.token(&new).await?)) };
        let made = match told.await {
            Ok((coordinator, token)) => self.make(program, &new, coordinator, token).await,
            Err(reason) => Err((reason, true)),
        };
        let (pool, host) = (new.pool, new.host);
        let (reason, never_ran) = match made {
            Ok(instance) => {
                tracing::info!(%pool, host = host.0, instance, "the provider makes a host");
                return;
            }
            Err(failed) => failed,
        };
        if self.has_joined(&pool, host).await {
            tracing::warn!(%pool, host = host.0, "{reason}; it has joined all the same, and stays");
            return;
        }
        // What was said to have failed may be there all the same, and would cost money that no maximum counts (FL-11).
        if never_ran || self.end(program, &pool, host).await.is_ok_and(|deleted| deleted.state == Going::Gone) {
            self.links.tell(Event::HostFailed { pool, host, reason }).await;
        } else {
            tracing::warn!(%pool, host = host.0, "{reason}; it counts until its boot deadline, because its deletion was not confirmed");
        }
    }

    /// A program may wait for its host for longer than it has, and by then the host works.
    async fn has_joined(&self, pool: &PoolName, host: HostRequestId) -> bool {
        matches!(self.state_of(pool, host).await, Some(Host::Joined(_)))
    }

    async fn state_of(&self, pool: &PoolName, host: HostRequestId) -> Option<Host> {
        let name = pool.clone();
        let state = self.links.handle.query(move |fleet, _| fleet.pool(&name)?.hosts.get(&host).copied());
        state.await.ok().flatten()
    }

    /// On failure also whether no try has run at all.
    async fn make(
        &self,
        program: &Program,
        new: &NewHost,
        coordinator: String,
        token: String,
    ) -> Result<Option<String>, (String, bool)> {
        let HostTemplate { cpu_milli, memory_bytes, disk_bytes, labels } = new.template.clone();
        let create = Create {
            request: self.request(new.host),
            fleet: self.fleet.clone(),
            pool: new.pool.0.clone(),
            name: host_name(&new.pool, new.host),
            cpu_milli,
            memory_bytes,
            disk_bytes,
            labels,
            coordinator,
            token,
        };
        let ran = AtomicBool::new(false);
        let made = patiently(async || {
            let made = program.ask::<Created>(Operation::Create, &create).await;
            let has_run = made.as_ref().err().is_none_or(|error| !error.never_ran());
            ran.fetch_or(has_run, Ordering::Relaxed);
            made
        });
        match made.await {
            Ok(made) => Ok(made.instance),
            Err(error) => Err((error.to_string(), !ran.into_inner())),
        }
    }

    async fn end(&self, program: &Program, pool: &PoolName, host: HostRequestId) -> Result<Deleted, Error> {
        let which = self.which(pool, host);
        patiently(|| program.ask(Operation::Delete, &which)).await
    }

    async fn delete(&self, program: &Program, pool: PoolName, host: HostRequestId) {
        self.tell_why_it_did_not_join(program, &pool, host).await;
        match self.end(program, &pool, host).await {
            Ok(Deleted { state: Going::Gone }) => self.links.tell(Event::HostGone { pool, host }).await,
            // The list tells when it is gone.
            Ok(Deleted { state: Going::Going }) => {}
            Err(error) => {
                self.links.tell(Event::HostDeleteFailed { pool, host, reason: error.to_string() }).await;
            }
        }
    }

    /// Who cannot say that a host may go keeps it.
    async fn describe(&self, program: &Program, pool: PoolName, host: HostRequestId) {
        let kept = match program.ask::<Described>(Operation::Describe, &self.which(&pool, host)).await {
            Ok(described) => described.keep,
            Err(error) => Some(error.to_string()),
        };
        self.links.tell(Event::HostDescribed { pool, host, kept }).await;
    }

    /// The last chance to see what became of a host that is ended before anybody has heard of it.
    async fn tell_why_it_did_not_join(&self, program: &Program, pool: &PoolName, host: HostRequestId) {
        if let Some(Host::Deleting { node: None, .. }) = self.state_of(pool, host).await
            && let Ok(described) = program.ask::<Described>(Operation::Describe, &self.which(pool, host)).await
        {
            tracing::warn!(%pool, host = host.0, "a host that did not join is ended: {}", described.summary);
        }
    }

    async fn hear(&self, work: &mut Work, name: String, listed: Result<Listed, Error>) {
        match listed {
            Ok(listed) => {
                self.tell_health(&name, None).await;
                self.compare(work, name, &listed).await;
            }
            Err(error) => {
                // At once: that a host stays a little longer costs less than one that goes unseen (FL-12).
                tracing::warn!("{error}");
                self.tell_health(&name, Some(error.to_string())).await;
            }
        }
    }

    /// The list, the record and the leases side by side.
    async fn compare(&self, work: &mut Work, name: String, listed: &Listed) {
        let there = listed.hosts.iter().filter_map(|host| self.host_of(&host.request)).collect();
        let program = Program::new(&self.folder, &name);
        let asked = name.clone();
        let compared = self.links.handle.query(move |fleet, _| Compared::of(fleet, &there, &asked)).await;
        let Ok(compared) = compared else { return };
        let heard = work.heard.entry(name).or_default();
        let gone = persist(&mut heard.missing, compared.missing.keys().copied());
        let strays = persist(&mut heard.strays, compared.strays.iter().copied());
        for host in gone {
            if let Some((pool, speaks)) = compared.missing.get(&host) {
                self.believe_gone(pool.clone(), host, *speaks).await;
            }
        }
        for host in strays {
            self.end_stray(work, program.clone(), host);
        }
    }

    /// What does not fit beside the orders under way is there in the next list too.
    fn end_stray(&self, work: &mut Work, program: Program, host: HostRequestId) {
        if work.orders.len() >= PROGRAMS_MAX || !work.orders.insert(host) {
            return;
        }
        tracing::warn!(
            request = self.request(host),
            "the provider has a host that the fleet does not know; it is ended"
        );
        let this = self.clone();
        work.tasks.spawn(async move {
            if let Err(error) = this.end(&program, &PoolName(String::new()), host).await {
                tracing::warn!("{error}");
            }
            Done::Order(host)
        });
    }

    async fn believe_gone(&self, pool: PoolName, host: HostRequestId, speaks: bool) {
        if speaks {
            tracing::warn!(%pool, host = host.0, "the provider's list lacks a host whose agent speaks; the list is not believed");
        } else {
            self.links.tell(Event::HostGone { pool, host }).await;
        }
    }

    /// A provider that says nothing holds scale-in of its pools (FL-12), and says why.
    async fn tell_health(&self, name: &str, trouble: Option<String>) {
        let name = name.to_owned();
        let pools = self.links.handle.query(move |fleet, _| pools_by_program(fleet).remove(&name).unwrap_or_default());
        for pool in pools.await.unwrap_or_default() {
            self.links.tell(Event::ProviderHeard { pool, trouble: trouble.clone() }).await;
        }
    }
}

impl Provider for ExecHosts {
    fn run(self: Box<Self>, asks: mpsc::Receiver<Ask>) -> BoxFuture<'static, ()> {
        (*self).serve(asks).boxed()
    }
}

/// Each program that a pool names, and those pools.
fn pools_by_program(fleet: &Fleet) -> BTreeMap<String, Vec<PoolName>> {
    let mut names: BTreeMap<String, Vec<PoolName>> = BTreeMap::new();
    for (name, pool) in fleet.pools().filter(|(_, pool)| pool.policy.provider == ProviderKind::Exec) {
        names.entry(pool.policy.program().to_owned()).or_default().push(name.clone());
    }
    names
}

/// The record of a program's hosts beside its list.
#[derive(Debug, Default, PartialEq, Eq)]
struct Compared {
    /// Joined or being deleted, and not listed; and does its agent speak?
    missing: BTreeMap<HostRequestId, (PoolName, bool)>,
    /// Listed, of no record, and no agent that speaks is on it.
    strays: BTreeSet<HostRequestId>,
}

impl Compared {
    fn of(fleet: &Fleet, there: &BTreeSet<HostRequestId>, program: &str) -> Self {
        let speaks = |node| fleet.node_view(node).is_some_and(|view| view.is_connected);
        let (mut missing, mut known) = (BTreeMap::new(), BTreeSet::new());
        for (name, pool) in fleet.pools() {
            let own = pool.policy.provider == ProviderKind::Exec && pool.policy.program() == program;
            for (host, state) in &pool.hosts {
                known.insert(*host);
                let node = match state {
                    // It may not be in the list yet; its boot deadline is what ends its wait.
                    Host::Requested(_) | Host::Waking { .. } => continue,
                    Host::Joined(node) => Some(*node),
                    Host::Deleting { node, .. } => *node,
                };
                if own && !there.contains(host) {
                    missing.insert(*host, (name.clone(), node.is_some_and(speaks)));
                }
            }
        }
        // A store that has lost writes may have forgotten the host and not the work on it: an operator looks first.
        if fleet.meta().loss.is_some() {
            return Self { missing, strays: BTreeSet::new() };
        }
        known.extend(fleet.nodes().filter(|(node, _)| speaks(*node)).filter_map(|(_, node)| node.host));
        Self { missing, strays: there.difference(&known).copied().collect() }
    }
}

/// Counts what is so once more, forgets what is not, and tells what has been so often enough.
fn persist(counts: &mut BTreeMap<HostRequestId, u8>, now: impl Iterator<Item = HostRequestId>) -> Vec<HostRequestId> {
    let counted = now.map(|host| (host, counts.get(&host).copied().unwrap_or(0).saturating_add(1)));
    *counts = counted.collect();
    counts.iter().filter(|(_, times)| **times >= LISTS_TO_BELIEVE).map(|(host, _)| *host).collect()
}

#[cfg(test)]
mod tests {
    use muster_core::{
        fleet::{Image, Loss, Meta},
        time::Timestamp,
    };

    use super::*;

    #[test]
    fn a_store_that_has_lost_writes_ends_no_host_that_it_does_not_know() {
        let there = BTreeSet::from([HostRequestId(7)]);
        let strays = |loss| {
            let image = Image { meta: Meta { loss, ..Meta::default() }, ..Image::default() };
            Compared::of(&Fleet::restore(image).unwrap(), &there, "qemu").strays
        };
        assert_eq!(strays(None), there);
        let loss = Loss { noticed: Timestamp(1), reason: "host a has seen more".to_owned() };
        assert_eq!(strays(Some(loss)), BTreeSet::new());
    }

    #[test]
    fn one_list_is_not_believed_and_two_are() {
        let mut counts = BTreeMap::new();
        let host = HostRequestId(7);
        assert_eq!(persist(&mut counts, [host].into_iter()), []);
        assert_eq!(persist(&mut counts, [host].into_iter()), [host]);
        assert_eq!(persist(&mut counts, [].into_iter()), []);
        assert_eq!(persist(&mut counts, [host].into_iter()), []);
    }
}
