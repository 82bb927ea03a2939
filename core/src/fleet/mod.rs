//! The whole state, and the one way to change it.
//!
//! [`Fleet::apply`] records what happened; [`Fleet::settle`], once a batch,
//! decides from what is: leases, drains, placement, scaling, in this order, so
//! that no attempt is placed on a node that the same batch gave up or drained,
//! and no host is made for, or taken from, what placement had room for.

mod attempts;
mod brake;
mod disk;
mod draining;
mod forgetting;
mod gauge;
mod mend;
mod operator;
mod placing;
mod preflight;
mod reconcile;
mod restore;
mod rolling;
mod scaling;
mod session;
mod steering;
mod timers;
mod view;
mod waking;

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

pub use reconcile::Loss;
pub use restore::{Damage, Image};
use serde::{Deserialize, Serialize};
use timers::{Timer, Timers};
pub use view::{Blocker, NodeView, RollingView};

use crate::{
    effect::{AttemptRecord, Effect, HistoryEntry, Subject, Touched},
    event::Event,
    ids::{Actor, AttemptId, FIRST_JOB, HostRequestId, JobId, NodeId, PoolName, RequestId, SessionId, Term},
    job::JobRecord,
    lease, limits,
    mutation::{self, Mutation},
    node::Node,
    placement::NodeIndex,
    pool::Pool,
    queue::Queue,
    rolling::{Rolling, RollingId},
    spec::Delivery,
    time::{Millis, Timestamp},
    timeline::Timeline,
};

/// Counters and leadership, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The present leader's term.
    pub term: Term,
    /// The next job's id.
    pub next_job: JobId,
    /// The next node's id.
    pub next_node: NodeId,
    /// The next request of a host.
    pub next_host: HostRequestId,
    /// Evictions rest until then: much of the fleet fell silent at once.
    pub brake_until: Option<Timestamp>,
    /// Which terms led, and from where.
    #[serde(default)]
    pub timeline: Timeline,
    /// The store is behind what hosts have seen: nothing is placed.
    #[serde(default)]
    pub loss: Option<Loss>,
    /// The longest lease that any leader ever granted: a new one waits that long.
    #[serde(default)]
    pub longest_lease: Millis,
    /// The next rolling drain's id.
    #[serde(default)]
    pub next_rolling: RollingId,
    /// Rolling drains that go on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rollings: BTreeMap<RollingId, Rolling>,
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            term: Term(0),
            next_job: FIRST_JOB,
            next_node: NodeId(1),
            next_host: HostRequestId(1),
            brake_until: None,
            timeline: Timeline::default(),
            loss: None,
            longest_lease: Millis(0),
            next_rolling: RollingId(1),
            rollings: BTreeMap::new(),
        }
    }
}

/// What a batch asks of the shell.
#[derive(Debug, Default)]
pub struct Output {
    /// To do after the commit, in this order.
    pub effects: Vec<Effect>,
    /// To commit.
    pub touched: Touched,
}

/// A live attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attempt {
    record: AttemptRecord,
    /// Sent ahead: it waits on the node and holds no capacity.
    prefilled: bool,
    /// Thousandths of a host that it counts as in its pool's memory; none: it has not started, or is counted out.
    counted: Option<u64>,
}

/// The whole state.
#[derive(Debug, Default)]
pub struct Fleet {
    meta: Meta,
    jobs: BTreeMap<JobId, JobRecord>,
    /// How many of them are not finished.
    open_jobs: usize,
    keys: BTreeMap<String, JobId>,
    nodes: BTreeMap<NodeId, Node>,
    names: BTreeMap<String, NodeId>,
    pools: BTreeMap<PoolName, Pool>,
    attempts: BTreeMap<AttemptId, Attempt>,
    queue: Queue,
    indexes: BTreeMap<PoolName, NodeIndex>,
    timers: Timers,
    rollings: rolling::Rollings,
    /// Counts placements, so that equals take turns.
    placements: u64,
    /// The store's last commit before this leader, as the driver told it.
    stored: u64,
    /// Nodes with more room, or newly placeable, since the last settling.
    freed: BTreeSet<NodeId>,
    /// Nodes whose drain, lease or hold wants a look in this settling.
    unsettled: BTreeSet<NodeId>,
}

impl Fleet {
    /// Records one change of the world.
    pub fn apply(&mut self, event: Event, now: Timestamp, out: &mut Output) {
        match event {
            Event::Led { term } => self.lead(term, now, out),
            Event::Stored { commits } => self.stored = commits,
            Event::HostSaw { node, seen } => self.host_saw(node, seen, now, out),
            Event::AcceptLoss { request, actor, reason } => {
                let reply = self.accept_loss(&actor, &reason, now, out);
                reply_to(request, Ok(reply), out);
            }
            Event::ReleaseBrake { request, actor, reason } => {
                let reply = self.release_brake(&actor, &reason, now, out);
                reply_to(request, Ok(reply), out);
            }
            Event::Tick => {}
            Event::Submit { request, key, digest, spec } => {
                let reply = self.submit(request, key, digest, spec, now, out);
                reply_to(request, reply, out);
            }
            Event::Cancel { request, job, tasks, actor, reason } => {
                let reply = self.cancel(job, tasks.as_deref(), actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::Retry { request, job, actor } => {
                let reply = self.retry(job, actor, now, out);
                reply_to(request, reply, out);
            }
            Event::Cordon { request, node, actor, reason } => {
                let reply = self.cordon(node, actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::Uncordon { request, node, actor, reason } => {
                let reply = self.uncordon(node, actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::Drain { request, node, order } => {
                let reply = self.drain(node, order, now, out);
                reply_to(request, reply, out);
            }
            Event::DrainRolling { request, nodes, order } => {
                let reply = self.drain_rolling(&nodes, order, now, out);
                reply_to(request, reply, out);
            }
            Event::CancelRolling { request, rolling, actor, reason } => {
                let reply = self.cancel_rolling(rolling, &actor, &reason, now, out);
                reply_to(request, reply, out);
            }
            Event::Resume { request, node, actor, reason } => {
                let reply = self.resume(node, actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::RemoveNode { request, node, force, actor, reason } => {
                let reply = self.remove_node(node, force, actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::SetPool { request, policy, actor } => {
                let reply = self.set_pool(*policy, actor, now, out);
                reply_to(request, reply, out);
            }
            Event::SteerPool { request, pool, order, actor, reason } => {
                let reply = self.steer_pool(pool, order, actor, reason, now, out);
                reply_to(request, reply, out);
            }
            Event::Enroll { request, name, pool, host, key, shown } => {
                self.pass_by_node(shown, out);
                let reply = self.enroll(name, pool, host, key, now, out);
                reply_to(request, reply, out);
            }
            Event::NodeConnected { node, key, session, hello } => {
                self.node_connected(node, &key, session, hello, now, out);
            }
            Event::NodeDisconnected { node, session } => self.node_disconnected(node, session, now, out),
            Event::Heartbeat { node, session, sequence, sample, held } => {
                self.heartbeat(node, session, sequence, sample, &held, now, out);
            }
            Event::AttemptStarted { node, session, attempt, epoch } => {
                self.attempt_started(node, session, attempt, epoch, now, out);
            }
            Event::AttemptEnded { node, session, attempt, epoch, end, wall, detail } => {
                self.attempt_ended(node, session, attempt, epoch, end, wall, detail, now, out);
            }
            Event::GivenBack { node, session, attempts } => self.given_back(node, session, &attempts, now, out),
            Event::DrainProved { node, session, revision } => self.drain_proved(node, session, revision, now, out),
            Event::DrainRefused { node, session, revision, reason } => {
                self.drain_refused(node, session, revision, reason, now, out);
            }
            Event::StopNotice { node, session, reason, within } => {
                self.stop_notice(node, session, reason, within, now, out);
            }
            Event::AttemptStuck { node, session, attempt } => self.attempt_stuck(node, session, attempt, now, out),
            Event::HostFailed { pool, host, reason } => self.host_failed(&pool, host, &reason, now, out),
            Event::HostGone { pool, host } => self.host_gone(&pool, host, now, out),
            Event::HostDeleteFailed { pool, host, reason } => self.host_delete_failed(&pool, host, reason, now, out),
            Event::HostDescribed { pool, host, kept } => self.host_described(&pool, host, kept, now, out),
            Event::ProviderHeard { pool, trouble } => self.provider_heard(&pool, trouble, now, out),
        }
    }

    /// Decides from what is. Call once after the events of a batch.
    pub fn settle(&mut self, now: Timestamp, out: &mut Output) {
        self.notice_absence(now, out);
        self.fire_timers(now, out);
        self.settle_rollings(now, out);
        // All that fall silent now before any is given up for it: the brake counts them all (FL-12).
        let unsettled: Vec<NodeId> = self.unsettled.iter().copied().collect();
        for node in &unsettled {
            self.notice_departure(*node, now, out);
        }
        for node in unsettled {
            if self.notice_silence(node, now, out) {
                self.unsettled.remove(&node);
                self.settle_hold(node, now, out);
                self.settle_drain(node, now, out);
            }
        }
        while let Some(node) = self.unsettled.pop_first() {
            self.settle_node(node, now, out);
        }
        if self.meta.loss.is_none() {
            self.place(now, out);
            self.settle_pools(now, out);
        }
    }

    /// When something is due next.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.timers.next()
    }

    /// The driver wakes for each timer: one that is long overdue shows that this process was stopped, or
    /// its machine. What was not heard meanwhile says nothing about the nodes (FL-12).
    fn notice_absence(&mut self, now: Timestamp, out: &mut Output) {
        let Some(due) = self.next_wake() else { return };
        let absence = now.since(due);
        if absence < limits::ABSENCE {
            return;
        }
        self.lease_anew(lease::ended_here(now), now);
        let sentence = format!("this coordinator was not running for {absence}: no node is held silent for it");
        record(out, now, Subject::Fleet, "absent", sentence, None);
    }

    fn lease_anew(&mut self, leases_end: Timestamp, now: Timestamp) {
        for (id, node) in &mut self.nodes {
            node.lease_end = leases_end;
            node.heard = now;
            self.timers.set(node.lease_end, Timer::Node(*id));
        }
    }

    fn fire_timers(&mut self, now: Timestamp, out: &mut Output) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Node(node) => {
                    self.unsettled.insert(node);
                }
                Timer::Job(job) => self.wake_job(job, now, out),
                // Pools and rolling drains are looked at in every settling.
                Timer::Pool(_) | Timer::Rolling(_) => {}
                Timer::Prefill(node) => self.recall_stale_prefill(node, now, out),
            }
        }
    }

    fn wake_at(&mut self, at: Timestamp, timer: Timer) {
        self.timers.set(at, timer);
    }

    fn wake_job(&mut self, job: JobId, now: Timestamp, out: &mut Output) {
        let Some(record) = self.jobs.get_mut(&job) else { return };
        if record.wake_delayed(now) {
            out.touched.jobs.insert(job);
        }
        if let Some((at, _)) = record.delayed.first() {
            let at = *at;
            self.wake_at(at, Timer::Job(job));
        }
        self.requeue(job);
    }

    /// The job's place in line follows from its record.
    fn requeue(&mut self, job: JobId) {
        if let Some(record) = self.jobs.get(&job) {
            self.queue.set(job, &record.spec, record.waiting.len());
        }
    }

    /// The node's place in the orders of placement follows from its record.
    fn reindex(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get(&id) {
            self.indexes.entry(node.record.pool.clone()).or_default().update(id, Some(node));
            self.rollings.note(id, &node.record);
        }
    }

    /// The node that this stream speaks for; none if the stream is not its present one.
    fn node_on(&mut self, node: NodeId, session: SessionId) -> Option<&mut Node> {
        self.nodes.get_mut(&node).filter(|node| node.session == Some(session))
    }

    fn lead(&mut self, term: Term, now: Timestamp, out: &mut Output) {
        self.meta.term = term;
        self.meta.timeline.led(term, self.stored);
        // Stored before it is granted; the last leader may have been of another version.
        self.meta.longest_lease = self.meta.longest_lease.max(lease::duration());
        out.touched.meta = true;
        let leases_end = lease::any_ended_here(self.meta.longest_lease, now);
        // A new leader evicts nobody for one full lease, whatever it was told before (FL-12).
        if !mutation::is_on(Mutation::EvictAfterFailover) {
            self.lease_anew(leases_end, now);
        }
        self.fence_again(leases_end, out);
        self.ask_providers_again(now, out);
        record(out, now, Subject::Fleet, "led", format!("this coordinator leads with term {}", term.0), None);
    }

    /// The clock that set a fence may have been behind ours.
    fn fence_again(&mut self, until: Timestamp, out: &mut Output) {
        if mutation::is_on(Mutation::FenceNotRenewed) {
            return;
        }
        for (id, job) in self.jobs.iter_mut().filter(|(_, job)| job.spec.delivery == Delivery::Exclusive) {
            if job.fence_again(until) {
                out.touched.jobs.insert(*id);
                self.timers.set(until, Timer::Job(*id));
            }
        }
    }
}

fn reply_to(request: RequestId, reply: Result<crate::effect::Reply, crate::denied::Denied>, out: &mut Output) {
    out.effects.push(Effect::Reply { request, reply });
}

fn record(out: &mut Output, at: Timestamp, subject: Subject, kind: &str, reason: String, actor: Option<&Actor>) {
    out.touched.history.push(HistoryEntry { at, subject, kind: String::from(kind), reason, actor: actor.cloned() });
}

/// A moving mean that follows a change within a handful of tasks.
fn moving_mean(mean: Option<Millis>, latest: Millis) -> Millis {
    mean.map_or(latest, |mean| Millis((mean.0 * 7 + latest.0) / 8))
}
