//! The loop: receive, apply, persist, then act. The one owner of the fleet.
//!
//! A batch of inputs is applied, its rows are committed in one transaction, and
//! only then, and only while this coordinator leads, its effects are carried
//! out, in order; questions are answered last, so they see only what is
//! committed. There is no tick: the loop sleeps until an input comes or the
//! core's next wake-up is due.

mod handle;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, atomic::AtomicU64},
    thread,
};

use bytes::Bytes;
use muster_core::{
    denied::Denied,
    effect::{Effect, Reply, Touched},
    event::{Event, Hello},
    fleet::{Fleet, Output},
    ids::{AttemptId, JobId, NodeId, RequestId, SessionId, Term},
    limits,
    time::Timestamp,
    timeline::Seen,
};
use tokio::sync::{broadcast, mpsc, oneshot};

pub use self::handle::Handle;
use crate::{
    clock::Clock,
    leadership::Leadership,
    orders::{HostOrder, Order, order_of},
    seal::Seal,
    shared::{Member, Members, Vitals},
    starts::{Bodies, Parts},
    store::{self, Batch, Store},
    telemetry::Metrics,
};

/// Committed changes that a follower may lag behind before it reads all again.
const CHANGES_MAX: usize = 1_024;

/// A question, asked of committed state.
type Query = Box<dyn FnOnce(&Fleet, Timestamp) + Send>;

/// What the loop is told.
enum Input {
    Events(Vec<Event>),
    Request { request: RequestId, event: Event, job: Option<AcceptedJob>, reply: oneshot::Sender<Answer> },
    Connect { node: NodeId, key: [u8; 32], session: SessionId, hello: Hello, seen: Seen, outbox: mpsc::Sender<Order> },
    Query(Query),
    Stop,
}

/// What the shell keeps of a job that is being submitted.
#[derive(Debug)]
pub struct AcceptedJob {
    /// The encoded template, stored with the record.
    pub template: Bytes,
    /// Ready for the first start, so that it needs no read.
    pub parts: Arc<Parts>,
}

/// A request's one answer.
pub type Answer = Result<Reply, Denied>;

/// The driver has stopped: whether the last request was done is to be asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is stopping; ask again when it is back")]
pub struct Stopped;

/// Why the driver ended.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// Nobody knows what is on the disk: only a restart can tell.
    #[error("a commit failed, so this coordinator ends; what was answered is kept")]
    Commit(#[source] store::Error),
    /// Another coordinator may lead: whatever this one says no longer counts.
    #[error("this coordinator leads no more, so it ends; started again it stands by")]
    Deposed,
    /// Its thread is gone, by a bug.
    #[error("the driver ended unexpectedly; what was answered is kept")]
    Gone,
}

/// A committed change, for those who follow.
#[derive(Clone, Debug)]
pub enum Change {
    /// State.
    Committed {
        /// The history's last revision.
        revision: u64,
        /// Jobs of which something changed.
        jobs: BTreeSet<JobId>,
        /// Those of them that are finished.
        finished: BTreeSet<JobId>,
    },
    /// Output came.
    Output(AttemptId),
}

/// What the driver is made of.
pub struct Setup {
    /// Restored.
    pub fleet: Fleet,
    /// The one writer.
    pub store: Box<dyn Store>,
    /// Asked before anything leaves.
    pub leadership: Leadership,
    /// At least this term is led by.
    pub term: Term,
    /// Stored before.
    pub commits: u64,
    /// On what hosts keep for the next leader.
    pub seal: Seal,
    /// Goes on after the last stored time.
    pub clock: Clock,
    /// Told of nodes after each commit.
    pub members: Arc<Members>,
    /// Told of forgotten nodes.
    pub vitals: Arc<Vitals>,
    /// Given the bodies of new jobs.
    pub bodies: Arc<Bodies>,
    /// Counted.
    pub metrics: Arc<Metrics>,
    /// Orders for providers.
    pub hosts: mpsc::Sender<HostOrder>,
}

struct Driver {
    parts: Setup,
    inputs: mpsc::Receiver<Input>,
    changes: broadcast::Sender<Arc<Change>>,
    outboxes: HashMap<SessionId, (NodeId, mpsc::Sender<Order>)>,
    replies: HashMap<RequestId, oneshot::Sender<Answer>>,
    accepting: HashMap<RequestId, AcceptedJob>,
    /// What acting itself brought about, for the next batch.
    consequences: VecDeque<Event>,
    /// Inputs that were too much for one commit, in order.
    waiting: Vec<Input>,
    revision: u64,
    commits: u64,
}

/// Starts the driver on a thread of its own. The receiver tells how it ended.
#[must_use]
pub fn start(parts: Setup) -> (Handle, oneshot::Receiver<Result<(), Failed>>) {
    let (inputs, received) = mpsc::channel(limits::DRIVER_QUEUE_MAX);
    let (changes, _) = broadcast::channel(CHANGES_MAX);
    let handle = Handle { inputs, changes: changes.clone(), next: Arc::new(AtomicU64::new(1)), clock: parts.clock };
    let (ended, end) = oneshot::channel();
    let commits = parts.commits;
    let driver = Driver {
        parts,
        inputs: received,
        changes,
        outboxes: HashMap::new(),
        replies: HashMap::new(),
        accepting: HashMap::new(),
        consequences: VecDeque::new(),
        waiting: Vec::new(),
        revision: 0,
        commits,
    };
    thread::Builder::new()
        .name("driver".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            let runtime = runtime.expect("a thread can always have a timer of its own");
            let _ = ended.send(runtime.block_on(driver.run()));
        })
        .expect("a process that just started can have one more thread");
    (handle, end)
}

impl Driver {
    async fn run(mut self) -> Result<(), Failed> {
        self.lead()?;
        let mut batch = Vec::with_capacity(limits::BATCH_EVENTS_MAX);
        loop {
            self.receive(&mut batch).await;
            let now = self.parts.clock.now();
            let mut out = Output::default();
            let mut queries = Vec::new();
            let stop = self.apply(&mut batch, &mut queries, now, &mut out);
            self.settle_persist_act(now, out)?;
            for query in queries {
                query(&self.parts.fleet, now);
            }
            if stop {
                return Ok(());
            }
        }
    }

    fn lead(&mut self) -> Result<(), Failed> {
        let known: Vec<NodeId> = self.parts.fleet.nodes().map(|(id, _)| id).collect();
        known.into_iter().for_each(|node| self.tell_member(node));
        let now = self.parts.clock.now();
        let mut out = Output::default();
        let term = self.parts.term.max(self.parts.fleet.meta().term.next());
        self.parts.fleet.apply(Event::Stored { commits: self.commits }, now, &mut out);
        self.parts.fleet.apply(Event::Led { term }, now, &mut out);
        self.settle_persist_act(now, out)
    }

    /// Waits for the first input or the next wake-up, then takes all that is there.
    async fn receive(&mut self, batch: &mut Vec<Input>) {
        batch.append(&mut self.waiting);
        if self.consequences.is_empty() && batch.is_empty() {
            self.receive_more(batch).await;
        }
        if let Some(enough) = enough_for_one_commit(batch.iter().map(Input::stored_bytes)) {
            self.waiting = batch.split_off(enough);
        }
    }

    async fn receive_more(&mut self, batch: &mut Vec<Input>) {
        let inputs = &mut self.inputs;
        let receive = inputs.recv_many(batch, limits::BATCH_EVENTS_MAX);
        let received = match self.parts.fleet.next_wake() {
            Some(at) => tokio::time::timeout(self.parts.clock.until(at), receive).await.unwrap_or(usize::MAX),
            None => receive.await,
        };
        // All handles are gone: nobody can ask anything any more.
        if received == 0 {
            batch.push(Input::Stop);
        }
    }

    fn apply(&mut self, batch: &mut Vec<Input>, queries: &mut Vec<Query>, now: Timestamp, out: &mut Output) -> bool {
        let mut stop = false;
        let fleet = &mut self.parts.fleet;
        fleet.apply(Event::Tick, now, out);
        for event in self.consequences.drain(..) {
            fleet.apply(event, now, out);
        }
        for input in batch.drain(..) {
            match input {
                Input::Events(events) => {
                    for event in events {
                        if let Event::NodeDisconnected { session, .. } = &event {
                            self.outboxes.remove(session);
                        }
                        fleet.apply(event, now, out);
                    }
                }
                Input::Request { request, event, job, reply } => {
                    self.replies.insert(request, reply);
                    if let Some(job) = job {
                        self.accepting.insert(request, job);
                    }
                    fleet.apply(event, now, out);
                }
                Input::Connect { node, key, session, hello, seen, outbox } => {
                    fleet.apply(Event::HostSaw { node, seen }, now, out);
                    self.outboxes.insert(session, (node, outbox));
                    fleet.apply(Event::NodeConnected { node, key, session, hello }, now, out);
                }
                Input::Query(query) => queries.push(query),
                Input::Stop => stop = true,
            }
        }
        stop
    }

    /// The order that every promise stands on: decide, persist, then act.
    fn settle_persist_act(&mut self, now: Timestamp, mut out: Output) -> Result<(), Failed> {
        self.parts.fleet.settle(now, &mut out);
        self.persist(&out.touched, now).map_err(|error| match error {
            store::Error::Deposed => Failed::Deposed,
            error => Failed::Commit(error),
        })?;
        // A coordinator that was stopped for a while finds out here, before a lease or an order leaves.
        if !self.parts.leadership.holds() {
            return Err(Failed::Deposed);
        }
        self.publish(&out.touched);
        for effect in out.effects {
            self.act(effect);
        }
        // Every request of the batch was answered; a body whose job was known already is not needed.
        self.accepting.clear();
        Ok(())
    }

    fn persist(&mut self, touched: &Touched, now: Timestamp) -> Result<(), store::Error> {
        let fleet = &self.parts.fleet;
        let templates = touched
            .accepted
            .iter()
            .filter_map(|(job, request)| Some((*job, self.accepting.get(request)?.template.clone())));
        let batch = Batch {
            now,
            meta: touched.meta.then(|| fleet.meta()),
            templates: templates.collect(),
            jobs: touched.jobs.iter().filter_map(|id| Some((*id, fleet.job(*id)?))).collect(),
            nodes: touched.nodes.iter().map(|id| (*id, fleet.node(*id))).collect(),
            pools: touched.pools.iter().map(|name| (name, fleet.pool(name))).collect(),
            attempts: touched.attempts.iter().map(|(id, record)| (*id, record)).collect(),
            withdrawn: touched.withdrawn.iter().copied().collect(),
            history: &touched.history,
            evidence: &touched.evidence,
        };
        if batch.is_empty() {
            return Ok(());
        }
        let rows = batch.jobs.len() + batch.nodes.len() + batch.pools.len() + batch.attempts.len();
        self.revision = self.parts.store.commit(&batch)?;
        self.commits += 1;
        self.parts.metrics.committed(rows);
        for entry in batch.history {
            let subject = store::subject_name(&entry.subject);
            let actor = entry.actor.as_ref().map(|actor| actor.0.as_str()).unwrap_or_default();
            tracing::debug!(target: "history", subject, kind = entry.kind, actor, "{}", entry.reason);
        }
        Ok(())
    }

    /// Tells those who follow what is committed now.
    fn publish(&mut self, touched: &Touched) {
        for (job, request) in &touched.accepted {
            if let Some(accepted) = self.accepting.get(request) {
                self.parts.bodies.put(*job, accepted.parts.clone());
            }
        }
        for node in &touched.nodes {
            self.tell_member(*node);
        }
        for record in touched.attempts.values() {
            if let Some(end) = &record.ended {
                self.parts.metrics.ended(&end.end);
            }
        }
        let silent = touched.history.is_empty() && touched.jobs.is_empty() && touched.attempts.is_empty();
        if silent || self.changes.receiver_count() == 0 {
            return;
        }
        let mut jobs = touched.jobs.clone();
        jobs.extend(touched.attempts.keys().map(|attempt| attempt.job));
        let is_finished = |job: &&JobId| self.parts.fleet.job(**job).is_some_and(|job| job.finished.is_some());
        let finished = jobs.iter().filter(is_finished).copied().collect();
        // The last follower may have left in between.
        let _ = self.changes.send(Arc::new(Change::Committed { revision: self.revision, jobs, finished }));
    }

    fn tell_member(&self, id: NodeId) {
        let member = self.parts.fleet.node(id).map(|node| Member { name: node.name.clone(), key: node.key });
        if member.is_none() {
            self.parts.vitals.forget(id);
        }
        self.parts.members.set(id, member);
    }

    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Reply { request, reply } => {
                if let Some(waiting) = self.replies.remove(&request) {
                    // A caller that went away asks again by its key.
                    let _ = waiting.send(reply);
                }
            }
            Effect::CreateHost { pool, host, template } => self.order_host(HostOrder::Create { pool, host, template }),
            Effect::WakeHost { pool, host, node } => {
                // A node that was removed in the same batch is not woken any more.
                if let Some(record) = self.parts.fleet.node(node) {
                    let (name, labels) = (record.name.clone(), record.labels.clone());
                    self.order_host(HostOrder::Wake { pool, host, node, name, labels });
                }
            }
            Effect::AskHost { pool, host } => self.order_host(HostOrder::Describe { pool, host }),
            Effect::DeleteHost { pool, host, node } => self.order_host(HostOrder::Delete { pool, host, node }),
            Effect::Welcome { .. }
            | Effect::GrantLease { .. }
            | Effect::Start { .. }
            | Effect::Stop { .. }
            | Effect::Acknowledge { .. }
            | Effect::Recall { .. }
            | Effect::NoticeDrain { .. }
            | Effect::AskDrained { .. }
            | Effect::Release { .. }
            | Effect::Reopen { .. }
            | Effect::CloseSession { .. } => self.order_node(effect),
        }
    }

    /// A node that does not take its orders is cut off: it comes back and compares.
    fn order_node(&mut self, effect: Effect) {
        let told = Seen { term: self.parts.fleet.meta().term, commit: self.commits };
        let Some((session, order)) = order_of(effect, told, &self.parts.seal) else { return };
        let Some((node, outbox)) = self.outboxes.get(&session) else { return };
        let node = *node;
        let closes = matches!(order, Order::Close(_));
        let Err(refused) = outbox.try_send(order) else {
            if closes {
                self.outboxes.remove(&session);
            }
            return;
        };
        if matches!(refused, mpsc::error::TrySendError::Full(_)) {
            tracing::warn!(%node, "the node does not read its orders; its stream is cut");
        }
        self.outboxes.remove(&session);
        self.consequences.push_back(Event::NodeDisconnected { node, session });
    }

    fn order_host(&mut self, order: HostOrder) {
        if self.parts.hosts.try_send(order).is_err() {
            // The core asks again: creates at the boot deadline, deletes after DELETE_ASK_AGAIN, wakes after WAKE_ASK_AGAIN.
            tracing::warn!("the provider does not keep up; an order of a host was dropped");
        }
    }
}

impl Input {
    /// What of it a commit holds that may be large.
    fn stored_bytes(&self) -> usize {
        match self {
            Self::Request { job: Some(job), .. } => job.template.len(),
            Self::Events(events) => events.iter().map(detail_bytes).sum(),
            Self::Request { job: None, .. } | Self::Connect { .. } | Self::Query(_) | Self::Stop => 0,
        }
    }
}

/// What comes with an attempt's end: tails of its output, small files.
fn detail_bytes(event: &Event) -> usize {
    if let Event::AttemptEnded { detail, .. } = event { detail.len() } else { 0 }
}

/// How many of these go into one commit; none: all.
fn enough_for_one_commit(sizes: impl IntoIterator<Item = usize>) -> Option<usize> {
    let mut bytes = 0;
    let is_enough = |size: usize| {
        bytes += size;
        bytes > limits::COMMIT_BYTES_MAX
    };
    // The one that goes over it goes too: alone it must fit.
    sizes.into_iter().position(is_enough).map(|at| at + 1)
}

#[cfg(test)]
mod tests;
