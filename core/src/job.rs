//! A job and its tasks: who waits, who is tried, how each ended.
//!
//! ```text
//! task:  waiting --place--> live(attempt n) --end--> ended(reason)
//!           ^                    |
//!           +--- delayed <-------+  a budget of the end's cause is left
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
    ids::{Actor, TaskIndex},
    limits,
    range_set::RangeSet,
    spec::{Delivery, JobSpec},
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
}

/// What a task has used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Attempts so far.
    pub attempts: u32,
    /// Retries after failures of its own.
    pub failed: u32,
    /// Retries after lost nodes.
    pub lost: u32,
    /// Retries after drains.
    pub drained: u32,
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
            finished: None,
            cancelled_by: None,
            delayed: BTreeSet::new(),
            ended: BTreeMap::new(),
            tallies: BTreeMap::new(),
            live: BTreeMap::new(),
            cancelled_tasks: BTreeSet::new(),
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
        let past = self.tallies.get(&task).map_or(0, |tally| tally.attempts);
        let number = NonZeroU32::MIN.saturating_add(past);
        self.live.insert(task, number);
        Some((task, number))
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
        self.tallies.entry(task).or_default().attempts = number.get();
        if self.is_cancelled(task) {
            self.end_task(task, &End::Cancelled);
            return Next::Ended;
        }
        self.waiting.insert(task);
        Next::Waiting
    }

    /// Records how a task's live attempt ended, and says what follows.
    pub fn end_attempt(&mut self, task: TaskIndex, end: &End, now: Timestamp) -> Next {
        let Some(number) = self.live.remove(&task) else { return Next::Ended };
        let next = self.next_after(task, end, now);
        if next != Next::Ended || *end != End::Succeeded {
            self.tallies.entry(task).or_default().attempts = number.get();
        }
        match next {
            Next::Ended => self.end_task(task, end),
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
    fn next_after(&mut self, task: TaskIndex, end: &End, now: Timestamp) -> Next {
        if self.is_cancelled(task) {
            return Next::Ended;
        }
        let retries = self.spec.retries;
        let once = self.spec.delivery == Delivery::AtMostOnce;
        let mut tally = self.tallies.get(&task).copied().unwrap_or_default();
        let (used, budget, next) = match end.blame() {
            Blame::Nobody | Blame::Requested => return Next::Ended,
            // It may have run: an at-most-once task never starts again, whatever the cause.
            _any if once => return Next::Ended,
            Blame::Job => (&mut tally.failed, retries.failed, None),
            // A refusal or a lost node says nothing against the task: it goes on at once.
            Blame::Node => (&mut tally.lost, retries.lost, Some(Next::Waiting)),
            Blame::Operator => (&mut tally.drained, retries.drained, Some(Next::Waiting)),
        };
        if *used >= budget {
            return Next::Ended;
        }
        let tries = *used;
        *used += 1;
        self.tallies.insert(task, tally);
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
                .chain(self.live.keys().copied())
                .collect(),
        };
        let (mut waiting, mut live, mut ended) = (0, Vec::new(), 0);
        for task in chosen {
            if self.live.contains_key(&task) {
                self.cancelled_tasks.insert(task);
                live.push(task);
            } else if self.waiting.remove(task) || self.remove_delayed(task) {
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

    fn remove_delayed(&mut self, task: TaskIndex) -> bool {
        let found = self.delayed.iter().find(|(_, delayed)| *delayed == task).copied();
        found.is_some_and(|entry| self.delayed.remove(&entry))
    }

    /// Failed and cancelled tasks wait again, with fresh budgets. Returns how many.
    pub fn retry(&mut self) -> u32 {
        let succeeded = self.ended.remove("succeeded");
        let again = core::mem::take(&mut self.ended);
        if let Some(succeeded) = succeeded {
            self.ended.insert(String::from("succeeded"), succeeded);
        }
        let mut count = 0;
        for task in again.values().flat_map(RangeSet::iter) {
            if let Some(tally) = self.tallies.get_mut(&task) {
                *tally = Tally { attempts: tally.attempts, ..Tally::default() };
            }
            self.waiting.insert(task);
            count += 1;
        }
        if count > 0 {
            self.finished = None;
            self.cancelled_by = None;
        }
        count
    }

    /// Nothing waits and nothing is live.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.delayed.is_empty() && self.live.is_empty()
    }
}

/// Doubles from the least to the longest wait.
fn backoff(tries: u32) -> Millis {
    let factor = 1u64.checked_shl(tries).unwrap_or(u64::MAX);
    Millis(limits::RETRY_BACKOFF_MIN.0.saturating_mul(factor).min(limits::RETRY_BACKOFF_MAX.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{resources::Resources, spec::Retries};

    const NOW: Timestamp = Timestamp(1_000_000);

    fn job(tasks: u32, retries: Retries, delivery: Delivery) -> JobRecord {
        let spec = JobSpec {
            name: "test".into(),
            owner: Actor("ana".into()),
            pool: None,
            priority: 0,
            tasks,
            request: Resources::default(),
            fences: BTreeSet::new(),
            constraints: BTreeMap::new(),
            delivery,
            on_drain: crate::spec::OnDrain::Finish,
            retries,
            time_limit: None,
            grace: limits::GRACE,
        };
        JobRecord::accepted(spec, "key".into(), [0; 32], NOW)
    }

    #[test]
    fn a_failure_of_its_own_never_uses_up_the_budget_for_lost_nodes() {
        let mut job = job(1, Retries { failed: 1, lost: 1, drained: 0 }, Delivery::AtLeastOnce);
        let lost = End::NodeLost(crate::end::NodeLoss::Silent);
        job.place_next();
        assert_eq!(job.end_attempt(0, &lost, NOW), Next::Waiting);
        job.place_next();
        assert_eq!(job.end_attempt(0, &End::Exited(1), NOW), Next::Delayed(NOW + limits::RETRY_BACKOFF_MIN));
        assert!(job.wake_delayed(NOW + limits::RETRY_BACKOFF_MIN));
        assert_eq!(job.place_next(), NonZeroU32::new(3).map(|number| (0, number)));
        assert_eq!(job.end_attempt(0, &lost, NOW), Next::Ended, "the lost budget is used up by the first loss alone");
        assert_eq!(job.end_of(0), Some("node_lost(silent)"));
    }

    #[test]
    fn at_most_once_is_never_placed_again_once_it_may_have_run() {
        let mut job = job(1, Retries { failed: 5, lost: 5, drained: 5 }, Delivery::AtMostOnce);
        job.place_next();
        assert_eq!(job.end_attempt(0, &End::SpawnerLost, NOW), Next::Ended);
    }

    #[test]
    fn at_most_once_that_provably_never_started_waits_again_under_a_new_number() {
        let mut job = job(1, Retries::default(), Delivery::AtMostOnce);
        job.place_next();
        assert_eq!(job.give_back(0), Next::Waiting);
        assert_eq!(job.place_next().map(|(_, number)| number.get()), Some(2));
    }

    #[test]
    fn a_million_tasks_cost_one_range() {
        let job = job(1_000_000, Retries::default(), Delivery::AtLeastOnce);
        assert_eq!(job.waiting.ranges().count(), 1);
        assert!(serde_json::to_string(&job).expect("serializable").len() < 1_000);
    }

    #[test]
    fn cancel_ends_waiting_tasks_at_once_and_names_the_live_ones() {
        let mut job = job(3, Retries::default(), Delivery::AtLeastOnce);
        job.place_next();
        job.cancelled_by = Some((Actor("ana".into()), "changed my mind".into()));
        assert_eq!(job.cancel(None), (2, Vec::from([0]), 0));
        assert_eq!(job.end_attempt(0, &End::Cancelled, NOW), Next::Ended);
        assert!(job.is_done());
        assert_eq!(job.end_counts(), EndCounts { succeeded: 0, failed: 0, cancelled: 3 });
    }

    #[test]
    fn retry_places_only_what_did_not_succeed() {
        let mut job = job(2, Retries::default(), Delivery::AtLeastOnce);
        job.place_next();
        job.place_next();
        job.end_attempt(0, &End::Succeeded, NOW);
        job.end_attempt(1, &End::Exited(3), NOW);
        assert_eq!(job.retry(), 1);
        assert_eq!(job.place_next().map(|(task, number)| (task, number.get())), Some((1, 2)));
    }
}
