//! What a pool remembers of its demand, in bounded memory: the most of the last
//! minutes, how fast it has risen, and its pattern over day and week.

use alloc::{collections::VecDeque, vec::Vec};

use serde::{Deserialize, Serialize};

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

    /// The most within the window, and when that may fall.
    pub fn most(&mut self, window: Millis, now: Timestamp) -> (u32, Option<Timestamp>) {
        while self.steps.len() > 1 && self.steps.front().is_some_and(|(_, until)| *until + window <= now) {
            self.steps.pop_front();
        }
        let falls = (self.steps.len() > 1).then(|| self.steps.front().map(|(_, until)| *until + window)).flatten();
        (self.steps.front().map_or(0, |(need, _)| *need), falls)
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
