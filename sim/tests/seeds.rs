//! A few hundred seeds at every test run; `muster simulate` plays more.

use std::sync::Mutex;

use muster_sim::{Faults, Progress, Setup, play_all, run, trace};

/// Seeds at every test run.
const SEEDS: u64 = 200;

#[test]
fn every_promise_holds_in_every_seed() {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let summary = play_all(1, SEEDS, threads, Setup::default(), &|_| {});
    if let Some(failure) = summary.failure {
        let (lines, _, _) = trace(failure.seed, failure.setup, 40);
        let seed = failure.seed;
        panic!("{}\nseed {seed}: {}; replay: muster simulate --trace {seed}", lines.join("\n"), failure.violation);
    }
    assert_eq!(summary.seeds, SEEDS);
}

#[test]
fn one_seed_is_one_run_to_the_byte() {
    for seed in [7, 8] {
        let (lines, hash, _) = trace(seed, Setup::default(), 1_000_000);
        let (again, hash_again, _) = trace(seed, Setup::default(), 1_000_000);
        assert!(lines == again && hash == hash_again, "seed {seed} went two ways");
        assert!(lines.len() > 5_000, "a trace of {} lines", lines.len());
    }
    let (_, one, _) = trace(7, Setup::default(), 0);
    let (_, other, _) = trace(8, Setup::default(), 0);
    assert_ne!(one, other, "another seed is another run");
}

#[test]
fn what_comes_out_does_not_depend_on_the_number_of_threads() {
    let small = Setup { jobs: 30, ..Setup::default() };
    let one = play_all(1, 8, 1, small, &|_| {});
    let told = Mutex::new(Vec::new());
    let three = play_all(1, 8, 3, small, &|progress| told.lock().expect("nobody panicked").push(progress));
    assert_eq!((one.steps, one.starts, one.coverage), (three.steps, three.starts, three.coverage));
    let mut told = told.into_inner().expect("nobody panicked");
    told.sort_unstable_by_key(|progress| progress.seeds);
    assert_eq!(told, (1..=8).map(|seeds| Progress { seeds, violations: 0 }).collect::<Vec<_>>());
}

#[test]
fn without_faults_none_occurs() {
    let calm = Setup { faults: Faults::NONE, ..Setup::default() };
    let outcome = run(3, calm).expect("every promise holds");
    let faults = outcome.coverage.lines().into_iter().filter(|(name, times)| name.starts_with("fault ") && *times > 0);
    assert_eq!(faults.collect::<Vec<_>>(), []);
    assert!(outcome.starts > 500, "200 jobs were played, and {} attempts started", outcome.starts);
}
