//! How many tasks come to a pool, from what ends, runs and waits: by Little's law (Operations Research 9, 1961)
//! arrivals times run time is what will run at once, and says so before the hosts are there to show it.

use alloc::collections::VecDeque;

use crate::time::{Millis, Timestamp};

/// Rates are taken over this long, and over the same time before it: what came in one of both only, an array job
/// say, is no rate.
const SPAN: Millis = Millis::from_secs(5);
/// Of so many tasks the typical run time is made.
const TASKS_KEPT: u64 = 256;
/// A task that ran for more than so many times the typical one counts as that long: one in a thousand that runs a
/// thousand times as long would make the mean leap, and is seen anyway, because it runs.
const TYPICAL_MOST: u64 = 4;
/// Looks that are kept, at one a second at most.
const LOOKS_KEPT: usize = 16;

/// What has come to a pool. Parts are thousandths of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Parts of all tasks that have ended.
    ended: u64,
    /// So many of them make the typical run time.
    counted: u64,
    typical_us: u64,
    /// Parts of all tasks that had come, at past looks.
    come: VecDeque<(Timestamp, u64)>,
}

impl Flow {
    /// A task that took this part of a host has ended after it ran for this long.
    pub fn ended(&mut self, part: u64, ran: Millis) {
        self.ended = self.ended.wrapping_add(part);
        let mut ran = ran.0.saturating_mul(1_000);
        if self.counted > TASKS_KEPT / 8 {
            ran = ran.min(self.typical_us.saturating_mul(TYPICAL_MOST).max(1_000));
        }
        self.counted = (self.counted + 1).min(TASKS_KEPT);
        let step = self.typical_us.abs_diff(ran) / self.counted;
        self.typical_us = if ran > self.typical_us { self.typical_us + step } else { self.typical_us - step };
    }

    /// By how much the running part will rise within a boot, if tasks go on to come as they did in the last seconds.
    pub fn rise(&mut self, running: u64, waiting: u64, boot: Millis, now: Timestamp) -> u64 {
        let come = self.ended.wrapping_add(running).wrapping_add(waiting);
        if self.come.len() == LOOKS_KEPT {
            self.come.pop_front();
        }
        self.come.push_back((now, come));
        while self.come.get(1).is_some_and(|(at, _)| *at + SPAN + SPAN <= now) {
            self.come.pop_front();
        }
        let Some((first, at_first)) = self.come.front().copied() else { return 0 };
        let middle = self.come.iter().rev().find(|(at, _)| *at + SPAN <= now).copied();
        let Some((middle, at_middle)) = middle.filter(|(middle, _)| *middle > first) else { return 0 };
        // Of what comes within a boot no more than that is there at its end.
        let run_us = self.typical_us.min(boot.0.saturating_mul(1_000));
        let rate = |span: Millis, parts: u64| parts.saturating_mul(run_us) / span.0.saturating_mul(1_000).max(1);
        let late = rate(now.since(middle), come.saturating_sub(at_middle));
        let early = rate(middle.since(first), at_middle.saturating_sub(at_first));
        let offered = late.min(early);
        // The longer tasks run, the less of the difference shows within a boot.
        offered.saturating_sub(running) * boot.0 / (boot.0 + run_us / 1_000).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Millis = Millis::from_secs(40);

    /// The rise at the end of some seconds in which so many parts came each.
    fn rise(seconds: &[u64], running: u64, run: Millis) -> u64 {
        let mut flow = Flow::default();
        flow.ended(0, run);
        let mut waiting = 0;
        let mut rise = 0;
        for (second, parts) in (0u64..).zip(seconds) {
            waiting += parts;
            rise = flow.rise(running, waiting, BOOT, Timestamp(1_000_000 + second * 1_000));
        }
        rise
    }

    #[test]
    fn what_goes_on_to_come_is_seen_before_it_runs() {
        let seconds = [0, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000];
        // A host's worth a second for ten seconds each: ten hosts, two of which run already.
        assert_eq!(rise(&seconds, 2_000, Millis::from_secs(10)), 8_000 * 40 / 50);
        assert_eq!(rise(&seconds, 10_000, Millis::from_secs(10)), 0);
    }

    #[test]
    fn one_large_job_is_no_rate() {
        assert_eq!(rise(&[0, 0, 0, 0, 0, 0, 0, 90_000, 0, 0, 0], 0, Millis::from_secs(60)), 0);
    }

    #[test]
    fn one_task_in_a_thousand_that_runs_for_minutes_is_not_typical() {
        let mut flow = Flow::default();
        for task in 0..2_000 {
            flow.ended(0, Millis(if task % 1_000 == 999 { 300_000 } else { 500 }));
        }
        assert!((500_000..510_000).contains(&flow.typical_us), "{}", flow.typical_us);
        for _ in 0..2_000 {
            flow.ended(0, Millis(20_000));
        }
        assert!(flow.typical_us > 19_000_000, "a lasting change is followed: {}", flow.typical_us);
    }

    #[test]
    fn tasks_longer_than_a_boot_show_in_part() {
        let seconds = [1_000; 11];
        assert_eq!(rise(&seconds, 0, Millis::from_secs(4_000)), 40_000 / 2);
    }
}
