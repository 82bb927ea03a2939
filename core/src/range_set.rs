//! A set of task indexes kept as ranges: a million waiting tasks cost one entry.

use alloc::{collections::BTreeMap, vec::Vec};
use core::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Disjoint, non-adjacent, non-empty half-open ranges, by start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ends_by_start: BTreeMap<u32, u32>,
    len: u32,
}

impl RangeSet {
    /// The set of all indexes in `range`.
    #[must_use]
    pub fn from_range(range: Range<u32>) -> Self {
        let mut set = Self::default();
        if !range.is_empty() {
            set.len = range.end - range.start;
            set.ends_by_start.insert(range.start, range.end);
        }
        set
    }

    /// How many indexes are in the set.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Nothing is in the set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Is `index` in the set?
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        self.ends_by_start.range(..=index).next_back().is_some_and(|(_, end)| index < *end)
    }

    /// Adds `index`; false if it was there.
    pub fn insert(&mut self, index: u32) -> bool {
        let before = self.ends_by_start.range(..=index).next_back().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, end)| index < end) {
            return false;
        }
        self.len += 1;
        let after_end = index.checked_add(1).and_then(|next| self.ends_by_start.remove(&next));
        let end = after_end.unwrap_or(index + 1);
        let start = match before {
            Some((start, before_end)) if before_end == index => start,
            _ => index,
        };
        self.ends_by_start.insert(start, end);
        true
    }

    /// Takes `index` out; false if it was not there.
    pub fn remove(&mut self, index: u32) -> bool {
        let Some((start, end)) = self
            .ends_by_start
            .range(..=index)
            .next_back()
            .map(|(start, end)| (*start, *end))
            .filter(|(_, end)| index < *end)
        else {
            return false;
        };
        self.len -= 1;
        self.ends_by_start.remove(&start);
        if start < index {
            self.ends_by_start.insert(start, index);
        }
        if index + 1 < end {
            self.ends_by_start.insert(index + 1, end);
        }
        true
    }

    /// The lowest index.
    #[must_use]
    pub fn first(&self) -> Option<u32> {
        self.ends_by_start.keys().next().copied()
    }

    /// All indexes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.ends_by_start.iter().flat_map(|(start, end)| *start..*end)
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        self.ends_by_start.iter().map(|(start, end)| *start..*end)
    }
}

impl FromIterator<u32> for RangeSet {
    fn from_iter<I: IntoIterator<Item = u32>>(indexes: I) -> Self {
        let mut set = Self::default();
        for index in indexes {
            set.insert(index);
        }
        set
    }
}

/// Stored as a list of `[start, end)` pairs.
impl Serialize for RangeSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.ends_by_start.iter())
    }
}

impl<'de> Deserialize<'de> for RangeSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pairs = Vec::<(u32, u32)>::deserialize(deserializer)?;
        let mut set = Self::default();
        let mut last_end = None;
        for (start, end) in pairs {
            if start >= end || last_end.is_some_and(|last| start <= last) {
                return Err(serde::de::Error::custom("ranges overlap, touch or are empty"));
            }
            last_end = Some(end);
            set.len += end - start;
            set.ends_by_start.insert(start, end);
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_what_a_plain_set_holds(steps in prop::collection::vec((any::<bool>(), 0u32..40), 0..200)) {
            let mut ranges = RangeSet::from_range(10..20);
            let mut plain: BTreeSet<u32> = (10..20).collect();
            for (insert, index) in steps {
                if insert {
                    prop_assert_eq!(ranges.insert(index), plain.insert(index));
                } else {
                    prop_assert_eq!(ranges.remove(index), plain.remove(&index));
                }
                prop_assert_eq!(ranges.len() as usize, plain.len());
                prop_assert_eq!(ranges.first(), plain.first().copied());
            }
            prop_assert!(ranges.iter().eq(plain.iter().copied()));
            let stored = serde_json::to_string(&ranges).unwrap();
            prop_assert_eq!(serde_json::from_str::<RangeSet>(&stored).unwrap(), ranges);
        }
    }
}
