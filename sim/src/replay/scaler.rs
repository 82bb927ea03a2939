//! Rules outside of the core at work: they order hosts by themselves, and end them by the drains that any operator may ask.

use muster_core::{
    event::{DrainOrder, DrainThen, Event},
    ids::{Actor, HostRequestId, NodeId},
    time::Timestamp,
};

use super::{
    measure::Direction,
    rules::Seen,
    world::{Machine, World},
};

impl World<'_> {
    pub(super) const fn own_host(&mut self) -> HostRequestId {
        self.next_own += 1;
        HostRequestId(self.next_own)
    }

    /// One look of a rule outside of the core.
    pub(super) fn tick(&mut self, now: Timestamp) {
        let ready = count(self.agents.values().filter(|agent| agent.asked.is_none() && !agent.closed));
        let seen = Seen { demand_permille: self.permille(&self.asked), ready };
        let since = self.trace_time(now);
        let Some(windows) = &mut self.windows else { return };
        let wanted = windows.wants(since, seen);
        let booting: Vec<HostRequestId> =
            self.machines.iter().filter(|(_, machine)| **machine == Machine::Booting).map(|(host, _)| *host).collect();
        let supply = ready + count(booting.iter());
        if wanted > supply {
            for _ in supply..wanted {
                let host = self.own_host();
                self.order(host, now);
            }
            self.meter.changed(Direction::Out, since);
        } else if wanted < supply {
            self.shrink_by(supply - wanted, &booting, now);
        }
    }

    /// The youngest that still boot go first, then those that are idle longest. Whoever has work stays.
    fn shrink_by(&mut self, hosts: u32, booting: &[HostRequestId], now: Timestamp) {
        let mut left = hosts as usize;
        for host in booting.iter().rev().take(left) {
            self.end_host(*host, now);
        }
        let cancelled = left.min(booting.len());
        left -= cancelled;
        let mut idle: Vec<(Timestamp, NodeId)> = self
            .agents
            .iter()
            .filter(|(_, agent)| agent.asked.is_none() && !agent.closed)
            .filter(|(_, agent)| agent.running.is_empty() && agent.queued.is_empty())
            .map(|(node, agent)| (agent.idle_since, *node))
            .collect();
        idle.sort_unstable();
        idle.truncate(left);
        if cancelled + idle.len() > 0 {
            self.meter.changed(Direction::In, self.trace_time(now));
        }
        for (_, node) in idle {
            let order = DrainOrder {
                deadline: None,
                then: DrainThen::Stop,
                refusable: true,
                actor: Actor("rule".into()),
                reason: String::new(),
            };
            let request = self.request();
            self.inbox.push(Event::Drain { request, node, order });
        }
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}
