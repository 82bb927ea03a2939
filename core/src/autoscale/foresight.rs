//! What the same work would have cost who had seen it coming: the hosts that it would have filled if no task had had to
//! wait, each made one boot ahead and kept through a gap that is shorter than a boot. A little late, when the starts and
//! ends of that time are known, and in bounded memory.

use alloc::collections::VecDeque;

use super::demand::Recent;
use crate::{
    policy::WHOLE,
    time::{Millis, Timestamp},
};

/// The work of a bin counts by its mean.
const BIN: u64 = 1_000;
/// What is older than so many bins counts as it is known by then; a task that waits for longer counts as come later.
const BINS: u64 = 256;

/// Parts are thousandths of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foresight {
    /// The first bin that is open, counted from 1970; none before anything came.
    first: Option<u64>,
    open: VecDeque<Bin>,
    /// Parts that run when the first open bin begins.
    level: i64,
    recent: Recent,
    /// How long a host takes to come.
    boot: Millis,
    host_ms: u64,
}

/// What changes within a bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bin {
    /// By how much there is more at its end.
    change: i64,
    /// What that is within the bin, in parts times milliseconds.
    area: i64,
}

impl Foresight {
    /// A task that takes this part of a host has started. It came at `came`.
    pub fn started(&mut self, part: u64, came: Timestamp, now: Timestamp) {
        self.change(i64::try_from(part).unwrap_or(i64::MAX), came, now);
    }

    /// It would have ended then, had it started when it came.
    pub fn ended(&mut self, part: u64, would_have: Timestamp, now: Timestamp) {
        self.change(-i64::try_from(part).unwrap_or(i64::MAX), would_have, now);
    }

    fn change(&mut self, parts: i64, at: Timestamp, now: Timestamp) {
        self.settle(self.boot, now);
        let first = *self.first.get_or_insert(now.0 / BIN);
        let bin = (at.min(now).0 / BIN).max(first);
        let within = usize::try_from(bin - first).unwrap_or(usize::MAX);
        while self.open.len() <= within {
            self.open.push_back(Bin::default());
        }
        let Some(open) = self.open.get_mut(within) else { return };
        let left = ((bin + 1) * BIN - at.0.clamp(bin * BIN, (bin + 1) * BIN)).cast_signed();
        open.change = open.change.saturating_add(parts);
        open.area = open.area.saturating_add(parts.saturating_mul(left));
    }

    /// Counts what is old enough, with hosts that take this long to come.
    pub fn settle(&mut self, boot: Millis, now: Timestamp) {
        self.boot = boot;
        let Some(mut first) = self.first else { return };
        let until = (now.0 / BIN).saturating_sub(BINS).max(first);
        while first < until {
            let bin = self.open.pop_front();
            // Nothing changes after the last that is known: all the rest is alike.
            let next = if bin.is_some() { first + 1 } else { until };
            let Bin { change, area } = bin.unwrap_or_default();
            let parts = self.level.saturating_add(area / BIN.cast_signed()).max(0).cast_unsigned();
            let hosts = u32::try_from(parts.div_ceil(u64::from(WHOLE))).unwrap_or(u32::MAX);
            self.pay(hosts, Timestamp(first * BIN), Timestamp(next * BIN));
            self.level = self.level.saturating_add(change);
            first = next;
        }
        self.first = Some(first);
    }

    /// To keep a host for one boot time beyond its work costs what the next boot would: so of each gap the shorter is paid.
    fn pay(&mut self, hosts: u32, from: Timestamp, to: Timestamp) {
        self.recent.note(hosts, from);
        let mut at = from;
        while at < to {
            let (most, until) = self.recent.most(self.boot, at);
            let end = until.filter(|until| *until > at).unwrap_or(to).min(to);
            self.host_ms = self.host_ms.saturating_add(u64::from(most) * end.since(at).0);
            at = end;
        }
        self.recent.forget(self.boot, to);
    }

    /// Host-milliseconds until now, less what was forgotten.
    #[must_use]
    pub const fn host_ms(&self) -> u64 {
        self.host_ms
    }

    /// The sum itself, to be forgotten in part.
    pub(super) const fn sum(&mut self) -> &mut u64 {
        &mut self.host_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Millis = Millis::from_secs(60);
    /// Long enough for all to be old.
    const LATER: u64 = 100_000;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(1_000_000_000 + seconds * 1_000)
    }

    /// Host-seconds of tasks of half a host each, told when they start and end: came, started, ran.
    fn paid(tasks: &[(u64, u64, u64)]) -> u64 {
        let mut told: alloc::vec::Vec<(u64, bool, u64)> = alloc::vec::Vec::new();
        for (came, started, ran) in tasks {
            told.push((*started, true, *came));
            told.push((started + ran, false, came + ran));
        }
        told.sort_unstable();
        let mut foresight = Foresight::default();
        // It began to look long before.
        foresight.settle(BOOT, at(0));
        foresight.started(0, at(0), at(0));
        for (now, starts, when) in told {
            if starts {
                foresight.started(500, at(when), at(now));
            } else {
                foresight.ended(500, at(when), at(now));
            }
        }
        foresight.settle(BOOT, at(LATER));
        assert_eq!((foresight.level, foresight.open.len()), (0, 0));
        foresight.host_ms() / 1_000
    }

    #[test]
    fn a_host_costs_its_work_and_one_boot() {
        assert_eq!(paid(&[(100, 100, 30)]), 30 + 60);
        assert_eq!(paid(&[(100, 100, 30), (100, 100, 30)]), 30 + 60, "two halves fill one");
        assert_eq!(paid(&[(100, 100, 30), (100, 100, 30), (100, 100, 30)]), 2 * (30 + 60));
    }

    #[test]
    fn what_had_to_wait_counts_as_if_it_had_not() {
        assert_eq!(paid(&[(100, 180, 30), (100, 210, 30)]), paid(&[(100, 100, 30), (100, 100, 30)]));
        let gap = |gap: u64| paid(&[(100, 100, 30), (130 + gap, 130 + gap, 30)]);
        assert_eq!(gap(20), 30 + 20 + 30 + 60, "a short gap is bridged");
        assert_eq!(gap(2_000), 2 * (30 + 60), "and of a long one the boot is paid");
    }

    #[test]
    fn short_tasks_count_by_their_mean() {
        // Each of a quarter of a second, twenty a second: five halves at once.
        let tasks: alloc::vec::Vec<_> = (0..100).map(|second| (100 + second, 100 + second, 0)).collect();
        assert_eq!(paid(&tasks), 0, "that took no time");
        let mut foresight = Foresight::default();
        foresight.settle(BOOT, at(100));
        for moment in 0..2_000u64 {
            let came = Timestamp(at(100).0 + moment * 50);
            foresight.started(500, came, came);
            foresight.ended(500, came + Millis(250), came + Millis(250));
        }
        foresight.settle(BOOT, at(LATER));
        let seconds = foresight.host_ms() / 1_000;
        assert!((3 * 159..=3 * 162).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_long_rest_costs_no_memory_and_no_time() {
        let mut foresight = Foresight::default();
        foresight.started(1_000, at(0), at(0));
        let year = at(365 * 86_400);
        foresight.settle(BOOT, year);
        assert!(foresight.open.is_empty());
        assert!(foresight.host_ms().abs_diff(365 * 86_400_000) < 1_000_000, "{}", foresight.host_ms());
        foresight.ended(1_000, year, year);
        assert!(foresight.open.len() as u64 <= BINS + 1);
    }
}
