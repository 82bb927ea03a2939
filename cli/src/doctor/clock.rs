//! The host's clock: leases count boot time, certificates and records the
//! time of day.

use nix::time::{ClockId, clock_gettime};

use super::finding::Finding;

/// What was seen of the clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// None: the kernel does not say.
    pub synchronised: Option<bool>,
    /// CLOCK_BOOTTIME is there.
    pub boot_time: bool,
}

impl Clock {
    /// Asks the kernel; sets nothing.
    pub fn look() -> Self {
        // SAFETY: zeroes are a valid timex.
        let mut clock: libc::timex = unsafe { std::mem::zeroed() };
        // SAFETY: with modes 0 adjtimex(2) only fills the structure, which is ours.
        let state = unsafe { libc::adjtimex(&raw mut clock) };
        Self {
            synchronised: (state >= 0).then_some(clock.status & libc::STA_UNSYNC == 0),
            boot_time: clock_gettime(ClockId::CLOCK_BOOTTIME).is_ok(),
        }
    }

    /// The rules.
    pub fn findings(self) -> Vec<Finding> {
        let (check, affects) = ("clock.synchronised", "certificates, times in the record");
        let mend = "run chronyd or systemd-timesyncd: timedatectl set-ntp true";
        vec![
            match self.synchronised {
                Some(true) => Finding::ok(check, affects, "the kernel's clock is held by a time service"),
                Some(false) => Finding::warn(check, affects, "no time service holds the kernel's clock", mend),
                None => Finding::unknown(check, affects, "this container hides it", "see the host"),
            },
            if self.boot_time {
                Finding::ok("clock.boot_time", "lease.timer (FL-3)", "CLOCK_BOOTTIME counts")
            } else {
                Finding::missing("clock.boot_time", "lease.timer (FL-3)", "no CLOCK_BOOTTIME", "run a newer Linux")
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::State;

    #[test]
    fn a_clock_that_nobody_holds_is_a_warning() {
        let state = |synchronised, boot_time| {
            Clock { synchronised, boot_time }.findings().iter().map(|f| f.state).collect::<Vec<_>>()
        };
        assert_eq!(state(Some(false), true), [State::Warn, State::Ok]);
        assert_eq!(state(Some(true), false), [State::Ok, State::Missing]);
        assert_eq!(state(None, true), [State::Unknown, State::Ok]);
    }
}
