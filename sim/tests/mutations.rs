//! Rules of the core are broken one at a time, and seeds are played until the
//! checks notice. `cargo test -p muster-sim --features mutations --test mutations -- --nocapture`
//! prints how many seeds each took.

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
