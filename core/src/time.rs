//! Time as the core knows it: a number that the driver brings with each event.
//!
//! The driver's clock starts at the wall clock's time, or one millisecond past
//! the last stored time if that is later, and then advances with the machine's
//! boot-time clock. It never goes back, and a step of the wall clock does not
//! move it, so leases and deadlines hold whatever NTP does.

use core::ops::Add;

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch by the driver's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

/// A span of milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Timestamp {
    /// How long ago `earlier` was; zero if it was not.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }
}

impl Millis {
    /// This many seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds * 1_000)
    }

    /// `percent` hundredths of this span.
    #[must_use]
    pub const fn percent(self, percent: u64) -> Self {
        Self(self.0 * percent / 100)
    }
}

impl Add<Millis> for Timestamp {
    type Output = Self;

    fn add(self, span: Millis) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Add for Millis {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

/// Shows a span as a person says it: `340ms`, `12s`, `3m05s`, `2h10m`, `4d`.
impl core::fmt::Display for Millis {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let seconds = self.0 / 1_000;
        match seconds {
            0 => write!(f, "{}ms", self.0),
            1..60 => write!(f, "{seconds}s"),
            60..3_600 => write!(f, "{}m{:02}s", seconds / 60, seconds % 60),
            3_600..86_400 => write!(f, "{}h{:02}m", seconds / 3_600, seconds % 3_600 / 60),
            _ => write!(f, "{}d", seconds / 86_400),
        }
    }
}
