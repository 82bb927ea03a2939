//! CLOCK_BOOTTIME: counts suspend, and nobody sets it.

use muster_core::host::Boottime;
use nix::time::{ClockId, clock_gettime};

/// Milliseconds since the boot.
#[must_use]
pub fn boottime() -> Boottime {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39");
    Boottime(time.tv_sec() as u64 * 1_000 + time.tv_nsec() as u64 / 1_000_000)
}
