//! The spawner's side of a host: processes, their ends, and the lease timer
//! that ends exclusive work whether or not an agent is there.

use muster_core::{
    effect::StopReason,
    end::{End, Limit},
    host::{Boottime, HostEvent, StartOrder, Verdict},
    ids::AttemptId,
    time::Millis,
};

use crate::{agenda::Action, clients::ENDLESS, host::Sandbox, network::Report, truth::Violation, world::World};

/// From the lease's end to the end of all that it covered, at most: less than the coordinator's margin for it.
const FENCE_MS: u64 = 1_700;

impl World {
    pub(crate) fn spawn(
        &mut self,
        host: usize,
        spawner: u64,
        agent_start: u64,
        order: StartOrder,
    ) -> Result<(), Violation> {
        let attempt = order.attempt;
        let known = &self.hosts[host];
        // A successor has its own connection: what its predecessor sent and nobody has read yet is not read any more.
        let is_superseded = known.agent.is_some() && known.agent_start != agent_start;
        if known.spawner != spawner || is_superseded {
            return Ok(());
        }
        // Recorded before the clone: an id that may have run is never run again (FL-4).
        let is_new = self.hosts[host].accepted.insert(attempt);
        if !is_new && !muster_core::mutation::is_on(muster_core::mutation::Mutation::StartForgotten) {
            self.count("host", "refused an id that it had accepted");
            if self.hosts[host].sandboxes.contains_key(&attempt) {
                return Ok(());
            }
            // Forgotten since: a number that was given out again, because the store forgot the first time.
            let verdict = Verdict::Denied("this attempt was accepted before".into());
            let sandbox = Sandbox { order, stopping: None, verdict: Some(verdict.clone()), is_leaving: false };
            self.hosts[host].sandboxes.insert(attempt, sandbox);
            self.truth.ended(attempt, host, &verdict);
            return self.tell_agent(host, HostEvent::Ended { attempt, verdict });
        }
        let known = &self.hosts[host];
        let failure = if known.black_hole > self.now {
            Some(Verdict::Own(End::StartFailed { step: "mount.root".into(), errno: 5 }))
        } else if known.disk_full > self.now {
            Some(Verdict::Own(End::StartFailed { step: "folder".into(), errno: 28 }))
        } else if order.exclusive && known.boottime(self.now) >= known.lease {
            Some(Verdict::LeaseEnded)
        } else if self.rng.chance(4) {
            Some(Verdict::Denied("ns.user".into()))
        } else {
            None
        };
        let sandbox = Sandbox { order, stopping: None, verdict: failure.clone(), is_leaving: false };
        self.hosts[host].sandboxes.insert(attempt, sandbox);
        if let Some(verdict) = failure {
            self.truth.ended(attempt, host, &verdict);
            return self.tell_agent(host, HostEvent::Ended { attempt, verdict });
        }
        self.truth.started(attempt, host, &self.hosts[host], &self.store, self.now)?;
        self.plan_end(host, spawner, attempt);
        if order.exclusive {
            self.watch_lease(host);
        }
        self.tell_agent(host, HostEvent::Started { attempt })
    }

    fn plan_end(&mut self, host: usize, spawner: u64, attempt: AttemptId) {
        if self.jobs.poison.contains(&attempt.job) {
            self.bring_down(host);
            return;
        }
        let spec = self.store.job(attempt.job).map(|job| &job.spec);
        let limit = spec.and_then(|spec| spec.time_limit);
        if limit.is_none() && spec.is_some_and(|spec| spec.name == ENDLESS) {
            return;
        }
        let mix = self.setup.mix;
        let span = Millis(if self.rng.chance(mix.long) {
            self.rng.between(5_000, 300_000)
        } else {
            self.rng.between(1, 3_000)
        });
        let verdict = match self.rng.between(0, 40) {
            0 | 1 => Verdict::Own(End::Exited(1)),
            2 => Verdict::Own(End::Signaled(11)),
            3 => Verdict::Own(End::OutOfMemory { limit_bytes: 1 << 30, peak_bytes: 1 << 30 }),
            4 => Verdict::Own(End::Limit(Limit::Disk)),
            5 => Verdict::Own(End::Limit(Limit::Output)),
            _most => Verdict::Own(End::Succeeded),
        };
        let (span, verdict) = match limit {
            Some(limit) if limit < span => (limit, Verdict::Own(End::TimedOut)),
            Some(_) | None => (span, verdict),
        };
        self.at(self.now + span, Action::Exits { host, spawner, attempt, verdict });
    }

    /// A poisoned task: its host goes with it, in one way or another.
    fn bring_down(&mut self, host: usize) {
        self.count("host", "brought down by a task");
        let spawner = self.hosts[host].spawner;
        let reboots = self.rng.chance(500);
        self.after(10, 800, Action::BroughtDown { host, spawner, reboots });
    }

    pub(crate) fn terminate(
        &mut self,
        host: usize,
        spawner: u64,
        attempt: AttemptId,
        reason: StopReason,
        grace: Millis,
    ) -> Result<(), Violation> {
        if self.hosts[host].spawner != spawner {
            return Ok(());
        }
        let Some(sandbox) = self.hosts[host].sandboxes.get_mut(&attempt) else {
            // A stop that overtook its start in the agent: the spawner has nothing of it.
            return self.tell_agent(host, HostEvent::Ended { attempt, verdict: Verdict::Lost });
        };
        sandbox.stopping.get_or_insert(reason);
        if sandbox.verdict.is_some() {
            return Ok(());
        }
        let exclusive = sandbox.order.exclusive;
        let obeys = self.rng.chance(800);
        let patience = if obeys { self.rng.between(0, grace.0.max(1)) } else { grace.0 };
        let verdict = match self.rng.between(0, 20) {
            // It ended by itself before the signal reached it.
            0 => Verdict::Own(End::Succeeded),
            1 => Verdict::Own(End::Exited(1)),
            _most => Verdict::Stopped,
        };
        let mut wait = patience + self.rng.between(0, 30);
        if self.hosts[host].unkillable > self.now && !exclusive {
            wait += self.rng.between(20_000, 60_000);
            self.say(host, Report::Stuck(attempt));
        }
        self.at(self.now + Millis(wait), Action::Exits { host, spawner, attempt, verdict });
        Ok(())
    }

    /// The main process is over; what it left behind is killed, which may take a moment.
    pub(crate) fn exit(
        &mut self,
        host: usize,
        spawner: u64,
        attempt: AttemptId,
        verdict: Verdict,
    ) -> Result<(), Violation> {
        if self.hosts[host].spawner != spawner {
            return Ok(());
        }
        let lingers = self.rng.chance(150);
        let Some(sandbox) = self.hosts[host].sandboxes.get_mut(&attempt) else { return Ok(()) };
        if sandbox.verdict.is_some() || sandbox.is_leaving {
            return Ok(());
        }
        if lingers && !sandbox.order.exclusive {
            sandbox.is_leaving = true;
            self.after(1, 400, Action::Emptied { host, spawner, attempt, verdict });
            return Ok(());
        }
        self.empty(host, spawner, attempt, verdict)
    }

    /// Nothing of the attempt runs any more.
    pub(crate) fn empty(
        &mut self,
        host: usize,
        spawner: u64,
        attempt: AttemptId,
        verdict: Verdict,
    ) -> Result<(), Violation> {
        if self.hosts[host].spawner != spawner {
            return Ok(());
        }
        let known = self.hosts[host].sandboxes.get_mut(&attempt);
        let Some(sandbox) = known.filter(|sandbox| sandbox.verdict.is_none()) else { return Ok(()) };
        sandbox.verdict = Some(verdict.clone());
        self.truth.ended(attempt, host, &verdict);
        self.tell_agent(host, HostEvent::Ended { attempt, verdict })
    }

    pub(crate) fn renew_lease(&mut self, host: usize, deadline: Boottime) {
        if deadline > self.hosts[host].lease {
            self.hosts[host].lease = deadline;
            if self.hosts[host].sandboxes.values().any(|sandbox| sandbox.order.exclusive) {
                self.watch_lease(host);
            }
        }
    }

    pub(crate) fn watch_lease(&mut self, host: usize) {
        let when = self.hosts[host].when(self.hosts[host].lease);
        let spawner = self.hosts[host].spawner;
        self.at(when, Action::LeaseTimer { host, spawner });
    }

    pub(crate) fn check_lease(&mut self, host: usize, spawner: u64) -> Result<(), Violation> {
        let known = &self.hosts[host];
        if known.spawner != spawner || known.boottime(self.now) < known.lease {
            return Ok(());
        }
        let fenced: Vec<AttemptId> = known
            .sandboxes
            .iter()
            .filter(|(_, sandbox)| sandbox.order.exclusive && sandbox.verdict.is_none() && !sandbox.is_leaving)
            .map(|(attempt, _)| *attempt)
            .collect();
        for attempt in fenced {
            self.count("host", "fenced an exclusive attempt");
            if let Some(sandbox) = self.hosts[host].sandboxes.get_mut(&attempt) {
                sandbox.is_leaving = true;
            }
            let verdict = Verdict::LeaseEnded;
            self.after(0, FENCE_MS, Action::Emptied { host, spawner, attempt, verdict });
        }
        Ok(())
    }

    /// Its processes die with it, and all that it kept.
    pub(crate) fn kill_spawner(&mut self, host: usize) {
        let known = &mut self.hosts[host];
        known.spawner += 1;
        known.accepted.clear();
        let kept = std::mem::take(&mut known.sandboxes);
        self.truth.ended_on(host, kept.into_keys());
    }
}
