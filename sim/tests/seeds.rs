//! A few hundred seeds at every test run; `muster-sim FIRST COUNT` plays more.

use muster_sim::{Setup, run};

#[test]
fn every_promise_holds_in_every_seed() {
    for seed in 1..=300 {
        if let Err(violation) = run(seed, Setup::default()) {
            panic!("seed {seed}: {violation}; replay: cargo run --release -p muster-sim -- {seed}");
        }
    }
}

#[test]
fn one_seed_is_one_run() {
    assert_eq!(run(7, Setup::default()), run(7, Setup::default()));
}
