//! Processes as they really begin and end on hosts, and what hosts say of that.

use muster_core::{
    end::End,
    host::{StartOrder, Verdict},
    ids::AttemptId,
    resources::Resources,
    spec::Delivery,
    time::Timestamp,
};

use super::{Truth, Violation, broken};
use crate::{host::SimHost, store::Store};

impl Truth {
    /// An agent gives it to its spawner.
    pub fn handed(
        &mut self,
        attempt: AttemptId,
        order: StartOrder,
        on: &SimHost,
        store: &Store,
        now: Timestamp,
    ) -> Result<(), Violation> {
        self.attempts.entry(attempt).or_default().handed = true;
        if self.recalled.contains(&attempt) && !self.is_doubtful(attempt.job) {
            return broken("FL-9", format!("attempt {attempt} is handed over on {} after it was recalled", on.name));
        }
        self.check_place(attempt, on, store)?;
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
        let beside = others.iter().find(|other| self.busy.get(&host).is_some_and(|busy| busy.contains(*other)));
        if let Some(other) = beside {
            return broken("FL-3", format!("attempt {attempt} starts on {} beside {other} of its task", on.name));
        }
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
}
