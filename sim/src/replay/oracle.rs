//! What foresight would pay: the fewest billed host-hours of any plan that has room for every task at its arrival.
//!
//! Demand at a moment is what the tasks take that would run then if none waited, and needs
//! `ceil(max(cores / a host's cores, memory / a host's memory))` hosts. Each is ordered `boot` ahead, because the
//! oracle knows what comes, and is billed from its order until it is gone, as those of every rule are. A host that is
//! not needed for a while is kept if that costs no more than ending it and booting another: for each level of demand
//! by itself that choice is the cheapest there is, so the sum over all levels is the least that any plan pays.
//! Tasks are taken to be divisible between hosts, which real placement is not: the bound is a little too low, never
//! too high.

use std::collections::BTreeSet;

use muster_core::{resources::Resources, time::Millis};

use super::workload::Workload;

/// Hosts needed from a moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Since the trace's begin.
    pub at: Millis,
    /// Hosts that what runs then needs, if none waited.
    pub hosts: u32,
}

/// The demand of a workload in whole hosts, as a step function.
#[must_use]
pub fn demand(workload: &Workload, host: &Resources) -> Vec<Level> {
    let mut steps: Vec<(u64, i64, i64)> = Vec::with_capacity(workload.arrivals.len() * 2);
    for arrival in workload.arrivals.iter().filter(|arrival| arrival.run.0 > 0) {
        let tasks = i64::from(arrival.tasks);
        let (cpu, memory) = (i64::from(arrival.cpu_milli) * tasks, i64::from(arrival.memory_mib) * tasks);
        steps.push((arrival.at.0, cpu, memory));
        steps.push(((arrival.at + arrival.run).0, -cpu, -memory));
    }
    steps.sort_unstable_by_key(|(at, ..)| *at);
    let (mut cpu, mut memory) = (0i64, 0i64);
    let mut levels: Vec<Level> = Vec::new();
    let mut steps = steps.into_iter().peekable();
    while let Some((at, more_cpu, more_memory)) = steps.next() {
        cpu += more_cpu;
        memory += more_memory;
        if steps.peek().is_some_and(|(next, ..)| *next == at) {
            continue;
        }
        let hosts = whole_hosts(cpu, host.cpu_milli).max(whole_hosts(memory, host.memory_bytes >> 20));
        if levels.last().map_or(0, |last| last.hosts) != hosts {
            levels.push(Level { at: Millis(at), hosts });
        }
    }
    levels
}

fn whole_hosts(taken: i64, of_one: u64) -> u32 {
    let taken = u64::try_from(taken).unwrap_or(0);
    u32::try_from(taken.div_ceil(of_one.max(1))).unwrap_or(u32::MAX)
}

/// The most hosts that are ever needed at once.
#[must_use]
pub fn peak(levels: &[Level]) -> u32 {
    levels.iter().map(|level| level.hosts).max().unwrap_or(0)
}

/// The oracle's plan: when a host is ordered, and when it is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Orders and ends in no order; a time before the trace's begin is negative.
    pub hosts: Vec<(i64, i64)>,
}

/// The cheapest plan for a demand.
///
/// A host costs `boot` before it works and `stop` after it was told to end.
#[must_use]
pub fn plan(levels: &[Level], boot: Millis, stop: Millis) -> Plan {
    let renewal = boot.0 + stop.0;
    let mut plan = Plan::default();
    // Of each level: since when it is needed, and the last end of a need that may yet be bridged.
    let mut open: Vec<(u64, Option<u64>)> = Vec::new();
    let mut needed = 0usize;
    for level in levels {
        let hosts = level.hosts as usize;
        for at in needed..hosts {
            match open.get_mut(at) {
                Some((begun, ended)) => {
                    if let Some(end) = ended.take()
                        && level.at.0 - end > renewal
                    {
                        plan.hosts.push(host(*begun, end, boot, stop));
                        *begun = level.at.0;
                    }
                }
                None => open.push((level.at.0, None)),
            }
        }
        for (_, ended) in open.get_mut(hosts..needed).into_iter().flatten() {
            *ended = Some(level.at.0);
        }
        needed = hosts;
    }
    let last = levels.last().map_or(0, |level| level.at.0);
    plan.hosts.extend(open.into_iter().map(|(begun, ended)| host(begun, ended.unwrap_or(last), boot, stop)));
    plan
}

fn host(begun: u64, ended: u64, boot: Millis, stop: Millis) -> (i64, i64) {
    let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    (signed(begun) - signed(boot.0), signed(ended) + signed(stop.0))
}

impl Plan {
    /// Billed milliseconds between two moments.
    #[must_use]
    pub fn billed_ms(&self, from: Millis, to: Millis) -> u64 {
        let (from, to) = (from.0.cast_signed(), to.0.cast_signed());
        self.hosts.iter().map(|(begun, ended)| ((*ended).min(to) - (*begun).max(from)).max(0).cast_unsigned()).sum()
    }

    /// Hosts that are ordered between two moments.
    #[must_use]
    pub fn ordered(&self, from: Millis, to: Millis) -> u64 {
        let (from, to) = (from.0.cast_signed(), to.0.cast_signed());
        self.hosts.iter().filter(|(begun, _)| *begun >= from && *begun < to).count() as u64
    }

    /// Moments between two, at which hosts are ordered or ended.
    #[must_use]
    pub fn changes(&self, from: Millis, to: Millis) -> u64 {
        let (from, to) = (from.0.cast_signed(), to.0.cast_signed());
        let within = |at: &i64| *at >= from && *at < to;
        let orders: BTreeSet<i64> = self.hosts.iter().map(|(begun, _)| *begun).filter(within).collect();
        let ends: BTreeSet<i64> = self.hosts.iter().map(|(_, ended)| *ended).filter(within).collect();
        (orders.len() + ends.len()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::workload::Arrival;

    const HOST: Resources = Resources { cpu_milli: 4_000, memory_bytes: 8 << 30, disk_bytes: 0 };

    fn arrival(at: u64, run: u64, tasks: u32) -> Arrival {
        Arrival { at: Millis(at), run: Millis(run), cpu_milli: 1_000, memory_mib: 512, tasks }
    }

    #[test]
    fn demand_is_in_whole_hosts_and_changes_only_where_they_do() {
        let workload = Workload::new(vec![arrival(0, 100, 4), arrival(10, 50, 1), arrival(60, 20, 1)]);
        let levels: Vec<(u64, u32)> =
            demand(&workload, &HOST).into_iter().map(|level| (level.at.0, level.hosts)).collect();
        assert_eq!(levels, [(0, 1), (10, 2), (80, 1), (100, 0)]);
    }

    #[test]
    fn memory_may_be_what_is_scarce() {
        let large = Arrival { memory_mib: 5 << 10, ..arrival(0, 100, 3) };
        assert_eq!(peak(&demand(&Workload::new(vec![large]), &HOST)), 2);
    }

    #[test]
    fn a_gap_is_bridged_only_if_that_is_cheaper_than_another_boot() {
        let levels = [(0, 1), (100, 0), (140, 1), (200, 0), (400, 1), (500, 0)];
        let levels: Vec<Level> = levels.map(|(at, hosts)| Level { at: Millis(at), hosts }).to_vec();
        let mut hosts = plan(&levels, Millis(40), Millis(10)).hosts;
        hosts.sort_unstable();
        assert_eq!(hosts, [(-40, 210), (360, 510)]);
        let plan = plan(&levels, Millis(40), Millis(10));
        assert_eq!(plan.billed_ms(Millis(0), Millis(1_000)), 210 + 150);
        assert_eq!(plan.billed_ms(Millis(205), Millis(400)), 5 + 40);
        assert_eq!(plan.changes(Millis(0), Millis(1_000)), 3);
    }
}
