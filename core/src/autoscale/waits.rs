//! How long tasks waited for their start, of the last minute, in bounded memory.

use crate::time::{Millis, Timestamp};

const SLOT: u64 = 10_000;
const SLOTS: usize = 6;
/// Four to each doubling: the answer is at most a fifth too high.
const BUCKETS: usize = 128;

/// Counts of waits, by their length, in turns of ten seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    slots: [[u32; BUCKETS]; SLOTS],
    /// The turn that each slot counts.
    turns: [u64; SLOTS],
}

impl Default for Waits {
    fn default() -> Self {
        Self { slots: [[0; BUCKETS]; SLOTS], turns: [0; SLOTS] }
    }
}

impl Waits {
    /// One task has started after this wait.
    pub fn note(&mut self, wait: Millis, now: Timestamp) {
        let turn = now.0 / SLOT;
        let at = (turn % SLOTS as u64) as usize;
        let (Some(slot), Some(known)) = (self.slots.get_mut(at), self.turns.get_mut(at)) else { return };
        if *known != turn {
            *slot = [0; BUCKETS];
            *known = turn;
        }
        if let Some(count) = slot.get_mut(bucket(wait)) {
            *count = count.saturating_add(1);
        }
    }

    /// The 95th percentile of the last minute; none: nothing started.
    #[must_use]
    pub fn p95(&self, now: Timestamp) -> Option<Millis> {
        let turn = now.0 / SLOT;
        let fresh = || {
            let fresh = |known: &u64| *known + SLOTS as u64 > turn;
            self.slots.iter().zip(&self.turns).filter(move |(_, known)| fresh(known)).map(|(slot, _)| slot)
        };
        let total: u64 = fresh().flatten().map(|count| u64::from(*count)).sum();
        let mut above = total / 20;
        if total == 0 {
            return None;
        }
        for at in (0..BUCKETS).rev() {
            let here: u64 = fresh().filter_map(|slot| slot.get(at)).map(|count| u64::from(*count)).sum();
            if here > above {
                return Some(upper(at));
            }
            above -= here;
        }
        None
    }
}

/// Exact below four milliseconds, then four to each doubling.
fn bucket(wait: Millis) -> usize {
    if wait.0 < 4 {
        return wait.0 as usize;
    }
    let power = wait.0.ilog2();
    let quarter = (wait.0 >> (power - 2)) & 3;
    ((power as usize - 1) * 4 + quarter as usize).min(BUCKETS - 1)
}

/// The longest wait of a bucket.
fn upper(bucket: usize) -> Millis {
    if bucket < 4 {
        return Millis(bucket as u64);
    }
    let (power, quarter) = (bucket / 4 + 1, (bucket % 4) as u64);
    Millis(((4 + quarter + 1) << (power - 2)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_of_the_last_minute_and_at_most_a_fifth_too_high() {
        let mut waits = Waits::default();
        let now = Timestamp(1_000_000);
        assert_eq!(waits.p95(now), None);
        for wait in 1..=100 {
            waits.note(Millis(wait * 100), now);
        }
        let p95 = waits.p95(now).expect("starts").0;
        assert!((9_500..9_500 * 6 / 5).contains(&p95), "{p95}");
        assert_eq!(waits.p95(now + Millis::from_secs(70)), None);
    }

    #[test]
    fn a_bucket_holds_what_is_put_into_it() {
        for wait in (0..100_000).step_by(7) {
            let upper = upper(bucket(Millis(wait))).0;
            assert!(upper >= wait && upper <= wait + wait / 4, "{wait} {upper}");
        }
    }
}
