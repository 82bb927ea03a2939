//! The pattern of a pool's need over day and week: a floor of what is there
//! before it is asked for, in bounded memory.

use alloc::{vec, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::time::{Millis, Timestamp};

/// Length of a bucket.
pub const BUCKET: Millis = Millis::from_secs(300);
const OF_DAY: u64 = 24 * 3_600_000 / BUCKET.0;
const OF_WEEK: u64 = 7 * OF_DAY;
/// Needs are kept in tenths of a host.
const TENTHS: u64 = 10;
/// A bucket of the week counts when it was seen so often.
const WEEKS_SEEN: u8 = 3;
/// A bucket of the day counts when it was seen so often.
const DAYS_SEEN: u8 = 4;
/// Of so many days or weeks the mean is made.
const MEMORY: u8 = 6;

/// What was needed at one time of the day or week: mean and mean deviation in tenths of a host, and how often it was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Bucket(u16, u16, u8);

impl Bucket {
    fn note(&mut self, tenths: u16) {
        let Self(mean, deviation, seen) = *self;
        let seen = seen.saturating_add(1).min(MEMORY);
        let off = tenths.abs_diff(mean);
        let step = off / u16::from(seen);
        self.0 = if tenths > mean { mean + step } else { mean - step };
        // The first deviation is from nothing.
        self.1 = if seen == 1 { 0 } else { moved(deviation, off, seen) };
        self.2 = seen;
    }

    /// What it was almost always at least.
    const fn least(self) -> u16 {
        self.0.saturating_sub(self.1.saturating_mul(2))
    }
}

fn moved(mean: u16, latest: u16, seen: u8) -> u16 {
    let part = latest.abs_diff(mean) / u16::from(seen);
    if latest > mean { mean + part } else { mean - part }
}

/// All that is kept of it: empty until a first bucket is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pattern {
    day: Vec<Bucket>,
    week: Vec<Bucket>,
}

impl Pattern {
    /// Nothing is kept.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.day.is_empty()
    }

    fn note(&mut self, bucket: u64, tenths: u16) {
        if self.is_empty() {
            self.day = vec![Bucket::default(); OF_DAY as usize];
            self.week = vec![Bucket::default(); OF_WEEK as usize];
        }
        if let Some(known) = self.day.get_mut((bucket % OF_DAY) as usize) {
            known.note(tenths);
        }
        if let Some(known) = self.week.get_mut((bucket % OF_WEEK) as usize) {
            known.note(tenths);
        }
    }

    /// Whole hosts that were almost always needed at this time of the week, or of the day while weeks are few.
    fn of_bucket(&self, bucket: u64) -> u32 {
        let week = self.week.get((bucket % OF_WEEK) as usize).filter(|known| known.2 >= WEEKS_SEEN);
        let day = || self.day.get((bucket % OF_DAY) as usize).filter(|known| known.2 >= DAYS_SEEN);
        week.or_else(day).map_or(0, |known| u32::from(known.least()) / 10)
    }

    /// Hosts that will almost surely be needed by the time that one ordered now has booted, and when that changes.
    #[must_use]
    pub fn floor(&self, boot: Millis, now: Timestamp) -> (u32, Option<Timestamp>) {
        if self.is_empty() {
            return (0, None);
        }
        let bucket = |at: u64| at / BUCKET.0;
        let lead = boot.0 + boot.0 / 2;
        let at = |start: u64| {
            let ahead = bucket(start)..=bucket(start + lead);
            ahead.map(|one| self.of_bucket(one)).max().unwrap_or(0)
        };
        let floor = at(now.0);
        // It changes where a bucket comes within reach, or is over.
        let next = bucket(now.0) + 1;
        let edges = || (next..next + OF_DAY + lead / BUCKET.0).map(|one| one * BUCKET.0);
        let differs = |start: &u64| *start > now.0 && at(*start) != floor;
        let comes = edges().filter_map(|edge| edge.checked_sub(lead)).find(differs);
        let goes = edges().find(differs);
        (floor, comes.into_iter().chain(goes).min().map(Timestamp))
    }
}

/// The bucket that is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ongoing {
    since: Option<Timestamp>,
    need: u32,
    /// Host-milliseconds of the bucket, and of how many it is made.
    host_ms: u64,
    seen_ms: u64,
}

impl Ongoing {
    /// So many hosts are needed from now on. Says whether the pattern has changed.
    pub fn note(&mut self, need: u32, pattern: &mut Pattern, now: Timestamp) -> bool {
        let mut changed = false;
        if let Some(mut at) = self.since {
            // After a long rest each bucket since then was needed alike; more than a week says nothing new.
            at = at.max(Timestamp(now.0.saturating_sub(OF_WEEK * BUCKET.0)));
            while at < now {
                let end = Timestamp((at.0 / BUCKET.0 + 1) * BUCKET.0).min(now);
                self.host_ms += u64::from(self.need) * end.since(at).0;
                self.seen_ms += end.since(at).0;
                if end.0.is_multiple_of(BUCKET.0) {
                    changed |= self.close(pattern, at.0 / BUCKET.0);
                }
                at = end;
            }
        }
        self.since = Some(now);
        self.need = need;
        changed
    }

    /// A bucket of which most was seen counts.
    fn close(&mut self, pattern: &mut Pattern, bucket: u64) -> bool {
        let counts = self.seen_ms * 2 >= BUCKET.0;
        if counts {
            let tenths = self.host_ms * TENTHS / self.seen_ms.max(1);
            pattern.note(bucket, u16::try_from(tenths).unwrap_or(u16::MAX));
        }
        (self.host_ms, self.seen_ms) = (0, 0);
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Millis = Millis::from_secs(60);
    const DAY: u64 = 86_400_000;

    /// A need of eight hosts from 08:00 to 12:00 of each day, and none else.
    fn after(days: u64) -> Pattern {
        let (mut pattern, mut ongoing) = (Pattern::default(), Ongoing::default());
        for day in 0..days {
            for (hour, need) in [(0, 0), (8, 8), (12, 0)] {
                ongoing.note(need, &mut pattern, Timestamp(day * DAY + hour * 3_600_000));
            }
        }
        ongoing.note(0, &mut pattern, Timestamp(days * DAY));
        pattern
    }

    #[test]
    fn what_is_needed_each_day_is_there_before_it_is_asked_for() {
        let pattern = after(5);
        let at = |minute: u64| Timestamp(5 * DAY + minute * 60_000);
        let lead = Timestamp(at(8 * 60).0 - 90_000);
        assert_eq!(pattern.floor(BOOT, at(7 * 60 + 50)), (0, Some(lead)));
        assert_eq!(pattern.floor(BOOT, lead).0, 8);
        assert_eq!(pattern.floor(BOOT, at(7 * 60 + 59)).0, 8, "a boot time and a half ahead");
        assert_eq!(pattern.floor(BOOT, at(9 * 60)), (8, Some(at(12 * 60))));
        assert_eq!(pattern.floor(BOOT, at(12 * 60)).0, 0);
    }

    #[test]
    fn a_few_days_are_no_pattern_and_a_rest_is_remembered_as_one() {
        assert_eq!(after(3).floor(BOOT, Timestamp(3 * DAY + 9 * 3_600_000)).0, 0);
        assert_eq!(Pattern::default().floor(BOOT, Timestamp(DAY)), (0, None));
    }

    #[test]
    fn what_varies_from_day_to_day_gives_no_floor() {
        let mut pattern = Pattern::default();
        for (day, need) in [0u16, 90, 10, 80, 0, 100].into_iter().enumerate() {
            pattern.note(day as u64 * OF_DAY, need);
        }
        assert_eq!(pattern.floor(BOOT, Timestamp(6 * DAY)).0, 0);
    }
}
