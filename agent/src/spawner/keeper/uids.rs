//! The uids that sandboxes may have: each of one live sandbox at a time, the longest unused first.

use std::collections::BTreeSet;

/// A range, and who has what of it.
pub struct Uids {
    first: u32,
    last: u32,
    next: u32,
    taken: BTreeSet<u32>,
}

impl Uids {
    pub const fn new(first: u32, last: u32) -> Self {
        Self { first, last, next: first, taken: BTreeSet::new() }
    }

    pub const fn count(&self) -> usize {
        (self.last - self.first) as usize + 1
    }

    /// Goes round, so that a uid that was just given back rests: what a late look at it finds is not the next one's.
    pub fn take(&mut self) -> Option<u32> {
        let uid = (self.next..=self.last).chain(self.first..self.next).find(|uid| !self.taken.contains(uid))?;
        self.taken.insert(uid);
        self.next = if uid == self.last { self.first } else { uid + 1 };
        Some(uid)
    }

    /// Of a sandbox that the former program began.
    pub fn keep(&mut self, uid: u32) {
        self.taken.insert(uid);
    }

    pub fn give_back(&mut self, uid: u32) {
        self.taken.remove(&uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_go_round_and_end() {
        let mut uids = Uids::new(5, 6);
        assert_eq!((uids.take(), uids.take(), uids.take()), (Some(5), Some(6), None));
        uids.give_back(5);
        uids.give_back(6);
        assert_eq!((uids.take(), uids.count()), (Some(5), 2));
        uids.give_back(5);
        assert_eq!(uids.take(), Some(6), "the longest unused");
    }
}
