//! Which terms led, and from which commit on: so that a store which lost
//! its last writes is told from one that has them all.
//!
//! A store that was restored from a backup, or a data base that failed over to
//! a copy that lagged, looks whole. But hosts remember the term and the number
//! of the commit that they were last told. A host that knows a term which this
//! store does not, or a later commit of a term than the next one began at, has
//! seen what is gone. It is the check by which a Kafka replica finds where its
//! log and its leader's parted (KIP-101).

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::{ids::Term, limits};

/// The last that a host was told: what was committed is at least this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seen {
    /// The leader that said so.
    pub term: Term,
    /// Commits of the store, counted from its making; 0: none is claimed.
    pub commit: u64,
}

/// The last terms, each with the store's last commit when it began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    terms: Vec<(Term, u64)>,
    /// Nothing that is said of earlier terms counts: an operator accepted under this one that they lost something.
    /// What this leader itself said later can be lost in its turn.
    accepted: Term,
}

impl Timeline {
    /// A leader begins after this commit.
    pub fn led(&mut self, term: Term, commit: u64) {
        self.terms.push((term, commit));
        if self.terms.len() > limits::TERMS_KEPT {
            self.terms.remove(0);
        }
    }

    /// Whether that was seen of a store which this one does not go on from.
    #[must_use]
    pub fn contradicts(&self, seen: Seen) -> bool {
        if seen.term < self.accepted {
            return false;
        }
        let begun_later = match self.terms.binary_search_by_key(&seen.term, |(term, _)| *term) {
            // What the present leader said it has stored itself.
            Ok(at) => self.terms.get(at + 1),
            // Older than all that is kept.
            Err(0) => self.terms.first(),
            Err(_unknown) => return true,
        };
        begun_later.is_some_and(|(_, begin)| seen.commit > *begin)
    }

    /// An operator accepts that what was seen up to now is gone.
    pub fn accept(&mut self) {
        if let Some((term, _)) = self.terms.last() {
            self.accepted = *term;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(term: u64, commit: u64) -> Seen {
        Seen { term: Term(term), commit }
    }

    fn timeline() -> Timeline {
        let mut timeline = Timeline::default();
        timeline.led(Term(10), 0);
        timeline.led(Term(20), 100);
        timeline.led(Term(30), 250);
        timeline
    }

    #[test]
    fn what_this_store_holds_contradicts_nothing() {
        for known in [seen(10, 0), seen(10, 100), seen(20, 250), seen(20, 99), seen(30, 999_999), seen(0, 0)] {
            assert!(!timeline().contradicts(known), "{known:?}");
        }
    }

    #[test]
    fn a_later_commit_or_an_unknown_term_is_of_another_store() {
        for lost in [seen(10, 101), seen(20, 251), seen(15, 0), seen(25, 1), seen(31, 0), seen(5, 1)] {
            assert!(timeline().contradicts(lost), "{lost:?}");
        }
    }

    #[test]
    fn an_accepted_loss_is_told_no_more_and_a_second_one_is() {
        let mut timeline = timeline();
        timeline.accept();
        assert!(!timeline.contradicts(seen(25, 1)));
        assert!(timeline.contradicts(seen(31, 0)));
        // What the leader that was told so says afterwards counts: the next one may not have all of it.
        timeline.led(Term(40), 300);
        assert!(!timeline.contradicts(seen(30, 300)));
        assert!(timeline.contradicts(seen(30, 301)));
    }

    #[test]
    fn it_stays_short_and_still_judges_what_is_older() {
        let mut timeline = Timeline::default();
        for term in 1..=1_000 {
            timeline.led(Term(term), term * 10);
        }
        assert_eq!(timeline.terms.len(), limits::TERMS_KEPT);
        assert!(!timeline.contradicts(seen(3, 30)));
        assert!(timeline.contradicts(seen(3, 1_000_000)));
    }
}
