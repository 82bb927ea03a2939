//! Seeded choices: SplitMix64, as its authors give it
//! (<https://prng.di.unimi.it/splitmix64.c>).

use std::{ops::Range, time::Duration};

/// A row of choices.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Those of a seed; `stream` makes several rows of one seed.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of a range that is not empty.
    pub const fn among(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in so many.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.among(0..times) == 0
    }

    /// A time of so many milliseconds.
    pub const fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.among(range))
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(from.len()).ok().filter(|count| *count > 0)?;
        from.get(usize::try_from(self.among(0..count)).ok()?)
    }
}
