//! What really happened, and whether the fleet may have let it happen. It
//! sees every process and every disk, and judges by the promises alone: it
//! shares no rule with the code that it checks.

mod attempts;
mod effects;
mod ids;
mod nodes;
mod pools;
mod processes;
mod words;

use std::collections::{BTreeMap, BTreeSet};

use muster_core::{
    effect::{Effect, Reply},
    end::End,
    event::Event,
    fleet::{Fleet, Output},
    host::Verdict,
    ids::{AttemptId, HostRequestId, JobId, NodeId, PoolName, RequestId, SessionId, TaskIndex},
    limits,
    node::{Duty, Hold, Liveness},
    resources::Resources,
    time::{Millis, Timestamp},
    timeline::Seen,
};

use crate::{
    coverage::Coverage,
    host::SimHost,
    store::{LostWrites, Store},
};

use self::{attempts::phase, effects::check_requests, ids::IdMap, pools::Providers, words::Words};

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// "FL-4".
    pub promise: &'static str,
    /// What happened.
    pub detail: String,
}

impl Violation {
    pub(crate) fn new(promise: &'static str, detail: String) -> Self {
        Self { promise, detail }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is broken: {}", self.promise, self.detail)
    }
}

fn broken(promise: &'static str, detail: String) -> Result<(), Violation> {
    Err(Violation { promise, detail })
}

/// What is known of one attempt.
#[derive(Debug, Default)]
struct Attempt {
    /// It was stored.
    placed: bool,
    /// An agent gave it to its spawner.
    handed: bool,
    /// User code runs there: on one host, unless its number was given out again after a loss.
    running: Vec<(usize, Resources)>,
    started: bool,
    /// How it was over, and where.
    over: Option<(usize, Verdict)>,
    /// Its spawner died before it was told to forget it.
    forgotten: bool,
    /// What it left was looked at, and was kept.
    output_kept: Option<bool>,
    /// The end that was stored.
    stored: Option<End>,
    withdrawn: bool,
}

/// What is known of one task.
#[derive(Debug, Default)]
struct Task {
    starts: u32,
    running: Vec<AttemptId>,
    /// Attempts that ended, by whose budget they drew on, since the last retry.
    failed: u32,
    lost: u32,
    drained: u32,
    /// Nodes that were lost, or their spawners, while it ran there.
    brought_down: BTreeSet<NodeId>,
    falls: u32,
    /// Its one end.
    end: Option<String>,
}

/// All that no part of the fleet can see at once.
#[derive(Debug, Default)]
pub struct Truth {
    attempts: IdMap<AttemptId, Attempt>,
    tasks: IdMap<(JobId, TaskIndex), Task>,
    taken: IdMap<usize, Resources>,
    busy: BTreeMap<usize, BTreeSet<AttemptId>>,
    /// When each node was last answered.
    heard: IdMap<NodeId, Timestamp>,
    accepted: BTreeSet<JobId>,
    cancels: BTreeSet<JobId>,
    retried: BTreeSet<JobId>,
    /// Tasks that a retry of this batch gives fresh budgets to, if it is granted.
    renewed: BTreeSet<(JobId, TaskIndex)>,
    ever_retried: BTreeSet<JobId>,
    led: Timestamp,
    /// When nodes fell silent lately.
    silences: Vec<(Timestamp, NodeId)>,
    brake_until: Timestamp,
    /// The brake was released, and nodes are given up one at a time until then.
    paced_until: Timestamp,
    /// When the last one was.
    given_up: Timestamp,
    /// As stored before this batch.
    before: BTreeMap<NodeId, (Liveness, Duty, Hold)>,
    /// Nodes of this batch that cooled down.
    cooling: BTreeSet<NodeId>,
    /// Attempts of this batch that were told to stop in an earlier one.
    stopping: BTreeSet<AttemptId>,
    /// Those that had started.
    started_before: BTreeSet<AttemptId>,
    /// Faults of each node in a row, as far as they are surely in a row.
    faults: BTreeMap<NodeId, u32>,
    /// What heartbeats of this batch say of full disks: by stream and number.
    disks: BTreeMap<(SessionId, u64), bool>,
    /// Nodes whose full disk this leader has heard of, or the one before it.
    disk_full: BTreeSet<NodeId>,
    /// What hosts forgot without a word, and after which heartbeat of which stream.
    unsaid: BTreeMap<AttemptId, (SessionId, u64)>,
    /// Asked back before they started.
    recalled: BTreeSet<AttemptId>,
    /// Hosts that were asked for and that no provider has said to be gone.
    requested: BTreeSet<(PoolName, HostRequestId)>,
    /// Hosts of which somebody was told to wake them.
    woken: BTreeSet<(PoolName, HostRequestId)>,
    /// Those of which it says so in this batch.
    going: Vec<(PoolName, HostRequestId)>,
    /// Commits that the store has lost, and no operator has accepted that.
    lost: BTreeSet<Seen>,
    /// A host has told this leader of one of them.
    told_of_loss: bool,
    /// The same, and an operator's word, in this batch.
    telling: bool,
    accepting: bool,
    /// The leader knew of a loss before this batch.
    knew_of_loss: bool,
    /// Jobs of which the store lost something. Where each of their tasks stands is not what it was, and their
    /// numbers may be given out again: an operator who accepts a loss accepts that these run again, or are gone.
    doubtful: BTreeSet<JobId>,
    /// How many nodes may drain at once, by the reason of their drains.
    drain_budgets: BTreeMap<String, u32>,
    /// Nodes that were drained for a reason, or are gone: one that comes back has to prove it again, out of turn.
    had_turn: BTreeSet<(NodeId, String)>,
    /// What people said of nodes.
    words: Words,
    /// What providers were told and said.
    providers: Providers,
    pub starts_total: u64,
}

/// Clocks run up to this much fast or slow: what is measured with one may be off by it.
const DRIFT_PERCENT: u64 = 7;

fn surely(span: Millis) -> Millis {
    Millis(span.0 * (100 - DRIFT_PERCENT) / 100)
}

impl Truth {
    /// A coordinator begins to lead.
    pub fn led(&mut self, now: Timestamp, jumped: bool) {
        self.led = now;
        self.silences.clear();
        self.told_of_loss = false;
        self.faults.clear();
        self.providers.led();
        if jumped {
            (self.brake_until, self.paced_until) = (now, now);
        }
    }

    /// The store goes on without its last commits: of what these said nothing is promised, of all else everything.
    pub fn lost_writes(&mut self, lost: LostWrites, store: &Store) {
        self.doubtful.extend(&lost.jobs);
        self.lost.extend(lost.commits);
        self.accepted.retain(|job| store.job(*job).is_some());
        // One that was confirmed gone by a lost commit is asked for again by its old number.
        let rows = store.pools().flat_map(|(name, row)| row.hosts.keys().map(|host| (name.clone(), *host)));
        self.requested = rows.collect();
        // A brake may have gone with them; the next leader counts anew.
        (self.brake_until, self.paced_until) = (Timestamp(0), Timestamp(0));
        self.disk_full.clear();
        self.words.forget();
        self.providers.forget();
        self.told_of_loss = false;
    }

    /// The store lost something of this job, or has not got to its number again.
    fn is_doubtful(&self, job: JobId) -> bool {
        self.doubtful.contains(&job)
    }

    /// The leader looks again after a pause of its own.
    pub fn awake(&mut self, now: Timestamp) {
        self.led = now;
    }

    /// What the batch before this one heard has been judged, or is lost with it.
    pub fn begin(&mut self, fleet: &Fleet) {
        (self.telling, self.accepting) = (false, false);
        self.going.clear();
        self.disks.clear();
        self.renewed.clear();
        self.words.begin();
        self.providers.begin();
        self.knew_of_loss = fleet.meta().loss.is_some();
    }

    /// The leader takes this in.
    pub fn hear(&mut self, event: &Event, fleet: &Fleet, now: Timestamp) {
        self.words.hear(event);
        self.providers.hear(event);
        match event {
            // What this leader does with it may be lost; then the brake holds for longer.
            Event::ReleaseBrake { .. } if now < self.brake_until => {
                (self.brake_until, self.paced_until) = (now, now + surely(limits::BRAKE_HOLD));
                // The first one may go at once.
                self.given_up = Timestamp(0);
            }
            Event::Cancel { job, .. } => {
                self.cancels.insert(*job);
            }
            Event::Retry { job, .. } => {
                self.note_renewed(fleet, *job);
                self.retried.insert(*job);
                self.ever_retried.insert(*job);
            }
            Event::HostGone { pool, host } | Event::HostFailed { pool, host, .. } => {
                self.going.push((pool.clone(), *host));
            }
            Event::Heartbeat { session, sequence, sample, .. } => {
                if let Some(available) = sample.disk_available_bytes {
                    self.disks.insert((*session, *sequence), available == 0);
                }
            }
            Event::HostSaw { seen, .. } => self.telling |= self.lost.contains(seen),
            Event::AcceptLoss { .. } => self.accepting = true,
            _other => {}
        }
    }

    /// An agent and its spawner forget these, which run: its next heartbeat does not name them.
    pub fn forgotten(&mut self, attempts: impl Iterator<Item = AttemptId>, session: SessionId, sequence: u64) {
        self.unsaid.extend(attempts.map(|attempt| (attempt, (session, sequence))));
    }

    /// FL-2: what a host does not hold any more has ended, by the record too.
    fn check_unsaid(&mut self, fleet: &Fleet, session: SessionId, sequence: u64) -> Result<(), Violation> {
        let told: Vec<AttemptId> = self
            .unsaid
            .iter()
            .filter(|(_, (stream, last))| *stream == session && *last < sequence)
            .map(|(attempt, _)| *attempt)
            .collect();
        for attempt in told {
            self.unsaid.remove(&attempt);
            if fleet.attempt(attempt).is_some() && !self.is_doubtful(attempt.job) {
                return broken("FL-2", format!("attempt {attempt} goes on by the record, and its host has lost it"));
            }
        }
        Ok(())
    }

    /// An agent is asked to give these back: they never start there, and their numbers are not used elsewhere.
    pub fn recalled(&mut self, attempts: impl Iterator<Item = AttemptId>) {
        self.recalled.extend(attempts);
    }

    /// An operator drains nodes in turn. The drains of it are known by the reason that is answered here.
    pub fn set_drain_budget(&mut self, request: RequestId, at_once: u32) -> String {
        let reason = format!("in turn, by request {}", request.0);
        self.drain_budgets.insert(reason.clone(), at_once);
        reason
    }

    /// A client has its answer: what it says must be on disk.
    pub fn check_answer(&mut self, reply: &Reply, asked: &Asked, store: &Store) -> Result<(), Violation> {
        match (reply, asked) {
            (Reply::Submitted { job, .. }, Asked::Submit { known }) => {
                self.accepted.insert(*job);
                if known.is_some_and(|known| known != *job) {
                    return broken("FL-1", format!("one key made the jobs {known:?} and {job}"));
                }
                match store.job(*job) {
                    Some(_) => Ok(()),
                    None => broken("FL-1", format!("job {job} was answered and is not stored")),
                }
            }
            (Reply::Cancelled { .. }, Asked::Cancel { job }) => match store.job(*job) {
                Some(row) if row.cancelled_by.is_some() || row.finished.is_some() => Ok(()),
                // A retry may have come in the same batch.
                Some(_) if self.ever_retried.contains(job) => Ok(()),
                Some(_) | None => broken("FL-1", format!("the cancel of {job} was answered and is not stored")),
            },
            (Reply::NodeChanged, Asked::Drain { node }) => match store.node(*node) {
                // A removed node has nothing to drain.
                None => Ok(()),
                // A resume may have come in the same batch.
                Some(row) if row.drain_revision.0 > 0 => Ok(()),
                Some(_) => broken("FL-1", format!("the drain of {node} was answered and is not stored")),
            },
            _any_other => Ok(()),
        }
    }

    /// Remembers what the batch changes, and counts the edges.
    pub fn committing(
        &mut self,
        fleet: &Fleet,
        out: &Output,
        store: &Store,
        coverage: &mut Coverage,
    ) -> Result<(), Violation> {
        self.before.clear();
        self.cooling.clear();
        for id in &out.touched.nodes {
            let Some(row) = store.node(*id) else { continue };
            self.before.insert(*id, (row.liveness, row.duty.clone(), row.hold.clone()));
            if let Some(node) = fleet.node(*id) {
                coverage.edge("liveness", row.liveness.name(), node.liveness.name());
                coverage.edge("duty", row.duty.name(), node.duty.name());
                coverage.edge("hold", row.hold.name(), node.hold.name());
            }
        }
        self.stopping.clear();
        self.started_before.clear();
        for (id, record) in &out.touched.attempts {
            if let Some((_, first)) = store.attempt(*id).and_then(|row| row.stopping) {
                self.stopping.insert(*id);
                if let Some((_, reason)) = record.stopping.filter(|(_, reason)| *reason != first) {
                    return broken("FL-9", format!("attempt {id} was to stop as {first:?}, and now as {reason:?}"));
                }
            }
            if store.attempt(*id).is_some_and(|row| row.started.is_some()) {
                self.started_before.insert(*id);
            }
            if store.node(record.node).is_some_and(|row| row.hold != Hold::None) {
                self.cooling.insert(record.node);
            }
            let from = store.attempt(*id).map_or("new", phase);
            coverage.edge("attempt", from, phase(record));
            if let Some(end) = &record.ended {
                coverage.count("end", crate::coverage::end_name(&end.end));
                if end.presumed {
                    coverage.count("end", "presumed");
                }
            }
        }
        for id in &out.touched.withdrawn {
            coverage.edge("attempt", store.attempt(*id).map_or("new", phase), "withdrawn");
        }
        coverage.add("evidence", "kept", out.touched.evidence.len() as u64);
        for entry in &out.touched.history {
            coverage.history(&entry.kind);
            self.note_turn_over(entry, fleet);
        }
        for name in &out.touched.pools {
            if let Some(pool) = fleet.pool(name) {
                check_requests(store.pool(name), pool)?;
            }
        }
        Ok(())
    }

    /// After each committed batch: all promises, of all that it touched.
    pub fn check(
        &mut self,
        fleet: &Fleet,
        out: &Output,
        store: &Store,
        hosts: &[SimHost],
        now: Timestamp,
        time: Timestamp,
    ) -> Result<(), Violation> {
        muster_core::invariants::check_touched(fleet, &out.touched)
            .map_err(|broken| Violation::new(broken.promise, broken.detail))?;
        for entry in &out.touched.history {
            if entry.reason.is_empty() {
                return broken("FL-14", format!("{:?} was {} without a reason", entry.subject, entry.kind));
            }
            self.check_given_back(entry, fleet, now)?;
        }
        for id in &out.touched.withdrawn {
            self.check_withdrawn(fleet, *id)?;
        }
        for (id, record) in &out.touched.attempts {
            self.check_attempt(fleet, *id, record, time)?;
            self.check_presumed(*id, record, fleet, hosts)?;
            self.check_given_up(*id, record, fleet, out)?;
        }
        self.check_faults(fleet, out)?;
        self.retried.clear();
        self.forget_budgets(fleet);
        self.note_providers(fleet, out, now);
        for effect in &out.effects {
            // What was answered was heard: not a copy that was turned away, nor what a leader of old took in.
            if let Effect::Welcome { node, .. } | Effect::GrantLease { node, .. } = effect
                && fleet.meta().term.0 == store.leader.term
            {
                self.heard.insert(*node, now);
            }
        }
        for id in &out.touched.nodes {
            if let Some(node) = fleet.node(*id) {
                self.check_hold(*id, node, time)?;
                self.check_node(fleet, *id, node, hosts, now)?;
            }
        }
        self.check_loss(fleet, out, store)?;
        self.check_pools(fleet, out)?;
        for effect in &out.effects {
            self.check_effect(fleet, out, effect, store)?;
            if let Effect::Welcome { node, .. } | Effect::GrantLease { node, .. } = effect {
                self.check_evicted(fleet, *node, time)?;
            }
            if let Effect::Welcome { node, .. } = effect {
                self.note_speaks(fleet, *node);
            }
            if let Effect::GrantLease { node, session, sequence, .. } = effect
                && fleet.meta().term.0 == store.leader.term
            {
                match self.disks.get(&(*session, *sequence)) {
                    Some(true) => self.disk_full.insert(*node),
                    Some(false) => self.disk_full.remove(node),
                    None => false,
                };
                self.check_unsaid(fleet, *session, *sequence)?;
            }
        }
        Ok(())
    }

    /// Every accepted job is still known.
    pub fn check_accepted(&self, fleet: &Fleet) -> Result<(), Violation> {
        match self.accepted.iter().find(|job| fleet.job(**job).is_none()) {
            Some(lost) => broken("FL-1", format!("job {lost} was accepted and is not known")),
            None => Ok(()),
        }
    }

    /// FL-7: a host goes only when nothing is left on it.
    pub fn check_leaves(&self, at: usize, host: &SimHost) -> Result<(), Violation> {
        let is_busy = self.busy.get(&at).is_some_and(|busy| !busy.is_empty());
        if is_busy || !host.sandboxes.is_empty() {
            return broken("FL-7", format!("host {} was told to go and holds work", host.name));
        }
        Ok(())
    }

    /// Nothing runs anywhere.
    pub fn is_quiet(&self) -> bool {
        self.busy.values().all(BTreeSet::is_empty)
    }

    pub fn accepted(&self) -> impl Iterator<Item = JobId> + '_ {
        self.accepted.iter().copied()
    }
}

/// What a client waits for.
#[derive(Clone, Debug)]
pub enum Asked {
    Submit { known: Option<JobId> },
    Cancel { job: JobId },
    Drain { node: NodeId },
    Enroll { host: usize },
    Other,
}
