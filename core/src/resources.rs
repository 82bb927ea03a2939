//! Amounts of CPU, memory and disk: what a node has, what is taken, what a task asks.

use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Serialize};

/// Amounts of a node's resources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of the working folder.
    pub disk_bytes: u64,
}

impl Resources {
    /// Every amount of `self` is there in `available`.
    #[must_use]
    pub const fn fits_in(&self, available: &Self) -> bool {
        self.cpu_milli <= available.cpu_milli
            && self.memory_bytes <= available.memory_bytes
            && self.disk_bytes <= available.disk_bytes
    }

    /// What is left after `taken`; nothing goes below zero.
    #[must_use]
    pub const fn minus(&self, taken: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(taken.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_sub(taken.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(taken.disk_bytes),
        }
    }

    /// Both together.
    #[must_use]
    pub const fn plus(&self, more: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(more.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_add(more.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(more.disk_bytes),
        }
    }

    /// How many of `one` fit in here; an amount that `one` does not ask is no bound.
    #[must_use]
    pub fn count_of(&self, one: &Self) -> u64 {
        [(self.cpu_milli, one.cpu_milli), (self.memory_bytes, one.memory_bytes), (self.disk_bytes, one.disk_bytes)]
            .into_iter()
            .filter(|(_, asked)| *asked > 0)
            .map(|(have, asked)| have / asked)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// The first amount of `self` that `available` lacks, as a sentence's part:
    /// "24 GiB of memory, and it asks 32 GiB".
    #[must_use]
    pub fn shortage(&self, available: &Self) -> Option<String> {
        if self.cpu_milli > available.cpu_milli {
            Some(alloc::format!("{} CPU, and it asks {}", Cores(available.cpu_milli), Cores(self.cpu_milli)))
        } else if self.memory_bytes > available.memory_bytes {
            Some(lack("memory", available.memory_bytes, self.memory_bytes))
        } else if self.disk_bytes > available.disk_bytes {
            Some(lack("disk", available.disk_bytes, self.disk_bytes))
        } else {
            None
        }
    }
}

fn lack(of: &str, available: u64, asked: u64) -> String {
    match (alloc::format!("{}", Bytes(available)), alloc::format!("{}", Bytes(asked))) {
        // Nearly the same: what is missing tells more than two equal numbers.
        (have, asks) if have == asks => alloc::format!("{have} of {of}, and it asks {} more", Bytes(asked - available)),
        (have, asks) => alloc::format!("{have} of {of}, and it asks {asks}"),
    }
}

/// Shows thousandths of a core as cores: `0.5`, `2`.
#[derive(Clone, Copy, Debug)]
pub struct Cores(pub u64);

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 1_000, self.0 % 1_000) {
            (whole, 0) => write!(f, "{whole}"),
            (whole, part) if part % 100 == 0 => write!(f, "{whole}.{}", part / 100),
            (whole, part) => write!(f, "{whole}.{part:03}"),
        }
    }
}

/// Shows bytes in the largest binary unit that keeps the number above one: `512 MiB`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut unit = 0;
        let mut tenths = u128::from(self.0) * 10;
        while tenths >= 10_240 && unit + 1 < UNITS.len() {
            tenths /= 1_024;
            unit += 1;
        }
        match (tenths / 10, tenths % 10) {
            (whole, 0) => write!(f, "{whole} {}", UNITS[unit]),
            (whole, tenth) => write!(f, "{whole}.{tenth} {}", UNITS[unit]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn amounts_are_shown_as_people_say_them() {
        assert_eq!(Cores(500).to_string(), "0.5");
        assert_eq!(Cores(2_000).to_string(), "2");
        assert_eq!(Bytes(512 << 20).to_string(), "512 MiB");
        assert_eq!(Bytes(24 << 30).to_string(), "24 GiB");
        assert_eq!(Bytes(1_536).to_string(), "1.5 KiB");
    }

    #[test]
    fn a_task_that_asks_nothing_of_a_resource_is_not_bound_by_it() {
        let node = Resources { cpu_milli: 2_000, memory_bytes: 0, disk_bytes: 0 };
        let task = Resources { cpu_milli: 500, memory_bytes: 0, disk_bytes: 0 };
        assert_eq!(node.count_of(&task), 4);
    }
}
