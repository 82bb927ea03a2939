//! The simulated coordinator: the real `Fleet`, and the rows that a crash leaves.

use std::collections::BTreeMap;

use muster_core::{
    effect::{AttemptRecord, Effect, Touched},
    event::Event,
    fleet::{Fleet, Image, Meta, Output},
    ids::{AttemptId, JobId, NodeId, PoolName, Term},
    job::JobRecord,
    node::NodeRecord,
    pool::PoolRecord,
    time::Timestamp,
};

use crate::truth::Violation;

/// The committed rows.
#[derive(Debug, Default)]
struct Rows {
    meta: Meta,
    jobs: BTreeMap<JobId, JobRecord>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    pools: BTreeMap<PoolName, PoolRecord>,
    attempts: BTreeMap<AttemptId, AttemptRecord>,
}

/// When in a batch the coordinator dies, if it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Nothing of the batch is kept.
    BeforeCommit,
    /// All of it is kept, none of it was acted on.
    AfterCommit,
}

#[derive(Debug)]
pub struct Coordinator {
    rows: Rows,
    /// None while it is down.
    fleet: Option<Fleet>,
    term: u64,
}

impl Coordinator {
    pub fn new() -> Self {
        Self { rows: Rows::default(), fleet: None, term: 0 }
    }

    pub const fn fleet(&self) -> Option<&Fleet> {
        self.fleet.as_ref()
    }

    pub fn start(&mut self, now: Timestamp) -> Result<Vec<Effect>, Violation> {
        let image = Image {
            meta: self.rows.meta.clone(),
            jobs: self.rows.jobs.clone().into_iter().collect(),
            nodes: self.rows.nodes.clone().into_iter().collect(),
            pools: self.rows.pools.clone().into_iter().collect(),
            attempts: self.rows.attempts.clone().into_iter().collect(),
        };
        let fleet =
            Fleet::restore(image).map_err(|damage| Violation { promise: "FL-1", detail: damage.to_string() })?;
        self.fleet = Some(fleet);
        self.term += 1;
        Ok(self.step(vec![Event::Led { term: Term(self.term) }], now, None))
    }

    pub fn stop(&mut self) {
        self.fleet = None;
    }

    /// One batch: apply, settle, commit, and only then the effects.
    pub fn step(&mut self, events: Vec<Event>, now: Timestamp, death: Option<Death>) -> Vec<Effect> {
        let Some(fleet) = &mut self.fleet else { return Vec::new() };
        let mut out = Output::default();
        for event in events {
            fleet.apply(event, now, &mut out);
        }
        fleet.settle(now, &mut out);
        if death == Some(Death::BeforeCommit) {
            self.stop();
            return Vec::new();
        }
        self.rows.commit(fleet, &out.touched);
        if death == Some(Death::AfterCommit) {
            self.stop();
            return Vec::new();
        }
        out.effects
    }
}

impl Rows {
    fn commit(&mut self, fleet: &Fleet, touched: &Touched) {
        if touched.meta {
            self.meta = fleet.meta().clone();
        }
        for id in &touched.jobs {
            if let Some(job) = fleet.job(*id) {
                let mut row = job.clone();
                // As a stored row, it has no live attempts of its own.
                row.live.clear();
                self.jobs.insert(*id, row);
            }
        }
        for id in &touched.nodes {
            match fleet.node(*id) {
                Some(node) => self.nodes.insert(*id, node.clone()),
                None => self.nodes.remove(id),
            };
        }
        for name in &touched.pools {
            if let Some(pool) = fleet.pool(name) {
                self.pools.insert(name.clone(), pool.clone());
            }
        }
        for id in &touched.withdrawn {
            self.attempts.remove(id);
        }
        for (id, attempt) in &touched.attempts {
            if attempt.ended.is_some() {
                self.attempts.remove(id);
            } else {
                self.attempts.insert(*id, attempt.clone());
            }
        }
    }
}
