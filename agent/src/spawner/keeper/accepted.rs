//! Which attempts were accepted: none is run again (FL-4).
//!
//! An order can only come twice before the end of its attempt is known to the
//! coordinator: after that it sends none, and the agent drops what one of its
//! older streams brings late. So what is held is never forgotten, and of what is
//! over the last few thousand are more than enough.

use std::collections::{BTreeMap, VecDeque};

use muster_core::range_set::RangeSet;
use serde::{Deserialize, Serialize};

use crate::spawner::protocol::AttemptKey;

/// Tasks that are remembered beside those that are held: some 3 MB.
const TASKS_MAX: usize = 32_768;

/// One task of one job.
type Task = (u64, u32);

/// The latest try that was accepted of each task.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Handed", into = "Handed")]
pub struct Accepted {
    latest: BTreeMap<Task, u32>,
    /// By age, the oldest first.
    order: VecDeque<Task>,
}

impl Accepted {
    /// False: this try, or a later one of its task, was accepted before. The oldest task that nothing `is_held` of
    /// may be forgotten for it.
    pub fn insert(&mut self, key: AttemptKey, is_held: impl Fn(Task) -> bool) -> bool {
        let task = (key.job, key.task);
        let latest = self.latest.entry(task).or_insert_with(|| {
            self.order.push_back(task);
            0
        });
        let is_new = key.number > *latest;
        *latest = key.number.max(*latest);
        self.forget_oldest(is_held);
        is_new
    }

    fn forget_oldest(&mut self, is_held: impl Fn(Task) -> bool) {
        // Each is looked at once: those that are held stay, and all may be.
        for _ in TASKS_MAX..self.order.len() {
            let Some(task) = self.order.pop_front() else { return };
            if is_held(task) {
                self.order.push_back(task);
            } else {
                self.latest.remove(&task);
            }
        }
    }
}

/// As one program of a spawner tells it to the next: first tries of arrays in little space.
#[derive(Serialize, Deserialize)]
struct Handed {
    first: BTreeMap<u64, RangeSet>,
    later: BTreeMap<Task, u32>,
}

impl From<Handed> for Accepted {
    fn from(handed: Handed) -> Self {
        let first = handed.first.iter().flat_map(|(job, tasks)| tasks.iter().map(|task| ((*job, task), 1)));
        let mut latest: BTreeMap<Task, u32> = first.collect();
        latest.extend(handed.later);
        // The age is not told: jobs are numbered as they come.
        let order = latest.keys().copied().collect();
        Self { latest, order }
    }
}

impl From<Accepted> for Handed {
    fn from(accepted: Accepted) -> Self {
        let (mut first, mut later) = (BTreeMap::<u64, RangeSet>::new(), BTreeMap::new());
        for ((job, task), number) in accepted.latest {
            if number == 1 {
                first.entry(job).or_default().insert(task);
            } else {
                later.insert((job, task), number);
            }
        }
        Self { first, later }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(job: u64, task: u32, number: u32) -> AttemptKey {
        AttemptKey { job, task, number, term: 1 }
    }

    const NONE_HELD: fn(Task) -> bool = |_| false;

    #[test]
    fn no_try_is_accepted_twice_nor_one_before_the_latest() {
        let mut accepted = Accepted::default();
        assert!(accepted.insert(key(1, 0, 1), NONE_HELD));
        assert!(!accepted.insert(key(1, 0, 1), NONE_HELD));
        assert!(accepted.insert(key(1, 0, 3), NONE_HELD));
        assert!(!accepted.insert(key(1, 0, 2), NONE_HELD));
        assert!(accepted.insert(key(1, 1, 2), NONE_HELD));
        assert!(!accepted.insert(key(1, 1, 1), NONE_HELD));
    }

    #[test]
    fn what_is_held_is_never_forgotten_and_what_is_over_takes_a_bounded_space() {
        let mut accepted = Accepted::default();
        let held = |(job, _): Task| job < 10;
        let many = u64::try_from(TASKS_MAX).unwrap() * 3;
        for job in 0..many {
            assert!(accepted.insert(key(job, 0, 1), held));
        }
        assert!(accepted.latest.len() <= TASKS_MAX + 10, "{}", accepted.latest.len());
        assert_eq!(accepted.latest.len(), accepted.order.len());
        for job in (0..10).chain(many - 10..many) {
            assert!(!accepted.insert(key(job, 0, 1), held), "job {job}");
        }
    }

    #[test]
    fn the_next_program_knows_what_this_one_knew() {
        let mut accepted = Accepted::default();
        for (job, task, number) in [(1, 0, 1), (1, 1, 1), (1, 2, 2), (7, 4, 1)] {
            accepted.insert(key(job, task, number), NONE_HELD);
        }
        let bytes = postcard::to_stdvec(&accepted).unwrap();
        let mut next: Accepted = postcard::from_bytes(&bytes).unwrap();
        for (job, task, number) in [(1, 0, 1), (1, 1, 1), (1, 2, 2), (7, 4, 1)] {
            assert!(!next.insert(key(job, task, number), NONE_HELD));
        }
        assert!(next.insert(key(1, 0, 2), NONE_HELD));
    }
}
