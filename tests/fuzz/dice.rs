//! One seed, one run: the only source of chance here.

use muster_sim::rng::Rng;

/// The simulator's generator, with the throws that changing bytes needs.
#[derive(Clone, Debug)]
pub struct Dice(Rng);

impl Dice {
    pub const fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    pub const fn next(&mut self) -> u64 {
        self.0.next()
    }

    /// Less than `end`; 0 if that is 0.
    pub const fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    /// True once in so many cases.
    pub const fn once_in(&mut self, cases: usize) -> bool {
        self.below(cases) == 0
    }

    /// One of the items, which are some.
    pub fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// A part of `bytes`, not longer than `most`.
    pub fn part(&mut self, bytes: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(bytes);
        let length = self.below((bytes - start).min(most) + 1);
        start..start + length
    }
}
