//! The committed rows: what a crash leaves, and what every coordinator shares.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use muster_core::{
    effect::{AttemptRecord, Touched},
    fleet::{Fleet, Image, Meta},
    ids::{AttemptId, JobId, NodeId, PoolName, Term},
    job::JobRecord,
    node::NodeRecord,
    pool::PoolRecord,
    time::Timestamp,
    timeline::Seen,
};

use crate::{rng::Rng, truth::Violation};

/// Who leads, as stored: the row that every commit of a shared store checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaderRow {
    pub term: u64,
    /// Counts renewals, so that a standby sees that there was one.
    pub renewals: u64,
}

#[derive(Debug, Default)]
pub struct Store {
    pub leader: LeaderRow,
    meta: Meta,
    jobs: BTreeMap<JobId, JobRecord>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    pools: BTreeMap<PoolName, PoolRecord>,
    attempts: BTreeMap<AttemptId, AttemptRecord>,
    /// Since it was made.
    pub commits: u64,
    /// What the last commits replaced, so that they can be lost.
    undo: VecDeque<Undo>,
    /// The time of the last commit, by the clock of whoever made it.
    pub last: Timestamp,
    /// The same in true time.
    pub last_really: Timestamp,
    /// Only the reserve is left.
    pub full_until: Timestamp,
    /// Commits take their time.
    pub slow_until: Timestamp,
}

/// The rows that one commit replaced.
#[derive(Debug)]
struct Undo {
    /// Whose commit it is.
    term: u64,
    meta: Option<Meta>,
    jobs: Vec<(JobId, Option<JobRecord>)>,
    nodes: Vec<(NodeId, Option<NodeRecord>)>,
    pools: Vec<(PoolName, Option<PoolRecord>)>,
    attempts: Vec<(AttemptId, Option<AttemptRecord>)>,
    last: Timestamp,
    last_really: Timestamp,
}

/// Commits that the store may lose at once.
const UNDO_KEPT: usize = 40;

/// What went with lost commits.
#[derive(Debug, Default)]
pub struct LostWrites {
    /// Of whose leader, and their numbers.
    pub commits: BTreeSet<Seen>,
    /// Jobs with a row, or an attempt's row, that is older now or gone.
    pub jobs: BTreeSet<JobId>,
}

impl Store {
    pub fn image(&self) -> Image {
        Image {
            meta: self.meta.clone(),
            jobs: self.jobs.iter().map(|(id, job)| (*id, job.clone())).collect(),
            nodes: self.nodes.iter().map(|(id, node)| (*id, node.clone())).collect(),
            pools: self.pools.iter().map(|(name, pool)| (name.clone(), pool.clone())).collect(),
            attempts: self.attempts.iter().map(|(id, attempt)| (*id, attempt.clone())).collect(),
        }
    }

    pub fn job(&self, id: JobId) -> Option<&JobRecord> {
        self.jobs.get(&id)
    }

    pub fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        self.nodes.get(&id)
    }

    pub fn pool(&self, name: &PoolName) -> Option<&PoolRecord> {
        self.pools.get(name)
    }

    pub fn pools(&self) -> impl Iterator<Item = (&PoolName, &PoolRecord)> {
        self.pools.iter()
    }

    pub fn attempt(&self, id: AttemptId) -> Option<&AttemptRecord> {
        self.attempts.get(&id)
    }

    /// One transaction.
    pub fn commit(&mut self, fleet: &Fleet, touched: &Touched, now: Timestamp, really: Timestamp) {
        let mut undo = Undo {
            term: self.leader.term,
            meta: None,
            jobs: Vec::new(),
            nodes: Vec::new(),
            pools: Vec::new(),
            attempts: Vec::new(),
            last: self.last,
            last_really: self.last_really,
        };
        self.commits += 1;
        self.last = self.last.max(now);
        self.last_really = really;
        if touched.meta {
            undo.meta = Some(std::mem::replace(&mut self.meta, fleet.meta().clone()));
        }
        for id in &touched.jobs {
            if let Some(job) = fleet.job(*id) {
                undo.jobs.push((*id, self.jobs.insert(*id, as_stored(job))));
            }
        }
        for id in &touched.nodes {
            let before = match fleet.node(*id) {
                Some(node) => self.nodes.insert(*id, node.clone()),
                None => self.nodes.remove(id),
            };
            undo.nodes.push((*id, before));
        }
        for name in &touched.pools {
            let before = match fleet.pool(name) {
                Some(pool) => self.pools.insert(name.clone(), pool.clone()),
                None => self.pools.remove(name),
            };
            undo.pools.push((name.clone(), before));
        }
        for id in &touched.withdrawn {
            undo.attempts.push((*id, self.attempts.remove(id)));
        }
        for (id, attempt) in &touched.attempts {
            let before = match attempt.ended {
                Some(_) => self.attempts.remove(id),
                None => self.attempts.insert(*id, attempt.clone()),
            };
            undo.attempts.push((*id, before));
        }
        if self.undo.len() == UNDO_KEPT {
            self.undo.pop_front();
        }
        self.undo.push_back(undo);
    }

    /// Its last commits are gone, as after a failover to a copy that lagged. The number of the next leader's term
    /// is not: terms are taken from the clock.
    pub fn lose(&mut self, count: u64) -> LostWrites {
        let mut lost = LostWrites::default();
        for _ in 0..count {
            let Some(undo) = self.undo.pop_back() else { break };
            lost.commits.insert(Seen { term: Term(undo.term), commit: self.commits });
            lost.jobs.extend(undo.jobs.iter().map(|(id, _)| *id));
            lost.jobs.extend(undo.attempts.iter().map(|(id, _)| id.job));
            self.commits -= 1;
            (self.last, self.last_really) = (undo.last, undo.last_really);
            if let Some(meta) = undo.meta {
                self.meta = meta;
            }
            put_back(&mut self.jobs, undo.jobs);
            put_back(&mut self.nodes, undo.nodes);
            put_back(&mut self.pools, undo.pools);
            put_back(&mut self.attempts, undo.attempts);
        }
        lost
    }

    /// Some of its rows cannot be read any more; the rest is repaired, as `muster state repair` does it.
    pub fn damage(&mut self, rng: &mut Rng) -> LostWrites {
        let before = self.image();
        // Of a thousand rows: a page or two, or most of the file.
        let part = if rng.chance(700) { rng.between(2, 60) } else { rng.between(60, 900) };
        let mut image = self.image();
        image.jobs.retain(|_| !rng.chance(part));
        image.nodes.retain(|_| !rng.chance(part));
        image.pools.retain(|_| !rng.chance(part));
        image.attempts.retain(|_| !rng.chance(part));
        if rng.chance(part) {
            image.meta = Meta::default();
        }
        image.mend(self.last);
        image.mark_lost(self.last, "rows are gone".into());
        (self.meta, self.undo) = (image.meta, VecDeque::new());
        self.jobs = image.jobs.into_iter().collect();
        self.nodes = image.nodes.into_iter().collect();
        self.pools = image.pools.into_iter().collect();
        self.attempts = image.attempts.into_iter().collect();
        LostWrites { commits: BTreeSet::new(), jobs: self.changed_since(&before) }
    }

    /// Jobs with a row, or an attempt's row, that is another one now or gone.
    fn changed_since(&self, before: &Image) -> BTreeSet<JobId> {
        let jobs = before.jobs.iter().filter(|(id, job)| self.jobs.get(id) != Some(job)).map(|(id, _)| *id);
        let attempts = before.attempts.iter().filter(|(id, attempt)| self.attempts.get(id) != Some(attempt));
        jobs.chain(attempts.map(|(id, _)| id.job)).collect()
    }

    /// FL-1: what a leader holds in memory is what a crash would leave.
    pub fn check_equals(&self, fleet: &Fleet) -> Result<(), Violation> {
        let differs = |what: String| Err(Violation::new("FL-1", format!("{what} is not as it was stored")));
        if self.meta != *fleet.meta() {
            return differs("the meta row".into());
        }
        for (id, job) in fleet.jobs() {
            if self.jobs.get(id).is_none_or(|row| !is_same_job(row, job)) {
                return differs(format!("job {id}"));
            }
        }
        for (id, node) in fleet.nodes() {
            if self.nodes.get(&id).is_none_or(|row| !is_same_node(row, node)) {
                return differs(format!("node {}", node.name));
            }
            for (attempt, record) in fleet.attempts_on(id) {
                if self.attempts.get(&attempt) != Some(record) {
                    return differs(format!("attempt {attempt}"));
                }
            }
        }
        for (name, pool) in fleet.pools() {
            if self.pools.get(name) != Some(pool) {
                return differs(format!("pool {name}"));
            }
        }
        let live: usize = fleet.nodes().map(|(id, _)| fleet.attempts_on(id).count()).sum();
        if live != self.attempts.len() || fleet.nodes().count() != self.nodes.len() {
            return differs("a row that should be gone".into());
        }
        Ok(())
    }
}

/// The last that was replaced goes back first: a row may have been written twice.
fn put_back<K: Ord, V>(rows: &mut BTreeMap<K, V>, before: Vec<(K, Option<V>)>) {
    for (id, row) in before.into_iter().rev() {
        match row {
            Some(row) => rows.insert(id, row),
            None => rows.remove(&id),
        };
    }
}

/// As a stored row, a job has no live attempts of its own.
fn as_stored(job: &JobRecord) -> JobRecord {
    let mut row = job.clone();
    row.live.clear();
    row
}

fn is_same_job(row: &JobRecord, job: &JobRecord) -> bool {
    if job.live.is_empty() { row == job } else { *row == as_stored(job) }
}

/// Since when a node is idle is not stored for each task: after a restart it counts from then.
fn is_same_node(row: &NodeRecord, node: &NodeRecord) -> bool {
    let mut row = row.clone();
    row.idle_since = node.idle_since;
    row.faults = node.faults;
    row == *node
}
