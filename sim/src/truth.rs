//! What really happened, and whether the fleet may have let it happen. It
//! sees every process and every disk, and judges by the promises alone: it
//! shares no rule with the code that it checks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

use muster_core::{
    effect::{AttemptRecord, Effect, EndRecord, Reply, StopReason},
    end::{Blame, End},
    event::Event,
    fleet::{Fleet, Output},
    host::{StartOrder, Verdict},
    ids::{AttemptId, HostRequestId, JobId, NodeId, PoolName, TaskIndex},
    lease, limits,
    node::{Duty, Hold, Liveness, NodeRecord},
    pool::{Host, PoolRecord},
    resources::Resources,
    spec::{Delivery, JobSpec, OnDrain},
    time::{Millis, Timestamp},
    timeline::Seen,
};

use crate::{
    coverage::Coverage,
    host::SimHost,
    store::{LostWrites, Store},
};

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
    /// Its one end.
    end: Option<String>,
}

/// Ids are small numbers that nobody chooses to collide: a multiplication spreads them well enough, and the checks
/// look one up several times a step.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u32(&mut self, id: u32) {
        self.write_u64(u64::from(id));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0.rotate_left(5) ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, id: usize) {
        self.write_u64(id as u64);
    }
}

type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

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
    ever_retried: BTreeSet<JobId>,
    led: Timestamp,
    /// When nodes fell silent lately.
    silences: Vec<(Timestamp, NodeId)>,
    brake_until: Timestamp,
    /// As stored before this batch.
    before: BTreeMap<NodeId, (Liveness, Duty)>,
    /// Nodes of this batch that cooled down.
    cooling: BTreeSet<NodeId>,
    /// Attempts of this batch that were told to stop in an earlier one.
    stopping: BTreeSet<AttemptId>,
    /// Those that had started.
    started_before: BTreeSet<AttemptId>,
    /// Faults of each node in a row, as far as they are surely in a row.
    faults: BTreeMap<NodeId, u32>,
    /// Hosts that were asked for and that no provider has said to be gone.
    requested: BTreeSet<(PoolName, HostRequestId)>,
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
        if jumped {
            self.brake_until = now;
        }
    }

    /// The store goes on without its last commits: of what these said nothing is promised, of all else everything.
    pub fn lost_writes(&mut self, lost: LostWrites, store: &Store) {
        self.doubtful.extend(&lost.jobs);
        self.lost.extend(lost.commits);
        self.accepted.retain(|job| store.job(*job).is_some());
        self.requested.retain(|(pool, host)| store.pool(pool).is_some_and(|row| row.hosts.contains_key(host)));
        // A brake may have gone with them; the next leader counts anew.
        self.brake_until = Timestamp(0);
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
        self.knew_of_loss = fleet.meta().loss.is_some();
    }

    /// The leader takes this in.
    pub fn hear(&mut self, event: &Event) {
        match event {
            Event::Cancel { job, .. } => {
                self.cancels.insert(*job);
            }
            Event::Retry { job, .. } => {
                self.retried.insert(*job);
                self.ever_retried.insert(*job);
            }
            Event::HostGone { pool, host } | Event::HostFailed { pool, host, .. } => {
                self.going.push((pool.clone(), *host));
            }
            Event::HostSaw { seen, .. } => self.telling |= self.lost.contains(seen),
            Event::AcceptLoss { .. } => self.accepting = true,
            _other => {}
        }
    }

    /// An agent gives it to its spawner.
    pub fn handed(
        &mut self,
        attempt: AttemptId,
        order: StartOrder,
        on: &SimHost,
        now: Timestamp,
    ) -> Result<(), Violation> {
        self.attempts.entry(attempt).or_default().handed = true;
        // The spawner would refuse it too; each of the two holds by itself.
        if order.exclusive && on.boottime(now) >= on.lease {
            return broken("FL-3", format!("attempt {attempt} is handed over on {} without a lease", on.name));
        }
        Ok(())
    }

    /// User code of this attempt begins on this host.
    pub fn started(
        &mut self,
        attempt: AttemptId,
        host: usize,
        on: &SimHost,
        store: &Store,
        now: Timestamp,
    ) -> Result<(), Violation> {
        let is_doubtful = self.is_doubtful(attempt.job);
        // As it was ordered: its number may be another job's by now.
        let request = on.sandboxes.get(&attempt).map(|sandbox| sandbox.order.request).unwrap_or_default();
        let Some(job) = store.job(attempt.job) else {
            if is_doubtful {
                self.busy.entry(host).or_default().insert(attempt);
                self.attempts.entry(attempt).or_default().running.push((host, Resources::default()));
                return Ok(());
            }
            return broken("FL-1", format!("attempt {attempt} runs, and its job is not stored"));
        };
        let known = self.attempts.entry(attempt).or_default();
        if known.started && !is_doubtful {
            return broken("FL-4", format!("attempt {attempt} was started twice"));
        }
        known.started = true;
        known.running.push((host, request));
        let task = self.tasks.entry((attempt.job, attempt.task)).or_default();
        task.starts += 1;
        self.starts_total += 1;
        let others = task.running.clone();
        task.running.push(attempt);
        self.busy.entry(host).or_default().insert(attempt);
        let taken = self.taken.entry(host).or_default();
        *taken = taken.plus(&request);
        if !taken.fits_in(&on.capacity) {
            return broken("F5", format!("host {} runs more than it has with attempt {attempt}", on.name));
        }
        match job.spec.delivery {
            // Its number may have been another job's, whose order this is.
            _once_or_twice if is_doubtful => Ok(()),
            Delivery::Exclusive if on.boottime(now) >= on.lease => {
                broken("FL-3", format!("attempt {attempt} starts on {} without a lease", on.name))
            }
            Delivery::AtMostOnce if task.starts > 1 => {
                broken("FL-4", format!("task {}.{} was started {} times", attempt.job, attempt.task, task.starts))
            }
            Delivery::Exclusive if !others.is_empty() => {
                broken("FL-3", format!("attempt {attempt} starts while {others:?} run"))
            }
            Delivery::AtLeastOnce | Delivery::AtMostOnce | Delivery::Exclusive => Ok(()),
        }
    }

    /// No process of this attempt runs any more, or none ever did.
    pub fn ended(&mut self, attempt: AttemptId, host: usize, verdict: &Verdict) {
        let known = self.attempts.entry(attempt).or_default();
        known.over = Some((host, verdict.clone()));
        let Some(at) = known.running.iter().position(|(there, _)| *there == host) else { return };
        let (_, request) = known.running.remove(at);
        if let Some(task) = self.tasks.get_mut(&(attempt.job, attempt.task)) {
            let at = task.running.iter().position(|other| *other == attempt);
            at.map(|at| task.running.remove(at));
        }
        if let Some(busy) = self.busy.get_mut(&host) {
            busy.remove(&attempt);
        }
        if let Some(taken) = self.taken.get_mut(&host) {
            *taken = taken.minus(&request);
        }
    }

    /// All processes of a host die, and with its spawner what it kept of others.
    pub fn ended_on(&mut self, host: usize, kept: impl Iterator<Item = AttemptId>) {
        for attempt in kept {
            self.attempts.entry(attempt).or_default().forgotten = true;
        }
        for attempt in self.busy.remove(&host).unwrap_or_default() {
            if let Some(known) = self.attempts.get_mut(&attempt) {
                known.running.retain(|(there, _)| *there != host);
                known.over = Some((host, Verdict::Lost));
            }
            if let Some(task) = self.tasks.get_mut(&(attempt.job, attempt.task)) {
                let at = task.running.iter().position(|other| *other == attempt);
                at.map(|at| task.running.remove(at));
            }
        }
        self.taken.remove(&host);
    }

    /// A host says that an attempt of its own is over.
    pub fn check_reported_end(&self, attempt: AttemptId, host: usize, end: &End) -> Result<(), Violation> {
        let known = self.attempts.get(&attempt);
        if known.is_some_and(|known| known.running.iter().any(|(there, _)| *there == host)) {
            return broken("FL-5", format!("attempt {attempt} was reported ended and runs on host {host}"));
        }
        match known.and_then(|known| known.output_kept) {
            _any if self.is_doubtful(attempt.job) => Ok(()),
            None => broken("FL-10", format!("attempt {attempt} was reported ended before its output was kept")),
            Some(false) if *end == End::Succeeded => {
                broken("FL-10", format!("attempt {attempt} succeeded, and nobody says that its output is lost"))
            }
            Some(_) => Ok(()),
        }
    }

    /// The agent has taken what an attempt left, or could not.
    pub fn sealed(&mut self, attempt: AttemptId, output_lost: bool) {
        // An agent that died after it had taken it may have said so already.
        let known = self.attempts.entry(attempt).or_default();
        known.output_kept = Some(known.output_kept.unwrap_or_default() || !output_lost);
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
            self.before.insert(*id, (row.liveness, row.duty.clone()));
            if let Some(node) = fleet.node(*id) {
                coverage.edge("liveness", row.liveness.name(), node.liveness.name());
                coverage.edge("duty", row.duty.name(), node.duty.name());
                coverage.edge("hold", row.hold.name(), node.hold.name());
            }
        }
        self.stopping.clear();
        self.started_before.clear();
        for (id, record) in &out.touched.attempts {
            if store.attempt(*id).is_some_and(|row| row.stopping.is_some()) {
                self.stopping.insert(*id);
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
        }
        for id in &out.touched.withdrawn {
            self.check_withdrawn(fleet, *id)?;
        }
        for (id, record) in &out.touched.attempts {
            self.check_attempt(fleet, *id, record, time)?;
            self.check_presumed(*id, record, fleet, hosts)?;
        }
        self.check_faults(fleet, out)?;
        for job in std::mem::take(&mut self.retried) {
            self.forget_budgets(fleet, job);
        }
        for id in &out.touched.nodes {
            if let Some(node) = fleet.node(*id) {
                self.check_node(fleet, *id, node, hosts, now)?;
            }
        }
        self.check_loss(fleet, out, store)?;
        self.check_pools(fleet, out)?;
        for effect in &out.effects {
            self.check_effect(fleet, out, effect, store)?;
            // What was answered was heard: not a copy that was turned away, nor what a leader of old took in.
            if let Effect::Welcome { node, .. } | Effect::GrantLease { node, .. } = effect
                && fleet.meta().term.0 == store.leader.term
            {
                self.heard.insert(*node, now);
            }
        }
        Ok(())
    }

    fn forget_budgets(&mut self, fleet: &Fleet, job: JobId) {
        let Some(record) = fleet.job(job) else { return };
        for task in 0..record.spec.tasks {
            // What succeeded is not tried again.
            if let Some(known) = self.tasks.get_mut(&(job, task))
                && record.end_of(task) != Some("succeeded")
            {
                (known.failed, known.lost, known.drained, known.end) = (0, 0, 0, None);
                known.brought_down.clear();
            }
        }
    }

    fn check_attempt(
        &mut self,
        fleet: &Fleet,
        id: AttemptId,
        record: &AttemptRecord,
        time: Timestamp,
    ) -> Result<(), Violation> {
        let Some(job) = fleet.job(id.job) else {
            return broken("FL-1", format!("attempt {id} has no job"));
        };
        if record.placement_reason.is_empty() {
            return broken("FL-14", format!("attempt {id} was placed without a reason"));
        }
        if self.is_doubtful(id.job) {
            return Ok(());
        }
        let known = self.attempts.entry(id).or_default();
        if record.started.is_some() && !known.handed {
            return broken("FL-2", format!("attempt {id} counts as started, and no agent ever gave it to its spawner"));
        }
        if known.withdrawn {
            return broken("FL-2", format!("attempt {id} was taken back and is stored again"));
        }
        let goes_on = (1..id.number.get()).filter_map(std::num::NonZeroU32::new).find(|number| {
            let earlier = self.attempts.get(&AttemptId { number: *number, ..id });
            earlier.is_some_and(|known| known.placed && known.stored.is_none() && !known.withdrawn)
        });
        if let Some(number) = goes_on {
            return broken("FL-9", format!("attempt {id} was placed while attempt {number} of its task has no end"));
        }
        let known = self.attempts.entry(id).or_default();
        known.placed = true;
        if let Some((_, StopReason::Drained)) = record.stopping
            && record.ended.is_none()
            && !self.stopping.contains(&id)
        {
            check_eviction(fleet, id, record, &job.spec, time)?;
        }
        let Some(end) = &record.ended else { return Ok(()) };
        if let Some(first) = known.stored.replace(end.end.clone()) {
            return broken("FL-2", format!("attempt {id} ended as {first} and again as {}", end.end));
        }
        let is_true = is_what_happened(&end.end, known.over.as_ref().map(|(_, verdict)| verdict))
            // Its spawner died with what it knew, or before the order reached it.
            || (end.end == End::SpawnerLost && (known.forgotten || (known.handed && known.over.is_none())));
        if !end.presumed && !is_true {
            let happened = format!("{:?}", known.over);
            return broken("FL-2", format!("attempt {id} is stored as {}, and what happened is {happened}", end.end));
        }
        if end.end == End::Cancelled && !self.cancels.contains(&id.job) {
            return broken("FL-2", format!("attempt {id} ended as cancelled, and nobody cancelled its job"));
        }
        if end.end == End::TimedOut && job.spec.time_limit.is_none() {
            return broken("FL-2", format!("attempt {id} timed out, and has no limit"));
        }
        self.check_task_end(fleet, id, record, &end.end)
    }

    /// FL-6: what runs on under its spawner is adopted, also when its agent or its stream is a new one.
    fn check_presumed(
        &self,
        id: AttemptId,
        record: &AttemptRecord,
        fleet: &Fleet,
        hosts: &[SimHost],
    ) -> Result<(), Violation> {
        let Some(end) = record.ended.as_ref().filter(|end| end.presumed && end.end == End::SpawnerLost) else {
            return Ok(());
        };
        let Some(node) = fleet.node(record.node).filter(|_| !self.is_doubtful(id.job)) else { return Ok(()) };
        let runs = |(at, _): (usize, &SimHost)| self.busy.get(&at).is_some_and(|busy| busy.contains(&id));
        if spokesmen(record.node, node, hosts).any(runs) {
            return broken("FL-6", format!("attempt {id} is given up as {}, and runs on {}", end.end, node.name));
        }
        Ok(())
    }

    /// A host that fails one start after another is set aside: it must not eat the queue.
    fn check_faults(&mut self, fleet: &Fleet, out: &Output) -> Result<(), Violation> {
        let mut failed: BTreeMap<NodeId, u32> = BTreeMap::new();
        for record in out.touched.attempts.values() {
            let faulty = |end: &EndRecord| !end.presumed && end.end.speaks_against_the_host();
            if record.ended.as_ref().is_some_and(faulty) {
                *failed.entry(record.node).or_default() += 1;
            }
        }
        for (id, record) in &out.touched.attempts {
            if record.started.is_some() && !self.started_before.contains(id) {
                // In which order they came in this batch is not known here.
                self.faults.remove(&record.node);
                failed.remove(&record.node);
            }
        }
        for (id, count) in failed {
            // What comes while it cools down is not held against it.
            let Some(node) = fleet.node(id).filter(|_| !self.cooling.contains(&id)) else { continue };
            let faults = self.faults.entry(id).or_default();
            *faults += count;
            if node.duty != Duty::Eligible {
                *faults = 0;
            } else if *faults >= limits::FAULTS_BEFORE_COOLING && node.hold == Hold::None {
                return broken("case 17", format!("node {} had {faults} faults in a row, and gets work", node.name));
            }
        }
        Ok(())
    }

    /// A task ends once, by its own result, and is tried again only within its budgets.
    fn check_task_end(
        &mut self,
        fleet: &Fleet,
        id: AttemptId,
        record: &AttemptRecord,
        end: &End,
    ) -> Result<(), Violation> {
        let Some(job) = fleet.job(id.job) else { return Ok(()) };
        let task = self.tasks.entry((id.job, id.task)).or_default();
        match end.blame() {
            Blame::Job => task.failed += 1,
            Blame::Node => task.lost += 1,
            Blame::Operator => task.drained += 1,
            Blame::Nobody | Blame::Requested => {}
        }
        if record.started.is_some() && end.takes_the_host_along() {
            task.brought_down.insert(record.node);
        }
        let ended = job.end_of(id.task).map(str::to_owned);
        if self.retried.contains(&id.job) {
            // Before this end or after it, in the same batch.
            return Ok(());
        }
        if let Some(first) = &task.end {
            return broken("FL-2", format!("task {}.{} had ended as {first}", id.job, id.task));
        }
        if *end == End::Succeeded && ended.as_deref() != Some("succeeded") {
            return broken("FL-2", format!("attempt {id} succeeded, and its task is {ended:?}"));
        }
        if *end == End::Cancelled && ended.is_none() {
            return broken("FL-2", format!("attempt {id} was cancelled, and its task goes on"));
        }
        let retries = job.spec.retries;
        let used_up = task.failed > retries.failed || task.lost > retries.lost || task.drained > retries.drained;
        let once = job.spec.delivery == Delivery::AtMostOnce;
        if ended.is_none() && (used_up || once) {
            return broken("FL-9", format!("task {}.{} goes on after {end} past its budget", id.job, id.task));
        }
        if ended.is_none() && (job.cancelled_by.is_some() || job.cancelled_tasks.contains(&id.task)) {
            return broken("FL-1", format!("task {}.{} goes on after {end}, and was cancelled", id.job, id.task));
        }
        if ended.is_none() && task.brought_down.len() >= limits::POISON_NODES && !job.held.contains(&id.task) {
            let count = task.brought_down.len();
            return broken("case 17", format!("task {}.{} brought down {count} nodes and goes on", id.job, id.task));
        }
        task.end = ended;
        Ok(())
    }

    fn check_withdrawn(&mut self, fleet: &Fleet, id: AttemptId) -> Result<(), Violation> {
        if self.is_doubtful(id.job) {
            return Ok(());
        }
        let known = self.attempts.entry(id).or_default();
        known.withdrawn = true;
        let delivery = fleet.job(id.job).map(|job| job.spec.delivery);
        if known.started && delivery != Some(Delivery::AtLeastOnce) {
            return broken("FL-4", format!("attempt {id} was taken back as never started, and it was started"));
        }
        Ok(())
    }

    fn check_node(
        &mut self,
        fleet: &Fleet,
        id: NodeId,
        node: &NodeRecord,
        hosts: &[SimHost],
        now: Timestamp,
    ) -> Result<(), Violation> {
        let before = self.before.remove(&id);
        let was = before.as_ref().map(|(liveness, _)| *liveness);
        let before = before.map(|(_, duty)| duty);
        let heard = self.heard.get(&id).copied().unwrap_or_default();
        let quiet = now.since(heard.max(self.led));
        match (was, node.liveness) {
            (Some(Liveness::Live), Liveness::Silent(_)) => {
                if quiet < surely(lease::duration()) {
                    return broken("FL-12", format!("node {} counts as silent {quiet} after it was heard", node.name));
                }
                self.note_silence(fleet, id, now);
                self.check_fenced(id, node, hosts, fleet)?;
            }
            (Some(Liveness::Silent(_)), Liveness::Lost(_)) => {
                if quiet < surely(limits::LOST_AFTER) {
                    return broken("FL-12", format!("node {} was given up {quiet} after it was heard", node.name));
                }
                if now < self.brake_until {
                    let rest = self.brake_until.since(now);
                    return broken("FL-12", format!("node {} was given up although the brake holds {rest}", node.name));
                }
                self.check_fenced(id, node, hosts, fleet)?;
            }
            (Some(Liveness::Live | Liveness::Joining), Liveness::Lost(_)) => {
                return broken("FL-12", format!("node {} was given up without having been silent", node.name));
            }
            _no_loss => {}
        }
        let began = |duty: &Duty| matches!(duty, Duty::Draining(_));
        if let Duty::Draining(drain) = &node.duty
            && !before.as_ref().is_some_and(began)
            && drain.order.actor.0 == "scaler"
        {
            if fleet.attempts_on(id).next().is_some() {
                return broken("FL-8", format!("scale-in takes node {}, which has work", node.name));
            }
            if now < self.brake_until {
                return broken("FL-12", format!("scale-in takes node {} although the brake holds", node.name));
            }
        }
        if let (Some(Duty::Draining(old)), Duty::Draining(new)) = (&before, &node.duty)
            && old.revision == new.revision
            && let Some(deadline) = old.order.deadline
            && new.order.deadline.is_none_or(|later| later > deadline)
        {
            return broken("F7", format!("the drain of {} was put off by a later request", node.name));
        }
        let is_proved = |duty: &Duty| matches!(duty, Duty::Drained { .. } | Duty::Stopping { .. });
        if is_proved(&node.duty) && !before.as_ref().is_some_and(is_proved) {
            self.check_proved(id, node, hosts)?;
        }
        Ok(())
    }

    /// FL-7: the host that spoke is closed on disk and holds nothing.
    fn check_proved(&self, id: NodeId, node: &NodeRecord, hosts: &[SimHost]) -> Result<(), Violation> {
        let revision = node.drain().map(|drain| drain.revision);
        for (at, host) in spokesmen(id, node, hosts) {
            if !host.sandboxes.is_empty() || self.busy.get(&at).is_some_and(|busy| !busy.is_empty()) {
                return broken("FL-7", format!("node {} counts as drained and holds work", node.name));
            }
            if host.closed_for != revision {
                return broken("FL-7", format!("node {} counts as drained and is not closed", node.name));
            }
        }
        Ok(())
    }

    /// FL-3: when a node's lease has run out here, exclusive work is dead there.
    fn check_fenced(&self, id: NodeId, node: &NodeRecord, hosts: &[SimHost], fleet: &Fleet) -> Result<(), Violation> {
        for (at, _) in spokesmen(id, node, hosts) {
            for attempt in self.busy.get(&at).into_iter().flatten() {
                let spec = fleet.job(attempt.job).map(|job| &job.spec).filter(|_| !self.is_doubtful(attempt.job));
                if spec.is_some_and(|spec| spec.delivery == Delivery::Exclusive) {
                    let state = node.state();
                    return broken("FL-3", format!("node {} is {state} and still runs {attempt}", node.name));
                }
            }
        }
        Ok(())
    }

    /// Counts for itself when much of the fleet fell silent at once.
    fn note_silence(&mut self, fleet: &Fleet, id: NodeId, now: Timestamp) {
        // By our clock, which may be slower than the leader's: only what surely counts.
        let window = surely(lease::duration());
        self.silences.push((now, id));
        self.silences.retain(|(at, _)| now.since(*at) < window);
        let is = |node: NodeId, wanted: &str| fleet.node(node).is_some_and(|row| row.liveness.name() == wanted);
        let fresh = self.silences.iter().filter(|(_, node)| is(*node, "silent")).count();
        let live = fleet.nodes().filter(|(_, node)| node.liveness == Liveness::Live).count();
        if live + fresh >= limits::BRAKE_NODES_MIN && fresh * 3 > live + fresh {
            self.brake_until = now + surely(limits::BRAKE_HOLD);
        }
    }

    /// FL-11: counted by what was asked and what providers said, not by the pool's own record.
    fn check_pools(&mut self, fleet: &Fleet, out: &Output) -> Result<(), Violation> {
        for gone in self.going.drain(..) {
            self.requested.remove(&gone);
        }
        for effect in &out.effects {
            let Effect::CreateHost { pool, host, .. } = effect else { continue };
            if !self.requested.insert((pool.clone(), *host)) {
                continue;
            }
            let count = self.requested.iter().filter(|(name, _)| name == pool).count();
            let max = fleet.pool(pool).map_or(0, |row| row.policy.max);
            if count > max as usize {
                return broken("FL-11", format!("pool {pool} has asked for {count} hosts, at most {max} may be"));
            }
        }
        Ok(())
    }

    /// A store that is behind is noticed as soon as a host tells of what is gone. Until somebody says so, nothing is
    /// placed or made, and nothing that runs is ended for being unknown.
    fn check_loss(&mut self, fleet: &Fleet, out: &Output, store: &Store) -> Result<(), Violation> {
        if fleet.meta().term.0 != store.leader.term {
            return Ok(());
        }
        self.told_of_loss |= self.telling;
        if self.accepting && fleet.meta().loss.is_none() {
            self.lost.clear();
            self.told_of_loss = false;
        }
        if fleet.meta().loss.is_none() {
            return match self.told_of_loss {
                true => broken("FL-1", "a host told of lost writes, and work is placed as if there were none".into()),
                false => Ok(()),
            };
        }
        for effect in &out.effects {
            match effect {
                Effect::Start { .. } => return broken("FL-1", "work is placed although writes are lost".into()),
                // One that was answered earlier in the batch that brought the news cannot be taken back.
                Effect::Welcome { unknown, .. } | Effect::GrantLease { unknown, .. }
                    if self.knew_of_loss && !unknown.iter().all(|id| self.is_over(*id)) =>
                {
                    return broken("FL-12", format!("{unknown:?} are to end, and the store lost what it knew"));
                }
                _other => {}
            }
        }
        Ok(())
    }

    /// Its end was stored once, or that it never began; of what was lost nobody can say.
    fn is_over(&self, id: AttemptId) -> bool {
        let known = self.attempts.get(&id);
        self.is_doubtful(id.job) || known.is_some_and(|known| known.stored.is_some() || known.withdrawn)
    }

    fn check_effect(&self, fleet: &Fleet, out: &Output, effect: &Effect, store: &Store) -> Result<(), Violation> {
        match effect {
            Effect::Start { node, attempts, .. } => {
                let Some(record) = fleet.node(*node) else {
                    return broken("FL-7", format!("work is sent to {node}, which is not known"));
                };
                if record.state() != "ready" {
                    return broken("FL-7", format!("work is sent to {}, which is {}", record.name, record.state()));
                }
                let pool = fleet.pool(&record.pool);
                let host = record.host.and_then(|host| pool.and_then(|pool| pool.hosts.get(&host)));
                if matches!(host, Some(Host::Deleting { .. })) {
                    return broken("FL-7", format!("work is sent to {}, whose host is being deleted", record.name));
                }
                for (attempt, epoch) in attempts {
                    let stored = store.attempt(*attempt);
                    if stored.is_none_or(|row| row.node != *node || row.term != epoch.term) {
                        return broken("FL-4", format!("attempt {attempt} is sent before it is stored"));
                    }
                }
                Ok(())
            }
            Effect::Stop { attempts, .. } => {
                for order in attempts {
                    // One that ended in the same batch has no row any more.
                    let Some(row) = store.attempt(order.attempt) else { continue };
                    if row.stopping.is_none_or(|(_, reason)| reason != order.reason) {
                        let (attempt, reason) = (order.attempt, order.reason);
                        return broken(
                            "FL-9",
                            format!("attempt {attempt} is to stop as {reason:?}, which is not stored"),
                        );
                    }
                }
                Ok(())
            }
            Effect::DeleteHost { pool, host, .. } => {
                let is_its = |node: &NodeRecord| node.host == Some(*host) && node.pool == *pool;
                let mut nodes = fleet.nodes().filter(|(_, node)| is_its(node));
                match nodes.find(|(id, _)| fleet.attempts_on(*id).next().is_some()) {
                    Some((_, node)) => broken("FL-7", format!("the host of {} is deleted, and has work", node.name)),
                    None => Ok(()),
                }
            }
            Effect::Acknowledge { node, attempts, .. } => {
                let is_kept = |id: &AttemptId| {
                    let ends = out.touched.attempts.get(id).is_some_and(|record| record.ended.is_some());
                    ends || out.touched.evidence.iter().any(|one| one.attempt == *id && one.node == *node)
                };
                match attempts.iter().find(|id| !is_kept(id)) {
                    Some(lost) => broken("FL-2", format!("the end of {lost} is acknowledged and not kept")),
                    None => Ok(()),
                }
            }
            Effect::CreateHost { pool, host, .. } => match store.pool(pool) {
                Some(row) if row.hosts.contains_key(host) => Ok(()),
                Some(_) | None => broken("FL-11", format!("a host of {pool} is asked for before it is stored")),
            },
            _other => Ok(()),
        }
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

/// The machines that speak as this node in its present life: never a copy that it was not told of.
fn spokesmen<'a>(
    id: NodeId,
    node: &'a NodeRecord,
    hosts: &'a [SimHost],
) -> impl Iterator<Item = (usize, &'a SimHost)> + 'a {
    hosts
        .iter()
        .enumerate()
        .filter(move |(_, host)| host.node == Some(id) && host.key == node.key)
        .filter(move |(_, host)| !host.is_gone && host.boot_id() == node.boot_id)
}

fn phase(record: &AttemptRecord) -> &'static str {
    match (record.ended.is_some(), record.stopping.is_some(), record.started.is_some()) {
        (true, _, _) => "ended",
        (false, true, _) => "stopping",
        (false, false, true) => "started",
        (false, false, false) => "placed",
    }
}

/// F7: nothing that may finish is evicted before the drain's deadline.
fn check_eviction(
    fleet: &Fleet,
    id: AttemptId,
    record: &AttemptRecord,
    spec: &JobSpec,
    time: Timestamp,
) -> Result<(), Violation> {
    let Some(Duty::Draining(drain)) = fleet.node(record.node).map(|node| &node.duty) else {
        return broken("F7", format!("attempt {id} is evicted from a node that is not draining"));
    };
    let is_overdue = drain.order.deadline.is_some_and(|deadline| deadline <= time);
    if spec.on_drain == OnDrain::Finish && !is_overdue {
        return broken("F7", format!("attempt {id} may finish, and is evicted before the deadline"));
    }
    Ok(())
}

/// FL-11: with a new request, all that were ever requested and are not confirmed gone are within the maximum.
fn check_requests(before: Option<&PoolRecord>, pool: &PoolRecord) -> Result<(), Violation> {
    let is_new = |host: &HostRequestId| before.is_none_or(|before| !before.hosts.contains_key(host));
    let requested = |(host, state): (&HostRequestId, &Host)| matches!(state, Host::Requested(_)) && is_new(host);
    let (count, max, name) = (pool.hosts.len(), pool.policy.max, &pool.policy.name);
    if count > max as usize && pool.hosts.iter().any(requested) {
        return broken("FL-11", format!("pool {name} asks for another host, and has {count} of at most {max}"));
    }
    Ok(())
}

/// Could this stored end be what the host saw?
fn is_what_happened(end: &End, over: Option<&Verdict>) -> bool {
    match over {
        None => false,
        Some(Verdict::Own(own)) => own == end || (*own == End::Succeeded && *end == End::OutputLost),
        Some(Verdict::Stopped) => {
            matches!(end, End::Cancelled | End::Drained | End::Preempted | End::SpawnerLost)
        }
        Some(Verdict::Lost) => *end == End::SpawnerLost,
        Some(Verdict::LeaseEnded) => matches!(end, End::NodeLost(_)),
        Some(Verdict::Denied(reason)) => *end == End::Refused(reason.clone()),
    }
}
