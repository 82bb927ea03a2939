//! What goes wrong, and how.

use muster_core::{
    event::{Held, HeldPhase},
    host::StartOrder,
    ids::{AttemptId, Epoch, NodeId, Term},
    spec::Delivery,
    time::{Millis, Timestamp},
};

use crate::{
    agenda::Action,
    network::{Message, Report, STRAY},
    setup::Fault,
    truth::Violation,
    world::World,
};

/// What a clock jumps by.
const HOUR_MS: i64 = 3_600_000;

impl World {
    /// A fault with its own occasions: does it occur at this one?
    pub(crate) fn occurs(&mut self, fault: Fault, permille: u64) -> bool {
        let occurs = self.setup.faults.has(fault) && !self.is_healed() && self.rng.chance(permille);
        if occurs {
            self.coverage.fault(fault);
        }
        occurs
    }

    /// The next fault of those that come at any time.
    pub(crate) fn fault(&mut self) -> Result<(), Violation> {
        if self.is_healed() || self.is_lull() {
            return Ok(());
        }
        let pause = self.setup.pause.0.max(2);
        self.after(pause / 4, pause * 7 / 4, Action::Fault);
        let total: u64 = self.setup.faults.iter().map(Fault::weight).sum();
        if total == 0 {
            return Ok(());
        }
        let mut roll = self.rng.between(0, total);
        let chosen = self.setup.faults.iter().find(|fault| {
            let weight = fault.weight();
            let found = roll < weight;
            roll = roll.saturating_sub(weight);
            found
        });
        match chosen {
            Some(fault) => self.inflict(fault),
            None => Ok(()),
        }
    }

    fn some_host(&mut self) -> usize {
        let living: Vec<usize> = (0..self.hosts.len()).filter(|host| !self.hosts[*host].is_gone).collect();
        self.rng.choose(&living).copied().unwrap_or(0)
    }

    fn for_a_while(&mut self) -> Timestamp {
        let span =
            if self.rng.chance(300) { self.rng.between(30_000, 200_000) } else { self.rng.between(1_000, 30_000) };
        self.now + Millis(span)
    }

    fn inflict(&mut self, fault: Fault) -> Result<(), Violation> {
        self.coverage.fault(fault);
        let host = self.some_host();
        let until = self.for_a_while();
        match fault {
            Fault::StreamCut => {
                if let Some(session) = self.hosts[host].session {
                    self.break_stream(session);
                }
            }
            Fault::CutUp => extend(&mut self.hosts[host].link.up_cut, until),
            Fault::CutDown => extend(&mut self.hosts[host].link.down_cut, until),
            Fault::Partition => self.cut_off(host, until),
            Fault::SwitchDies => {
                let count = usize::try_from(self.rng.between(2, self.hosts.len().max(3) as u64)).unwrap_or(2);
                for host in 0..count.min(self.hosts.len()) {
                    self.cut_off(host, until);
                }
            }
            Fault::SlowNetwork => self.hosts[host].link.slow = until,
            Fault::AgentDies => self.kill_agent(host),
            Fault::AgentPaused => extend(&mut self.hosts[host].agent_paused, until),
            Fault::SpawnerDies => self.lose_spawner(host),
            Fault::LinkCut => self.cut_link(host),
            Fault::HostForgets => return self.forget_all(host),
            Fault::BothDie => {
                self.kill_agent(host);
                self.kill_spawner(host);
            }
            Fault::Reboot => self.reboot(host),
            Fault::StopNotice => {
                let within = self.rng.chance(700).then(|| Millis(self.rng.between(1_000, 60_000)));
                self.say(host, Report::Stopping { within });
            }
            Fault::HostDiskFull => extend(&mut self.hosts[host].disk_full, until),
            Fault::HostDiskSlow => extend(&mut self.hosts[host].disk_slow, until),
            Fault::BlackHole => extend(&mut self.hosts[host].black_hole, until),
            Fault::Unkillable => extend(&mut self.hosts[host].unkillable, until),
            Fault::Cloned => self.clone_host(host, until),
            Fault::StrayReport => self.stray_report(host),
            Fault::ProviderLies => {
                if let Some((pool, host)) = self.some_machine() {
                    let event = muster_core::event::Event::HostGone { pool, host };
                    return self.provider_tells(event);
                }
            }
            Fault::MachineDies => {
                if let Some((_, request)) = self.some_machine() {
                    self.machine_dies(request);
                }
            }
            Fault::StoreLosesWrites => self.lose_writes(),
            Fault::StoreDamaged => self.damage_store(),
            Fault::CoordinatorDies
            | Fault::CoordinatorPaused
            | Fault::StoreUnreachable
            | Fault::StoreSlow
            | Fault::StoreFull
            | Fault::WallJumps => self.hit_coordinator(fault, until),
            Fault::MessageLost
            | Fault::StartRepeated
            | Fault::AgentDiesBetween
            | Fault::DiesBeforeCommit
            | Fault::DiesAfterCommit
            | Fault::DiesBetweenEffects
            | Fault::PausedAfterCommit
            | Fault::TakeoverAhead
            | Fault::CreateFails
            | Fault::LateHello
            | Fault::NeverJoins
            | Fault::BootsLate
            | Fault::CreateLies
            | Fault::OldAgent
            | Fault::DeleteFails
            | Fault::HostKept
            | Fault::ProviderSilent => {}
        }
        Ok(())
    }

    fn hit_coordinator(&mut self, fault: Fault, until: Timestamp) {
        let some = usize::try_from(self.rng.between(0, self.members.len() as u64)).unwrap_or(0);
        let member = if self.rng.chance(700) { self.serving().unwrap_or(some) } else { some };
        match fault {
            Fault::CoordinatorDies => self.kill_member(member),
            Fault::CoordinatorPaused => self.members[member].pause(until),
            Fault::StoreUnreachable => self.members[member].cut_from_store = until,
            Fault::StoreSlow => self.store.slow_until = until,
            Fault::StoreFull => self.store.full_until = until,
            // An hour, either way: durations must not notice.
            _wall => {
                let jump = if self.rng.chance(500) { HOUR_MS } else { -HOUR_MS };
                self.members[member].wall_offset += jump;
            }
        }
    }

    /// What a leader has promised of time, the next one keeps by its own clock.
    pub(crate) fn take_over_ahead(&mut self, member: usize) {
        if self.occurs(Fault::TakeoverAhead, 400) {
            self.members.iter_mut().for_each(|member| member.wall_offset += HOUR_MS);
            self.kill_member(member);
        }
    }

    /// Neither side is told: each learns it from silence.
    fn cut_off(&mut self, host: usize, until: Timestamp) {
        let link = &mut self.hosts[host].link;
        extend(&mut link.up_cut, until);
        extend(&mut link.down_cut, until);
    }

    fn lose_spawner(&mut self, host: usize) {
        let known = &self.hosts[host];
        let (agent_start, spawner) = (known.agent_start, known.spawner);
        self.kill_spawner(host);
        self.at(self.now, Action::SpawnerGone { host, agent_start, spawner });
    }

    /// What is said on it while it is broken is lost; what was said before arrives.
    fn cut_link(&mut self, host: usize) {
        let known = &self.hosts[host];
        let (agent_start, spawner) = (known.agent_start, known.spawner);
        self.at(self.now, Action::SpawnerGone { host, agent_start, spawner });
    }

    /// As an agent that has a bug: its processes are gone, and the stream goes on as if there had been none. Played
    /// only while all that it holds runs and is known to: what it never told of would count as never started. Nor while
    /// an order for any of it comes a second time (no stream does that): who knows nothing of the first would take it.
    fn forget_all(&mut self, host: usize) -> Result<(), Violation> {
        let known = &self.hosts[host];
        let runs = |held: Held| {
            let sandbox = known.sandboxes.get(&held.attempt);
            let is_known = self.store.attempt(held.attempt).is_some_and(|row| row.started.is_some());
            is_known && held.phase == HeldPhase::Running && sandbox.is_some_and(|sandbox| sandbox.verdict.is_none())
        };
        let Some(agent) = known.agent.as_ref().filter(|agent| agent.held().all(runs)) else { return Ok(()) };
        let Some(session) = known.session.filter(|_| known.is_welcome && known.agent_paused <= self.now) else {
            return Ok(());
        };
        let is_held = |order: &StartOrder| agent.held().any(|held| held.attempt == order.attempt);
        let comes_again = |action: &Action| {
            matches!(action, Action::Down { session: stream, message: Message::Start(orders) }
                if *stream == session && orders.iter().any(is_held))
        };
        if agent.is_empty() || self.agenda.awaits(comes_again) {
            return Ok(());
        }
        self.truth.forgotten(agent.held().map(|held| held.attempt), session, known.sequence);
        self.count("host", "forgot what ran");
        self.kill_spawner(host);
        self.begin_anew(host)
    }

    fn reboot(&mut self, host: usize) {
        self.kill_agent(host);
        self.kill_spawner(host);
        let now = self.now;
        self.hosts[host].reboot(now);
    }

    pub(crate) fn brought_down(&mut self, host: usize, spawner: u64, reboots: bool) {
        if self.hosts[host].spawner != spawner || self.hosts[host].is_gone {
            return;
        }
        if reboots {
            self.reboot(host);
        } else {
            self.lose_spawner(host);
        }
    }

    fn clone_host(&mut self, host: usize, until: Timestamp) {
        let original = &self.hosts[host];
        if original.node.is_none() || original.is_clone {
            return;
        }
        self.clones += 1;
        let copy = original.clone_of(1_000_000 * self.clones, self.now);
        self.hosts.push(copy);
        let host = self.hosts.len() - 1;
        self.after(0, 5_000, Action::AgentStarts { host });
        self.at(until, Action::CloneEnds { host });
    }

    /// What a host says that lost its mind: of others' work, of older epochs, of what never ran.
    fn stray_report(&mut self, host: usize) {
        let Some(fleet) = self.serving().and_then(|member| self.members[member].fleet()) else { return };
        let live: Vec<(AttemptId, Term, NodeId)> = fleet
            .nodes()
            .flat_map(|(node, _)| fleet.attempts_on(node))
            .map(|(id, record)| (id, record.term, record.node))
            .collect();
        let Some((attempt, term, node)) = self.rng.choose(&live).copied() else { return };
        // The right epoch from the wrong host, or an older one from the right one.
        let owner = self.hosts.iter().position(|host| host.node == Some(node) && host.session.is_some());
        let host = if self.rng.chance(500) { owner.unwrap_or(host) } else { host };
        let is_own = self.hosts[host].node == Some(node);
        let delivery = self.store.job(attempt.job).map(|job| job.spec.delivery);
        if is_own && delivery != Some(Delivery::AtLeastOnce) {
            // The answer lets the host forget its own attempt: who lies of its own work may repeat it.
            return;
        }
        let term = if is_own { Term(term.0.wrapping_sub(1)) } else { term };
        let epoch = Epoch { term, attempt: attempt.number };
        self.say(host, Report::Ended(attempt, epoch, Box::new(STRAY)));
    }
}

/// What lasts already does not end earlier: what waits for its end keeps its order.
fn extend(end: &mut Timestamp, until: Timestamp) {
    *end = (*end).max(until);
}
