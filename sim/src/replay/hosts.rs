//! The replay's hosts: a provider that makes and ends them, and agents that start what they are sent, in order and as
//! far as there is room, tell when it ends, and prove that nothing is left.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use muster_core::{
    effect::{Effect, Reply, StopOrder, StopReason},
    end::End,
    event::{DrainThen, Event, Held, HeldPhase, Hello, HostSample},
    ids::{AttemptId, Epoch, HostRequestId, NodeId, RequestId, Revision, SessionId},
    time::{Millis, Timestamp},
};

use super::world::{Action, Agent, Machine, World};

impl World<'_> {
    /// A host is billed from now on and says hello when it has booted.
    pub(super) fn order(&mut self, host: HostRequestId, now: Timestamp) {
        // Orders are idempotent by their request.
        if !self.machines.contains_key(&host) {
            let up = now + self.boot_time();
            self.order_for(host, up);
        }
    }

    /// A host that says hello then.
    pub(super) fn order_for(&mut self, host: HostRequestId, up: Timestamp) {
        self.machines.insert(host, Machine::Booting);
        self.meter.ordered();
        self.at(up, Action::HostUp(host));
    }

    fn boot_time(&mut self) -> Millis {
        let boot = self.conditions.boot.0;
        let spread = boot * self.conditions.boot_spread_permille.min(1_000) / 1_000;
        Millis(self.rng.between(boot - spread, boot + spread + 1))
    }

    pub(super) fn host_up(&mut self, host: HostRequestId) {
        // It may have been ended while it booted.
        if self.machines.get(&host) != Some(&Machine::Booting) {
            return;
        }
        let request = self.request();
        self.enrolling.insert(request, host);
        let key = key_of(host);
        let of_core = matches!(self.rule, super::rules::Rule::Policy(_)).then_some(host);
        self.inbox.push(Event::Enroll {
            request,
            name: format!("host-{}", host.0),
            pool: self.policy.name.clone(),
            host: of_core,
            key,
            shown: NodeId(0),
        });
    }

    fn enrolled(&mut self, request: RequestId, node: NodeId, now: Timestamp) {
        let Some(host) = self.enrolling.remove(&request) else { return };
        self.machines.insert(host, Machine::Up(node));
        self.next_session += 1;
        let session = SessionId(self.next_session);
        let hello = Hello {
            boot_id: host.0.to_string(),
            agent_start: 1,
            stream: 1,
            instance: String::new(),
            capacity: self.policy.host.capacity(),
            labels: self.policy.host.labels.clone(),
            fences: BTreeSet::new(),
            held: Vec::new(),
            closed_for_drain: Revision(0),
            version: String::new(),
        };
        self.agents.insert(
            node,
            Agent {
                host,
                session,
                free: self.policy.host.capacity(),
                running: BTreeMap::new(),
                queued: VecDeque::new(),
                asked: None,
                closed: false,
                idle_since: now,
            },
        );
        self.inbox.push(Event::NodeConnected { node, key: key_of(host), session, hello });
    }

    /// Ends a host. One that still boots never comes up.
    pub(super) fn end_host(&mut self, host: HostRequestId, now: Timestamp) {
        let node = match self.machines.get(&host) {
            Some(Machine::Booting) => None,
            Some(Machine::Up(node)) => Some(*node),
            Some(Machine::Ending(_)) | None => return,
        };
        self.machines.insert(host, Machine::Ending(node));
        let gone = now + self.conditions.stop;
        self.at(gone, Action::HostGone(host));
    }

    pub(super) fn host_gone(&mut self, host: HostRequestId) {
        let Some(Machine::Ending(node)) = self.machines.remove(&host) else { return };
        self.meter.gone();
        let agent = node.and_then(|node| Some((node, self.agents.remove(&node)?)));
        if let Some((node, agent)) = agent {
            for (attempt, (_, started)) in &agent.running {
                self.meter.lost(self.now.since(*started));
                self.used = self.used.minus(&self.arrival_of(attempt.job).request());
            }
            self.inbox.push(Event::NodeDisconnected { node, session: agent.session });
        }
        self.inbox.push(Event::HostGone { pool: self.policy.name.clone(), host });
        if let Some(node) = node {
            let request = self.request();
            let actor = muster_core::ids::Actor("replay".into());
            self.inbox.push(Event::RemoveNode { request, node, force: true, actor, reason: String::new() });
        }
    }

    pub(super) fn heartbeats(&mut self) {
        for (node, agent) in &self.agents {
            let running = agent.running.iter().map(|(attempt, (epoch, _))| (*attempt, *epoch, HeldPhase::Running));
            let queued = agent.queued.iter().map(|(attempt, epoch)| (*attempt, *epoch, HeldPhase::Queued));
            let held = running.chain(queued).map(|(attempt, epoch, phase)| Held { attempt, epoch, phase }).collect();
            let capacity = self.policy.host.capacity();
            let sample = HostSample {
                cpu_used_milli: Some(capacity.cpu_milli - agent.free.cpu_milli),
                memory_used_bytes: Some(capacity.memory_bytes - agent.free.memory_bytes),
                pressure_permille: None,
                ..HostSample::default()
            };
            self.inbox.push(Event::Heartbeat { node: *node, session: agent.session, sequence: 1, sample, held });
        }
    }

    pub(super) fn carry_out(&mut self, effect: Effect, now: Timestamp) {
        match effect {
            Effect::Reply { request, reply: Ok(Reply::Enrolled { node }) } => self.enrolled(request, node, now),
            Effect::Reply { reply: Err(denied), .. } => self.refused = Some(denied.to_string()),
            Effect::Start { node, attempts, .. } => self.start(node, attempts, now),
            Effect::Stop { node, attempts, .. } => self.stop(node, attempts, now),
            Effect::Recall { node, session, count } => self.recall(node, session, count),
            Effect::AskDrained { node, revision, refusable, .. } => self.ask_drained(node, revision, refusable),
            Effect::Release { node, then, .. } => self.release(node, then, now),
            Effect::Reopen { node, .. } => {
                if let Some(agent) = self.agents.get_mut(&node) {
                    (agent.closed, agent.asked) = (false, None);
                }
            }
            Effect::CreateHost { host, .. } => self.order(host, now),
            Effect::DeleteHost { host, .. } => self.end_host(host, now),
            Effect::Reply { .. }
            | Effect::Welcome { .. }
            | Effect::GrantLease { .. }
            | Effect::NoticeDrain { .. }
            | Effect::WakeHost { .. }
            | Effect::AskHost { .. }
            | Effect::Acknowledge { .. }
            | Effect::CloseSession { .. } => {}
        }
    }

    fn start(&mut self, node: NodeId, attempts: Vec<(AttemptId, Epoch)>, now: Timestamp) {
        let Some(agent) = self.agents.get_mut(&node) else { return };
        agent.queued.extend(attempts);
        self.start_what_fits(node, now);
    }

    fn start_what_fits(&mut self, node: NodeId, now: Timestamp) {
        while let Some(agent) = self.agents.get(&node)
            && let Some((attempt, epoch)) = agent.queued.front().copied()
            && self.arrival_of(attempt.job).request().fits_in(&agent.free)
        {
            let arrival = self.arrival_of(attempt.job);
            let Some(agent) = self.agents.get_mut(&node) else { return };
            agent.queued.pop_front();
            agent.free = agent.free.minus(&arrival.request());
            agent.running.insert(attempt, (epoch, now));
            self.used = self.used.plus(&arrival.request());
            let session = agent.session;
            // The wait of a task that was started twice is counted once: up to its first start.
            if attempt.number.get() == 1 {
                let wait = self.trace_time(now).0 - arrival.at.0;
                self.meter.waited(arrival.at, Millis(wait));
            }
            self.inbox.push(Event::AttemptStarted { node, session, attempt, epoch });
            self.at(now + arrival.run, Action::TaskDone { node, attempt });
        }
    }

    pub(super) fn task_done(&mut self, node: NodeId, attempt: AttemptId, now: Timestamp) {
        self.end_attempt(node, attempt, End::Succeeded, now);
    }

    fn end_attempt(&mut self, node: NodeId, attempt: AttemptId, end: End, now: Timestamp) {
        let arrival = self.arrival_of(attempt.job);
        let Some(agent) = self.agents.get_mut(&node) else { return };
        let Some((epoch, started)) = agent.running.remove(&attempt) else { return };
        agent.free = agent.free.plus(&arrival.request());
        if agent.running.is_empty() {
            agent.idle_since = now;
        }
        self.used = self.used.minus(&arrival.request());
        if end == End::Succeeded {
            self.asked = self.asked.minus(&arrival.request());
            self.unfinished -= 1;
            self.finished.insert(attempt.job);
        } else {
            self.meter.lost(now.since(started));
        }
        let session = agent.session;
        let wall = Some(now.since(started));
        self.inbox.push(Event::AttemptEnded { node, session, attempt, epoch, end, wall, detail: Vec::new() });
        self.start_what_fits(node, now);
        self.prove(node);
    }

    /// A stop ends what runs at once: the trace does not say how long a clean-up would take.
    fn stop(&mut self, node: NodeId, orders: Vec<StopOrder>, now: Timestamp) {
        for order in orders {
            let end = match order.reason {
                StopReason::Drained => End::Drained,
                StopReason::Cancelled | StopReason::Superseded => End::Cancelled,
                StopReason::Preempted => End::Preempted,
            };
            self.end_attempt(node, order.attempt, end, now);
        }
    }

    fn recall(&mut self, node: NodeId, session: SessionId, count: u32) {
        let Some(agent) = self.agents.get_mut(&node) else { return };
        let keep = agent.queued.len().saturating_sub(count as usize);
        let attempts: Vec<AttemptId> = agent.queued.split_off(keep).into_iter().map(|(attempt, _)| attempt).collect();
        if !attempts.is_empty() {
            self.inbox.push(Event::GivenBack { node, session, attempts });
        }
        self.prove(node);
    }

    fn ask_drained(&mut self, node: NodeId, revision: Revision, refusable: bool) {
        let Some(agent) = self.agents.get_mut(&node) else { return };
        if refusable && !(agent.running.is_empty() && agent.queued.is_empty()) {
            let (session, reason) = (agent.session, String::from("it holds work"));
            self.inbox.push(Event::DrainRefused { node, session, revision, reason });
            return;
        }
        agent.asked = Some(revision);
        self.prove(node);
    }

    fn prove(&mut self, node: NodeId) {
        let Some(agent) = self.agents.get_mut(&node) else { return };
        if agent.running.is_empty()
            && agent.queued.is_empty()
            && let Some(revision) = agent.asked.take()
        {
            agent.closed = true;
            let session = agent.session;
            self.inbox.push(Event::DrainProved { node, session, revision });
        }
    }

    fn release(&mut self, node: NodeId, then: DrainThen, now: Timestamp) {
        let Some(host) = self.agents.get(&node).map(|agent| agent.host) else { return };
        match then {
            DrainThen::Stop | DrainThen::Poweroff => self.end_host(host, now),
            // The provider is told by itself.
            DrainThen::Nothing | DrainThen::Delete => {}
        }
    }
}

/// Each machine makes its own.
fn key_of(host: HostRequestId) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&host.0.to_le_bytes());
    key
}
