//! Rules that the policy under test is measured against. None of them is part of the product: each reads what a
//! coordinator could know (never the future) and says how many hosts it wants.

use std::collections::VecDeque;

use muster_core::{policy::PoolPolicy, time::Millis};

/// Who decides on the pool's size.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// The core, by this policy; pool and hosts are those of the policy under test.
    Policy(Box<PoolPolicy>),
    /// So many from the first moment on; ready at the trace's begin.
    Fixed(u32),
    /// Concurrency over windows, as Knative's pod autoscaler has it.
    Concurrency(Concurrency),
}

/// The rule of Knative's pod autoscaler (knative.dev/docs/serving/autoscaling/kpa-specific): wanted is the mean
/// demand over the stable window, divided by the part of a host that it aims to use. If the mean over the panic window
/// reaches twice what is ready, it panics for a stable window: then the panic window decides and nothing shrinks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Concurrency {
    /// The stable window.
    pub stable: Millis,
    /// The panic window.
    pub panic: Millis,
    /// Panics when the demand over the panic window is this many thousandths of what is ready.
    pub panic_permille: u64,
    /// Part of a host that it aims to use, in thousandths.
    pub target_permille: u64,
    /// Shrinks only to the most that it wanted within this time.
    pub scale_in_delay: Millis,
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
}

/// Between two looks of a rule; Knative's.
pub const TICK: Millis = Millis(2_000);

/// What a rule sees at a tick.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Thousandths of a host that running and waiting tasks take.
    pub demand_permille: u64,
    /// Hosts that take work.
    pub ready: u32,
}

/// A concurrency rule with its memory.
#[derive(Clone, Debug)]
pub struct Windows {
    rule: Concurrency,
    samples: VecDeque<(Millis, u64)>,
    stable_sum: u64,
    panics_until: Option<Millis>,
    panic_most: u32,
    wanted: VecDeque<(Millis, u32)>,
}

impl Windows {
    /// A rule that has seen nothing yet.
    #[must_use]
    pub const fn new(rule: Concurrency) -> Self {
        Self {
            rule,
            samples: VecDeque::new(),
            stable_sum: 0,
            panics_until: None,
            panic_most: 0,
            wanted: VecDeque::new(),
        }
    }

    /// How many hosts it wants now.
    pub fn wants(&mut self, now: Millis, seen: Seen) -> u32 {
        self.samples.push_back((now, seen.demand_permille));
        self.stable_sum += seen.demand_permille;
        while let Some((at, demand)) = self.samples.front().copied()
            && at + self.rule.stable <= now
        {
            self.samples.pop_front();
            self.stable_sum -= demand;
        }
        let stable = self.stable_sum / (self.samples.len() as u64).max(1);
        let recent = self.samples.iter().rev().take_while(|(at, _)| *at + self.rule.panic > now);
        let (sum, count) = recent.fold((0, 0), |(sum, count), (_, demand)| (sum + demand, count + 1));
        let panic = sum / u64::max(count, 1);
        let by_stable = self.hosts_for(stable);
        let by_panic = self.hosts_for(panic);
        if u64::from(by_panic) * 1_000 >= u64::from(seen.ready.max(1)) * self.rule.panic_permille {
            self.panics_until = Some(now + self.rule.stable);
        }
        let wanted = match self.panics_until {
            Some(until) if now < until => {
                self.panic_most = self.panic_most.max(by_panic).max(by_stable).max(seen.ready);
                self.panic_most
            }
            Some(_) | None => {
                self.panics_until = None;
                self.panic_most = 0;
                by_stable
            }
        };
        self.delayed(now, wanted).clamp(self.rule.min, self.rule.max)
    }

    fn hosts_for(&self, demand_permille: u64) -> u32 {
        u32::try_from(demand_permille.div_ceil(self.rule.target_permille.max(1))).unwrap_or(u32::MAX)
    }

    /// The most that was wanted within the delay: a queue that falls, with the greatest in front.
    fn delayed(&mut self, now: Millis, wanted: u32) -> u32 {
        while self.wanted.back().is_some_and(|(_, last)| *last <= wanted) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((now, wanted));
        while self.wanted.len() > 1 && self.wanted.front().is_some_and(|(at, _)| *at + self.rule.scale_in_delay < now) {
            self.wanted.pop_front();
        }
        self.wanted.front().map_or(wanted, |(_, most)| *most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Concurrency = Concurrency {
        stable: Millis(60_000),
        panic: Millis(6_000),
        panic_permille: 2_000,
        target_permille: 1_000,
        scale_in_delay: Millis(0),
        min: 0,
        max: 100,
    };

    fn play(rule: Concurrency, demand: impl Fn(u64) -> u64, ready: u32, ticks: u64) -> Vec<u32> {
        let mut windows = Windows::new(rule);
        let seen = |tick| Seen { demand_permille: demand(tick), ready };
        (0..ticks).map(|tick| windows.wants(Millis(tick * TICK.0), seen(tick))).collect()
    }

    #[test]
    fn it_follows_the_mean_of_its_window() {
        // 10 hosts' worth from the 30th tick on, and enough of them ready that it need not panic.
        let wanted = play(RULE, |tick| if tick < 30 { 0 } else { 10_000 }, 10, 70);
        assert_eq!((wanted[29], wanted[44], wanted[69]), (0, 5, 10));
    }

    #[test]
    fn it_panics_at_twice_what_is_ready_and_does_not_shrink_meanwhile() {
        let wanted = play(RULE, |tick| if tick == 30 { 30_000 } else { 1_000 }, 2, 70);
        assert_eq!(wanted[29], 1);
        assert_eq!(wanted[30], 11, "the mean of three ticks");
        assert_eq!(wanted[55], 11);
        assert!(wanted[69] < 3);
    }

    #[test]
    fn a_delay_keeps_the_most_that_was_wanted() {
        let rule = Concurrency { scale_in_delay: Millis(60_000), ..RULE };
        let wanted = play(rule, |tick| if tick < 40 { 5_000 } else { 0 }, 5, 110);
        assert_eq!((wanted[60], wanted[69], wanted[109]), (5, 5, 0));
    }
}
