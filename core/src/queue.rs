//! Who waits, and in which order: by priority, then by age.
//!
//! Jobs that placement cannot tell apart form a class. When the first of a
//! class finds no node, no other of it does, so a pass over the queue looks at
//! each class once and never at each job.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
};
use core::cmp::Reverse;

use crate::{
    ids::{JobId, PoolName},
    resources::Resources,
    spec::{Delivery, JobSpec},
};

/// All of a job that placement looks at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Class {
    /// What one attempt takes.
    pub request: Resources,
    /// Only nodes of this pool.
    pub pool: Option<PoolName>,
    /// Labels that the node must carry.
    pub constraints: BTreeMap<String, String>,
    /// Fences that the host must have.
    pub fences: BTreeSet<String>,
    /// It may be sent ahead: a start that is lost may be repeated.
    pub may_prefill: bool,
}

impl Class {
    /// The class that a job belongs to.
    #[must_use]
    pub fn of(spec: &JobSpec) -> Self {
        Self {
            request: spec.request,
            pool: spec.pool.clone(),
            constraints: spec.constraints.clone(),
            fences: spec.fences.clone(),
            may_prefill: spec.delivery == Delivery::AtLeastOnce,
        }
    }
}

/// Where a job stands in line: the least goes first.
pub type Turn = (Reverse<i32>, JobId);

/// Waiting jobs of one class.
#[derive(Clone, Debug, Default)]
struct Line {
    /// Waiting tasks of each job.
    jobs: BTreeMap<Turn, u32>,
    /// Waiting tasks of all jobs.
    tasks: u64,
    /// No node had room, and none has got more since.
    blocked: bool,
}

/// All waiting tasks.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    lines: BTreeMap<Class, Line>,
}

impl Queue {
    /// A job has this many tasks that wait; none: it leaves the line.
    pub fn set(&mut self, job: JobId, spec: &JobSpec, waiting: u32) {
        let class = Class::of(spec);
        let turn = (Reverse(spec.priority), job);
        if waiting == 0 {
            let Some(line) = self.lines.get_mut(&class) else { return };
            line.tasks -= u64::from(line.jobs.remove(&turn).unwrap_or(0));
            if line.jobs.is_empty() {
                self.lines.remove(&class);
            }
            return;
        }
        let line = self.lines.entry(class).or_default();
        let before = line.jobs.insert(turn, waiting).unwrap_or(0);
        line.tasks = line.tasks - u64::from(before) + u64::from(waiting);
    }

    /// The first job of each class, and whether the class is blocked.
    pub fn heads(&self) -> impl Iterator<Item = (Turn, &Class, bool)> + '_ {
        self.lines.iter().filter_map(|(class, line)| {
            let (turn, _) = line.jobs.first_key_value()?;
            Some((*turn, class, line.blocked))
        })
    }

    /// The first job of one class.
    #[must_use]
    pub fn head(&self, class: &Class) -> Option<Turn> {
        self.lines.get(class)?.jobs.keys().next().copied()
    }

    /// No node has room for this class.
    pub fn block(&mut self, class: &Class) {
        if let Some(line) = self.lines.get_mut(class) {
            line.blocked = true;
        }
    }

    /// A change too large to follow: every class looks at all nodes again.
    pub fn unblock_all(&mut self) {
        for line in self.lines.values_mut() {
            line.blocked = false;
        }
    }

    /// All classes with their waiting tasks.
    pub fn classes(&self) -> impl Iterator<Item = (&Class, u64)> + '_ {
        self.lines.iter().map(|(class, line)| (class, line.tasks))
    }

    /// Waiting tasks of the classes that `fits` accepts.
    pub fn tasks_where(&self, mut fits: impl FnMut(&Class) -> bool) -> u64 {
        self.lines.iter().filter(|(class, _)| fits(class)).map(|(_, line)| line.tasks).sum()
    }

    /// Jobs ahead of this one in its own class.
    #[must_use]
    pub fn ahead_of(&self, job: JobId, spec: &JobSpec) -> usize {
        let turn = (Reverse(spec.priority), job);
        self.lines.get(&Class::of(spec)).map_or(0, |line| line.jobs.range(..turn).count())
    }
}
