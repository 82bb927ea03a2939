//! A job and its tasks: who waits, who is tried, how each ended.
//!
//! ```text
//! task:  waiting --place--> live(attempt n) --end--> ended(reason)
//!           ^                    |
//!           +--- delayed <-------+  a budget of the end's cause is left
//!           +---- held <---------+  it brought down its nodes; retry or cancel by a person
//! ```
//! An array is one record plus what differs: sets of ranges for the many that
//! wait or ended alike, and a tally only for tasks with a past.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::String,
    vec::Vec,
};
use core::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::{
    end::{Blame, End},
    ids::{Actor, NodeId, TaskIndex, Term},
    limits,
    mutation::{self, Mutation},
    range_set::RangeSet,
    spec::{Delivery, JobSpec, OnDrain},
    time::{Millis, Timestamp},
};

/// A job as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// What it asks.
    pub spec: JobSpec,
    /// The caller's idempotency key.
    pub key: String,
    /// Digest of all that was asked.
    pub digest: [u8; 32],
    /// When it was accepted.
    pub submitted: Timestamp,
    /// By which leader: no attempt of an older one is its own. 0: by an earlier version, which did not say.
    #[serde(default)]
    pub accepted_by: Term,
    /// When its last task ended.
    pub finished: Option<Timestamp>,
    /// Someone ended the whole job: nothing of it is placed again.
    pub cancelled_by: Option<(Actor, String)>,
    /// Ready to be placed.
    pub waiting: RangeSet,
    /// Will be ready then, after a failed try.
    pub delayed: BTreeSet<(Timestamp, TaskIndex)>,
    /// Ended tasks by the name of their end.
    pub ended: BTreeMap<String, RangeSet>,
    /// Tasks with a past that matters: several attempts, or used budgets.
    pub tallies: BTreeMap<TaskIndex, Tally>,
    /// Tasks with a live attempt, and its number. Restored from the attempts.
    #[serde(skip)]
    pub live: BTreeMap<TaskIndex, NonZeroU32>,
    /// Live tasks whose task was cancelled one by one: not placed again.
    #[serde(default)]
    pub cancelled_tasks: BTreeSet<TaskIndex>,
    /// Brought down their nodes: not placed again until a person says so.
    #[serde(default)]
    pub held: BTreeSet<TaskIndex>,
}

/// What a task has used up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Attempts so far.
    pub attempts: u32,
    /// Retries after failures of its own.
    pub failed: u32,
    /// Retries after lost nodes.
    pub lost: u32,
    /// Retries after drains.
    pub drained: u32,
    /// Nodes that were lost, or whose spawner was, while it ran there.
    #[serde(default)]
    pub brought_down: BTreeSet<NodeId>,
    /// How often that was, on whichever node.
    #[serde(default)]
    pub falls: u32,
    /// The last attempt of an exclusive task may run until then: its end was presumed within its lease.
    #[serde(default)]
    pub fenced_until: Option<Timestamp>,
}

/// How an attempt ended, and where.
#[derive(Clone, Copy, Debug)]
pub struct Ending<'a> {
    /// How.
    pub end: &'a End,
    /// On which node.
    pub node: NodeId,
    /// Its start was reported.
    pub had_started: bool,
    /// The end is presumed, and the node's lease may cover the attempt until then.
    pub leased_until: Option<Timestamp>,
}

/// What follows an attempt's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The task has ended.
    Ended,
    /// It is ready to be placed again.
    Waiting,
    /// It is ready to be placed again then.
    Delayed(Timestamp),
    /// It brought down several nodes, or one again and again: a person decides.
    Held,
}

/// How a job is, for people. Derived, never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobState {
    /// Nothing of it is on a node.
    Waiting,
    /// Something of it is on a node.
    Running,
    /// It was cancelled, and something of it still runs.
    Cancelling,
    /// Every task succeeded.
    Succeeded,
    /// It is over, and some task failed.
    Failed,
    /// It is over, and was cancelled as a whole.
    Cancelled,
}

impl JobState {
    /// The word that is shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Tasks by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndCounts {
    /// Exit code 0.
    pub succeeded: u32,
    /// Every other end but cancelled.
    pub failed: u32,
    /// Cancelled.
    pub cancelled: u32,
}

impl JobRecord {
    /// A job that was just accepted: all its tasks wait.
    #[must_use]
    pub fn accepted(spec: JobSpec, key: String, digest: [u8; 32], now: Timestamp) -> Self {
        Self {
            waiting: RangeSet::from_range(0..spec.tasks),
            spec,
            key,
            digest,
            submitted: now,
            accepted_by: Term(0),
            finished: None,
            cancelled_by: None,
            delayed: BTreeSet::new(),
            ended: BTreeMap::new(),
            tallies: BTreeMap::new(),
            live: BTreeMap::new(),
            cancelled_tasks: BTreeSet::new(),
            held: BTreeSet::new(),
        }
    }

    /// The job's state.
    #[must_use]
    pub fn state(&self) -> JobState {
        let counts = self.end_counts();
        match (self.finished.is_some(), self.cancelled_by.is_some()) {
            (true, true) if counts.cancelled > 0 => JobState::Cancelled,
            (true, _) if counts.failed + counts.cancelled > 0 => JobState::Failed,
            (true, _) => JobState::Succeeded,
            (false, true) => JobState::Cancelling,
            (false, false) if self.live.is_empty() => JobState::Waiting,
            (false, false) => JobState::Running,
        }
    }

    /// Tasks by how they ended.
    #[must_use]
    pub fn end_counts(&self) -> EndCounts {
        let mut counts = EndCounts::default();
        for (name, tasks) in &self.ended {
            match name.as_str() {
                "succeeded" => counts.succeeded += tasks.len(),
                "cancelled" => counts.cancelled += tasks.len(),
                _failure => counts.failed += tasks.len(),
            }
        }
        counts
    }

    /// How a task ended, if it did.
    #[must_use]
    pub fn end_of(&self, task: TaskIndex) -> Option<&str> {
        self.ended.iter().find(|(_, tasks)| tasks.contains(task)).map(|(name, _)| name.as_str())
    }

    /// Takes the first waiting task for its next attempt.
    pub fn place_next(&mut self) -> Option<(TaskIndex, NonZeroU32)> {
        let task = self.waiting.first()?;
        self.waiting.remove(task);
        let tally = self.tallies.get_mut(&task);
        let past = tally.map_or(0, |tally| {
            tally.fenced_until = None;
            tally.attempts
        });
        let number = NonZeroU32::MIN.saturating_add(past);
        self.live.insert(task, number);
        Some((task, number))
    }

    /// Numbers of attempts at this task that were given out and are over.
    #[must_use]
    pub fn numbers_used(&self, task: TaskIndex) -> u32 {
        self.tallies.get(&task).map_or(0, |tally| tally.attempts)
    }

    /// A host holds an attempt of this number, which was not given out, as far as this record goes: it is not from
    /// now on. No host's word passes by more than a few.
    pub fn pass_by(&mut self, task: TaskIndex, number: NonZeroU32) -> bool {
        let used = self.numbers_used(task).max(self.live.get(&task).map_or(0, |live| live.get()));
        let is_open = task < self.spec.tasks && self.end_of(task).is_none();
        let passes = is_open && number.get() > used && number.get() - used <= limits::NUMBERS_PASSED_MAX;
        if passes {
            self.use_up(task, number);
        }
        passes
    }

    /// Not given out again.
    fn use_up(&mut self, task: TaskIndex, number: NonZeroU32) {
        let tally = self.tallies.entry(task).or_default();
        tally.attempts = tally.attempts.max(number.get());
    }

    /// A waiting task turns out to be under way as this attempt. False: it does not wait.
    pub fn adopt(&mut self, task: TaskIndex, number: NonZeroU32) -> bool {
        let waited = self.waiting.remove(task) || self.remove_delayed(task);
        if waited {
            self.live.insert(task, number);
        }
        waited
    }

    /// The attempt never started: its task waits as before, its number is not used again.
    pub fn give_back(&mut self, task: TaskIndex) -> Next {
        let Some(number) = self.live.remove(&task) else { return Next::Ended };
        self.use_up(task, number);
        if self.is_cancelled(task) {
            self.end_task(task, &End::Cancelled);
            return Next::Ended;
        }
        self.waiting.insert(task);
        Next::Waiting
    }

    /// A task that is nowhere: it was live, and its attempt is lost with a part of the store. What may have run, and may
    /// run still, is as much as one that is presumed to be lost with its node.
    pub fn lose_attempt(&mut self, task: TaskIndex, now: Timestamp) -> Next {
        self.use_up(task, NonZeroU32::MIN.saturating_add(self.numbers_used(task)));
        if self.is_cancelled(task) {
            self.end_task(task, &End::Cancelled);
            return Next::Ended;
        }
        match self.spec.delivery {
            Delivery::AtMostOnce => {
                self.end_task(task, &End::SpawnerLost);
                Next::Ended
            }
            Delivery::AtLeastOnce => {
                self.waiting.insert(task);
                Next::Waiting
            }
            // Under a lease that nobody knows any more: the next leader sets the fence by its own clock.
            Delivery::Exclusive => {
                self.tallies.entry(task).or_default().fenced_until = Some(now);
                self.delayed.insert((now, task));
                Next::Delayed(now)
            }
        }
    }

    /// Records how a task's live attempt ended, and says what follows.
    pub fn end_attempt(&mut self, task: TaskIndex, ending: &Ending<'_>, now: Timestamp) -> Next {
        let Some(number) = self.live.remove(&task) else { return Next::Ended };
        let fence = ending.leased_until.filter(|until| self.spec.delivery == Delivery::Exclusive && *until > now);
        if let Some(until) = fence {
            self.tallies.entry(task).or_default().fenced_until = Some(until);
        }
        let next = match (self.next_after(task, ending, now), fence) {
            // Another attempt may run only when this one is provably over (FL-3).
            (Next::Waiting, Some(until)) => Next::Delayed(until),
            (Next::Delayed(at), Some(until)) => Next::Delayed(at.max(until)),
            (next, _) => next,
        };
        if next != Next::Ended || *ending.end != End::Succeeded {
            self.use_up(task, number);
        }
        match next {
            Next::Ended => self.end_task(task, ending.end),
            Next::Held => {
                self.held.insert(task);
            }
            Next::Waiting => {
                self.waiting.insert(task);
            }
            Next::Delayed(at) => {
                self.delayed.insert((at, task));
            }
        }
        next
    }

    fn is_cancelled(&self, task: TaskIndex) -> bool {
        self.cancelled_by.is_some() || self.cancelled_tasks.contains(&task)
    }

    /// Draws on the budget of the end's cause; a cause never uses up another's.
    fn next_after(&mut self, task: TaskIndex, ending: &Ending<'_>, now: Timestamp) -> Next {
        if self.is_cancelled(task) && !mutation::is_on(Mutation::CancelForgotten) {
            return Next::Ended;
        }
        let retries = self.spec.retries;
        let once = self.spec.delivery == Delivery::AtMostOnce;
        let may_save = matches!(self.spec.on_drain, OnDrain::Checkpoint { .. });
        let mut tally = self.tallies.get(&task).cloned().unwrap_or_default();
        if ending.had_started && ending.end.takes_the_host_along() {
            tally.brought_down.insert(ending.node);
            tally.falls += 1;
        }
        let falls_again = tally.falls >= limits::POISON_FALLS && !mutation::is_on(Mutation::PoisonOfOneNode);
        let is_poison =
            (tally.brought_down.len() >= limits::POISON_NODES && !mutation::is_on(Mutation::Poison)) || falls_again;
        let (used, budget, next) = match ending.end.blame() {
            Blame::Nobody | Blame::Requested => return Next::Ended,
            // It may have run: an at-most-once task never starts again, whatever the cause.
            _any if once => return Next::Ended,
            Blame::Job => (&mut tally.failed, retries.failed, None),
            // A refusal or a lost node says nothing against the task: it goes on at once.
            Blame::Node if mutation::is_on(Mutation::OneBudget) => {
                (&mut tally.failed, retries.failed, Some(Next::Waiting))
            }
            Blame::Node => (&mut tally.lost, retries.lost, Some(Next::Waiting)),
            // What it has saved is not lost, and who drains decides how often: that is no try of its.
            Blame::Operator if *ending.end == End::Drained && may_save => return Next::Waiting,
            Blame::Operator if mutation::is_on(Mutation::DrainsFromNodesBudget) => {
                (&mut tally.lost, retries.lost, Some(Next::Waiting))
            }
            Blame::Operator => (&mut tally.drained, retries.drained, Some(Next::Waiting)),
        };
        if *used + u32::from(mutation::is_on(Mutation::TriesTooFew)) >= budget {
            return Next::Ended;
        }
        let tries = *used;
        *used += 1;
        self.tallies.insert(task, tally);
        if is_poison {
            return Next::Held;
        }
        next.unwrap_or_else(|| Next::Delayed(now + backoff(tries)))
    }

    fn end_task(&mut self, task: TaskIndex, end: &End) {
        self.cancelled_tasks.remove(&task);
        self.ended.entry(end.summary()).or_default().insert(task);
    }

    /// Tasks whose wait after a failure is over wait in line again.
    pub fn wake_delayed(&mut self, now: Timestamp) -> bool {
        let mut woken = false;
        while let Some((at, task)) = self.delayed.first().copied() {
            if at > now {
                break;
            }
            self.delayed.pop_first();
            self.waiting.insert(task);
            woken = true;
        }
        woken
    }

    /// Ends waiting tasks at once. Returns (ended now, live ones to stop, ended before).
    pub fn cancel(&mut self, tasks: Option<&[TaskIndex]>) -> (u32, Vec<TaskIndex>, u32) {
        let chosen: Vec<TaskIndex> = match tasks {
            Some(tasks) => tasks.to_vec(),
            None => self
                .waiting
                .iter()
                .chain(self.delayed.iter().map(|(_, task)| *task))
                .chain(self.held.iter().copied())
                .chain(self.live.keys().copied())
                .collect(),
        };
        let (mut waiting, mut live, mut ended) = (0, Vec::new(), 0);
        for task in chosen {
            if self.live.contains_key(&task) {
                self.cancelled_tasks.insert(task);
                live.push(task);
            } else if self.waiting.remove(task) || self.cancel_delayed(task) || self.held.remove(&task) {
                self.end_task(task, &End::Cancelled);
                waiting += 1;
            } else {
                ended += 1;
            }
        }
        if tasks.is_none() {
            ended = self.spec.tasks - waiting - u32::try_from(live.len()).unwrap_or(u32::MAX);
        }
        (waiting, live, ended)
    }

    fn cancel_delayed(&mut self, task: TaskIndex) -> bool {
        !mutation::is_on(Mutation::CancelMissesDelayed) && self.remove_delayed(task)
    }

    fn remove_delayed(&mut self, task: TaskIndex) -> bool {
        let found = self.delayed.iter().find(|(_, delayed)| *delayed == task).copied();
        found.is_some_and(|entry| self.delayed.remove(&entry))
    }

    /// Failed, cancelled and held tasks wait again, with fresh budgets. Returns how many.
    pub fn retry(&mut self, now: Timestamp) -> u32 {
        let succeeded = self.ended.remove("succeeded");
        let again = core::mem::take(&mut self.ended);
        if let Some(succeeded) = succeeded {
            self.ended.insert(String::from("succeeded"), succeeded);
        }
        let held = core::mem::take(&mut self.held);
        let mut count = 0;
        for task in again.values().flat_map(RangeSet::iter).chain(held) {
            let mut fence = None;
            if let Some(tally) = self.tallies.get_mut(&task) {
                fence = tally.fenced_until.filter(|until| *until > now);
                *tally = Tally { attempts: tally.attempts, fenced_until: fence, ..Tally::default() };
            }
            match fence {
                Some(until) => {
                    self.delayed.insert((until, task));
                }
                None => {
                    self.waiting.insert(task);
                }
            }
            count += 1;
        }
        if count > 0 {
            self.finished = None;
            self.cancelled_by = None;
        }
        count
    }

    /// May a retry start a task that may have run before? Never at most once (FL-4).
    #[must_use]
    pub fn may_retry(&self) -> bool {
        let may_have_run = |task| self.tallies.get(&task).is_some_and(|tally| tally.attempts > 0);
        let mut ended = self.ended.iter().filter(|(name, _)| *name != "succeeded").flat_map(|(_, tasks)| tasks.iter());
        self.spec.delivery != Delivery::AtMostOnce || !ended.any(may_have_run)
    }

    /// A new leader, whose clock may be ahead of the one that set a fence, keeps each for as long again.
    pub fn fence_again(&mut self, until: Timestamp) -> bool {
        let mut fenced = false;
        for (task, tally) in &mut self.tallies {
            if tally.fenced_until.is_some_and(|old| old < until) && !self.live.contains_key(task) {
                tally.fenced_until = Some(until);
                fenced = true;
            }
        }
        let early: Vec<_> = self
            .delayed
            .range(..(until, 0))
            .filter(|(_, task)| self.tallies.get(task).is_some_and(|tally| tally.fenced_until.is_some()))
            .copied()
            .collect();
        for entry in early {
            self.delayed.remove(&entry);
            self.delayed.insert((until, entry.1));
        }
        fenced
    }

    /// Nothing waits, is held or is live.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.delayed.is_empty() && self.held.is_empty() && self.live.is_empty()
    }
}

/// Doubles from the least to the longest wait.
fn backoff(tries: u32) -> Millis {
    let factor = 1u64.checked_shl(tries).unwrap_or(u64::MAX);
    Millis(limits::RETRY_BACKOFF_MIN.0.saturating_mul(factor).min(limits::RETRY_BACKOFF_MAX.0))
}

#[cfg(test)]
mod tests;
