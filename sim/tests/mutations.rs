//! Rules of the core are broken one at a time, and seeds are played until the
//! checks notice. `cargo test -p muster-sim --features mutations --test mutations -- --nocapture`
//! prints how many seeds each took.
//!
//! Three rules are not here, because others cover what they are for as long as those hold; tests of the core alone hold them:
//! - A host says what it holds under another epoch than the record's (`unknown_here`): numbers of attempts are passed by at
//!   the hello, before anything is sent to that host, so that the same number under two epochs takes more lost writes than
//!   that passes by. `tests/scenarios/late_hello.txt`.
//! - The reopening of an older drain (`Closure::reopen`): orders keep the order of their stream, and one of an older stream
//!   does not arrive. `core/src/host/tests.rs`: `a_reopened_host_takes_work_and_an_older_reopening_opens_nothing`.
//! - An end on an older stream (`attempt_ended`): what a host says to be over is over (FL-5), whichever stream brings it, and
//!   its number and epoch say which attempt it is. To take it would only acknowledge it where nobody listens.
//!   `tests/scenarios/late_hello.txt`.

use muster_core::mutation::{self, Mutation};
use muster_sim::{Setup, run};

/// A broken rule that so many seeds do not show would be as good as not checked.
const SEEDS_MAX: u64 = 2_000;

#[test]
fn every_rule_that_is_broken_on_purpose_is_noticed() {
    let mut missed = Vec::new();
    for rule in Mutation::ALL {
        mutation::set(Some(rule));
        let found = (1..=SEEDS_MAX).find_map(|seed| run(seed, Setup::default()).err().map(|broken| (seed, broken)));
        mutation::set(None);
        match found {
            Some((seeds, broken)) => println!("{rule:?}: noticed after {seeds} seeds: {broken}"),
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "not noticed in {SEEDS_MAX} seeds: {missed:?}");
}
