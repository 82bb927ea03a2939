//! A node's time-bound right to run its attempts.
//!
//! The host counts a lease from the moment it *sent* the heartbeat, the
//! coordinator from the moment it *answered*, plus a margin for clock drift
//! and for the kill. So the host's end always comes first, and an exclusive
//! attempt is dead before anything is placed in its stead (FL-3). The
//! reasoning is that of Gray and Cheriton, "Leases", SOSP 1989.

use crate::{
    limits,
    mutation::{self, Mutation},
    time::{Millis, Timestamp},
};

/// How long a lease lasts on the host, from the heartbeat's sending. With the present interval it is the least that
/// it may be, so no test tells the other arm's arithmetic from another.
#[must_use]
pub const fn duration() -> Millis {
    let four = limits::HEARTBEAT_INTERVAL.0 * 4;
    if four > limits::LEASE_MIN.0 { Millis(four) } else { limits::LEASE_MIN }
}

/// When the coordinator may hold that a lease granted at `answered` has ended on the host.
#[must_use]
pub fn ended_here(answered: Timestamp) -> Timestamp {
    any_ended_here(duration(), answered)
}

/// The same for a lease of any length, as another version may have granted it.
#[must_use]
pub fn any_ended_here(duration: Millis, answered: Timestamp) -> Timestamp {
    if mutation::is_on(Mutation::NoLeaseMargin) {
        return answered + duration;
    }
    answered + duration + duration.percent(limits::LEASE_DRIFT_PERCENT) + limits::LEASE_KILL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_end_comes_first_although_its_clock_is_a_tenth_slow() {
        let answered = Timestamp(50_000);
        // Sent no later than it was answered; a slow clock counts 15 s in 16.5 s.
        let on_the_host = answered + duration().percent(110) + limits::LEASE_KILL;
        assert!(on_the_host < ended_here(answered));
    }
}
