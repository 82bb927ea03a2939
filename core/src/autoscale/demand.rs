//! What a pool remembers of its demand, in bounded memory: the most of the last
//! minutes, how fast it has risen, and its pattern over day and week.

use alloc::{collections::VecDeque, vec::Vec};
use core::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::foresight::Foresight;
use crate::time::{Millis, Timestamp};

/// Until a host has booted here, it is taken to need this long.
pub const BOOT_GUESS: Millis = Millis::from_secs(60);
/// A measured boot time counts as at least this: a host that is there at once is still not free.
pub const BOOT_LEAST: Millis = Millis::from_secs(5);
/// A measured boot time counts as at most this.
pub const BOOT_MOST: Millis = Millis::from_secs(20 * 60);
/// The last boot times that are kept.
const BOOTS_KEPT: usize = 16;
/// Steps of the falling stair of recent needs that are kept.
const STEPS_KEPT: usize = 128;

/// The last boot times of a pool's hosts, from request to hello.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTimes(VecDeque<Millis>);

impl BootTimes {
    /// One more host has joined.
    pub fn note(&mut self, took: Millis) {
        if self.0.len() == BOOTS_KEPT {
            self.0.pop_front();
        }
        self.0.push_back(took);
    }

    /// As long as all but the slowest tenth took.
    #[must_use]
    pub fn usual(&self) -> Millis {
        let mut sorted: Vec<Millis> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let slow = sorted.get((sorted.len() * 9 / 10).min(sorted.len().saturating_sub(1)));
        slow.copied().unwrap_or(BOOT_GUESS).clamp(BOOT_LEAST, BOOT_MOST)
    }
}

/// The most that was needed within a window that ends now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// Falling needs, each with the time until which it lasted; the last one lasts.
    steps: VecDeque<(u32, Timestamp)>,
}

impl Recent {
    /// So many hosts are needed from now on.
    pub fn note(&mut self, need: u32, now: Timestamp) {
        if let Some((_, until)) = self.steps.back_mut() {
            *until = now;
        }
        while self.steps.back().is_some_and(|(other, _)| *other <= need) {
            self.steps.pop_back();
        }
        if self.steps.len() == STEPS_KEPT {
            // The lower of the two highest is forgotten: the answer is at most too high.
            self.steps.remove(1);
        }
        self.steps.push_back((need, now));
    }

    /// The most within a window, and when that may fall.
    #[must_use]
    pub fn most(&self, window: Millis, now: Timestamp) -> (u32, Option<Timestamp>) {
        let last = self.steps.len().saturating_sub(1);
        let at = self.steps.partition_point(|(_, until)| *until + window <= now).min(last);
        let Some((need, until)) = self.steps.get(at) else { return (0, None) };
        (*need, (at < last).then(|| *until + window))
    }

    /// Nobody will ask for what is older than this.
    pub(super) fn forget(&mut self, window: Millis, now: Timestamp) {
        while self.steps.len() > 1 && self.steps.front().is_some_and(|(_, until)| *until + window <= now) {
            self.steps.pop_front();
        }
    }
}

/// How long a need is remembered, in tenths of a boot time: one of these.
const WINDOWS: [u64; 17] = [3, 5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 160, 240, 320, 480];
const TENTHS: u64 = 10;
/// The window until costs are known.
const WINDOW_FIRST: usize = 6;
/// Costs are known when so many boot times were seen.
const BOOTS_SEEN: u64 = 20;
/// All that is paid for may cost so many hundredths of what foresight would.
const OF_FORESIGHT: u64 = 140;
/// A window may cost so many hundredths of what the cheapest would.
const OF_CHEAPEST: u64 = 200;
/// In a boot time this part of what is known of costs is forgotten: they are those of the last hours.
const FORGOTTEN: u64 = 256;

/// What it would have cost to remember needs for each of several times, and which is therefore done.
///
/// A short memory boots the same hosts again and again, and tasks wait meanwhile; a long one keeps hosts that nobody
/// needs. Which costs more depends on the work, so each is played along with, in host time: what was kept, and the boots.
/// What is really paid differs: hosts that boot for long, those that a burst's backlog asked for, a minimum.
/// That excess and what a window would cost together are to stay near what foresight would have paid: the longest
/// such window is taken, because whoever remembers longer lets fewer wait and changes less; if there is none, the cheapest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    recent: Recent,
    /// Host-milliseconds, by window.
    costs: [u64; WINDOWS.len()],
    kept: [u32; WINDOWS.len()],
    /// Host-milliseconds: of all hosts that there were, and by the windows that were in force.
    paid: u64,
    planned: u64,
    hosts: u32,
    foresight: Foresight,
    since: Option<Timestamp>,
    seen: u64,
    turned: Timestamp,
    chosen: Option<usize>,
}

impl Memory {
    /// So many hosts are needed from now on, and so many there are.
    pub fn note(&mut self, need: u32, hosts: u32, boot: Millis, now: Timestamp) {
        self.recent.note(need, now);
        self.foresight.settle(boot, now);
        let passed = self.since.map_or(0, |since| now.since(since).0);
        self.since = Some(now);
        self.seen = self.seen.saturating_add(passed);
        self.paid = self.paid.saturating_add(u64::from(self.hosts) * passed);
        self.hosts = hosts;
        let in_force = self.in_force();
        for (at, ((tenths, cost), kept)) in WINDOWS.iter().zip(&mut self.costs).zip(&mut self.kept).enumerate() {
            let (most, _) = self.recent.most(span(*tenths, boot), now);
            let boots = u64::from(most.saturating_sub(*kept)) * boot.0;
            let more = u64::from(*kept) * passed + boots;
            *cost = cost.saturating_add(more);
            if at == in_force {
                self.planned = self.planned.saturating_add(more);
            }
            *kept = most;
        }
        let longest = WINDOWS.last().copied().unwrap_or_default();
        self.recent.forget(span(longest, boot), now);
        let turns = now.since(self.turned).0 / boot.0.max(1);
        if turns > 0 {
            self.turned = now;
            self.choose(turns, boot);
        }
    }

    /// A task that takes this part of a host, in thousandths, has started; it came at `came`.
    pub fn started(&mut self, part: u64, came: Timestamp, now: Timestamp) {
        self.foresight.started(part, came, now);
    }

    /// It is over; had it started when it came, it would have been at `would_have`.
    pub fn ended(&mut self, part: u64, would_have: Timestamp, now: Timestamp) {
        self.foresight.ended(part, would_have, now);
    }

    fn in_force(&self) -> usize {
        self.chosen.unwrap_or(WINDOW_FIRST)
    }

    fn choose(&mut self, turns: u64, boot: Millis) {
        let sums = [&mut self.paid, &mut self.planned, self.foresight.sum()];
        for sum in self.costs.iter_mut().chain(sums) {
            *sum -= *sum / FORGOTTEN * turns.min(FORGOTTEN / 2);
        }
        let foresight = self.foresight.host_ms();
        let costs = self.costs.iter().enumerate();
        let Some((first, cheapest)) = costs.clone().min_by_key(|(_, cost)| **cost) else { return };
        if self.seen < boot.0 * BOOTS_SEEN || foresight == 0 {
            return;
        }
        let most = (foresight * OF_FORESIGHT / 100).saturating_add(self.planned);
        let is_cheap = |cost: u64| cost <= cheapest * OF_CHEAPEST / 100 && cost.saturating_add(self.paid) <= most;
        let best = costs.rev().find(|(_, cost)| is_cheap(**cost)).map_or(first, |(at, _)| at.max(first));
        let now = self.in_force();
        // A step at a time: what was needed is not forgotten all at once.
        self.chosen = Some(match best.cmp(&now) {
            Ordering::Greater => now + 1,
            Ordering::Equal => now,
            Ordering::Less => now - 1,
        });
    }

    /// How long a need is remembered now.
    #[must_use]
    pub fn window(&self, boot: Millis) -> Millis {
        span(WINDOWS.get(self.in_force()).copied().unwrap_or(TENTHS), boot)
    }

    /// The most that was needed within that time, and when it may fall.
    #[must_use]
    pub fn most(&self, boot: Millis, now: Timestamp) -> (u32, Option<Timestamp>) {
        self.recent.most(self.window(boot), now)
    }
}

const fn span(tenths: u64, boot: Millis) -> Millis {
    Millis(boot.0 * tenths / TENTHS)
}

/// How long a pool's tasks run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    mean_us: u64,
    ended: u64,
    /// The first of them started then.
    first: Option<Timestamp>,
}

impl Runs {
    /// Of so many tasks the mean is made.
    const KEPT: u64 = 512;
    /// Of tasks that have not ended by this time after the first start, it is known that they are no short ones.
    const LEARNED: Millis = Millis::from_secs(5);
    /// Within so many thousandths of a boot time what waits is to have run once its hosts are there. Longer saves hosts that
    /// a burst's backlog keeps for some seconds, shorter lets its last tasks wait less.
    const HORIZON: u64 = 700;

    /// A task has started.
    pub fn started(&mut self, now: Timestamp) {
        self.first.get_or_insert(now);
    }

    /// A task has run this long.
    pub fn ended(&mut self, ran: Millis) {
        self.ended = (self.ended + 1).min(Self::KEPT);
        let ran = ran.0.saturating_mul(1_000);
        let part = self.mean_us.abs_diff(ran) / self.ended;
        self.mean_us = if ran > self.mean_us { self.mean_us + part } else { self.mean_us - part };
    }

    /// Nothing is known yet.
    #[must_use]
    pub fn is_unknown(&self, now: Timestamp) -> bool {
        self.ended == 0 && self.first.is_none_or(|first| now.since(first) < Self::LEARNED)
    }

    /// So many waiting tasks need a place of their own each, when a host takes `boot` to come: those that run for about as
    /// long all of them, of shorter ones as many as run one after the other in seven tenths of that time.
    #[must_use]
    pub fn places(&self, tasks: u64, boot: Millis) -> u64 {
        let (mean, horizon) = (self.mean_us, boot.0.saturating_mul(Self::HORIZON));
        if self.ended == 0 || mean >= horizon {
            return tasks;
        }
        let places = (u128::from(tasks) * u128::from(mean)).div_ceil(u128::from(horizon));
        u64::try_from(places).unwrap_or(tasks).max(u64::from(tasks > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_of_a_window_falls_when_its_peak_has_left_it() {
        let mut recent = Recent::default();
        let window = Millis::from_secs(60);
        let at = |seconds: u64| Timestamp(seconds * 1_000);
        recent.note(3, at(0));
        recent.note(9, at(10));
        recent.note(2, at(20));
        recent.note(4, at(30));
        assert_eq!(recent.most(window, at(40)), (9, Some(at(80))));
        assert_eq!(recent.most(window, at(79)), (9, Some(at(80))));
        assert_eq!(recent.most(window, at(80)), (4, None), "it lasted until then, and 4 is the need of now");
        recent.note(1, at(100));
        assert_eq!(recent.most(window, at(159)), (4, Some(at(160))));
        assert_eq!(recent.most(window, at(160)), (1, None));
    }

    /// A task of a whole host, on for some seconds and off for others, on hosts that are there as long as they are
    /// remembered and so many more; and the window that comes of it.
    fn window_of(on: u64, off: u64, more: u32) -> Millis {
        let boot = Millis::from_secs(50);
        let mut memory = Memory::default();
        let mut now = Timestamp(1_000_000);
        let look = |memory: &mut Memory, need, now| {
            memory.note(need, need + more, boot, now);
            let (kept, _) = memory.most(boot, now);
            memory.note(need, kept + more, boot, now);
        };
        for _ in 0..400 {
            let came = now;
            memory.started(1_000, came, now);
            for (seconds, need) in [(on, 1), (off, 0)] {
                look(&mut memory, need, now);
                for _ in 0..seconds.div_ceil(5) {
                    now = now + Millis::from_secs(5);
                    look(&mut memory, need, now);
                }
                if need == 1 {
                    memory.ended(1_000, now, now);
                }
            }
        }
        memory.window(boot)
    }

    #[test]
    fn a_need_is_remembered_as_long_as_that_is_cheap() {
        let first = Memory::default().window(Millis::from_secs(50));
        assert_eq!(first, Millis::from_secs(150));
        assert!(window_of(5, 1_800, 0) < first, "nothing comes back within minutes: {}", window_of(5, 1_800, 0));
        assert!(window_of(3_600, 900, 0) > first, "it costs little beside the work: {}", window_of(3_600, 900, 0));
        let bridged = window_of(200, 100, 0);
        assert!(bridged >= Millis::from_secs(100), "a gap that is not much longer than a boot: {bridged}");
    }

    #[test]
    fn what_is_paid_beside_the_need_leaves_less_for_memory() {
        let (alone, beside) = (window_of(3_600, 900, 0), window_of(3_600, 900, 1));
        assert!(beside < alone, "{beside} and {alone}");
    }

    #[test]
    fn short_tasks_share_the_place_that_a_host_brings() {
        let boot = Millis::from_secs(50);
        let mut runs = Runs::default();
        let now = Timestamp(1_000_000);
        assert!(runs.is_unknown(now));
        runs.started(now);
        assert!(runs.is_unknown(now) && !runs.is_unknown(now + Millis::from_secs(5)));
        runs.ended(Millis::from_secs(1));
        assert_eq!((runs.places(100, boot), runs.places(1, boot), runs.places(0, boot)), (3, 1, 0));
        for _ in 0..9 {
            runs.ended(Millis::from_secs(1_000));
        }
        assert_eq!(runs.places(100, boot), 100);
    }

    #[test]
    fn boot_time_is_measured_without_the_slowest() {
        let mut boots = BootTimes::default();
        assert_eq!(boots.usual(), BOOT_GUESS);
        for _ in 0..19 {
            boots.note(Millis::from_secs(30));
        }
        boots.note(Millis::from_secs(900));
        assert_eq!(boots.usual(), Millis::from_secs(30));
        assert_eq!(boots.0.len(), BOOTS_KEPT);
    }
}
